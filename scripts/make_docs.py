"""Write the pages of docs/ that are made from the code: config.md, commands.md, recipes.md.

    python scripts/make_docs.py

tests/pages/test_made.py fails where a page is not what this would write.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from mlxlora import RECIPES
from mlxlora.cli.main import commands
from shared.config import schema
from shared.jobs.recipes import list_recipes

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONFIG = """\
A recipe is a YAML file with these keys; `model` and `data.path` are all it needs. `--set key.sub=value` changes
one on the command line, `mlxlora schema` prints the JSON schema, and `config.yaml` in the run folder holds every
value as it was used. An unknown key is an error that names its line and the nearest key."""
COMMANDS = """\
Every command takes `--json` (one object as the last line of stdout), `--debug` (the traceback of an error) and
`--offline` (no network); `version` needs no `--debug`. Exit codes: 0 done, 1 a bug of ours, 2 usage, config or
data, 3 model, adapter or checkpoint, 4 a capability or a dependency is missing, 5 diverged (not finite), 6 out of
memory, 7 storage, 130 and 143 interrupted with the state saved. [Errors](errors.md) explains each code."""
RECIPE_INTRO = """\
`mlxlora recipes ls` lists them, `mlxlora recipes cp NAME [DEST]` copies one with rows to try it on, and `--demo`
copies the embedded demo base too. Each is run by the tests on both backends. Where it fits is what `mlxlora
estimate` says of the model's real sizes and rows of full length, in a test too; on GPUs and Macs the estimate's
share of activations is borrowed from a CPU until it is measured there."""
NUMBERS = {int: "N", float: "X"}
MADE = "\n<!-- made by scripts/make_docs.py -->\n"


def pages() -> dict[str, str]:
    """Return every made page by its name in docs/."""
    return {"config.md": config_page(), "commands.md": commands_page(), "recipes.md": recipes_page()}


def config_page() -> str:
    """Return the reference of all settings, a table for each section."""
    whole = schema()
    sections = {key: section_of(value, whole) for key, value in whole["properties"].items()}
    top = {key: value for key, value in whole["properties"].items() if not sections[key]}
    parts = [
        "# Settings",
        CONFIG,
        "## Top level",
        table(top, whole, required=whole["required"]),
    ]
    for key, section in sections.items():
        if section:
            parts += [f"## {key}", table(section["properties"], whole, required=section.get("required", []))]
    source = whole["$defs"]["SourceConfig"]
    parts += ["## One of several sources", "Where `data.path` is a list:"]
    parts += [table(source["properties"], whole, required=source["required"])]
    return "\n\n".join(parts) + "\n" + MADE


def section_of(value: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any] | None:
    """Return the section that a key of the top level holds, None where it holds a value."""
    name = value.get("$ref", "").rpartition("/")[2]
    return whole["$defs"].get(name)


def table(properties: dict[str, Any], whole: dict[str, Any], *, required: list[str]) -> str:
    """Return a section's keys: values, default, meaning."""
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, value in properties.items():
        default = "needed" if key in required else code(value.get("default"))
        meaning = value.get("description", "").replace("|", "\\|")
        rows.append(f"| `{key}` | {kind(value, whole)} | {default} | {meaning} |")
    return "\n".join(rows)


def code(value: Any) -> str:
    """Return a default as YAML would have it."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{str(value).replace(chr(39), '')}`"


def kind(value: dict[str, Any], whole: dict[str, Any]) -> str:
    """Return in words what values a key takes."""
    if "anyOf" in value:
        return ", ".join(dict.fromkeys(kind(option, whole) for option in value["anyOf"]))
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return "{path, weight}" if name == "SourceConfig" else kind(whole["$defs"][name], whole)
    if "enum" in value or "const" in value:
        return ", ".join(f"`{option}`" for option in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        inner = value.get("prefixItems") or [value["items"]]
        return f"list of {', '.join(dict.fromkeys(kind(item, whole) for item in inner))}"
    if value.get("type") == "object":
        inner = value.get("additionalProperties")
        return f"mapping to {kind(inner, whole)}" if isinstance(inner, dict) else "mapping"
    words = {"boolean": "`true`, `false`", "string": "text", "null": "`null`"}
    return words.get(value.get("type", "any value")) or number_kind(value)


def number_kind(value: dict[str, Any]) -> str:
    """Return a number's kind and bounds, e.g. "integer, 1 to 65536"."""
    limits = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "below"))
    bounds = " ".join(f"{word} {value[name]}" for name, word in limits if name in value)
    return f"{value.get('type', 'any')} {bounds}".strip()


def commands_page() -> str:
    """Return the reference of all commands: what `--help` says."""
    parts = [
        "# Commands",
        COMMANDS,
    ]
    tree: Any = commands()
    for name in sorted(tree.commands):
        command = tree.commands[name]
        inner = getattr(command, "commands", None)
        for part, leaf in sorted(inner.items()) if inner else [("", command)]:
            parts += command_parts(f"mlxlora {name} {part}".strip(), leaf)
    return "\n\n".join(parts) + "\n" + MADE


def command_parts(name: str, command: Any) -> list[str]:
    """Return a command's heading, help and options."""
    rows = ["| | default | |", "|---|---|---|"]
    for param in command.params:
        if param.name in ("as_json", "debug", "offline"):
            continue
        takes = "" if getattr(param, "is_flag", False) or not param.opts[0].startswith("-") else f" {metavar(param)}"
        title = "/".join([*param.opts, *param.secondary_opts]) if param.opts[0].startswith("-") else shown(param)
        default = "needed" if param.required else default_of(param)
        rows.append(f"| `{title}{takes}` | {default} | {(param.help or '').replace('|', chr(92) + '|')} |")
    return [f"## {name}", (command.help or "").strip(), *(["\n".join(rows)] if len(rows) > 2 else [])]


def shown(param: Any) -> str:
    """Return how usage names an argument."""
    return (param.metavar or param.name.upper()).strip("[]")


def metavar(param: Any) -> str:
    """Return what an option takes, e.g. "DIR"."""
    kinds = (param.bare_type, *get_args(param.bare_type))
    usual = next((word for number, word in NUMBERS.items() if number in kinds), "TEXT")
    return str(param.metavar or usual).replace("|", "\\|")


def default_of(param: Any) -> str:
    """Return an option's default, nothing where it has none."""
    none = param.default in (None, False, ()) or callable(param.default)
    return "" if none else f"`{param.default}`"


def recipes_page() -> str:
    """Return the recipes as they are, comments included."""
    parts = [
        "# Recipes",
        RECIPE_INTRO,
    ]
    for recipe in list_recipes(RECIPES):
        text = re.sub(r"\A(#.*\n)+", "", recipe.file.read_text(encoding="utf-8"))
        parts += [f"## {recipe.name}", recipe.title, f"Fits: {', '.join(recipe.fits)}."]
        parts += [f"```yaml\n{text}```"]
    return "\n\n".join(parts) + "\n" + MADE


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")

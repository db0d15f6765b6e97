"""`mlxlora COMMAND`: the entry point, exit codes, and how errors look."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import wraps
from typing import Annotated, Any, TextIO, cast

import typer
from typer.exceptions import TyperException
from typer.main import get_command

import mlxlora
from mlxlora.cli.app import app
from mlxlora.cli.chatting import chat
from mlxlora.cli.converting import convert
from mlxlora.cli.evaluating import evaluate
from mlxlora.cli.fusing import fuse
from mlxlora.cli.generating import generate
from mlxlora.cli.measuring import bench
from mlxlora.cli.merging import merge
from mlxlora.cli.planning import estimate
from mlxlora.cli.previewing import preview
from mlxlora.cli.quantizing import quantize
from mlxlora.cli.recipes import recipes
from mlxlora.cli.running import runs
from shared.errors import DataError, MlxloraError, ModelError
from shared.watching.display import Sturdy

app.command()(bench)
app.command()(chat)
app.command()(convert)
app.command()(estimate)
app.command()(evaluate)
app.command()(preview)
app.command()(quantize)
app.command()(fuse)
app.command()(generate)
app.command()(merge)
app.add_typer(runs)
app.add_typer(recipes)

TOLD = object()  # what a command returns that has said that it was stopped


def main() -> None:
    """Run the command line and exit with the contract's code."""
    sys.stderr = cast(TextIO, Sturdy(sys.stderr))  # bars and warnings of libraries meet closed pipes too
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets a question mark
        if (change := getattr(stream, "reconfigure", None)) is not None:
            change(errors="replace")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # the reader, e.g. `head`, or the terminal has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Return the exit code of a command line; errors are at most three lines on stderr."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    if arguments in ([], ["recipes"], ["runs"]):  # groups of commands
        arguments = [*arguments, "--help"]
    if arguments == ["--version"]:  # at once: the command would load what checks its options
        print(mlxlora.__version__)
        return 0
    if arguments[:1] == ["--version"]:
        arguments = ["version", *arguments[1:]]
    try:
        code = commands().main(arguments, prog_name="mlxlora", standalone_mode=False, obj=arguments)
        if code == 130:  # typer answers a Ctrl-C between its own steps, without a word
            return fail("stopped", 130, as_json, "E800", quiet=True)
        return 130 if code is TOLD else code if isinstance(code, int) else 0
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        place = getattr(error, "ctx", None)
        command = place.command_path if place is not None else "mlxlora"
        return fail(
            "\n".join(message.splitlines()[:2]) + f"\nfix: {command} --help lists what it takes", 2, as_json, "E200"
        )
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return fail("stopped", 130, as_json, "E800", quiet=True)
    except Exception as error:
        return answer(error, debug=debug, as_json=as_json)


def commands() -> Any:
    """Return the tree of commands, each of which takes --offline and answers Ctrl-C."""
    tree: Any = get_command(app)
    source = typer.Typer(add_completion=False)
    source.command()(offline_option)
    for command in leaves(tree):
        command.params.extend(param for param in get_command(source).params if param.name == "offline")
        command.callback = answering(command.callback)
    return tree


def answering(command: Any) -> Any:
    """Return a command that says when it was stopped: typer would end without a word."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            fail("stopped", 130, bool(kwargs.get("as_json")), "E800", quiet=True)
            return TOLD
        except (DataError, ModelError) as error:
            raise at_recipe(error, kwargs).with_traceback(error.__traceback__) from error.__cause__

    return run


def at_recipe(error: MlxloraError, given: Mapping[str, Any]) -> MlxloraError:
    """Return an error about a path that is not there with that of the same name beside the recipe, if there is one."""
    file, key = given.get("config"), {"E210": "data.path", "E300": "model"}.get(error.code)
    if file is None or key is None:
        return error
    from mlxlora.cli.options import given as values_of
    from shared.config_file import beside

    values = values_of(given.get("model"), given.get("data"))
    config = mlxlora.load_config(file, overrides=given.get("overrides") or [], **values)
    fix = beside(config, file, key)
    return error if fix is None else type(error)(error.what, code=error.code, expected=error.expected, fix=fix)


def leaves(tree: Any) -> Iterator[Any]:
    """Yield every command of a tree."""
    for command in tree.commands.values():
        yield from leaves(command) if hasattr(command, "commands") else (command,)


def go_offline(given: bool) -> None:
    """Forbid the network to every library, before any of them is loaded."""
    if given:
        os.environ["HF_HUB_OFFLINE"] = "1"


Offline = Annotated[
    bool,
    typer.Option(
        "--offline", callback=go_offline, expose_value=False, help="No network: what the hub has must be here already."
    ),
]


def offline_option(offline: Offline = False) -> None:
    """Carry the option that every command has."""


def answer(error: Exception, *, debug: bool, as_json: bool) -> int:
    """Print what a command failed with, and return the exit code; a traceback where asked for or where we are wrong."""
    from shared.errors import Interrupted, MlxloraError, StorageError, is_out_of_memory

    if isinstance(error, OSError) and not isinstance(error, MlxloraError) and error.filename:
        error = StorageError(
            f"cannot use {error.filename}: {error.strerror}", fix="check the path, its permissions and the space left"
        )
    known = isinstance(error, MlxloraError) or is_out_of_memory(error)
    if debug or not known:
        traceback.print_exception(error)
    if isinstance(error, MlxloraError):
        return fail(str(error), error.exit_code, as_json, error.code, quiet=isinstance(error, Interrupted))
    if known:
        return fail("out of memory\nfix: a smaller model, data.max_length or batch", 6, as_json, "E600")
    return fail("this is a bug of mlxlora; please report it with the lines above", 1, as_json, "E100")


def fail(message: str, exit_code: int, as_json: bool, code: str, *, quiet: bool = False) -> int:
    """Print an error on stderr, and as the JSON object where one was asked for; return the exit code."""
    with suppress(OSError):  # the terminal may be gone; the exit code still says it
        print(message if quiet else f"error {code}: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"ok": False, "exit_code": exit_code, "code": code, "error": message}))
    return exit_code


if __name__ == "__main__":
    main()

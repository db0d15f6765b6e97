"""Write tests/unit/golden_masks.json, rows of every format, and golden_styles.json, conversations in every template's
style, with what TRL's SFTTrainer makes of them.

    python scripts/trl_masks.py     # needs `pip install trl`; the tests do not

TRL reads texts, prompts with completions, and messages; rows of other formats (ShareGPT, Alpaca, other names of columns
and reasoning) are given to it as the messages written beside them here, which is what they mean. Its loss is on the
completion (`completion_only_loss`) or on what the template marks as the assistant's (`assistant_only_loss`). It gets
the templates of tests/unit/marked_templates.py, and the tests those without marks.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import save_model, save_tokenizer  # noqa: E402
from tests.unit.chat_templates import MARKED  # noqa: E402
from tests.unit.marked_templates import ALL, TALKS, TEMPLATES, talk_row  # noqa: E402

OUTPUT = ROOT / "tests/unit/golden_masks.json"
STYLES_OUTPUT = ROOT / "tests/unit/golden_styles.json"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    """Return a message."""
    return {"role": role, "content": content, **more}


TALK = [
    said("user", "hello?"), said("assistant", "hello world"), said("user", "naïve 🦊"), said("assistant", "the\n\nend"),
]  # fmt: skip
SYSTEM = [said("system", "Be brief."), *TALK]
TOOL_TALK = [
    said("user", "Rome?"), said("assistant", "", tool_calls=[CALL]), said("tool", "sunny", name="weather"),
    said("assistant", "It is sunny."), said("user", "thanks"), said("assistant", "Bye."),
]  # fmt: skip
THOUGHT = [said("user", "1+1?"), said("assistant", "2", reasoning_content="add"), *TALK]
# name -> (the row as a user has it, as TRL reads it, data.columns)
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "text": ({"text": "once upon the world"}, {"text": "once upon the world"}, {}),
    "prompt and completion": (
        {"prompt": "Q: hello?\nA:", "completion": " the world"},
        {"prompt": "Q: hello?\nA:", "completion": " the world"}, {},
    ),
    "completion behind two line ends": (
        {"prompt": "hello\n\n", "completion": "naïve 🦊"}, {"prompt": "hello\n\n", "completion": "naïve 🦊"}, {}
    ),
    "columns": (
        {"question": "two? ", "answer": "hello", "id": 7}, {"prompt": "two? ", "completion": "hello"},
        {"prompt": "question", "completion": "answer"},
    ),
    "messages": ({"messages": TALK}, {"messages": TALK}, {}),
    "messages with a system text": ({"messages": SYSTEM}, {"messages": SYSTEM}, {}),
    "messages with tools": ({"messages": TOOL_TALK, "tools": TOOLS}, {"messages": TOOL_TALK, "tools": TOOLS}, {}),
    "reasoning": ({"messages": THOUGHT}, {"messages": THOUGHT}, {}),
    "reasoning called thinking": (
        {"messages": [said("user", "1+1?"), said("assistant", "2", thinking="add")]}, {"messages": THOUGHT[:2]}, {}
    ),
    "ShareGPT": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TALK
            ],
        },
        {"messages": SYSTEM}, {},
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Rome?"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "sunny"}, {"from": "gpt", "value": "It is sunny."},
            ],
            "tools": json.dumps(TOOLS),
        },
        {"messages": TOOL_TALK[:4], "tools": TOOLS}, {},
    ),
    "Alpaca": (
        {"instruction": "Say it.", "input": "hello", "output": "hello world"},
        {"messages": [said("user", "Say it.\n\nhello"), said("assistant", "hello world")]}, {},
    ),
}  # fmt: skip


def masks_of(row: dict[str, Any], model: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the token ids and the mask that SFTTrainer trains a row with."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    talks = "messages" in row
    with tempfile.TemporaryDirectory() as folder:
        options = {"assistant_only_loss": True} if talks else {}
        arguments = SFTConfig(output_dir=folder, max_length=None, use_cpu=True, bf16=False, report_to=[], **options)
        dataset = Dataset.from_list([row])
        trainer = SFTTrainer(model=str(model), args=arguments, train_dataset=dataset, processing_class=tokenizer)
        made = trainer.train_dataset[0]
        batch = trainer.data_collator([made])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return {"ids": ids, "mask": [int(label != -100) for label in labels]}


def write_styles(model: Path) -> int:
    """Write golden_styles.json, a line for each style and conversation that its template takes; return how many."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    lines = []
    for name, style in ALL.items():
        save_tokenizer(
            model, special=style.special, bos=style.bos, eos=style.eos, pad=None, adds_bos=False,
            template=TEMPLATES[name],
        )  # fmt: skip
        for talk in TALKS:
            row = talk_row(talk, as_text=name == "deepseek")
            try:
                found = masks_of(row, model, AutoTokenizer.from_pretrained(str(model)))
            except TemplateError:  # of a role that it does not know
                continue
            mask = "".join(map(str, found["mask"]))
            lines.append(json.dumps({"style": name, "talk": talk, "ids": found["ids"], "mask": mask}))
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "tokenizers")}
    head = json.dumps({"made_by": "scripts/trl_masks.py", "versions": versions})[:-1]
    rows = ",\n".join(lines)
    STYLES_OUTPUT.write_text(f'{head}, "rows": [\n{rows}\n]}}\n', encoding="utf-8")
    return len(lines)


def main() -> None:
    """Write the files."""
    from transformers import AutoTokenizer

    golden: dict[str, Any] = {"made_by": "scripts/trl_masks.py"}
    golden["versions"] = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "tokenizers")}
    golden["rows"] = []
    with tempfile.TemporaryDirectory() as name:
        model = save_model(Path(name) / "m", family="llama", tied=True, dtype="float32", seed=0, layers=1)
        save_tokenizer(model, template=MARKED)
        for title, (row, theirs, columns) in ROWS.items():
            found = masks_of(theirs, model, AutoTokenizer.from_pretrained(str(model)))
            golden["rows"].append({"name": title, "row": row, "columns": columns, **found})
        print(f"{STYLES_OUTPUT.name}: {write_styles(model)} rows")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in golden.pop("rows"))
    head = json.dumps(golden)[:-1]
    OUTPUT.write_text(f'{head}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{OUTPUT.name}: {len(ROWS)} rows")


if __name__ == "__main__":
    main()

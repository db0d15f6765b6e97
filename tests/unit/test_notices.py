"""What a tokenizer or a template drops of rows, and what is odd in them, is counted and told by name."""

from __future__ import annotations

import io
import json
import shutil

import pytest

import mlxlora
from mlxlora.cli.main import run
from shared.config_file import build_config
from shared.data.notices import crossing_tokens, find_notices, notices_of, sample_rows
from shared.data.rows import make_row
from shared.data.tokenize import Tokenizer, load_tokenizer
from shared.jobs.prepare import prepare
from tests.unit.chat_templates import CHATML, DEEPSEEK, IM, MARKED, QWEN_3, STYLES

CALL = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"


def user(text):
    return {"role": "user", "content": text}


def assistant(text="", **more):
    return {"role": "assistant", "content": text, **more}


TALK = [
    user("q"), assistant("a", reasoning="hm"), user("Rome?"), assistant("I look.", tool_calls=CALL),
    {"role": "tool", "content": "sunny"}, assistant("Sunny.", reasoning="so"),
]  # fmt: skip
LEFT = "the chat template leaves out "


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    """Return a tokenizer of letters, blanks and an unknown token."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate(["<unk>", "</s>", *" abcdefghijklmnopqrstuvwxyzé"])}
    inner = Inner(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    folder = tmp_path_factory.mktemp("lossy")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>").save_pretrained(str(folder))
    return load_tokenizer(folder)


def notices(tokenizer, *values):
    rows = [make_row(value, source=f"train.jsonl:{n}") for n, value in enumerate(values, start=1)]
    return {found.what: (found.rows, found.first) for found in find_notices(rows, tokenizer, total=len(rows))}


def test_characters_that_the_tokenizer_drops_are_named(lossy):
    rows = [{"text": "a plain text"}, {"text": "a fox 🦊, ok"}, {"prompt": "cafe\u0301 ", "completion": "unk <b> 🦊"}]
    found = notices(lossy, *rows)
    assert found.pop("the tokenizer drops characters ('🦊', ',', '<', '>')") == (2, "train.jsonl:2")
    assert found == {"rows of another kind than the first (2 text, 1 prompt)": (1, "train.jsonl:3")}


def test_a_tokenizer_of_bytes_drops_nothing(make_tokenizer):
    assert not notices(make_tokenizer(), {"text": "🦊 naïve cafe\u0301\t\n  x \u00a0 <|im_end|>"})


@pytest.mark.parametrize(("name", "drops"), [("TinyStories-656K", True), ("stories260K", False)])
def test_real_tokenizers(stored_model, name, drops):
    found = notices(load_tokenizer(stored_model(name)), {"text": "hello fox"}, {"text": "naïve 🦊"})
    assert found == ({"the tokenizer drops characters ('ï', '🦊')": (1, "train.jsonl:2")} if drops else {})


BORDER = "a token holds the end of the prompt and the beginning of the completion, and is learned"


def test_a_token_over_the_border_of_prompt_and_completion_is_told(stored_model):
    fused, pieces = (load_tokenizer(stored_model(name)) for name in ("TinyStories-656K", "stories260K"))
    apart = {"prompt": "Tom has", "completion": " a cat"}
    assert notices(fused, {"prompt": "Tom has a", "completion": "\n"}, apart) == {BORDER: (1, "train.jsonl:2")}
    assert not notices(pieces, apart, {"prompt": "", "completion": "a cat"})
    assert notices(pieces, apart, {"prompt": "Tom has ", "completion": "a cat"}) == {BORDER: (1, "train.jsonl:2")}


def test_of_long_rows_the_border_is_looked_at_too(stored_model):
    long = {"prompt": "Tom ran. " * 500 + "Tom has", "completion": " a cat" + " and a dog" * 500}
    rows = [make_row(long, source="train.jsonl:1")]
    assert crossing_tokens(rows, load_tokenizer(stored_model("TinyStories-656K")), most=400) == [{BORDER: ()}]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_clean_border_says_nothing_whatever_the_tokenizer_adds(make_tokenizer, adds_eos):
    assert not notices(make_tokenizer(adds_eos=adds_eos), {"prompt": "hello", "completion": " world"})


@pytest.mark.parametrize(
    ("template", "special", "parts"),
    [
        (CHATML, IM, ["reasoning", "tool calls", "tools"]),
        (QWEN_3, IM, ["reasoning"]),  # that of the first answer
        (MARKED, IM, []),
        (NO_SYSTEM, IM, ["system messages", "reasoning", "tool calls", "tools"]),
        (DEEPSEEK, ("<|User|>", "<|Assistant|>", "<|end|>"), ["system messages", "reasoning", "tools"]),
    ],
)
def test_parts_that_the_template_drops_are_named(make_tokenizer, template, special, parts):
    tokenizer = make_tokenizer(special=special, bos=None, eos=special[-1], pad=None, adds_bos=False, template=template)
    row = {"messages": [{"role": "system", "content": "Be brief."}, *TALK], "tools": TOOLS}
    assert notices(tokenizer, row) == {LEFT + part: (1, "train.jsonl:1") for part in parts}


@pytest.mark.parametrize("style", STYLES)
def test_a_plain_conversation_has_nothing_dropped_in_any_style(make_tokenizer, style):
    of = STYLES[style]
    tokenizer = make_tokenizer(
        special=of.special, bos=of.bos, eos=of.eos, pad=None, adds_bos=False, template=of.template
    )
    assert not notices(tokenizer, {"messages": [user(" q "), assistant("a"), user("r"), assistant("b\n")]})


def test_what_is_odd_in_conversations_is_counted(make_tokenizer):
    rows = [
        {"messages": [user("q"), assistant("a")], "id": 1},
        {"messages": [user("q"), assistant(" ")]},
        {"messages": [user("q"), assistant("a"), user("bye")]},
        {"messages": [user("q"), user("r"), assistant("a")], "id": 2, "la\x1b[2J\nbel": True},
    ]
    assert notices(make_tokenizer(), *rows) == {
        r"columns that are not read (id, la\x1b[2J\nbel)": (2, "train.jsonl:1"),
        "an empty answer, which teaches to say nothing": (1, "train.jsonl:2"),
        "the last message is no answer, and nothing is learned from it": (1, "train.jsonl:3"),
        "two messages of one role in a row": (1, "train.jsonl:4"),
    }


def test_a_sample_is_even_and_says_that_it_is_one(make_tokenizer):
    rows = [make_row({"messages": [user("q"), assistant("")]}, source=f"a:{n}") for n in range(2500)]
    some = sample_rows(rows)
    assert (len(some), some[0], some[-1]) == (1000, rows[0], rows[-1])
    (found,) = find_notices(some[:10], make_tokenizer(), total=2500)
    assert found.text == "an empty answer, which teaches to say nothing: 10 of 10 rows looked at, first a:0"


def test_the_second_time_no_tokenizer_is_loaded(make_tokenizer):
    first = make_tokenizer()
    rows = [make_row({"messages": [user("kept"), assistant("")]}, source="a:1")]
    second = Tokenizer(first.folder)
    assert notices_of(rows, first, total=1, keep=True) == notices_of(rows, second, total=1, keep=True)
    assert "inner" not in vars(second)
    assert notices_of(rows, second, total=1, keep=False)
    assert "inner" in vars(second)


def test_of_rows_to_evaluate_on_is_told_what_is_not_true_of_the_training_rows(tiny_model_folder, write_jsonl, tmp_path):
    write_jsonl({"text": "a", "id": 1}, {"text": "b", "id": 2})
    write_jsonl({"text": "c", "id": 3}, {"messages": [user("q"), assistant("")]}, name="valid.jsonl")
    config = build_config({"model": str(tiny_model_folder()), "data": {"path": str(tmp_path)}})
    assert {notice.about: notice.first for notice in prepare(config).notices} == {
        "columns that are not read": "train.jsonl:1",
        "an empty answer, which teaches to say nothing": "valid.jsonl:2",
        "rows of another kind than the first": "valid.jsonl:2",
    }


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_they_are_printed_and_stand_in_manifest_report_and_preview(
    tiny_model_folder, write_jsonl, tmp_path, capsys, backend
):
    file = write_jsonl({"messages": [user("q"), assistant("")], "id": 1}, {"text": "a"})
    values = {
        "model": str(tiny_model_folder()), "data": {"path": str(file)}, "output": str(tmp_path / "run"),
        "backend": backend, "train": {"updates": 1, "dtype": "float32"},
    }  # fmt: skip
    config = build_config(values)
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    assert run(["train", str(tmp_path / "run.yaml")]) == 0
    lines = [notice.text for notice in prepare(config).notices]
    assert len(lines) == 3
    printed = capsys.readouterr().err
    assert all(line in printed for line in lines)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["notices"]["columns that are not read (id)"] == "1 of 2 rows, first train.jsonl:1"
    assert "teaches to say nothing" in (tmp_path / "run/report.html").read_text()
    assert list(mlxlora.preview(config).splits[0].notices) == lines


@pytest.mark.parametrize("texts", [["Привет 🎉"], ["a cat", "Привет 🎉 🎉"]])
def test_characters_of_prompts_that_do_not_reach_the_model_are_said_once(stored_model, capsys, texts):
    model = str(stored_model("TinyStories-656K"))
    prompts = [part for text in texts for part in ("--prompt", text)]
    assert run(["generate", model, *prompts, "--max-tokens", "1", "--backend", "torch", "--json"]) == 0
    out, said = capsys.readouterr()
    assert said.count("the tokenizer drops characters (") == 1
    assert "'П'" in said
    assert "drops" not in out


def test_a_chat_says_what_of_a_message_does_not_reach_the_model(
    tiny_model_folder, tmp_path, lossy, capsys, monkeypatch
):
    folder = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lossy.folder / name, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("a fox\nfox 🦊\n"))
    assert run(["chat", str(folder), "--backend", "torch", "--max-tokens", "1"]) == 0
    assert capsys.readouterr().err.count("note: the tokenizer drops characters ('🦊')") == 1


def test_evaluate_says_that_rows_are_longer_than_the_model_has_positions(tiny_model_folder, write_jsonl, capsys):
    file = write_jsonl({"text": "hello " * 300})
    ask = ["evaluate", str(tiny_model_folder()), "--data", str(file), "--backend", "torch", "--max-length"]
    assert run([*ask, "300"]) == 0
    assert "rows of up to 300 tokens, but the model was made for 256" in capsys.readouterr().err
    assert run([*ask, "256"]) == 0
    assert "made for" not in capsys.readouterr().err

"""`generate` with several prompts and `chat` in a pipe, on the terminal's and on Python's side."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout

import pytest

import mlxlora
from mlxlora.cli.generating import show
from mlxlora.cli.main import run
from mlxlora.cli.output import AnswerFile
from shared.data.prompts import Prompt
from shared.errors import ConfigError, DataError
from shared.generation.answers import Completion, LogProbs
from shared.generation.config import CHAT, GenerationConfig
from shared.jobs.chat import Chat
from shared.registry import BACKENDS
from shared.sessions import complete, open_session, prompt_ids, sampling_for
from shared.types import ModelInfo
from tests.unit.test_display import Terminal

PROMPTS = ["hello ", "he", "or hell, the world", "hello "]


def call(capsys, *arguments, code=0):
    """Return stdout and stderr of a command."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def last_object(out):
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module", params=BACKENDS)
def session(request, tiny_model_folder):
    return open_session(str(tiny_model_folder()), adapter=None, backend=request.param, device="cpu")


# generate


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_of_options_and_files_are_answered_in_order_as_alone(backend, tiny_model_folder, tmp_path, capsys):
    base = ["generate", tiny_model_folder(), "--backend", backend, "--max-tokens", 9, "--temperature", 1, "--seed", 3]
    alone = [last_object(call(capsys, *base, "--prompt", prompt, "--json").out) for prompt in PROMPTS[:3]]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": PROMPTS[1]}) + "\n" + json.dumps({"text": PROMPTS[2]}) + "\n")
    found = call(capsys, *base, "--prompt", PROMPTS[0], "--prompts", file, "--output", output, "--json")
    together = last_object(found.out)["completions"]
    exact = ("text", "tokens", "finish_reason", "prompt_tokens")
    assert [[one[key] for key in exact] for one in together] == [[one[key] for key in exact] for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert one["log_probs"] == pytest.approx(other["log_probs"], abs=1e-4)
        assert one["log_probs"]["min"] <= one["log_probs"]["mean"] <= 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.pop("prompt") for row in rows] == PROMPTS[:3]
    assert rows == together
    assert "3 answers in" in found.err


def test_each_of_several_texts_stands_under_its_prompt(tiny_model_folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("hello\n\nthe world\n")
    model = tiny_model_folder()
    out = call(capsys, "generate", model, "--prompts", file, "--max-tokens", 4, "--backend", "torch").out
    texts = mlxlora.generate(str(model), ["hello", "the world"], max_tokens=4, backend="torch")
    assert out == f"[1] hello\n{texts[0]}\n\n[2] the world\n{texts[1]}\n\n"
    assert mlxlora.generate(str(model), "hello", max_tokens=4, backend="torch") == texts[0]
    assert "".join(mlxlora.stream(str(model), "hello", max_tokens=4, backend="torch")) == texts[0]


def test_prompts_of_standard_input_are_its_lines(tiny_model_folder, monkeypatch, capsys):
    model = tiny_model_folder()
    base = ["generate", model, "--prompts", "-", "--max-tokens", 4, "--backend", "torch", "--json"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n\nthe world\n")))
    found = last_object(call(capsys, *base).out)["completions"]
    texts = mlxlora.generate(str(model), ["hello", "the world"], max_tokens=4, backend="torch")
    assert [one["text"] for one in found] == texts
    for data, words in ((b"\n", "no prompt"), (b"caf\xe9\n", "standard input: not UTF-8")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert words in call(capsys, *base, code=2).err


@pytest.mark.parametrize("prompt", [5, b"a", ["a", 3], None])
def test_what_is_no_text_is_no_prompt(prompt):
    with pytest.raises(ConfigError, match=r"the prompt is(.|\n)*a text, or a list of texts"):
        mlxlora.generate("no model", prompt)
    with pytest.raises(ConfigError, match="the prompt is"):
        next(mlxlora.stream("no model", prompt))


def test_a_stop_string_ends_the_text_before_it_and_is_named(session):
    free = complete(session, prompt_ids(session, "hello", chat=None), sampling_for(session, max_tokens=30))
    stop = free.text[7:10]
    assert free.finish_reason == "length"
    ids = prompt_ids(session, "hello", chat=None)
    found = complete(session, ids, sampling_for(session, max_tokens=30, stop=["never said", stop]))
    assert (found.finish_reason, found.stop_string) == ("stop_string", stop)
    assert found.text == free.text[: free.text.index(stop)]
    assert found.tokens == free.tokens[: len(found.tokens)], "no token is made behind the stop string"
    assert len(found.tokens) < 30


def test_a_control_token_as_stop_string_is_an_end_token(session):
    sampling = sampling_for(session, stop=["<|im_start|>", "x"])
    assert sampling.stop_strings == ("x",)
    assert session.tokenizer.special_id("<|im_start|>") in sampling.stop_tokens
    assert session.tokenizer.special_id("hello") is None


def test_a_file_of_conversations_goes_through_the_chat_template(session, tmp_path):
    from shared.data.prompts import read_prompts

    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    file = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [*asked, {"role": "assistant", "content": "no"}]},
        {"instruction": "a", "output": "b"},
        "plain",
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, three = read_prompts(file)
    wanted = session.tokenizer.inner.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)
    assert prompt_ids(session, one, chat=False) == list(wanted["input_ids"] if hasattr(wanted, "keys") else wanted)
    assert [message["content"] for message in two.messages] == ["a"]
    assert (three.text, three.last) == ("plain", "plain")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "a.jsonl:1: only the assistant speaks"),
        ("a.jsonl", '{"prompt": ""}', 'a.jsonl:1: "prompt" is empty'),
        ("a.jsonl", "[1]", "a.jsonl:1"),
        ("a.txt", "\n\n", "a.txt has no prompts"),
        ("a.md", "x", "one of .txt, .jsonl"),
        (None, "", "no file of prompts at"),
    ],
)
def test_what_is_wrong_with_a_file_of_prompts_is_said_with_its_place(name, content, words, tmp_path):
    from shared.data.prompts import read_prompts

    file = tmp_path / (name or "none.txt")
    if name:
        file.write_text(content)
    with pytest.raises(DataError, match=words.replace("[", r"\[")):
        read_prompts(file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-p", "1.5"], "--top-p"),
        (["--top-p", "0"], "top_p, found 0.0"),
        (["--min-p", "nan"], "--min-p"),
        (["--repetition-penalty", "0"], "repetition_penalty, found 0.0"),
        (["--top-k", "-1"], "--top-k"),
        (["--batch-size", "0"], "--batch-size"),
        (["--stop", ""], "stop.0"),
        (["--stream", "--prompt", "b"], "--stream with 2 prompts"),
        (["--prompts", "no.txt"], "no file of prompts at no.txt"),
    ],
)
def test_values_out_of_range_are_refused_before_a_model_is_looked_for(options, words, capsys):
    err = call(capsys, "generate", "no/such/model-folder", "--prompt", "a", *options, code=2).err
    assert words in err
    assert err.count("\n") <= 3


@pytest.mark.parametrize(
    "command",
    ["generate --prompt a --output", "evaluate --data rows.jsonl --generate 1 --answers"],
)
def test_a_file_that_cannot_be_written_is_said_before_a_model_is_looked_for(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    err = call(capsys, *command.split(), "no/such/x.jsonl", "no/such/model-folder", code=7).err
    assert "error E700: cannot use no/such/x.jsonl" in err


def test_answers_are_kept_in_order_when_the_work_is_broken_off(tmp_path):
    file = tmp_path / "answers.jsonl"
    old = '{"finish_reason": "stop"}\n'
    file.write_text(old)

    def work():
        with AnswerFile(file, option="--output") as answers:
            answers.add(1, {"n": 1})
            assert file.read_text() == old, "nothing is lost before there is something new"
            answers.add(0, {"n": 0})
            assert file.read_text() == '{"n": 0}\n{"n": 1}\n'
            answers.add(3, {"n": 3})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert file.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 3}\n'
    with AnswerFile(tmp_path / "none.jsonl", option="--output"):
        pass
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_no_text_of_a_model_controls_a_terminal_and_files_get_all_of_it(terminal):
    said = "a\x1b[2Jb\x9b31mc\x85\x7f\r\td\né\n"
    for asked in (["hello\x9b"], ["hello\x9b", "he"]):
        with redirect_stdout(Terminal() if terminal else io.StringIO()) as screen:
            found = [Completion(said, (), True, 1, "stop", None, LogProbs(0, 0, 0)) for _ in asked]
            show(None, [Prompt(text) for text in asked], found, as_json=False, printed=False)
        assert ("a[2Jb31mc\td\né\n" if terminal else said) in screen.getvalue()
        assert ("\x9b" in screen.getvalue()) != terminal


def test_settings_of_python_are_checked_too():
    with pytest.raises(ConfigError, match="top_p, found 2"):
        mlxlora.generate("no/such/model-folder", "a", top_p=2)
    with pytest.raises(ConfigError, match='did you mean "top_k"'):
        mlxlora.generate("no/such/model-folder", "a", topk=2)
    with pytest.raises(ConfigError, match='dtype: unknown value "float23"'):
        mlxlora.generate("no/such/model-folder", "a", dtype="float23")


def test_a_chat_has_defaults_of_its_own_where_none_is_given(tiny_model_folder):
    drawn = mlxlora.chat(str(tiny_model_folder()), backend="torch", temperature=0.2, max_tokens=None).sampling
    assert (drawn.max_tokens, drawn.temperature, drawn.top_p) == (1024, 0.2, 0.95)


@pytest.mark.parametrize(("command", "own"), [("generate", {}), ("chat", CHAT)])
def test_the_help_shows_the_defaults_of_the_config(command, own, capsys):
    said = " ".join(call(capsys, command, "--help").out.split())
    defaults = {**GenerationConfig().model_dump(), **own}
    shown = dict(re.findall(r"--(max-tokens|temperature|top-p|seed|batch-size) <[^-]*\[default: ([\d.]+)\]", said))
    assert {"max-tokens", "temperature", "seed"} <= shown.keys() >= {key.replace("_", "-") for key in own}
    assert all(float(value) == defaults[option.replace("-", "_")] for option, value in shown.items())


def test_a_prompt_whose_answer_has_no_room_is_refused_before_anything_is_generated(tiny_model_folder, capsys):
    base = ["generate", tiny_model_folder(), "--backend", "torch"]  # 256 positions
    found = call(capsys, *base, "--prompt", "a", "--prompt", "b" * 250, "--max-tokens", 20, code=2)
    assert re.search(
        r"prompt 2 has 25\d tokens, with 20 of an answer more than the model has positions: 256", found.err
    )
    assert "fix: max_tokens " in found.err
    assert not found.out
    with pytest.raises(DataError, match="a shorter prompt"):
        mlxlora.generate(str(tiny_model_folder()), "b" * 300, max_tokens=1, backend="torch")


def test_filters_without_effect_are_noted(tiny_model_folder, capsys):
    options = ["--prompt", "a", "--max-tokens", 2, "--backend", "torch", "--top-k", 5]
    assert "--top-k changes nothing at temperature 0" in call(capsys, "generate", tiny_model_folder(), *options).err


# chat


def test_an_answer_is_what_the_template_and_the_history_ask_for(session):
    talk = Chat(session, sampling_for(session, max_tokens=6, temperature=0), "be kind")
    first = talk.say("hello")
    second = "".join(talk.stream("how?"))
    said = [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.text}, {"role": "user", "content": "how?"},
    ]  # fmt: skip
    assert talk.messages == [*said[1:], {"role": "assistant", "content": second}]
    text = session.tokenizer.inner.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    ids = session.tokenizer.inner(text, add_special_tokens=False)["input_ids"]
    wanted = complete(session, ids, sampling_for(session, max_tokens=6))
    assert (second, talk.last.tokens) == (wanted.text, wanted.tokens)
    talk.reset()
    assert (talk.messages, talk.system) == ([], "be kind")
    assert talk.say("hello") == first


def test_of_an_answer_that_is_broken_off_what_was_shown_stays(session):
    talk = Chat(session, sampling_for(session, max_tokens=50, temperature=0))
    pieces = talk.stream("hello")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": shown}
    assert talk.last.finish_reason == "interrupted"


def test_a_conversation_ends_where_the_model_does(session):
    most = session.model.info.max_positions
    assert isinstance(session.model.info, ModelInfo)
    talk = Chat(session, sampling_for(session, max_tokens=10_000, temperature=0))
    start = len(talk.ids([{"role": "user", "content": "a"}]))
    found = talk.say("a")
    assert found.stopped or len(found.tokens) == most - start
    with pytest.raises(DataError, match="the model takes 256"):
        talk.say("b" * 300)
    assert len(talk.messages) == 2, "what was not answered is not kept"


@pytest.mark.parametrize("backend", BACKENDS)
def test_chat_in_a_pipe_answers_line_by_line_and_obeys(backend, tiny_model_folder, monkeypatch, capsys):
    lines = 'hello\n/reset\n\n"""\ntwo\nlines\n"""\n/system be kind\nhello\n/nonsense\n/exit\nnever read\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    found = call(capsys, "chat", tiny_model_folder(), "--max-tokens", 5, "--backend", backend, "--json")
    last = last_object(found.out)
    assert [message["content"] for message in last["messages"]][0::2] == ["hello"]
    assert (last["system"], last["backend"]) == ("be kind", backend)
    assert ">" not in found.err
    assert "unknown command /nonsense" in found.err


def test_a_line_that_is_not_utf_8_costs_only_itself(tiny_model_folder, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO("hello\ncaf\xe9\n".encode("latin-1") + "né\n".encode()))
    )
    found = call(capsys, "chat", tiny_model_folder(), "--max-tokens", 5, "--backend", "torch", "--json")
    assert [message["content"] for message in last_object(found.out)["messages"]][0::2] == ["hello", "né"]
    assert found.err.count("that line is not UTF-8: it is passed over") == 1


def test_an_answer_that_fills_the_model_s_positions_says_so(tiny_model_folder, monkeypatch, capsys):
    for most, words in ((10_000, "tokens: the model's 256 positions are full; /reset"), (3, "--max-tokens allows")):
        monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
        options = ["--temperature", 0, "--backend", "torch", "--max-tokens", most]
        assert words in call(capsys, "chat", tiny_model_folder(), *options).err


def test_a_model_without_a_template_cannot_chat(tmp_path, tiny_model_folder, capsys):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder(), model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert "has no chat template" in call(capsys, "chat", model, "--backend", "torch", code=2).err


def test_a_file_of_something_else_is_not_replaced(tmp_path, capsys):
    prompts, page = tmp_path / "prompts.jsonl", tmp_path / "run.yaml"
    prompts.write_text('{"prompt": "a"}\n')
    page.write_text("model: m\n")
    for words in (
        ["generate", "m", "--prompts", str(prompts), "--output", str(prompts)],
        ["preview", str(page), "--html", str(page)],
    ):
        assert run(words) == 2
        assert "E205" in capsys.readouterr().err
    assert (prompts.read_text(), page.read_text()) == ('{"prompt": "a"}\n', "model: m\n")


def test_bytes_that_are_not_utf_8_are_refused_in_a_prompt(make_tokenizer):
    with pytest.raises(DataError, match="not UTF-8"):
        make_tokenizer().encode("caf\udce9")

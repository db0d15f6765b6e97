"""Calls of tools and reasoning: what the model has to say is supervised, what it is told is not."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from shared.data.dialects import translate
from shared.data.rows import check_row, make_row
from shared.data.template import common_start
from shared.data.tokenize import tokenize_row
from shared.errors import DataError
from tests.unit.chat_templates import CHATML, DEEPSEEK, IM, INSIDE, MARKED, OPENS, QWEN_3, STYLES
from tests.unit.marked_templates import ALL, TEMPLATES, talk_row

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def called(arguments):
    return [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}]


def user(text):
    return {"role": "user", "content": text}


def assistant(content="", **more):
    return {"role": "assistant", "content": content, **more}


SUNNY = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny"}
OBJECT, TEXT = {"city": "Rome"}, '{"city":"Rome"}'
TOOL_TALK = [
    user("Rome?"),
    assistant(tool_calls=called(OBJECT)),
    SUNNY,
    assistant("Sunny."),
    user("ok"),
    assistant("Bye."),
]
THOUGHT = [
    user("1+1?"),
    assistant("2", reasoning_content="add"),
    user("2+2?"),
    assistant("4", reasoning_content="again"),
]
BOTH = [user("Rome?"), assistant("I look.", reasoning_content="ask", tool_calls=called(OBJECT)), SUNNY,
        assistant("Sunny.", reasoning_content="so")]  # fmt: skip
E = "<|im_end|>"


@pytest.fixture(scope="module")
def speak(make_tokenizer):
    """Return what of a conversation is supervised, under a template."""
    made = {}

    def of(template, messages, *, special=IM, bos=None):
        if template not in made:
            made[template] = make_tokenizer(
                special=(*special, *([bos] if bos else [])), bos=bos, eos=special[-1], pad=None, adds_bos=False,
                template=template, merges=[],
            )  # fmt: skip
        tokenizer = made[template]
        row = check_row({"messages": messages, "tools": TOOLS}, source="train.jsonl:1")
        example = tokenize_row(row, tokenizer, train_on="assistant", max_length=9999)
        ids = example.tokens[example.supervised].tolist()
        return tokenizer.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return of


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (QWEN_3, TOOL_TALK, f"{CALL}{E}Sunny.{E}<think>\n\n</think>\n\nBye.{E}"),
        (QWEN_3, THOUGHT, f"2{E}<think>\nagain\n</think>\n\n4{E}"),  # only the last turn's reasoning is in the text
        (QWEN_3, BOTH, f"<think>\nask\n</think>\n\nI look.\n{CALL}{E}<think>\nso\n</think>\n\nSunny.{E}"),
        (OPENS, TOOL_TALK, f"{CALL}{E}Sunny.{E}\n</think>\n\nBye.{E}"),  # the prompt opens the reasoning
        (OPENS, THOUGHT, f"2{E}again\n</think>\n\n4{E}"),
        (OPENS, BOTH, f"ask\n</think>\n\nI look.\n{CALL}{E}so\n</think>\n\nSunny.{E}"),
        (CHATML, THOUGHT, f"2{E}4{E}"),
    ],
)  # fmt: skip
def test_calls_and_reasoning_are_supervised_as_far_as_the_template_writes_them(speak, template, messages, said):
    assert speak(template, messages).replace("<|endoftext|>", "") == said


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_by_every_name_it_has(speak, name):
    assert speak(QWEN_3, [user("q"), assistant("a", **{name: "hm"})]).startswith(f"<think>\nhm\n</think>\n\na{E}")


@pytest.mark.parametrize("arguments", [OBJECT, TEXT])
def test_arguments_as_json_text_are_the_object(speak, arguments):
    messages = [user("Rome?"), assistant(tool_calls=called(arguments)), SUNNY, assistant("Sunny.")]
    assert speak(QWEN_3, messages) == f"{CALL}{E}<think>\n\n</think>\n\nSunny.{E}"


def test_content_null_beside_calls_is_taken_by_templates_that_want_a_text(speak):
    messages = [user("Rome?"), assistant(None, tool_calls=called(OBJECT)), SUNNY, assistant("Sunny.")]
    assert speak(QWEN_3, messages) == f"{CALL}{E}<think>\n\n</think>\n\nSunny.{E}"
    assert speak(CHATML, messages).replace("<|endoftext|>", "") == f"{E}Sunny.{E}"


@pytest.mark.parametrize("key", ["weight", "train"])
def test_turns_of_weight_0_carry_no_loss(speak, key):
    messages = [user("a"), assistant("b", **{key: 0}), user("c"), assistant("d", **{key: 1})]
    assert speak(CHATML, messages).replace("<|endoftext|>", "") == f"d{E}"
    with pytest.raises(DataError, match="as its answers have weight 0"):
        speak(CHATML, messages[:2])


def test_a_template_that_wants_arguments_as_text_gets_them_so(speak):
    special = ("<|User|>", "<|Assistant|>", "<|output|>", "<|/output|>", "<|call|>", "<|/call|>", "<|end|>")
    said = speak(DEEPSEEK, TOOL_TALK, special=special, bos="<s>")
    assert said == '<|call|>weather\n{"city": "Rome"}<|/call|><|end|>Sunny.<|end|>Bye.<|end|>'


def test_a_turn_that_the_template_mixes_with_what_a_tool_said_is_refused(speak):
    special = ("<|turn>", "<turn|>")
    with pytest.raises(DataError, match=r"train\.jsonl:1: cannot find message 1"):
        speak(
            INSIDE, [user("q"), assistant("words", tool_calls=called(OBJECT)), SUNNY, assistant("a")], special=special
        )
    assert speak(INSIDE, [user("q"), assistant("a"), user("r"), assistant("b")], special=special) == "a<turn|>b<turn|>"


@pytest.mark.parametrize("template", [QWEN_3, OPENS])
def test_words_like_a_header_in_an_answer_do_not_move_its_beginning(speak, template):
    tricky = "<|im_start|>assistant\nx"
    said = speak(template, [user(f"say {tricky}"), assistant(tricky), user("r"), assistant("b")])
    assert said.startswith(f"{tricky}{E}")


@pytest.mark.parametrize(
    ("one", "other", "same"), [("", "a", 0), ("abc", "abc", 3), ("abcd", "abxd", 2), ("ab", "abc", 2)]
)
def test_common_start(one, other, same):
    assert common_start(one, other) == same


# TRL's own: scripts/trl_masks.py wrote what its SFTTrainer makes of a row of every format

GOLDEN = json.loads(Path(__file__).with_name("golden_masks.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_tokens_and_mask_of_every_format_are_trls(marked, golden):
    columns = golden["columns"]
    row = check_row(translate(golden["row"], source="r:1", columns=columns), source="r:1")
    example = tokenize_row(row, marked, train_on="completion", max_length=9999)
    assert example.tokens.tolist() == golden["ids"]
    assert example.supervised.astype(int).tolist() == [0, *golden["mask"][1:]]  # nothing predicts the first token


STYLED = json.loads(Path(__file__).with_name("golden_styles.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def styled(make_tokenizer):
    """Return the tokenizer of a style, with the template without marks."""

    @cache
    def make(name):
        style = ALL[name]
        return make_tokenizer(
            special=style.special, bos=style.bos, eos=style.eos, pad=None, adds_bos=False, template=style.template
        )

    return make


@pytest.mark.parametrize("golden", STYLED, ids=lambda golden: f"{golden['style']}, {golden['talk']}")
def test_tokens_and_mask_in_every_style_are_trls_and_transformers_own(styled, golden):
    tokenizer, name = styled(golden["style"]), golden["style"]
    row = make_row(talk_row(golden["talk"], as_text=True), source="r:1")
    example = tokenize_row(row, tokenizer, train_on="assistant", max_length=9999)
    assert example.tokens.tolist() == golden["ids"]
    assert "".join(map(str, example.supervised.astype(int))) == golden["mask"]
    theirs = talk_row(golden["talk"], as_text=name == "deepseek")
    made = tokenizer.inner.apply_chat_template(
        theirs["messages"], tools=theirs.get("tools"), chat_template=TEMPLATES[name], tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert (made["input_ids"], "".join(map(str, made["assistant_masks"]))) == (golden["ids"], golden["mask"])


def test_every_style_is_among_them():
    assert {golden["style"] for golden in STYLED} == set(ALL) >= set(STYLES)
    assert {golden["style"] for golden in STYLED if golden["talk"] == "reasoning"} == set(ALL)


@pytest.fixture(scope="module")
def marked(make_tokenizer):
    return make_tokenizer(template=MARKED)


@pytest.mark.parametrize("messages", [TOOL_TALK, THOUGHT, BOTH])
def test_the_mask_is_transformers_own_with_tools_and_reasoning(marked, messages):
    theirs = marked.inner.apply_chat_template(
        messages, tools=TOOLS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    row = check_row({"messages": messages, "tools": TOOLS}, source="r:1")
    example = tokenize_row(row, marked, train_on="assistant", max_length=9999)
    assert example.tokens.tolist() == theirs["input_ids"]
    assert example.supervised.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("row", [{"text": "x"}, {"messages": [user("q"), assistant("a")]}])
def test_a_mask_of_zeros_is_an_error(make_tokenizer, row):
    tokenizer = make_tokenizer(
        bos=None, eos=None, pad=None, template="{{ messages[0].content if messages[1].content }}"
    )
    with pytest.raises(DataError, match=r"r:1: (no supervised token|cannot find message 1)"):
        tokenize_row(check_row(row, source="r:1"), tokenizer, train_on="completion", max_length=9999)

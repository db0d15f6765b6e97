"""Rows become tokens, and exactly what the model has to say is supervised."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest

from shared.data.rows import Row
from shared.data.tokenize import load_tokenizer, tokenize_row, tokenize_rows
from shared.errors import DataError, ModelError
from tests.conftest import save_tokenizer
from tests.unit.chat_templates import STYLES, THINK

STORED = ("TinyStories-656K", "stories260K")
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    ("What is up?", "Not much.\nAnd you?"),
    ("yes", "yes"),  # the same words on both sides
    ("Say naïve 🦊", "naïve 🦊!"),
]


def text_row(text):
    return Row("text", {"text": text}, "train.jsonl:3")


def prompt_row(prompt, completion):
    return Row("prompt", {"prompt": prompt, "completion": completion}, "train.jsonl:3")


def chat_row(*turns, system=False):
    messages = [SYSTEM] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row("messages", {"messages": messages}, "train.jsonl:3")


def encode(row, tokenizer, *, train_on="completion", max_length=2048):
    return tokenize_row(row, tokenizer, train_on=train_on, max_length=max_length)


def spoken(example, tokenizer):
    """Return the text of the supervised tokens, control tokens included."""
    ids = example.tokens[example.supervised].tolist()
    return tokenizer.inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def full_text(example, tokenizer):
    return tokenizer.inner.decode(
        example.tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="module")
def styled(make_tokenizer):
    """Return a tokenizer for every chat style."""
    return {
        name: make_tokenizer(
            special=style.special,
            bos=style.bos,
            eos=style.eos,
            pad=None,
            adds_bos=style.bos is not None,
            template=style.template,
        )
        for name, style in STYLES.items()
    }


def expected(style, turns):
    said = "".join(f"{style.lead}{answer.strip() if style.trims else answer}{style.tail}" for _, answer in turns)
    return said + style.closing


MOVES_SYSTEM = [name for name, style in STYLES.items() if style.moves_system]


@pytest.mark.parametrize(
    ("name", "system"), [(n, s) for n in STYLES for s in (False, True) if not (s and n in MOVES_SYSTEM)]
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_assistant_turn_and_its_end_token_is_supervised(styled, name, system, count):
    style = STYLES[name]
    if system and not style.takes_system:
        with pytest.raises(DataError, match=r"train.jsonl:3.*System role not supported"):
            encode(chat_row(*TURNS[:count], system=True), styled[name])
        return
    example = encode(chat_row(*TURNS[:count], system=system), styled[name])
    assert spoken(example, styled[name]) == expected(style, TURNS[:count])


@pytest.mark.parametrize("name", MOVES_SYSTEM)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_system_text_that_the_template_moves_does_not_shift_the_turns(styled, name, count):
    """Each prefix of the conversation is rendered otherwise than the whole; blanks before an answer do not matter."""
    example = encode(chat_row(*TURNS[:count], system=True), styled[name])
    said = spoken(example, styled[name]).replace("</s> ", "</s>").removeprefix(" ")
    assert said == "".join(f"{answer}</s>" for _, answer in TURNS[:count])


@pytest.mark.parametrize("name", STYLES)
def test_the_text_is_the_templates_own_word_for_word(styled, name):
    row = chat_row(*TURNS)
    theirs = styled[name].inner.apply_chat_template(row.fields["messages"], tokenize=False)
    ours = full_text(encode(row, styled[name]), styled[name])
    assert ours == theirs
    assert styled[name].chat(row.fields["messages"]).text == theirs


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mask_is_transformers_own_where_the_template_marks_what_is_generated(styled, count):
    row, tokenizer = chat_row(*TURNS[:count], system=True), styled["generation"]
    theirs = tokenizer.inner.apply_chat_template(
        row.fields["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    example = encode(row, tokenizer)
    assert example.tokens.tolist() == theirs["input_ids"]
    assert example.supervised.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("name", STYLES)
def test_a_conversation_starts_with_at_most_one_bos(styled, name):
    example, bos = encode(chat_row(*TURNS[:1]), styled[name]), styled[name].inner.bos_token_id
    assert list(example.tokens[:2]).count(bos) == (bos is not None)  # OLMo ends with the token it begins with


@pytest.mark.parametrize("name", STYLES)
def test_blanks_around_an_answer_are_kept_as_the_template_keeps_them(styled, name):
    turns = [("q", "  two lead, one behind "), ("r", " \n\nnewlines\n")]
    assert spoken(encode(chat_row(*turns), styled[name]), styled[name]) == expected(STYLES[name], turns)


@pytest.mark.parametrize("name", STYLES)
def test_an_answer_found_in_earlier_text_is_not_mistaken_for_it(styled, name):
    turns = [("Repeat: no. user assistant", "no"), ("no", "user"), ("user", "assistant")]
    assert spoken(encode(chat_row(*turns), styled[name]), styled[name]) == expected(STYLES[name], turns)


@pytest.mark.parametrize("name", STYLES)
def test_an_empty_answer_teaches_its_end_token(styled, name):
    assert (
        spoken(encode(chat_row(("q", "")), styled[name]), styled[name]).strip()
        == (STYLES[name].tail + STYLES[name].closing).strip()
    )


@pytest.mark.parametrize("name", STYLES)
def test_train_on_all_supervises_everything_but_the_first_token(styled, name):
    example = encode(chat_row(*TURNS, system=STYLES[name].takes_system), styled[name], train_on="all")
    assert not example.supervised[0]
    assert example.supervised[1:].all()


@pytest.mark.parametrize("name", STYLES)
def test_train_on_assistant_and_completion_are_the_same_for_conversations(styled, name):
    one, other = (encode(chat_row(*TURNS), styled[name], train_on=how) for how in ("assistant", "completion"))
    assert np.array_equal(one.supervised, other.supervised)


@pytest.mark.parametrize("name", STYLES)
def test_the_question_behind_the_last_answer_is_not_supervised(styled, name):
    row = chat_row(*TURNS[:2])
    row.fields["messages"].append({"role": "user", "content": "and then?"})
    said = spoken(encode(row, styled[name]), styled[name]) + STYLES[name].closing
    assert said == expected(STYLES[name], TURNS[:2])


def test_a_token_that_begins_before_the_answer_and_ends_in_it_is_supervised(styled):
    """As with prompt and completion: "assistant\\n" and an answer that starts with a newline share a token."""
    example = encode(chat_row(("q", "\nanswer")), styled["chatml"])
    assert spoken(example, styled["chatml"]) == "\n\nanswer<|im_end|>"


def test_reasoning_that_the_template_drops_is_not_supervised(styled):
    turns = [("q", "<think>\nhm\n</think>\nfirst"), ("r", "<think>\nso\n</think>\nsecond")]
    example = encode(chat_row(*turns), styled["think"])
    assert spoken(example, styled["think"]) == "first<|im_end|><think>\nso\n</think>\nsecond<|im_end|>"


def test_the_end_of_a_turn_is_supervised_also_where_the_answer_had_to_be_searched(make_tokenizer):
    """A template that numbers the turns from the end makes every earlier rendering differ."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + (loop.revindex|string) + m['role'] + '\\n' + m['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>0assistant\\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    assert spoken(encode(chat_row(*TURNS), tokenizer), tokenizer) == "".join(f"{a}<|im_end|>" for _, a in TURNS)


def test_a_template_that_writes_no_end_gets_the_end_token_behind_the_last_turn(make_tokenizer):
    template = "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    tokenizer = make_tokenizer(template=template)
    assert spoken(encode(chat_row(("q", "a")), tokenizer), tokenizer) == "a\n<|im_end|>"


def test_tools_reach_the_template_and_calls_without_content_are_supervised(make_tokenizer):
    template = (
        "{% if tools %}{{ 'tools: ' + tools|tojson + '\\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.tool_calls %}"
        "{% for call in m.tool_calls %}{{ call.function|tojson }}{% endfor %}{% else %}{{ m.content }}"
        "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    tokenizer = make_tokenizer(template=template)
    example = encode(Row("messages", {"messages": messages, "tools": [{"name": "add"}]}, "train.jsonl:1"), tokenizer)
    said = '{"name": "add", "arguments": {"a": 1}}<|im_end|>two<|im_end|>'
    assert spoken(example, tokenizer) == said
    assert 'tools: [{"name": "add"}]' in full_text(example, tokenizer)


def test_a_conversation_without_a_chat_template_names_the_line_and_the_remedy(make_tokenizer):
    with pytest.raises(DataError, match=r"(?s)train.jsonl:3: .* has no chat template.*fix: .*prompt and completion"):
        encode(chat_row(("q", "a")), make_tokenizer(template=None))


def test_the_template_may_refuse_a_conversation_in_its_own_words(styled):
    row = Row("messages", {"messages": [{"role": "assistant", "content": "me first"}]}, "train.jsonl:9")
    with pytest.raises(DataError, match=r"train.jsonl:9: .*roles must alternate"):
        encode(row, styled["llama-2"])


# prompt and completion


def test_only_the_completion_and_the_end_token_are_supervised(tokenizer):
    example = encode(prompt_row("What? ", "This."), tokenizer)
    assert spoken(example, tokenizer) == "This.<|im_end|>"
    assert full_text(example, tokenizer) == "<|begin|>What? This.<|im_end|>"


def test_a_token_that_spans_prompt_and_completion_is_supervised(tokenizer):
    example = encode(prompt_row("he", "llo world"), tokenizer)  # "hello" is one token
    assert spoken(example, tokenizer) == "hello world<|im_end|>"


def test_prompt_and_completion_are_encoded_as_one_text(tokenizer):
    example = encode(prompt_row("hell", "o world"), tokenizer)
    assert example.tokens.tolist() == [*tokenizer.encode("hello world"), tokenizer.eos]


@pytest.mark.parametrize("prompt", ["a", "naïve 🦊", "two\n\nlines ", "ends in blank ", "<|im_end|>"])
@pytest.mark.parametrize("completion", ["b", " starts with blank", "🦊", "\n\nx"])
def test_whatever_the_boundary_the_completion_is_supervised_and_the_prompt_is_not(tokenizer, prompt, completion):
    example = encode(prompt_row(prompt, completion), tokenizer)
    said = spoken(example, tokenizer)
    assert said.endswith(f"{completion}<|im_end|>")
    assert len(said) - len(f"{completion}<|im_end|>") < 4
    assert full_text(example, tokenizer) == f"<|begin|>{prompt}{completion}<|im_end|>"


def test_an_empty_prompt_supervises_the_whole_text_but_bos(tokenizer):
    example = encode(prompt_row("", "hello"), tokenizer)
    assert spoken(example, tokenizer) == "hello<|im_end|>"


def test_train_on_all_supervises_the_prompt_too(tokenizer):
    example = encode(prompt_row("What? ", "This."), tokenizer, train_on="all")
    assert spoken(example, tokenizer) == "What? This.<|im_end|>"


def test_a_tokenizer_that_adds_its_own_end_token_gets_no_second_one(make_tokenizer):
    tokenizer = make_tokenizer(adds_eos=True)
    example = encode(prompt_row("What? ", "This."), tokenizer)
    assert full_text(example, tokenizer) == "<|begin|>What? This.<|im_end|>"
    assert spoken(example, tokenizer) == "This.<|im_end|>"


def test_the_end_token_is_supervised_where_it_also_is_the_pad_token(make_tokenizer):
    tokenizer = make_tokenizer(pad="<|im_end|>")
    assert tokenizer.inner.pad_token_id == tokenizer.eos
    for row in (prompt_row("q ", "a"), chat_row(("q", "a")), text_row("a")):
        assert spoken(encode(row, tokenizer), tokenizer) == "a<|im_end|>"


def test_a_model_without_end_and_start_tokens_trains_on_the_bare_text(make_tokenizer):
    tokenizer = make_tokenizer(bos=None, eos=None, pad=None, template=None)
    example = encode(prompt_row("q ", "answer"), tokenizer)
    assert full_text(example, tokenizer) == "q answer"
    assert spoken(example, tokenizer) == "answer"


# text


def test_a_text_is_supervised_from_its_first_token_behind_bos(tokenizer):
    example = encode(text_row("once upon"), tokenizer)
    assert spoken(example, tokenizer) == "once upon<|im_end|>"
    assert not example.supervised[0]


def test_without_bos_the_first_token_is_never_a_target(make_tokenizer):
    tokenizer = make_tokenizer(bos=None)
    assert spoken(encode(text_row("xyz"), tokenizer), tokenizer) == "yz<|im_end|>"


def test_a_row_without_a_supervised_token_names_its_line(make_tokenizer):
    tokenizer = make_tokenizer(bos=None, eos=None, pad=None)
    with pytest.raises(DataError, match=r"train.jsonl:3: no supervised token \(1 tokens, train_on: completion\)"):
        encode(text_row("x"), tokenizer)


@pytest.mark.parametrize(
    ("bad", "all_rows", "more"), [(1, 9, ""), (320, 320, r" \(319 more"), (1000, 1500, r" \(at least 999 more")]
)
def test_rows_with_a_problem_are_counted_as_far_as_they_are_looked_at(tokenizer, bad, all_rows, more):
    rows = [prompt_row("hello world", "a")] * bad + [text_row("hello")] * (all_rows - bad)
    with pytest.raises(DataError, match=f"^train.jsonl:3: no supervised token[^()]*\\([^()]*\\){more}"):
        tokenize_rows(rows, tokenizer, train_on="completion", max_length=2)


def test_a_long_row_is_cut_at_the_end(tokenizer):
    whole, short = encode(text_row("abc" * 50), tokenizer), encode(text_row("abc" * 50), tokenizer, max_length=20)
    assert len(short.tokens) == 20
    assert np.array_equal(short.tokens, whole.tokens[:20])
    assert np.array_equal(short.supervised, whole.supervised[:20])


@pytest.mark.parametrize("row", [prompt_row("p" * 30, "answer"), chat_row(("p" * 30, "answer"))])
def test_a_prompt_as_long_as_max_length_names_the_line_and_the_setting(tokenizer, row):
    with pytest.raises(
        DataError, match=r"(?s)train.jsonl:3: no supervised token within data.max_length 16.*fix: raise"
    ):
        encode(row, tokenizer, max_length=16)


def test_tokens_and_mask_have_the_documented_types(tokenizer):
    example = encode(text_row("abc"), tokenizer)
    assert example.tokens.dtype == np.int32
    assert example.supervised.dtype == bool
    assert example.tokens.shape == example.supervised.shape
    assert example.source == "train.jsonl:3"


# damaged tokenizers


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_one_clear_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": ')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load_tokenizer(tmp_path)


# tokenizers of real models: SentencePiece vocabularies whose pieces carry their blank in front


@pytest.mark.parametrize("name", STORED)
def test_real_tokenizers_supervise_the_completion_only(stored_model, name):
    tokenizer = load_tokenizer(stored_model(name))
    example = encode(prompt_row("Once upon a time, ", "there was a fox."), tokenizer)
    assert spoken(example, tokenizer).strip() == f"there was a fox.{tokenizer.inner.eos_token}"
    assert example.tokens[0] == tokenizer.inner.bos_token_id
    assert example.tokens[-1] == tokenizer.eos


@pytest.mark.parametrize("name", STORED)
def test_real_tokenizers_supervise_every_assistant_turn(stored_model, name):
    tokenizer = load_tokenizer(stored_model(name))
    turns = [("Hello there", "Hi. How are you?"), ("Good", "Then let us play.")]
    example = encode(chat_row(*turns, system=True), tokenizer)
    said = spoken(example, tokenizer)
    pieces = [piece.strip() for piece in said.split(tokenizer.inner.eos_token)]
    assert pieces == ["Hi. How are you?", "Then let us play.", ""]


def test_thinking_models_keep_the_reasoning_of_a_single_answer(make_tokenizer):
    tokenizer = make_tokenizer(template=THINK)
    answer = "<think>\nhm\n</think>\nyes"
    assert spoken(encode(chat_row(("q", answer)), tokenizer), tokenizer) == f"{answer}<|im_end|>"


def test_a_config_of_an_unknown_family_gives_no_warning(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard", "rope_scaling": {"type": "linear", "factor": 2}}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("unknown", ["\u202eevil\u202c", "z\u0338\u0321a\u0335", "日本語 🤖", "שלום"])
@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_a_tokenizer_that_loses_count_behind_unknown_characters_still_supervises_the_completion(
    stored_model, name, unknown
):
    tokenizer = load_tokenizer(stored_model(name))
    example = encode(prompt_row(f"Review: {unknown} 22\nLabel:", " positive"), tokenizer)
    said = tokenizer.decode(example.tokens[example.supervised].tolist())
    assert said.strip(": ").startswith("positive")
    assert "Label" not in said


PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("unknown", ["\u202eevil\u202c", "日本語 🤖", "שלום"])
@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_a_tokenizer_that_loses_count_still_supervises_every_answer_of_a_conversation(
    stored_model, name, unknown, tmp_path
):
    for file in stored_model(name).glob("*token*"):
        shutil.copy(file, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.inner.chat_template = PLAIN
    row = chat_row((f"Tell {unknown} me", "One day a dog ran."), (f"And {unknown}?", "The cat sat."))
    said = spoken(encode(row, tokenizer), tokenizer)
    assert "One day a dog ran." in said
    assert "The cat sat." in said
    assert "Tell" not in said
    assert "And" not in said

"""Scores of answers: closed forms, the definitions of the libraries that own them, and real questions of real rows."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import faults
from shared.data.rows import check_row
from shared.errors import DataError, OutOfMemory
from shared.evaluating.exams import ask, make_questions, mean_scores, rouge_l, score, token_f1
from shared.sessions import open_session

# wanted, got, token F1 of torchmetrics 1.9.0 (SQuAD), ROUGE-L of rouge-score 0.1.2 without its stemmer
KNOWN = [
    ("the cat sat on the mat", "a cat sat on a mat", 1.0, 0.666667),
    ("SELECT name FROM users WHERE age > 3", "SELECT age FROM users", 0.727273, 0.545455),
    ("Paris", "paris.", 1.0, 1.0),
    ("radio.set(laundry, 48)", "radio.set(kitchen, 48)", 0.5, 0.75),
    ("forty-two apples", "42 apples", 0.5, 0.4),
    ("one two three four", "four three two one", 1.0, 0.25),
    ("The answer is 7", "It's 7, the answer", 0.666667, 0.444444),
    ("yes", "", 0.0, 0.0),
]
words = st.lists(st.sampled_from("abc"), max_size=7)


def brute_force_lcs(one: list[str], two: list[str]) -> int:
    """Return the longest common subsequence by trying every one of the first."""
    for length in range(len(one), 0, -1):
        for kept in combinations(one, length):
            rest = iter(two)
            if all(word in rest for word in kept):
                return length
    return 0


@given(words, words)
def test_rouge_l_is_that_of_the_longest_common_subsequence(wanted, got):
    lcs = brute_force_lcs(wanted, got)
    precision, recall = lcs / max(len(got), 1), lcs / max(len(wanted), 1)
    expected = 2 * precision * recall / (precision + recall) if lcs else 0.0
    assert rouge_l(wanted, got) == pytest.approx(expected)


@given(words, words)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall_of_bags(wanted, got):
    same = sum(min(wanted.count(word), got.count(word)) for word in set(wanted))
    if wanted and got:
        precision, recall = same / len(got), same / len(wanted)
        assert token_f1(wanted, got) == pytest.approx(2 * precision * recall / (precision + recall) if same else 0.0)
    else:
        assert token_f1(wanted, got) == (wanted == got)


@pytest.mark.parametrize(("wanted", "got", "f1", "rouge"), KNOWN)
def test_scores_are_those_of_the_libraries_that_own_them(wanted, got, f1, rouge):
    found = score(wanted, got)
    assert (found["token_f1"], found["rouge_l"]) == pytest.approx((f1, rouge), abs=1e-6)
    assert found["exact_match"] == 0.0
    assert set(score(wanted, wanted).values()) == {1.0}


ROWS = [
    {"prompt": "hello? ", "completion": "hello world"},
    {"messages": [{"role": role, "content": text} for role, text in
                  (("user", "one"), ("assistant", "hello"), ("user", "two"), ("assistant", "well hello"))]},
]  # fmt: skip


def test_questions_end_where_the_last_answer_begins(make_tokenizer):
    tokenizer = make_tokenizer()
    one, two = make_questions([check_row(row, source="a:1") for row in ROWS], tokenizer)
    assert list(one.prompt) == tokenizer.encode("hello? ")
    assert (one.wanted, two.wanted) == ("hello world", "well hello")
    assert list(two.prompt) == tokenizer.encode(tokenizer.chat_prompt(ROWS[1]["messages"][:3]), special=False)


def test_rows_of_text_are_refused_by_name(make_tokenizer):
    with pytest.raises(DataError, match="t:3: a row of text has no prompt"):
        make_questions([check_row({"text": "hello"}, source="t:3")], make_tokenizer())


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_answers_are_transformers_own_greedy_texts(tiny_model_folder, monkeypatch, backend):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder()
    session = open_session(str(folder), adapter=None, backend=backend, dtype="float32")
    questions = make_questions([check_row(row, source="a:1") for row in ROWS], session.tokenizer)
    answers = ask(session.model, questions, session.tokenizer, max_tokens=6)
    theirs = AutoModelForCausalLM.from_pretrained(str(folder))
    for question, answer in zip(questions, answers, strict=True):
        ids = theirs.generate(torch.tensor([question.prompt]), max_new_tokens=6, do_sample=False)
        assert answer.got == session.tokenizer.decode(ids[0, len(question.prompt) :].tolist()).strip()
        assert answer.scores == score(answer.wanted, answer.got)
    monkeypatch.setenv("MLXLORA_FAULT", "evaluation.answer:3:memory")
    faults.passed.clear()
    assert ask(session.model, questions, session.tokenizer, max_tokens=6) == answers, "half as many together"
    monkeypatch.setenv("MLXLORA_FAULT", "evaluation.answer:1+:memory")
    with pytest.raises(OutOfMemory, match="answering a prompt of up to"):
        ask(session.model, questions, session.tokenizer, max_tokens=6)
    assert mean_scores(answers)["rouge_l"] == pytest.approx(sum(a.scores["rouge_l"] for a in answers) / 2)

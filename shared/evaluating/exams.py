"""What a model answers to the prompts of rows, greedily, and how near that is to the rows' own answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared import faults
from shared.data.rows import Row
from shared.data.tokenize import Tokenizer, tokenize_rows
from shared.errors import DataError, OutOfMemory, is_out_of_memory
from shared.folder import end_tokens
from shared.generation.config import GenerationConfig
from shared.protocols import Model
from shared.types import Example, Sampling

WORD = re.compile(r"[^\W_]+")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """The prompt of a row as the model is trained on it, and the answer that the row has, as the tokenizer reads it."""

    prompt: tuple[int, ...]
    wanted: str
    num_wanted: int  # tokens of the answer, the end token among them
    source: str


@dataclass(frozen=True)
class Exam:
    """The questions of every set of rows, "" the validation rows, and what an answer takes."""

    questions: Mapping[str, Sequence[Question]]
    tokenizer: Tokenizer
    max_tokens: int


@dataclass(frozen=True)
class Graded:
    """What a model said to a question, and the scores of that, from 0 to 1."""

    source: str
    prompt: str
    wanted: str
    got: str
    scores: dict[str, float]


def make_questions(rows: Sequence[Row], tokenizer: Tokenizer) -> list[Question]:
    """Return a question per row: of a conversation what comes before its last assistant turn, and that turn.

    Raises DataError for rows of plain text, which ask nothing.
    """
    for row in rows:
        if row.kind == "text":
            raise DataError(
                f"{row.source}: a row of text has no prompt to answer",
                expected="rows with prompt and completion, or messages",
                fix="leave out evaluation.generate (--generate)",
            )
    examples = tokenize_rows(rows, tokenizer, train_on="completion", max_length=2**31)
    return [make_question(example, tokenizer) for example in examples]


def make_question(example: Example, tokenizer: Tokenizer) -> Question:
    """Return the question of a tokenized row: its last run of supervised tokens is the answer.

    >>> from types import SimpleNamespace as Stub
    >>> row = Example(np.arange(5), np.array([False, True, False, True, True]), "a:1")
    >>> make_question(row, Stub(decode=str)).prompt
    (0, 1, 2)
    """
    mask = example.supervised
    starts, ends = (np.flatnonzero(mask & ~np.roll(mask, shift)) for shift in (1, -1))
    start, end = (int(starts[-1]), int(ends[-1]) + 1) if len(starts) else (1, len(mask))
    answer = example.tokens[start:end].tolist()
    wanted = tokenizer.decode(answer).strip()
    return Question(tuple(example.tokens[:start].tolist()), wanted, len(answer), example.source)


def ask(
    model: Model, questions: Sequence[Question], tokenizer: Tokenizer, *, max_tokens: int,
    between: Callable[[], None] = lambda: None,
) -> list[Graded]:  # fmt: skip
    """Return the greedy answers and their scores; `between` is called at every token, and what it raises ends it."""
    prompts = [question.prompt for question in questions]
    texts = [text.strip() for text in answer_all(model, prompts, tokenizer, max_tokens=max_tokens, between=between)]
    return [
        Graded(question.source, tokenizer.decode(question.prompt), question.wanted, got, score(question.wanted, got))
        for question, got in zip(questions, texts, strict=True)
    ]


def answer_all(
    model: Model, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, *, max_tokens: int,
    between: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """Return the greedy continuation of every prompt; raises OutOfMemory where one alone is too long.

    Where memory runs out they begin again, half as many together.
    """
    stops = end_tokens(tokenizer.folder, tokenizer_eos=tokenizer.eos)
    together = GenerationConfig().batch_size
    while together:
        sampling = Sampling(max_tokens, temperature=0.0, seed=0, stop_tokens=stops, batch_size=together)
        said: list[list[int]] = [[] for _ in prompts]
        try:
            for token in model.generate(prompts, sampling):
                faults.hit("evaluation.answer")
                between()
                if not token.stopped:
                    said[token.prompt].append(token.token)
            return [tokenizer.decode(tokens) for tokens in said]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        together //= 2
    raise OutOfMemory(
        f"out of memory answering a prompt of up to {max(map(len, prompts))} tokens",
        fix="data.drop: [too_long] leaves out long rows; evaluation.generate null answers none",
    )


def score(wanted: str, got: str) -> dict[str, float]:
    """Return how near a text is to the wanted one, by every metric, from 0 to 1.

    >>> score("a red fox", "the red dog")
    {'exact_match': 0.0, 'token_f1': 0.5, 'rouge_l': 0.3333333333333333}
    """
    return {
        "exact_match": float(wanted == got),
        "token_f1": token_f1(squad_words(wanted), squad_words(got)),
        "rouge_l": rouge_l(WORD.findall(wanted.lower()), WORD.findall(got.lower())),
    }


def mean_scores(answers: Sequence[Graded]) -> dict[str, float]:
    """Return the mean of every metric over answers."""
    return {name: sum(answer.scores[name] for answer in answers) / len(answers) for name in answers[0].scores}


def squad_words(text: str) -> list[str]:
    """Return the words that SQuAD compares: lower case, without punctuation and articles (Rajpurkar et al. 2016)."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def token_f1(wanted: Sequence[str], got: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words as a bag; two empty texts are the same."""
    if not wanted or not got:
        return float(wanted == got)
    return harmonic(sum((Counter(wanted) & Counter(got)).values()), len(wanted), len(got))


def rouge_l(wanted: Sequence[str], got: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of the longest common subsequence (Lin 2004, 3.1).

    Its time is the product of the two lengths.
    """
    if not wanted or not got:
        return 0.0
    row = [0] * (len(got) + 1)
    for word in wanted:
        before = 0  # of the row above, one place to the left
        for n, other in enumerate(got, 1):
            before, row[n] = row[n], before + 1 if word == other else max(row[n], row[n - 1])
    return harmonic(row[-1], len(wanted), len(got))


def harmonic(same: int, wanted: int, got: int) -> float:
    """Return the harmonic mean of same / wanted and same / got."""
    return 2 * same / (wanted + got)

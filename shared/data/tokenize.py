"""Rows -> token ids and which of them are supervised; the tokenizer comes through transformers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shared.data import rendering
from shared.data.rows import Row
from shared.data.template import Rendered
from shared.data.tokenizer_class import known_class
from shared.errors import DataError, ModelError
from shared.importing import collector_paused
from shared.types import Example

MAX_PROBLEMS = 100  # rows with a problem, from which on no more are looked at
ROWS_AT_ONCE = 1000  # enough for every core; what a batch of them holds stays small
Marked = tuple[list[int], list[bool]]  # ids, and which of them are supervised
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


class Encoded(Protocol):
    """A text as the tokenizers library gives it."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Return the [start, end) characters of each id; (0, 0) for tokens that stand for no text."""
        ...


@dataclass(frozen=True)
class Question:
    """What a row asks of the tokenizer: texts to encode, with the model's own start token where `special`."""

    texts: tuple[str, ...]
    special: bool
    spans: tuple[tuple[int, int], ...] = ()  # [start, end) characters of the assistant turns


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer: ids, the end token, the chat template, and character offsets.

    The library is imported when the tokenizer is first used.
    """

    folder: Path

    @cached_property
    def inner(self) -> Any:
        """Return the fast tokenizer of transformers; raises ModelError."""
        return load_inner(self.folder)

    @property
    def eos(self) -> int | None:
        """Return the id of the end-of-sequence token."""
        return self.inner.eos_token_id

    @property
    def template(self) -> str | None:
        """Return the default chat template's source, None where the model has none."""
        found = self.inner.chat_template
        return found.get("default") if isinstance(found, dict) else found

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text, with the model's own start token where `special`; raises DataError."""
        if any("\ud800" <= char <= "\udfff" for char in text):  # what Python makes of such bytes in an argument
            raise DataError("the text holds bytes that are not UTF-8", code="E211", fix="write it in UTF-8")
        return list(self.inner(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self.inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode_all(self, texts: Sequence[str], *, special: bool) -> list[Encoded]:
        """Return every text's ids and offsets, the same as one by one; uses all cores."""
        self.inner("", add_special_tokens=special)  # sets the library's state: no padding, no cutting
        return list(self.inner.backend_tokenizer.encode_batch(list(texts), add_special_tokens=special))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Return the ids of control tokens such as <|im_end|>."""
        added = self.inner.added_tokens_decoder
        return frozenset([*self.inner.all_special_ids, *(token for token, text in added.items() if text.special)])

    def is_special(self, token: int) -> bool:
        """Return whether a token is a control token."""
        return token in self.special_ids

    def special_id(self, text: str) -> int | None:
        """Return the id of the control token that is written so, None where there is none."""
        added = self.inner.added_tokens_decoder
        return next((token for token, found in added.items() if found.special and found.content == text), None)

    def chat(self, messages: list[dict[str, Any]], *, tools: Any = None) -> Rendered:
        """Return a conversation's text and its assistant spans; raises DataError without a template."""
        return rendering.chat(self._template(), messages=messages, tools=tools, **self._special_texts())

    def chat_text(self, messages: list[dict[str, Any]], *, tools: Any = None) -> str:
        """Return the text of a conversation."""
        source = self._template()
        values = {"tools": tools, **self._special_texts()}
        return rendering.text(source, messages=messages, add_generation_prompt=False, **values)

    def chat_prompt(self, messages: list[dict[str, Any]], *, tools: Any = None) -> str:
        """Return the text that asks the assistant to speak next."""
        source = self._template()
        return rendering.text(
            source, messages=messages, add_generation_prompt=True, tools=tools, **self._special_texts()
        )

    def _template(self) -> str:
        if self.template is None:
            raise DataError(
                f"{self.folder.name} has no chat template, which messages need",
                code="E214",
                fix="use the instruct version of the model, or rows with prompt and completion",
            )
        return self.template

    def _special_texts(self) -> dict[str, str]:
        return {key: value for key, value in self.inner.special_tokens_map.items() if isinstance(value, str)}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder, loaded; raises ModelError."""
    tokenizer = Tokenizer(folder)
    _ = tokenizer.inner
    return tokenizer


def load_inner(folder: Path) -> Any:
    """Return the tokenizer of transformers that a folder holds; raises ModelError. Needs the fast (Rust) kind."""
    if not any((folder / name).is_file() for name in FILES):
        raise ModelError(f"{folder} has no tokenizer.json", code="E307", fix="download the model's tokenizer files")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with collector_paused(), warnings.catch_warnings():
        from transformers.utils import logging

        warnings.simplefilter("ignore", FutureWarning)  # on old keys in the config of a family that it does not know
        logging.set_verbosity_error()  # its warnings on long texts concern training by itself, not ours
        try:
            inner = read_inner(folder)
        except Exception as error:  # tokenizers raise bare Exception for a damaged file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"the tokenizer in {folder} cannot be loaded: {reason}", code="E307", fix="download it again"
            ) from None
    if not inner.is_fast:
        raise ModelError(f"{folder} has only a slow tokenizer", code="E307", fix="save it with tokenizer.json")
    return inner


def read_inner(folder: Path) -> Any:
    """Return a folder's tokenizer as AutoTokenizer reads it, without AutoTokenizer where its choice is known."""
    known = known_class(folder)
    if known is not None:
        return known.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def ask_text(fields: dict[str, Any], tokenizer: Tokenizer) -> Question:
    """Return a text's question: its ids."""
    return Question((fields["text"],), special=True)


def ask_prompt(fields: dict[str, Any], tokenizer: Tokenizer) -> Question:
    """Return the question of a prompt and its completion: the prompt alone, and both as one text."""
    return Question((fields["prompt"], fields["prompt"] + fields["completion"]), special=True)


def ask_messages(fields: dict[str, Any], tokenizer: Tokenizer) -> Question:
    """Return a conversation's question: its text by the chat template; raises DataError."""
    rendered = tokenizer.chat(fields["messages"], tools=fields.get("tools"))
    return Question((rendered.text,), special=False, spans=rendered.spans)


def mark_text(question: Question, encoded: list[Encoded], row: Row, tokenizer: Tokenizer) -> Marked:
    """Return a text's ids with its end token, all supervised."""
    ids = with_end(encoded[0].ids, tokenizer)
    return ids, [True] * len(ids)


def mark_prompt(question: Question, encoded: list[Encoded], row: Row, tokenizer: Tokenizer) -> Marked:
    """Return prompt + completion + end token, encoded as one text; the completion is supervised.

    Where the prompt alone gives the first ids (nearly always), the rest is the completion. Where a token
    spans both, it carries the completion's first characters and is supervised.
    """
    alone, ids = encoded[0].ids, encoded[1].ids
    common = num_common(alone, ids)
    if common < len(alone) and is_placed(encoded[1], question.texts[1]):
        mask = [end > len(question.texts[0]) for _, end in encoded[1].offsets]
    else:
        mask = [False] * common + [True] * (len(ids) - common)
    ended = with_end(ids, tokenizer)
    mask += [True] * (len(ended) - len(mask))
    if ended == ids and ids and ids[-1] == tokenizer.eos:
        mask[-1] = True
    return ended, mask


def mark_messages(question: Question, encoded: list[Encoded], row: Row, tokenizer: Tokenizer) -> Marked:
    """Return a conversation's ids; every assistant turn and the token that ends it is supervised."""
    text, ids = question.texts[0], encoded[0].ids
    mask = [False] * len(ids)
    said = [message for message in row.fields["messages"] if message["role"] == "assistant"]
    for message, span in zip(said, question.spans, strict=True):
        if not is_learned(message):
            continue
        for n in drop_after_end(tokens_of(span, encoded[0], text, tokenizer), ids, tokenizer):
            mask[n] = True
    last = row.fields["messages"][-1]
    if last["role"] == "assistant" and not ends_with_special(ids, tokenizer):
        ids = with_end(ids, tokenizer)
        mask += [is_learned(last)] * (len(ids) - len(mask))
    return ids, mask


def is_learned(message: dict[str, Any]) -> bool:
    """Return whether an assistant's turn carries loss: OpenAI's weight 0, and train: false, say that it does not."""
    return bool(message.get("weight", 1)) and bool(message.get("train", 1))


def num_common(some: list[int], others: list[int]) -> int:
    """Return how many ids two texts begin with alike."""
    return next((n for n, pair in enumerate(zip(some, others, strict=False)) if pair[0] != pair[1]), len(some))


def is_placed(encoded: Encoded, text: str) -> bool:
    """Return whether offsets reach the end of their text: some tokenizers lose count behind unknown characters."""
    return max((end for _, end in encoded.offsets), default=0) == len(text)


def tokens_of(span: tuple[int, int], encoded: Encoded, text: str, tokenizer: Tokenizer) -> Sequence[int]:
    """Return the places of the tokens that end inside a span of characters."""
    start, end = span
    if is_placed(encoded, text):
        return [n for n, (_, last) in enumerate(encoded.offsets) if start < last <= end]
    first, behind = (num_common(tokenizer.encode(text[:at], special=False), encoded.ids) for at in span)
    return range(first, behind)


def drop_after_end(inside: Sequence[int], ids: list[int], tokenizer: Tokenizer) -> Sequence[int]:
    """Return a turn's tokens up to its end token, without the blank space a template puts behind it."""
    last = next((k for k in reversed(range(len(inside))) if tokenizer.is_special(ids[inside[k]])), None)
    if last is None:
        return inside
    behind = tokenizer.decode([ids[n] for n in inside[last + 1 :]])
    return inside[: last + 1] if not behind.strip() else inside


def ends_with_special(ids: list[int], tokenizer: Tokenizer) -> bool:
    """Return whether the last token that is not blank is a control token."""
    for token in reversed(ids):
        if tokenizer.is_special(token):
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def with_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return ids with the end token behind them, unless it is there or the model has none."""
    return ids if tokenizer.eos is None or (ids and ids[-1] == tokenizer.eos) else [*ids, tokenizer.eos]


ASK = {"text": ask_text, "prompt": ask_prompt, "messages": ask_messages}
MARK = {"text": mark_text, "prompt": mark_prompt, "messages": mark_messages}


def tokenize_row(row: Row, tokenizer: Tokenizer, *, train_on: str, max_length: int) -> Example:
    """Return one row's tokens and mask; raises DataError that names a row without supervised tokens."""
    found = next(tokenize_some([row], tokenizer, train_on=train_on, max_length=max_length))
    if isinstance(found, DataError):
        raise found
    return found


def tokenize_rows(rows: Sequence[Row], tokenizer: Tokenizer, *, train_on: str, max_length: int) -> list[Example]:
    """Return all examples, in order; a DataError names the first bad row and counts the others that were looked at."""
    examples: list[Example] = []
    problems: list[DataError] = []
    seen = 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        for found in tokenize_some(some, tokenizer, train_on=train_on, max_length=max_length):
            if isinstance(found, Example):
                examples.append(found)
            else:
                problems.append(found)
        seen += len(some)
        if len(problems) >= MAX_PROBLEMS:
            break
    if not problems:
        return examples
    first, least = problems[0], "at least " if seen < len(rows) else ""
    others = f" ({least}{len(problems) - 1:,} more rows have a problem)" if len(problems) > 1 else ""
    raise DataError(f"{first.what}{others}", code=first.code, expected=first.expected, fix=first.fix)


def tokenize_some(
    rows: Sequence[Row], tokenizer: Tokenizer, *, train_on: str, max_length: int
) -> Iterator[Example | DataError]:
    """Yield the example of every row, or what is wrong with it; the texts of all are encoded together."""
    questions = [ask(row, tokenizer) for row in rows]
    encoded: dict[bool, Iterator[Encoded]] = {}
    for special in (False, True):
        asked = [found for found in questions if isinstance(found, Question) and found.special == special]
        texts = [text for question in asked for text in question.texts]
        encoded[special] = iter(tokenizer.encode_all(texts, special=special))
    for row, question in zip(rows, questions, strict=True):
        if isinstance(question, DataError):
            yield question
            continue
        answers = [next(encoded[question.special]) for _ in question.texts]
        ids, mask = MARK[row.kind](question, answers, row, tokenizer)
        yield make_example(row, ids, mask if train_on != "all" else [True] * len(ids), train_on, max_length)


def ask(row: Row, tokenizer: Tokenizer) -> Question | DataError:
    """Return a row's question, or what is wrong with it under the row's name."""
    try:
        return ASK[row.kind](row.fields, tokenizer)
    except DataError as error:
        return DataError(f"{row.source}: {error.what}", code=error.code, expected=error.expected, fix=error.fix)


def make_example(row: Row, ids: list[int], mask: list[bool], train_on: str, max_length: int) -> Example | DataError:
    """Return a row's example, cut at `max_length`; a DataError where nothing of it is supervised."""
    supervised = np.array(mask[:max_length], dtype=bool)
    supervised[:1] = False
    if not supervised.any():
        said = [message for message in row.fields.get("messages", ()) if message["role"] == "assistant"]
        why, fix = "", "give the row an answer, or remove it"
        if any(mask[1:]):
            why, fix = (
                f" within data.max_length {max_length}",
                "raise data.max_length, shorten the prompt, or data.drop: [too_long]",
            )
        elif said and not any(map(is_learned, said)):
            why, fix = ", as its answers have weight 0", "set one of them to 1, or remove the row"
        what = f"{row.source}: no supervised token{why} ({len(ids)} tokens, train_on: {train_on})"
        return DataError(what, code="E213", fix=fix)
    return Example(np.array(ids[:max_length], dtype=np.int32), supervised, row.source)

"""Rows -> token ids and which of them are supervised; the tokenizer comes through transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.rows import Row
from shared.data.template import Rendered, render_chat, run_template
from shared.errors import DataError, ModelError
from shared.types import Example

MAX_PROBLEMS = 100
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer: ids, the end token, the chat template, and character offsets."""

    inner: Any  # a fast tokenizer of transformers
    folder: Path

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
        """Return the ids of a text, with the model's own start token where `special`."""
        return list(self.inner(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self.inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def offsets(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and the [start, end) characters of each; (0, 0) for tokens that stand for no text."""
        out = self.inner(text, add_special_tokens=special, return_offsets_mapping=True)
        return list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Return the ids of control tokens such as <|im_end|>."""
        added = self.inner.added_tokens_decoder
        return frozenset([*self.inner.all_special_ids, *(token for token, text in added.items() if text.special)])

    def is_special(self, token: int) -> bool:
        """Return whether a token is a control token."""
        return token in self.special_ids

    def chat(self, messages: list[dict[str, Any]], *, tools: Any = None) -> Rendered:
        """Return a conversation's text and its assistant spans; raises DataError without a template."""
        return render_chat(self._template(), messages=messages, tools=tools, **self._special_texts())

    def chat_prompt(self, messages: list[dict[str, Any]]) -> str:
        """Return the text that asks the assistant to speak next."""
        source = self._template()
        return run_template(source, messages=messages, add_generation_prompt=True, tools=None, **self._special_texts())

    def _template(self) -> str:
        if self.template is None:
            raise DataError(
                f"{self.folder.name} has no chat template, which rows with messages need",
                fix="use the instruct version of the model, or rows with prompt and completion",
            )
        return self.template

    def _special_texts(self) -> dict[str, str]:
        return {key: value for key, value in self.inner.special_tokens_map.items() if isinstance(value, str)}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder; raises ModelError. Needs the fast (Rust) kind."""
    if not any((folder / name).is_file() for name in FILES):
        raise ModelError(f"{folder} has no tokenizer.json", fix="download the model's tokenizer files")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # its warnings on long texts concern training by itself, not ours

    try:
        inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise bare Exception for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {reason}", fix="download it again") from None
    if not inner.is_fast:
        raise ModelError(f"{folder} has only a slow tokenizer", fix="save it with tokenizer.json")
    return Tokenizer(inner, folder)


def tokenize_row(row: Row, tokenizer: Tokenizer, *, train_on: str, max_length: int) -> Example:
    """Return one row's tokens and mask; raises DataError that names a row without supervised tokens."""
    try:
        ids, mask = TOKENIZE[row.kind](row.fields, tokenizer, train_on)
    except DataError as error:
        raise DataError(f"{row.source}: {error.what}", expected=error.expected, fix=error.fix) from None
    supervised = np.array(mask[:max_length], dtype=bool)
    supervised[:1] = False
    if not supervised.any():
        cut = f" within data.max_length {max_length}" if any(mask[1:]) else ""
        raise DataError(
            f"{row.source}: no supervised token{cut} ({len(ids)} tokens, train_on: {train_on})",
            fix="raise data.max_length or shorten the prompt" if cut else "give the row an answer, or remove it",
        )
    return Example(np.array(ids[:max_length], dtype=np.int32), supervised, row.source)


def tokenize_text(fields: dict[str, Any], tokenizer: Tokenizer, train_on: str) -> tuple[list[int], list[bool]]:
    """Return a text's ids with its end token, all supervised."""
    ids = with_end(tokenizer.encode(fields["text"]), tokenizer)
    return ids, [True] * len(ids)


def tokenize_prompt(fields: dict[str, Any], tokenizer: Tokenizer, train_on: str) -> tuple[list[int], list[bool]]:
    """Return prompt + completion + end token, encoded as one text; the completion is supervised.

    Where the prompt alone gives the first ids (nearly always), the rest is the completion. Where a token
    spans both, it carries the completion's first characters and is supervised.
    """
    prompt = fields["prompt"]
    alone = tokenizer.encode(prompt)
    ids, offsets = tokenizer.offsets(prompt + fields["completion"], special=True)
    if ids[: len(alone)] == alone:
        mask = [n >= len(alone) for n in range(len(ids))]
    else:
        mask = [end > len(prompt) for _, end in offsets]
    ended = with_end(ids, tokenizer)
    mask += [True] * (len(ended) - len(mask))
    if ended == ids and ids and ids[-1] == tokenizer.eos:
        mask[-1] = True
    return ended, mask if train_on != "all" else [True] * len(ended)


def tokenize_messages(fields: dict[str, Any], tokenizer: Tokenizer, train_on: str) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids; every assistant turn and the token that ends it is supervised."""
    rendered = tokenizer.chat(fields["messages"], tools=fields.get("tools"))
    ids, offsets = tokenizer.offsets(rendered.text, special=False)
    mask = [False] * len(ids)
    for start, end in rendered.spans:
        inside = [n for n, (_, b) in enumerate(offsets) if start < b <= end]
        for n in drop_after_end(inside, ids, offsets, rendered.text, tokenizer):
            mask[n] = True
    if fields["messages"][-1]["role"] == "assistant" and not ends_with_special(ids, offsets, rendered.text, tokenizer):
        ids = with_end(ids, tokenizer)
        mask += [True] * (len(ids) - len(mask))
    return ids, (mask if train_on != "all" else [True] * len(ids))


def drop_after_end(
    inside: list[int], ids: list[int], offsets: list[tuple[int, int]], text: str, tokenizer: Tokenizer
) -> list[int]:
    """Return a turn's tokens up to its end token, without the blank space a template puts behind it."""
    last = next((k for k in reversed(range(len(inside))) if tokenizer.is_special(ids[inside[k]])), None)
    if last is None:
        return inside
    behind = "".join(text[offsets[n][0] : offsets[n][1]] for n in inside[last + 1 :])
    return inside[: last + 1] if not behind.strip() else inside


def ends_with_special(ids: list[int], offsets: list[tuple[int, int]], text: str, tokenizer: Tokenizer) -> bool:
    """Return whether the last token that is not blank is a control token."""
    for token, (start, end) in zip(reversed(ids), reversed(offsets), strict=True):
        if tokenizer.is_special(token):
            return True
        if text[start:end].strip():
            return False
    return False


def with_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return ids with the end token behind them, unless it is there or the model has none."""
    return ids if tokenizer.eos is None or (ids and ids[-1] == tokenizer.eos) else [*ids, tokenizer.eos]


TOKENIZE = {"text": tokenize_text, "prompt": tokenize_prompt, "messages": tokenize_messages}


def tokenize_rows(rows: Sequence[Row], tokenizer: Tokenizer, *, train_on: str, max_length: int) -> list[Example]:
    """Return all examples, in order; a DataError names the first bad row and counts the others."""
    examples: list[Example] = []
    problems: list[DataError] = []
    for row in rows:
        try:
            examples.append(tokenize_row(row, tokenizer, train_on=train_on, max_length=max_length))
        except DataError as error:
            problems.append(error)
            if len(problems) == MAX_PROBLEMS:
                break
    if not problems:
        return examples
    first = problems[0]
    others = f" ({len(problems) - 1} more rows have a problem)" if len(problems) > 1 else ""
    raise DataError(f"{first.what}{others}", expected=first.expected, fix=first.fix)

"""What of rows does not reach the model, and what in them is odd: counted on a sample and told, never silent."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.cache import cache_folder, digest_of, make_key, shrink
from shared.data.rows import Row
from shared.data.template import MARK, REASONING, change_call, from_json
from shared.data.tokenize import Tokenizer, is_placed, num_common
from shared.durable import write_whole
from shared.errors import DataError, printable

SAMPLE = 1000  # rows looked at: a quarter of a second where they are short
MAX_BYTES = 2**24  # of the cache: a notice is a line
CHARACTERS = 2_000_000  # of all texts together, about a second: of more, each is looked at as far as its share
NAMED = 5  # characters or keys that are named
Found = dict[str, tuple[str, ...]]  # what is to be told of a row -> characters or keys that it is about


@dataclass(frozen=True)
class Notice:
    """Something that a user would want to know of rows."""

    about: str
    what: str
    rows: int  # that it is true of
    looked_at: int
    first: str  # of them: "train.jsonl:3"
    all_rows: bool  # whether every row was looked at

    @property
    def count(self) -> str:
        """Return how many rows, and where the first is."""
        among = f"{self.looked_at:,} rows" + ("" if self.all_rows else " looked at")
        return f"{self.rows:,} of {among}, first {self.first}"

    @property
    def text(self) -> str:
        """Return a line.

        >>> Notice("a", "the user speaks last", 2, 500, "train.jsonl:3", all_rows=False).text
        'the user speaks last: 2 of 500 rows looked at, first train.jsonl:3'
        """
        return f"{self.what}: {self.count}"


def sample_rows(rows: Sequence[Row], most: int = SAMPLE) -> list[Row]:
    """Return an even choice of rows, in order."""
    return [rows[n] for n in np.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=int).tolist()]


def find_notices(rows: Sequence[Row], tokenizer: Tokenizer, *, total: int) -> list[Notice]:
    """Return what is to be told of rows; total: how many there are, of which these may be a sample."""
    lost, crossed = lost_characters(rows, tokenizer), crossing_tokens(rows, tokenizer)
    told: dict[str, list[Row]] = {}
    about: dict[str, Counter[str]] = {}
    for row, characters, border in zip(rows, lost, crossed, strict=True):
        unread: Found = {UNREAD: row.unread} if row.unread else {}
        for what, details in {**characters, **border, **ignored(row, tokenizer), **oddities(row), **unread}.items():
            told.setdefault(what, []).append(row)
            about.setdefault(what, Counter()).update(details)
    kinds = Counter(row.kind for row in rows)
    if len(kinds) > 1:
        told[MIXED] = [row for row in rows if row.kind != rows[0].kind]
        about[MIXED] = Counter(f"{count} {kind}" for kind, count in kinds.items())
    return [
        Notice(what, what + named(about[what]), len(some), len(rows), some[0].source, len(rows) == total)
        for what, some in told.items()
    ]


def notices_of(rows: Sequence[Row], tokenizer: Tokenizer, *, total: int, keep: bool) -> list[Notice]:
    """Do as `find_notices`, from the cache where it has them; then the tokenizer is not even loaded.

    keep: whether the cache may be used.
    """
    file = None
    if keep:
        with suppress(OSError, ImportError, RuntimeError):  # no home, say, or a library without its metadata
            file = cache_folder() / "notices" / f"{key_of(rows, tokenizer, total)}.json"
    if file is not None:
        with suppress(OSError, ValueError, TypeError):
            return [Notice(**found) for found in json.loads(file.read_bytes())]
    notices = find_notices(rows, tokenizer, total=total)
    if file is not None:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps([asdict(notice) for notice in notices]))
            shrink(file.parent, most=MAX_BYTES)
    return notices


def key_of(rows: Sequence[Row], tokenizer: Tokenizer, total: int) -> str:
    """Return the SHA-256 of all that decides notices."""
    tokens = make_key(rows, tokenizer.folder, train_on="", max_length=0)
    places = [[row.source, row.unread] for row in rows]
    return hashlib.sha256(json.dumps([tokens, places, total, digest_of(Path(__file__))]).encode()).hexdigest()


DROPPED = "the tokenizer drops characters"
CROSSED = "a token holds the end of the prompt and the beginning of the completion, and is learned"
IGNORED = "the chat template leaves out "
UNREAD = "columns that are not read"
MIXED = "rows of another kind than the first"


def named(details: Counter[str]) -> str:
    """Return what something is about, the commonest first, in brackets; empty where there is nothing to name.

    >>> named(Counter(["b", "a", "b"])), named(Counter())
    (' (b, a)', '')
    """
    names = [printable(detail) for detail, _ in details.most_common(NAMED)]  # keys are whatever the file holds
    more = f" and {len(details) - NAMED} more" if len(details) > NAMED else ""
    return f" ({', '.join(names)}{more})" if names else ""


def texts_of(row: Row) -> list[str]:
    """Return what is written in a row."""
    if row.kind == "messages":
        keys = ("content", *REASONING)
        texts = [message[key] for message in row.fields["messages"] for key in keys if message.get(key)]
    else:
        texts = list(row.fields.values())
    return [text for text in texts if isinstance(text, str)]


def cut_texts(texts: Sequence[list[str]], *, most: int) -> list[list[str]]:
    """Return the texts of rows, each cut to its share of `most` characters where all together have more.

    >>> cut_texts([["abc"], ["d", "efghi"]], most=9), cut_texts([["abc"], ["d", "efghi"]], most=6)
    ([['abc'], ['d', 'efghi']], [['ab'], ['d', 'ef']])
    """
    lengths = [len(text) for some in texts for text in some]
    share = most if sum(lengths) <= most else most // len(lengths)
    return [[text[:share] for text in some] for some in texts]


def lost_characters(rows: Sequence[Row], tokenizer: Tokenizer) -> list[Found]:
    """Return of every row the characters that are not there any more in the text of its tokens.

    Characters of one meaning (NFKC) count as one: most tokenizers write them in one form. Blanks at the ends may go.
    """
    texts = cut_texts([texts_of(row) for row in rows], most=CHARACTERS)
    unknown = tokenizer.inner.unk_token_id if tokenizer.inner.unk_token_id != tokenizer.eos else None
    encoded = tokenizer.encode_all([text for some in texts for text in some], special=False)
    ids = [[token for token in one.ids if token != unknown] for one in encoded]
    decoded = iter(tokenizer.inner.backend_tokenizer.decode_batch(ids, skip_special_tokens=False))
    found: list[Found] = []
    for some in texts:
        lost = dict.fromkeys(char for text in some for char in missing(text, next(decoded)))
        found.append({DROPPED: tuple(map(repr, lost))} if lost else {})
    return found


def lost_in(texts: Sequence[str], tokenizer: Tokenizer) -> str | None:
    """Return a line about the characters of texts that the tokenizer drops, None where it drops none."""
    rows = [Row("text", {"text": text}, "") for text in texts]
    lost = Counter(char for found in lost_characters(rows, tokenizer) for some in found.values() for char in some)
    return DROPPED + named(lost) if lost else None


def crossing_tokens(rows: Sequence[Row], tokenizer: Tokenizer, *, most: int = CHARACTERS) -> list[Found]:
    """Return of every row whether its prompt and its completion share a token, such as the "s a" of "has" and " a".

    The model never meets such a token where it is asked: it gets the prompt alone. Of rows that have more characters
    than `most` together the two ends are looked at.
    """
    share = most // max(2 * len(rows), 1)
    pairs = {n: (row.fields["prompt"], row.fields["completion"]) for n, row in enumerate(rows) if row.kind == "prompt"}
    ends = {n: (prompt[-share:], completion[:share]) for n, (prompt, completion) in pairs.items()}
    texts = [text for prompt, completion in ends.values() for text in (prompt, prompt + completion)]
    encoded = iter(tokenizer.encode_all(texts, special=False))
    found: list[Found] = [{} for _ in rows]
    for n, (prompt, completion) in ends.items():
        alone, both = next(encoded).ids, next(encoded)
        if num_common(alone, both.ids) == len(alone):
            continue
        spans = ((start, end) for start, end in both.offsets if start < len(prompt) < end)
        if not is_placed(both, prompt + completion) or any(spans):
            found[n] = {CROSSED: ()}
    return found


def missing(text: str, decoded: str) -> list[str]:
    """Return the characters of a text that are fewer in what its tokens stand for.

    >>> missing("a naïve fox", "a nave fox ")
    ['ï']
    """
    if text == decoded:
        return []
    before, after = (Counter(unicodedata.normalize("NFKC", one)) for one in (text.strip(), decoded))
    return list(before - after)


def ignored(row: Row, tokenizer: Tokenizer) -> Found:
    """Return the parts of a conversation that its chat template does not write, by their names.

    Every part carries a mark of its own; a template that fails on marks says nothing.
    """
    if row.kind != "messages":
        return {}
    names: list[str] = []
    messages = [mark_message(message, names) for message in row.fields["messages"]]
    tools = [change_call(tool, name=marking(names, "tools")) for tool in row.fields.get("tools") or ()]
    try:
        text = tokenizer.chat_text(messages, tools=tools or None)
    except DataError:
        return {}
    gone = [name for n, name in enumerate(names) if mark(n) not in text and json.dumps(mark(n))[1:-1] not in text]
    return {IGNORED + name: () for name in gone}


def mark(number: int) -> str:
    """Return the mark of a part."""
    return f"{MARK}{number}{MARK}"


def marking(names: list[str], name: str) -> Any:
    """Return a function that puts the next mark behind a value; `names` is added to when it is called."""

    def put(value: Any) -> Any:
        names.append(name)
        value = from_json(value)
        return {**value, mark(len(names) - 1): ""} if isinstance(value, dict) else f"{value}{mark(len(names) - 1)}"

    return put


def mark_message(message: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return a message with a mark in each of its parts."""
    calls, said = message.get("tool_calls"), message.get("content")
    marked = dict(message)
    if isinstance(said, str) and said.strip():
        name = "words beside tool calls" if calls else f"{message['role']} messages"
        marked["content"] = f"{said}{mark(len(names))}"
        names.append(name)
    if reasoning := next((message[key] for key in REASONING if isinstance(message.get(key), str)), None):
        marked |= dict.fromkeys(REASONING, f"{reasoning}{mark(len(names))}")
        names.append("reasoning")
    if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
        put = marking(names, "tool calls")
        marked["tool_calls"] = [change_call(call, name=put, arguments=put) for call in calls]
    return marked


def oddities(row: Row) -> Found:
    """Return what is odd about a conversation, though it can be trained on."""
    if row.kind != "messages":
        return {}
    messages = row.fields["messages"]
    roles = [message["role"] for message in messages]
    return {what: () for what, true in odd_ones(messages, roles) if true}


def odd_ones(messages: Sequence[dict[str, Any]], roles: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield what may be odd about messages, and whether it is."""
    empty = [message for message in messages if message["role"] == "assistant" and not message.get("tool_calls")]
    blank = any(not (message.get("content") or "").strip() for message in empty)
    yield "an empty answer, which teaches to say nothing", blank
    yield "the last message is no answer, and nothing is learned from it", roles[-1] != "assistant"
    twice = any(one == other and one in ("user", "assistant") for one, other in pairwise(roles))
    yield "two messages of one role in a row", twice

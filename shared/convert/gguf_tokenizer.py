"""A tokenizer in llama.cpp's words: pieces, scores or merges, types, and the name of its pre-tokenizer.

The source is what the `tokenizers` library runs, so that llama.cpp cuts text as training did. Byte-level BPE becomes
"gpt2" with merges; BPE over characters with "▁" for a blank (SentencePiece's) becomes "llama" with scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.data.tokenize import Tokenizer
from shared.errors import CapabilityError
from shared.folder import end_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = ("ByteLevel", False)
NOT_COMPOSED = "llama.cpp does not compose characters (NFC): text with separate accents is cut differently there"
# What the `tokenizers` library does before it merges -> the name under which llama.cpp does the same.
PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Split", WORD_END + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL), BYTES): "qwen2",
    (("Split", WORD_END + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL), BYTES): "llama-bpe",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (
        (
            "Split",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        BYTES,
    ): "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """Everything that llama.cpp needs to cut and to join text."""

    model: str  # "gpt2" | "llama"
    pre: str
    pieces: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special: Mapping[str, int]  # "bos", "eos", "eot", "unk", "pad" -> id
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    template: str | None
    notes: tuple[str, ...]


def read_vocabulary(tokenizer: Tokenizer, *, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, filled up to the model's `size`.

    Raises CapabilityError for a tokenizer that llama.cpp has no like of.
    """
    found = json.loads(tokenizer.inner.backend_tokenizer.to_str())
    model = found["model"]
    if model["type"] != "BPE":
        raise CapabilityError(
            f"a tokenizer of type {model['type']} cannot be written into GGUF", code="E405", expected="BPE",
            fix="export a Hugging Face folder (--to hf) and convert it with llama.cpp's own script",
        )  # fmt: skip
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    steps = pre_tokenizer(found)
    by_bytes = any(step[0] == "ByteLevel" for step in steps)
    pieces, types = read_pieces(found, size=size, unknown=None if by_bytes else tokenizer.inner.unk_token)
    first = tokenizer.encode("a")
    common = {
        "pieces": pieces, "types": types, "special": special_ids(tokenizer), "template": tokenizer.template,
        "add_bos": bool(first) and first[0] == tokenizer.inner.bos_token_id and len(first) > 1,
        "add_eos": len(first) > 1 and first[-1] == tokenizer.eos,
    }  # fmt: skip
    if by_bytes:
        pre = find_pre_tokenizer(steps, ignore_merges=bool(model.get("ignore_merges")))
        texts = tuple(" ".join(pair) for pair in merges)
        return Vocabulary(
            "gpt2", pre, scores=None, merges=texts, add_space_prefix=None, notes=composing(found), **common
        )
    check_sentencepiece(found, steps)
    scores = piece_scores(pieces, merges)
    notes = merge_notes(model["vocab"], merges)
    return Vocabulary(
        "llama", "default", scores=scores, merges=None, add_space_prefix=has_prefix(found), notes=notes, **common
    )


def read_pieces(found: Mapping[str, Any], *, size: int, unknown: str | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return every piece by id and its type; ids that the tokenizer does not use are padding."""
    pieces = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for piece, number in found["model"]["vocab"].items():
        put(pieces, types, number, piece, BYTE if BYTE_PIECE.fullmatch(piece) else NORMAL)
    for token in found["added_tokens"]:
        put(pieces, types, token["id"], token["content"], CONTROL if token["special"] else USER_DEFINED)
        if token["content"] == unknown:
            types[token["id"]] = UNKNOWN
    if len(set(pieces)) != len(pieces):
        raise CapabilityError(
            "two tokens of the vocabulary have the same text", code="E405", fix="repair tokenizer.json"
        )
    return tuple(pieces), tuple(types)


def put(pieces: list[str], types: list[int], number: int, piece: str, kind: int) -> None:
    """Set one piece; raises CapabilityError for an id that the model has no embedding for."""
    if number >= len(pieces):
        raise CapabilityError(
            f'token {number} ("{piece}") lies outside the model\'s vocabulary of {len(pieces)}',
            code="E405",
            fix="use the tokenizer that belongs to the model",
        )
    pieces[number], types[number] = piece, kind


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of special tokens that the model has; "eot": a second token that ends an answer."""
    inner = tokenizer.inner
    names = {"bos": inner.bos_token_id, "eos": inner.eos_token_id, "unk": inner.unk_token_id, "pad": inner.pad_token_id}
    ends = end_tokens(tokenizer.folder, tokenizer_eos=inner.eos_token_id)
    if names["eos"] is None and ends:
        names["eos"] = ends[0]
    names["eot"] = next((token for token in ends if token != names["eos"]), None)
    return {name: token for name, token in names.items() if token is not None}


def pre_tokenizer(found: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """Return the steps before merging, each as its kind and the setting that matters."""
    whole = found.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", [whole]) if whole else []
    settings = {"ByteLevel": "use_regex", "Digits": "individual_digits", "Metaspace": "prepend_scheme"}
    result: list[tuple[Any, ...]] = []
    for step in steps:
        if step["type"] == "Split":
            pattern = step["pattern"].get("Regex", step["pattern"].get("String"))
            plain = (
                step.get("behavior") in ("Isolated", "Removed") and (step["behavior"] == "Removed") == step["invert"]
            )
            result.append(("Split", pattern) if plain else ("Split", pattern, step.get("behavior")))
        else:
            prefixed = step["type"] == "ByteLevel" and step.get("add_prefix_space")
            result.append(
                (step["type"], step.get(settings.get(step["type"], ""), None), *(["prefix"] * bool(prefixed)))
            )
    return tuple(result)


def find_pre_tokenizer(steps: tuple[tuple[Any, ...], ...], *, ignore_merges: bool) -> str:
    """Return llama.cpp's name for these steps; raises CapabilityError where it has none."""
    name = PRE_TOKENIZERS.get(steps)
    if name is None or (ignore_merges and name not in ("llama-bpe", "tekken")):
        told = " + ".join(str(step[0]) for step in steps)
        raise unlike_text(told, expected=f"the pre-tokenizer of {', '.join(PRE_TOKENIZERS.values())}")
    return name


def normalizers(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the steps that change a text before it is cut."""
    whole = found.get("normalizer") or {}
    return list(whole.get("normalizers", [whole])) if whole else []


def composing(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on NFC, which changes few texts; raises CapabilityError for what changes others.

    llama.cpp has no normalizers for byte-level BPE.
    """
    foreign = [part["type"] for part in normalizers(found) if part["type"] != "NFC"]
    if foreign:
        raise unlike_text(", ".join(foreign), expected="no normalizer, or NFC")
    return (NOT_COMPOSED,) if normalizers(found) else ()


def unlike_text(what: str, *, expected: str) -> CapabilityError:
    """Return the error for a tokenizer that cuts text in a way llama.cpp does not have."""
    return CapabilityError(
        f"llama.cpp does not cut text as this tokenizer does ({what})", code="E405", expected=expected,
        fix="export a Hugging Face folder (--to hf) and convert it with llama.cpp's own script",
    )  # fmt: skip


def check_sentencepiece(found: Mapping[str, Any], steps: Sequence[tuple[Any, ...]]) -> None:
    """Raise CapabilityError unless text is cut by merges alone, with "▁" for a blank."""
    parts = normalizers(found)
    blanks = [
        part["type"] == "Replace" and part["content"] == "▁" and part["pattern"] == {"String": " "} for part in parts
    ]
    foreign = [
        part["type"] for part, blank in zip(parts, blanks, strict=True) if not blank and part["type"] != "Prepend"
    ]
    harmless = all(step[0] == "Metaspace" or step[:2] == ("Split", " ") for step in steps)
    if foreign or not harmless or not (any(blanks) or any(step[0] == "Metaspace" for step in steps)):
        raise unlike_text(", ".join(foreign) or "no ▁ for blanks", expected="byte-level BPE, or SentencePiece's")


def has_prefix(found: Mapping[str, Any]) -> bool:
    """Return whether a blank is put before a text."""
    text = json.dumps(found.get("normalizer") or {})
    scheme = (found.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
    return '"Prepend"' in text or scheme != "never"


def piece_scores(pieces: Sequence[str], merges: Sequence[tuple[str, ...]]) -> tuple[float, ...]:
    """Return the score of every piece: the earlier it is merged, the higher. Unmerged pieces come last.

    >>> piece_scores(["a", "b", "ab", "abb"], [("a", "b"), ("ab", "b")])
    (-2.0, -2.0, 0.0, -1.0)
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return tuple(float(-ranks.get(piece, len(merges))) for piece in pieces)


def merge_notes(vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return a note where llama.cpp could join two pieces that the tokenizer never merges.

    llama.cpp joins any neighbours whose text is a piece, best score first. That is the same where the list of merges
    has every way to make a piece, as SentencePiece's have.
    """
    known = set(merges)
    other = sum(
        (piece[:cut], piece[cut:]) not in known
        for piece in {"".join(pair) for pair in merges}
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    notes = []
    if other:
        notes.append(f"llama.cpp may cut some words differently: {other} ways to join pieces are not among the merges")
    if "<0x00>" not in vocab:
        notes.append("the tokenizer has no byte pieces: llama.cpp stops at a character outside the vocabulary")
    return tuple(notes)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add a vocabulary to a GGUF writer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.pieces))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    for name, token in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)

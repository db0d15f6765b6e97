"""A base with an adapter, opened for reading: what `evaluate`, `generate` and `chat` work with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.adapters.folder import Adapter, check_copies, check_fit
from shared.config import parse_scheme
from shared.convert.merge import read_weighted
from shared.data.layout import choose_layout
from shared.data.rows import Row, find_data, read_rows, split_files
from shared.data.tokenize import Tokenizer, load_tokenizer, tokenize_rows
from shared.errors import ConfigError, DataError
from shared.evaluate import Evaluation, evaluate_examples
from shared.folder import ModelFolder, end_tokens, find_folder, open_folder
from shared.protocols import Backend, Model
from shared.registry import find_backend
from shared.running.run_folder import hash_files, joint_hash
from shared.strict import check_length
from shared.types import Sampling, Token

HASHED_BYTES = 2**30  # hashing a larger base would take longer than a short answer
Note = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """A loaded model, its tokenizer, its adapter if any, and where it runs."""

    model: Model
    tokenizer: Tokenizer
    adapter: Adapter | None
    backend: Backend
    folder: Path


@dataclass(frozen=True)
class Completion:
    """A finished generation: its text, its ids without the end token, and whether an end token came."""

    text: str
    tokens: tuple[int, ...]
    stopped: bool
    prompt_tokens: int


def open_session(
    model: str, *, adapter: str | Path | Sequence[str] | None, backend: str, dtype: str = "auto",
    quantization: str = "auto", device: str = "auto", note: Note = lambda text: None,
) -> Session:  # fmt: skip
    """Return a session; raises MlxloraError subclasses.

    adapter: a folder, or several as "folder=weight", which are added.
    dtype auto: bfloat16 on a GPU, float32 on a CPU. quantization auto: as the adapter was trained.
    """
    if quantization != "auto":
        parse_scheme(quantization)
    found = read_weighted([str(adapter)] if isinstance(adapter, str | Path) else adapter) if adapter else None
    folder = find_folder(model)
    base = open_folder(folder)
    tokenizer = load_tokenizer(folder)
    engine = find_backend(backend)
    if dtype == "auto":
        dtype = "bfloat16" if engine.probe().device == "gpu" and device != "cpu" else "float32"
    scheme = parse_scheme(choose_quantization(quantization, found, already=bool(base.schemes), note=note))
    loaded = engine.load_model(
        folder, dtype=dtype, quantization=scheme, recompute=False, device=None if device == "auto" else device
    )
    if found is not None:
        check_fit(found, loaded.info)
        check_copies(found, base)
    for text in (*loaded.info.notes, *differences(found, base, dtype=dtype)):
        note(text)
    if found is not None:
        loaded.attach(found.spec)
        loaded.load_tensors("adapter", found.tensors)
    return Session(loaded, tokenizer, found, engine, folder)


def differences(adapter: Adapter | None, base: ModelFolder, *, dtype: str) -> Iterator[str]:
    """Yield what differs between how an adapter was trained and how it is used now."""
    if adapter is None:
        return
    trained = adapter.notes.get("dtype", dtype)
    if trained != dtype:
        yield f"the adapter was trained in {trained}, this is {dtype}; --dtype {trained} gives the training's numbers"
    files = [*base.files, base.path / "config.json"]
    known = "base" in adapter.notes and sum(file.stat().st_size for file in files) <= HASHED_BYTES
    if known and joint_hash(hash_files(files).result()) != adapter.notes["base"]:
        yield "this is not the base that the adapter was trained on: its files differ"


def choose_quantization(asked: str, adapter: Adapter | None, *, already: bool, note: Note) -> str:
    """Return the scheme to load the base with; follows the adapter's training unless told otherwise."""
    if asked != "auto":
        return asked
    trained = str(adapter.notes.get("quantization", "none")) if adapter else "none"
    if trained != "none" and not already:
        note(f"base quantized to {trained}, as the adapter was trained; --quantization none keeps it whole")
        return trained
    return "none"


def find_rows(data: str, *, split: str | None = None) -> tuple[list[Row], str]:
    """Return the rows of a file, or of a folder's split (valid, else test, else train), and the file's name."""
    path = find_data(data)
    if path.is_file():
        if split is not None:
            raise ConfigError(f"--split {split}: {path.name} is a file, which has no splits", fix="leave out --split")
        return read_rows(*split_files(path, "train")), path.name
    files = split_files(path, split) if split else []
    for name in ("valid", "test", "train") if split is None else ():
        files = files or split_files(path, name)
    if not files:
        raise DataError(f"{path} has no {split}.jsonl", code="E210", fix="choose another --split")
    return read_rows(*files), files[0].name


def evaluate_rows(
    session: Session, rows: list[Row], *, max_length: int = 2048, train_on: str = "completion"
) -> Evaluation:
    """Return the loss on rows: nats per supervised token."""
    examples = tokenize_rows(rows, session.tokenizer, train_on=train_on, max_length=max_length)
    longest = max(examples, key=lambda example: len(example.tokens))
    check_length(session.model.info, len(longest.tokens), what=longest.source)
    layout = choose_layout(session.model.info, packing="auto", micro_tokens=None)
    return evaluate_examples(session.model, examples, layout)


def prompt_ids(session: Session, prompt: str, *, chat: bool | None, note: Note = lambda text: None) -> list[int]:
    """Return the ids of a prompt.

    chat: wrap it as a user's message in the chat template; None: if the adapter was trained on messages.
    """
    if chat is None:
        chat = bool(session.adapter and session.adapter.notes.get("rows") == "messages")
        if chat:
            note("prompt taken as a user's message, as the adapter was trained on messages; --raw takes it as it is")
    if not chat:
        ids = session.tokenizer.encode(prompt)
        if (
            len(ids) > 1
            and ids[-1] == session.tokenizer.eos
            and session.tokenizer.decode(ids) == session.tokenizer.decode(ids[:-1])
        ):
            ids = ids[:-1]  # a tokenizer that ends every text; a prompt goes on
    else:
        text = session.tokenizer.chat_prompt([{"role": "user", "content": prompt}])
        ids = session.tokenizer.encode(text, special=False)
    if not ids:
        raise DataError("the prompt is empty and the model has no start token", fix="give a prompt")
    return ids


def stream(session: Session, ids: list[int], sampling: Sampling) -> Iterator[tuple[str, Token]]:
    """Yield (new text, token) as tokens come; text is held back while it ends in half a character."""
    seen: list[int] = []
    shown = ""
    for token in session.model.generate([ids], sampling):
        if not token.stopped:
            seen.append(token.token)
        text = session.tokenizer.decode(seen)
        last = token.stopped or len(seen) == sampling.max_tokens
        ready = text if last or not text.endswith("\ufffd") else shown
        yield ready[len(shown) :], token
        shown = ready


def complete(session: Session, ids: list[int], sampling: Sampling) -> Completion:
    """Return the whole continuation of a prompt."""
    found = list(session.model.generate([ids], sampling))
    tokens = tuple(token.token for token in found if not token.stopped)
    return Completion(session.tokenizer.decode(tokens), tokens, any(token.stopped for token in found), len(ids))


def sampling_for(session: Session, *, max_tokens: int, temperature: float, seed: int) -> Sampling:
    """Return the sampling of a session, with the model's end tokens."""
    stops = end_tokens(session.folder, tokenizer_eos=session.tokenizer.eos)
    return Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed, stop_tokens=stops)


def exact_match(
    session: Session, rows: list[dict[str, Any]], *, max_tokens: int
) -> tuple[float, list[tuple[str, str, str]]]:
    """Return the share of {"prompt", "completion"} rows answered exactly, and (prompt, wanted, got) of each."""
    sampling = sampling_for(session, max_tokens=max_tokens, temperature=0.0, seed=0)
    got = []
    for row in rows:
        text = complete(session, session.tokenizer.encode(row["prompt"]), sampling).text
        got.append((row["prompt"], row["completion"].strip(), text.strip()))
    return sum(wanted == found for _, wanted, found in got) / len(got), got

"""`fuse`: an adapter added into its base, checked before, measured while it is written, and refused if it is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shared.adapters.bases import check_base
from shared.adapters.folder import Adapter, check_copies, is_apart, read_adapter
from shared.adapters.spec import is_embedding
from shared.convert.change import find_changes
from shared.convert.files import WORDS
from shared.convert.source import check_whole, plain_weights
from shared.convert.target import check_target, new_folder
from shared.convert.weights import Fused, Survival, check_grid, layers_of, total, write_plain, write_same, write_scheme
from shared.data.batch import micro_batches
from shared.data.layout import choose_layout
from shared.data.rows import Row
from shared.data.tokenize import tokenize_rows
from shared.errors import AdapterError, CapabilityError, ConfigError, MlxloraError, did_you_mean
from shared.folder import ModelFolder, find_folder, open_folder
from shared.schemes import parse_scheme
from shared.sessions import find_rows, open_session, other_base
from shared.types import Example

KEPT = 0.9  # cosine between the wanted and the written change below which fusing is refused
MEASURED_ROWS, MEASURED_TOKENS = 16, 256
Note = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """How much of the change survived in one decoder layer, or in a module outside of them."""

    name: str
    cosine: float
    share: float


@dataclass(frozen=True)
class TextChange:
    """How far the log-probabilities of real rows moved, beside how far the adapter moves them."""

    rows: str
    tokens: int
    cosine: float
    share: float  # of the way, 1 for all of it


@dataclass(frozen=True)
class FuseResult:
    """A fused model, and what of the adapter is in it."""

    output: Path
    scheme: str
    dtype: str
    weights: int  # that the adapter changed
    cosine: float
    share: float
    layers: tuple[Part, ...]
    text: TextChange | None


def fuse(
    model: str, *, adapter: str, output: str, scheme: str = "none", dtype: str = "auto", accept_loss: bool = False,
    force: bool = False, data: str | None = None, sample: Path | None = None, backend: str = "auto",
    note: Note = lambda text: None,
) -> FuseResult:  # fmt: skip
    """Write base + adapter as a whole model; raises AdapterError where less than KEPT of the change would be left.

    scheme: "none" for plain weights, "same" for the base's own grid, else a format to quantize to. dtype: of plain
    weights, "auto" for the base's own. data: rows to measure log-probabilities on, else `sample`. Nothing is written on
    any error.
    """
    check_options(scheme, dtype)
    target, base, source = Path(output).expanduser(), find_folder(model), Path(adapter).expanduser()
    check_target(target, sources=[base, source], force=force)
    found, folder = read_adapter(source), open_folder(base)
    check_base(found, folder)
    check_whole(folder)
    check_copies(found, folder)
    if is_apart(found.spec, tied=folder.is_tied):
        folder = untied(folder, scheme=scheme)
    weights = plain_weights(folder)
    changes = find_changes(found, weights, folder.config)
    for text in remarks(found, folder):
        note(text)
    rows = pick_rows(data, sample) if scheme not in ("none", "same") or (scheme == "same" and folder.schemes) else None
    for name in changes if scheme == "same" else ():
        if weights[name].scheme is not None:
            check_grid(weights[name])
    with new_folder(target, sources=[base, source], force=force) as staged:
        if scheme == "same":
            fused = write_same(folder, changes, staged)
        elif scheme != "none":
            fused = write_scheme(folder, changes, staged, scheme=scheme)
        else:
            fused = write_plain(folder, changes, staged, dtype=WORDS.get(dtype))
        text = measure_text(base, source, staged, rows=rows, asked=data is not None, backend=backend, note=note)
        result = summarize(target, fused, text, scheme=scheme, dtype=dtype)
        check_survival(result, accept_loss=accept_loss)
    return result


def remarks(found: Adapter, folder: ModelFolder) -> Iterator[str]:
    """Yield what is other than in training, or than in the base."""
    yield from other_base(found, folder)
    if is_apart(found.spec, tied=open_folder(folder.path).is_tied):
        yield "the adapter makes two of embedding and head: the result holds both, tie_word_embeddings is false"
    trained = str(found.notes.get("quantization", "none"))
    if trained != "none" and not folder.schemes:
        yield f"the adapter was trained on the base quantized to {trained}; here it joins the base as it is stored"


def untied(folder: ModelFolder, *, scheme: str) -> ModelFolder:
    """Return a base whose head is a tensor of its own, equal to the embedding; raises CapabilityError."""
    table = next(name for name in plain_weights(folder) if is_embedding(name.rpartition(".")[0]))
    if scheme != "none" or table not in folder.entries or table.rpartition(".")[0] in folder.places:
        raise CapabilityError(
            "the adapter makes two of embedding and head, which are one tensor in this base", code="E405",
            expected="plain weights, and no --scheme: only these can be parted",
            fix="leave out --scheme, fuse into the base before quantization, or use it beside the base: --adapter",
        )  # fmt: skip
    entries = {**folder.entries, "lm_head.weight": folder.entries[table]}
    return replace(folder, entries=entries, config={**folder.config, "tie_word_embeddings": False})


def check_options(scheme: str, dtype: str) -> None:
    """Raise ConfigError for options that nobody knows, or that contradict each other."""
    if scheme != "same":
        parse_scheme(scheme, option="--scheme", more=["same"])
    if dtype not in ("auto", *WORDS):
        raise ConfigError(f'--dtype: unknown value "{dtype}"', fix=did_you_mean(dtype, ["auto", *WORDS]))
    if scheme != "none" and dtype != "auto":
        raise ConfigError(f"--dtype {dtype} is for plain weights, --scheme {scheme} keeps the base's", fix="give one")


def summarize(target: Path, fused: Fused, text: TextChange | None, *, scheme: str, dtype: str) -> FuseResult:
    """Return the result by decoder layer."""
    groups = layers_of(list(fused.survivals))
    parts = {name: total(fused.survivals[one] for one in group) for name, group in groups.items()}
    whole = fused.total
    layers = tuple(Part(name, found.cosine, found.share) for name, found in parts.items())
    return FuseResult(target, scheme, dtype, len(fused.survivals), whole.cosine, whole.share, layers, text)


def check_survival(result: FuseResult, *, accept_loss: bool) -> None:
    """Raise AdapterError where less than KEPT of the adapter would be left."""
    kept = float(np.min([result.cosine, 1.0 if result.text is None else result.text.cosine]))  # NaN where one is
    if kept >= KEPT or accept_loss:
        return
    raise Lost(result, kept)


class Lost(AdapterError):
    """A fused model that would have lost its fine-tuning; `result` says how much in which layer."""

    def __init__(self, result: FuseResult, kept: float) -> None:
        self.result = result
        plain = "leave out --scheme for full precision" if result.scheme != "none" else "use --dtype float32"
        super().__init__(
            f"fusing would lose the adapter: a cosine of {kept:.3f} between its change and what is left of it",
            expected=f"{KEPT} or more; nothing was written",
            fix=f"{plain}, keep the adapter apart, or --accept-loss",
            code="E313",
        )


def pick_rows(data: str | None, sample: Path | None) -> tuple[list[Row], str] | None:
    """Return the rows to measure on and what they are called: the user's, else the built-in ones."""
    if data is not None:
        return find_rows(data)
    return find_rows(str(sample)) if sample is not None and sample.exists() else None


def measure_text(
    base: Path, adapter: Path, fused: Path, *, rows: tuple[list[Row], str] | None, asked: bool, backend: str, note: Note
) -> TextChange | None:
    """Return how far the fused model moves the rows' log-probabilities along the adapter's way, None without rows.

    asked: the rows are the user's. Where they are not, and no backend can tell, a note stands for the figure.
    """
    if rows is None:
        return None
    try:
        plain = log_probs(base, None, rows[0], backend)
        wanted = log_probs(base, adapter, rows[0], backend) - plain
        got = log_probs(fused, None, rows[0], backend) - plain
    except MlxloraError as error:
        if asked:
            raise
        note(f"log-probabilities were not measured: {error.what}")
        return None
    found = Survival()
    found.add(wanted, got)
    return TextChange(rows[1], len(plain), found.cosine, found.share)


def log_probs(model: Path, adapter: Path | None, rows: Sequence[Row], backend: str) -> np.ndarray:
    """Return the log-probability in nats of every token of some rows, float64."""
    session = open_session(
        str(model), adapter=None if adapter is None else str(adapter), backend=backend, quantization="none",
        dtype="float32",
    )  # fmt: skip
    cut = min(MEASURED_TOKENS, session.model.info.max_tokens or MEASURED_TOKENS)
    examples: list[Example] = tokenize_rows(
        list(rows[:MEASURED_ROWS]), session.tokenizer, train_on="all", max_length=cut
    )
    layout = choose_layout(session.model.info, packing="none", micro_tokens=None)
    return np.concatenate([session.model.log_probs(batch) for batch in micro_batches(examples, layout)]).astype(float)

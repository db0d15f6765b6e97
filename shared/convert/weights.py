"""A model's weights written anew, with an adapter added: in full precision, or on the base's grid, with what is lost.

A low-rank change is small beside the step of a 4-bit grid: rounding back swallows most of it. So every fused weight is
compared with what it should be, and `Survival` says how much of the change is left.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from shared.adapters.spec import layer_of
from shared.convert.change import AnyChange
from shared.convert.files import DTYPES, write_config, write_tokenizer
from shared.convert.quantize import make_plan, write
from shared.convert.shards import Planned, rewrite_shard, row_blocks, write_index, write_shards
from shared.convert.source import Weight, blocks, is_by_rows, open_rows, packed_rows, plain_weights
from shared.errors import CapabilityError
from shared.experts import is_expert
from shared.folder import COMPUTED, ModelFolder, open_folder, read_entries
from shared.quant.grid import has_grid, requantize
from shared.registry import find_quantizer
from shared.tensors import FLOATS, from_float32, to_float32
from shared.types import Packed, Tensor

PLAIN = ".plain"  # the fused model before it is quantized anew


@dataclass
class Survival:
    """Sums over the elements of one weight or of many: how much of the wanted change is there."""

    wanted: float = 0.0  # squared length of the change that the adapter stands for
    got: float = 0.0  # of the change that the written weight has
    both: float = 0.0  # their product

    def add(self, wanted: np.ndarray, got: np.ndarray) -> None:
        """Count some more elements, float64."""
        self.wanted += float(np.vdot(wanted, wanted))
        self.got += float(np.vdot(got, got))
        self.both += float(np.vdot(wanted, got))

    @property
    def cosine(self) -> float:
        """Return the cosine between both changes: 1 where nothing is lost, or nothing was wanted."""
        if self.wanted == 0:
            return 1.0
        return self.both / math.sqrt(self.wanted * self.got) if self.got else 0.0

    @property
    def share(self) -> float:
        """Return how far the weight moved in the wanted direction, 1 for all the way."""
        return self.both / self.wanted if self.wanted else 1.0


@dataclass(frozen=True)
class Fused:
    """What was written: how the change of every weight survived, by its name."""

    survivals: Mapping[str, Survival] = field(default_factory=dict)

    @property
    def total(self) -> Survival:
        """Return the sums over all weights."""
        return total(self.survivals.values())


def total(survivals: Iterable[Survival]) -> Survival:
    """Return the sum of survivals."""
    found = Survival()
    for one in survivals:
        found = Survival(found.wanted + one.wanted, found.got + one.got, found.both + one.both)
    return found


def write_plain(folder: ModelFolder, changes: Mapping[str, AnyChange], staged: Path, *, dtype: str | None) -> Fused:
    """Write the fused model with plain weights; dtype: of all float weights, None for what the base has.

    Without a quantized weight and with nothing else to convert, all other bytes are the source's.
    """
    check_stacks(folder)
    weights = plain_weights(folder)
    fused = Fused({name: Survival() for name, change in changes.items() if not change.is_nothing()})
    kinds = {name: dtype if dtype and weight.dtype in FLOATS else weight.dtype for name, weight in weights.items()}
    made = {
        name: plan_plain(folder, weight, changes.get(name), fused, dtype=kinds[name])
        for name, weight in weights.items()
    }
    same = (
        not folder.schemes
        and folder.keeps_names
        and all(kinds[name] == weight.dtype for name, weight in weights.items())
    )
    if same:
        copy_changed(folder, staged, {name: made[name].blocks for name in fused.survivals})
    else:
        kept = [name for name in made if not COMPUTED.search(name)]
        by_file = {file: [made[name] for name in kept if weights[name].file == file] for file in folder.files}
        write_shards(staged, by_file, metadata={"format": "pt"})
    write_config(folder, staged, dtype=None if same else common_dtype(kinds.values()), plain=True)
    write_tokenizer(folder, staged)
    return fused


def check_stacks(folder: ModelFolder) -> None:
    """Raise CapabilityError for quantized stacks of experts, which have no plain name in transformers."""
    stack = next((module for module in folder.places if is_expert(module)), None)
    if stack:
        raise CapabilityError(
            f'{folder.path}: the experts are quantized stacks ("{stack}"), which this version writes only as they are',
            code="E405",
            fix="fuse with --scheme same, or into the model that it was quantized from",
        )


def common_dtype(kinds: Iterable[str]) -> str:
    """Return the name, for a config, of the dtype that most weights have."""
    floats = [kind for kind in kinds if kind in FLOATS]
    return DTYPES[max(set(floats), key=floats.count)] if floats else "float32"


def plan_plain(folder: ModelFolder, weight: Weight, change: AnyChange | None, fused: Fused, *, dtype: str) -> Planned:
    """Return how one weight is written: as it is, or changed and counted."""

    def make() -> Iterable[Tensor]:
        read = open_rows(folder, weight)
        survival = fused.survivals.get(weight.name)
        if change is None or survival is None:
            for block in blocks(weight, read):
                yield block if block.dtype == dtype else cast(to_float32(block), dtype)
            return
        for rows in row_blocks(weight.shape):
            base = to_float32(read(rows)).astype(np.float64)
            wanted = change.apply(base, rows)
            written = cast(wanted, dtype)
            survival.add(wanted - base, to_float32(written) - base)
            yield written

    return Planned(weight.name, dtype, weight.shape, make)


def cast(values: np.ndarray, dtype: str) -> Tensor:
    """Return values rounded to a float dtype; raises CapabilityError where they leave its range."""
    with np.errstate(over="ignore"):
        found = from_float32(values.astype(np.float32), dtype)
        if dtype == "F16" and not np.isfinite(found.data).all():
            raise CapabilityError(
                f"a weight of {np.abs(values).max():.3g} does not fit into float16, which ends at 65504",
                code="E405",
                fix="use --dtype bfloat16 or float32",
            )
    return found


def write_same(folder: ModelFolder, changes: Mapping[str, AnyChange], staged: Path) -> Fused:
    """Write the fused model as the base is stored: same scales and offsets, every changed value its nearest code.

    All bytes but those of changed codes are the source's. Raises CapabilityError for a format without a grid to keep.
    """
    weights = plain_weights(folder)
    fused = Fused({name: Survival() for name, change in changes.items() if not change.is_nothing()})
    made: dict[str, Callable[[], Iterable[Tensor]]] = {}
    for name, survival in fused.survivals.items():
        weight = weights[name]
        if weight.scheme is None:
            made[name] = plan_plain(folder, weight, changes[name], fused, dtype=weight.dtype).blocks
        else:
            check_grid(weight)
            made[folder.places[weight.module].codes] = partial(requantized, folder, weight, changes[name], survival)
    copy_changed(folder, staged, made)
    write_config(folder, staged, dtype=None, plain=False)
    write_tokenizer(folder, staged)
    return fused


def write_scheme(folder: ModelFolder, changes: Mapping[str, AnyChange], staged: Path, *, scheme: str) -> Fused:
    """Write the fused model quantized anew by a scheme, and count what is left of the change beside the base."""
    if expert := next((name for name in changes if is_expert(name)), None):
        raise CapabilityError(
            f'"{expert}" of an expert would be one of a quantized stack, of which nobody could tell what is left of it',
            code="E405", fix="fuse without --scheme, then mlxlora quantize",
        )  # fmt: skip
    plain = staged / PLAIN
    plain.mkdir()
    fused = write_plain(folder, changes, plain, dtype=None)
    write(make_plan(str(plain), scheme=scheme, overrides=[], base3=False), staged, lambda layer: None)
    shutil.rmtree(plain)
    weights, written = plain_weights(folder), open_folder(staged)
    found = plain_weights(written)
    return Fused(
        {name: compare(folder, weights[name], changes[name], written, found[name]) for name in fused.survivals}
    )


def compare(folder: ModelFolder, weight: Weight, change: AnyChange, written: ModelFolder, result: Weight) -> Survival:
    """Return how much of a weight's change is in another folder's weight."""
    survival, before, after = Survival(), open_rows(folder, weight), open_rows(written, result)
    for rows in row_blocks(weight.shape):
        base = to_float32(before(rows)).astype(np.float64)
        survival.add(change.apply(base, rows) - base, to_float32(after(rows)) - base)
    return survival


def check_grid(weight: Weight) -> None:
    """Raise CapabilityError for a format whose grid cannot be kept."""
    if weight.scheme is not None and not has_grid(weight.scheme.name):
        raise CapabilityError(
            f'"{weight.module}" is stored as {weight.scheme}, which cannot be written again on its own grid',
            code="E405",
            fix="leave out --scheme for full precision",
        )


def requantized(folder: ModelFolder, weight: Weight, change: AnyChange, survival: Survival) -> list[Tensor]:
    """Return the codes of a changed weight as the folder stores them, and count the change.

    On a kept grid nothing but the codes can change.
    """
    assert weight.scheme is not None
    quantizer = find_quantizer(weight.scheme)
    packed = folder.packed(weight.module, shape=weight.shape)
    parts: list[Packed] = []
    for rows in row_blocks(weight.shape) if is_by_rows(packed) else [slice(0, weight.shape[0])]:
        part = packed_rows(packed, rows) if is_by_rows(packed) else packed
        base = to_float32(quantizer.dequantize(part)).astype(np.float64)
        wanted = change.apply(base, rows)
        written = requantize(wanted.astype(np.float32), like=part)
        survival.add(wanted - base, to_float32(quantizer.dequantize(written)) - base)
        parts.append(written)
    codes = np.concatenate([part.arrays["weight"].data for part in parts])
    written = Tensor(packed.arrays["weight"].dtype, codes)
    form = folder.places[weight.module].form
    if form is None:
        return [written]
    return [form.write(replace(packed, arrays={**packed.arrays, "weight": written}))[form.codes]]


def copy_changed(folder: ModelFolder, staged: Path, changed: Mapping[str, Callable[[], Iterable[Tensor]]]) -> None:
    """Copy the shards and their index, with some tensors replaced by others of the same dtype and shape.

    Raises ModelError for what no backend would load: NaN, infinity, codes that stand for nothing.
    """
    for name in folder.entries.keys() - folder.packed_names - changed.keys():
        if not COMPUTED.search(name):
            folder.value(name)
    for module, place in folder.places.items():
        folder.packed(module, shape=place.stored.shape)
    for file in folder.files:
        own = {name: blocks for name, blocks in changed.items() if folder.entries[name].file == file}
        rewrite_shard(file, staged / file.name, own)
    if len(folder.files) > 1:
        stored = read_entries(folder.path)
        weight_map = {name: entry.file.name for name, entry in stored.items()}
        write_index(staged, weight_map, total=sum(entry.end - entry.start for entry in stored.values()))


def layers_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Return weight names by decoder layer, others under their own name, in the given order.

    >>> layers_of(["model.layers.0.a.weight", "model.layers.0.b.weight", "lm_head.weight"])
    {'layer 0': ['model.layers.0.a.weight', 'model.layers.0.b.weight'], 'lm_head': ['lm_head.weight']}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        number = layer_of(name)
        groups.setdefault(name.rpartition(".")[0] if number is None else f"layer {number}", []).append(name)
    return groups

"""`merge`: several adapter folders as one, for both libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.adapters.bases import check_base, different_bases
from shared.adapters.combining import check_options, combine
from shared.adapters.folder import Adapter, check_copies, read_adapter
from shared.adapters.hashes import hashes_of
from shared.adapters.names import TENSOR_FILES
from shared.adapters.schema import CONFIG_FILE, named_base
from shared.adapters.spec import ends_of
from shared.adapters.writing import METADATA, to_mlx, to_peft, why_not_mlx, write_config
from shared.convert.adapters import RESTORE_FILE, facts_of, find_base
from shared.convert.target import ADAPTER, new_folder
from shared.errors import CapabilityError, ConfigError
from shared.experts import is_stack
from shared.folder import ModelFolder, find_folder, open_folder, read_json
from shared.tensors import save_file
from shared.types import AdapterSpec

COPIED = (CONFIG_FILE, *TENSOR_FILES, RESTORE_FILE, "README.md")


@dataclass(frozen=True)
class Weighted:
    """An adapter folder and how much of it to take."""

    folder: Path
    weight: float


@dataclass(frozen=True)
class Merged:
    """What a merge gave."""

    output: Path
    method: str
    adapters: tuple[Weighted, ...]
    modules: int
    rank: int
    copied: bool  # the first bytes: one adapter with weight 1, the others with 0
    notes: tuple[str, ...] = ()


def parse_weighted(text: str) -> Weighted:
    """Return folder and weight of `DIR` or `DIR=WEIGHT`; raises ConfigError.

    >>> parse_weighted("runs/a/adapter=0.5")
    Weighted(folder=PosixPath('runs/a/adapter'), weight=0.5)
    """
    folder, equals, number = text.rpartition("=")
    if not equals or Path(text).expanduser().is_dir():
        return Weighted(Path(text).expanduser(), 1.0)
    try:
        weight = float(number)
    except ValueError:
        raise ConfigError(f'the weight in "{text}" is no number', expected="DIR=0.5") from None
    if not math.isfinite(weight):
        raise ConfigError(f'the weight in "{text}" is not finite', expected="DIR=0.5")
    return Weighted(Path(folder).expanduser(), weight)


def read_weighted(texts: Sequence[str]) -> Adapter:
    """Return one adapter of `DIR=WEIGHT` arguments, their exact sum."""
    found = [parse_weighted(text) for text in texts]
    return combine([read_adapter(one.folder) for one in found], [one.weight for one in found], method="concat")


def merge_adapters(
    adapters: Sequence[str], target: Path, *, method: str, rank: int | None = None, density: float | None = None,
    base: str | None = None, force: bool = False,
) -> Merged:  # fmt: skip
    """Write adapters (`DIR` or `DIR=WEIGHT`) as one folder, whole or absent; raises MlxloraError subclasses.

    With weight 1 for one and 0 for all others that one's files are copied.
    """
    found = tuple(parse_weighted(text) for text in adapters)
    check_options(method, rank=rank, density=density)
    read = [read_adapter(one.folder) for one in found]
    if base is not None:
        named = open_folder(find_folder(base))
        for adapter in read:
            check_base(adapter, named)
    merged = combine(read, [one.weight for one in found], method=method, rank=rank, density=density)
    if any(adapter.copies for adapter in read):
        folder = find_base(read_json(found[0].folder / CONFIG_FILE), base)
        if folder is None:
            raise CapabilityError(
                "an adapter brings weights of its base along, which must be looked at",
                code="E404",
                fix="name the base: --base MODEL",
            )
        for adapter in read:
            check_copies(adapter, folder)
    same = next((n for n, adapter in enumerate(read) if adapter is merged), None)
    with new_folder(target, sources=[one.folder for one in found], force=force, own=ADAPTER) as staged:
        if same is not None:
            for name in COPIED:
                if (found[same].folder / name).is_file():
                    (staged / name).write_bytes((found[same].folder / name).read_bytes())
        else:
            write_merged(staged, merged, found, method=method, base=base)
    notes = () if same is not None else tuple(different_bases(read))
    return Merged(target, method, found, len(merged.spec.modules), merged.spec.rank, same is not None, notes)


def write_merged(staged: Path, merged: Adapter, found: Sequence[Weighted], *, method: str, base: str | None) -> None:
    """Write the files of a merged adapter, for both libraries where both compute it alike."""
    first = read_json(found[0].folder / CONFIG_FILE)
    folder, named = find_base(first, base), base or named_base(first)
    facts = facts_of(folder)
    spec = merged.spec if folder is None else replace(merged.spec, tied=merged.spec.tied and folder.is_tied)
    layouts = [to_peft(spec, merged.tensors, facts, base=named)]
    if is_alike(spec, folder):
        layouts.append(to_mlx(merged.spec, merged.tensors, facts))
    config = {key: value for layout in layouts for key, value in layout.config.items()}
    parts = [{"adapter": one.folder.resolve().name, "weight": one.weight} for one in found]
    for layout in layouts:
        save_file(staged / layout.file, layout.tensors.items(), metadata=METADATA[layout.file])
    notes = {**merged.notes, "merged": parts, "method": method, "sha256": hashes_of(staged)}
    write_config(staged, {**config, "mlxlora": notes})


def is_alike(spec: AdapterSpec, folder: ModelFolder | None) -> bool:
    """Return whether mlx-lm is known to compute an adapter as PEFT does: no ends or experts, or a known base."""
    if not ends_of(spec.modules) and not any(map(is_stack, spec.modules)):
        return True
    return folder is not None and why_not_mlx(spec, tied=folder.is_tied) is None

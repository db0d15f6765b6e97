"""Adapters from PEFT to mlx-lm and back: the same numbers, and the way back gives the first bytes again.

A converted folder remembers under `mlxlora.origin` in its config what it came from: the config's text and the header of
the tensor file. The way back uses them where the adapter is still the one that was converted, which its hash tells.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.adapters.bases import check_base
from shared.adapters.folder import Adapter, check_copies, from_peft, is_copy, no_adapter, no_tensors, read_as
from shared.adapters.fused import INNER, fuse_experts, is_fused
from shared.adapters.names import (
    COPY,
    MLX_FILE,
    OWN_FILE,
    PEFT_FILE,
    mlx_name,
    own_name_of_mlx,
    own_names,
    peft_name,
    turned,
    twin,
)
from shared.adapters.schema import CONFIG_FILE, named_base
from shared.adapters.spec import ends_of, is_embedding, layer_of, leaves_of
from shared.adapters.writing import (
    METADATA,
    Facts,
    Layout,
    common_scale,
    to_mlx,
    to_peft,
    unfolded,
    why_not_mlx,
    write_config,
)
from shared.convert.experts import stacks_of
from shared.convert.target import ADAPTER, new_folder
from shared.errors import AdapterError, CapabilityError, ConfigError, MlxloraError, ModelError
from shared.experts import is_stack
from shared.folder import ModelFolder, find_folder, open_folder, read_json
from shared.tensors import NUMPY, is_finite, load_file, save_file
from shared.types import AdapterSpec, Tensor

FILES = {"peft": PEFT_FILE, "mlx": MLX_FILE}
OTHER = {"peft": "mlx", "mlx": "peft"}
# What mlx-lm's files have no place for: what a folded lora_b lost in a rounding, in units of the last place; weights
# of the base that PEFT saved with the adapter.
RESTORE_FILE = "mlxlora_restore.safetensors"
MAX_ORIGIN = 8_000_000


@dataclass(frozen=True)
class Converted:
    """What a conversion gave."""

    output: Path
    source: str  # peft, mlx
    to: str
    modules: int
    tensors: int
    restored: bool  # the bytes of what the source once came from
    notes: tuple[str, ...]


def convert_adapter(source: Path, target: Path, *, to: str, base: str | None = None, force: bool = False) -> Converted:
    """Write an adapter folder for the other library; the source is never touched, the target whole or absent.

    base: the model, for its number of layers and to check names; where None, the folder that the config names, if it
    is here. Raises AdapterError, CapabilityError where the other library has no way to say it, ConfigError.
    """
    form = find_form(source, to=to)
    adapter, config = read_as(source, FILES[form]), read_json(source / CONFIG_FILE)
    damaged = next((name for name, tensor in adapter.tensors.items() if not is_finite(tensor)), None)
    if damaged:
        raise AdapterError(
            f'adapter tensor "{damaged}" holds NaN or infinity', code="E311", fix="use an earlier checkpoint"
        )
    stored = load_file(source / FILES[form])
    first = restored(config, stored, load_restore(source), to=to)
    folder = find_base(config, base)
    facts = facts_of(folder)
    if folder is not None:
        check_base(adapter, folder)
    check_expressible(adapter.spec, folder, to=to)
    if folder is not None:
        adapter = replace(adapter, spec=replace(adapter.spec, tied=adapter.spec.tied and folder.is_tied))
    if folder is not None:
        check_copies(adapter, folder)
    with new_folder(target, sources=[source], force=force, own=ADAPTER) as staged:
        if first is not None:
            text, data = first
            (staged / CONFIG_FILE).write_text(text, encoding="utf-8")
            (staged / FILES[to]).write_bytes(data)
        else:
            write_converted(staged, source, adapter, config, facts, form=form, to=to)
        if (source / "README.md").is_file():
            (staged / "README.md").write_bytes((source / "README.md").read_bytes())
    notes = tuple(remarks(adapter.spec, folder, base=base, to=to))
    return Converted(target, form, to, len(adapter.spec.modules), len(adapter.tensors), first is not None, notes)


def find_form(source: Path, *, to: str) -> str:
    """Return which library's file of a folder is to be converted: the other's; raises AdapterError."""
    if not source.is_dir():
        raise AdapterError(f"no adapter folder at {source}", code="E310", expected=f"a folder with {CONFIG_FILE}")
    if not (source / CONFIG_FILE).is_file():
        raise no_adapter(source)
    if (source / OWN_FILE).is_file():
        raise CapabilityError(
            f"{source} holds an adapter of a user's own, which neither library can compute", code="E405",
            expected="LoRA, rsLoRA or DoRA", fix="use it here: --adapter",
        )  # fmt: skip
    form = OTHER[to]
    if (source / FILES[form]).is_file():
        return form
    if (source / FILES[to]).is_file():
        raise ConfigError(f"{source} holds {FILES[to]}: it is {to} already", fix=f"--to {form}, or use it as it is")
    raise no_tensors(source)


def find_base(config: Mapping[str, Any], base: str | None) -> ModelFolder | None:
    """Return the base's folder: the one asked for, else the one that the config names where it is on this machine.

    Raises ModelError where that one is damaged; one of a kind that is not read here counts as absent.
    """
    if base is not None:
        return open_folder(find_folder(base))
    named = named_base(config)
    try:
        path = None if named is None else Path(named).expanduser()
        if path is None or not (path / "config.json").is_file():
            return None
    except (OSError, ValueError, RuntimeError):
        return None  # a name that some other machine gave it
    try:
        return open_folder(path)
    except ModelError as error:
        raise ModelError(
            f"the base that the adapter names is damaged: {error.what}", expected=error.expected,
            fix="mend it, or name another: --base MODEL", code=error.code,
        ) from None  # fmt: skip
    except CapabilityError:
        return None


def facts_of(folder: ModelFolder | None) -> Facts:
    """Return what conversion wants to know of a base."""
    if folder is None:
        return Facts()
    layers = {layer for name in folder.entries if (layer := layer_of(name)) is not None}
    return Facts(num_layers=len(layers) or None, modules=None, family=folder.family)


def check_expressible(spec: AdapterSpec, folder: ModelFolder | None, *, to: str) -> None:
    """Refuse what the two libraries compute differently, and modules that the base does not have."""
    names = set() if folder is None else {*(name.rpartition(".")[0] for name in folder.entries), *stacks_of(folder)}
    missing = [name for name in (*spec.modules, *spec.saved) if names and name not in names and name != "lm_head"]
    if missing:
        raise AdapterError(
            f'the adapter does not fit this base: it has no module "{missing[0]}" '
            f"({len(missing)} of {len(spec.modules)} are missing)", fix="give the base that it was trained on",
        )  # fmt: skip
    check_ends(spec, folder, to=to)


def check_ends(spec: AdapterSpec, folder: ModelFolder | None, *, to: str) -> None:
    """Refuse what mlx-lm has no place for, and what only a base tells: whether both ends are one, names of experts."""
    why = why_not_mlx(spec, tied=folder is not None and folder.is_tied) if to == "mlx" else None
    if why is not None:
        raise CapabilityError(why, code="E405", fix="use it with PEFT or here")
    stack = next(filter(is_stack, spec.modules), None)
    if stack and to == "mlx" and folder is None:
        raise CapabilityError(
            f'the adapter changes experts ("{stack}"), which mlx-lm calls differently in each family', code="E405",
            fix="name the base: --base MODEL",
        )  # fmt: skip
    ends = ends_of(spec.modules)
    if ends and folder is None:
        raise CapabilityError(
            f'the adapter changes "{ends[0]}", which PEFT and mlx-lm compute alike only where embedding and head '
            "are two tensors; nobody says whether they are", code="E405", fix="name the base: --base MODEL",
        )  # fmt: skip


def write_converted(
    staged: Path, source: Path, adapter: Adapter, config: Mapping[str, Any], facts: Facts, *, form: str, to: str
) -> None:
    """Write the other library's files, with what leads back."""
    named = named_base(config)
    layout = to_peft(adapter.spec, adapter.tensors, facts, base=named) if to == "peft" else None
    layout = layout or to_mlx(adapter.spec, adapter.tensors, facts)
    written = {**layout.config, **({"model": named} if to == "mlx" else {})}
    notes = {key: value for key, value in adapter.notes.items() if key not in ("origin", "sha256")}
    origin = {
        "format": form,
        "config": (source / CONFIG_FILE).read_text(encoding="utf-8"),
        "header": header_text(source / FILES[form]),
        "sha256": hashlib.sha256((source / FILES[form]).read_bytes()).hexdigest(),
        "converted": digest(written),
    }
    if len(origin["config"]) + len(origin["header"]) <= MAX_ORIGIN:
        notes["origin"] = origin
    save_file(staged / layout.file, layout.tensors.items(), metadata=METADATA[layout.file])
    write_config(staged, {**written, "mlxlora": notes})
    lost = {**dict(rounded_away(adapter, layout, facts)), **adapter.copies} if to == "mlx" else {}
    if lost:
        save_file(staged / RESTORE_FILE, lost.items(), metadata={"format": "mlxlora"})


def header_text(file: Path) -> str:
    """Return the header of a safetensors file that has been read."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return stream.read(length).decode("utf-8")


def digest(config: Mapping[str, Any]) -> str:
    """Return a hash of a config without our own notes."""
    plain = {key: value for key, value in config.items() if key != "mlxlora"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def ratio_of(spec: AdapterSpec, module: str) -> float:
    """Return what mlx-lm's lora_b of a module has been multiplied with."""
    return spec.scale_of(module) / common_scale(spec)


def rounded_away(adapter: Adapter, layout: Layout, facts: Facts) -> Iterator[tuple[str, Tensor]]:
    """Yield by how many units of the last place each B is off that does not come back from mlx-lm's exactly."""
    for module in adapter.spec.modules:
        name = f"{module}.{leaves_of(module)[1]}"
        B = adapter.tensors[name]
        held = layout.tensors[mlx_name(name, family=facts.family or "")]
        back = brought_back(held, B.shape, B.dtype, ratio=ratio_of(adapter.spec, module))
        words = f"<i{B.data.dtype.itemsize}"
        off = B.data.view(words).astype(np.int64) - back.data.view(words).astype(np.int64)
        if off.any():
            yield name, Tensor("I32", off.astype(np.int32))


def brought_back(found: Tensor, shape: tuple[int, ...], dtype: str, *, ratio: float) -> Tensor:
    """Return a tensor of mlx-lm in PEFT's orientation, without the zeros and the ratio that were put in."""
    own = turned(found)
    part = own.data[tuple(slice(size) for size in shape)]
    return unfolded(Tensor(own.dtype, np.ascontiguousarray(part)), ratio, dtype=dtype)


def load_restore(source: Path) -> Mapping[str, Tensor]:
    """Return what was lost in roundings on the way to this folder."""
    return load_file(source / RESTORE_FILE) if (source / RESTORE_FILE).is_file() else {}


def restored(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], lost: Mapping[str, Tensor], *, to: str
) -> tuple[str, bytes] | None:
    """Return the config's text and the tensor file that this adapter came from; None where it is another now."""
    notes = config.get("mlxlora")
    origin = notes.get("origin") if isinstance(notes, dict) else None
    try:
        if origin is None or origin["format"] != to or origin["converted"] != digest(config):
            return None
        data = rebuilt(origin, config, stored, lost, to=to)
        return (origin["config"], data) if hashlib.sha256(data).hexdigest() == origin["sha256"] else None
    except (LookupError, TypeError, ValueError, AttributeError, MlxloraError):
        return None  # notes that somebody changed


def rebuilt(
    origin: Mapping[str, Any], config: Mapping[str, Any], stored: Mapping[str, Tensor], lost: Mapping[str, Tensor], *,
    to: str,
) -> bytes:  # fmt: skip
    """Return the bytes of the first tensor file, as far as this adapter still has them."""
    header = origin["header"].encode("utf-8")
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    if to == "peft":
        back = back_to_peft(json.loads(origin["config"]), entries, stored, lost)
    else:
        back = back_to_mlx(entries, config, stored)
    pieces = [struct.pack("<Q", len(header)), header]
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        found = back[name]
        if found.dtype != entry["dtype"] or list(found.shape) != entry["shape"]:
            raise ModelError(f'"{name}" is another tensor now')
        pieces.append(np.ascontiguousarray(found.data).tobytes())
    return b"".join(pieces)


def back_to_peft(
    config: Mapping[str, Any], entries: Mapping[str, Any], stored: Mapping[str, Tensor], lost: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return PEFT's tensors under their first names, from mlx-lm's."""
    shapes = {
        name: Tensor(entry["dtype"], np.broadcast_to(np.zeros((), NUMPY[entry["dtype"]]), entry["shape"]))
        for name, entry in entries.items()
    }
    held = {own_name_of_mlx(name): tensor for name, tensor in stored.items()}
    shapes |= {name: ones(shapes[name]) for name in one_A(shapes, held)}
    spec, own_shapes = from_peft(config, shapes)
    tensors: dict[str, Tensor] = {}
    stacks = {
        own: back_to_own(own, like.shape, like.dtype, spec, held, lost)
        for own, like in own_shapes.items()
        if is_stack(own.rpartition(".")[0])
    }
    fused = fuse_experts(spec, stacks).tensors
    table = next((name for name in spec.modules if is_embedding(name)), "")
    for name, own in own_names(shapes, ()).items():
        shape = shapes[name]
        if is_copy(own):
            tensors[name] = lost[f"{own.removesuffix(COPY)}.weight"]
        elif spec.tied and own.startswith("lm_head."):
            other = twin(own, table)
            tensors[name] = turned(back_to_own(other, shape.shape[::-1], shape.dtype, spec, held, lost))
        elif is_fused(own):
            tensors[name] = fused[own]
        else:
            tensors[name] = back_to_own(own, shape.shape, shape.dtype, spec, held, lost)
    return tensors


def one_A(names: Iterable[str], held: Mapping[str, Tensor]) -> list[str]:
    """Return PEFT's names of the B of gate and up that had one A; held: our names of what mlx-lm keeps."""
    found = []
    for name, own in own_names(names, ()).items():
        block = own.removesuffix(".lora_B").removesuffix(INNER)
        pair = [held.get(f"{block}.{leaf}.lora_A") for leaf in ("gate_proj", "up_proj")]
        if is_fused(own) and own.endswith("_B") and pair[0] and pair[1] and np.array_equal(pair[0].data, pair[1].data):
            found.append(name)
    return found


def ones(like: Tensor) -> Tensor:
    """Return a tensor without zeros."""
    return Tensor(like.dtype, np.broadcast_to(np.ones((), like.data.dtype), like.shape))


def back_to_own(
    own: str, shape: tuple[int, ...], dtype: str, spec: AdapterSpec, held: Mapping[str, Tensor],
    lost: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    """Return a tensor as it was before it was converted to mlx-lm, to the last bit; held: mlx-lm's by our names."""
    ratio = ratio_of(spec, own.rpartition(".")[0]) if own.endswith("_B") else 1.0
    found = brought_back(held[own], shape, dtype, ratio=ratio)
    if own not in lost:
        return found
    words = f"<i{found.data.dtype.itemsize}"
    off = lost[own].data.astype(words)
    return Tensor(found.dtype, (found.data.view(words) + off).view(found.data.dtype))


def back_to_mlx(names: Iterable[str], config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return mlx-lm's tensors, from PEFT's."""
    own = {name: own_name_of_mlx(name) for name in names}
    stacks = from_peft(config, stored)[1] if any(is_stack(one.rpartition(".")[0]) for one in own.values()) else {}
    return {name: turned(stacks[one] if one in stacks else stored[peft_name(one)]) for name, one in own.items()}


def remarks(spec: AdapterSpec, folder: ModelFolder | None, *, base: str | None, to: str) -> Iterator[str]:
    """Yield what a user should know of a conversion that is right, but not the whole story."""
    if spec.kind == "dora" and spec.dropout:
        yield "DoRA with dropout: both libraries give the same answers, but they train it on differently"
    if to == "peft" and folder is None:
        yield "the base is not here: --base MODEL checks that the adapter fits it"

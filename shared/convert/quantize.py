"""A float model folder written again with quantized weights, as the tool that owns the format loads it.

Shard by shard: in memory are what one shard becomes and the matrix at hand, never the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np

from shared.adapters.spec import is_embedding, layer_of
from shared.convert.experts import check_stacks, one_below_another, written_stacks
from shared.convert.files import DTYPES, QUANTIZED_KEYS, write_tokenizer
from shared.convert.owners import MLX, Owner, check_together, find_owner
from shared.convert.shards import SINGLE, row_blocks, write_index
from shared.convert.source import check_whole
from shared.convert.target import new_folder
from shared.durable import write_json
from shared.errors import CapabilityError, ConfigError, ModelError, did_you_mean
from shared.experts import ROUTERS, is_expert, num_experts
from shared.families import with_old_keys
from shared.folder import ModelFolder, find_folder, open_folder
from shared.protocols import Quantizer
from shared.quant import mlx_folder
from shared.registry import find_quantizer
from shared.schemes import parse_scheme
from shared.tensors import is_finite, read_tensor, save_file, to_float32
from shared.types import Packed, Scheme, Tensor

HEADS = ("lm_head", "embed_out", "output")


@dataclass(frozen=True)
class Layer:
    """One module: how it is stored, what that costs, and how far its values move."""

    module: str
    shape: tuple[int, int]
    scheme: str  # "none": stays a float
    bits_per_weight: float
    error: float | None  # |decoded - given| / |given|, root of mean squares; None where it was not measured
    why: str  # "" or why it stays a float


@dataclass(frozen=True)
class QuantizeResult:
    """What was written, or with `--plan` would be."""

    output: Path | None  # None: a plan
    scheme: str
    loads_with: str
    layers: tuple[Layer, ...]
    bits_per_weight: float  # of the modules that are quantized
    num_bytes: int  # of all tensors
    source_bytes: int


@dataclass(frozen=True)
class Plan:
    """The modules of a folder that could be quantized, in model order, with what is decided for each."""

    folder: ModelFolder
    scheme: Scheme
    owner: Owner
    modules: Mapping[str, Scheme | None]
    why: Mapping[str, str] = field(default_factory=dict)  # of those that stay floats
    stacks: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of experts -> their tensors

    @cached_property
    def stack_of(self) -> dict[str, str]:
        """Return the stack that each tensor of an expert goes into."""
        return {name: stack for stack, names in self.stacks.items() for name in names}

    def sources(self, module: str) -> Sequence[str]:
        """Return the tensors that a module is made of: one, or one per expert."""
        return self.stacks.get(module, (f"{module}.weight",))


def quantize(
    model: str, *, scheme: str, output: Path | None, overrides: Sequence[str] = (), keep: Sequence[str] = (),
    force: bool = False, base3: bool = False, tell: Callable[[Layer], None] = lambda layer: None,
) -> QuantizeResult:  # fmt: skip
    """Write `model` in `scheme` to a new folder and return what each module became; output None: measure only.

    overrides: `PATTERN=SCHEME` by module name, the last match counts; keep: patterns of modules that stay floats;
    base3: ternary weights in base 3.
    """
    rules = [*overrides, *(f"{pattern}=none" for pattern in keep)]
    plan = make_plan(model, scheme=scheme, overrides=rules, base3=base3)
    if output is None:
        return summarize(plan, list(measure(plan, tell)), output=None)
    with new_folder(output, sources=[plan.folder.path], force=force) as staged:
        layers = write(plan, staged, tell)
    return summarize(plan, layers, output=output)


def make_plan(model: str, *, scheme: str, overrides: Sequence[str], base3: bool) -> Plan:
    """Return what becomes of every module; raises ConfigError, ModelError for a folder that is quantized already."""
    chosen = parse_scheme(scheme, option="--scheme")
    if chosen is None:
        raise ConfigError("--scheme none leaves the model as it is", expected="a format, e.g. affine-4bit-g64")
    owner = find_owner(chosen, base3=base3)
    rules = [parse_override(text, chosen, owner) for text in overrides]
    folder = open_folder(find_folder(model))
    check_whole(folder)
    if folder.places:
        held = ", ".join(sorted({str(found) for found in folder.schemes.values()}))
        raise ModelError(
            f"{folder.path} is quantized already ({held})", code="E309", fix="quantize the model it was made from"
        )
    if num_experts(folder.config) > 1 and owner is not MLX:
        raise CapabilityError(
            f"{folder.path}: transformers stacks the experts of a {folder.family} model, and {owner.name} knows linear "
            f"layers only",
            expected=", ".join(MLX.formats), fix="`quantization:` of a recipe quantizes them at load, in every format",
        )  # fmt: skip
    stacks = written_stacks(folder)
    shapes = find_modules(folder, stacks)
    if not shapes:
        raise ModelError(f"{folder.path} holds no float matrices that could be quantized", code="E309")
    for pattern, _ in rules:
        if not any(fnmatchcase(module, pattern) for module in shapes):
            raise ConfigError(f'no module is called "{pattern}"', code="E206", fix=did_you_mean(pattern, shapes))
    decided = {module: decide(module, shape, chosen, owner, rules) for module, shape in shapes.items()}
    modules = {module: found for module, (found, _) in decided.items()}
    why = {module: reason for module, (_, reason) in decided.items() if reason}
    check_stacks(modules, stacks, why=why)
    if not any(modules.values()):
        first = next(iter(modules))
        raise ModelError(
            f'{folder.path}: no matrix would be quantized to {scheme} ("{first}": {why.get(first, "asked for")})',
            code="E314", fix="a scheme with smaller groups, or fewer --keep",
        )  # fmt: skip
    return Plan(folder, chosen, owner, modules, why, stacks)


def parse_override(text: str, scheme: Scheme, owner: Owner) -> tuple[str, Scheme | None]:
    """Return pattern and scheme of `PATTERN=SCHEME`."""
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern:
        raise ConfigError(f'--override "{text}"', expected="PATTERN=SCHEME, e.g. *.down_proj=affine-6bit-g64")
    found = parse_scheme(name, option="--override")
    if found is not None:
        check_together(owner, scheme, found, place=f'--override "{text}"')
    return pattern, found


def find_modules(folder: ModelFolder, stacks: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Return the shapes of linear layers inside the decoder layers, of the embedding, and of an untied head.

    Experts are stacks, all rows (E O, I) of one kind and layer below each other.
    """
    tied = folder.is_tied
    first = {names[0]: stack for stack, names in stacks.items()}
    found: dict[str, tuple[int, int]] = {}
    for name, entry in folder.entries.items():
        module, _, leaf = name.rpartition(".")
        if name in first:
            found[first[name]] = (len(stacks[first[name]]) * entry.shape[0], entry.shape[1])
        if is_expert(module):
            continue
        if leaf != "weight" or len(entry.shape) != 2 or entry.dtype not in DTYPES:
            continue
        kind = module.rpartition(".")[2]
        if layer_of(module) is not None or is_embedding(module) or (kind in HEADS and not tied):
            found[module] = (entry.shape[0], entry.shape[1])
    return found


def decide(
    module: str, shape: tuple[int, int], scheme: Scheme, owner: Owner, rules: Sequence[tuple[str, Scheme | None]]
) -> tuple[Scheme | None, str]:
    """Return a module's scheme, or None and why it stays a float; raises ConfigError for an override that cannot be."""
    named = [found for pattern, found in rules if fnmatchcase(module, pattern)]
    kind = module.rpartition(".")[2]
    if named and named[-1] is None:
        return None, "asked for"
    if module.endswith(ROUTERS):
        return None, "a router"
    if owner.linears_only and is_embedding(module):
        if named:
            raise ConfigError(f'"{module}" is an embedding, and {owner.name} quantizes linear layers only', code="E204")
        return None, f"an embedding ({owner.name} quantizes linear layers)"
    if owner.linears_only and kind in HEADS and not named:
        return None, f"the head, as {owner.name} keeps it"
    chosen = named[-1] if named else scheme
    assert chosen is not None
    if find_quantizer(chosen).fits(shape):
        return chosen, ""
    if named:
        raise ConfigError(f'"{module}" of shape {shape} does not divide into groups of {chosen}', code="E204")
    return None, f"its shape {shape} does not divide"


def measure(plan: Plan, tell: Callable[[Layer], None]) -> Iterator[Layer]:
    """Yield every module with its bits and its error; nothing is written and nothing kept."""
    for module in plan.modules:
        weight, scheme = read_module(plan, module), plan.modules[module]
        packed = None if scheme is None else pack_module(plan, find_quantizer(scheme), module)
        layer = describe(plan, module, packed, error=None if packed is None else error_of(weight, packed))
        tell(layer)
        yield layer


def write(plan: Plan, staged: Path, tell: Callable[[Layer], None]) -> list[Layer]:
    """Write weights, config and tokenizer into an empty folder; return every module."""
    layers: list[Layer] = []
    weight_map: dict[str, str] = {}
    total = 0
    files = plan.folder.files
    for number, file in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        held: dict[str, Tensor] = {}
        for found, tensors in convert(plan, file):
            held.update(tensors)
            if found is not None:
                tell(found)
                layers.append(found)
        save_file(staged / name, held.items(), metadata=dict(plan.owner.metadata))
        weight_map.update(dict.fromkeys(held, name))
        total += sum(tensor.data.nbytes for tensor in held.values())
    if len(files) > 1:
        write_index(staged, weight_map, total=total)
    write_config(plan, staged)
    write_tokenizer(plan.folder, staged)
    return layers


def convert(plan: Plan, file: Path) -> Iterator[tuple[Layer | None, Mapping[str, Tensor]]]:
    """Yield what the tensors of a shard become, in stored order, with the module that they belong to."""
    ours = sorted(
        (name for name, entry in plan.folder.entries.items() if entry.file == file),
        key=lambda name: plan.folder.entries[name].start,
    )
    for name in ours:
        module = plan.stack_of.get(name, name.removesuffix(".weight"))
        scheme, is_first = plan.modules.get(module), name == plan.sources(module)[0]
        if scheme is None or not name.endswith(".weight"):
            known = module in plan.modules and is_first
            layer = describe(plan, module, None, error=None) if known else None
            yield layer, {name: read_weight(plan.folder, name)}
        elif is_first:  # all experts of a stack are written where the first one lies
            packed = pack_module(plan, find_quantizer(scheme), module)
            yield describe(plan, module, packed, error=None), tensors_of(plan, module, packed)


def write_config(plan: Plan, staged: Path) -> None:
    """Write config.json and what the owner wants beside it."""
    config = {key: value for key, value in plan.folder.config.items() if key not in QUANTIZED_KEYS}
    config = (
        with_old_keys(config) if plan.owner is MLX else config
    )  # mlx-lm takes its own rope base where it is missing
    first = next(iter(plan.modules))
    dtype = DTYPES[plan.folder.entries[plan.sources(first)[0]].dtype]
    files = {"config.json": {**config, **plan.owner.config(plan.scheme, plan.modules, dtype)}}
    for name, value in {**files, **plan.owner.files(plan.modules)}.items():
        write_json(staged / name, value)


def read_weight(folder: ModelFolder, name: str) -> Tensor:
    """Return a tensor mapped from its file; raises ModelError where it is not finite."""
    tensor = read_tensor(folder.entries[name])
    if not is_finite(tensor):
        raise ModelError(
            f'{folder.path}: tensor "{name}" holds NaN or infinity', code="E305", fix="download the model again"
        )
    return tensor


def read_module(plan: Plan, module: str) -> Tensor:
    """Return a module's weight, (O, I), or of a stack (E O, I)."""
    parts = [read_weight(plan.folder, name) for name in plan.sources(module)]
    return parts[0] if len(parts) == 1 else Tensor(parts[0].dtype, np.concatenate([part.data for part in parts]))


def pack_module(plan: Plan, quantizer: Quantizer, module: str) -> Packed:
    """Return a module packed, each expert of a stack for itself."""
    names = plan.sources(module)
    parts = [pack_weight(quantizer, read_weight(plan.folder, name), module=module) for name in names]
    return parts[0] if len(parts) == 1 else one_below_another(parts)


def tensors_of(plan: Plan, module: str, packed: Packed) -> Mapping[str, Tensor]:
    """Return what a folder stores of a packed module."""
    if module in plan.stacks:
        packed = replace(packed, arrays=mlx_folder.as_stack(packed, number=len(plan.stacks[module])))
    return plan.owner.tensors(module, packed)


def pack_weight(quantizer: Quantizer, weight: Tensor, *, module: str) -> Packed:
    """Return a packed matrix, block of rows by block of rows where the format allows it."""
    try:
        if not quantizer.by_rows:
            return quantizer.quantize(weight)
        return pack_blocks(quantizer, weight, blocks_of(weight.shape))
    except ModelError as error:
        raise ModelError(f'"{module}": {error.what}', code=error.code, expected=error.expected, fix=error.fix) from None


def pack_blocks(quantizer: Quantizer, weight: Tensor, blocks: Iterable[slice]) -> Packed:
    """Return a packed matrix made of blocks of rows, which a format by rows packs to the same bytes as the whole."""
    parts = [quantizer.quantize(Tensor(weight.dtype, weight.data[rows])) for rows in blocks]
    arrays = {
        key: Tensor(tensor.dtype, np.concatenate([part.arrays[key].data for part in parts]))
        for key, tensor in parts[0].arrays.items()
    }
    return Packed(quantizer.scheme, arrays, (weight.shape[0], weight.shape[1]), parts[0].dtype)


def blocks_of(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield blocks of rows, none of a single row: some formats store that differently.

    >>> list(blocks_of((9, 2**20)))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None), slice(6, 9, None)]
    """
    found = list(row_blocks(shape))
    if len(found) > 1 and found[-1].stop - found[-1].start == 1:
        found[-2:] = [slice(found[-2].start, found[-1].stop)]
    yield from found


def error_of(weight: Tensor, packed: Packed) -> float:
    """Return how far a packed matrix is from the given one, relative, by root of mean squares."""
    decoded = find_quantizer(packed.scheme).dequantize(packed)
    moved = size = 0.0
    for rows in row_blocks(weight.shape):
        given = to_float32(Tensor(weight.dtype, weight.data[rows]))
        moved += float(np.square(to_float32(Tensor(decoded.dtype, decoded.data[rows])) - given).sum(dtype=np.float64))
        size += float(np.square(given).sum(dtype=np.float64))
    return (moved / size) ** 0.5 if size else 0.0


def describe(plan: Plan, module: str, packed: Packed | None, *, error: float | None) -> Layer:
    """Return what a module became."""
    entries = [plan.folder.entries[name] for name in plan.sources(module)]
    rows, width = sum(entry.shape[0] for entry in entries), entries[0].shape[1]
    if packed is None:
        held = sum(entry.end - entry.start for entry in entries)
    else:
        held = sum(tensor.data.nbytes for tensor in plan.owner.tensors(module, packed).values())
    return Layer(
        module, (rows, width), str(packed.scheme) if packed else "none", 8 * held / max(rows * width, 1), error,
        plan.why.get(module, ""),
    )  # fmt: skip


def summarize(plan: Plan, layers: Sequence[Layer], *, output: Path | None) -> QuantizeResult:
    """Return the result of all modules."""
    entries = plan.folder.entries
    source = sum(entry.end - entry.start for entry in entries.values())
    packed = [layer for layer in layers if layer.scheme != "none"]
    values = sum(layer.shape[0] * layer.shape[1] for layer in packed)
    bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in packed)
    sources = [entries[name] for layer in packed for name in plan.sources(layer.module)]
    given = sum(entry.end - entry.start for entry in sources)
    return QuantizeResult(
        output=output,
        scheme=str(plan.scheme),
        loads_with=plan.owner.name,
        layers=tuple(layers),
        bits_per_weight=bits / max(values, 1),
        num_bytes=round(source - given + bits / 8),
        source_bytes=source,
    )

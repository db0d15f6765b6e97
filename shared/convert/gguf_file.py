"""GGUF files of whole models and of LoRA adapters, written through the `gguf` library tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from shared.adapters.folder import Adapter
from shared.convert.change import Change, find_changes
from shared.convert.gguf_arch import Facts, add_architecture, read_facts, rope_tensors, row_order
from shared.convert.gguf_blocks import BLOCK, BYTES, FLOAT_KINDS, encode, encode_affine, exact_kind
from shared.convert.gguf_tokenizer import add_vocabulary, read_vocabulary
from shared.convert.shards import row_blocks
from shared.convert.source import Weight, open_rows, packed_rows, plain_weights
from shared.data.tokenize import load_tokenizer
from shared.errors import CapabilityError, ModelError
from shared.folder import COMPUTED, ModelFolder
from shared.tensors import FLOATS, from_float32, to_float32
from shared.types import Packed, Tensor

KINDS = ("auto", *BYTES)
INSTALL = 'pip install "mlxlora[gguf]"'
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}  # llama.cpp's llama_ftype
EXACT = ("q4_0", "q4_1")


@dataclass(frozen=True)
class Stored:
    """One tensor of a GGUF file: name, shape (rows, width), kind, and its bytes in blocks of rows."""

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        """Return the size of its data."""
        return round(math.prod(self.shape) * BYTES[self.kind])


def check_installed() -> None:
    """Raise CapabilityError where the gguf library is not installed."""
    if find_spec("gguf") is None:
        raise CapabilityError("writing GGUF needs the gguf library", code="E401", fix=INSTALL)


def write_model(folder: ModelFolder, path: Path, *, kind: str) -> tuple[str, ...]:
    """Write a model as a GGUF file, and return notes on what differs.

    kind: of matrices; "auto" takes what the folder has: its float dtype, and 4-bit groups of 32 where they fit exactly.
    Raises CapabilityError for what llama.cpp has no like of.
    """
    facts = read_facts(folder)
    vocabulary = read_vocabulary(load_tokenizer(folder.path), size=int(facts.config["vocab_size"]))
    tensors = list(plan_tensors(folder, facts, kind=kind))
    writer = new_writer(facts)
    writer.add_type("model")
    writer.add_name(folder.path.resolve().name)
    add_architecture(writer, facts)
    main = max(BYTES, key=lambda one: sum(t.num_bytes for t in tensors if t.kind == one and len(t.shape) > 1))
    writer.add_file_type(FILE_TYPES[main])
    if main not in FLOAT_KINDS:
        writer.add_quantization_version(2)
    add_vocabulary(writer, vocabulary)
    write_file(writer, path, tensors)
    return (*facts.notes, *vocabulary.notes, *lost_grids(folder, tensors))


def new_writer(facts: Facts) -> Any:
    """Return the library's writer for an architecture."""
    from gguf import GGUFWriter

    return GGUFWriter(None, facts.family.arch)


def name_finder(facts: Facts) -> Callable[[str], str | None]:
    """Return a function from a tensor's Hugging Face name to llama.cpp's, None where it has none."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = next(one for one in MODEL_ARCH if one.name == facts.family.arch.upper())
    names = get_tensor_name_map(arch, int(facts.config["num_hidden_layers"]))
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def plan_tensors(folder: ModelFolder, facts: Facts, *, kind: str) -> Iterator[Stored]:
    """Yield every tensor of the file; raises ModelError or CapabilityError for one that has no place in it."""
    if kind in EXACT and not folder.schemes:
        raise CapabilityError(
            f"the model is not quantized, and {kind} is never rounded to",
            code="E405", expected="affine-4bit-g32 in the folder",
            fix="use --weights q8_0 or f16, or quantize it first: mlxlora quantize --scheme affine-4bit-g32",
        )  # fmt: skip
    find_name, weights = name_finder(facts), plain_weights(folder)
    tied = folder.is_tied
    for name, values in rope_tensors(facts).items():
        yield Stored(name, values.shape, "f32", lambda values=values: [values])
    for weight in weights.values():
        if COMPUTED.search(weight.name) or (tied and weight.name == "lm_head.weight"):
            continue
        name = find_name(weight.name)
        if name is None or weight.dtype not in FLOATS:
            raise ModelError(
                f'{folder.path}: llama.cpp\'s {facts.family.arch} has no tensor for "{weight.name}"',
                code="E309",
                fix="config.json and weights must belong together",
            )
        yield plan_tensor(folder, facts, weight, name, kind=choose_kind(folder, weight, kind))


def choose_kind(folder: ModelFolder, weight: Weight, kind: str) -> str:
    """Return how a weight is stored: vectors in float32, matrices as asked where their width allows it."""
    if len(weight.shape) < 2:
        return "f32"
    own = next(short for short, dtype in FLOAT_KINDS.items() if dtype == weight.dtype)
    if kind in ("auto", *EXACT):
        if weight.scheme is None:
            return own
        found = exact_kind(folder.packed(weight.module, shape=weight.shape))
        if kind == "auto":
            return found or own
        if found not in (kind, "q4_0"):
            raise CapabilityError(
                f'"{weight.module}" is stored as {weight.scheme}, which {kind} does not hold exactly', code="E405",
                expected="affine-4bit-g32 with scales that float16 holds", fix="use --weights q8_0 or f16",
            )  # fmt: skip
        return kind
    return "f16" if kind == "q8_0" and weight.shape[1] % BLOCK else kind


def plan_tensor(folder: ModelFolder, facts: Facts, weight: Weight, name: str, *, kind: str) -> Stored:
    """Return one tensor: its rows in llama.cpp's order, norms with their offset."""
    order = row_order(facts, weight.name)
    offset = facts.family.norm_offset if "norm" in weight.module.rpartition(".")[2] else 0.0

    def blocks() -> Iterator[np.ndarray]:
        if kind in EXACT:
            packed = folder.packed(weight.module, shape=weight.shape)
            for rows in row_blocks(weight.shape):
                yield encode_affine(pick(packed, rows, order), kind)
            return
        read = open_rows(folder, weight)
        for rows in row_blocks(weight.shape):
            values = read(rows if order is None else order[rows])
            if offset:
                values = from_float32(to_float32(values) + np.float32(offset), "F32")
            yield encode(values, kind)

    return Stored(name, weight.shape, kind, blocks)


def pick(packed: Packed, rows: slice, order: np.ndarray | None) -> Packed:
    """Return some rows of a packed weight in a new order."""
    return packed_rows(packed, rows if order is None else order[rows])


def lost_grids(folder: ModelFolder, tensors: Iterable[Stored]) -> tuple[str, ...]:
    """Return a note where quantized weights became larger ones."""
    if not folder.schemes or any(tensor.kind not in FLOAT_KINDS for tensor in tensors):
        return ()
    scheme = next(iter(folder.schemes.values()))
    return (f"{scheme} has no exact like in GGUF: the weights are written decoded",)


def write_file(writer: Any, path: Path, tensors: Iterable[Stored]) -> None:
    """Write a GGUF file: what the writer holds, then every tensor, a block of rows at a time."""
    from gguf import GGMLQuantizationType

    tensors = list(tensors)
    for tensor in tensors:
        raw = GGMLQuantizationType[tensor.kind.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            start = file.tell()
            for block in tensor.blocks():
                file.write(np.ascontiguousarray(block).data)
            if file.tell() - start != tensor.num_bytes:
                raise AssertionError(f"{tensor.name}: {file.tell() - start} bytes, {tensor.num_bytes} planned")
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def write_adapter(adapter: Adapter, folder: ModelFolder, path: Path) -> None:
    """Write a LoRA adapter for a base as a GGUF file; raises AdapterError or CapabilityError.

    llama.cpp multiplies by alpha / rank with one alpha for all, so rsLoRA's square root goes into alpha, and where
    modules have scales of their own the difference goes into their B.
    """
    spec = adapter.spec
    if spec.saved:
        raise CapabilityError(
            f'llama.cpp\'s adapters have no whole modules ("{spec.saved[0]}", modules_to_save)', code="E405",
            fix="fuse it (mlxlora fuse) and export the whole model",
        )  # fmt: skip
    if spec.kind == "dora":
        raise CapabilityError(
            "llama.cpp has no DoRA adapters", code="E405", fix="fuse it (mlxlora fuse) and export the whole model"
        )
    facts, found_changes = read_facts(folder), find_changes(adapter, plain_weights(folder), folder.config)
    changes = {name: change for name, change in found_changes.items() if isinstance(change, Change)}
    find_name = name_finder(facts)
    alphas = {name: change.scale * change.A.shape[0] for name, change in changes.items()}
    alpha = next((one for one in alphas.values() if one), 1.0)
    tensors: list[Stored] = []
    for name, change in changes.items():
        found = find_name(name)
        if found is None or found.startswith("token_embd"):
            raise CapabilityError(
                f'llama.cpp takes no adapter on "{name.removesuffix(".weight")}"',
                code="E405",
                fix="fuse it (mlxlora fuse) and export the whole model",
            )
        order = row_order(facts, name)
        B = change.B * np.float32(alphas[name] / alpha)
        for leaf, values in (("a", change.A), ("b", B if order is None else B[order])):
            data = encode(Tensor("F32", values), "f32")
            tensors.append(Stored(f"{found}.lora_{leaf}", values.shape, "f32", lambda data=data: [data]))
    writer = new_writer(facts)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    write_file(writer, path, tensors)

"""A model folder, checked before anything big is read: config, tensors, quantization, end tokens.

Only safetensors weights are read and no code of a folder is ever run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import CapabilityError, ModelError, did_you_mean
from shared.experts import check_mixture
from shared.families import EMBEDDINGS
from shared.hub import download, is_hub_id, looked_in, near_paths
from shared.quant.folders import find_places
from shared.quant.place import Place
from shared.quant.sound import find_fault
from shared.tensors import FLOATS, Entry, is_finite, read_header, read_tensor
from shared.types import Packed, Scheme, Tensor

# Sizes that a config states once for all layers; where it lists them by layer, they are the zoo's to check.
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
MAX_WIDTH = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npz")
FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")  # of a model on the hub
# Buffers that old checkpoints carry and every current implementation computes.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|rope\.freqs)$")


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face or mlx-lm folder: where each tensor lies and how the quantized ones are stored."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    places: Mapping[str, Place]  # module name -> what holds it, for modules stored quantized

    @property
    def family(self) -> str:
        """Return the model type of the config, e.g. "llama"."""
        return str(self.config["model_type"])

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Return the scheme of every module that is stored quantized."""
        return {module: place.stored.scheme for module, place in self.places.items()}

    @property
    def keeps_names(self) -> bool:
        """Return whether every tensor has the name here that it has in its file."""
        return self.entries.keys() == read_entries(self.path).keys()

    @property
    def packed_names(self) -> set[str]:
        """Return the tensors that hold quantized weights."""
        return {name for place in self.places.values() for name in (*place.names.values(), *place.extra)}

    @property
    def is_tied(self) -> bool:
        """Return whether head and embedding are one tensor: as the config says, else whether there is no head."""
        stated = self.config.get("tie_word_embeddings")
        has_head = "lm_head.weight" in self.entries or "lm_head" in self.places  # a packed one has other names
        return not has_head if stated is None else bool(stated)

    def value(self, name: str) -> Tensor:
        """Return a tensor as it is stored, mapped from the file; raises ModelError where it is not finite."""
        if name not in self.entries:
            raise ModelError(
                f'{self.path} stores "{name}" under another name',
                code="E309",
                fix="quantize the model with `mlx_lm convert -q`",
            )
        tensor = read_tensor(self.entries[name])
        if not is_finite(tensor):
            raise ModelError(
                f'{self.path}: tensor "{name}" holds NaN or infinity', code="E305", fix="download the model again"
            )
        return tensor

    def packed(self, module: str, *, shape: tuple[int, ...]) -> Packed:
        """Return a quantized module's arrays; raises ModelError unless they stand for a weight of `shape`."""
        place = self.places[module]
        arrays = {key: read_tensor(self.entries[name]) for key, name in place.names.items()} | dict(place.constants)
        arrays |= {key: Tensor("U8", arrays[key].data.view(np.uint8)) for key in place.raw}
        if tuple(shape) != place.stored.shape:
            raise ModelError(
                f'{self.path}: "{module}" has shape {place.stored.shape}', code="E308", expected=f"{tuple(shape)}"
            )
        arrays = arrays if place.form is None else dict(place.form.read(arrays))
        packed = Packed(place.stored.scheme, arrays, place.stored.shape, place.stored.dtype)
        if fault := find_fault(packed):
            raise ModelError(f'{self.path}: "{module}" {fault}', code="E308", fix="convert the model again")
        return packed

    @property
    def files(self) -> list[Path]:
        """Return the weight files, sorted."""
        return sorted({entry.file for entry in self.entries.values()})


def open_folder(path: Path) -> ModelFolder:
    """Return a checked model folder; reads headers only. Raises ModelError or CapabilityError."""
    if path.is_file():
        raise not_a_folder(path)
    if not path.is_dir():
        near = near_paths(path)
        raise ModelError(
            f"no model folder at {path}{looked_in(path)}",
            code="E300",
            expected="a folder with config.json and model.safetensors, or a hub id, which has the form org/name",
            fix=f'did you mean "{near[0]}"?' if near else None,
        )
    if not (path / "config.json").is_file():
        check_kind(path)
    config = read_json(path / "config.json")
    check_config(path, config)
    entries = with_table(config, read_entries(path))
    check_mixture(path, config, list(entries))
    check_layers(path, config, entries)
    folder = ModelFolder(path, config, entries, find_places(path, config, entries))
    check_floats(folder)
    return folder


def not_a_folder(path: Path) -> ModelError:
    """Return the error for a file that is given as a model."""
    quoted, folder = shlex.quote(str(path)), path.parent
    what, fix = "a file", f"use {folder}" if (folder / "config.json").is_file() else None
    if path.suffix in (".yaml", ".yml"):
        what, fix = "a config file, not a model", f"mlxlora train {quoted}"
    return ModelError(f"{path} is {what}", code="E300", expected="a folder with config.json, or a hub id", fix=fix)


def check_kind(path: Path) -> None:
    """Raise ModelError for a folder of another kind of ours: a run, or an adapter."""
    if (path / "model" / "config.json").is_file():
        raise ModelError(f"{path} is a run folder, not a model", code="E300", fix=f"use {path / 'model'}")
    for folder, what in ((path, "an adapter"), (path / "adapter", "a run folder")):
        if (folder / "adapter_config.json").is_file():
            fix = f"name the base, and the adapter with --adapter {folder}; or fuse them first"
            raise ModelError(f"{path} is {what}, not a model", code="E300", fix=fix)


def check_floats(folder: ModelFolder) -> None:
    """Raise ModelError for a weight or bias that is neither a float nor packed: its codes would count as numbers."""
    packed = folder.packed_names
    for name, entry in folder.entries.items():
        is_weight = name.endswith((".weight", ".bias")) and name not in packed and not COMPUTED.search(name)
        if is_weight and entry.dtype not in (*FLOATS, "F64"):
            raise ModelError(
                f'{folder.path}: tensor "{name}" is {entry.dtype}, and config.json does not say how it is packed',
                code="E308",
                expected=", ".join(FLOATS), fix="config.json and weights must belong together",
            )  # fmt: skip


def find_folder(model: str) -> Path:
    """Return the local folder of a path or a hub id; downloads safetensors, JSON and tokenizer files only."""
    if not is_hub_id(model):
        return Path(model).expanduser()
    return download(model, kind="model", patterns=FILES, error=ModelError, code="E300")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object a JSON file holds; raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing", code="E301", fix="is this a model folder? download it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", code="E301", fix="download the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}", code="E301", expected="an object")
    return value


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse configs without a usable model type, and models that bring their own code."""
    family = config.get("model_type")
    if not isinstance(family, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", family) or ".." in family:
        raise ModelError(
            f"{path / 'config.json'}: model_type is {family!r}", code="E302", expected='a name such as "llama"'
        )
    if config.get("model_file") or config.get("auto_map"):
        key = "model_file" if config.get("model_file") else "auto_map"
        raise CapabilityError(
            f"{path / 'config.json'}: {key} asks to run code from the folder, which is never done",
            code="E403",
            fix="use a model whose architecture mlx-lm and transformers know themselves",
        )
    for key in WIDTHS:
        value = config.get(key)
        if isinstance(value, str | bool | float) or (isinstance(value, int) and not 1 <= value <= MAX_WIDTH):
            raise ModelError(f"{path / 'config.json'}: {key} is {value!r}", code="E302", expected=f"1 to {MAX_WIDTH}")
    layers = config.get("num_hidden_layers")
    if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= 10_000):
        raise ModelError(f"{path / 'config.json'}: num_hidden_layers is {layers!r}", code="E302", expected="1 to 10000")


def check_layers(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Refuse a layer count that is not that of the tensors, before anything is built by it."""
    found = {int(match[1]) for name in entries if (match := re.search(r"\.layers\.(\d+)\.", name))}
    stated = config.get("num_hidden_layers")
    if found and stated is not None and len(found) != stated:
        raise ModelError(
            f"{path}: config.json says num_hidden_layers {stated}, the weights hold {len(found)} layers",
            code="E302",
            fix="config.json and weights must belong together; download the model again",
        )


def read_entries(path: Path) -> dict[str, Entry]:
    """Return every tensor of the folder's shards; raises ModelError where one is missing or stands twice."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(is_plain_name(name) for name in weight_map.values()):
            raise ModelError(
                f"{index}: weight_map must name .safetensors files of this folder", code="E301", fix="download it again"
            )
        files = [path / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise no_weights(path)
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing", code="E301", fix="download the shard again")
        for name, entry in read_header(file).items():
            if name in entries:
                raise ModelError(f'tensor "{name}" stands in {entries[name].file.name} and in {file.name}', code="E301")
            entries[name] = entry
    return entries


def with_table(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries of a folder, an embedding that is stored under its head's name alone under its own.

    >>> from shared.tensors import Entry
    >>> list(with_table({"tie_word_embeddings": True}, {"lm_head.weight": Entry("F32", (4, 2), 0, 32, Path())}))
    ['model.embed_tokens.weight']
    """
    tables = (name for name in entries if any(part in EMBEDDINGS for part in name.split(".")))
    if config.get("tie_word_embeddings") is False or next(tables, None) is not None:
        return dict(entries)
    return {renamed(name): entry for name, entry in entries.items()}


def renamed(name: str) -> str:
    """Return the embedding's name for a tensor of the head."""
    head, _, leaf = name.partition(".")
    return f"model.embed_tokens.{leaf}" if head == "lm_head" else name


def is_plain_name(name: Any) -> bool:
    """Return whether a shard's name stays in the folder."""
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def no_weights(path: Path) -> ModelError:
    """Return the error for a folder without safetensors, naming pickles where there are any."""
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        return ModelError(
            f"{path} holds its weights as pickle ({pickles[0]}), which can run code and is never loaded",
            code="E306",
            fix="save the model as safetensors (transformers: model.save_pretrained(folder))",
        )
    return ModelError(f"{path} has no model*.safetensors", code="E301", fix="is this a model folder? download it again")


def check_tensors(
    path: Path,
    *,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    tied: Iterable[str] = (),
) -> None:
    """Raise ModelError unless every expected tensor is there with its shape, and no other.

    tied: names that may be present or absent, because another tensor holds the same values.
    """
    optional = set(tied)
    missing = [name for name in expected if name not in found and name not in optional]
    extra = [name for name in found if name not in expected and name not in optional and not COMPUTED.search(name)]
    wrong = [name for name in expected if name in found and tuple(expected[name]) != tuple(found[name])]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f'{path}: tensor "{name}" has shape {tuple(found[name])}{others(wrong)}',
            expected=f"{tuple(expected[name])} by config.json", fix="config.json and weights must belong together",
        )  # fmt: skip
    if missing:
        raise ModelError(f'{path}: tensor "{missing[0]}" is missing{others(missing)}', fix="download the model again")
    if extra:
        raise ModelError(
            f'{path}: tensor "{extra[0]}" has no place in the model{others(extra)}',
            fix="config.json and weights must belong together",
        )  # fmt: skip


def nearest_family(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown architecture, without listing hundreds of names."""
    hint = did_you_mean(name, known)
    return hint if "mean" in hint else "use a model of a family such as llama, mistral or qwen2"


def others(names: list[str]) -> str:
    """Return " (and 3 more)" or nothing."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def end_tokens(folder: Path, *, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Return the ids that end a generation: of generation_config.json, config.json and the tokenizer."""
    found: set[int] = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            found.update(item for item in values if isinstance(item, int) and not isinstance(item, bool))
    return tuple(sorted(found))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

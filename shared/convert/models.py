"""Whole models in the files of other programs: Hugging Face, mlx-lm, llama.cpp, Ollama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.adapters.folder import check_copies, read_adapter
from shared.adapters.schema import CONFIG_FILE
from shared.convert import gguf_file
from shared.convert.adapters import find_base
from shared.convert.files import WORDS, write_config, write_tokenizer
from shared.convert.ollama import write_modelfile
from shared.convert.source import check_whole
from shared.convert.target import ADAPTER, check_target, new_folder
from shared.convert.weights import copy_changed, write_plain
from shared.durable import write_json
from shared.errors import CapabilityError, ConfigError, did_you_mean
from shared.families import with_old_keys
from shared.folder import ModelFolder, find_folder, open_folder, read_json

TARGETS = ("hf", "mlx", "gguf", "ollama")
GGUF_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
# Families whose tensors mlx-lm keeps under Hugging Face's names and in its shapes.
SAME_LAYOUT = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "starcoder2",
    "cohere", "olmo2",
})  # fmt: skip


@dataclass(frozen=True)
class ModelResult:
    """A converted model: where it is, its files, and what a user should know of it."""

    source: str
    to: str
    output: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


def convert_model(
    source: str, *, to: str, output: str, weights: str = "auto", dtype: str = "auto", force: bool = False
) -> ModelResult:
    """Write a model as a new folder for another program; the source is never touched.

    to: hf (plain weights), mlx (as stored), gguf (model.gguf for llama.cpp), ollama (with a Modelfile). dtype: of the
    float weights of hf and mlx. weights: of GGUF's matrices: auto, f32, f16, bf16, q8_0, q4_0, q4_1.
    """
    check_options(to, weights=weights, dtype=dtype)
    target, path = Path(output).expanduser(), find_folder(source)
    check_target(target, sources=[path], force=force)
    folder = open_folder(path)
    check_whole(folder)
    notes: tuple[str, ...] = ()
    with new_folder(target, sources=[path], force=force) as staged:
        if to == "hf":
            write_hf(folder, staged, dtype=dtype)
        elif to == "mlx":
            write_mlx(folder, staged, dtype=dtype)
        else:
            notes = gguf_file.write_model(folder, staged / GGUF_FILE, kind=weights)
            if to == "ollama":
                notes += write_modelfile(folder, staged, model=GGUF_FILE)
        files = tuple(sorted(file.name for file in staged.iterdir()))
    return ModelResult(str(source), to, target, files, notes)


def export_adapter(source: Path, *, output: str, base: str | None, force: bool = False) -> ModelResult:
    """Write a LoRA adapter as a GGUF file for llama.cpp's --lora; base: by default the one that the adapter names."""
    gguf_file.check_installed()
    target, adapter = Path(output).expanduser(), read_adapter(source)
    check_target(target, sources=[source], force=force, own=ADAPTER)
    found = find_base(read_json(source / CONFIG_FILE), base)
    if found is None:
        raise ConfigError(
            "an adapter's GGUF file says which model it is for, and the adapter names none that is here",
            fix="name it: --base MODEL",
        )
    check_copies(adapter, found)
    with new_folder(target, sources=[source, found.path], force=force, own=ADAPTER) as staged:
        gguf_file.write_adapter(adapter, found, staged / ADAPTER_FILE)
    return ModelResult(str(source), "gguf", target, (ADAPTER_FILE,), ())


def check_options(to: str, *, weights: str, dtype: str) -> None:
    """Raise ConfigError for options that nobody knows or that do not belong to the target."""
    for option, value, known in (
        ("--to", to, TARGETS), ("--weights", weights, gguf_file.KINDS), ("--dtype", dtype, ("auto", *WORDS)),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f'{option}: unknown value "{value}"', fix=did_you_mean(value, known))
    if to in ("gguf", "ollama"):
        gguf_file.check_installed()
        if dtype != "auto":
            raise ConfigError(f"--dtype {dtype} is for --to hf and mlx", fix="use --weights f32, f16 or bf16")
    elif weights != "auto":
        raise ConfigError(f"--weights {weights} is for --to gguf and ollama", fix="use --dtype, or mlxlora quantize")


def write_hf(folder: ModelFolder, staged: Path, *, dtype: str) -> None:
    """Write plain weights for transformers, quantized ones decoded."""
    if folder.schemes and folder.family not in SAME_LAYOUT:
        raise CapabilityError(
            f'quantized weights of the family "{folder.family}" may be laid out as no other library has them',
            code="E405",
            expected=f"one of {', '.join(sorted(SAME_LAYOUT))}", fix="convert the model that it was quantized from",
        )  # fmt: skip
    write_plain(folder, {}, staged, dtype=WORDS.get(dtype))


def write_mlx(folder: ModelFolder, staged: Path, *, dtype: str) -> None:
    """Write a folder that mlx-lm loads as it is: its own quantized weights as they are stored, others plain."""
    own = bool(folder.config.get("quantization"))
    if own and dtype != "auto":
        raise ConfigError(f"--dtype {dtype}: the model is quantized", fix="leave it out, or --to hf")
    if own:
        copy_changed(folder, staged, {})
        write_config(folder, staged, dtype=None, plain=False)
        write_tokenizer(folder, staged)
    else:
        write_plain(folder, {}, staged, dtype=WORDS.get(dtype))
    add_old_rope_keys(staged)


def add_old_rope_keys(staged: Path) -> None:
    """Let config.json say the rotary settings under the names that mlx-lm 0.32 reads."""
    config = read_json(staged / "config.json")
    known = with_old_keys(config)
    if known != config:
        write_json(staged / "config.json", known)


def is_adapter(source: Path, *, to: str, options: Mapping[str, str], base: str | None) -> bool:
    """Return whether a source is an adapter; raises ConfigError for a target or options that its kind does not have."""
    found = to == "peft" or (source / CONFIG_FILE).is_file() or (source / "adapter" / CONFIG_FILE).is_file()
    if to not in (*TARGETS, "peft"):
        raise ConfigError(f'--to: unknown value "{to}"', fix=did_you_mean(to, {*TARGETS, "peft"}))
    if to == "peft" and not (source / CONFIG_FILE).is_file() and (source / "config.json").is_file():
        raise ConfigError(f"--to peft is for adapters, {source} is a whole model", fix=f"--to {', '.join(TARGETS)}")
    if not found:
        if base is not None:
            raise ConfigError(f"--base {base} is for adapters, {source} is a whole model", fix="leave it out")
        return False
    if to not in ("peft", "mlx", "gguf"):
        raise ConfigError(
            f"--to {to}: {source} is an adapter, not a whole model", fix="fuse it first: mlxlora fuse MODEL --adapter"
        )
    chosen = next((name for name, value in options.items() if value != "auto"), None)
    if chosen is not None:
        raise ConfigError(f"--{chosen} {options[chosen]} is for whole models", fix="leave it out")
    return True

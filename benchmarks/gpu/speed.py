"""LoRA and QLoRA updates of an 8B-shaped Llama with random weights, ours and PEFT's: tokens/s, memory, time by part.

The weights are made on the device. Both sides see the same weights, rows, initial adapter and optimizer numbers; PEFT
runs as transformers' Trainer would run it (autocast to bfloat16, whole logits, fused torch.optim.AdamW, clipping, rows
padded to the longest); ours packs, as `train` does. Rows are full, or "mixed": of chat-like lengths.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gpu.machine import wait
from shared.adapters.spec import initial_adapter
from shared.data.batch import micro_batches
from shared.data.layout import choose_layout
from shared.families import HeadFacts
from shared.folder import ModelFolder
from shared.measuring.synthetic import make_rows
from shared.types import AdapterSpec, Batch, Example, Method, Packed, Recompute, Scheme, Tensor, Update
from torch_backend import attention
from torch_backend.loading import describe
from torch_backend.model import TorchModel, set_recompute
from torch_backend.objectives import Head
from torch_backend.quantized import QuantizedLinear
from torch_backend.state import from_torch
from torch_backend.trainer import TorchTrainer

SCHEME = Scheme("affine", 4, 64)
RANK, ALPHA = 16, 32.0
IGNORE = -100
WARM_UPDATES, BLOCKS, BLOCK_UPDATES = 2, 2, 3  # a block is timed as a whole: no update waits for the one before


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and how many tokens a micro-batch has: rows of `row_tokens`, the second half supervised."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    row_tokens: int
    micro_tokens: tuple[int, int]


LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128_256, 4096, (4096, 16384))
TINY = Shape(2, 128, 256, 4, 2, 512, 64, (64, 256))


def run_all(suite: Any, shape: Shape, *, device: str, peaks: Mapping[str, Any], compiled: bool) -> None:
    """Run every setting: ours and PEFT's, float and 4-bit, short and long micro-batches, recompute on and off."""
    makers: dict[str, Callable[[], Any]] = {
        "ours bf16": lambda: Ours(shape, device, scheme=None),
        "peft bf16": lambda: Peft(shape, device, nf4=False),
        f"ours {SCHEME}": lambda: Ours(shape, device, scheme=SCHEME),
        "peft nf4": lambda: Peft(shape, device, nf4=True),
    }
    for who, make in makers.items():
        if who == "peft nf4" and not find_spec("bitsandbytes"):
            suite.run(who, lambda: {"left_out": "bitsandbytes is not installed; QLoRA is compared with PEFT on bf16"})
            continue
        held: list[Any] = []
        suite.run(f"{who}: build", lambda make=make, held=held: build(make, held, device))
        for label, tokens, recompute in settings(shape, ours=who.startswith("ours")):
            if held:
                rows = rows_of(shape, tokens)
                measure = lambda h=held, rows=rows, r=recompute: h[0].measure(rows, r, peaks=peaks)  # noqa: E731
                suite.run(f"{who} {tokens} tokens, {label}", measure)
        if held:
            rows = mixed_rows(shape)
            measure = lambda h=held, rows=rows: h[0].measure(rows, True, peaks=peaks)  # noqa: E731
            suite.run(f"mixed rows: {who}, recompute", measure)
        if held and compiled and who.startswith("ours"):
            rows = rows_of(shape, tokens := shape.micro_tokens[0])
            measure = lambda h=held, rows=rows: h[0].measure(rows, True, peaks=peaks, compiled=True)  # noqa: E731
            suite.run(f"{who} {tokens} tokens, recompute, compiled", measure)
        held.clear()
        gc.collect()  # a model is a knot of references; the next one's memory is to be its own


def settings(shape: Shape, *, ours: bool) -> Iterator[tuple[str, int, Recompute]]:
    """Yield (label, tokens of a micro-batch, recompute), those that fit everywhere first."""
    for tokens in shape.micro_tokens:
        yield "recompute", tokens, True
        yield "no recompute", tokens, False
        if ours:
            yield "offload", tokens, "offload"


def build(make: Callable[[], Any], held: list[Any], device: str) -> dict[str, Any]:
    """Put a model into `held`; return what it takes."""
    start = time.perf_counter()
    held.append(make())
    wait(device)
    memory = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else None
    return {"build_s": round(time.perf_counter() - start, 2), "loaded_gib": memory}


def random_zoo(shape: Shape, device: str, *, kernel: str) -> Any:
    """Return transformers' Llama with random bfloat16 weights, made on the device, frozen; kernel: of its attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        max_position_embeddings=max(shape.row_tokens, 8192), tie_word_embeddings=False, rope_theta=500_000.0,
    )  # fmt: skip
    with torch.device(device):
        zoo = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=kernel)
    random = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in zoo.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=random)
    return zoo.eval().requires_grad_(False)


def quantize(weight: torch.Tensor) -> Packed:
    """Return the weight in SCHEME, by plain min-max on its device: the codec in NumPy takes minutes for 8B weights."""
    rows, width = weight.shape
    grouped = weight.float().view(rows, -1, SCHEME.group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / (2**SCHEME.bits - 1)).clamp_min(1e-7).to(weight.dtype)
    biases = low.to(weight.dtype)
    codes = ((grouped - biases.float()[..., None]) / scales.float()[..., None]).round_().clamp_(0, 2**SCHEME.bits - 1)
    pairs = codes.to(torch.uint8).view(rows, -1, 2)
    raw = (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()
    arrays = {
        "weight": Tensor("U32", raw.cpu().numpy().view(np.uint32)),
        "scales": from_torch(scales),
        "biases": from_torch(biases),
    }
    return Packed(SCHEME, arrays, (rows, width), arrays["scales"].dtype)


def rows_of(shape: Shape, tokens: int) -> list[Example]:
    """Return random rows, their second half supervised."""
    random, half = np.random.default_rng(tokens), np.arange(shape.row_tokens) >= shape.row_tokens // 2
    return [
        Example(random.integers(0, shape.vocabulary, shape.row_tokens, dtype=np.int32), half, f"row:{n}")
        for n in range(tokens // shape.row_tokens)
    ]


def mixed_rows(shape: Shape) -> list[Example]:
    """Return rows of chat-like lengths, about the most tokens of a micro-batch in all, half of them supervised."""
    most = max(shape.micro_tokens)
    rows = make_rows(
        64, median=shape.row_tokens // 8, sigma=0.8, longest=shape.row_tokens // 4, supervised=0.5,
        vocabulary=shape.vocabulary, seed=0,
    )  # fmt: skip
    ends = np.cumsum([len(row.tokens) for row in rows])
    return rows[: int(np.searchsorted(ends, most, side="right"))]


def flops(shape: Shape, rows: Sequence[Example], *, num_linear: int, num_adapter: int) -> float:
    """Return the mathematics of one update, whatever is done twice: linears, adapters, causal attention, head.

    Linears 4 per weight and token (forward, gradient of the input), adapters 6, attention 3 x 2 products over half of
    T x T, head 4 per weight and supervised position.
    """
    tokens = sum(len(row.tokens) for row in rows)
    attention = 6 * sum(len(row.tokens) ** 2 for row in rows) * shape.width * shape.layers
    head = 4 * shape.vocabulary * shape.width * sum(int(row.supervised.sum()) for row in rows)
    return tokens * (4 * num_linear + 6 * num_adapter) + attention + head


class Ours:
    """Our model and trainer over random weights."""

    def __init__(self, shape: Shape, device: str, *, scheme: Scheme | None) -> None:
        self.shape, self.device, zoo = shape, device, random_zoo(shape, device, kernel=attention.register())
        if scheme is not None:
            for name, module in list(zoo.get_decoder().named_modules()):
                if isinstance(module, nn.Linear):
                    parent, _, leaf = name.rpartition(".")
                    owner = zoo.get_decoder().get_submodule(parent)
                    setattr(owner, leaf, QuantizedLinear(quantize(module.weight), None).to(device))
                    del module
        folder = ModelFolder(Path("random"), zoo.config.to_dict(), {}, {})
        head = Head(zoo.get_output_embeddings(), HeadFacts())
        self.model = TorchModel(zoo, head, describe(zoo, folder, ()), device=torch.device(device))
        linears = self.model.info.linears
        spec = AdapterSpec("lora", rank=RANK, alpha=ALPHA, dropout=0.0, modules=tuple(linears))
        self.model.attach(spec)
        self.start = initial_adapter(spec, linears, seed=0)
        self.trainer: TorchTrainer | None = None

    def measure(
        self, rows: list[Example], recompute: Recompute, *, peaks: Mapping[str, Any], compiled: bool = False
    ) -> dict[str, Any]:
        """Return the figures of one setting, all rows in one micro-batch, from the initial adapter on."""
        layers = self.model.decoder.layers
        for layer in layers:
            vars(layer).pop("forward", None)
        set_recompute(layers, recompute, device=self.model.device)
        self.model.load_tensors("adapter", self.start)
        self.trainer, self.model.recompute = None, recompute
        tokens, packing = sum(len(row.tokens) for row in rows), "none" if compiled else "auto"
        micro = micro_batches(rows, choose_layout(self.model.info, packing=packing, micro_tokens=tokens))
        shapes = [batch.shape for batch in micro] if compiled else ()
        self.trainer = trainer = TorchTrainer(
            self.model, objective="sft", optimizer=Method("adamw"), shapes=shapes
        )  # fmt: skip
        found = timed(lambda n: trainer.step(micro, numbers(n)), lambda pending: pending.result().loss, self.device)
        sizes = {
            "num_linear": self.model.info.num_parameters,
            "num_adapter": sum(p.numel() for p in self.model.parameters.values()),
        }
        result = figures(self.shape, found, rows, sizes, peaks, self.device)
        packed = sum(batch.is_packed for batch in micro)
        times = parts(self.model, trainer, micro, self.device)
        return {**result, "micro_batches": len(micro), "packed": packed, "parts_ms": times}


class Peft:
    """transformers + PEFT over the same weights."""

    def __init__(self, shape: Shape, device: str, *, nf4: bool) -> None:
        from peft import LoraConfig, get_peft_model

        self.shape, self.device, zoo = shape, device, random_zoo(shape, device, kernel="sdpa")
        linears = {n: m for n, m in zoo.get_decoder().named_modules() if isinstance(m, nn.Linear)}
        self.num_linear = sum(module.weight.numel() for module in linears.values())
        shapes = {f"model.{name}": (m.out_features, m.in_features) for name, m in linears.items()}
        linears.clear()
        if nf4:
            to_nf4(zoo, device)
        names = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
        self.model = get_peft_model(zoo, config).train()
        spec = AdapterSpec("lora", rank=RANK, alpha=ALPHA, dropout=0.0, modules=tuple(shapes))
        self.start = initial_adapter(spec, shapes, seed=0)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors under our names."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                found[name.removeprefix("base_model.model.").removesuffix(".default.weight")] = parameter
        return found

    def measure(self, rows: list[Example], recompute: bool, *, peaks: Mapping[str, Any]) -> dict[str, Any]:
        """Return the figures of one setting, from the initial adapter on."""
        if recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        own, device = self.trained(), self.device
        for name, parameter in own.items():
            parameter.data.copy_(torch.from_numpy(self.start[name].data))
        optimizer = torch.optim.AdamW(own.values(), lr=1e-4, weight_decay=0.0, fused=device == "cuda")
        ids, labels = (part.to(device) for part in padded(rows))

        def step(_: int) -> torch.Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(own.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        found = timed(step, float, device)
        sizes = {"num_linear": self.num_linear, "num_adapter": sum(p.numel() for p in own.values())}
        return figures(self.shape, found, rows, sizes, peaks, device)


def padded(rows: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels, (B, T) each, padded on the right; causal attention needs no mask for that."""
    width = max(len(row.tokens) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full_like(ids, IGNORE)
    for row, own, label in zip(rows, ids, labels, strict=True):
        own[: len(row.tokens)] = row.tokens
        label[: len(row.tokens)][row.supervised] = row.tokens[row.supervised]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def to_nf4(zoo: Any, device: str) -> None:
    """Replace the decoder's linear layers by bitsandbytes' NF4 ones of the same weights."""
    import bitsandbytes as bnb

    for name, module in list(zoo.get_decoder().named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, device="meta", **options)
            layer.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            setattr(zoo.get_decoder().get_submodule(parent), leaf, layer.to(device))
    zoo.is_loaded_in_4bit = True  # PEFT looks here for how to wrap them


def numbers(step: int) -> Update:
    """Return the numbers of an update, those of PEFT's optimizer."""
    return Update(
        step=step, seed=0, lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0,
        bias_correction=True, momentum=0.9, nesterov=False,
    )  # fmt: skip


def timed(step: Callable[[int], Any], read: Callable[[Any], float], device: str) -> dict[str, Any]:
    """Return losses, seconds per update of each block, those of the warm-up, and the blocks' peak in bytes."""
    losses, seconds = [], []
    sizes = [1] * WARM_UPDATES + [BLOCK_UPDATES] * BLOCKS
    for block, size in enumerate(sizes):
        if device == "cuda" and block == WARM_UPDATES:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        pending = [step(sum(sizes[:block]) + n + 1) for n in range(size)]
        wait(device)
        seconds.append((time.perf_counter() - start) / size)
        losses += [read(one) for one in pending]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"losses": losses, "seconds": seconds[WARM_UPDATES:], "warm_seconds": seconds[:WARM_UPDATES], "peak": peak}


def figures(
    shape: Shape, found: Mapping[str, Any], rows: Sequence[Example], sizes: Mapping[str, int],
    peaks: Mapping[str, Any], device: str,
) -> dict[str, Any]:  # fmt: skip
    """Return rates (padding does not count), shares of the peaks and memory of the timed updates."""
    seconds = statistics.median(found["seconds"])
    rate = flops(shape, rows, **sizes) / seconds
    table_bytes = 2 * 2 * shape.vocabulary * shape.width  # embedding and head, bfloat16
    peak = found["peak"]
    result = {
        "tokens_per_s": sum(len(row.tokens) for row in rows) / seconds,
        "supervised_per_s": sum(int(row.supervised.sum()) for row in rows) / seconds,
        "tflop_per_s": rate / 1e12,
        "peak_gib": None if peak is None else peak / 2**30,
        "beyond_gib": None if peak is None else (peak - table_bytes) / 2**30,
        "update_s": [round(s, 5) for s in found["seconds"]],
        "warm_s": [round(s, 3) for s in found["warm_seconds"]],
        "losses": found["losses"],
    }
    for kind, name in (("measured", "share_of_measured_peak"), ("nominal", "share_of_nominal_peak")):
        result[name] = rate / peaks[kind] if peaks.get(kind) else None
    return result


class Clock:
    """Times on the device's own clock: events on CUDA, which make nothing wait, else the host's clock."""

    def __init__(self, device: str) -> None:
        self.device, self.spans = device, dict[str, list[tuple[Any, Any]]]()

    def now(self) -> Any:
        """Return a mark."""
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with every call's span noted under a label."""

        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = function(*args, **kwargs)
            self.spans.setdefault(label, []).append((start, self.now()))
            return result

        return timed_call

    def milliseconds(self) -> dict[str, float]:
        """Return the sum by label; waits for the device."""
        wait(self.device)

        def length(start: Any, end: Any) -> float:
            return start.elapsed_time(end) if self.device == "cuda" else 1000 * (end - start)

        return {label: sum(length(*span) for span in spans) for label, spans in self.spans.items()}


def parts(model: TorchModel, trainer: TorchTrainer, micro: Sequence[Batch], device: str) -> dict[str, float]:
    """Return milliseconds of one update by part; the backward pass (recompute included) is what is left of it."""
    clock, n = Clock(device), WARM_UPDATES + BLOCKS * BLOCK_UPDATES + 1
    places = ((model, "hidden", "forward"), (trainer, "objective", "head and loss"))
    places += ((trainer.optimizer, "step", "optimizer"),)
    for owner, name, label in places:
        setattr(owner, name, clock.around(label, getattr(owner, name)))
    try:
        clock.around("update", trainer.step)(micro, numbers(n)).result()
    finally:
        for owner in (model, trainer.optimizer):
            for name in ("hidden", "step"):
                vars(owner).pop(name, None)
    found = clock.milliseconds()
    found["backward"] = found["update"] - sum(ms for label, ms in found.items() if label != "update")
    return {label: round(ms, 3) for label, ms in found.items()}

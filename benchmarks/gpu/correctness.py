"""A tiny model on the device against the same on a CPU in float32, and against float64 NumPy where there is a formula.

Legend: N positions, D width, O output width, R rank, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from shared import reference, seeds
from shared.adapters.spec import initial_adapter
from shared.data.batch import make_batch, make_segment, micro_batches
from shared.data.layout import choose_layout
from shared.data.shapes import shaped_batches
from shared.families import HeadFacts
from shared.registry import find_backend, find_quantizer
from shared.tensors import from_float32, to_float32
from shared.types import (
    FIXED,
    AdapterSpec,
    Batch,
    Example,
    Method,
    Recompute,
    Sampling,
    Scheme,
    Shape,
    Shapes,
    Tensor,
    Update,
)
from torch_backend import objectives
from torch_backend.adapters import Dropout, LoRALinear
from torch_backend.decoders import find_decoder
from torch_backend.model import TorchModel
from torch_backend.offload import offload_layers
from torch_backend.optim import Optimizer
from torch_backend.state import from_torch, to_torch
from torch_backend.trainer import TorchTrainer

# The bounds of tests/tolerances.py, which holds the measurements behind them (CPU, float32).
FIRST_LOSS, GRADIENTS, CURVE, MICRO, LOSS_LAYER = 1e-6, 2e-5, 1e-4, 1e-6, 2e-6
BFLOAT16_LOSS, TWICE = 2**-8, 2.0  # one rounding step of bfloat16; two layouts round differently, not worse
SCHEMES = [
    *(Scheme("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *(Scheme(name, *FIXED[name]) for name in FIXED),
    *(Scheme(name, *FIXED[name], double=True) for name in ("nf4", "fp4")),
]
LENGTHS = [5, 19, 8, 31, 12, 12, 3, 27]
VOCABULARY = 512
Checks = Iterable[tuple[str, float, float]]  # what, gap, bound


@dataclass(frozen=True)
class Lab:
    """A tiny model on one device, ready to train."""

    model: TorchModel
    trainer: TorchTrainer


def run(check: Callable[[str], Checks], device: str) -> dict[str, Any]:
    """Return every gap of a check with its bound; NaN is outside of every bound."""
    found = {what: {"gap": float(gap), "bound": bound, "ok": bool(gap <= bound)} for what, gap, bound in check(device)}
    return {"checks": found}


@cache
def folder() -> Path:
    """Return the folder of a random 4-layer Llama in float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    path = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256, num_hidden_layers=4,
        vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    zoo, random = AutoModelForCausalLM.from_config(config, dtype=torch.float32), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in zoo.named_parameters():
            noise = torch.randn(parameter.shape, generator=random) * 0.1
            parameter.copy_(noise + 1 if "norm" in name else noise)
    zoo.save_pretrained(path)
    return path


def lab(
    device: str, *, dropout: float = 0.0, recompute: Recompute = False, scheme: Scheme | None = None,
    dtype: str = "float32", shapes: Shapes = (),
) -> Lab:  # fmt: skip
    """Return the model with LoRA of rank 8 on all linear layers, B different from zero."""
    place = "gpu" if device == "cuda" else "cpu"
    options: dict[str, Any] = {"dtype": dtype, "quantization": scheme, "device": place}
    model = find_backend("torch").load_model(folder(), recompute=recompute is True, **options)
    if recompute == "offload":
        offload_layers(list(model.decoder.layers), model.device)
    spec = AdapterSpec("lora", rank=8, alpha=16.0, dropout=dropout, modules=tuple(model.info.linears))
    model.attach(spec)
    tensors = initial_adapter(spec, model.info.linears, seed=0)
    for name, tensor in tensors.items():
        if name.endswith("lora_B"):
            values = seeds.uniform(seed=1, name=name, shape=tensor.shape, bound=0.02)
            tensors[name] = Tensor("F32", values)
    model.load_tensors("adapter", tensors)
    return Lab(model, TorchTrainer(model, objective="sft", optimizer=Method("adamw"), shapes=shapes))


def update(step: int, **changes: Any) -> Update:
    """Return AdamW's usual numbers."""
    usual: dict[str, Any] = {
        "seed": 0, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "bias_correction": True, "momentum": 0.9, "nesterov": False,
    }  # fmt: skip
    return Update(step=step, **{**usual, **changes})


@cache
def examples() -> list[Example]:
    """Return eight random rows, the first third of each a prompt."""
    random = np.random.default_rng(0)
    return [
        Example(random.integers(0, VOCABULARY, n, dtype=np.int32), np.arange(n) >= max(1, n // 3), f"row:{n}")
        for n in LENGTHS
    ]


def batches(one: Lab, *, packing: str = "auto") -> list[Batch]:
    """Return the rows in the micro-batches that a run would make of them: packed, unless it is told not to."""
    return micro_batches(examples(), choose_layout(one.model.info, packing=packing, micro_tokens=64))


def arrays(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    """Return float64 arrays by name."""
    return {name: to_float32(tensor).astype(np.float64) for name, tensor in tensors}


def gap(one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference, relative to the largest element of the second."""
    return max(np.abs(one[name] - two[name]).max() for name in two) / max(np.abs(v).max() for v in two.values())


def first_gradient(one: Lab, micro: list[Batch]) -> tuple[float, dict[str, np.ndarray]]:
    """Return loss and gradient of a first update; AdamW's first moment holds (1 - beta1) of it."""
    loss = one.trainer.step(micro, update(1, max_grad_norm=None)).result().loss
    return loss, {n[2:]: a / 0.1 for n, a in arrays(one.trainer.state()).items() if n.startswith("m.")}


def check_first_update(device: str) -> Checks:
    """Compare loss and gradients of the first update with a CPU's, float and quantized, recompute on and off."""
    for what, options in {
        "lora": {}, "dropout": {"dropout": 0.1}, "qlora": {"scheme": Scheme("affine", 4, 64)},
        "recompute": {"recompute": True, "dropout": 0.1}, "offload": {"recompute": "offload", "dropout": 0.1},
    }.items():  # fmt: skip
        labs = [lab(place, **options) for place in (device, "cpu")]
        ours, theirs = (first_gradient(one, batches(one)) for one in labs)
        yield f"{what}: first loss", abs(ours[0] / theirs[0] - 1), FIRST_LOSS
        yield f"{what}: gradients", gap(ours[1], theirs[1]), GRADIENTS


def check_packing(device: str) -> Checks:
    """Compare packed rows with padded ones; in bfloat16, which has a kernel of its own, both with a CPU's float32."""
    for what, options in {"lora": {}, "dropout": {"dropout": 0.1}, "offload": {"recompute": "offload"}}.items():
        one, other = lab(device, **options), lab(device, **options)
        packed, padded = batches(one), batches(other, packing="none")
        yield f"{what}: micro-batches in which no examples are packed", float(not any(b.is_packed for b in packed)), 0
        ours, theirs = first_gradient(one, packed), first_gradient(other, padded)
        yield f"{what}: packed against padded, first loss", abs(ours[0] / theirs[0] - 1), FIRST_LOSS
        yield f"{what}: packed against padded, gradients", gap(ours[1], theirs[1]), GRADIENTS
    exact_lab = lab("cpu")
    exact = first_gradient(exact_lab, batches(exact_lab))
    errors = []
    for packing in ("auto", "none"):
        one = lab(device, dtype="bfloat16")
        found = first_gradient(one, batches(one, packing=packing))
        errors.append((abs(found[0] / exact[0] - 1), gap(found[1], exact[1])))
    yield "bfloat16, packed: first loss", errors[0][0], BFLOAT16_LOSS
    yield "bfloat16: gap of the gradients to float32, packed over padded", errors[0][1] / errors[1][1], TWICE


def check_compiled(device: str) -> Checks:
    """Compare compiled micro-batches of one padded shape with plain packed ones."""
    rows = examples()
    shapes = [Shape(len(rows), max(LENGTHS), sum(LENGTHS))]
    segments = [make_segment(row, slot) for slot, row in enumerate(rows)]
    for what, options in {
        "lora": {},
        "recompute": {"recompute": True},
        "qlora": {"scheme": Scheme("affine", 4, 64)},
    }.items():
        plain, compiled = lab(device, **options), lab(device, **options, shapes=shapes)
        theirs, ours = first_gradient(plain, batches(plain)), first_gradient(compiled, shaped_batches(segments, shapes))
        yield f"{what}: compiled against plain, first loss", abs(ours[0] / theirs[0] - 1), FIRST_LOSS
        yield f"{what}: compiled against plain, gradients", gap(ours[1], theirs[1]), GRADIENTS


def check_waiting(device: str) -> Checks:
    """Count updates in which the host waits for the device: on CUDA, where torch tells of it."""
    one = lab(device, dropout=0.1, scheme=Scheme("affine", 4, 64))
    micro, waits = batches(one), 0
    one.trainer.step(micro, update(1)).result()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            one.trainer.step(micro, update(2))
        except RuntimeError:
            waits = 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield "updates that wait for the device", float(waits), 0


def check_formulas(device: str) -> Checks:
    """Compare head and loss, a LoRA layer and AdamW with float64 NumPy."""
    random = np.random.default_rng(1)
    h, w = (random.standard_normal(shape).astype(np.float32) for shape in ((60, 32), (4000, 32)))
    targets, weights = random.integers(0, 4000, 60).astype(np.int32), np.ones(60, dtype=np.float32)
    for facts in (HeadFacts(), HeadFacts(scale=0.5, softcap=10.0)):
        wanted = reference.sft_loss(h, w, None, targets, weights, facts)
        leaf = torch.tensor(h, device=device, requires_grad=True)
        head = objectives.Head(SimpleNamespace(weight=torch.tensor(w, device=device), bias=None), facts)
        loss = objectives.sft(leaf, head, torch.tensor(targets, device=device).long(), torch.tensor(weights).to(device))
        (slope,) = torch.autograd.grad(loss, [leaf])
        yield f"{facts}: loss", abs(float(loss.detach()) / wanted.loss - 1), LOSS_LAYER
        yield f"{facts}: gradient", gap({"h": slope.cpu().double().numpy()}, {"h": wanted.hidden}), GRADIENTS
    yield from check_lora(device, random)
    yield from check_adamw(device, random)


def check_lora(device: str, random: np.random.Generator) -> Checks:
    """Compare a LoRA layer's output and gradients with float64."""
    x, base, A, B, dy = (random.standard_normal(s) for s in ((20, 64), (48, 64), (8, 64), (48, 8), (20, 48)))
    spec = AdapterSpec("lora", rank=8, alpha=16.0, dropout=0.0, modules=())
    linear = nn.Linear(64, 48, bias=False, device=device).requires_grad_(False)
    linear.weight.copy_(torch.tensor(base))
    layer = LoRALinear(linear, name="layer", spec=spec, dropout=Dropout(p=0.0), shape=(48, 64))
    layer.lora_A.data.copy_(torch.tensor(A))
    layer.lora_B.data.copy_(torch.tensor(B))
    leaf = torch.tensor(x, dtype=torch.float32, device=device)[None].requires_grad_()
    y = layer(leaf)
    found = torch.autograd.grad(
        y, [leaf, layer.lora_A, layer.lora_B], torch.tensor(dy, dtype=torch.float32, device=device)[None]
    )
    wanted = reference.lora_backward(dy, x, base, A, B, 2.0)
    output = {"y": y.detach()[0].cpu().double().numpy()}
    yield "LoRA layer: output", gap(output, {"y": reference.lora(x, base, None, A, B, 2.0)}), GRADIENTS
    for name, value in zip(("x", "A", "B"), found, strict=True):
        own = value.cpu().double().numpy().reshape(getattr(wanted, name).shape)
        yield f"LoRA layer: d{name}", gap({name: own}, {name: getattr(wanted, name)}), GRADIENTS


def check_adamw(device: str, random: np.random.Generator) -> Checks:
    """Compare an AdamW update with float64."""
    start, slope = random.standard_normal((30, 20)), random.standard_normal((30, 20))
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float32, device=device))
    own = Optimizer({"p": parameter}, method=Method("adamw"))
    own.views(own.grad)[0].copy_(torch.tensor(slope))
    numbers = update(1, max_grad_norm=None)
    own.step(numbers, loss=torch.zeros((), device=device), weight=1.0)
    wanted = reference.adamw(start, slope, np.zeros_like(start), np.zeros_like(start), numbers)
    moved = np.abs(wanted.param - start).max()
    worst = np.abs(parameter.detach().cpu().double().numpy() - wanted.param).max()
    yield "AdamW: step, relative to how far it moves", worst / moved, 1e-3


def check_bits(device: str) -> Checks:
    """Compare dropout masks and decoded weights with NumPy, bit for bit: a gap is a number of wrong elements."""
    slots, times = np.arange(3), np.arange(40)
    for p in (0.05, 0.5):
        dropout = Dropout(p=p)
        dropout.begin(seed=5, step=2, places=(slots[:, None], times[None]), device=device)
        wanted = seeds.dropout_mask(seed=5, step=2, name="layer", slots=slots, shape=(40, 96), p=p)
        yield f"dropout mask, p = {p}", float((dropout.mask("layer", width=96).cpu().numpy() != wanted).sum()), 0
        dropout.begin(seed=5, step=2, places=(slots.repeat(40)[None], np.tile(times, 3)[None]), device=device)
        found = dropout.mask("layer", width=96).cpu().numpy().reshape(wanted.shape)
        yield f"dropout mask of packed rows, p = {p}", float((found != wanted).sum()), 0
    random = np.random.default_rng(2)
    values = random.standard_normal((33, 640)) * np.exp2(random.integers(-12, 4, (33, 1)))
    for dtype in ("F32", "BF16", "F16"):
        weight = from_float32(values.astype(np.float32), dtype)
        for scheme in (scheme for scheme in SCHEMES if find_quantizer(scheme).fits(weight.shape)):
            packed = find_quantizer(scheme).quantize(weight)
            there = {key: to_torch(tensor).to(device) for key, tensor in packed.arrays.items()}
            found = find_decoder(scheme)(there, packed.stored)
            words = [t.data.view(np.uint8) for t in (from_torch(found), find_quantizer(scheme).dequantize(packed))]
            yield f"decode {scheme} {dtype}", float((words[0] != words[1]).sum()), 0


def check_training(device: str) -> Checks:
    """Compare 20 updates with a CPU's, 1 x 8 rows with 8 x 1, and a resumed run with a whole one."""
    labs = [lab(place, dropout=0.1) for place in (device, "cpu")]
    curves = [[one.trainer.step(batches(one), update(n)).result().loss for n in range(1, 21)] for one in labs]
    yield "20 losses, the worst", max(abs(a / b - 1) for a, b in zip(*curves, strict=True)), CURVE
    rows = examples()
    parts = first_gradient(lab(device, dropout=0.1), [make_batch([row], [n]) for n, row in enumerate(rows)])
    for what, packed in (("1 x 8", False), ("8 in one row", True)):
        whole = first_gradient(lab(device, dropout=0.1), [make_batch(rows, range(8), packed=packed)])
        yield f"{what} against 8 x 1 rows: loss", abs(parts[0] / whole[0] - 1), MICRO
        change = sum(np.square(parts[1][name] - value).sum() for name, value in whole[1].items()) ** 0.5
        size = sum(np.square(value).sum() for value in whole[1].values()) ** 0.5
        yield f"{what} against 8 x 1 rows: norm of the gradient's change", change / size, MICRO
    first = lab(device, dropout=0.1)
    for n in (1, 2, 3):
        first.trainer.step(batches(first), update(n))
    second = lab(device, dropout=0.1)
    second.model.load_tensors("adapter", dict(first.model.tensors("adapter")))
    second.trainer.load_state(dict(first.trainer.state()))
    for one in (first, second):
        for n in (4, 5):
            one.trainer.step(batches(one), update(n)).result()
    wanted = dict(first.model.tensors("adapter"))
    wrong = sum((t.data != wanted[name].data).sum() for name, t in second.model.tensors("adapter"))
    yield "resumed against whole: wrong elements", float(wrong), 0


def check_generation(device: str) -> Checks:
    """Compare greedy tokens with a CPU's."""
    prompts = [row.tokens.tolist() for row in examples()[:3]]
    greedy = Sampling(24, 0.0, 0, ())
    ours, theirs = ([t.token for t in lab(place).model.generate(prompts, greedy)] for place in (device, "cpu"))
    yield "greedy tokens that differ", float(sum(a != b for a, b in zip(ours, theirs, strict=True))), 0


CHECKS: dict[str, Callable[[str], Checks]] = {
    "first update": check_first_update,
    "packed rows": check_packing,
    "compiled": check_compiled,
    "no waiting": check_waiting,
    "formulas in float64": check_formulas,
    "masks and decoded weights": check_bits,
    "training": check_training,
    "generation": check_generation,
}


def run_pytest(root: Path, device: str) -> dict[str, Any]:
    """Return how `pytest -m cuda` ends, or why it does not run here."""
    missing = [name for name in ("pytest", "pydantic", "hypothesis", "mlx", "mlx_lm", "peft") if not find_spec(name)]
    if missing or device != "cuda":
        return {"left_out": f"not installed: {', '.join(missing)}" if missing else "no CUDA device"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/conformance", "tests/unit/test_offload.py"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=70, check=False)
    return {"exit_code": found.returncode, "end": found.stdout[-2000:]}

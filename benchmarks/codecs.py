"""How fast every storage format is packed and decoded, next to the library that owns it; models converted; QLoRA steps.

    python benchmarks/codecs.py --output benchmarks/results/NAME.json
    python benchmarks/codecs.py --quick                       (tiny sizes: whether it runs, not how fast)
    python benchmarks/codecs.py --schemes nf4,mxfp4 --no-steps --no-conversions

Codecs: GB of float32 weights per second, the median of repetitions on one matrix; the owner takes its turn between two
of ours. `mlx` and `torch` decode with the backends' own code, on the device that they would use.
Conversions: whole models in shards, MB/s and memory beside its bound (conversions.py).
Steps: seconds of an update of LoRA over a random Llama (median, the first left out), each scheme and backend in a
process of its own, and the ratio to the same update over the float32 weights.
An owner that is not installed, or has no such operation of its own, is a dash.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import heading, write
from conversions import measure_conversions, print_conversions

from shared.measuring.measure import Effort, ask_updates
from shared.measuring.synthetic import Shape, write_llama
from shared.registry import BACKENDS, QUANTIZERS, find_backend, find_quantizer
from shared.schemes import named_schemes, parse_scheme
from shared.types import Scheme, Tensor

SMALL = Shape(layers=2, hidden=256, intermediate=512, heads=4, kv_heads=2, vocabulary=2048, tied=False)
MEDIUM = Shape(layers=4, hidden=512, intermediate=1408, heads=8, kv_heads=4, vocabulary=2048, tied=False)
LARGE = Shape(layers=8, hidden=1024, intermediate=2816, heads=16, kv_heads=8, vocabulary=4096, tied=False)
USUAL = (
    "affine-4bit-g64", "affine-3bit-g64", "affine-8bit-g64", "affine-4bit-g64+hqq", "mxfp4", "nvfp4", "mxfp8",
    "ternary-g64", "bitnet", "nf4", "nf4-dq", "fp4", "int8", "quanto-qint2", "quanto-qint4", "quanto-qint8",
    "quanto-qfloat8",
)  # fmt: skip
STEPS = ("affine-4bit-g64", "mxfp4", "ternary-g64", "nf4", "nf4-dq", "int8", "quanto-qint4", "quanto-qfloat8")
Run = Callable[[], Any]


def main() -> None:
    """Measure and print tables."""
    arguments = parse()
    shape = (256, 512) if arguments.quick else (4096, 4096)
    codecs = {name: measure_codec(name, shape, repeats=arguments.repeats) for name in arguments.schemes}
    print_codecs(codecs)
    conversions: dict[str, dict[str, Any]] = {}
    if arguments.conversions:
        with tempfile.TemporaryDirectory() as folder:
            size = SMALL if arguments.quick else LARGE
            conversions = measure_conversions(Path(folder), size, layers_per_shard=1 if arguments.quick else 2)
        print_conversions(conversions)
    steps = measure_steps(arguments) if arguments.steps else {}
    print_steps(steps)
    found = {"shape": shape, "codecs": codecs, "conversions": conversions, "steps": steps}
    result = {**heading(sorted(BACKENDS)), **found}
    write(arguments.output, result)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(USUAL))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--conversions", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    known = [name for name, scheme in named_schemes().items() if scheme.codec in QUANTIZERS]
    unknown = [name for name in arguments.schemes if name not in known]
    if unknown:
        parser.error(f"unknown scheme {unknown[0]}")
    return arguments


def measure_codec(name: str, shape: tuple[int, int], *, repeats: int) -> dict[str, float | None]:
    """Return GB/s of packing and of decoding: ours, the owner's, and the backends'."""
    scheme = parse_scheme(name)
    assert scheme is not None
    weight = Tensor("F32", np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * np.float32(0.02))
    quantizer = find_quantizer(scheme)
    packed = quantizer.quantize(weight)
    owner = owner_of(scheme, weight.data)
    runs: dict[str, Run | None] = {
        "encode": lambda: quantizer.quantize(weight),
        "encode_owner": owner[0] if owner and scheme.name != "ternary" else None,  # MLX chooses no trits
        "decode": lambda: quantizer.dequantize(packed), "decode_owner": owner and owner[1],
        **{f"decode_{backend}": decoder_of(backend, packed) for backend in sorted(BACKENDS)},
    }  # fmt: skip
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(repeats + 1):
        for key, run in runs.items():
            if run is not None:
                began = time.perf_counter()
                run()
                times[key].append(time.perf_counter() - began)
    size = weight.data.nbytes / 1e9
    return {key: size / statistics.median(found[1:]) if found else None for key, found in times.items()}


def decoder_of(backend: str, packed: Any) -> Run:
    """Return a function that decodes on a backend, arrays being there, and waits for the result."""
    if backend == "mlx":
        import mlx.core as mx

        from mlxlora.decoders import find_decoder
        from mlxlora.state import to_mlx

        held = {key: to_mlx(tensor) for key, tensor in packed.arrays.items()}
        return lambda: mx.eval(find_decoder(packed.scheme)(held, packed.stored))
    import torch

    from torch_backend.decoders import find_decoder as find
    from torch_backend.state import to_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    there = {key: to_torch(tensor).to(device) for key, tensor in packed.arrays.items()}

    def run() -> None:
        find(packed.scheme)(there, packed.stored)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def owner_of(scheme: Scheme, values: np.ndarray) -> tuple[Run, Run] | None:
    """Return the owner's way to pack and to decode, None where it is not installed or has none."""
    kind = scheme.name.split("-")[0]
    if scheme.solver == "hqq":
        return hqq(scheme, values)
    makers = {"bitnet": transformers, "quanto": quanto, "nf4": bitsandbytes, "fp4": bitsandbytes, "int8": row_int8}
    try:
        return makers.get(kind, mlx)(scheme, values)
    except ImportError:
        return None


def mlx(scheme: Scheme, values: np.ndarray) -> tuple[Run, Run]:
    """Return MLX's; for ternary those of affine with 2 bits."""
    import mlx.core as mx

    mode = "affine" if scheme.name == "ternary" else scheme.name
    options: dict[str, Any] = {"group_size": scheme.group_size, "bits": scheme.bits, "mode": mode}
    weight = mx.array(values)
    made = mx.quantize(weight, **options)
    mx.eval(made)
    return lambda: mx.eval(mx.quantize(weight, **options)), lambda: mx.eval(mx.dequantize(*made, **options))


def bitsandbytes(scheme: Scheme, values: np.ndarray) -> tuple[Run, Run]:
    """Return bitsandbytes' for 4 bits."""
    import torch
    from bitsandbytes import functional

    weight = torch.from_numpy(values)
    options: dict[str, Any] = {"quant_type": scheme.name, "compress_statistics": scheme.double, "blocksize": 64}
    codes, state = functional.quantize_4bit(weight, **options)
    return lambda: functional.quantize_4bit(weight, **options), lambda: functional.dequantize_4bit(codes, state)


def row_int8(scheme: Scheme, values: np.ndarray) -> tuple[Run, Run]:
    """Return bitsandbytes' for int8."""
    import torch
    from bitsandbytes import functional

    weight = torch.from_numpy(values).half()
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    return (
        lambda: functional.int8_vectorwise_quant(weight),
        lambda: functional.int8_vectorwise_dequant(codes, scales),
    )


def quanto(scheme: Scheme, values: np.ndarray) -> tuple[Run, Run]:
    """Return optimum-quanto's; its 4-bit code is compiled on first use, about a minute."""
    import torch
    from optimum.quanto import QLinear, qtypes, quantize_weight

    kind = qtypes[{"quanto-qfloat8": "qfloat8_e4m3fn"}.get(scheme.name, scheme.name.removeprefix("quanto-"))]
    weight = torch.from_numpy(values)
    layer = QLinear(*values.shape[::-1], bias=False, weights=kind)

    def pack() -> Any:
        if kind.bits == 8:
            return quantize_weight(weight, kind, 0, layer.optimizer(weight, kind, 0), optimized=False)
        scale, shift = layer.optimizer(weight, kind, 0, layer.weight_group_size)
        return quantize_weight(weight, kind, 0, scale, shift, layer.weight_group_size, optimized=False)

    packed = pack()
    return pack, packed.dequantize


def transformers(scheme: Scheme, values: np.ndarray) -> tuple[Run, Run]:
    """Return transformers' packing of trits, with the rule in front, not compiled."""
    import torch
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    weight = torch.from_numpy(values)

    def pack() -> Any:
        scale = weight.abs().mean().clamp_(min=1e-5)
        return pack_weights((weight / scale).round().clamp(-1, 1)), scale

    packed, scale = pack()

    def decode() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return unpack_weights(packed, torch.float32) * scale

    return pack, decode


def hqq(scheme: Scheme, values: np.ndarray) -> tuple[Run, Run] | None:
    """Return hqq's."""
    try:
        import torch
        from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    weight = torch.from_numpy(values)

    def pack() -> Any:
        return Quantizer.quantize(weight, nbits=scheme.bits, group_size=scheme.group_size, axis=1, device="cpu")

    codes, meta = pack()
    meta["compute_dtype"] = torch.float32
    return pack, lambda: Quantizer.dequantize(codes, meta)


def measure_steps(arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Return seconds of an update and its ratio to float32, by backend and scheme."""
    shape, count, longest = (SMALL, 4, 64) if arguments.quick else (MEDIUM, 8, 256)
    effort = Effort(least=2, most=3, time_s=1.0) if arguments.quick else Effort(least=4, most=8, time_s=5.0)
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), shape, positions=longest, seed=0)
        rows = {
            "count": count, "median": longest // 2, "sigma": 0.4, "longest": longest, "supervised": 0.4,
            "vocabulary": shape.vocabulary, "seed": 0,
        }  # fmt: skip
        for backend in sorted(BACKENDS):
            found[backend] = {}
            for name in ("none", *(name for name in arguments.schemes if name in STEPS or arguments.quick)):
                config = {"folder": folder, "rank": 8, "quantization": name, "dtype": "float32", "recompute": False}
                updates = ask_updates(backend, config=config, rows=rows, effort=effort)
                found[backend][name] = {"update_s": statistics.median(asdict(updates)["times_s"])}
            plain = found[backend]["none"]["update_s"]
            for entry in found[backend].values():
                entry["ratio"] = entry["update_s"] / plain
    return found


def print_codecs(codecs: dict[str, dict[str, float | None]]) -> None:
    """Print GB/s."""
    print("| scheme | encode | owner | decode | owner | mlx | torch |\n|---|---|---|---|---|---|---|")
    for name, found in codecs.items():
        columns = ("encode", "encode_owner", "decode", "decode_owner", "decode_mlx", "decode_torch")
        cells = (f"{value:.3f}" if (value := found[key]) is not None else "-" for key in columns)
        print(f"| {name} | {' | '.join(cells)} |")


def print_steps(steps: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print milliseconds of an update, and ratios."""
    for backend, found in steps.items():
        print(f"\n{backend}, {find_backend(backend).probe().reason}")
        print("| base | ms an update | to float32 |\n|---|---|---|")
        for name, entry in found.items():
            print(f"| {name} | {entry['update_s'] * 1e3:.1f} | {entry['ratio']:.2f} |")


if __name__ == "__main__":
    main()

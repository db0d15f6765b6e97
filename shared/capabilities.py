"""What each backend does with each storage format on this machine, found out by trying: a matrix of scheme x backend.

A cell says `trains` where the backend decodes a weight to the NumPy codec's bits and a layer over it hands its input
the right gradient, `decodes` where only the first holds, `refused` with the reason otherwise. Whole training runs per
scheme are tests: tests/parity/test_schemes.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import MlxloraError
from shared.protocols import Backend
from shared.quant.folders import find_places
from shared.registry import BACKENDS, find_quantizer, resolve
from shared.schemes import named_schemes
from shared.tensors import from_float32, to_float32
from shared.types import Scheme

SHAPE = (32, 256)  # every format fits a weight of this shape
BIG = (4096, 4096)  # of the weight whose bits per value are told
GRADIENT_GAP = 1e-5  # relative to the largest element; a float32 matmul of this size is within 1e-6
FOREIGN = ("gptq", "awq", "fp8", "compressed-tensors", "modelopt", "hqq", "torchao")  # of folders, read by nobody here
TITLES = {"mlx": "MLX", "torch": "PyTorch"}


@dataclass(frozen=True)
class Cell:
    """What one backend does with one scheme: trains, decodes or refused; why, where it does not train."""

    scheme: str
    backend: str
    verdict: str
    reason: str


def examine_schemes(backend: Backend) -> list[Cell]:
    """Return a cell per storage format that a config can name; solvers share the format they solve for."""
    plain = [scheme for scheme in named_schemes().values() if not scheme.solver]
    return [examine(backend, scheme) for scheme in plain]


def examine(backend: Backend, scheme: Scheme) -> Cell:
    """Return what a backend does with one scheme."""
    random = np.random.default_rng(0)
    weight = from_float32(random.standard_normal(SHAPE).astype(np.float32), "F32")
    grad = random.standard_normal((4, SHAPE[0])).astype(np.float32)
    quantizer = find_quantizer(scheme)
    packed, name = quantizer.quantize(weight), str(scheme)
    wanted = quantizer.dequantize(packed)
    try:
        found = backend.decode(packed)
        if (found.dtype, found.data.tobytes()) != (wanted.dtype, wanted.data.tobytes()):
            return Cell(name, backend.name, "refused", "its values are not those of the codec")
        given = backend.input_gradient(packed, grad)
    except (MlxloraError, RuntimeError, ImportError, NotImplementedError, ValueError) as error:
        return Cell(name, backend.name, "refused", str(error).splitlines()[0])
    exact = grad.astype(np.float64) @ to_float32(wanted)
    gap = np.abs(given - exact).max() / np.abs(exact).max()
    if not gap <= GRADIENT_GAP:
        return Cell(name, backend.name, "decodes", f"the gradient of its input is off by {gap:.0e}")
    return Cell(name, backend.name, "trains", "")


def summarize(cells: Sequence[Cell]) -> str:
    """Return one line: the formats that train, then the others with their reasons.

    >>> summarize([Cell("nf4", "mlx", "trains", ""), Cell("fp4", "mlx", "refused", "no decoder")])
    'trains nf4; refused: fp4 (no decoder)'
    """
    trained = [cell.scheme for cell in cells if cell.verdict == "trains"]
    parts = [f"trains {', '.join(shorten(trained))}"] if trained else []
    for verdict in ("decodes", "refused"):
        others = [f"{cell.scheme} ({cell.reason})" for cell in cells if cell.verdict == verdict]
        parts += [f"{verdict}: {', '.join(others)}"] if others else []
    return "; ".join(parts)


def shorten(names: Iterable[str]) -> list[str]:
    """Return names of schemes with those of one format as one.

    >>> shorten(["affine-4bit-g32", "affine-4bit-g64", "affine-8bit-g64", "nf4"])
    ['affine-{4,8}bit-g{32,64}', 'nf4']
    """
    return [pattern(schemes) for schemes in formats(named_schemes()[name] for name in names)]


def formats(schemes: Iterable[Scheme]) -> list[list[Scheme]]:
    """Return the schemes of each format together, in order."""
    found: dict[tuple[str, bool], list[Scheme]] = {}
    for scheme in schemes:
        found.setdefault((scheme.name, scheme.double), []).append(scheme)
    return list(found.values())


def pattern(schemes: Sequence[Scheme]) -> str:
    """Return one name for schemes of one format."""
    if len(schemes) == 1:
        return str(schemes[0])
    groups = braces(scheme.group_size for scheme in schemes)
    bits = f"-{braces(scheme.bits for scheme in schemes)}bit" if schemes[0].name == "affine" else ""
    return f"{schemes[0].name}{bits}-g{groups}"


def braces(numbers: Iterable[int]) -> str:
    """Return numbers as a shell writes alternatives.

    >>> braces([64, 32, 64])
    '{32,64}'
    """
    distinct = sorted(set(numbers))
    return str(distinct[0]) if len(distinct) == 1 else "{" + ",".join(map(str, distinct)) + "}"


def current_table() -> str:
    """Return the matrix of this machine's backends in Markdown, as the README has it."""
    backends = {name: resolve(BACKENDS, name, "backend")() for name in BACKENDS}
    return table({name: examine_schemes(backend) for name, backend in backends.items() if backend.probe().available})


def table(cells: Mapping[str, Sequence[Cell]]) -> str:
    """Return the matrix in Markdown, a row per format; cells: per backend, as `examine_schemes` returns them."""
    heads = " | ".join(TITLES[name] for name in cells)
    lines = [f"| quantization | bits per weight | {heads} |", "|---|---|" + "---|" * len(cells)]
    verdicts = {name: {cell.scheme: cell for cell in row} for name, row in cells.items()}
    for schemes in formats(scheme for scheme in named_schemes().values() if not scheme.solver):
        told = [tell([verdicts[name][str(scheme)] for scheme in schemes]) for name in cells]
        lines.append(f"| {pattern(schemes)} | {size_of(schemes)} | {' | '.join(told)} |")
    refused = " | ".join(["refused by name: use the unquantized model"] * len(cells))
    lines.append(f"| folders of {', '.join(unread_methods())} | | {refused} |")
    return "\n".join(lines) + "\n"


def tell(cells: Sequence[Cell]) -> str:
    """Return the verdict of a format's schemes: one word where they agree, each exception by name."""
    usual = max({cell.verdict for cell in cells}, key=lambda verdict: sum(cell.verdict == verdict for cell in cells))
    odd = [f"{cell.scheme} {cell.verdict}: {cell.reason}" for cell in cells if cell.verdict != usual]
    reason = f": {cells[0].reason}" if usual != "trains" else ""
    return "; ".join([usual + reason, *odd])


def size_of(schemes: Sequence[Scheme]) -> str:
    """Return how many bits a value of a big bfloat16 weight takes, from the least to the most."""
    values = BIG[0] * BIG[1]
    sizes = sorted(find_quantizer(scheme).num_bytes(BIG, scale_bytes=2) * 8 / values for scheme in schemes)
    ends = dict.fromkeys(f"{size:.2f}" for size in (sizes[0], sizes[-1]))
    return " to ".join(ends)


def unread_methods() -> list[str]:
    """Return the ways to quantize a folder that are refused by name, by trying."""
    unread = []
    for method in FOREIGN:
        try:
            find_places(Path(), {"quantization_config": {"quant_method": method}}, {})
        except MlxloraError:
            unread.append(method)
    return unread

"""`bench`: how fast real LoRA updates are on this machine, beside what the machine reaches at best.

The base is a random Llama that is written to a temporary folder and loaded as any other; nothing is downloaded.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from shared.ceilings import Ceilings, ceilings_path, read_ceilings, write_ceilings
from shared.errors import ConfigError, StorageError, did_you_mean
from shared.machine import Machine, this_machine
from shared.measuring.measure import Effort, Updates, ask_ceilings, ask_updates
from shared.measuring.synthetic import Shape, make_rows, step_flops, write_llama
from shared.registry import BACKENDS, check_installed, find_backend
from shared.schemes import parse_scheme
from shared.types import Recompute
from shared.watching.display import megabytes

__all__ = ["BenchResult", "BenchRow", "bench", "ceilings_path", "read_ceilings"]

RANK = 8
ADAPTERS = {"LoRA": "none", "QLoRA": "affine-4bit-g64"}
EFFORT = Effort(least=3, most=20, time_s=4.0)
SUPERVISED = 0.35  # share of the tokens of a chat that the model says
SIGMA = 0.6  # of the logarithm of the rows' lengths
SEED = 0
AUTO_S = 20.0  # what all updates together may take for a size to be chosen by itself
REACHED = 0.3  # share of the matmul ceiling that is assumed for that
QUANTIZING_S = 26e-9  # per weight, in NumPy
BUSY = 0.5  # load per processor from which a measurement is not to be trusted
COLUMNS = (
    "date", "chip", "memory", "system", "backend", "device", "model", "adapter", "dtype", "tokens/s", "peak memory",
    "of matmul", "of bandwidth", "matmul float32 / bfloat16, copy", "versions", "command",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A model and the rows of one update."""

    shape: Shape
    rows: int
    median: int  # tokens of a row
    longest: int


SIZES = {
    "tiny": Size(Shape(2, 64, 128, 4, 2, 512, tied=False), rows=4, median=24, longest=64),
    "small": Size(Shape(8, 512, 1536, 8, 4, 32000, tied=False), rows=4, median=160, longest=512),
    "medium": Size(Shape(16, 1024, 4096, 16, 4, 32000, tied=False), rows=8, median=200, longest=1024),
    "large": Size(Shape(16, 2048, 8192, 32, 8, 128256, tied=True), rows=16, median=256, longest=2048),  # Llama 3.2 1B
    "huge": Size(Shape(32, 4096, 14336, 32, 8, 128256, tied=False), rows=16, median=256, longest=2048),  # Llama 3.1 8B
}
AUTOMATIC = ("large", "medium", "small")  # the first that is quick enough and fits


@dataclass(frozen=True)
class BenchRow:
    """What one kind of fine-tuning reaches on one backend."""

    backend: str
    device: str
    size: str
    num_parameters: int
    adapter: str  # LoRA or QLoRA
    quantization: str
    dtype: str
    tokens_per_s: float  # real tokens, no padding; the median update
    supervised_tokens_per_s: float
    update_s: float
    first_update_s: float
    update_times_s: tuple[float, ...]
    tokens: int
    positions: int
    micro_batches: int
    recompute: Recompute
    peak_memory_bytes: int  # as the backend counts it; of the process where PyTorch computes on a CPU
    loaded_memory_bytes: int
    matmul_share: float  # operations that the update needs, of what matmuls of this dtype reach
    bandwidth_share: float  # weights read once per direction and micro-batch, of what a copy reaches


@dataclass(frozen=True)
class BenchResult:
    """The rows, the ceilings they are compared with, the machine, and how to repeat it."""

    machine: Machine
    rows: tuple[BenchRow, ...]
    ceilings: tuple[Ceilings, ...]
    command: str
    output: str | None

    @property
    def table(self) -> str:
        """Return the whole Markdown table."""
        return "\n".join([*header(), *self.lines]) + "\n"

    @property
    def lines(self) -> list[str]:
        """Return one Markdown row per kind of fine-tuning and backend."""
        found = {ceilings.backend: ceilings for ceilings in self.ceilings}
        return [markdown_row(self, row, found[row.backend]) for row in self.rows]


def bench(
    *, size: str = "auto", backend: str = "auto", dtype: str = "auto", output: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> BenchResult:  # fmt: skip
    """Measure this machine, remember its ceilings, and append the rows to `output` where one is given.

    Raises ConfigError for an unknown size, backend or dtype, CapabilityError where a backend is missing, StorageError
    where `output` cannot be written, OutOfMemory where the size does not fit.
    """
    names = check(size=size, backend=backend, dtype=dtype, output=output)
    warn_if_busy(note)
    ceilings = []
    for name in names:
        note(f"{name}: matmul and copy at their best")
        ceilings.append(ask_ceilings(name))
        remember(ceilings[-1], note)
    dtypes = {known.backend: choose_dtype(dtype, known) for known in ceilings}
    chosen = choose_size(ceilings, dtypes) if size == "auto" else size
    rows = []
    with tempfile.TemporaryDirectory(prefix="mlxlora-bench-") as folder:
        part = SIZES[chosen]
        note(f"{chosen}: writing a random Llama of {part.shape.num_parameters / 1e6:,.1f} million weights")
        write_llama(Path(folder), part.shape, positions=part.longest, seed=SEED)
        for known in ceilings:
            for adapter in ADAPTERS:
                note(f"{known.backend}: {adapter} updates in {dtypes[known.backend]}")
                rows.append(measure(folder, chosen, adapter, known, dtype=dtypes[known.backend]))
    command = f"mlxlora bench --backend {backend} --size {chosen}" + ("" if dtype == "auto" else f" --dtype {dtype}")
    result = BenchResult(this_machine(), tuple(rows), tuple(ceilings), command, str(output) if output else None)
    if output is not None:
        append(output, result)
    return result


def check(*, size: str, backend: str, dtype: str, output: Path | None) -> list[str]:
    """Return the names of the backends to measure, after a look at everything that can be known beforehand."""
    for option, value, known in (
        ("--size", size, ("auto", *SIZES)), ("--backend", backend, ("auto", "both", *BACKENDS)),
        ("--dtype", dtype, ("auto", "float32", "bfloat16")),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f'{option}: unknown value "{value}"', fix=did_you_mean(value, known))
    if output is not None:
        check_output(output)
    names = list(BACKENDS) if backend == "both" else [backend]
    for name in names:
        check_installed(name)
    return [find_backend(name).name for name in names]


def check_output(output: Path) -> None:
    """Raise StorageError where a file cannot be appended to."""
    target = output if output.exists() else output.absolute().parent
    if output.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise StorageError(
            f"--output: cannot write {output}", expected="a file in a folder that exists", fix="choose another --output"
        )


def warn_if_busy(note: Callable[[str], None]) -> None:
    """Say so where other programs keep the processor busy: every figure would be too low, and not by the same share."""
    load = psutil.getloadavg()[0]
    if load > BUSY * (psutil.cpu_count() or 1):
        note(f"the machine is busy (load {load:.1f}): close other programs, or take the figures with care")


def remember(ceilings: Ceilings, note: Callable[[str], None]) -> None:
    """Keep the ceilings for later predictions; a cache that cannot be written costs nobody a measurement."""
    try:
        write_ceilings(ceilings)
    except OSError as error:
        note(f"the ceilings are not kept: {ceilings_path()}: {error.strerror}")


def choose_dtype(asked: str, ceilings: Ceilings) -> str:
    """Return the dtype to train in: bfloat16 on a GPU, float32 on a CPU, unless one is asked for."""
    if asked != "auto":
        return asked
    return "bfloat16" if ceilings.device == "gpu" else "float32"


def choose_size(ceilings: Sequence[Ceilings], dtypes: dict[str, str]) -> str:
    """Return the largest size that every backend should do in well under a minute, and that fits in memory."""
    free = psutil.virtual_memory().available
    for name in AUTOMATIC:
        fits = 3 * 4 * SIZES[name].shape.num_parameters < free
        if fits and all(predict_s(name, known, dtypes[known.backend]) < AUTO_S for known in ceilings):
            return name
    return AUTOMATIC[-1]


def predict_s(size: str, ceilings: Ceilings, dtype: str) -> float:
    """Return about how long the updates of a size take, with the quantization of its base."""
    shape = SIZES[size].shape
    updates = len(ADAPTERS) * (1 + EFFORT.least)
    flops = step_flops(shape, make_rows(**rows_of(size)), rank=RANK)
    return updates * flops / (REACHED * ceilings.matmul_flop_per_s[dtype]) + QUANTIZING_S * shape.num_linear


def rows_of(size: str) -> dict[str, Any]:
    """Return the arguments of `make_rows` for a size."""
    part = SIZES[size]
    return {
        "count": part.rows, "median": part.median, "sigma": SIGMA, "longest": part.longest,
        "supervised": SUPERVISED, "vocabulary": part.shape.vocabulary, "seed": SEED,
    }  # fmt: skip


def measure(folder: str, size: str, adapter: str, ceilings: Ceilings, *, dtype: str) -> BenchRow:
    """Return one row: updates in a process of their own, against the ceilings of their backend."""
    shape, quantization = SIZES[size].shape, ADAPTERS[adapter]
    config = {"folder": folder, "rank": RANK, "quantization": quantization, "dtype": dtype, "recompute": "auto"}
    found = ask_updates(ceilings.backend, config=config, rows=rows_of(size), effort=EFFORT)
    update_s = statistics.median(found.times_s)
    flops = step_flops(shape, make_rows(**rows_of(size)), rank=RANK)
    moved = weight_traffic(shape, found, quantization=quantization, dtype=dtype)
    return BenchRow(
        backend=ceilings.backend, device=find_backend(ceilings.backend).probe().reason, size=size,
        num_parameters=shape.num_parameters, adapter=adapter, quantization=quantization, dtype=dtype,
        tokens_per_s=found.tokens / update_s, supervised_tokens_per_s=found.supervised_tokens / update_s,
        update_s=update_s, first_update_s=found.first_s, update_times_s=found.times_s, tokens=found.tokens,
        positions=found.positions, micro_batches=found.micro_batches, recompute=found.recompute,
        peak_memory_bytes=found.peak_memory_bytes, loaded_memory_bytes=found.loaded_memory_bytes,
        matmul_share=flops / update_s / ceilings.matmul_flop_per_s[dtype],
        bandwidth_share=moved / update_s / ceilings.copy_bytes_per_s,
    )  # fmt: skip


def weight_traffic(shape: Shape, updates: Updates, *, quantization: str, dtype: str) -> float:
    """Return the bytes of weights that an update has to read: once per direction and micro-batch, head included."""
    float_bytes = 2 if dtype == "bfloat16" else 4
    scheme = parse_scheme(quantization)
    # A code of `bits`, and per group a scale and a bias of 2 bytes each: the base is stored in bfloat16.
    linear_bytes = float_bytes if scheme is None else scheme.bits / 8 + 2 * 2 / scheme.group_size
    once = linear_bytes * shape.num_linear + float_bytes * shape.vocabulary * shape.hidden
    return 2.0 * updates.micro_batches * once


def header() -> list[str]:
    """Return the first two lines of the table."""
    return [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]


def markdown_row(result: BenchResult, row: BenchRow, ceilings: Ceilings) -> str:
    """Return the line of the table that a user can report."""
    machine, flops = result.machine, ceilings.matmul_flop_per_s
    rates = " / ".join(f"{flops[dtype] / 1e12:.3g}" for dtype in ("float32", "bfloat16"))
    cells = (
        ceilings.date, f"{machine.processor}, {machine.cores} cores", f"{machine.memory_bytes / 2**30:.0f} GiB",
        machine.system, row.backend, row.device, f"{row.size} ({amount(row.num_parameters)})", row.adapter, row.dtype,
        f"{row.tokens_per_s:,.0f}", f"{row.peak_memory_bytes / 2**30:.2f} GiB", f"{row.matmul_share:.0%}",
        f"{row.bandwidth_share:.0%}", f"{rates} TFLOP/s, {ceilings.copy_bytes_per_s / 1e9:.3g} GB/s",
        versions_text(ceilings), f"`{result.command}`",
    )  # fmt: skip
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def versions_text(ceilings: Ceilings) -> str:
    """Return what is installed, mlxlora first, and the number of threads where it was fixed."""
    try:
        own = version("mlxlora")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "checkout"
    every = {"mlxlora": own, **ceilings.versions}
    threads = f", OMP_NUM_THREADS={ceilings.threads}" if ceilings.threads else ""
    return ", ".join(f"{package} {number}" for package, number in every.items()) + threads


def amount(count: int) -> str:
    """Return a number of parameters as people say it.

    >>> amount(1_235_814_400), amount(57_973_248), amount(98_000)
    ('1.2B', '58M', '0.098M')
    """
    power = 9 if count >= 1e9 else 6
    digits = max(2, math.floor(math.log10(count / 10**power)) + 1)
    return f"{count / 10**power:.{digits}g}{'B' if power == 9 else 'M'}"


def report(result: BenchResult) -> str:
    """Return what the terminal shows: the figures, then the table to copy."""
    lines = [f"{result.machine.processor}, {result.machine.memory_bytes / 2**30:.0f} GiB, {result.machine.system}"]
    for row in result.rows:
        lines.append(
            f"  {row.backend:<5} {row.adapter:<5} {row.dtype:<8} {row.size}: {row.tokens_per_s:,.0f} tokens/s, "
            f"peak memory {megabytes(row.peak_memory_bytes)}, {row.matmul_share:.0%} of the matmul ceiling, "
            f"{row.bandwidth_share:.0%} of the bandwidth"
        )
    end = f"appended to {result.output}" if result.output else "to report it, copy the table"
    return "\n".join([*lines, "", result.table, end])


def append(output: Path, result: BenchResult) -> None:
    """Append the rows to a Markdown file, with the head of the table where it has not got one."""
    known = output.read_text(encoding="utf-8") if output.exists() else ""
    lines = result.lines if header()[0] in known else [*([""] if known else []), *header(), *result.lines]
    with output.open("a", encoding="utf-8") as file:
        file.write(("" if known.endswith("\n") or not known else "\n") + "\n".join(lines) + "\n")

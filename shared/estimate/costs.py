"""What a run costs in memory on each backend: the one table behind `shared.estimate.memory`.

The entries of `MEASURED` are printed by `python benchmarks/calibrate_memory.py`: least squares over the real peaks of
small models in which one size after the other is doubled. Rerun it when a backend's layers, loss or optimizer change,
and `benchmarks/memory.py` after it, which compares the estimate with runs that the factors were not made from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rows:
    """Rows that one position costs in one layer, by their width, in elements of the activations' dtype."""

    hidden: float = 0.0  # of the model's width: residual stream, norms
    attention: float = 0.0  # heads * head size: queries, attention's output
    keys: float = 0.0  # key heads * head size: keys and values
    mlp: float = 0.0  # gate, up, their product
    rank: float = 0.0  # rank * adapted modules: x A.T
    scores: float = 0.0  # heads * rows computed at once: attention probabilities, where attention is not one kernel


@dataclass(frozen=True)
class Costs:
    """The factors of one backend and dtype, for LoRA or for full fine-tuning."""

    kept: Rows  # by every layer until its backward pass
    working: Rows  # by the running layer on top of that
    kept_inputs: Rows  # as kept, with recompute
    recomputed: Rows  # as working, with recompute
    dropout_kept: float  # rows of an adapted module's input width that its mask costs, in every layer
    dropout_working: float  # the same in the running layer, on top
    tiles: float  # float32 tiles of logits during the loss over a frozen head
    tile_widths: float  # float32 rows of the model's width for each position of a tile
    logits: float  # float32 (chunk, V) arrays during the loss over a head that is trained or adapted
    queued: float  # more of them where there are several chunks: MLX begins one before the last is done
    head: float  # float32 (V, D) arrays during the loss where the head is trained
    decodes: float  # decoded copies of the largest quantized weight
    update: float  # float32 words per trained parameter: new gradients and the optimizer's temporaries
    load: float  # bytes per element of the largest tensor while it is read
    quantizing: float  # bytes per element of the largest weight while it is quantized at load
    framework: int  # bytes of the process before a model is loaded, where the device counts them
    update_most: float = math.inf  # words during the update beside the largest tensor, however many are trained


@dataclass(frozen=True)
class ExpertCosts:
    """Rows that a position costs in one layer for its experts, in elements of the activations' dtype."""

    kept_unit: float  # of their units' widths together, until the layer's backward pass
    kept_routed: float  # of the model's width, for each of them
    unit: float  # the same in the running layer, on top
    routed: float


NOTHING = Costs(
    kept=Rows(), working=Rows(), kept_inputs=Rows(), recomputed=Rows(), dropout_kept=0, dropout_working=0, tiles=0,
    tile_widths=0, logits=0, queued=0,
    head=0, decodes=0, update=0, load=0, quantizing=0, framework=0,
)  # fmt: skip
# Of full fine-tuning the rows with recompute are taken over from LoRA; its update factor on PyTorch was set by runs of
# benchmarks/memory.py.
MEASURED: dict[tuple[str, str, bool], Costs] = {
    ("torch-cpu", "float32", False): Costs(
        kept=Rows(hidden=3.88, attention=2.92, keys=1.95, mlp=2.14, rank=0.01),
        working=Rows(hidden=2.27, mlp=3.44, rank=0.11),
        kept_inputs=Rows(hidden=0.99, rank=0.02),
        recomputed=Rows(hidden=4.35, attention=3.07, keys=2.15, mlp=6.18, rank=0.3),
        dropout_kept=0.19, dropout_working=0, tiles=1.3, tile_widths=3.0, logits=2.24, queued=0, head=0, decodes=2.31,
        update=1.09, load=4.0, quantizing=11.42, framework=366 * 2**20,
    ),
    ("torch-cpu", "float32", True): Costs(
        kept=Rows(hidden=6.19, attention=1.91, keys=1.79, mlp=3.07),
        working=Rows(hidden=4.83, mlp=1.21),
        kept_inputs=Rows(hidden=0.87, attention=0.07),
        recomputed=Rows(hidden=6.8, attention=1.73, keys=2.33, mlp=6.13),
        dropout_kept=0, dropout_working=0, tiles=0, tile_widths=0, logits=3.1, queued=0, head=1, decodes=0,
        update=1.1, load=3.98, quantizing=0, framework=370 * 2**20,
    ),
    ("mlx-cpu", "float32", False): Costs(
        kept=Rows(hidden=3.78, attention=3.32, keys=1.84, mlp=1.98),
        working=Rows(attention=7.89, keys=3.33, mlp=5.0, scores=3.94),
        kept_inputs=Rows(hidden=1.41, keys=0.15, rank=0.88),
        recomputed=Rows(hidden=1.8, attention=10.35, keys=5.02, mlp=7.28, scores=5.18),
        dropout_kept=0, dropout_working=1.8, tiles=4.6, tile_widths=2.0, logits=5.04, queued=1.1, head=0, decodes=5.01,
        update=2.24, load=0, quantizing=0, framework=0,
    ),
}  # fmt: skip
# MLX's optimizer goes group by group, a group having 2^20 values; some twenty arrays of that size are in memory.
MLX_UPDATE = 22.0 * 2**20
# Measured in part (what layers keep without recompute), the rest is taken over from above; to be calibrated next.
ASSUMED: dict[tuple[str, str, bool], Costs] = {
    ("torch-cpu", "bfloat16", False): Costs(
        kept=Rows(hidden=6.58, attention=1.95, keys=1.87, mlp=3.49, rank=0.16, scores=0.02),
        working=Rows(hidden=8.21, mlp=2.26, rank=5.28),
        kept_inputs=Rows(hidden=0.87, attention=0.07, rank=0.03),
        recomputed=Rows(hidden=9.0, attention=1.95, keys=2.33, mlp=6.13, rank=5),
        dropout_kept=2.0, dropout_working=0, tiles=1.95, tile_widths=3.0, logits=2.55, queued=0, head=0, decodes=1.36,
        update=5.98, load=3.98, quantizing=11.31, framework=370 * 2**20,
    ),
    ("torch-cpu", "bfloat16", True): Costs(
        kept=Rows(hidden=8.7, attention=1.95, keys=1.87, mlp=3.49),
        working=Rows(hidden=8.9, mlp=2.7),
        kept_inputs=Rows(hidden=0.87, attention=0.07),
        recomputed=Rows(hidden=11, attention=1.95, keys=2.33, mlp=6.13),
        dropout_kept=0, dropout_working=0, tiles=0, tile_widths=0, logits=3.1, queued=0, head=1, decodes=0,
        update=5.98, load=3.98, quantizing=0, framework=370 * 2**20,
    ),
    ("mlx-cpu", "bfloat16", False): replace(MEASURED["mlx-cpu", "float32", False], tiles=7.5, logits=5.63, queued=1.1),
    ("mlx-cpu", "float32", True): Costs(
        kept=Rows(hidden=5.9, attention=3.1, keys=1.9, mlp=2.86),
        working=Rows(hidden=3.69, attention=7.89, keys=3.33, mlp=5.0, scores=3.94),
        kept_inputs=Rows(hidden=4.22, keys=1.93, mlp=3.9),
        recomputed=Rows(hidden=4.73, attention=10.35, keys=5.02, mlp=7.99, scores=5.18),
        dropout_kept=0, dropout_working=0, tiles=0, tile_widths=0, logits=2.6, queued=4.6, head=1, decodes=0,
        update=3.0, load=2.95, quantizing=0, framework=0, update_most=MLX_UPDATE,
    ),
}  # fmt: skip
# Fitted to four real peaks each, float32 on a CPU: 3 and 7 layers, 2 of 8 experts twice as wide as the model, 4 of 16
# as wide, frozen and adapted. MLX's come back to 0.5 %, PyTorch's to 1 % adapted and 8 % frozen (benchmarks/LOG.md).
EXPERTS = {
    ("mlx", False): ExpertCosts(kept_unit=3.5, kept_routed=2.5, unit=4, routed=0),
    ("mlx", True): ExpertCosts(kept_unit=5, kept_routed=2, unit=0, routed=9),
    ("torch", False): ExpertCosts(kept_unit=3, kept_routed=0, unit=16, routed=1),
    ("torch", True): ExpertCosts(kept_unit=2, kept_routed=0.5, unit=7, routed=11),
}
# A GPU runs the same layers as the CPU, so it borrows the factors until they are measured there. What differs: the
# process is not on the device (but a CUDA context is: about half a GiB), and quantizing happens in the host's memory.
BORROWED = {"mlx-gpu": ("mlx-cpu", 0), "torch-gpu": ("torch-cpu", 2**29)}


def expert_costs(place: str, *, adapted: bool) -> ExpertCosts:
    """Return the factors of experts on a backend with its device, frozen or adapted."""
    return EXPERTS[place.partition("-")[0], adapted]


def is_measured(place: str, dtype: str, *, full: bool) -> bool:
    """Return whether the factors of a backend on a device were measured there, in this dtype."""
    return (place, dtype, full) in MEASURED


def find_costs(place: str, dtype: str, *, full: bool) -> Costs:
    """Return the factors of a backend on a device, e.g. "mlx-cpu", for LoRA or for full fine-tuning.

    Those that were not measured are borrowed: from the CPU for a GPU, from float32 for bfloat16, from that for float16.
    """
    if place in BORROWED:
        source, framework = BORROWED[place]
        return replace(find_costs(source, dtype, full=full), framework=framework, quantizing=0)
    known = {**ASSUMED, **MEASURED}
    return (
        known.get((place, dtype.replace("float16", "bfloat16") if dtype == "float16" else dtype, full))
        or known[place, "float32", full]
    )

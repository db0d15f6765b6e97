"""The memory of a training run, from a model's headers alone: bytes by part, and the peak.

The peak is what stands all the time (weights, adapter, optimizer state, summed gradients, the framework itself) and the
largest of these moments:

  backward   every layer's kept rows, one layer's working set, a decoded weight
  loss       every layer's kept rows, a tile or a chunk of logits, a decoded head
  update     new gradients of all trained tensors and the optimizer's temporaries, no activations
  last layer (MLX with one micro-batch an update: no sums stand yet) all new gradients, one layer's working set

or, where it is higher, the loading of the weights. What a layer keeps is linear in its widths per position; the factors
stand in `shared.estimate.costs`, measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.adapters.own import is_own, own_values
from shared.adapters.spec import factor_shapes, is_embedding, layer_of, resolve, short_name
from shared.config import RunConfig
from shared.estimate.costs import Costs, Rows, expert_costs, find_costs, is_measured
from shared.estimate.shapes import WORD, Shape
from shared.families import GATED
from shared.optimizers import method_of, num_bytes
from shared.registry import find_quantizer
from shared.schemes import parse_scheme
from shared.types import AdapterSpec, Recompute, Scheme

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
IN_FLOAT32 = {"nf4", "fp4", "int8"}  # formats that are decoded in float32, and have no kernel in MLX
IN_BLOCKS = {"affine", "ternary"}  # formats that are decoded block by block on a CPU
DECODE_BLOCK = 2**21
HEAD_BLOCK = 2**20  # weights of a quantized head that are decoded at once on a CPU, for one tile
# Logits of one tile over a frozen head, as the backends' objectives cut them, and the most rows; of one chunk over a
# trained or adapted one, and the fewest rows.
TILE_ELEMENTS = {"torch-cpu": 2**21, "torch-gpu": 2**25, "mlx-cpu": 2**20, "mlx-gpu": 2**22}
TILE_ROWS = {"torch": 1024, "mlx": 512}
CHUNK_ELEMENTS = {"torch-cpu": 2**25, "torch-gpu": 2**26, "mlx-cpu": 3 * 2**20, "mlx-gpu": 3 * 2**20}
CHUNK_ROWS = 96
ZOO_UNIT = {"torch": 2.0, "mlx": 3.0}  # rows as wide as the MLP that the zoo keeps beyond gate and up
SCORE_ROWS = 128  # rows of attention scores that MLX computes at once on a CPU
STATE_BYTES = {"float32": 4.0, "8bit": 1.0 + 4 / 256}  # of one moment: a code, and a float32 scale per block of 256
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj")  # modules that read the same input, and so keep it once
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")


@dataclass(frozen=True)
class Work:
    """The largest micro-batch of a run, in positions."""

    positions: int  # P, padding included
    length: int  # T
    supervised: int
    count: int = 1  # micro-batches of an update


@dataclass(frozen=True)
class Part:
    """Bytes of one part, and whether they are in memory at the peak."""

    name: str
    bytes: int
    at_peak: bool


@dataclass(frozen=True)
class Estimate:
    """Bytes by part; the peak is the sum of the parts that are there at the peak."""

    place: str  # a backend with its device: mlx-cpu, mlx-gpu, torch-cpu, torch-gpu
    parts: tuple[Part, ...]
    moment: str  # when the peak is: loading, backward, loss or update
    recompute: Recompute
    work: Work
    measured: bool  # false: factors of activations are borrowed from another device or dtype

    @property
    def peak(self) -> int:
        """Return the bytes at the highest moment."""
        return sum(part.bytes for part in self.parts if part.at_peak)

    def __getitem__(self, name: str) -> int:
        """Return the bytes of a part."""
        return next(part.bytes for part in self.parts if part.name == name)


def estimate(config: RunConfig, shape: Shape, work: Work, *, place: str, recompute: Recompute) -> Estimate:
    """Return the bytes of a run's parts on a backend, `work` being its largest micro-batch."""
    spec = resolve(config.adapter, shape.info)
    costs = find_costs(place, config.train.dtype, full=spec.kind == "none")
    standing = standing_bytes(config, shape, spec, costs)
    moments = {
        **running_bytes(config, shape, spec, work, costs, place=place, recompute=recompute),
        "update": {"update": update_bytes(shape, spec, costs)},
    }
    if place.startswith("mlx") and work.count == 1:  # nothing is summed yet: gradients take the place of activations
        made, last = {"gradients": standing.pop("gradients")}, moments["backward"]
        moments["update"] |= made
        moments["last layer"] = {**made, "layer": last["layer"], "decode": last["decode"]}
    loading = loading_bytes(config, shape, costs)
    highest = max(moments, key=lambda name: sum(moments[name].values()))
    here = set(standing) | set(moments[highest])
    if standing["weights"] + standing["framework"] + loading > sum(standing.values()) + sum(moments[highest].values()):
        highest, here = "loading", {"weights", "framework", "loading"}
    all_parts = {**standing, "loading": loading}
    for parts in moments.values():
        all_parts.update(parts)
    found = tuple(Part(name, round(size), name in here) for name, size in all_parts.items())
    measured = is_measured(place, config.train.dtype, full=spec.kind == "none")
    return Estimate(place, found, highest, recompute, work, measured)


def standing_bytes(config: RunConfig, shape: Shape, spec: AdapterSpec, costs: Costs) -> dict[str, float]:
    """Return the bytes of what lives from the first update to the last."""
    trained, full = num_trained(shape, spec), spec.kind == "none"
    method = method_of(config)
    moments = num_bytes(trained_shapes(shape, spec), method) * STATE_BYTES[method.state] / WORD
    master = WORD * trained if full and config.train.dtype != "float32" else 0
    return {
        "weights": weight_bytes(shape, dtype=config.train.dtype, scheme=load_scheme(config, shape)),
        "adapter": 0 if full else WORD * trained,
        "optimizer": moments + master,
        "gradients": WORD * trained,
        "framework": costs.framework,
    }


def running_bytes(
    config: RunConfig, shape: Shape, spec: AdapterSpec, work: Work, costs: Costs, *, place: str, recompute: Recompute
) -> dict[str, dict[str, float]]:
    """Return the parts of the two moments that hold activations."""
    size, full = SIZES[config.train.dtype], spec.kind == "none"
    active = shape.info.num_layers - min((layer_of(name) or 0 for name in spec.modules), default=0)
    rank = sum(spec.rank_of(name) for name in spec.modules) / active
    kept_rows, working_rows = (costs.kept_inputs, costs.recomputed) if recompute else (costs.kept, costs.working)
    kept = layer_bytes(kept_rows, shape, work, rank=rank, size=size)
    working = layer_bytes(working_rows, shape, work, rank=rank, size=size)
    if shape.info.family not in GATED and not recompute:  # the zoo's own unit keeps more
        kept += work.positions * size * ZOO_UNIT[place.partition("-")[0]] * shape.mlp
    experts = expert_costs(place, adapted=any(name in shape.info.experts for name in spec.modules))
    rows = work.positions * size
    more = rows * (experts.kept_unit * shape.unit + experts.kept_routed * shape.chosen * shape.width)
    kept, working = (kept, working + more) if recompute else (kept + more, working)
    working += rows * (experts.unit * shape.unit + experts.routed * shape.chosen * shape.width)
    dropped = work.positions * size * dropped_inputs(shape, spec) / active if spec.dropout else 0
    unused = (
        work.positions * size * (kept_inputs(shape, None) / shape.info.num_layers - kept_inputs(shape, spec) / active)
    )
    masks, working = costs.dropout_kept * dropped, working + costs.dropout_working * dropped
    kept, working = (kept, working + masks) if recompute else (kept + masks - unused, working)
    activations = {"activations": kept * active, "layer": working}
    # With recompute only the layers' inputs are there at the loss; MLX keeps more once the backward pass has begun.
    inputs = active * work.positions * shape.width * size
    before = min(inputs, activations["activations"]) if recompute else activations["activations"]
    decode = decode_bytes(config, shape, costs, place=place)
    head = head_decode_bytes(config, shape, spec, work, place=place)
    loss = loss_bytes(shape, spec, work, costs, place=place, size=size)
    trained_head = WORD * costs.head * shape.info.vocab_size * shape.width if full else 0
    held = WORD * shape.info.vocab_size * shape.width if full else 0  # the head's gradient waits for the others
    return {
        "backward": {**activations, "decode": decode, "head gradient": held},
        "loss": {"held activations": before, "loss": loss, "head": head, "head work": trained_head},
    }


def update_bytes(shape: Shape, spec: AdapterSpec, costs: Costs) -> float:
    """Return the bytes of the optimizer's temporaries and of new values beside old ones."""
    sizes = [math.prod(sizes) for sizes in trained_shapes(shape, spec).values()]
    return WORD * min(costs.update * sum(sizes), costs.update_most + max(sizes))


def layer_bytes(rows: Rows, shape: Shape, work: Work, *, rank: float, size: int) -> float:
    """Return the bytes of a layer's rows for a micro-batch; linear in its positions at a fixed length."""
    widths = layer_widths(shape, work, rank=rank)
    return work.positions * size * sum(getattr(rows, name) * width for name, width in widths.items())


def layer_widths(shape: Shape, work: Work, *, rank: float) -> dict[str, float]:
    """Return how wide a row of each kind is, in elements; rank: of a layer's adapted modules together."""
    return {
        "hidden": shape.width,
        "attention": shape.attention,
        "keys": shape.keys,
        "mlp": shape.mlp,
        "rank": rank,
        "scores": shape.heads * min(work.length, SCORE_ROWS),
    }


def kept_inputs(shape: Shape, spec: AdapterSpec | None) -> int:
    """Return the summed widths of what trained modules (None: all) read and keep, the same thing once."""
    modules = spec.modules if spec and spec.modules else tuple(shape.info.linears)
    again = shape.info.family in GATED  # what the down projection reads is made again there, not kept
    inside = [
        name for name in modules if name in shape.info.linears and not (again and short_name(name) == "down_proj")
    ]
    return sum({input_of(name): shape.info.linears[name][1] for name in inside}.values())


def input_of(module: str) -> str:
    """Return a name for what a module reads.

    >>> input_of("model.layers.0.self_attn.k_proj") == input_of("model.layers.0.self_attn.v_proj")
    True
    """
    place, name = module.rpartition(".")[0], short_name(module)
    shared = next((group[0] for group in (ATTENTION_INPUTS, MLP_INPUTS) if name in group), name)
    return f"{place}.{shared}"


def dropped_inputs(shape: Shape, spec: AdapterSpec) -> int:
    """Return the summed input widths of the adapted modules: each has a dropout mask of its own."""
    return sum(shape.info.linears[name][1] for name in spec.modules if name in shape.info.linears)


def num_trained(shape: Shape, spec: AdapterSpec) -> int:
    """Return the number of trained parameters."""
    return sum(math.prod(sizes) for sizes in trained_shapes(shape, spec).values())


def trained_shapes(shape: Shape, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained tensors; what is no linear layer or embedding counts as a vector."""
    known, shapes = shape.info.adaptable, {}
    if spec.kind == "none":
        for name, (elements, _) in shape.floats.items():
            module = known.get(name.removesuffix(".weight"), ())
            shapes[name] = module if math.prod(module) == elements else (elements,)
        return shapes
    if is_own(spec.kind):
        shapes |= {name: value.shape for name, value in own_values(spec, known).items()}
    for name in () if is_own(spec.kind) else spec.modules:
        shapes |= factor_shapes(name, known[name], rank=spec.rank_of(name))
        shapes |= {f"{name}.magnitude": known[name][:1]} if spec.kind == "dora" else {}
    for name in spec.saved:
        shapes[f"{name}.weight"] = known.get(name) or (shape.info.norms[name],)
    return shapes


def load_scheme(config: RunConfig, shape: Shape) -> Scheme | None:
    """Return the scheme that the base is quantized to at load; a folder that is quantized keeps its own."""
    return None if shape.schemes else parse_scheme(config.quantization)


def weight_bytes(shape: Shape, *, dtype: str, scheme: Scheme | None) -> int:
    """Return the bytes of the base's weights in memory."""
    total = sum(shape.packed.values())
    quantizer = find_quantizer(scheme) if scheme else None
    matrices: dict[str, tuple[int, int]] = dict(shape.info.linears)
    if quantizer is not None and quantizer.by_rows and all(map(quantizer.fits, shape.experts.values())):
        matrices |= shape.experts
    for name, (elements, stored) in shape.floats.items():
        linear = matrices.get(name.rpartition(".")[0]) if name.endswith(".weight") else None
        if quantizer is not None and linear is not None and quantizer.fits(linear):
            total += quantizer.num_bytes(linear, scale_bytes=stored)
        else:
            total += elements * SIZES[dtype]
    return total


def loss_bytes(shape: Shape, spec: AdapterSpec, work: Work, costs: Costs, *, place: str, size: int) -> float:
    """Return the bytes of the logits at one time, and of supervised positions' hidden states and their gradient."""
    if trains_head(shape, spec):
        rows = min(max(CHUNK_ELEMENTS[place] // shape.info.vocab_size, CHUNK_ROWS), work.supervised)
        behind = min(rows, (work.supervised - rows) / 2)  # two more chunks may be under way, if there are as many
        logits = (costs.logits * rows + costs.queued * behind) * shape.info.vocab_size
    else:
        rows, columns = tile_sizes(shape, work, place=place)
        logits = rows * (costs.tiles * columns + costs.tile_widths * shape.width)
    return logits * WORD + 2 * work.supervised * shape.width * size


def tile_sizes(shape: Shape, work: Work, *, place: str) -> tuple[int, int]:
    """Return how many positions and how many tokens of the vocabulary a tile of logits holds."""
    rows = max(min(work.supervised, TILE_ROWS[place.partition("-")[0]]), 1)
    return rows, min(TILE_ELEMENTS[place] // rows, shape.info.vocab_size)


def trains_head(shape: Shape, spec: AdapterSpec) -> bool:
    """Return whether the loss goes by chunks: its head, or the embedding that it follows, is trained or adapted."""
    ends = (name for name in (*spec.modules, *spec.saved) if name in shape.info.ends)
    return spec.kind == "none" or any(spec.tied or not is_embedding(name) for name in ends)


def decode_bytes(config: RunConfig, shape: Shape, costs: Costs, *, place: str) -> float:
    """Return the bytes of the largest quantized weight, decoded in the scales' dtype and cast to the activations'."""
    at_load = load_scheme(config, shape)
    names = {scheme.name for scheme in ([at_load] if at_load else shape.schemes.values())}
    if not names:
        return 0
    word = WORD if names & IN_FLOAT32 else shape.scale_bytes
    same = word == SIZES[config.train.dtype]
    if place == "mlx-gpu" and same and not names & IN_FLOAT32:
        return 0  # quantized_matmul decodes in its kernel
    largest = max((out * wide for out, wide in shape.info.linears.values()), default=0)
    by_block = place.endswith("cpu") and names <= IN_BLOCKS  # two readers' weights whole, and one block's codes
    working, whole = (min(largest, DECODE_BLOCK), 2 * max(largest - DECODE_BLOCK, 0)) if by_block else (largest, 0)
    return (costs.decodes * working + whole) * (word + (0 if same else SIZES[config.train.dtype]))


def head_decode_bytes(config: RunConfig, shape: Shape, spec: AdapterSpec, work: Work, *, place: str) -> int:
    """Return the bytes of what is decoded of a quantized head at once: a tile's rows, or all of it."""
    scheme = shape.schemes.get("model.embed_tokens" if shape.tied else "lm_head")
    if scheme is None:
        return 0
    weights = shape.info.vocab_size * shape.width
    if find_quantizer(scheme).by_rows and weights > HEAD_BLOCK and not trains_head(shape, spec):
        weights = min(weights, shape.width * tile_sizes(shape, work, place=place)[1])
        weights = min(weights, HEAD_BLOCK) if place.endswith("cpu") else weights
    return weights * SIZES[config.train.dtype]


def loading_bytes(config: RunConfig, shape: Shape, costs: Costs) -> float:
    """Return the bytes that reading, and where asked quantizing, the largest tensor takes for a moment."""
    reading = costs.load * max((elements for elements, _ in shape.floats.values()), default=0)
    if load_scheme(config, shape) is None:
        return reading
    largest = max((out * wide for out, wide in shape.info.linears.values()), default=0)
    return max(reading, costs.quantizing * largest)

"""Where the time of an update goes: data, decoder, head and loss, backward, optimizer, and waiting for the device.

    python benchmarks/step.py --model M --data D --backend mlx --output benchmarks/results/NAME.json
    python benchmarks/step.py --config recipe.yaml --backend torch
    python benchmarks/step.py --prepared WORK --backend torch      (a folder with model/, data/ and work.json)
    python benchmarks/step.py --prepared WORK --backend mlx --pairs      (whole updates compiled and not, in turn)

Each part is the difference of two prefixes of the step that are run apart: decoder; decoder and loss; both and the
gradient; the whole update. Each prefix waits for the device at its end. So the parts need not add up to the update:
a whole update may fuse, compile or overlap what the prefixes do one after the other, and `optimizer` is what is left.
Waiting is measured inside the whole update: the time from `step`'s return to its numbers. It overlaps the other parts.
Prefixes drop nothing (adapter.dropout counts in the whole update only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import heading, write

from shared.adapters.spec import initial_adapter
from shared.config import RunConfig
from shared.config_file import build_config, load_config
from shared.data.batch import Plan, update_batches
from shared.data.layout import Layout, training_layout
from shared.jobs.prepare import prepare
from shared.jobs.train import load_trainable
from shared.loop import build_update
from shared.measuring.measure import load, recipe
from shared.measuring.synthetic import Shape, make_rows, write_llama
from shared.optimizers import method_of
from shared.protocols import Trainer
from shared.registry import find_backend
from shared.types import Batch, Example

QUICK = Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocabulary=512, tied=False)
PARTS = ("data", "forward", "head", "backward", "optimizer", "waiting")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Clock = Callable[[], float]
Prefix = Callable[[Batch], None]


@dataclass(frozen=True)
class Prefixes:
    """Three beginnings of an update, each from a micro-batch to a result that is there."""

    forward: Prefix  # hidden states at the supervised positions
    loss: Prefix  # the same, then head and loss with the gradient of the hidden states
    gradient: Prefix  # the same, then the gradient of everything trained


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    model: Any
    trainer: Trainer
    rows: Sequence[Example]
    config: RunConfig
    layout: Layout


@dataclass(frozen=True)
class Sample:
    """Seconds of one update's parts, and of the whole."""

    parts: dict[str, float]
    whole: float
    tokens: int


def main() -> None:
    """Measure and print a table."""
    arguments = parse()
    if arguments.pairs:
        compare(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        subject = quick_subject(arguments, Path(folder)) if arguments.quick else real_subject(arguments)
        prefixes = {"mlx": mlx_prefixes, "torch": torch_prefixes}[arguments.backend](subject.model)
        plan = Plan(len(subject.rows), subject.config.train.batch_size, subject.config.train.seed)
        total = arguments.warmup + arguments.updates
        clock = CLOCKS[arguments.clock]
        samples = [measure(subject, prefixes, plan, step, clock=clock) for step in range(1, total + 1)]
    found = summarize(samples[arguments.warmup :], subject)
    result = {**heading([arguments.backend]), "clock": arguments.clock, **found}
    print_table(result, arguments.backend)
    write(arguments.output, result)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("mlx", "torch"), required=True)
    parser.add_argument("--config", type=Path, help="recipe of a run")
    parser.add_argument("--prepared", type=Path, help="folder with model/, data/train.jsonl and work.json")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[], help="key.sub=value, as on the command line")
    parser.add_argument("--updates", type=int, default=7, help="measured ones")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: on a CPU that other programs use too"
    )
    parser.add_argument("--pairs", action="store_true", help="no parts: whole updates compiled and not, in turn")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny random model and random rows")
    arguments = parser.parse_args()
    given = [arguments.quick, arguments.config, arguments.prepared, arguments.model and arguments.data]
    if sum(bool(one) for one in given) != 1:
        parser.error("one of --config, --prepared, --model with --data, and --quick")
    return arguments


def compare(arguments: argparse.Namespace) -> None:
    """Measure and print whole updates of the same rows, compiled (`train.compile`) and not, in turn.

    Warm-up is until every shape of the measured updates has been compiled: the same updates once before.
    """
    clock, sides = CLOCKS[arguments.clock], {False: "plain", True: "compiled"}
    with tempfile.TemporaryDirectory() as folder:
        make = partial(quick_subject, folder=Path(folder)) if arguments.quick else real_subject
        subjects = {flag: make(arguments, compiled=flag) for flag in sides}
        rounds = [
            {sides[flag]: whole(one, step, clock) for flag, one in subjects.items()}
            for _ in range(2) for step in range(1, arguments.updates + 1)
        ]  # fmt: skip
        first, pairs = rounds[0], rounds[arguments.updates :]
    config, layout = subjects[True].config, subjects[True].layout
    found = {
        "model": Path(config.model).name, "dtype": config.train.dtype, "rows_per_update": config.train.batch_size,
        "updates": arguments.updates, "shapes": [vars(shape) for shape in layout.shapes],
        "padding_share": {sides[flag]: padding(one, arguments.updates) for flag, one in subjects.items()},
        "first_update_s": first,
        "update_s": {name: statistics.median(pair[name] for pair in pairs) for name in sides.values()},
        "compiled_over_plain": statistics.median(pair["compiled"] / pair["plain"] for pair in pairs),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    write(arguments.output, {**heading([arguments.backend]), "clock": arguments.clock, **found})


def micro_batches_of(subject: Subject, step: int) -> list[Batch]:
    """Return the micro-batches of an update."""
    train = subject.config.train
    return update_batches(subject.rows, Plan(len(subject.rows), train.batch_size, train.seed), step, subject.layout)


def whole(subject: Subject, step: int, clock: Clock) -> float:
    """Return the seconds of one update, its numbers awaited."""
    micro, update = micro_batches_of(subject, step), build_update(subject.config, step, lr=subject.config.optimizer.lr)
    began = clock()
    subject.trainer.step(micro, update).result()
    return clock() - began


def padding(subject: Subject, updates: int) -> float:
    """Return the share of fed positions that are padding."""
    micro = [batch for step in range(1, updates + 1) for batch in micro_batches_of(subject, step)]
    return 1 - sum(batch.num_tokens for batch in micro) / sum(batch.tokens_BT.size for batch in micro)


def with_compile(config: RunConfig, compiled: bool) -> RunConfig:
    """Return a config with `train.compile`."""
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": compiled})})


def quick_subject(arguments: argparse.Namespace, folder: Path, *, compiled: bool = False) -> Subject:
    """Return a tiny random model with random rows."""
    write_llama(folder, QUICK, positions=64, seed=0)
    rows = make_rows(
        4, median=24, sigma=0.5, longest=64, supervised=0.35, vocabulary=QUICK.vocabulary, seed=0
    )  # fmt: skip
    config = recipe(str(folder), rank=8, quantization="none", dtype="float32", recompute=False, rows=4)
    config = with_compile(config, compiled)
    found = load(find_backend(arguments.backend), config, rows)
    return Subject(found.model, found.trainer, rows, config, found.layout)


def real_subject(arguments: argparse.Namespace, *, compiled: bool | None = None) -> Subject:
    """Return the model and rows of a run, ready for its first update; compiled None: as the config says."""
    config = read_config(arguments)
    config = config if compiled is None else with_compile(config, compiled)
    backend, prepared = find_backend(arguments.backend), prepare(config)
    model, spec = load_trainable(prepared, backend)
    if spec.kind == "lora":
        model.load_tensors("adapter", initial_adapter(spec, model.info.linears, seed=config.train.seed))
    micro = None if config.train.micro_tokens == "auto" else config.train.micro_tokens
    layout = training_layout(config, model.info, prepared.train, micro_tokens=micro)
    trainer = backend.trainer(model, objective="sft", optimizer=method_of(config), shapes=layout.shapes)
    return Subject(model, trainer, prepared.train, config, layout)


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """Return the config that the command line means."""
    if arguments.config:
        return load_config(arguments.config, overrides=arguments.set)
    if arguments.prepared:
        from run_ours import recipe as prepared_recipe

        work = json.loads((arguments.prepared / "work.json").read_text())
        return build_config(prepared_recipe(work, arguments, output="unused"), overrides=arguments.set)
    return build_config({"model": arguments.model, "data": {"path": arguments.data}}, overrides=arguments.set)


def mlx_prefixes(model: Any) -> Prefixes:
    """Return the prefixes on MLX. It is lazy, so each ends with `mx.eval` of what it is to have made."""
    import mlx.core as mx
    from mlx.nn.utils import value_and_grad

    from mlxlora.objectives import OBJECTIVES

    def objective(h_ND: Any, batch: Batch) -> Any:
        targets_N, weights_N = mx.array(batch.targets_N), mx.array(batch.weights_N)
        return OBJECTIVES["sft"](h_ND, model.head, targets_N, weights_N, train_head=model.trains_head)

    def loss(batch: Batch) -> None:
        mx.eval(mx.value_and_grad(lambda h_ND: objective(h_ND, batch))(model.hidden(batch)))

    def gradient(batch: Batch) -> None:
        mx.eval(value_and_grad(model.zoo, lambda: objective(model.hidden(batch), batch))())

    return Prefixes(lambda batch: mx.eval(model.hidden(batch)), loss, gradient)


def torch_prefixes(model: Any) -> Prefixes:
    """Return the prefixes on PyTorch; each keeps what the backward pass needs, and waits for a GPU."""
    import torch

    from torch_backend.objectives import OBJECTIVES

    def whole(batch: Batch) -> Any:
        targets_N, weights_N = model.put(batch.targets_N, torch.long), model.put(batch.weights_N, torch.float32)
        return OBJECTIVES["sft"](model.hidden(batch), model.head, targets_N, weights_N)

    def gradient(batch: Batch) -> None:
        torch.autograd.grad(whole(batch), list(model.parameters.values()), allow_unused=True)

    def waiting(run: Callable[[Batch], Any]) -> Prefix:
        def prefix(batch: Batch) -> None:
            run(batch)
            if model.device.type == "cuda":
                torch.cuda.synchronize()

        return prefix

    return Prefixes(waiting(model.hidden), waiting(whole), waiting(gradient))


def measure(subject: Subject, prefixes: Prefixes, plan: Plan, step: int, *, clock: Clock) -> Sample:
    """Return the parts of one update: its prefixes in turn, then the update itself."""
    began = clock()
    micro = update_batches(subject.rows, plan, step, subject.layout)
    data = clock() - began
    forward, loss, gradient = (
        sum(seconds(prefix, batch, clock) for batch in micro)
        for prefix in (prefixes.forward, prefixes.loss, prefixes.gradient)
    )
    update = build_update(subject.config, step, lr=subject.config.optimizer.lr)
    began = clock()
    pending = subject.trainer.step(micro, update)
    returned = clock()
    pending.result()
    ended = clock()
    whole = ended - began
    parts = {
        "data": data, "forward": forward, "head": loss - forward, "backward": gradient - loss,
        "optimizer": whole - gradient, "waiting": ended - returned,
    }  # fmt: skip
    return Sample(parts, data + whole, sum(batch.num_tokens for batch in micro))


def seconds(prefix: Prefix, batch: Batch, clock: Clock) -> float:
    """Return how long a prefix takes on one micro-batch."""
    began = clock()
    prefix(batch)
    return clock() - began


def summarize(samples: Sequence[Sample], subject: Subject) -> dict[str, Any]:
    """Return medians over the updates: seconds, and shares of the whole."""
    config = subject.config
    parts = {
        part: {
            "median_s": statistics.median(sample.parts[part] for sample in samples),
            "share": statistics.median(sample.parts[part] / sample.whole for sample in samples),
        }
        for part in PARTS
    }
    return {
        "model": Path(config.model).name, "dtype": config.train.dtype, "quantization": config.quantization,
        "rows_per_update": config.train.batch_size, "updates": len(samples),
        "update_s": statistics.median(sample.whole for sample in samples),
        "tokens_per_s": statistics.median(sample.tokens / sample.whole for sample in samples),
        "parts": parts,
        "note": "parts are differences of prefixes measured apart: they need not add up; waiting overlaps them",
    }  # fmt: skip


def print_table(result: dict[str, Any], backend: str) -> None:
    """Print the parts."""
    speed = (
        f"{result['update_s'] * 1e3:.1f} ms ({result['clock']} time) an update, {result['tokens_per_s']:,.0f} tokens/s"
    )
    print(f"{backend}, {result['devices'][backend]}: {speed}\n")
    print("| part | ms | share of the update |\n|---|---|---|")
    for part, found in result["parts"].items():
        print(f"| {part} | {found['median_s'] * 1e3:.2f} | {found['share']:.1%} |")
    print(f"\n{result['note']}")


if __name__ == "__main__":
    main()

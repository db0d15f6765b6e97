"""The same recipe on our two backends and in plain PEFT: validation loss before and after, and the gaps.

    python benchmarks/against_peft.py --model MODEL --data DATA --updates 100 --output benchmarks/results/NAME.json

Rows, order, optimizer, schedule, clipping and masks are the same. PEFT runs from our initial adapter (then the numbers
must agree) and from its own random ones (what another start is worth).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from shared.adapters.names import PEFT_PREFIX
from shared.callbacks import Metrics
from shared.config import RunConfig
from shared.config_file import build_config
from shared.data.batch import make_batch
from shared.jobs.prepare import Prepared, prepare
from shared.jobs.train import train
from shared.schedules import build_schedule
from shared.seeds import uniform
from shared.types import Example

WITHIN = 0.02  # nats: what the contract asks for
CURVE = 1e-4


def main() -> None:
    """Run the three trainers and print a table."""
    arguments = parse()
    rows, curves = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("mlx", "torch"):
            config = make_config(arguments, backend=backend, output=f"{folder}/{backend}")
            result = train(config)
            metrics = Metrics(result.output / "metrics.jsonl").read()
            evals = [row["eval_loss"] for row in metrics if "eval_loss" in row]
            curves[backend] = [row["loss"] for row in metrics if "loss" in row]
            rows[f"mlxlora on {backend}"] = {"before": evals[0], "after": evals[-1], "time_s": result.time_s}
        config = make_config(arguments, backend="torch", output=f"{folder}/peft")
        rows["PEFT, same start"] = run_peft(config, own_start=None)
        for seed in range(arguments.own_starts):
            rows[f"PEFT, own start {seed}"] = run_peft(config, own_start=seed)
    gap = max(abs(a - b) / b for a, b in zip(curves["mlx"], curves["torch"], strict=True))
    report(arguments, rows, gap)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--quantization", default="none", help="ours only; PEFT always trains on the float base")
    parser.add_argument("--own-starts", type=int, default=3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def make_config(arguments: argparse.Namespace, *, backend: str, output: str) -> RunConfig:
    """Return the recipe: LoRA rank 8 on all linear layers, float32."""
    return build_config(
        {
            "model": arguments.model,
            "quantization": arguments.quantization,
            "data": {"path": arguments.data, "max_length": 512},
            "adapter": {"rank": 8, "alpha": 16},
            "optimizer": {"lr": arguments.lr},
            "train": {"batch_size": 16, "updates": arguments.updates, "dtype": "float32"},
            "evaluation": {"every": arguments.updates},
            "checkpoint": {"every": None},
            "log": {"every": 1},
            "backend": backend,
            "output": output,
        }
    )


def run_peft(config: RunConfig, *, own_start: int | None) -> dict[str, float]:
    """Return the validation loss before and after training with PEFT and torch.optim.AdamW.

    own_start: the seed of PEFT's own initial adapter; None takes ours.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(own_start or 0)
    prepared = prepare(config)
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    if own_start is None:
        take_our_start(model, seed=config.train.seed)
    before = peft_loss(model, prepared.valid)
    began = time.perf_counter()
    peft_train(model, prepared, config)
    return {"before": before, "after": peft_loss(model, prepared.valid), "time_s": time.perf_counter() - began}


def take_our_start(model, *, seed: int) -> None:
    """Overwrite PEFT's initial adapter with ours: the same distribution, our seed."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".lora_A.default.weight"):
                module = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.default.weight")
                shape = (parameter.shape[0], parameter.shape[1])
                values = uniform(seed=seed, name=module, shape=shape, bound=shape[1] ** -0.5)
                parameter.copy_(torch.from_numpy(values))


def peft_train(model, prepared: Prepared, config: RunConfig) -> None:
    """Do the updates of a config on a PEFT model."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1.0, betas=config.optimizer.betas, eps=config.optimizer.eps, weight_decay=0
    )
    schedule = build_schedule(config.schedule, lr=config.optimizer.lr, updates=config.train.updates or 1)
    plan = prepared.plan
    for step in range(1, (config.train.updates or 1) + 1):
        examples = [prepared.train[row] for row in plan.rows(step)]
        optimizer.zero_grad()
        weight = sum(int(example.supervised.sum()) for example in examples)
        (peft_sum(model, examples) / weight).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.max_grad_norm or float("inf"))
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()


def peft_sum(model, examples: list[Example]):
    """Return the summed loss of rows in one padded batch, through PEFT's own forward pass."""
    import torch

    batch = make_batch(examples, range(len(examples)))
    lengths = torch.from_numpy(batch.lengths_S).long()
    mask = torch.arange(batch.tokens_BT.shape[1])[None] < lengths[:, None]
    logits = model(input_ids=torch.from_numpy(batch.tokens_BT).long(), attention_mask=mask.long()).logits
    picked = logits.flatten(0, 1)[torch.from_numpy(batch.positions_N).long()]
    return torch.nn.functional.cross_entropy(picked, torch.from_numpy(batch.targets_N).long(), reduction="sum")


def peft_loss(model, examples: list[Example]) -> float:
    """Return nats per supervised token."""
    import torch

    model.eval()
    with torch.no_grad():
        total = sum(float(peft_sum(model, examples[n : n + 8])) for n in range(0, len(examples), 8))
    model.train()
    return total / sum(int(example.supervised.sum()) for example in examples)


def report(arguments: argparse.Namespace, rows: dict[str, dict[str, float]], gap: float) -> None:
    """Print the table and write the JSON."""
    print(f"| trainer | validation loss before | after {arguments.updates} updates | seconds |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['before']:.4f} | {row['after']:.4f} | {row['time_s']:.1f} |")
    worst = max(rows[f"mlxlora on {name}"]["after"] for name in ("mlx", "torch")) - rows["PEFT, same start"]["after"]
    print(f"\ncurve, MLX against torch, worst of {arguments.updates} updates: {gap:.1e} relative (bound {CURVE:.0e})")
    print(f"ours minus PEFT from the same start: {worst:+.5f} nats (bound {WITHIN})")
    if arguments.output:
        packages = ("mlx", "mlx-lm", "torch", "transformers", "peft")
        found = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in packages},
            "command": f"python benchmarks/against_peft.py --model {Path(arguments.model).name} --data "
            f"{Path(arguments.data).name} --updates {arguments.updates} --lr {arguments.lr} "
            f"--quantization {arguments.quantization}",
            "rows": rows,
            "curve_gap": gap,
            "ours_minus_peft": worst,
        }
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

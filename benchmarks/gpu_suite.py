"""Correctness and speed on one CUDA machine, against transformers + PEFT in the same run; needs no network.

    python benchmarks/gpu_suite.py --output DIR            # a CUDA device: under 8 minutes
    python benchmarks/gpu_suite.py --output DIR --device cpu --tiny   # every part on a tiny shape: under a minute

Needs torch, transformers, accelerate, peft, safetensors, psutil; takes bitsandbytes and pytest where they are. DIR gets
gpu_suite.json, written anew after every part, so that a kill leaves what was found. A part that fails is recorded with
its error, and the next one runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SECONDS = 440.0  # of the whole run; the imports and the last part's end come on top
PART_SECONDS = 75.0
TARGETS = (  # on one H200, 8B-shaped
    ("LoRA bf16, tokens/s", 15_000, "at least"),
    ("LoRA bf16, share of the measured matmul peak", 0.50, "at least"),
    ("QLoRA, tokens/s", 12_000, "at least"),
    ("QLoRA, 4k tokens, recompute: peak GiB beyond embeddings and head", 7.4, "at most"),
    ("LoRA bf16, ratio to PEFT", 1.5, "at least"),
    ("QLoRA, ratio to PEFT", 1.5, "at least"),
)


class Suite:
    """The results so far, and the time that is left."""

    def __init__(self, output: Path, *, seconds: float) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.file, self.deadline = output / "gpu_suite.json", time.monotonic() + seconds
        self.results: dict[str, Any] = {}

    def run(self, name: str, part: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Return what a part found, or None; either way it is written down."""
        left, start = self.deadline - time.monotonic(), time.monotonic()
        found: Mapping[str, Any] | None = None
        if left <= 1:
            self.results[name] = {"left_out": "no time left"}
        else:
            signal.setitimer(signal.ITIMER_REAL, min(left, PART_SECONDS))
            try:
                found = part()
                self.results[name] = dict(found)
            except Exception as error:
                tail = traceback.format_exc(limit=-6)[-2500:]
                self.results[name] = {"error": f"{type(error).__name__}: {str(error)[:600]}", "traceback": tail}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        self.results[name]["seconds"] = round(time.monotonic() - start, 2)
        self.write()
        print(f"{name}: {brief(self.results[name])}", flush=True)
        sweep()
        return found

    def write(self) -> None:
        """Write everything found so far, whole or not at all."""
        staged = self.file.with_suffix(".tmp")
        staged.write_text(json.dumps(self.results, indent=1, default=str) + "\n")
        staged.replace(self.file)


def out_of_time(*_: Any) -> None:
    """Stop the part that is running."""
    raise TimeoutError("the part took longer than its share of the time")


def brief(result: Mapping[str, Any]) -> str:
    """Return a part's result in one line."""
    if "error" in result or "left_out" in result:
        return str(result.get("error") or f"left out: {result['left_out']}")[:300]
    if "checks" in result:
        wrong = [name for name, check in result["checks"].items() if not check["ok"]]
        return f"{len(result['checks'])} checks, wrong: {', '.join(wrong) or 'none'}"
    keys = ("tokens_per_s", "share_of_measured_peak", "share_of_nominal_peak", "peak_gib", "beyond_gib", "parts_ms")
    return str({key: result[key] for key in keys if result.get(key) is not None} or dict(result))[:400]


def sweep() -> None:
    """Give back what the last part held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare_with_targets(results: Mapping[str, Any], *, recompute_key: str) -> dict[str, Any]:
    """Return every target with what was found beside it: the best of our settings against the best of PEFT's."""

    def best(prefix: str, key: str) -> float | None:
        found = [row[key] for name, row in results.items() if name.startswith(prefix) and row.get(key)]
        return max(found, default=None)

    def ratio(ours: str, *theirs: str) -> float | None:
        mine, other = best(ours, "tokens_per_s"), next((v for p in theirs if (v := best(p, "tokens_per_s"))), None)
        return mine / other if mine and other else None

    found = [
        best("ours bf16", "tokens_per_s"),
        best("ours bf16", "share_of_measured_peak"),
        best("ours affine", "tokens_per_s"),
        results.get(recompute_key, {}).get("beyond_gib"),
        ratio("ours bf16", "peft bf16"),
        ratio("ours affine", "peft nf4", "peft bf16"),
    ]
    rows: dict[str, Any] = {}
    for (name, target, kind), value in zip(TARGETS, found, strict=True):
        met = None if value is None else (value >= target if kind == "at least" else value <= target)
        rows[name] = {"target": f"{kind} {target}", "found": value, "met": met}
    rows["QLoRA is compared with"] = "PEFT on nf4" if best("peft nf4", "tokens_per_s") else "PEFT on bf16"
    return rows


def main() -> None:
    """Run every part and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="every part on a tiny shape: a test of this script")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, help="compiled updates too; default: on a CUDA device"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of the whole run")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, out_of_time)
    suite = Suite(arguments.output, seconds=arguments.seconds)

    from gpu import correctness, machine, speed

    facts = suite.run("machine", lambda: machine.describe(arguments.device)) or {}
    compiled = arguments.device == "cuda" if arguments.compiled is None else arguments.compiled
    checks = correctness.CHECKS if compiled else {k: v for k, v in correctness.CHECKS.items() if k != "compiled"}
    for name, check in checks.items():
        suite.run(f"correct: {name}", lambda check=check: correctness.run(check, arguments.device))
    suite.run("correct: pytest -m cuda", lambda: correctness.run_pytest(ROOT, arguments.device))
    shape = speed.TINY if arguments.tiny else speed.LLAMA_8B
    speed.run_all(suite, shape, device=arguments.device, peaks=facts.get("peaks", {}), compiled=compiled)
    key = f"ours {speed.SCHEME} {shape.micro_tokens[0]} tokens, recompute"
    suite.run("targets", lambda: compare_with_targets(suite.results, recompute_key=key))
    print(json.dumps(suite.results["targets"], indent=1, default=str))


if __name__ == "__main__":
    main()

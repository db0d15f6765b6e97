"""README.md of an adapter: what it is, how it was made, and how to load it with three libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.adapters.own import is_own
from shared.adapters.writing import why_not_mlx
from shared.hub import split_revision

if TYPE_CHECKING:
    from shared.running.run import Run

NAMES = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [mlxlora, {tag}]
---

# {title}

{what} of `{model}`, trained with mlxlora on {rows} rows for {updates} updates.

| | |
|---|---|
{table}

## Use

```bash
mlxlora generate {model} {flag}--prompt "..."
```
{snippets}"""

SNIPPETS = """
```python
# transformers + PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "adapter")

{mlx}
```
"""
MLX_SNIPPET = """# mlx-lm
from mlx_lm import load
model, tokenizer = load("{model}", adapter_path="adapter")"""


def write_card(folder: Path, run: Run, *, kind: str, train_rows: int, result: Mapping[str, Any]) -> None:
    """Write README.md with the settings and the losses of a run; result: as result.restore_best returns it."""
    config, rows = run.config, run.metrics.read()
    base, _ = split_revision(config.model)
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row for row in rows if row["step"] <= result["update"] and any(key.startswith("eval_") for key in row)]
    measured = [key for key in (evals[0] if evals else {}) if key.startswith("eval_") and key in evals[-1]]
    facts = {
        "rank, alpha, dropout": f"{config.adapter.rank}, {config.adapter.alpha:g}, {config.adapter.dropout:g}",
        "modules": f"{len(run.spec.modules)}: {config.adapter.targets}",
        **({"trained whole": ", ".join(run.spec.saved)} if run.spec.saved else {}),
        "base quantized to": config.quantization,
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {config.schedule.name}",
        "batch": f"{config.train.batch_size} rows, dtype {config.train.dtype}, seed {config.train.seed}",
        "last training loss": f"{losses[-1]:.4f}" if losses else "-",
        "validation loss": "no valid.jsonl",
        **{metric_text(key): f"{evals[0][key]:.4f} before, {evals[-1][key]:.4f} after" for key in measured},
        "weights of": weights_words(result),
    }
    if kind == "model":
        facts = {key: value for key, value in facts.items() if key not in ("rank, alpha, dropout", "modules")}
    text = CARD.format(
        model=config.model,
        base=base,
        tag=run.spec.kind.replace(":", "-") if kind == "adapter" else "full-fine-tuning",
        title=run.folder.name,
        what=f"{NAMES.get(run.spec.kind, run.spec.kind)} adapter" if kind == "adapter" else "Full fine-tuning",
        rows=train_rows,
        updates=result["update"],
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        flag="--adapter adapter " if kind == "adapter" else "",
        snippets=snippets(run, base) if kind == "adapter" else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def metric_text(key: str) -> str:
    """Return a metric's key of metrics.jsonl for people.

    >>> metric_text("eval_loss"), metric_text("eval_math_exact_match")
    ('validation loss', 'math exact match')
    """
    name = key.removeprefix("eval_").replace("_", " ")
    return f"validation {name}" if name == "loss" else name


def weights_words(result: Mapping[str, Any]) -> str:
    """Return of which update the weights are, and why.

    >>> weights_words({"update": 40, "last_update": 70, "stopped_early": True, "metric": "eval_loss", "best": 3.19})
    'update 40, the best eval_loss (3.1900), of 70; stopped early'
    """
    best = f", the best {result['metric']} ({result['best']:.4f})," if result["update"] != result["last_update"] else ""
    bad = f"; training diverged: {result['diverged']}" if "diverged" in result else ""
    early = "; stopped early" * result["stopped_early"]
    return f"update {result['update']}{best} of {result['last_update']}{early}{bad}"


def snippets(run: Run, base: str) -> str:
    """Return how the libraries load the adapter, or why one of them cannot."""
    if is_own(run.spec.kind):
        return f"\nPEFT and mlx-lm cannot load it: {run.spec.kind} computes it, which has to be on PYTHONPATH.\n"
    reason = why_not_mlx(run.spec, tied=run.model.info.is_tied)
    mlx = MLX_SNIPPET.format(model=base) if reason is None else f"# mlx-lm cannot load it: {reason}"
    return SNIPPETS.format(model=base, mlx=mlx)

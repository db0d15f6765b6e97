"""README.md of an adapter: what it is, how it was made, and how to load it with three libraries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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

# mlx-lm
from mlx_lm import load
model, tokenizer = load("{model}", adapter_path="adapter")
```
"""


def write_card(folder: Path, run: Run, *, kind: str, train_rows: int) -> None:
    """Write README.md with the settings and the last losses of a run."""
    config, rows = run.config, run.metrics.read()
    base, _ = split_revision(config.model)
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    facts = {
        "rank, alpha, dropout": f"{config.adapter.rank}, {config.adapter.alpha:g}, {config.adapter.dropout:g}",
        "modules": f"{len(run.spec.modules)}: {config.adapter.targets}",
        "base quantized to": config.quantization,
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr:g}, {config.schedule.name}",
        "batch": f"{config.train.batch_size} rows, dtype {config.train.dtype}, seed {config.train.seed}",
        "last training loss": f"{losses[-1]:.4f}" if losses else "-",
        "validation loss": f"{evals[0]:.4f} before, {evals[-1]:.4f} after" if evals else "no valid.jsonl",
    }
    if kind == "model":
        facts = {key: value for key, value in facts.items() if key not in ("rank, alpha, dropout", "modules")}
    text = CARD.format(
        model=config.model,
        base=base,
        tag=run.spec.kind if kind == "adapter" else "full-fine-tuning",
        title=run.folder.name,
        what=f"{NAMES[run.spec.kind]} adapter" if kind == "adapter" else "Full fine-tuning",
        rows=train_rows,
        updates=run.state.step,
        table="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        flag="--adapter adapter " if kind == "adapter" else "",
        snippets=SNIPPETS.format(model=base) if kind == "adapter" else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")

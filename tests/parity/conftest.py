"""Rows and configs that both backends train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import RunConfig
from shared.config_file import build_config

WORDS = ("hello", "world", "tea", "water", "other", "three", "hall", "tower", "well", "hill", "low", "tell")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder: copy the words in reverse order, rows of very mixed length, some as chats."""
    folder, random = tmp_path_factory.mktemp("task"), np.random.default_rng(0)
    for name, count in (("train", 96), ("valid", 24)):
        rows = []
        for number in range(count):
            words = [str(word) for word in random.choice(WORDS, size=int(random.integers(1, 9)))]
            prompt, answer = "reverse: " + " ".join(words), " ".join(reversed(words))
            if number % 3 == 2:
                turns = [("user", prompt), ("assistant", answer), ("user", "again"), ("assistant", answer)]
                rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
            else:
                rows.append({"prompt": prompt + "\n", "completion": answer})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make_config(task_folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a factory of configs on the task, overrides as `key.sub=value`."""

    def make(model: Path, *overrides: str, **values: Any) -> RunConfig:
        base = {
            "model": str(model),
            "data": {"path": str(task_folder), "max_length": 128},
            "adapter": {"rank": 8},
            "optimizer": {"lr": 2e-3},
            "train": {"batch_size": 8, "updates": 50, "dtype": "float32", "micro_tokens": 256},
            "output": str(tmp_path / "run"),
        }
        return build_config({**base, **values}, overrides=overrides)

    return make

"""A setting that was given and can do nothing is told by its name; one that does something never is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from shared.config import RunConfig
from shared.config_file import build_config, load_config
from shared.jobs.idle import TABLE
from shared.jobs.train import train
from shared.sections import Section

# Settings that change a run whatever the others are.
ALWAYS = {
    "data": "path columns splits max_length drop streaming cache",
    "adapter": "type start",
    "optimizer": "name lr weight_decay max_grad_norm",
    "schedule": "name warmup",
    "train": "batch_size updates epochs micro_tokens dtype recompute compile spikes seed",
    "evaluation": "convergence",
    "checkpoint": "keep",
    "log": "to gradients",
}
FULL = "adapter.type=none adapter.rank=4 adapter.alpha=16 adapter.dropout=0.0 optimizer.lora_plus_ratio=2"
SGD = "optimizer.name=sgd optimizer.betas=[0.9,0.99] optimizer.momentum=0 optimizer.nesterov=true"


@dataclass
class Notes:
    """A callback that keeps what is said of settings."""

    said: list[str] = field(default_factory=list[str])

    def on_note(self, text: str) -> None:
        self.said.append(text)

    @property
    def idle(self) -> list[str]:
        return [text for text in self.said if " in this run: " in text]


@pytest.fixture
def notes_of(tiny_model_folder, write_jsonl, tmp_path):
    """Return a function that trains for an update and gives what was said."""

    def call(*overrides: str, key: str = "prompt", valid: bool = True) -> Notes:
        rows = [{"text": "hello"}] if key == "text" else [{"prompt": "hello", "completion": " world"}]
        data = write_jsonl(*rows, *rows, *rows).parent
        if valid:
            write_jsonl(*rows, name="valid.jsonl")
        values: dict[str, Any] = {
            "model": str(tiny_model_folder()), "data": {"path": str(data)}, "backend": "torch",
            "train": {"updates": 1, "batch_size": 2, "dtype": "float32"}, "output": str(tmp_path / "run"),
        }  # fmt: skip
        notes = Notes()
        train(build_config(values, overrides=overrides), callbacks=[notes], resume="never")
        return notes

    return call


def test_every_setting_is_in_the_table_or_always_does_something():
    told = {
        f"{section}.{key}" for row in TABLE for section, _, keys in [row.keys.partition(".")] for key in keys.split()
    }
    always = {f"{section}.{key}" for section, keys in ALWAYS.items() for key in keys.split()}
    fields = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    sections = {name: kind for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Section)}
    assert told | always == {f"{name}.{key}" for name, kind in sections.items() for key in kind.model_fields}
    assert not told & always


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            FULL,
            [
                "adapter.rank, adapter.alpha do nothing in this run: adapter.type is none: every parameter is trained",
                "optimizer.lora_plus_ratio does nothing in this run: adapter.type is none: there is no B of LoRA",
            ],
        ),
        (
            SGD,
            [
                "optimizer.betas does nothing in this run: sgd has none",
                "optimizer.nesterov does nothing in this run: sgd without momentum keeps nothing",
            ],
        ),
        ("optimizer.name=lion optimizer.eps=1e-6", ["optimizer.eps does nothing in this run: lion has none"]),
        (
            "optimizer.name=muon optimizer.eps=1e-6",
            ["optimizer.eps does nothing in this run: muon has none, and every trained tensor is a matrix of a layer"],
        ),
        (
            "schedule.name=constant schedule.final=0.5 schedule.cycles=3 checkpoint.every=50 log.every=7",
            [
                "schedule.final does nothing in this run: the rate is constant",
                "schedule.cycles does nothing in this run: schedule.name is constant",
                "checkpoint.every does nothing in this run: the run has 1 update, so only its end is saved",
                "log.every does nothing in this run: the run has 1 update, so only its end is logged",
            ],
        ),
        (
            "data.padding_side=left",
            [
                "data.padding_side does nothing in this run: rows are packed end to end, and data.packing none pads "
                "them"
            ],
        ),
        ("data.padding_side=left data.packing=none", []),
        ("optimizer.name=adadelta schedule.warmup=0 adapter.dropout=0.1 evaluation.patience=2", []),
    ],
)  # fmt: skip
def test_what_does_nothing_is_told_by_name_and_why(notes_of, given, said):
    assert notes_of(*given.split()).idle == said


def test_rows_decide_too(notes_of):
    given = ["data.train_on=assistant", "evaluation.every=null", "evaluation.patience=3", "evaluation.generate=1"]
    notes = notes_of(*given, "data.valid_split=0.3", key="text", valid=False)
    assert notes.idle == [
        "evaluation.generate, evaluation.patience do nothing in this run: evaluation.every is null: nothing is "
        "evaluated",
        "data.valid_split does nothing in this run: evaluation.every is null: the rows that it keeps from training are "
        "not evaluated",
        "data.train_on does nothing in this run: the rows are texts, of which everything counts",
    ]


def test_what_is_larger_than_what_it_is_for_is_told(notes_of):
    said = notes_of("train.batch_size=64", "train.updates=101", "adapter.rank=65", "schedule.warmup=101").said
    assert "train.batch_size is 64: every update takes all 3 rows of an epoch" in said
    assert "101 updates are 101 passes over the 3 rows" in said
    assert "schedule.warmup is 101, the run has 101 updates: the learning rate rises to its end" in said
    assert any(text.startswith("adapter.rank 65 is more than 14 of 14 matrices can use") for text in said), said


def test_of_a_run_folders_own_config_nothing_is_told_that_nobody_set(notes_of, tmp_path):
    assert notes_of("optimizer.name=sgd").idle == []
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.optimizer.model_fields_set == set(type(config.optimizer).model_fields)
    notes = Notes()
    train(config, callbacks=[notes], resume="never")
    assert notes.idle == []

"""Optimizers by name: of the config, of a user's own, and those that are refused."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from shared.config import OptimizerConfig
from shared.config_file import build_config
from shared.errors import ConfigError
from shared.optimizers import RULES, Rule, find_rule, make_groups, method_of, next_scale
from shared.types import Method

NAMES = get_args(get_args(OptimizerConfig.model_fields["name"].annotation)[0])


def method(optimizer, dtype="float32"):
    return method_of(
        build_config({"model": "m", "data": {"path": "d"}, "optimizer": optimizer, "train": {"dtype": dtype}})
    )


def test_every_name_of_the_config_has_a_rule():
    assert {method({"name": name}).name for name in NAMES} | {"plain_sgd"} == set(RULES)
    assert method({"name": "sgd", "momentum": 0}).name == "plain_sgd"


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("adamw", {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}),
        ("lion", {"lr": 1e-4, "betas": (0.9, 0.99)}),
        ("adadelta", {"lr": 1.0, "betas": (0.9, 0.9), "eps": 1e-6}),
        ("muon", {"momentum": 0.95, "nesterov": True}),
        ("sgd", {"momentum": 0.9, "nesterov": False}),
    ],
)
def test_defaults_are_those_of_the_optimizer_that_is_named(name, numbers):
    config = OptimizerConfig(name=name)
    assert {key: getattr(config, key) for key in numbers} == numbers
    assert OptimizerConfig(name=name, lr=0.5).lr == 0.5


@pytest.mark.parametrize("name", ["muon", "adafactor", "adadelta"])
def test_what_has_no_code_in_8_bits_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"state: 8bit with optimizer.name: {name}"):
        method({"name": name, "state": "8bit"})


def test_muon_is_for_matrices_inside_the_layers():
    shapes = {"model.layers.0.mlp.up_proj.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (9, 4)}
    groups = make_groups(shapes, Method("muon"), limit=1000)
    assert {name: group.name for group in groups for name in group.shapes} == {
        "model.layers.0.mlp.up_proj.weight": "muon", "model.norm.weight": "adamw", "lm_head.weight": "adamw",
    }  # fmt: skip


OWN = """
from shared.optimizers import Rule, like

def step(p, g, kept, n):
    m = n.momentum * kept["m"] + g
    return p - n.lr * ((m > 0) * 1.0 - (m < 0) * 1.0), {"m": m}

SIGNUM = Rule(step, like("m"))
"""


def test_an_optimizer_of_ones_own_is_found_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_rules_for_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {"name": "own_rules_for_a_test:SIGNUM"}
    assert isinstance(find_rule(method(config).name), Rule)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:X", "No module"),
        ("shared.optimizers:X", "no attribute"),
        ("shared.optimizers:adamw", "is a function\nexpected: a shared.optimizers.Rule"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        method({"name": name})


def test_float16_alone_scales_the_loss():
    assert [method({}, dtype=name).scales_loss for name in ("float32", "bfloat16", "float16")] == [False, False, True]


def test_the_loss_scale_is_halved_by_an_overflow_and_doubled_after_2000_updates_without():
    scale, since = np.float32(2.0**16), np.float32(0)
    scale, since = next_scale(scale, since, 0.0, 1.0)
    assert (scale, since) == (2.0**15, 0)
    for _ in range(1999):
        scale, since = next_scale(scale, since, 1.0, 0.0)
    assert (scale, since) == (2.0**15, 1999)
    assert next_scale(scale, since, 0.0, 0.0) == (2.0**15, 1999)  # skipped for another reason
    assert next_scale(scale, since, 1.0, 0.0) == (2.0**16, 0)

"""Which modules an adapter config means, and the values it starts from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shared.adapters.spec import initial_adapter, is_match, layer_of, resolve, shared_inputs
from shared.adapters.start import check_same
from shared.adapters.writing import Facts
from shared.config import AdapterConfig
from shared.config_file import build_config
from shared.errors import ConfigError
from shared.types import AdapterSpec, ModelInfo

PARTS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.v_proj": (32, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


@pytest.fixture(scope="module")
def info():
    """Return a model of twelve layers, so that layer 10 could be sorted before layer 2."""
    linears = {f"model.layers.{n}.{part}": shape for n in reversed(range(12)) for part, shape in PARTS.items()}
    return ModelInfo(
        family="llama", num_layers=12, vocab_size=256, max_positions=512, max_tokens=None, linears=linears,
        can_pack=True,
        num_parameters=sum(o * i for o, i in linears.values()), quantized={}, notes=(),
    )  # fmt: skip


def modules(info, **options):
    return resolve(AdapterConfig(**options), info).modules


def test_all_linear_means_every_linear_layer_in_model_order(info):
    found = modules(info)
    assert len(found) == 48
    assert [layer_of(name) for name in found] == sorted(n for n in range(12) for _ in PARTS)


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj"], ["self_attn.q_proj"], ["q_proj", "self_attn.q_proj"]])
def test_a_target_is_a_name_or_the_end_of_a_path(info, targets):
    assert modules(info, targets=targets) == tuple(f"model.layers.{n}.self_attn.q_proj" for n in range(12))


def test_a_target_may_be_a_whole_path(info):
    assert modules(info, targets=["model.layers.3.mlp.up_proj"]) == ("model.layers.3.mlp.up_proj",)


@pytest.mark.parametrize(
    "target", ["proj", "_proj", "q_pro", "attn.q_proj", "layers.0", "Q_PROJ", "model.layers.99.mlp.up_proj", ""]
)
def test_a_target_that_matches_nothing_is_refused(info, target):
    with pytest.raises(ConfigError, match="matches no linear module"):
        resolve(AdapterConfig(targets=[target]), info)


def test_a_typo_gets_the_nearest_name(info):
    with pytest.raises(ConfigError, match=r'(?s)"q_prj".*expected: all-linear or down_proj.*did you mean "q_proj"\?'):
        modules(info, targets=["v_proj", "q_prj"])


def test_matching_goes_by_whole_parts():
    assert is_match("q_proj", "a.q_proj")
    assert not is_match("q_proj", "a.kq_proj")
    assert is_match("a.b", "a.b")


@pytest.mark.parametrize(
    ("layers", "numbers"), [("all", range(12)), (2, [10, 11]), (12, range(12)), ([0, 2], [0, 2]), ([11, 0], [0, 11])]
)
def test_layers_are_all_the_last_n_or_a_list(info, layers, numbers):
    assert {layer_of(name) for name in modules(info, layers=layers)} == set(numbers)


@pytest.mark.parametrize("layers", [13, [12], [0, 99]])
def test_layers_that_the_model_does_not_have_are_refused(info, layers):
    with pytest.raises(ConfigError, match="the model has 12"):
        modules(info, layers=layers)


def test_a_target_outside_of_the_chosen_layers_is_refused(info):
    with pytest.raises(ConfigError, match="no module in the chosen layers"):
        modules(info, targets=["model.layers.3.mlp.up_proj"], layers=[0])


def test_numbers_come_from_the_config(info):
    spec = resolve(AdapterConfig(rank=4, alpha=10, dropout=0.1), info)
    assert (spec.kind, spec.rank, spec.alpha, spec.dropout, spec.scale) == ("lora", 4, 10.0, 0.1, 2.5)


def test_rslora_divides_by_the_root_of_the_rank(info):
    assert resolve(AdapterConfig(type="rslora", rank=16, alpha=10), info).scale == 2.5
    assert resolve(AdapterConfig(type="dora", rank=16, alpha=8), info).scale == 0.5


def test_modules_with_numbers_of_their_own_do_not_share_a_product_with_others_of_another_scale():
    names = tuple(f"a.0.{kind}_proj" for kind in "kqv")
    spec = AdapterSpec("lora", 8, 16.0, 0.0, names, ranks={names[0]: 4}, alphas={names[1]: 4.0, names[2]: 8.0})
    assert [spec.scale_of(name) for name in names] == [4.0, 0.5, 1.0]
    assert shared_inputs(spec) == []
    assert shared_inputs(AdapterSpec("lora", 8, 16.0, 0.0, names, ranks={names[0]: 4}, alphas={names[0]: 8.0})) == [
        names
    ]


def test_some_modules_may_have_ranks_and_alphas_of_their_own(info):
    spec = resolve(
        AdapterConfig(rank=4, rank_pattern={"layers.1.mlp.up_proj": 2, "up_proj": 8}, alpha_pattern={"q_proj": 2}), info
    )
    assert spec.rank_of("model.layers.1.mlp.up_proj") == 2
    assert spec.rank_of("model.layers.2.mlp.up_proj") == 8
    assert (spec.rank_of("model.layers.2.mlp.down_proj"), spec.scale_of("model.layers.2.self_attn.q_proj")) == (4, 0.5)
    assert initial_adapter(spec, info.linears, seed=0)["model.layers.2.mlp.up_proj.lora_A"].shape == (8, 64)
    with pytest.raises(ConfigError, match=r'adapter.rank_pattern: "k_prj" matches no adapted module'):
        resolve(AdapterConfig(rank_pattern={"k_prj": 2}), info)


ENDS = {"model.embed_tokens": (64, 256), "lm_head": (256, 64)}


def test_ends_are_adapted_when_they_are_named(info):
    info = replace(info, ends=ENDS)
    assert set(modules(info)) == set(info.linears)
    found = modules(info, targets=["embed_tokens", "lm_head", "q_proj"], layers=[3])
    assert set(found) == {"model.embed_tokens", "lm_head", "model.layers.3.self_attn.q_proj"}
    start = initial_adapter(resolve(AdapterConfig(targets=["embed_tokens"], rank=4), info), info.adaptable, seed=0)
    A, B = start["model.embed_tokens.lora_embedding_A"], start["model.embed_tokens.lora_embedding_B"]
    assert (A.shape, A.data.any(), B.shape) == ((4, 256), False, (64, 4))
    assert abs(B.data.std() - 1) < 0.1


@pytest.mark.parametrize(
    ("options", "tied", "word"),
    [
        ({"targets": ["embed_tokens"], "type": "dora"}, False, "DoRA on an embedding"),
        ({"targets": ["embed_tokens"], "dropout": 0.1}, True, "adapter.dropout with a head"),
        ({"targets": ["q_proj"], "modules_to_save": ["q_proj"]}, False, "in targets and in modules_to_save"),
        ({"targets": ["lm_head"], "modules_to_save": ["embed_tokens"]}, True, "in targets and in modules_to_save"),
        ({"modules_to_save": ["lm_heed"], "targets": ["q_proj"]}, True, "matches no module"),
        ({"modules_to_save": ["norm"], "type": "none"}, True, "trains every module"),
        ({"targets": ["lm_head", "q_proj"], "dropout": 0.1}, False, "adapter.dropout with a head"),
    ],
)
def test_ends_that_the_libraries_compute_differently_are_refused(info, options, tied, word):
    with pytest.raises(ConfigError, match=word):
        modules(replace(info, ends=ENDS, is_tied=tied), **options)


def test_of_a_tied_base_both_ends_are_one_unless_told_otherwise(info):
    info = replace(info, ends=ENDS, is_tied=True, norms={"model.norm": 64, "model.layers.0.input_layernorm": 64})
    both = {"targets": ["embed_tokens", "lm_head"], "modules_to_save": ["norm"]}
    spec = resolve(AdapterConfig(**both), info)
    assert (spec.modules, spec.saved, spec.tied) == (("model.embed_tokens",), ("model.norm",), True)
    apart = resolve(AdapterConfig(**both, ensure_weight_tying=False), info)
    assert (apart.modules, apart.tied) == (("lm_head", "model.embed_tokens"), False)
    head = resolve(AdapterConfig(targets=["q_proj"], modules_to_save=["lm_head"]), info)
    assert (head.saved, head.tied) == (("model.embed_tokens",), True)
    assert not resolve(AdapterConfig(**both), replace(info, is_tied=False)).tied


def test_full_fine_tuning_has_no_modules(info):
    assert resolve(AdapterConfig(type="none"), info) == AdapterSpec("none", rank=1, alpha=1.0, dropout=0.0, modules=())


def test_an_adapter_starts_as_no_change_with_a_in_peft_s_interval(info):
    spec = resolve(AdapterConfig(rank=16, targets=["down_proj"]), info)
    start = initial_adapter(spec, info.linears, seed=0)
    assert len(start) == 24
    for name in spec.modules:
        A, B = start[f"{name}.lora_A"], start[f"{name}.lora_B"]
        assert (A.dtype, A.shape, B.dtype, B.shape) == ("F32", (16, 128), "F32", (64, 16))
        assert not B.data.any()
        assert 0.95 * 128**-0.5 < np.abs(A.data).max() <= 128**-0.5


def test_a_module_starts_the_same_whichever_others_are_trained(info):
    one = initial_adapter(resolve(AdapterConfig(targets=["q_proj"]), info), info.linears, seed=3)
    two = initial_adapter(resolve(AdapterConfig(), info), info.linears, seed=3)
    assert all(np.array_equal(one[name].data, two[name].data) for name in one)


def test_layers_start_differently_and_so_do_seeds(info):
    spec = resolve(AdapterConfig(targets=["q_proj"]), info)
    start, other = (initial_adapter(spec, info.linears, seed=seed) for seed in (0, 1))
    first, second = (f"model.layers.{n}.self_attn.q_proj.lora_A" for n in (0, 1))
    assert not np.array_equal(start[first].data, start[second].data)
    assert not np.array_equal(start[first].data, other[first].data)


def test_a_start_that_differs_is_told_as_the_settings_that_describe_it():
    names = tuple(f"model.layers.{n}.mlp.{kind}_proj" for n in (1, 2) for kind in ("up", "down"))
    spec = AdapterSpec("lora", rank=8, alpha=16, dropout=0.0, modules=names)
    ranks = {name: 4 for name in names if "up" in name} | {names[1]: 2}
    with pytest.raises(ConfigError) as error:
        check_same(replace(spec, ranks=ranks, alphas={names[0]: 3.0}), spec, facts=Facts(3, frozenset(names)))
    assert error.value.what.endswith("(rank_pattern, alpha_pattern)")
    assert error.value.fix == (
        "adapter.type: lora, rank: 8, alpha: 16, targets: [down_proj, up_proj], layers: [1, 2], "
        "rank_pattern: {up_proj: 4, model.layers.1.mlp.down_proj: 2}, alpha_pattern: {model.layers.1.mlp.up_proj: 3}"
    )


@pytest.mark.parametrize(
    ("metric", "words"), [("eval_rouge_l", "evaluation.generate for that one, or"), ("val_loss", "a metric that is")]
)
def test_a_metric_that_is_not_measured_is_told_by_its_key(metric, words):
    with pytest.raises(ConfigError) as error:
        build_config({"model": "m", "data": {"path": "d"}, "evaluation": {"metric": metric}})
    assert error.value.what == f"argument: evaluation.metric, found '{metric}'"
    assert (error.value.expected or "").startswith(words)

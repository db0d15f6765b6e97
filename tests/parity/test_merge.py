"""Adapters combined: against PEFT's add_weighted_adapter, against the exact sum, and one alone byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from mlxlora import merge
from shared.adapters.folder import read_adapter
from shared.adapters.spec import leaves_of
from shared.errors import AdapterError, CapabilityError, ConfigError
from shared.sessions import open_session
from shared.tensors import from_float32, to_float32
from tests import tolerances
from tests.parity.test_convert import IDS, base, check_alike, make_mlx, make_peft, mlx_logits  # noqa: F401
from tests.unit.test_adapter_folders import PEFT, Q, filled, peft_folder

SETTINGS = (
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
)


def changes(folder):
    """Return scale * B A of every module, float64."""
    adapter = read_adapter(folder)
    found = {}
    for module in adapter.spec.modules:
        A, B = (to_float32(adapter.tensors[f"{module}.{leaf}"]).astype(np.float64) for leaf in leaves_of(module))
        found[module] = adapter.spec.scale_of(module) * (B @ A)
    return found


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory):  # noqa: F811
    """Return two adapters of PEFT on one base, the second on fewer modules and an embedding."""
    import torch

    root = tmp_path_factory.mktemp("pair")
    one = make_peft(base(), root / "one", **SETTINGS[0])
    torch.manual_seed(5)
    return one, make_peft(base(), root / "two", **SETTINGS[1])


def peft_sum(folder, pair, weights, **options):
    """Return scale * B A of every module as PEFT combines them, and whether it is there in PEFT at all."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(pair[0]), adapter_name="one")
    model.load_adapter(str(pair[1]), adapter_name="two")
    model.base_model.add_weighted_adapter(["one", "two"], list(weights), "sum", **options)
    found = {}
    for name, module in plain.named_modules():
        if hasattr(module, "get_delta_weight") and "sum" in module.scaling:
            delta = module.get_delta_weight("sum").detach().numpy().astype(np.float64)
            found[name] = delta.T if "embed" in name else delta
    return found


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"method": "concat"}, {"combination_type": "cat"}),
        ({"method": "linear"}, {"combination_type": "linear"}),
        ({"method": "ties", "density": 0.4}, {"combination_type": "ties", "density": 0.4}),
        ({"method": "svd", "rank": 3}, {"combination_type": "svd", "svd_rank": 3}),
    ],
    ids=lambda value: value.get("method"),
)
def test_every_method_gives_what_peft_gives(base, pair, tmp_path, weights, options, theirs):  # noqa: F811
    merge(
        [f"{folder}={weight}" for folder, weight in zip(pair, weights, strict=True)], output=tmp_path / "m", **options
    )
    ours, wanted = changes(tmp_path / "m"), peft_sum(base(), pair, weights, **theirs)
    assert ours.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert np.abs(ours[name] - exact).max() <= tolerances.COMBINED * np.abs(exact).max(), name


def test_concatenation_is_the_sum_for_both_libraries_and_here(base, pair, tmp_path):  # noqa: F811
    texts = [f"{pair[0]}=0.7", f"{pair[1]}=0.3"]
    merge(texts, output=tmp_path / "m")
    one, two = (changes(folder) for folder in pair)
    for name, found in changes(tmp_path / "m").items():
        exact = 0.7 * one.get(name, 0) + 0.3 * two.get(name, 0)
        assert np.abs(found - exact).max() <= tolerances.COMBINED * np.abs(exact).max()
    check_alike(base(), tmp_path / "m", tmp_path / "m")
    import torch

    model = open_session(str(base()), adapter=texts, backend="torch", dtype="float32").model
    with torch.no_grad():
        found = model.head.logits(model.decoder(input_ids=torch.tensor(IDS)).last_hidden_state[0]).numpy()
    wanted = mlx_logits(base(), tmp_path / "m")
    np.testing.assert_allclose(found, wanted, atol=tolerances.LOGITS * max(np.abs(wanted).max() / 10, 1), rtol=0)


@pytest.mark.parametrize("options", [{"method": "concat"}, {"method": "linear"}, {"method": "ties", "density": 0.5}])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_weights_1_and_0_give_the_first_adapter_byte_for_byte(base, pair, tmp_path, options, kind):  # noqa: F811
    first = make_mlx(base(), tmp_path / "first", kind=kind)
    result = merge([f"{first}=1", f"{pair[1]}=0"], output=tmp_path / "m", **options)
    assert result.copied
    names = {file.name for file in first.iterdir()}
    assert names == {file.name for file in (tmp_path / "m").iterdir()}
    assert all((tmp_path / "m" / name).read_bytes() == (first / name).read_bytes() for name in names)


def test_the_same_adapter_taken_by_halves_is_itself(pair, tmp_path):
    merge([f"{pair[0]}=0.5", f"{pair[0]}=0.5"], output=tmp_path / "m", method="svd", rank=4)
    one, two = changes(pair[0]), changes(tmp_path / "m")
    assert all(np.abs(one[name] - two[name]).max() <= tolerances.COMBINED * np.abs(one[name]).max() for name in one)


def test_the_sum_of_bfloat16_adapters_is_not_rounded_to_bfloat16(tmp_path):
    random, folders = np.random.default_rng(3), []
    for name in ("one", "two"):
        A, B = (from_float32(random.standard_normal(size).astype(np.float32), "BF16") for size in ((2, 8), (8, 2)))
        folders.append(peft_folder(tmp_path / name, **{f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}))
    merge([f"{folders[0]}=0.7", f"{folders[1]}=0.3"], output=tmp_path / "m")
    exact = 0.7 * changes(folders[0])[Q] + 0.3 * changes(folders[1])[Q]
    assert np.abs(changes(tmp_path / "m")[Q] - exact).max() <= tolerances.COMBINED * np.abs(exact).max()


def test_what_cannot_be_added_is_refused_by_name(tmp_path):
    one = str(peft_folder(tmp_path / "one"))
    dora = str(peft_folder(
        tmp_path / "dora", {**PEFT, "use_dora": True}, **{f"{Q}.lora_A.weight": filled(2, 8),
        f"{Q}.lora_B.weight": filled(8, 2), f"{Q}.lora_magnitude_vector": filled(8)},
    ))  # fmt: skip
    wide = str(peft_folder(
        tmp_path / "wide", **{f"{Q}.lora_A.weight": filled(2, 9), f"{Q}.lora_B.weight": filled(8, 2)}
    ))  # fmt: skip
    ranked = str(peft_folder(
        tmp_path / "ranked", {**PEFT, "r": 3},
        **{f"{Q}.lora_A.weight": filled(3, 8), f"{Q}.lora_B.weight": filled(8, 3)},
    ))  # fmt: skip
    nan = filled(2, 8)
    nan.data[0, 0] = np.nan
    broken = str(peft_folder(tmp_path / "nan", **{f"{Q}.lora_A.weight": nan, f"{Q}.lora_B.weight": filled(8, 2)}))
    for arguments, options, error, word in (
        ([one, broken], {}, AdapterError, "NaN"),
        ([one, broken], {"method": "svd", "rank": 2}, AdapterError, "NaN"),
        ([f"{one}=1e300", one], {}, ConfigError, "too large"),
        ([one, dora], {}, CapabilityError, "DoRA"),
        ([one, wide], {}, AdapterError, "adapters of one base"),
        ([one, ranked], {"method": "linear"}, ConfigError, "one rank"),
        ([one, ranked], {"method": "svd", "rank": 6}, ConfigError, "--rank 6"),
        ([one], {"method": "svd"}, ConfigError, "--rank"),
        ([one], {"method": "ties"}, ConfigError, "--density"),
        ([one], {"method": "ties", "density": 1.5}, ConfigError, "--density is 1.5"),
        ([one, one], {"method": "ties", "density": 1e-3}, ConfigError, "--density 0.001 keeps no value of "),
        ([one], {"rank": 2}, ConfigError, "--rank"),
        ([one], {"method": "mean"}, ConfigError, "unknown value"),
        ([f"{one}=0"], {}, ConfigError, "every weight is 0"),
        ([f"{one}=half"], {}, ConfigError, "no number"),
        ([f"{one}=nan"], {}, ConfigError, "not finite"),
        (["nowhere=0.5", one], {}, AdapterError, "no adapter folder at nowhere"),
    ):
        with pytest.raises(error, match=word):
            merge(arguments, output=tmp_path / "m", **options)
        assert not (tmp_path / "m").exists()

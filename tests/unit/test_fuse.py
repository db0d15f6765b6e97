"""Fusing: full precision is exact, the base's own grid keeps what it can, and a zero adapter changes no byte."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import mlxlora
from shared.config_file import build_config
from shared.convert.change import Change
from shared.convert.shards import row_blocks
from shared.convert.source import open_rows, plain_weights
from shared.convert.weights import Survival
from shared.errors import AdapterError, CapabilityError, ConfigError, ModelError
from shared.folder import open_folder, sha256
from shared.jobs.fuse import KEPT, FuseResult, Lost, TextChange, check_survival, fuse
from shared.jobs.train import train
from shared.quant.affine import unpack
from shared.tensors import from_float32, load_file, save_file, to_float32
from shared.types import Tensor
from tests.adapters import save_adapter


@pytest.fixture(scope="module")
def affine_folder(tiny_model_folder, tmp_path_factory):
    """Return a factory of the tiny model quantized by mlx-lm, with `bits` per code in groups of `group`."""
    import mlx_lm

    made: dict[tuple[int, int, str], Path] = {}

    def make(bits: int, group: int = 32, dtype: str = "float32") -> Path:
        if (bits, group, dtype) not in made:
            target = tmp_path_factory.mktemp(f"affine-{bits}-{group}") / "model"
            mlx_lm.convert(
                str(tiny_model_folder(dtype=dtype)), mlx_path=str(target), quantize=True, q_bits=bits,
                q_group_size=group, dtype=dtype,
            )  # fmt: skip
            made[bits, group, dtype] = target
        return made[bits, group, dtype]

    return make


def sharded(source: Path, target: Path) -> Path:
    """Return a copy of a model with its tensors in two shards and an index."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(target / file, ((name, tensors[name]) for name in part), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """Return all weights of a folder as float32, decoded."""
    opened = open_folder(folder)
    weights = plain_weights(opened)
    return {
        name: np.concatenate(
            [to_float32(open_rows(opened, weight)(rows)) for rows in row_blocks(weight.shape)]
        ).reshape(weight.shape)
        for name, weight in weights.items()
    }


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.iterdir())}


def weight_hashes(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(folder).items() if name.endswith(".safetensors")}


def expected(base: Path, adapter: Path, *, scale: float) -> dict[str, np.ndarray]:
    """Return the fused weights in float64."""
    found = {name: value.astype(np.float64) for name, value in decoded(base).items()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if name.endswith("lora_A.weight"):
            A, B = (to_float32(tensors[key]).astype(np.float64) for key in (name, name.replace("lora_A", "lora_B")))
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{module}.weight"] = found[f"{module}.weight"] + scale * (B @ A)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_full_precision_is_the_float64_sum_rounded_once(tiny_model_folder, affine_folder, tmp_path, dtype):
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    for number, base in enumerate((tiny_model_folder(), affine_folder(4))):
        adapter = save_adapter(tmp_path / f"adapter{number}", base)
        result = fuse(str(base), adapter=str(adapter), output=str(tmp_path / f"out{number}"), dtype=dtype)
        written = load_file(result.output / "model.safetensors")
        for name, value in expected(base, adapter, scale=2.0).items():
            wanted = from_float32(value.astype(np.float32), kind)
            assert written[name].dtype == kind
            assert np.array_equal(written[name].data, wanted.data), name
        assert result.weights == 14
        assert result.cosine > (0.9999999 if dtype == "float32" else 0.999)


def test_the_fused_model_is_that_of_peft(tiny_model_folder, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_model_folder("qwen2")
    adapter = save_adapter(tmp_path / "adapter", base, use_rslora=True)
    output = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out")).output
    ids = torch.tensor([[5, 90, 17, 200, 33]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(ids).logits
    assert torch.allclose(ours, merged, atol=2e-5, rtol=0)


def test_both_backends_load_what_was_fused_from_mlx(affine_folder, tmp_path):
    """The plain model gives the log-probabilities of base and adapter; rows as `fuse` measures them."""
    from shared.data.rows import Row
    from shared.jobs.fuse import log_probs

    base = affine_folder(4)
    adapter = save_adapter(tmp_path / "adapter", base)
    output = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out")).output
    rows = [Row("text", {"text": "hello there, he said"}, "made:1")]
    for backend in ("mlx", "torch"):
        apart, fused = log_probs(base, adapter, rows, backend), log_probs(output, None, rows, backend)
        np.testing.assert_allclose(fused, apart, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_zero_adapter_gives_identical_bytes_of_a_float_model(tiny_model_folder, tmp_path, dtype):
    base = sharded(tiny_model_folder(dtype=dtype), tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, size=0.0)
    for scheme in ("none", "same"):
        result = fuse(str(base), adapter=str(adapter), output=str(tmp_path / scheme), scheme=scheme)
        assert weight_hashes(result.output) == weight_hashes(base)
        assert (result.weights, result.cosine, result.share) == (0, 1.0, 1.0)
    index = json.loads((tmp_path / "same/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in base.glob("*.safetensors")}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_zero_adapter_gives_identical_bytes_of_an_affine_model(affine_folder, tmp_path, bits):
    base = affine_folder(bits, 64)
    adapter = save_adapter(tmp_path / "adapter", base, size=0.0)
    result = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme="same")
    assert weight_hashes(result.output) == weight_hashes(base)
    assert (result.output / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_fusing_into_4_bits_reports_the_loss_and_refuses(affine_folder, tmp_path):
    base = affine_folder(4)
    before = hashes(base)
    adapter = save_adapter(tmp_path / "adapter", base, size=0.002)
    with pytest.raises(Lost, match="fusing would lose the adapter") as caught:
        fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme="same")
    assert caught.value.exit_code == 3
    assert caught.value.result.cosine < 0.4
    assert [part.name for part in caught.value.result.layers] == ["layer 0", "layer 1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    result = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme="same", accept_loss=True)
    assert result.cosine == caught.value.result.cosine
    assert hashes(base) == before


def test_an_adapter_larger_than_the_steps_survives_on_the_grid(affine_folder, tmp_path):
    """8 bits: every code is the nearest there is, scales and biases stay, and the survival is what float64 says."""
    base = affine_folder(8)
    adapter = save_adapter(tmp_path / "adapter", base, size=0.02)
    result = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme="same")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, result.output))
    wanted, before, after = expected(base, adapter, scale=2.0), decoded(base), decoded(result.output)
    sums = Survival()
    for name in (name for name in wanted if "proj" in name):
        module = name.removesuffix(".weight")
        for leaf in ("scales", "biases"):
            assert np.array_equal(old[f"{module}.{leaf}"].data, new[f"{module}.{leaf}"].data)
        step = np.repeat(np.abs(to_float32(old[f"{module}.scales"])), 32, axis=1)
        codes = unpack(new[f"{module}.weight"].data, bits=8)
        inside = (codes > 0) & (codes < 255)
        assert (np.abs(after[name] - wanted[name])[inside] <= 0.5001 * step[inside]).all()
        sums.add(wanted[name] - before[name], after[name].astype(np.float64) - before[name])
    assert result.cosine == pytest.approx(sums.cosine, abs=1e-9)
    assert result.cosine > KEPT


def test_what_log_probabilities_say_of_the_loss(affine_folder, tmp_path, write_jsonl):
    rows = write_jsonl(*({"text": f"hello world number {n}"} for n in range(4)))
    base = affine_folder(8)
    adapter = save_adapter(tmp_path / "adapter", base, size=0.02)
    result = fuse(
        str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme="same", data=str(rows), backend="torch"
    )
    assert result.text is not None
    assert result.text.rows == "train.jsonl"
    assert 0.9 < result.text.cosine <= 1
    assert 0.8 < result.text.share < 1.2


def test_survival_of_a_known_loss():
    found = Survival()
    found.add(np.array([3.0, 4.0]), np.array([3.0, 0.0]))
    assert (found.cosine, found.share) == (0.6, 9 / 25)


def test_log_probabilities_that_are_no_number_do_not_pass(tmp_path):
    text = TextChange("rows", tokens=3, cosine=math.nan, share=math.nan)
    for cosine, found in ((1.0, text), (math.nan, None)):
        with pytest.raises(Lost):
            check_survival(FuseResult(tmp_path, "same", "auto", 1, cosine, 1.0, (), found), accept_loss=False)


def test_a_change_is_that_of_the_formula():
    change = Change(np.float32([[1, 2]]), np.float32([[3], [4]]), 0.5)
    assert change.apply(np.ones((1, 2)), slice(1, 2)).tolist() == [[3.0, 5.0]]


def dora(tensors: dict[str, Tensor], base: Path, *, factor: float) -> None:
    """Add magnitudes that are the norms of the base's rows times a factor."""
    for name, weight in decoded(base).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"
        if key.replace("magnitude_vector", "A.weight") in tensors:
            tensors[key] = Tensor("F32", np.linalg.norm(weight.astype(np.float32), axis=1) * np.float32(factor))


def test_dora_is_fused_as_peft_merges_it(tiny_model_folder, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_model_folder()
    adapter = save_adapter(tmp_path / "adapter", base, use_dora=True)
    changed(adapter, lambda tensors: dora(tensors, base, factor=1.1))
    output = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out")).output
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().state_dict()
    for name, value in decoded(output).items():
        np.testing.assert_allclose(value, merged[name].numpy(), rtol=0, atol=2e-6, err_msg=name)


def test_a_fresh_dora_adapter_changes_no_byte(tiny_model_folder, affine_folder, tmp_path):
    for number, base in enumerate((tiny_model_folder(), affine_folder(4))):
        adapter = save_adapter(tmp_path / f"adapter{number}", base, size=0.0, use_dora=True)
        changed(adapter, lambda tensors, base=base: dora(tensors, base, factor=1.0))
        result = fuse(str(base), adapter=str(adapter), output=str(tmp_path / f"out{number}"), scheme="same")
        assert weight_hashes(result.output) == weight_hashes(base)
        assert result.cosine == 1.0


def changed(folder: Path, edit) -> Path:
    """Change the tensors of an adapter folder in place."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    file.unlink()
    save_file(file, tensors.items(), metadata={"format": "pt"})
    return folder


def poison(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).data[0, 0] = np.nan


@pytest.mark.parametrize("scheme", ["none", "same"])
def test_an_adapter_with_nan_is_refused(tiny_model_folder, tmp_path, scheme):
    base = tiny_model_folder()
    adapter = changed(save_adapter(tmp_path / "adapter", base), poison)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme=scheme)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(tiny_model_folder, tmp_path):
    deep = save_adapter(tmp_path / "deep", tiny_model_folder())
    with pytest.raises(AdapterError, match=r"no layer .*model\.layers\.1.* \(7 of 14 modules"):
        fuse(str(tiny_model_folder(layers=1)), adapter=str(deep), output=str(tmp_path / "out"))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    narrow = changed(deep, lambda tensors: tensors.update({key: Tensor("F32", np.zeros((4, 32), np.float32))}))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\" has shape \(4, 32\)"):
        fuse(str(tiny_model_folder()), adapter=str(narrow), output=str(tmp_path / "out"))


def test_another_base_of_the_same_shape_is_named(tiny_model_folder, tmp_path, write_jsonl):
    base, data = tiny_model_folder(), write_jsonl({"text": "hello world"})
    values = {"model": str(base), "data": {"path": str(data)}, "output": str(tmp_path / "run"), "backend": "torch"}
    adapter = train(build_config({**values, "train": {"updates": 1, "dtype": "float32"}})).adapter
    notes: list[str] = []
    for number, model in enumerate((base, tiny_model_folder(seed=1))):
        fuse(str(model), adapter=str(adapter), output=str(tmp_path / str(number)), note=notes.append)
    assert notes == ["this is not the base that the adapter was trained on: its files differ"]


def test_an_adapter_of_an_embedding_changes_it_alone_and_a_tied_head_stays_as_it_was(tiny_model_folder, tmp_path):
    for tied in (True, False):
        base = tiny_model_folder(tied=tied)
        adapter = save_adapter(tmp_path / f"adapter{tied}", base, targets=["q_proj"])
        random = np.random.default_rng(0)
        shapes = {"A": (4, open_folder(base).entries["model.embed_tokens.weight"].shape[0]), "B": (64, 4)}
        name = "base_model.model.model.embed_tokens.lora_embedding_"
        leaves = {name + leaf: random.standard_normal(shape).astype(np.float32) for leaf, shape in shapes.items()}
        changed(adapter, lambda tensors, new=leaves: tensors.update({k: Tensor("F32", v) for k, v in new.items()}))
        output = fuse(str(base), adapter=str(adapter), output=str(tmp_path / f"out{tied}")).output
        key = "model.embed_tokens.weight"
        wanted = decoded(base)[key] + 2.0 * (leaves[name + "B"] @ leaves[name + "A"]).T
        np.testing.assert_allclose(decoded(output)[key], wanted, rtol=0, atol=1e-5)
        head = decoded(base)[key if tied else "lm_head.weight"]
        np.testing.assert_array_equal(decoded(output)["lm_head.weight"], head)


def test_a_weight_too_large_for_float16_is_refused_not_made_infinite(tiny_model_folder, tmp_path):
    base = tiny_model_folder()
    adapter = save_adapter(tmp_path / "adapter", base, size=1e6)
    with pytest.raises(CapabilityError, match="does not fit into float16"):
        fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_with_nan_is_refused(tiny_model_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder(), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"].data[0] = np.nan
    (base / "model.safetensors").unlink()
    save_file(base / "model.safetensors", tensors.items())
    adapter = save_adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), dtype="bfloat16")


def test_a_base_without_tokenizer_is_fused_and_not_measured(affine_folder, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(affine_folder(8), base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    adapter, notes = save_adapter(tmp_path / "adapter", base), []
    rows = tmp_path / "valid.jsonl"
    rows.write_text('{"text": "hello"}\n')
    result = fuse(
        str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme="same", sample=tmp_path,
        note=notes.append,
    )  # fmt: skip
    assert result.text is None
    assert any("not measured" in note for note in notes)


@pytest.mark.parametrize("options", [{"scheme": "smae"}, {"dtype": "fp16"}, {"scheme": "same", "dtype": "float32"}])
def test_unknown_options_are_refused_before_anything_is_read(options):
    with pytest.raises(ConfigError):
        fuse("nowhere", adapter="nowhere", output="nowhere", **options)


FORMATS = (
    "affine-4bit-g32", "affine-3bit-g64+hqq", "ternary-g64", "mxfp4", "nvfp4", "mxfp8", "nf4", "nf4-dq", "fp4", "int8",
    "quanto-qint2", "quanto-qint4", "quanto-qint8", "quanto-qfloat8", "bitnet",
    "ternary-g32 base3",
)  # fmt: skip


@pytest.mark.parametrize("scheme", FORMATS)
def test_folders_of_every_format_are_fused(tiny_model_folder, tmp_path, scheme):
    """A zero adapter changes no byte of a weight file; another one changes codes alone, and is counted."""
    from shared.convert.quantize import quantize

    base = tmp_path / "base"
    quantize(str(tiny_model_folder()), scheme=scheme.split()[0], output=base, base3=scheme.endswith("base3"))
    zero = save_adapter(tmp_path / "zero", base, size=0.0)
    for kind in ("same", "none"):
        result = fuse(str(base), adapter=str(zero), output=str(tmp_path / f"zero-{kind}"), scheme=kind)
        assert result.weights == 0
    assert weight_hashes(tmp_path / "zero-same") == weight_hashes(base)
    before = decoded(base)
    for name, value in decoded(tmp_path / "zero-none").items():
        assert np.array_equal(value, before[name])
    adapter = save_adapter(tmp_path / "adapter", base, size=0.1)
    same = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "same"), scheme="same", accept_loss=True)
    wanted, after = expected(base, adapter, scale=2.0), decoded(same.output)
    key = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(after[key], before[key])  # PEFT 0.21 merges into quanto without changing a bit
    assert np.abs(after[key] - wanted[key]).mean() < np.abs(before[key] - wanted[key]).mean()
    assert 0.1 < same.cosine < 1
    plain = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "plain"), dtype="float32")
    np.testing.assert_allclose(decoded(plain.output)[key], wanted[key], rtol=0, atol=1e-6)
    assert not open_folder(plain.output).places


@pytest.mark.slow  # PEFT, optimum-quanto and transformers
def test_fusing_into_quanto_changes_the_weights_that_peft_leaves(tiny_model_folder, tmp_path):
    import torch
    from optimum.quanto import QuantizedModelForCausalLM
    from peft import PeftModel

    from shared.convert.quantize import quantize

    base = tmp_path / "base"
    quantize(str(tiny_model_folder()), scheme="quanto-qint8", output=base)
    adapter = save_adapter(tmp_path / "adapter", base, size=0.1)
    theirs = QuantizedModelForCausalLM.from_pretrained(str(base))
    layer = theirs.model.layers[0].mlp.up_proj
    before = layer.weight.dequantize().detach().clone()
    wrapped = PeftModel.from_pretrained(theirs._wrapped, str(adapter))
    merged = wrapped.merge_and_unload().model.layers[0].mlp.up_proj
    assert torch.equal(merged.weight.dequantize(), before), "PEFT merges now: take the comment in test_fuse back"
    key = "model.layers.0.mlp.up_proj.weight"
    wanted = expected(base, adapter, scale=2.0)[key]
    ours = decoded(fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme="same").output)[key]
    assert np.abs(ours - wanted).mean() < 0.1 * np.abs(before.numpy() - wanted).mean()


def test_a_fused_model_is_quantized_anew(tiny_model_folder, tmp_path):
    from shared.convert.quantize import quantize

    base = tiny_model_folder()
    adapter = save_adapter(tmp_path / "adapter", base, size=0.1)
    found = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "out"), scheme="affine-8bit-g64")
    plain = fuse(str(base), adapter=str(adapter), output=str(tmp_path / "plain")).output
    quantize(str(plain), scheme="affine-8bit-g64", output=tmp_path / "again")
    assert weight_hashes(found.output) == weight_hashes(tmp_path / "again")
    assert not (found.output / ".plain").exists()
    wanted, before, after = expected(base, adapter, scale=2.0), decoded(base), decoded(found.output)
    sums = Survival()
    for name in (name for name in wanted if "proj" in name):
        sums.add(wanted[name] - before[name], after[name].astype(np.float64) - before[name])
    assert found.cosine == pytest.approx(sums.cosine, abs=1e-6)
    small = save_adapter(tmp_path / "small", base, size=0.001)
    with pytest.raises(Lost):
        fuse(str(base), adapter=str(small), output=str(tmp_path / "lost"), scheme="affine-2bit-g32")
    assert not (tmp_path / "lost").exists()


EMBEDDING = "model.embed_tokens"


@pytest.mark.parametrize("name", ["as it was", "decoded", "trained", "of another shape", "NaN"])
def test_a_weight_that_comes_along_is_the_quantized_base_s_or_refused(tiny_model_folder, affine_folder, tmp_path, name):
    base = affine_folder(4, dtype="bfloat16")
    first = load_file(tiny_model_folder(dtype="bfloat16") / "model.safetensors")[f"{EMBEDDING}.weight"]
    first = Tensor("F32", to_float32(first))
    moved = first.data + np.float32(1e-3) * np.random.default_rng(0).standard_normal(first.shape).astype(np.float32)
    copy = {
        "as it was": first,
        "decoded": Tensor("F32", decoded(base)[f"{EMBEDDING}.weight"]),
        "trained": Tensor("F32", moved),
        "of another shape": Tensor("F32", first.data[:-1]),
        "NaN": Tensor("F32", first.data * np.float32(np.nan)),
    }[name]
    file = save_adapter(tmp_path / "adapter", base, targets=["q_proj"]) / "adapter_model.safetensors"
    brought = {f"base_model.model.{EMBEDDING}.base_layer.weight": copy}
    save_file(file, {**load_file(file), **brought}.items(), metadata={"format": "pt"})
    runs = {
        "fused": lambda target: fuse(str(base), adapter=str(file.parent), output=str(target)),
        "converted": lambda target: mlxlora.convert(file.parent, to="mlx", output=target, base=base),
        "exported": lambda target: mlxlora.convert(file.parent, to="gguf", output=target, base=base),
    }
    for kind, run in runs.items():
        if name in ("as it was", "decoded"):
            run(tmp_path / kind)
            continue
        with pytest.raises(CapabilityError, match=f'its own "{EMBEDDING}.weight"'):
            run(tmp_path / kind)
        assert not (tmp_path / kind).exists()

"""Adapters of experts: gradients against float64, folders of PEFT and mlx-lm, fusing, quantized bases, refusals."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from mlxlora import convert, fuse, merge
from shared import reference
from shared.adapters.folder import check_fit, read_adapter
from shared.adapters.spec import resolve
from shared.config import AdapterConfig
from shared.convert.experts import one_below_another
from shared.data.batch import make_batch
from shared.errors import AdapterError, CapabilityError, ConfigError
from shared.estimate.memory import num_trained
from shared.estimate.shapes import read_shape
from shared.experts import STACKED
from shared.folder import open_folder
from shared.quant.affine import AffineQuantizer
from shared.registry import BACKENDS, find_backend
from shared.schemes import parse_scheme
from shared.tensors import load_file, save_file, to_float32
from shared.types import AdapterSpec, Method, Scheme, Tensor
from tests import tolerances
from tests.architectures import MIXTURES, Trial, as_on_the_hub, load, rows, save, update
from tests.parity.test_convert import check_alike, make_mlx, make_peft, peft_logits, there_and_back

N, K, E, D, WIDE, R = 9, 2, 4, 32, 64, 3  # tokens, experts of each, experts, model, width of an expert, rank
BLOCK = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (E, WIDE, D), "up_proj": (E, WIDE, D), "down_proj": (E, D, WIDE)}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FOLDERS: dict[str, object] = {}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Return a maker of tiny models, one of each family."""

    def make(title="Qwen 3 MoE"):
        if title not in FOLDERS:
            _, family, settings = next(one for one in MIXTURES if one[0] == title)
            FOLDERS[title] = as_on_the_hub(save(tmp_path_factory.mktemp("mixture") / "model", family, settings))
        return FOLDERS[title]

    return make


def draw(*, quantized, adapted=STACKED):
    """Return x, the chosen experts and their weights, the incoming gradient, and every stack's W, A, B and packed W."""
    random = np.random.default_rng(0)
    chosen = np.stack([random.permutation(E - 1)[:K] for _ in range(N)])  # the last expert gets nothing
    stacks = {}
    for leaf, (_, out, width) in SHAPES.items():
        weight = random.standard_normal((E, out, width)).astype(np.float32) / np.float32(np.sqrt(width))
        packed = None
        if quantized:
            codec = AffineQuantizer(Scheme("affine", 4, 32))
            packed = one_below_another([codec.quantize(Tensor("F32", one)) for one in weight])
            weight = to_float32(codec.dequantize(packed)).reshape(E, out, width)
        rank = R if leaf in adapted else 0
        A, B = (random.standard_normal(size).astype(np.float32) for size in ((E, rank, width), (E, out, rank)))
        stacks[leaf] = SimpleNamespace(weight=weight, packed=packed, A=A, B=B)
    x, dy = (random.standard_normal((N, D)).astype(np.float32) for _ in range(2))
    return x, chosen, random.random((N, K), dtype=np.float32), dy, stacks


def wanted(x, chosen, weights, dy, stacks, *, scale):
    """Return output, dx, the gradient of the chosen experts' weights, and every dA and dB in float64."""
    y, dx, dweights = np.zeros((N, D)), np.zeros((N, D)), np.zeros((N, K))
    grads = {leaf: (np.zeros(one.A.shape), np.zeros(one.B.shape)) for leaf, one in stacks.items()}
    for n, k in np.ndindex(N, K):
        e = chosen[n, k]
        parts = {leaf: (one.weight[e], one.A[e], one.B[e]) for leaf, one in stacks.items()}
        forward = {leaf: lambda x, p=p: reference.lora(x, p[0], None, p[1], p[2], scale) for leaf, p in parts.items()}
        row = x[n][None].astype(np.float64)
        gate, up = forward["gate_proj"](row), forward["up_proj"](row)
        share = 1 / (1 + np.exp(-gate))
        unit = gate * share * up
        own = forward["down_proj"](unit)
        y[n] += weights[n, k] * own[0]
        dweights[n, k] = own[0] @ dy[n]
        back = {"down_proj": reference.lora_backward(weights[n, k] * dy[n][None], unit, *parts["down_proj"], scale)}
        d = back["down_proj"].x
        slopes = {"gate_proj": d * up * (share + gate * share * (1 - share)), "up_proj": d * gate * share}
        back |= {leaf: reference.lora_backward(slope, row, *parts[leaf], scale) for leaf, slope in slopes.items()}
        dx[n] += back["gate_proj"].x[0] + back["up_proj"].x[0]
        for leaf, found in back.items():
            grads[leaf][0][e] += found.A
            grads[leaf][1][e] += found.B
    return y, dx, dweights, grads


def spec_of(adapted):
    return AdapterSpec("lora", R, 2.0 * R, 0.0, tuple(f"{BLOCK}.{leaf}" for leaf in STACKED if leaf in adapted))


def run_torch(x, chosen, weights, dy, stacks, *, adapted):
    import torch

    from torch_backend.experts import QuantizedExperts, attach_experts

    root = torch.nn.Module()
    root.model = torch.nn.Module()
    root.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    root.model.layers[0].mlp = owner = torch.nn.Module()
    if stacks["down_proj"].packed is None:
        owner.experts = torch.nn.Module()
        fused = np.concatenate([stacks["gate_proj"].weight, stacks["up_proj"].weight], axis=1)
        owner.experts.gate_up_proj = torch.nn.Parameter(torch.tensor(fused))
        owner.experts.down_proj = torch.nn.Parameter(torch.tensor(stacks["down_proj"].weight))
        owner.experts.act_fn = torch.nn.SiLU()
    else:
        packed = {leaf: one.packed for leaf, one in stacks.items()}
        owner.experts = QuantizedExperts(packed, number=E, activation=torch.nn.SiLU())
    attach_experts(root.requires_grad_(False), spec_of(adapted), {f"{BLOCK}.{leaf}": SHAPES[leaf] for leaf in STACKED})
    leaves = []
    for leaf in adapted:
        pair = getattr(owner.experts, leaf)
        pair.lora_A.data, pair.lora_B.data = torch.tensor(stacks[leaf].A), torch.tensor(stacks[leaf].B)
        leaves += [pair.lora_A, pair.lora_B]
    x, weights = torch.tensor(x, requires_grad=True), torch.tensor(weights, requires_grad=True)
    y = owner.experts(x, torch.tensor(chosen), weights)
    dx, dweights, *grads = (
        grad.numpy() for grad in torch.autograd.grad((y * torch.tensor(dy)).sum(), [x, weights, *leaves])
    )
    return y.detach().numpy(), dx, dweights, {leaf: (grads[2 * n], grads[2 * n + 1]) for n, leaf in enumerate(adapted)}


def run_mlx(x, chosen, weights, dy, stacks, *, adapted):
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.models.switch_layers import SwitchGLU

    from mlxlora.experts import QuantizedExperts, attach_experts

    root, block = nn.Module(), SwitchGLU(D, WIDE, E)
    root.model = nn.Module()
    root.model.layers = [nn.Module()]
    root.model.layers[0].mlp = nn.Module()
    root.model.layers[0].mlp.switch_mlp = block
    for leaf, one in stacks.items():
        block[leaf] = QuantizedExperts(one.packed, E) if one.packed else block[leaf]
        if one.packed is None:
            block[leaf].weight = mx.array(one.weight)
    shapes = {f"{BLOCK}.{leaf}": SHAPES[leaf] for leaf in STACKED}
    attach_experts(root, spec_of(adapted), shapes, "qwen3_moe")
    flat = [mx.array(array) for leaf in adapted for array in (stacks[leaf].A, stacks[leaf].B)]

    def forward(x, weights, *factors):
        for n, leaf in enumerate(adapted):
            block[leaf].lora_A, block[leaf].lora_B = factors[2 * n], factors[2 * n + 1]
        return (block(x, mx.array(chosen)) * weights[..., None]).sum(axis=-2)

    arrays = (mx.array(x), mx.array(weights), *flat)
    grads = mx.grad(lambda *own: (forward(*own) * mx.array(dy)).sum(), argnums=tuple(range(len(arrays))))(*arrays)
    dx, dweights, *found = map(np.array, grads)
    factors = {leaf: (found[2 * n], found[2 * n + 1]) for n, leaf in enumerate(adapted)}
    return np.array(forward(*arrays)), dx, dweights, factors


def close(found, exact):
    assert np.abs(found - exact).max() <= tolerances.LOWRANK * np.abs(exact).max()


@pytest.mark.parametrize("run", [run_mlx, run_torch], ids=["mlx", "torch"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("adapted", [STACKED, ("down_proj",), ("gate_proj", "up_proj")], ids=" ".join)
def test_outputs_and_gradients_of_experts_are_those_of_the_reference(run, quantized, adapted):
    """The router's too, by way of the experts' weights; an expert that nobody chose gets zeros."""
    x, chosen, weights, dy, stacks = draw(quantized=quantized, adapted=adapted)
    y, dx, dweights, grads = run(x, chosen, weights, dy, stacks, adapted=adapted)
    exact_y, exact_dx, exact_dweights, exact_grads = wanted(x, chosen, weights, dy, stacks, scale=2.0)
    for found, exact in ((y, exact_y), (dx, exact_dx), (dweights, exact_dweights)):
        close(found, exact)
    for leaf in adapted:
        for found, exact in zip(grads[leaf], exact_grads[leaf], strict=True):
            close(found, exact)
            assert not found[E - 1].any()


def test_many_rows_sorted_by_mlx_lm_give_what_few_give():
    """mlx-lm sorts rows by expert from 64 on."""
    x, chosen, weights, dy, stacks = draw(quantized=False)
    _, dx, _, grads = run_mlx(x, chosen, weights, dy, stacks, adapted=STACKED)
    many = [np.tile(array, (5, 1)) for array in (x, chosen, weights, dy)]
    _, wide_dx, _, wide_grads = run_mlx(*many, stacks, adapted=STACKED)
    close(wide_dx, np.tile(dx, (5, 1)))
    for leaf in STACKED:
        for found, exact in zip(wide_grads[leaf], grads[leaf], strict=True):
            close(found, 5 * exact)


TITLES = [title for title, *_ in MIXTURES]
PEFT_S = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}


@pytest.mark.parametrize(
    ("title", "options"),
    [
        *((title, {}) for title in TITLES),
        ("Qwen 3 MoE", {"r": 3, "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}}),
        ("Qwen 3 MoE", {"use_rslora": True}),
        ("Mixtral", {"target_modules": [], "target_parameters": PARAMETERS[:1]}),
        ("Mixtral", {"target_parameters": ["model.layers.1.mlp.experts.down_proj"]}),
    ],
)
def test_peft_s_adapters_of_experts_in_mlx_lm_and_back(mixture, tmp_path, title, options):
    """Here gate and up share one A, which PEFT draws for both."""
    source = make_peft(mixture(title), tmp_path / "peft", **{**PEFT_S, **options})
    check_alike(mixture(title), source, there_and_back(source, tmp_path, to="mlx", base=str(mixture(title))))


@pytest.mark.parametrize(
    ("title", "keys"),
    [
        *((title, None) for title in TITLES),
        ("Qwen 3 MoE", ["mlp.switch_mlp.up_proj", "self_attn.q_proj"]),
        ("Mixtral", ["block_sparse_moe.switch_mlp.down_proj"]),
    ],
)
def test_mlx_lm_s_adapters_of_experts_in_peft_and_back(mixture, tmp_path, title, keys):
    """Here gate and up have matrices of their own, which PEFT gets in blocks."""
    block = "block_sparse_moe" if title == "Mixtral" else "mlp"
    keys = keys or ["self_attn.v_proj", *(f"{block}.switch_mlp.{leaf}" for leaf in STACKED)]
    source = make_mlx(mixture(title), tmp_path / "mlx", keys=keys)
    check_alike(mixture(title), there_and_back(source, tmp_path, to="peft"), source)


def one_by_one(folder, target, *, experts=4, **changes):
    """Write an adapter as PEFT did before transformers 5, each expert's linear layers apart."""
    random, tensors = np.random.default_rng(0), {}
    config = json.loads((folder / "config.json").read_text())
    for layer, expert, leaf, half in product(range(2), range(experts), ("w1", "w2", "w3"), "AB"):
        wide, deep = config["intermediate_size"], config["hidden_size"]
        out, width = (deep, wide) if leaf == "w2" else (wide, deep)
        name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}.lora_{half}.weight"
        values = 0.1 * random.standard_normal((4, width) if half == "A" else (out, 4))
        tensors[name] = Tensor("F32", values.astype(np.float32))
    target.mkdir()
    save_file(target / "adapter_model.safetensors", tensors.items(), metadata={"format": "pt"})
    old = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"]}
    (target / "adapter_config.json").write_text(json.dumps({**old, **changes}))
    return target


def test_adapters_of_single_experts_that_peft_wrote_before_are_read(mixture, tmp_path):
    """PEFT turns them into what transformers 5 has when it loads them."""
    base = mixture("Mixtral")
    old = one_by_one(base, tmp_path / "old")
    convert(old, to="mlx", output=tmp_path / "mlx", base=str(base))
    check_alike(base, old, tmp_path / "mlx")
    for changes, words in (({"experts": 3}, "has shape"), ({"use_dora": True}, "DoRA of experts")):
        odd = one_by_one(base, tmp_path / words[:3], **changes)
        with pytest.raises((AdapterError, CapabilityError), match=words):
            check_fit(read_adapter(odd), load("torch", base).info)
    with pytest.raises(AdapterError, match="are no stack"):
        read_adapter(one_by_one(base, tmp_path / "ranks", rank_pattern={"experts.1.w1": 2}))


def test_names_of_experts_in_mlx_lm_need_the_base(mixture, tmp_path):
    source = make_peft(mixture(), tmp_path / "peft", **PEFT_S)
    config = json.loads((source / "adapter_config.json").read_text()) | {"base_model_name_or_path": "of/nobody"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CapabilityError, match=r"experts .* calls differently in each family"):
        convert(source, to="mlx", output=tmp_path / "mlx")


def test_tensors_of_experts_that_the_config_does_not_name_are_refused(mixture, tmp_path):
    source = make_peft(mixture(), tmp_path / "peft", **PEFT_S)
    file = source / "adapter_model.safetensors"
    tensors = {name: one for name, one in load_file(file).items() if "layers.1.mlp.experts.lora_B" not in name}
    save_file(file, tensors.items(), metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r'"model.layers.1.mlp.experts.lora_B" is missing'):
        read_adapter(source)


@pytest.mark.parametrize("title", TITLES)
def test_fused_experts_give_the_adapter_s_logits(mixture, tmp_path, title):
    source = make_peft(mixture(title), tmp_path / "peft", **PEFT_S)
    fuse(str(mixture(title)), adapter=str(source), output=str(tmp_path / "fused"))
    wanted_logits, ids = peft_logits(mixture(title), source), [[5, 90, 17, 200, 33, 64, 8, 120, 91]]
    for backend in sorted(BACKENDS):
        trial = Trial(tmp_path / "fused", backend, rows())
        trial.model = load(backend, tmp_path / "fused")
        bound = tolerances.LOGITS * max(np.abs(wanted_logits).max() / 10, 1)
        np.testing.assert_allclose(trial.logits(ids[0]), wanted_logits, atol=bound, rtol=0)


@pytest.mark.parametrize("method", ["concat", "linear", "svd"])
def test_merged_adapters_of_experts_are_the_sum_of_changes(mixture, tmp_path, method):
    one = make_peft(mixture(), tmp_path / "one", **PEFT_S)
    keys = ["self_attn.q_proj", *(f"mlp.switch_mlp.{leaf}" for leaf in STACKED)]
    two = make_mlx(mixture(), tmp_path / "two", keys=keys)
    pair = (one, one) if method == "linear" else (one, two)
    options = {"rank": 8} if method == "svd" else {}
    merge([f"{pair[0]}=0.5", f"{pair[1]}=2"], output=tmp_path / "sum", method=method, base=str(mixture()), **options)
    found, exact = change_of(tmp_path / "sum"), 0.5 * change_of(pair[0]) + 2 * change_of(pair[1])
    if method == "linear":  # of A and B, each with the roots of its weights
        exact = change_of(one) * (0.5**0.5 + 2**0.5) ** 2
    np.testing.assert_allclose(found, exact, atol=1e-6 * np.abs(exact).max())
    check_alike(mixture(), tmp_path / "sum", tmp_path / "sum")


def test_ties_of_experts_are_refused(mixture, tmp_path):
    one = make_peft(mixture(), tmp_path / "one", **PEFT_S)
    with pytest.raises(CapabilityError, match="ties trims by PEFT's tensors"):
        merge([f"{one}=0.5", f"{one}=2"], output=tmp_path / "sum", method="ties", density=0.5)


def change_of(folder, module="model.layers.1.mlp.experts.up_proj"):
    """Return scale * B A of a stack, float64."""
    adapter = read_adapter(folder)
    A, B = (to_float32(adapter.tensors[f"{module}.{leaf}"]).astype(np.float64) for leaf in ("lora_A", "lora_B"))
    return adapter.spec.scale_of(module) * (B @ A)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_experts_quantized_at_load_train_alike(mixture, optimizer):
    losses = {}
    for backend in sorted(BACKENDS):
        trial = Trial(mixture(), backend, rows(), targets=["all-linear", "experts"])
        trial.options = {"quantization": parse_scheme("affine-4bit-g32")}
        model, _, _ = trial.fresh()
        trainer = find_backend(backend).trainer(model, objective="sft", optimizer=Method(optimizer))
        batch = [make_batch(trial.examples, range(len(trial.examples)))]
        losses[backend] = [trainer.step(batch, update(step)).result().loss for step in range(1, 9)]
    np.testing.assert_allclose(losses["mlx"], losses["torch"], rtol=tolerances.CURVE)
    assert losses["mlx"][-1] < losses["mlx"][0] - 0.05


@pytest.mark.parametrize("title", TITLES)
def test_the_estimate_counts_the_experts_that_are_trained(mixture, title):
    shape, model = read_shape(open_folder(mixture(title))), load("mlx", mixture(title))
    assert shape.info.experts == model.info.experts
    spec = resolve(AdapterConfig(targets=["all-linear", "experts"]), model.info)
    model.attach(spec)
    assert num_trained(shape, spec) == sum(value.size for value in model.parameters.values())
    assert shape.unit == 2 * (128 if title == "Mixtral" else 32)  # of the two experts that a token gets


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"targets": ["experts"], "type": "dora"}, "dora of experts"),
        ({"targets": ["experts"], "dropout": 0.1}, "dropout with experts"),
        ({"targets": ["experts.up_proj"]}, "one tensor in transformers and PEFT"),
        ({"targets": ["experts"], "rank_pattern": {"experts.up_proj": 2}}, "one tensor in transformers and PEFT"),
        ({"targets": ["up_proj"]}, '"up_proj" matches no linear module[^$]*experts.up_proj means that of the experts'),
        ({"targets": ["q_proj"], "modules_to_save": ["experts"]}, 'modules_to_save: "experts" matches no module'),
    ],
)
def test_adapters_of_experts_that_a_library_could_not_compute_are_refused(mixture, settings, word):
    with pytest.raises(ConfigError, match=word):
        resolve(AdapterConfig(**settings), load("torch", mixture()).info)


def test_experts_are_adapted_only_where_a_target_says_so(mixture):
    info = load("torch", mixture("Qwen 2 MoE")).info
    assert not any("mlp.experts" in name for name in resolve(AdapterConfig(), info).modules)
    assert not any("mlp.experts" in name for name in resolve(AdapterConfig(targets=["up_proj"]), info).modules)
    every = resolve(AdapterConfig(targets=["all-linear", "experts"], layers=1), info)
    assert set(resolve(AdapterConfig(layers=1), info).modules) < set(every.modules)
    assert sum("mlp.experts" in name for name in every.modules) == len(STACKED)
    for backend in sorted(BACKENDS):
        assert load(backend, mixture("Qwen 2 MoE")).info.experts == info.experts

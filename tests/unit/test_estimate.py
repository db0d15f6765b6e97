"""The estimate's formulas: exact where bytes are known beforehand, monotone and linear where they are fitted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.adapters.spec import resolve
from shared.config import RunConfig
from shared.config_file import build_config
from shared.errors import ConfigError, OutOfMemory
from shared.estimate import memory
from shared.estimate.costs import ASSUMED, BORROWED, MEASURED, is_measured
from shared.estimate.duration import UTILISATION, operations, update_time
from shared.estimate.machines import GIB, Machine, gpu, here, mac, machines, parse_memory, physical_memory
from shared.estimate.memory import (
    Estimate,
    Work,
    estimate,
    kept_inputs,
    num_trained,
    trained_shapes,
    weight_bytes,
)
from shared.estimate.plan import (
    COMFORT,
    Lengths,
    check_fits,
    decide,
    fit_changes,
    largest_where,
    largest_work,
    longest_length,
    made_lengths,
    with_settings,
)
from shared.estimate.report import fit, make_report, read_lengths, write_config
from shared.estimate.shapes import Shape, read_shape
from shared.folder import open_folder
from shared.jobs.prepare import prepare
from shared.quant.affine import AffineQuantizer
from shared.registry import find_backend
from shared.schemes import parse_scheme
from shared.types import AdapterSpec, Scheme, Tensor

PLACES = ("mlx-cpu", "mlx-gpu", "torch-cpu", "torch-gpu")


def make_config(model: Path | str = "m", **changes: Any) -> RunConfig:
    values = {"model": str(model), "data": {"path": "d"}, "backend": "torch"}
    config = build_config({**values, "train": {"dtype": "float32", "batch_size": 8}})
    return with_settings(config, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture
def shape(tiny_model_folder: Callable[..., Path]) -> Shape:
    return read_shape(open_folder(tiny_model_folder()))


def peak(shape: Shape, work: Work, *, place: str = "torch-cpu", recompute: bool = False, **changes: Any) -> Estimate:
    return estimate(make_config(**changes), shape, work, place=place, recompute=recompute)


def test_the_shape_is_read_from_headers(shape):
    assert (shape.width, shape.attention, shape.keys, shape.mlp, shape.heads) == (64, 64, 32, 128, 4)
    assert shape.info.num_layers == 2
    assert shape.info.linears["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert len(shape.info.linears) == 14
    assert not shape.tied


def test_a_tied_head_is_counted_once(tiny_model_folder):
    shape = read_shape(open_folder(tiny_model_folder(tied=True)))
    assert shape.tied
    assert "lm_head.weight" not in shape.floats


def test_weight_bytes_are_those_of_the_file_and_double_from_bfloat16_to_float32(tiny_model_folder):
    folder = open_folder(tiny_model_folder())
    shape = read_shape(folder)
    stored = sum(entry.end - entry.start for entry in folder.entries.values())
    assert weight_bytes(shape, dtype="float32", scheme=None) == stored
    assert weight_bytes(shape, dtype="bfloat16", scheme=None) * 2 == stored


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_packed_bytes_are_exact_against_the_codec(bits, group, dtype):
    scheme = Scheme("affine", bits, group)
    weight = Tensor(dtype, np.zeros((32, 256), dtype=np.float32 if dtype == "F32" else np.uint16))
    arrays = AffineQuantizer(scheme).quantize(weight).arrays.values()
    size = sum(tensor.data.nbytes for tensor in arrays)
    assert AffineQuantizer(scheme).num_bytes((32, 256), scale_bytes=4 if dtype == "F32" else 2) == size


def test_a_base_quantized_at_load_weighs_its_packed_layers_and_its_float_rest(shape):
    scheme = parse_scheme("affine-4bit-g64")
    assert scheme is not None
    packed = sum(AffineQuantizer(scheme).num_bytes(size, scale_bytes=4) for size in shape.info.linears.values())
    rest = sum(n for name, (n, _) in shape.floats.items() if name.removesuffix(".weight") not in shape.info.linears)
    assert weight_bytes(shape, dtype="float32", scheme=scheme) == packed + 4 * rest


def test_layers_that_do_not_divide_into_groups_stay_float(shape):
    scheme = parse_scheme("affine-4bit-g128")  # only down_proj, 128 wide, divides
    assert scheme is not None
    packed = [size for name, size in shape.info.linears.items() if name.endswith("down_proj")]
    whole = weight_bytes(shape, dtype="float32", scheme=None)
    saved = sum(4 * math.prod(size) - AffineQuantizer(scheme).num_bytes(size, scale_bytes=4) for size in packed)
    assert weight_bytes(shape, dtype="float32", scheme=scheme) == whole - saved


def test_trained_parameters_are_rank_times_the_widths_or_all(shape):
    lora = resolve(make_config(adapter__rank=4).adapter, shape.info)
    assert num_trained(shape, lora) == 4 * sum(out + wide for out, wide in shape.info.linears.values())
    full = resolve(make_config(adapter__type="none").adapter, shape.info)
    assert num_trained(shape, full) == sum(n for n, _ in shape.floats.values())


def test_inputs_that_modules_share_are_kept_once(shape):
    every = resolve(make_config().adapter, shape.info)
    assert kept_inputs(shape, every) == 2 * (64 + 64 + 64)  # q/k/v, o, gate/up; what down reads is made again
    queries = resolve(make_config(adapter__targets=["q_proj", "v_proj"]).adapter, shape.info)
    assert kept_inputs(shape, queries) == 2 * 64


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_positions_never_need_less_and_activations_are_linear_in_them(shape, place, recompute, adapter, dtype):
    options = {"place": place, "recompute": recompute, "adapter__type": adapter, "train__dtype": dtype}
    found = [peak(shape, Work(256 * n, 256, 256 * n), **options) for n in (1, 2, 4, 64)]
    peaks = [one.peak for one in found]
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0]
    one, two, four = (part["activations"] + part["layer"] for part in found[:3])
    assert abs(two - one - (four - two) / 2) <= 8  # bytes: each part is rounded


@pytest.mark.parametrize("place", ["mlx-cpu", "torch-cpu"])
def test_longer_rows_cost_nothing_where_attention_goes_by_blocks(shape, place):
    short, long = Work(4096, 128, 64), Work(4096, 4096, 64)
    assert peak(shape, long, place=place).peak == pytest.approx(peak(shape, short, place=place).peak, rel=0.05)


@pytest.mark.parametrize("place", PLACES)
def test_recompute_keeps_less(shape, place):
    work = Work(8192, 256, 64)
    assert peak(shape, work, place=place, recompute=True)["activations"] < peak(shape, work, place=place)["activations"]


def test_on_mlx_gradients_stand_beside_activations_where_an_update_has_more_micro_batches(shape):
    def at_peak(count, place):
        found = peak(shape, Work(8192, 256, 8192, count), place=place, adapter__type="none")
        assert found.moment in ("backward", "loss")
        return "gradients" in {part.name for part in found.parts if part.at_peak}

    assert not at_peak(1, "mlx-cpu")
    assert at_peak(2, "mlx-cpu")
    assert at_peak(1, "torch-cpu")


def test_optimizer_and_gradients_are_exact(shape):
    trained = num_trained(shape, resolve(make_config().adapter, shape.info))
    found = peak(shape, Work(64, 64, 64))
    assert (found["adapter"], found["optimizer"], found["gradients"]) == (4 * trained, 8 * trained, 4 * trained)
    full = peak(shape, Work(64, 64, 64), adapter__type="none", train__dtype="bfloat16")
    every = sum(n for n, _ in shape.floats.values())
    assert (full["weights"], full["adapter"], full["optimizer"]) == (2 * every, 0, 12 * every)  # a float32 master


@pytest.mark.parametrize(
    ("name", "state", "words"), [("lion", "float32", 1), ("muon", "float32", 1), ("sgd", "8bit", 65 / 256)]
)
def test_an_optimizer_that_keeps_one_moment_needs_half(shape, name, state, words):
    trained = num_trained(shape, resolve(make_config().adapter, shape.info))
    found = peak(shape, Work(64, 64, 64), optimizer__name=name, optimizer__state=state)
    assert found["optimizer"] == round(4 * words * trained)


def test_adafactor_keeps_rows_and_columns_of_matrices(shape):
    found = peak(shape, Work(64, 64, 64), adapter__type="none", optimizer__name="adafactor")
    matrices = {
        name: sizes
        for name, sizes in trained_shapes(shape, AdapterSpec("none", 1, 1.0, 0.0, ())).items()
        if len(sizes) == 2
    }
    vectors = sum(n for name, (n, _) in shape.floats.items() if name not in matrices)
    assert found["optimizer"] == 4 * (vectors + sum(sum(sizes) for sizes in matrices.values()))
    assert len(matrices) == len([name for name in shape.floats if "norm" not in name])


def test_parts_at_the_peak_add_up_to_it(shape):
    for work in (Work(64, 64, 64), Work(65536, 256, 1024), Work(64, 64, 64)):
        found = peak(shape, work)
        assert found.peak == sum(part.bytes for part in found.parts if part.at_peak)
        assert found.moment in ("loading", "backward", "last layer", "loss", "update")


def test_layers_below_the_first_adapted_one_keep_nothing(shape):
    work = Work(8192, 256, 64)
    one, both = peak(shape, work, adapter__layers=1), peak(shape, work)
    assert abs(2 * one["activations"] - both["activations"]) <= 2  # bytes: both are rounded


def test_every_place_has_factors_for_every_dtype_and_kind():
    sources = {place.split("-")[0] + "-cpu" for place in PLACES}
    assert {(source, "float32", full) for source in sources for full in (False, True)} <= {*MEASURED, *ASSUMED}
    assert {source for source, _ in BORROWED.values()} == sources
    assert not set(MEASURED) & set(ASSUMED)
    assert is_measured("mlx-cpu", "float32", full=False)
    assert not is_measured("torch-gpu", "float32", full=False)


def big(gigabytes: float) -> Machine:
    return Machine("a machine", "torch-cpu", int(gigabytes * GIB))


def test_auto_settings_go_from_fast_to_small_and_stay_comfortable(shape):
    lengths = Lengths([512] * 8, [256] * 8, known=True)
    config = make_config()
    free = decide(config, shape, lengths, big(64))
    assert (free.micro_tokens, free.recompute, free.fits) == (1024, False, True)
    needs = free.estimate.peak
    framework = free.estimate["framework"]
    seen = [(free.micro_tokens, free.recompute)]
    for share in np.linspace(1.0, 0.0, 60):
        limit = (framework + (needs - framework) * share) / COMFORT
        found = decide(config, shape, lengths, big(limit / GIB))
        if (found.micro_tokens, found.recompute) != seen[-1]:
            seen.append((found.micro_tokens, found.recompute))
        assert found.estimate.peak <= COMFORT * found.limit or (found.micro_tokens, found.recompute) == (512, True)
    assert seen[0] == (1024, False)
    assert seen[-1] == (512, True)  # one row of 512 tokens
    assert all(micro >= 1024 for micro, recompute in seen if not recompute)
    graphics = decide(config, shape, lengths, Machine("a machine", "torch-gpu", 64 * GIB))
    assert (graphics.micro_tokens, graphics.recompute) == (4096, False)


def test_what_the_config_fixes_stays_fixed(shape):
    config = make_config(train__micro_tokens=2048, train__recompute=False)
    found = decide(config, shape, made_lengths(256), big(0.001))
    assert (found.micro_tokens, found.recompute, found.fits) == (2048, False, False)


def test_a_run_that_cannot_fit_is_refused_with_what_would(shape):
    config = make_config(train__micro_tokens=65536, train__recompute=False, train__batch_size=256)
    lengths = Lengths([256] * 256, [256] * 256, known=True)
    needs = decide(config, shape, lengths, big(64)).estimate.peak
    machine = big(needs / GIB / 2)
    with pytest.raises(OutOfMemory, match="micro_tokens: ") as error:
        check_fits(decide(config, shape, lengths, machine), config, shape, lengths, machine)
    assert error.value.exit_code == 6
    changes = fit_changes(config, shape, lengths, machine)
    assert changes is not None
    assert "quantization" not in changes
    assert "data.max_length" not in changes
    fitting = with_settings(config, changes)
    check_fits(decide(fitting, shape, lengths, machine), fitting, shape, lengths, machine)


def test_where_factors_are_borrowed_only_what_is_sure_is_refused(shape):
    config = make_config(train__micro_tokens=65536, train__recompute=False, train__batch_size=256)
    lengths = Lengths([256] * 256, [256] * 256, known=True)
    needs = decide(config, shape, lengths, Machine("g", "torch-gpu", 64 * GIB)).estimate
    tight = Machine("g", "torch-gpu", needs.peak // 2)
    check_fits(decide(config, shape, lengths, tight), config, shape, lengths, tight)
    small = Machine("g", "torch-gpu", needs["weights"] // 2)
    with pytest.raises(OutOfMemory):
        check_fits(decide(config, shape, lengths, small), config, shape, lengths, small)


def test_the_longest_length_fits_and_more_would_not(shape):
    def needs(length: int) -> int:
        return peak(shape, Work(length, length, length), recompute=True).peak

    machine = Machine("a machine", "torch-cpu", int(needs(200) / COMFORT) + 1)
    assert longest_length(make_config(), shape, made_lengths(256), machine) == 192
    assert needs(192) <= COMFORT * machine.limit < needs(256)


def test_nothing_fits_into_nothing(shape):
    assert fit_changes(make_config(), shape, made_lengths(256), big(0.0001)) is None
    assert largest_where(lambda number: False, most=8) is None


def test_the_largest_micro_batch_is_bounded_by_rows_and_budget():
    lengths = Lengths([100, 100, 100], [50, 50, 50], known=True)
    assert largest_work(make_config(train__batch_size=2), lengths, micro_tokens=4096) == Work(200, 100, 100, 1)
    assert largest_work(make_config(), lengths, micro_tokens=250) == Work(200, 100, 100, 4)
    assert largest_work(make_config(), lengths, micro_tokens=10) == Work(100, 100, 50, 8)  # a row is never cut
    mixed = Lengths([100, 30], [10, 30], known=True)
    assert largest_work(make_config(), mixed, micro_tokens=250) == Work(250, 100, 250, 4)
    assert largest_work(make_config(), mixed, micro_tokens=4096).count == 2  # sorted, it may be cut


def test_a_mac_gives_what_metal_recommends():
    assert mac(16).limit == pytest.approx(10922.67 * 2**20, rel=1e-5)
    assert mac(64).limit == 48 * GIB
    assert [machine.name for machine in machines("mlx")][:2] == ["Mac 8 GB", "Mac 16 GB"]
    assert gpu(80).limit == 80 * GIB


def test_memory_is_read_from_text_and_this_machine():
    assert parse_memory("16gb", backend="mlx") == mac(16)
    assert parse_memory("24", backend="torch") == gpu(24)
    assert parse_memory(
        "here",
        backend="torch",
    ) == here("torch")
    assert 0 < here("mlx", device="cpu").limit <= physical_memory()
    with pytest.raises(ConfigError, match="16GB"):
        parse_memory("lots", backend="mlx")


def test_operations_are_four_per_weight_and_token_and_six_with_recompute(shape):
    config = make_config(train__batch_size=1)
    lengths = Lengths([1], [0], known=True)
    attention = 4 * 2 * 64
    assert operations(config, shape, lengths, recompute=False) == 4 * shape.info.num_parameters + 3 * attention
    assert operations(config, shape, lengths, recompute=True) == 6 * shape.info.num_parameters + 4 * attention
    one = Lengths([1], [1], known=True)
    head = operations(config, shape, one, recompute=False) - operations(config, shape, lengths, recompute=False)
    assert head == 4 * shape.width * shape.info.vocab_size


def test_time_is_operations_over_the_rate_that_is_used():
    found = update_time(1e12, backend="torch", place="torch-cpu", dtype="float32", tflops=2.0)
    assert found.seconds == pytest.approx(0.5 / UTILISATION)


def test_without_data_max_length_stands_in(tiny_model_folder, tmp_path):
    config = make_config(tiny_model_folder(), data__max_length=128)
    report = make_report(with_settings(config, {"data.path": str(tmp_path / "absent")}))
    assert (report.longest_row, report.rows_known) == (128, False)
    assert "stands in" in report.notes[0]


@pytest.mark.parametrize("streaming", [True, False])
def test_time_is_of_rows_chosen_at_random_by_weight_and_memory_of_the_longest(tiny_model_folder, tmp_path, streaming):
    """Ten of 3000 short rows are long, and of the other source every row is, but an epoch takes a twentieth of them."""
    sizes = {"short": [2000 if n % 300 == 7 else 5 + n % 9 for n in range(3000)], "long": [900] * 400}
    for name, lengths in sizes.items():
        rows = [json.dumps({"text": chr(97 + n % 26) * length}) for n, length in enumerate(lengths)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sources = [{"path": str(tmp_path / "short.jsonl")}, {"path": str(tmp_path / "long.jsonl"), "weight": 0.05}]
    config = make_config(tiny_model_folder(), data__path=sources, data__max_length=4096, data__streaming=streaming)
    base = open_folder(tiny_model_folder())
    whole = build_config(config.model_dump(), overrides=["data.streaming=false"])
    exact = [len(example.tokens) for example in prepare(whole).train]
    lengths, notes = read_lengths(config, base)
    assert lengths.num_fair == 500
    assert lengths.longest == max(exact)
    mean = (sum(exact[:3000]) + 0.05 * sum(exact[3000:])) / 3020
    assert np.mean(lengths.tokens[:500]) == pytest.approx(
        mean, rel=0.25
    )  # 3 standard errors; of all looked at: 13 mean
    assert np.mean(lengths.tokens) > 3 * mean
    assert notes[0].endswith("of 3400 rows, the longest included")
    mixed = replace(lengths, tokens=[*lengths.tokens[:500], 4096], supervised=[*lengths.supervised[:500], 4096])
    first, second = (operations(config, read_shape(base), some, recompute=False) for some in (lengths, mixed))
    assert first == second


def test_a_fitting_config_fits_and_is_never_written_over_another(tiny_model_folder, tmp_path):
    config = make_config(tiny_model_folder(), train__micro_tokens=2**20, train__batch_size=2**16, backend="mlx")
    fitting, changes = fit(with_settings(config, {"data.path": str(tmp_path)}), "8GB")
    assert changes
    assert set(changes) <= {"train.micro_tokens", "train.recompute"}
    write_config(fitting, tmp_path / "new.yaml")
    with pytest.raises(ConfigError, match="exists"):
        write_config(fitting, tmp_path / "new.yaml")


@pytest.mark.parametrize(
    ("ends", "follows", "chunks"),
    [
        ({"targets": ["q_proj", "embed_tokens"]}, True, True),
        ({"targets": ["q_proj", "embed_tokens"]}, False, False),
        ({"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False, False),
        ({"targets": ["q_proj"]}, True, False),
    ],
)
def test_the_loss_goes_by_chunks_where_the_head_is_trained(tiny_model_folder, ends, follows, chunks):
    """A tied head follows an adapted embedding only where the adapter says so."""
    folder = tiny_model_folder(tied=True)
    adapter = {**ends, "ensure_weight_tying": follows}
    config = build_config({"model": str(folder), "data": {"path": "d"}, "adapter": adapter})
    shape = read_shape(open_folder(folder))
    spec = resolve(config.adapter, shape.info)
    assert memory.trains_head(shape, spec) == chunks
    model = find_backend("torch").load_model(folder, dtype="float32", quantization=None, recompute=False, device="cpu")
    model.attach(spec)
    head = model.head.module
    assert (hasattr(head, "sft") or head.weight.requires_grad) == chunks


def test_chunks_are_those_of_the_backends():
    from mlxlora import attention
    from mlxlora import objectives as ours
    from torch_backend import objectives as theirs

    found = {"torch-cpu": theirs.CHUNK_ELEMENTS, "torch-gpu": theirs.CHUNK_ELEMENTS_CUDA}
    assert {**found, "mlx-cpu": ours.CHUNK_ELEMENTS, "mlx-gpu": ours.CHUNK_ELEMENTS} == memory.CHUNK_ELEMENTS
    found = {"torch-cpu": theirs.TILE_ELEMENTS, "torch-gpu": theirs.TILE_ELEMENTS_CUDA}
    found |= {"mlx-cpu": ours.TILE_ELEMENTS, "mlx-gpu": ours.TILE_ELEMENTS_GPU}
    assert (found, {"torch": theirs.TILE_ROWS, "mlx": ours.TILE_ROWS}) == (memory.TILE_ELEMENTS, memory.TILE_ROWS)
    assert memory.CHUNK_ROWS == ours.LEAST_ROWS == theirs.LEAST_ROWS
    assert memory.HEAD_BLOCK == ours.DECODED == theirs.DECODED
    assert memory.SCORE_ROWS == attention.BLOCK


@pytest.mark.parametrize("place", ["mlx-cpu", "torch-cpu"])
def test_a_family_with_a_unit_of_its_own_keeps_more(shape, place):
    other = replace(shape, info=replace(shape.info, family="phi3"))
    work = Work(8192, 256, 64)
    assert peak(other, work, place=place)["activations"] > peak(shape, work, place=place)["activations"]
    both = [peak(one, work, place=place, recompute=True)["activations"] for one in (other, shape)]
    assert both[0] == both[1]

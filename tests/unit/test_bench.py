"""The rows that users report, the size chosen for a machine, and the file that remembers its ceilings."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shared.ceilings import Ceilings, time_of, write_ceilings
from shared.errors import ConfigError, OutOfMemory, StorageError
from shared.machine import Machine, processor_name, this_machine
from shared.measuring import bench as bench_module
from shared.measuring.bench import (
    COLUMNS,
    SIZES,
    BenchResult,
    BenchRow,
    append,
    ceilings_path,
    check,
    choose_size,
    markdown_row,
    read_ceilings,
    report,
    weight_traffic,
)
from shared.measuring.measure import Updates, ask, ended

MACHINE = Machine("Apple M2 Max", cores=12, memory_bytes=64 * 2**30, system="macOS 26.1")
CEILINGS = Ceilings(
    backend="mlx", device="gpu", processor="Apple M2 Max",
    matmul_flop_per_s={"float32": 1.3e13, "bfloat16": 1.25e13}, copy_bytes_per_s=3.4e11, date="2026-11-20",
    versions={"mlx": "0.32.4"}, threads=None,
)  # fmt: skip
ROW = BenchRow(
    backend="mlx", device="Metal, Apple M2 Max", size="medium", num_parameters=308_000_000, adapter="QLoRA",
    quantization="affine-4bit-g64", dtype="bfloat16", tokens_per_s=4321.4, supervised_tokens_per_s=1500.0,
    update_s=0.5, first_update_s=1.0, update_times_s=(0.5, 0.5, 0.6), tokens=2160, positions=2200, micro_batches=2,
    recompute=False, peak_memory_bytes=3 * 2**29, loaded_memory_bytes=2**29, matmul_share=0.412, bandwidth_share=0.037,
)  # fmt: skip
RESULT = BenchResult(MACHINE, (ROW,), (CEILINGS,), "mlxlora bench --size medium", None)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Return a cache folder of this test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_a_markdown_row_says_what_ran_on_what_and_how_to_repeat_it():
    found = dict(zip(COLUMNS, cells(markdown_row(RESULT, ROW, CEILINGS)), strict=True))
    assert found["chip"] == "Apple M2 Max, 12 cores"
    assert (found["memory"], found["system"], found["date"]) == ("64 GiB", "macOS 26.1", "2026-11-20")
    assert (found["backend"], found["device"]) == ("mlx", "Metal, Apple M2 Max")
    assert (found["model"], found["adapter"], found["dtype"]) == ("medium (308M)", "QLoRA", "bfloat16")
    assert (found["tokens/s"], found["peak memory"]) == ("4,321", "1.50 GiB")
    assert (found["of matmul"], found["of bandwidth"]) == ("41%", "4%")
    assert found["matmul float32 / bfloat16, copy"] == "13 / 12.5 TFLOP/s, 340 GB/s"
    assert "mlx 0.32.4" in found["versions"]
    assert found["command"] == "`mlxlora bench --size medium`"


def test_a_name_with_a_bar_in_it_does_not_break_the_table():
    strange = replace(RESULT, machine=replace(MACHINE, processor="A | B"))
    assert len(cells(strange.lines[0])) == len(COLUMNS)


def test_rows_are_appended_under_one_head_and_nothing_else_is_touched(tmp_path):
    file = tmp_path / "bench.md"
    file.write_text("# Ours\n\nmachines:")  # no newline at its end
    append(file, RESULT)
    append(file, RESULT)
    lines = file.read_text().splitlines()
    assert lines[:4] == ["# Ours", "", "machines:", ""]
    assert [len(cells(line)) for line in lines[4:]] == [len(COLUMNS)] * 4
    assert lines[6] == lines[7] == RESULT.lines[0]
    fresh = tmp_path / "fresh.md"
    append(fresh, RESULT)
    assert fresh.read_text() == RESULT.table


def test_the_terminal_shows_figures_then_the_table_to_copy():
    text = report(RESULT)
    assert "mlx   QLoRA bfloat16 medium: 4,321 tokens/s, peak memory 1.5 GiB, 41% of the matmul ceiling" in text
    assert RESULT.table in text
    assert text.endswith("to report it, copy the table")
    assert report(replace(RESULT, output="bench.md")).endswith("appended to bench.md")


def test_what_can_be_known_beforehand_is_refused_at_once(tmp_path):
    good = {"size": "tiny", "backend": "torch", "dtype": "auto", "output": None}
    assert check(**good) == ["torch"]
    assert check(**{**good, "backend": "both"}) == ["mlx", "torch"]
    for option, value in (("size", "smal"), ("backend", "tensorflow"), ("dtype", "float16")):
        with pytest.raises(ConfigError, match=f"--{option}"):
            check(**{**good, option: value})
    for place in (tmp_path, tmp_path / "nowhere" / "bench.md"):
        with pytest.raises(StorageError, match="--output"):
            check(**{**good, "output": place})


def test_a_fast_machine_takes_a_larger_model_and_the_slower_backend_decides():
    slow = replace(CEILINGS, backend="torch", matmul_flop_per_s={"float32": 5e10, "bfloat16": 1e9})
    dtypes = {"mlx": "bfloat16", "torch": "float32"}
    rates = [1e10, 5e12, 1e15]
    names = [
        choose_size([replace(CEILINGS, matmul_flop_per_s={"bfloat16": rate, "float32": rate})], dtypes)
        for rate in rates
    ]
    order = list(SIZES)
    assert names[0] == "small"
    assert [order.index(name) for name in names] == sorted(order.index(name) for name in names)
    assert names[1] != names[0]
    assert choose_size([CEILINGS, slow], dtypes) == "small"


@pytest.mark.parametrize(
    ("quantization", "dtype", "linear"),
    [("none", "float32", 4.0), ("none", "bfloat16", 2.0), ("affine-4bit-g64", "bfloat16", 0.5625)],
)
def test_weights_are_read_once_per_direction_and_micro_batch(quantization, dtype, linear):
    shape = SIZES["tiny"].shape
    updates = Updates(1, 1, 1, micro_batches=3, first_s=1.0, times_s=(1.0,), cpu_s=(1.0,), loaded_memory_bytes=1,
                      peak_memory_bytes=1, recompute=False, loss=1.0)  # fmt: skip
    linears = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    head = (4 if dtype == "float32" else 2) * 512 * 64
    found = weight_traffic(shape, updates, quantization=quantization, dtype=dtype)
    assert found == 2 * 3 * (linear * linears + head)


def test_ceilings_come_back_as_they_were_kept_each_backend_and_device_apart(cache):
    assert read_ceilings("mlx", "gpu") is None
    mine = replace(CEILINGS, processor=processor_name())
    other = replace(mine, backend="torch", device="cpu", copy_bytes_per_s=1e10)
    assert write_ceilings(mine) == write_ceilings(other) == ceilings_path()
    assert cache in ceilings_path().parents
    assert read_ceilings("mlx", "gpu") == mine
    assert read_ceilings("torch", "cpu") == other
    assert read_ceilings("torch", "gpu") is None
    write_ceilings(replace(mine, date="2026-12-01"))
    assert read_ceilings("mlx", "gpu") == replace(mine, date="2026-12-01")
    assert [file.name for file in ceilings_path().parent.iterdir()] == ["ceilings.json"]


def test_ceilings_of_another_machine_with_the_same_home_are_not_taken(cache):
    write_ceilings(replace(CEILINGS, processor="another processor"))
    assert read_ceilings("mlx", "gpu") is None


@pytest.mark.parametrize("text", ["", "[]", "{broken", '{"KEY": 3}', '{"KEY": {"backend": "mlx"}}'])
def test_a_damaged_cache_is_as_good_as_none_and_is_written_anew(cache, text):
    mine = replace(CEILINGS, processor=processor_name())
    ceilings_path().parent.mkdir(parents=True)
    ceilings_path().write_text(text.replace("KEY", f"mlx on gpu, {processor_name()}"))
    assert read_ceilings("mlx", "gpu") is None
    write_ceilings(mine)
    assert read_ceilings("mlx", "gpu") == mine


def test_rates_that_are_no_rates_are_not_taken(cache):
    write_ceilings(replace(CEILINGS, processor=processor_name(), copy_bytes_per_s=0.0))
    assert read_ceilings("mlx", "gpu") is None


def test_the_cache_is_where_the_platform_keeps_such_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    wanted = "Library/Caches" if sys.platform == "darwin" else ".cache"
    assert ceilings_path() == tmp_path / wanted / "mlxlora" / "ceilings.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert ceilings_path() == tmp_path / wanted / "mlxlora" / "ceilings.json"


def test_the_time_of_one_is_that_of_a_burst_divided():
    took = time_of(lambda times: time.sleep(0.004 * times))
    assert 0.004 <= took < 0.02


def test_this_machine_has_a_name_cores_and_memory():
    found = this_machine()
    assert found.processor
    assert found.cores >= 1
    assert found.memory_bytes > 2**28
    assert found.system.split()[0] in ("Linux", "macOS")


def test_an_error_of_the_measuring_process_arrives_as_itself(tmp_path):
    task = {
        "task": "updates", "backend": "torch",
        "config": {
            "folder": str(tmp_path), "rank": 8, "quantization": "none", "dtype": "float32", "recompute": False,
        },
        "rows": {**bench_module.rows_of("tiny")}, "effort": {"least": 1, "most": 1, "time_s": 0.0},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        ask(task)
    assert caught.value.exit_code == 3
    assert caught.value.fix


def test_a_measuring_process_that_was_killed_is_out_of_memory_and_one_that_broke_is_a_bug():
    assert isinstance(ended({"backend": "mlx"}, -9, ""), OutOfMemory)
    broken = ended({"backend": "mlx"}, 1, "Traceback ...")
    assert not isinstance(broken, OutOfMemory)
    assert "Traceback" in str(broken)
    assert json.dumps(str(broken))

"""`mlxlora bench` measures real updates on both backends, and its rows can be reported."""

from __future__ import annotations

import json

import pytest

from mlxlora.cli.main import run
from shared.measuring.bench import COLUMNS, SIZES, ceilings_path, header, read_ceilings


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a home and a cache folder of this test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.timeout(900)  # eight processes, each loading a framework: 30 s of processor time
def test_bench_measures_both_backends_and_appends_a_row_for_each_kind(cache, capfd):
    file = cache / "bench.md"
    assert run(["bench", "--size", "tiny", "--backend", "both", "--output", str(file), "--json"]) == 0
    out, said = capfd.readouterr()
    answer = json.loads(out.rstrip("\n").splitlines()[-1])
    assert answer["ok"] is True
    rows = answer["rows"]
    assert [(row["backend"], row["adapter"]) for row in rows] == [
        (backend, adapter) for backend in ("mlx", "torch") for adapter in ("LoRA", "QLoRA")
    ]
    for row in rows:
        assert (row["size"], row["num_parameters"]) == ("tiny", SIZES["tiny"].shape.num_parameters)
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["update_s"])
        assert len(row["update_times_s"]) >= 3
        assert 0 < row["loaded_memory_bytes"] <= row["peak_memory_bytes"]
        assert row["matmul_share"] > 0
        assert row["bandwidth_share"] > 0
    assert rows[0]["tokens"] == rows[2]["tokens"], "the same rows on both backends"
    known = {found["backend"]: found for found in answer["ceilings"]}
    for name, found in known.items():
        kept = read_ceilings(name, found["device"])
        assert kept is not None
        assert kept.copy_bytes_per_s == found["copy_bytes_per_s"]
    assert cache in ceilings_path().parents
    text = file.read_text()
    assert text == answer["table"]
    assert text.startswith(header()[0])
    assert len(text.splitlines()) == 6
    assert all(line.count("|") == len(COLUMNS) + 1 for line in text.splitlines())
    assert "mlxlora bench --backend both --size tiny" in text
    assert "note: tiny: writing a random Llama" in said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--size", "smal"], 2, 'did you mean "small"?'),
        (["--backend", "cuda"], 2, "--backend"),
        (["--dtype", "float16"], 2, "--dtype"),
        (["--output", "no/such/folder/bench.md"], 7, "--output"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(words, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["bench", *words]) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

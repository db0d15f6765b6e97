"""Rows 35 to 37 of the fault matrix: the network is slow, broken, or says no. Real clients, real sockets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.callbacks import Metrics
from shared.hub import commit_of, pinned
from shared.watching.sinks import sinks
from tests.loopback import COMMIT, Hub, serving, unused_port, with_status

STEPS = 30
PER_STEP_S = 0.05  # what training may wait for trackers
ROOT = Path(__file__).resolve().parents[2]
FIND = """
import json, sys
from shared.data.rows import find_data
from shared.errors import MlxloraError
from shared.folder import find_folder
for name in sys.argv[1:]:
    try:
        found = find_data(name[5:]) if name.startswith("data:") else find_folder(name)
        print(json.dumps([0, str(found)]))
    except MlxloraError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""
GUARDED = """
import os, sys
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print(event, arguments, file=sys.stderr, flush=True)
        os._exit(99)
sys.addaudithook(guard)
from mlxlora.cli.main import main
main()
"""


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., list[tuple[int, str]]]:
    """Return a function that looks for models in a fresh process: exit code, and path or error."""

    def run(*names: str, endpoint: str, **environment: str) -> list[tuple[int, str]]:
        settings = {
            "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", **environment,
        }  # fmt: skip
        command = [sys.executable, "-c", f"import shared.hub\nshared.hub.NO_ANSWER_S = 1\n{FIND}", *names]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=120)
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """Return a hub with weights of more than two of the client's pieces (10 MB), which are what it keeps."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(24_000_000))
    return Hub(folder)


def test_row_35_a_download_that_breaks_off_is_resumed_and_verified(hub, find):
    weights = hub.folder / "model.safetensors"
    hub.cut_at = 15_000_000
    with serving(hub) as address:
        [(code, found)] = find("org/name", endpoint=address)
        assert code == 0, found
        ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith(weights.name)]
        assert ranges == ["", f"bytes={10 * 2**20}-"]
        assert (Path(found) / weights.name).read_bytes() == weights.read_bytes()
        assert commit_of(Path(found)) == COMMIT
        hub.asked.clear()
        assert find(f"org/name@{COMMIT}", endpoint=address) == [(0, found)]
        assert hub.asked == [], "a commit that is here needs no request"


def test_row_35_a_file_damaged_on_its_way_is_detected_and_not_kept(hub, find):
    hub.spoil = True
    with serving(hub) as address:
        [(code, text)] = find("org/name", endpoint=address)
        assert (code, "model.safetensors was damaged on its way" in text) == (3, True), text
        hub.spoil = False
        [(code, text)] = find("org/name", endpoint=address)
    assert code == 0, text


SAYS = {
    "status-401": "wants a valid token (401)\nfix: set HF_TOKEN",
    "status-401-RepoNotFound": "knows no such model (401)\nfix: check the name; for a private one set HF_TOKEN",
    "status-403-GatedRepo": "does not let you in (403)\nfix: accept the terms at https://huggingface.co/org/",
    "status-404-RepoNotFound": "knows no such model (404)\nfix: check the name",
    "status-404-RevisionNotFound": 'has no revision "None" of it\nfix: choose one of',
    "status-429": "had too many requests from here (429)\nfix: wait some minutes",
    "status-500": "is out of order (500)\nfix: try again later",
    "status-503": "is out of order (503)\nfix: try again later",
    "hangs": "does not answer\nfix: try again later",
}


def test_row_36_every_refusal_of_the_hub_has_a_message_of_its_own(hub, find):
    with serving(hub) as address:
        found = find(*(f"org/{name}" for name in SAYS), "data:org/status-404", endpoint=address)
        hub.hang.set()
    for (name, says), (code, text) in zip(SAYS.items(), found, strict=False):
        assert (code, says in text, len(text.splitlines()) <= 3) == (3, True, True), (name, text)
    assert found[-1][0] == 2
    assert "knows no such dataset (404)" in found[-1][1]
    [(code, text)] = find("org/name", endpoint=f"http://127.0.0.1:{unused_port()}")
    assert (code, "cannot be reached\nfix: check the network" in text) == (3, True), text


def test_row_36_a_retry_after_is_honoured_up_to_a_minute(hub, find):
    hub.busy = (1,)
    with serving(hub) as address:
        began = time.monotonic()
        [(code, text)] = find("org/name", endpoint=address)
        assert (code, time.monotonic() - began > 1) == (0, True), text
    hub.busy = (3600,)
    with serving(hub) as address:
        [(code, text)] = find("org/name", endpoint=address, HF_HOME=str(hub.folder.parent / "other"))
    assert (code, "takes no requests (429) for the next 3600 s" in text) == (3, True), text


@pytest.mark.parametrize("command", ["preview", pytest.param("train", marks=pytest.mark.slow)])
def test_offline_makes_no_network_call(tiny_model_folder, find, tmp_path, command):
    """No address is looked up and no connection begun, whoever tries; and what is not downloaded is an error."""
    hub = Hub(shutil.copytree(tiny_model_folder(), tmp_path / "repository"))
    (hub.folder / "train.jsonl").write_text("".join(json.dumps({"text": "hello " * n}) + "\n" for n in range(1, 7)))
    settings = {"model": "org/name", "data": {"path": "org/rows"}, "output": str(tmp_path / "run"), "backend": "torch"}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**settings, "train": {"updates": 1, "dtype": "float32"}}))
    with serving(hub) as address:
        assert [code for code, _ in find("org/name", "data:org/rows", endpoint=address)] == [0, 0]
        hub.asked.clear()
        environment = {
            **os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"),
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", GUARDED, command, str(config), "--offline"],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        [(code, text)] = find("org/other", endpoint=address, HF_HUB_OFFLINE="1")
        assert (code, "is not downloaded, and the run is offline" in text) == (3, True), text
        assert hub.asked == []
    if command == "train":
        manifest = json.loads((tmp_path / "run/manifest.json").read_text())
        assert manifest["model"] == f"org/name@{COMMIT}"
        assert f"path: org/rows@{COMMIT}" in (tmp_path / "run/config.yaml").read_text()
        adapter = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/name", COMMIT)


@contextmanager
def broken(how: str):
    """Yield the address of a tracker that is down, slow or says no."""
    if how == "refuses":
        yield f"http://127.0.0.1:{unused_port()}"
        return
    stop = threading.Event()
    answers = {"hangs": lambda request: stop.wait(60), "401": with_status(401), "500": with_status(500)}
    with serving(answers[how]) as address:
        yield address
        stop.set()


SLOW = [
    pytest.param("mlflow", how, marks=pytest.mark.slow) for how in ("hangs", "401", "500")
] + [pytest.param("wandb", how, marks=pytest.mark.slow) for how in ("hangs", "401", "500", "refuses")]  # fmt: skip


@pytest.mark.parametrize(("name", "how"), [("mlflow", "refuses"), *SLOW])
def test_row_37_a_tracker_that_is_down_or_slow_never_holds_up_training(tmp_path, monkeypatch, name, how):
    (tmp_path / "config.yaml").write_text("model: m\n")
    notes: list[str] = []
    times: list[float] = []
    with broken(how) as address, sinks(tmp_path, [name], notes.append) as found:
        for variable in ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL"):
            monkeypatch.setenv(variable, address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        found.on_start({})
        deadline = time.monotonic() + 90
        step = 0
        while step < STEPS or (not notes and time.monotonic() < deadline):
            step += 1
            Metrics(tmp_path / "metrics.jsonl").write({"step": step, "loss": 1.0})
            began = time.perf_counter()
            found.on_update(step)
            times.append(time.perf_counter() - began)
            time.sleep(0.02)
        began = time.monotonic()
        found.end(finished=True, wait_s=1)
        assert time.monotonic() - began < 30
    assert sorted(times)[-2] < PER_STEP_S  # one for the machine's own pauses
    assert [row["step"] for row in Metrics(tmp_path / "metrics.jsonl").read()] == list(range(1, step + 1))
    assert len([note for note in notes if "training goes on" in note]) == 1, notes
    assert "not everything is sent" in notes[-1]
    assert not json.loads((tmp_path / "sinks" / f"{name}.json").read_text()).get("done")


def test_a_config_of_a_data_set_is_the_only_folder_that_is_downloaded(tmp_path, find):
    for name in ("main", "socratic"):
        (tmp_path / "repository" / name).mkdir(parents=True)
        (tmp_path / "repository" / name / "train.jsonl").write_text('{"text": "hello"}\n')
    hub = Hub(tmp_path / "repository")
    with serving(hub) as address:
        [(code, found), (other, text)] = find("data:org/name:main", "data:org/name:mian", endpoint=address)
        assert (code, Path(found).name) == (0, "main"), found
        assert sorted(str(file.relative_to(Path(found).parent)) for file in Path(found).parent.rglob("*.jsonl")) == [
            "main/train.jsonl"
        ]
        assert (other, text.splitlines()[0]) == (2, 'org/name has no files of a config "mian"')
        [(code, again)] = find(f"data:{pinned('org/name:main', Path(found))}", endpoint=address)
    assert (code, again) == (0, found)
    assert pinned("org/name:main", Path(found)) == f"org/name@{COMMIT}:main"

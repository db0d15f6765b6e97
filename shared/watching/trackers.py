"""The process of one tracker: follows metrics.jsonl of a run folder and sends its rows.

`python -m shared.watching.trackers NAME FOLDER`; the run is over when stdin ends. The file is the queue: rows wait
in it, however slow a tracker is, and what was not sent is sent when the run goes on. Every row is sent once.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from shared.durable import write_json
from shared.masking import mask
from shared.watching.report import read_manifest, read_settings
from shared.watching.sinks import FOLDER, LOOK_EVERY_S, WAIT_S, read_state

PROJECT = "mlxlora"
SILENT_S = 20  # a call that takes longer is worth a note
LONGEST_PAUSE_S = 60
MAX_NOTE = 200
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a tracker is told of a run: its folder, its settings one level deep, and the name it goes under."""

    folder: Path
    settings: Mapping[str, Any]
    run: str  # the same after a resume

    @property
    def name(self) -> str:
        """Return the name that people see."""
        return f"{self.folder.name}-{self.run[:6]}"


class Tracker(Protocol):
    """One library; calls may take their time and may fail."""

    def __init__(self, facts: Facts) -> None: ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, facts: Facts) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(facts.folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one event with all values."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))
        self.writer.flush()

    def close(self, *, finished: bool) -> None:
        """Close the event file."""
        self.writer.close()


class Trackio:
    """A run in trackio's own folder, which `trackio show` reads."""

    def __init__(self, facts: Facts) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run = trackio.init(
            project, name=facts.name, config=dict(facts.settings), resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one row."""
        self.run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:
        """Wait until everything is written."""
        self.run.finish()


class Wandb:
    """A run of Weights & Biases; its variables (WANDB_PROJECT, WANDB_MODE, WANDB_BASE_URL ...) have their meaning."""

    def __init__(self, facts: Facts) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=facts.name, id=facts.run, resume="allow",
            dir=facts.folder, config=dict(facts.settings),
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_stats=True),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one row; the library sends it when it can."""
        self.run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:
        """Wait until everything is sent."""
        self.run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """A run at MLFLOW_TRACKING_URI."""

    def __init__(self, facts: Facts) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # `send` tries again by itself
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client, name = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        ours = self.client.search_runs([experiment], f"tags.mlxlora_run = '{facts.run}'")
        self.run = ours[0] if ours else self.client.create_run(experiment, None, {"mlxlora_run": facts.run}, facts.name)
        self.run_id = self.run.info.run_id
        params = [Param(key, str(value)[:500]) for key, value in facts.settings.items()]
        self.client.log_batch(self.run_id, params=params[:100])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log one row in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self, *, finished: bool) -> None:
        """Mark the run as finished or failed."""
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "FAILED")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb, "mlflow": Mlflow}


@dataclass
class Tail:
    """The rows of a growing file; one that was replaced or cut is read from its beginning."""

    path: Path
    inode: int = 0
    offset: int = 0

    def rows(self) -> Iterator[Row]:
        """Yield the whole lines that have come since."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self.inode or found.st_size < self.offset:
                self.inode, self.offset = found.st_ino, 0
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield json.loads(line)


@dataclass
class Session:
    """One tracker at work: where it stands, and what the run must know of it."""

    name: str
    folder: Path
    say: Callable[[str], None]
    over: threading.Event = field(default_factory=threading.Event)
    finished: bool = False  # as the run says at its end
    busy_since: float | None = None
    troubled: bool = False

    def follow(self) -> None:
        """Send every row until the run is over; the state says how far it came."""
        state = {"run": uuid4().hex[:12], "step": -1, "kinds": [], **read_state(self.folder, self.name)}
        self.save(state)
        facts = Facts(self.folder, told(self.folder), state["run"])
        tracker = self.insist(lambda: TRACKERS[self.name](facts))
        tail, last = Tail(self.folder / "metrics.jsonl"), False
        while not last:
            last = self.over.is_set()  # looked at before reading: what was written before the end is read
            if sum(self.pass_on(tracker, row, state) for row in tail.rows()):
                self.save(state)
            self.over.wait(LOOK_EVERY_S)
        self.insist(lambda: tracker.close(finished=self.finished))
        self.save({**state, "done": self.finished})

    def pass_on(self, tracker: Tracker, row: Row, state: dict[str, Any]) -> bool:
        """Send one row unless it was sent before; return whether it was sent now."""
        step, kind = row["step"], "eval_loss" if any(key.startswith("eval_") for key in row) else "loss"
        if step < state["step"] or (step == state["step"] and kind in state["kinds"]):
            return False
        values = {key: float(value) for key, value in flat(row) if key != "step" and is_number(value)}
        self.insist(lambda: tracker.log(values, step))
        state["kinds"] = [kind, *(state["kinds"] if step == state["step"] else [])]
        state["step"] = step
        return True

    def insist(self, call: Callable[[], Any]) -> Any:
        """Return what a call gives; where it fails, say so once and try again, ever more seldom."""
        pause = 1.0
        while True:
            self.busy_since = time.monotonic()
            try:
                return call()
            except Exception as error:
                self.trouble(f"{type(error).__name__}: {error}")
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_S)
            finally:
                self.busy_since = None

    def trouble(self, text: str) -> None:
        """Say once that the tracker does not work."""
        if not self.troubled:
            self.troubled = True
            self.say(f"{text[:MAX_NOTE]}; training goes on, metrics.jsonl has everything")

    def watch(self) -> None:
        """Say where a call takes long."""
        while True:
            time.sleep(LOOK_EVERY_S)
            since = self.busy_since
            if since is not None and time.monotonic() - since > SILENT_S:
                self.trouble(f"no answer for {SILENT_S} s")

    def wait_for_end(self) -> None:
        """Wait for the run's end, and end this process in bounded time, whatever hangs."""
        text = sys.stdin.read()  # "" where the run was killed
        last = json.loads(text) if text else {"finished": False, "wait_s": WAIT_S}
        self.finished = bool(last["finished"])
        self.over.set()
        time.sleep(last["wait_s"])
        self.trouble("not everything could be sent in time")
        os._exit(1)

    def save(self, state: Row) -> None:
        """Write down how far this came."""
        write_json(self.folder / FOLDER / f"{self.name}.json", state)


def flat(row: Row) -> Iterator[tuple[str, Any]]:
    """Yield the values of a row under their names, those of a section as section/name.

    >>> dict(flat({"loss": 1.0, "grad_norms": {"layers.0.q_proj": 0.5}}))
    {'loss': 1.0, 'grad_norms/layers.0.q_proj': 0.5}
    """
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def is_number(value: Any) -> bool:
    """Return whether a value is one that a curve can be drawn of."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def told(folder: Path) -> dict[str, Any]:
    """Return manifest and config one level deep, without credentials."""
    flat = {**read_manifest(folder / "manifest.json"), **read_settings(folder)}
    return {key: mask(value) if isinstance(value, str) else value for key, value in flat.items()}


def main() -> None:
    """Follow a run with the tracker and the folder of the command line; what libraries print goes to stderr."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    voice = os.dup(1)
    os.dup2(2, 1)

    def say(text: str) -> None:
        os.write(voice, " ".join(mask(text).split()).encode() + b"\n")

    session = Session(name, folder, say)
    for target in (session.wait_for_end, session.watch):
        threading.Thread(target=target, daemon=True).start()
    with (folder / FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a run that was killed may still be sending
        session.follow()
    os._exit(0)  # a library's own goodbyes may hang


if __name__ == "__main__":
    main()

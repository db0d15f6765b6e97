"""Trackers beside metrics.jsonl: one process each, which follows that file, so that training never waits on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from shared.errors import CapabilityError, ConfigError
from shared.hub import is_offline

INSTALL = {  # name in log.to, which also is the package -> what to install
    "tensorboard": "pip install tensorboard",
    "trackio": "pip install trackio",
    "wandb": "pip install wandb",
    "mlflow": "pip install mlflow",
}
FOLDER = "sinks"  # of the run folder: a state and a log file per tracker
WAIT_S, WAIT_STOPPED_S = 15, 3  # at the end of a run, and where a signal or an error ended it
GRACE_S = 2  # for a process that has to end by itself
LOOK_EVERY_S = 0.5


@dataclass
class Follower:
    """The process of one tracker."""

    name: str
    process: subprocess.Popen[bytes]
    unread: bytes = b""

    @property
    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """Return its stdin, whose end tells it that the run is over, and its stdout, where it speaks."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def heard(self) -> list[str]:
        """Return the lines it has said since; never waits."""
        with suppress(BlockingIOError):
            while chunk := os.read(self.pipes[1].fileno(), 65536):
                self.unread += chunk
        *lines, self.unread = self.unread.split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


class Sinks:
    """A callback that starts the trackers of a run, passes on what they say, and ends them in bounded time."""

    def __init__(self, folder: Path, names: Sequence[str], note: Callable[[str], None]) -> None:
        self.folder, self.names, self.note = folder, names, note
        self.followers: list[Follower] = []
        self.looked = 0.0

    def on_start(self, facts: Any) -> None:
        """Start a process per tracker that has not yet sent the whole run."""
        (self.folder / FOLDER).mkdir(exist_ok=True)
        goes_on = facts.get("from", 0) < facts.get("updates", 0)  # a finished run too, where it was made longer
        names = [name for name in self.names if goes_on or not is_sent(self.folder, name)]
        self.followers = [start(self.folder, name) for name in names]

    def on_update(self, step: int) -> None:
        """Pass on what trackers say."""
        if self.followers and time.monotonic() - self.looked > LOOK_EVERY_S:
            self.looked = time.monotonic()
            self.listen()

    def listen(self) -> None:
        """Make a note of every line a tracker has said."""
        for follower in self.followers:
            for line in follower.heard():
                self.note(f"{follower.name}: {line}")

    def on_end(self, facts: Any) -> None:
        """Let the trackers send the rest of a finished run."""
        self.end(finished=True, wait_s=WAIT_S)

    def end(self, *, finished: bool, wait_s: float) -> None:
        """Tell every tracker that the run is over, and wait for all of them together at most `wait_s`."""
        for follower in self.followers:
            with suppress(OSError):
                follower.pipes[0].write(json.dumps({"finished": finished, "wait_s": wait_s}).encode())
                follower.pipes[0].close()
        deadline = time.monotonic() + wait_s + GRACE_S
        late = [one.name for one in self.followers if not ends_by(one, deadline)]
        self.listen()
        for follower in self.followers:
            follower.pipes[1].close()
        if late:
            self.note(f"{', '.join(late)}: not everything is sent; the same command sends the rest")
        self.followers = []


@contextmanager
def sinks(folder: Path, names: Sequence[str], note: Callable[[str], None]) -> Iterator[Any]:
    """Hold a run's trackers; however the run ends, they end too."""
    found = Sinks(folder, [name for name in dict.fromkeys(names) if name in INSTALL], note)
    try:
        yield found
    finally:
        found.end(finished=False, wait_s=WAIT_STOPPED_S)


def check_sinks(names: Sequence[str]) -> None:
    """Raise CapabilityError for a tracker that is not installed, ConfigError for one that --offline forbids."""
    for name in names:
        if name in INSTALL and not find_spec(name):
            raise CapabilityError(f"log.to: {name} is not installed", fix=INSTALL[name], code="E401")
    if "mlflow" in names and is_offline() and os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        raise ConfigError(
            "log.to: MLFLOW_TRACKING_URI is an address in the network, and the run is offline",
            code="E204",
            fix="leave mlflow out, or set MLFLOW_TRACKING_URI=sqlite:///mlflow.db",
        )


def is_sent(folder: Path, name: str) -> bool:
    """Return whether a tracker has a whole run already."""
    return bool(read_state(folder, name).get("done"))


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """Return what a tracker's process noted last, empty where it has not run."""
    try:
        found = json.loads((folder / FOLDER / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def start(folder: Path, name: str) -> Follower:
    """Start the process of one tracker: libraries print to its log file, signals of a terminal do not reach it."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **quiet(), "PYTHONPATH": os.pathsep.join(paths)}
    for forbidden in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if is_offline() else ():
        environment.pop(forbidden, None)
    with (folder / FOLDER / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shared.watching.trackers", name, str(folder.resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    follower = Follower(name, process)
    os.set_blocking(follower.pipes[1].fileno(), False)
    return follower


def quiet() -> dict[str, str]:
    """Return variables that keep trackers from sending anything but the run."""
    return {
        "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1",
        "GRADIO_ANALYTICS_ENABLED": "False", **({"WANDB_MODE": "offline"} if is_offline() else {}),
    }  # fmt: skip


def ends_by(follower: Follower, deadline: float) -> bool:
    """Return whether a process ends well by a time (time.monotonic); one that does not is killed with its own."""
    try:
        return follower.process.wait(max(deadline - time.monotonic(), 0)) == 0
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(follower.process.pid, signal.SIGKILL)
        follower.process.wait()
        return False

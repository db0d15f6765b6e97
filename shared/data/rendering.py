"""Chat templates run within their limits from any thread: for others than the main one in a process of their own.

Time is limited by a signal and memory by the size of the whole process, so neither holds beside a model that trains.
The process is started when a thread first asks, and anew where a template has ended it; it ends with ours.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import IO, Any

from shared.data.template import Rendered, render_chat, run_template
from shared.errors import CapabilityError, DataError

MAX_CPU_S = 10  # beyond what each message may take: the limits of a template stop no single step of Python's own code


def chat(source: str, **asked: Any) -> Rendered:
    """Return what `render_chat` does."""
    if threading.current_thread() is threading.main_thread():
        return render_chat(source, **asked)
    found = RENDERER.ask("chat", {"source": source, **asked})
    return Rendered(found["text"], tuple((start, end) for start, end in found["spans"]))


def text(source: str, **asked: Any) -> str:
    """Return what `run_template` does."""
    if threading.current_thread() is threading.main_thread():
        return run_template(source, **asked)
    return RENDERER.ask("text", {"source": source, **asked})


class Renderer:
    """A process that renders for all threads, one conversation at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, what: str, asked: dict[str, Any]) -> Any:
        """Return an answer of `serve`; raises DataError with the template's own words."""
        with self.lock:
            try:
                line = self.exchange(json.dumps([what, asked]).encode() + b"\n")
            except BaseException:
                self.close()  # what it may say later is the answer to no other question
                raise
        answer = json.loads(line)
        if "error" in answer:
            raise DataError(**answer["error"])
        return answer["found"]

    def exchange(self, line: bytes) -> bytes:
        """Return the line that answers a line; raises DataError where the process ends instead."""
        if self.process is not None and self.process.poll() is not None:  # ended since, by the system for memory, say
            self.close()
        if self.process is None:
            self.process = start()
        stdin, stdout = pipes(self.process)
        with suppress(BrokenPipeError):
            stdin.write(line)
            stdin.flush()
        if not (found := stdout.readline()):
            what = "the chat template failed: it ended the process that it runs in, by its work or its memory"
            raise DataError(what, code="E214", fix="change the row, or the model's chat template")
        return found

    def close(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in pipes(process):
                with suppress(OSError):
                    pipe.close()


RENDERER = Renderer()


def pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Return a process's stdin and stdout."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def start() -> subprocess.Popen[bytes]:
    """Start the process, out of reach of a terminal's signals; raises CapabilityError."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shared.data.rendering"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise CapabilityError(
            f"cannot start a process to run the chat template in: {error.strerror}", fix="set data.streaming: false"
        ) from None
    end_with_ours()
    return process


@cache
def end_with_ours() -> None:
    """End the process and close its pipes when ours ends; where ours is killed, the end of its stdin ends it."""
    atexit.register(RENDERER.close)


def serve() -> None:
    """Answer questions on stdin, a line of JSON each, until it ends."""
    limit_resource("RLIMIT_CORE", 0)
    for line in sys.stdin.buffer:
        what, asked = json.loads(line)
        limit_resource("RLIMIT_CPU", int(time.process_time()) + MAX_CPU_S + len(asked["messages"]))
        try:
            found = asdict(render_chat(**asked)) if what == "chat" else run_template(**asked)
            answer = {"found": found}
        except DataError as error:
            answer = {"error": {"what": error.what, "code": error.code, "expected": error.expected, "fix": error.fix}}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def limit_resource(name: str, most: int) -> None:
    """Lower what this process may use, as far as the system lets it."""
    import resource

    number = getattr(resource, name)
    with suppress(ValueError, OSError):
        resource.setrlimit(number, (most, resource.getrlimit(number)[1]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()

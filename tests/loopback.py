"""A server of this machine's own network, for what a tracker or a hub may answer."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Hold a server that gives every request to `answer`; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            answer(self)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = respond

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            """Say nothing of clients that went away."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def with_status(code: int, **headers: str) -> Answer:
    """Return an answer of one status without a body."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in {**headers, "Content-Length": "0"}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()

    return answer


def unused_port() -> int:
    """Return a port that nobody listens on: connections are refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


COMMIT = "c0ffee" * 6 + "beef"


@dataclass
class Hub:
    """As much of the hub's API as a download needs: a repository of one folder's files, under every name.

    What goes wrong is told by the name: org/status-429 answers so to everything.
    """

    folder: Path
    cut_at: int = 0  # bytes after which the first download of model.safetensors breaks off
    spoil: bool = False  # one byte of model.safetensors arrives changed
    busy: tuple[int, ...] = ()  # seconds in Retry-After of the first answers to a download, with status 429
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range of every request
    hang: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        path = request.path.partition("?")[0]
        self.asked.append((request.command, path, request.headers.get("Range", "")))
        if "status-" in path:
            code, _, said = path.partition("status-")[2].partition("/")[0].partition("-")
            with_status(int(code), **({"X_Error_Code": said} if said else {}))(request)
        elif "/hangs" in path:
            self.hang.wait(60)
        elif path.startswith("/api/") and "/tree/" in path:
            self.send(request, json.dumps([self.entry(file) for file in self.files()]).encode())
        elif path.startswith("/api/"):
            self.send(request, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        else:
            self.give(request, self.folder / path.partition("/resolve/")[2].partition("/")[2])

    def files(self) -> list[Path]:
        """Return the repository's files."""
        return sorted(file for file in self.folder.rglob("*") if file.is_file())

    def entry(self, file: Path) -> dict[str, object]:
        """Return a file as the API lists it; weights are large files, named by SHA-256."""
        name, data = str(file.relative_to(self.folder)), file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": git}
        if file.suffix == ".safetensors":
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return found

    def give(self, request: BaseHTTPRequestHandler, file: Path) -> None:
        """Send a file or what is left of it, with the faults that were asked for."""
        data, entry, large = file.read_bytes(), self.entry(file), file.suffix == ".safetensors"
        if large and request.command == "GET" and self.busy:
            wait, *rest = self.busy
            self.busy = tuple(rest)
            with_status(429, Retry_After=str(wait))(request)
            return
        if large and self.spoil:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        etag = entry["lfs"]["oid"] if large else entry["oid"]  # type: ignore[index]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.cut_at if large and request.command == "GET" else 0
        self.cut_at = 0 if cut else self.cut_at
        self.send(request, data[start:], code=206 if start else 200, headers=headers, cut=cut)

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler, body: bytes, *, code: int = 200, headers: dict[str, str] | None = None,
        cut: int = 0,
    ) -> None:  # fmt: skip
        """Send a body, or only its first bytes before the connection ends."""
        request.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body[:cut] if cut else body)
        if cut:
            request.close_connection = True

"""A real S3 server (moto's, as a process) behind a proxy that can be told to do what networks and stores do."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

Kind = Literal["stall", "refuse", "cut", "short", "flip"]
"""Of an answer: hang in the midst of the body; 503; break off in the midst; half a body, as if that was all; one byte
wrong."""
BUCKET = "bucket"
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Fault:
    kind: Kind
    name: str
    """Part of the object's name."""
    times: int
    met: threading.Event = field(default_factory=threading.Event)


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `port`, but for those that meet a fault."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.fetched: list[str] = []
        """Objects that were asked for with GET, a request each."""
        self.headers: list[str] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.let_go = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, kind: Kind, name: str, times: int = 1) -> Fault:
        """The next `times` GETs of objects with `name` in their names end so."""
        fault = Fault(kind, name, times)
        with self._lock:
            self._faults.append(fault)
        return fault

    def forget(self) -> None:
        """No faults any more, and no requests yet."""
        with self._lock:
            self._faults.clear()
            self.fetched.clear()
        self.let_go.set()
        self.let_go = threading.Event()

    def next_fault(self, path: str) -> Kind | None:
        with self._lock:
            for fault in self._faults:
                if fault.name in path and fault.times > 0:
                    fault.times -= 1
                    fault.met.set()
                    return fault.kind
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients break off; that is what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        kind = None
        if self.command == "GET" and "?" not in self.path:
            self.server.fetched.append(self.path)
            kind = self.server.next_fault(self.path)
        if kind == "refuse":
            self._send(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        half = len(data) // 2
        if kind == "flip":
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        if kind == "short":
            data = data[:half]
        self._send(answer.status, dict(answer.getheaders()), data, half if kind in ("stall", "cut") else None)
        if kind == "stall":
            self.server.let_go.wait(60)
        if kind in ("stall", "cut"):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _send(self, status: int, headers: dict[str, str], data: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "x-amz-checksum-crc32"):
                self.send_header(name, value)
        # The length of what HEAD does not send is upstream's to say.
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
            self.wfile.flush()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@dataclass
class S3:
    proxy: Proxy
    environ: dict[str, str]

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a folder into the bucket; its address."""
        import fsspec

        store = fsspec.filesystem("s3", endpoint_url=f"http://127.0.0.1:{self.proxy.port}", skip_instance_cache=True)
        for path in folder.rglob("*"):
            if path.is_file():
                store.pipe_file(f"{BUCKET}/{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def s3_server() -> Iterator[S3]:
    """A server with an empty bucket. Credentials and the proxy's address are in this process's environment."""
    environ = {
        "AWS_ACCESS_KEY_ID": "canary-key",
        "AWS_SECRET_ACCESS_KEY": "canary-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    process, port = _started()
    proxy = Proxy(port)
    environ["AWS_ENDPOINT_URL"] = proxy.url
    before = {name: os.environ.get(name) for name in environ}
    os.environ.update(environ)
    serving = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    serving.start()
    try:
        yield S3(proxy, environ)
    finally:
        proxy.forget()
        proxy.shutdown()
        proxy.server_close()
        process.kill()
        process.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _started(tries: int = 5) -> tuple[subprocess.Popen[bytes], int]:
    """A server that answers, and its port. One that was free may be somebody else's by the time the server wants it."""
    for _ in range(tries):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if _make_bucket(port, process):
            return process, port
        process.kill()
        process.wait()
    raise AssertionError(f"the S3 server ended {tries} times")


def _make_bucket(port: int, process: subprocess.Popen[bytes], timeout_s: float = 60) -> bool:
    """Whether the server came up."""
    deadline_s = time.monotonic() + timeout_s
    while process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("PUT", f"/{BUCKET}")
            if connection.getresponse().status == 200:
                return process.poll() is None
        except OSError:
            pass
        assert time.monotonic() < deadline_s, f"no S3 server after {timeout_s} s"
        time.sleep(0.05)
    return False

"""An S3 server on loopback (moto's), behind a proxy that fails as tests ask for."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from moto.server import ThreadedMotoServer

from megaphase.utils import remote_calls

# What happens to a request: nothing special (None), an answer with this status, no answer until the
# test ends, an answer or a request that is cut off in the middle, or bytes that are altered.
Fault = int | str | None
BUCKET = "bucket"


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing of connections that a client has closed."""


class FaultyProxy:
    """Passes requests on to a server, except where `fault(method, path)` asks for something else.

    Attributes:
        requests: "METHOD path" of every request, in order.
    """

    def __init__(self, port: int) -> None:
        self.requests: list[str] = []
        self.fault: Callable[[str, str], Fault] = lambda method, path: None
        self.released = threading.Event()
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self, port))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, fault: Fault, *, times: int = 10**9, method: str = "", part: str = "") -> None:
        """Let the next `times` requests of this method with `part` in their path fail.

        A call has stalled after a second if they hang, otherwise never on a slow machine.
        """
        left = [times]
        remote_calls.RETRIES.stalled_seconds = 1.0 if fault == "hang" else 60.0

        def of(its_method: str, path: str) -> Fault:
            if method in its_method and part in path and left[0] > 0:
                left[0] -= 1
                return fault
            return None

        self.fault = of

    def count(self, method: str, part: str = "") -> int:
        return sum(each.startswith(method) and part in each for each in self.requests)

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: FaultyProxy, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            proxy.requests.append(f"{self.command} {self.path}")
            fault = proxy.fault(self.command, self.path)
            size = int(self.headers.get("Content-Length") or 0)
            if fault == "hang":
                proxy.released.wait()
                self.close_connection = True
                return
            if fault == "cut request":
                self.rfile.read(size // 2)
                self.close_connection = True
                return
            body = self.rfile.read(size)
            if isinstance(fault, int):
                self._answer(fault, {}, b"")
                return
            inner = http.client.HTTPConnection("127.0.0.1", port)
            inner.request(self.command, self.path, body, dict(self.headers))
            found = inner.getresponse()
            data = found.read()
            if fault == "altered" and data:
                data = bytes([data[0] ^ 1]) + data[1:]
            self._answer(found.status, dict(found.headers), data, cut=fault == "cut answer")
            inner.close()

        def _answer(
            self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "server", "date"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

    return Handler


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Start a server with the bucket `BUCKET`, to which `s3://` URLs lead; failed calls are
    repeated at once."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = FaultyProxy(port)
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    quick = remote_calls.Retries(3, pause_seconds=0.01, of_requests=0, stalled_seconds=60.0)
    monkeypatch.setattr(remote_calls, "RETRIES", quick)
    monkeypatch.setattr(remote_calls, "_file_systems", {})
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().read() is not None
    connection.close()
    try:
        yield proxy
    finally:
        proxy.close()
        server.stop()

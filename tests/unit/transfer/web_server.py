"""A small web server with ranges and one fault at a time, over real sockets. Not a test.

`python -m tests.unit.transfer.web_server ROOT HOST` serves until its stdin ends; prints its URL.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

FAULTS: Final = (
    "flips",  # a wrong byte in every answer after the first few
    "no-ranges",  # 200 and the whole file, whatever was asked
    "other-range",  # 206 for bytes that were not asked for
    "no-content-range",
    "other-size",  # a file one byte longer
    "unsatisfiable",  # 416
    "gzip",  # Content-Encoding though identity was asked for
    "not-found",
    "forbidden",
    "redirect-loop",
    "redirect-to-file",  # Location: file:///
    "not-gguf",
    "excess",  # more bytes than the range has
)
"""Faults after which a server is never asked again."""


@dataclass
class WebServer:
    """Serves the files of one directory."""

    root: Path
    fault: str | None = None
    after: int = 3
    """Requests answered properly first, for faults that begin in the middle."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of every request."""
    connections: int = 0
    sent: int = 0
    """Bytes of bodies handed to the socket."""
    busy: int = 0
    """Requests to answer 429 before any other answer."""
    to: str | None = None
    """Where every request is sent on to."""
    url: str = ""
    drop: threading.Event = field(default_factory=threading.Event)


class _Serving(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebServer

    def setup(self) -> None:
        self.web.connections += 1
        super().setup()

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        web = self.web
        web.requests.append((self.path, self.headers["Range"]))
        assert self.headers["Accept-Encoding"] == "identity"
        if web.busy:
            web.busy -= 1
            self._answer(429, b"busy", {"Retry-After": "1"})
            return
        late = len(web.requests) > web.after
        if self._redirected(late) or self._refused(late):
            return
        path = web.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            self._answer(404, b"not here", {})
            return
        self._send_file(path.read_bytes(), late)

    def _redirected(self, late: bool) -> bool:
        fault, path = self.web.fault, self.path
        if self.web.to is not None:
            self._answer(302, b"", {"Location": self.web.to})
        elif fault == "redirect" and not path.startswith("/real/"):
            self._answer(302, b"", {"Location": "/real" + path})
        elif fault == "redirect-loop":
            self._answer(302, b"", {"Location": path + "x"})
        elif fault == "redirect-to-file" and late:
            self._answer(302, b"", {"Location": "file:///etc/passwd"})
        else:
            return False
        return True

    def _refused(self, late: bool) -> bool:
        fault = self.web.fault
        statuses = {"unsatisfiable": 416, "not-found": 404, "forbidden": 403, "error": 500}
        if not late or fault not in statuses:
            return False
        self._answer(statuses[fault], b"no", {})
        return True

    def _send_file(self, data: bytes, late: bool) -> None:
        web, fault = self.web, self.web.fault
        if fault == "not-gguf":
            data = b"<html>" + data[6:]
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers["Range"] or "")
        assert match is not None
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        headers: dict[str, str] = {}
        if fault == "no-ranges":
            self._answer(200, data, headers)
            return
        if fault == "other-range" and late:
            first += 1
            last += 1
        body = data[first : last + 1]
        total = len(data) + (fault == "other-size")
        if not (fault == "no-content-range" and late):
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        if fault == "gzip" and late:
            headers["Content-Encoding"] = "gzip"
        if fault == "flips" and late:
            body = body[:-1] + bytes((body[-1] ^ 1,))
        if fault == "excess" and late:
            body += b"x"
        if fault == "stalls" and late:
            self._answer(206, body[: len(body) // 2], {**headers, "Content-Length": str(len(body))})
            web.drop.wait(60)
            return
        if fault == "short" and late and len(web.requests) % 2:
            self.close_connection = True
            self._answer(206, body[: len(body) // 2], {**headers, "Content-Length": str(len(body))})
            return
        self._answer(206, body, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(body), 1 << 16):
                self.wfile.write(body[start : start + (1 << 16)])
                self.web.sent += len(body[start : start + (1 << 16)])
        except OSError:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """Clients that leave are no errors."""


@contextmanager
def serving(
    root: Path, fault: str | None = None, *, host: str = "127.0.0.1", **options: Any
) -> Iterator[WebServer]:
    """Serve `root` on a free port of this machine."""
    web = WebServer(root, fault, **options)
    serving_class = type("Serving", (_Serving,), {"web": web})
    server = _Server((host, 0), serving_class)
    web.url = f"http://{host}:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.drop.set()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serving(Path(sys.argv[1]), host=sys.argv[2]) as started:
        print(started.url, flush=True)
        sys.stdin.read()

"""A web server over a folder for the tests, which may know ranges or not, or answer every request with a page."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class WebServer:
    """``ranges``: whether it knows them; ``page``: a login page whatever is asked; ``redirect``: where it sends to."""

    folder: Path
    port: int = 0
    ranges: bool = True
    page: bool = False
    redirect: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: WebServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        del code, size

    def _answer(self) -> None:
        path = self.site.folder / self.path.lstrip("/")
        if self.site.redirect:
            self._send(302, b"", {"Location": self.site.redirect + self.path})
        elif self.site.page:
            self._send(200, b"<!DOCTYPE html><html>Please log in</html>", {"Content-Type": "text/html"})
        elif not path.is_file():
            self._send(404, b"", {})
        else:
            self._file(path.read_bytes())

    def _file(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not self.site.ranges or not wanted:
            self._send(200, data, {})
            return
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        if start >= len(data):
            self._send(416, b"", {})
        else:
            self._send(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError):
                self.wfile.write(data)


@contextlib.contextmanager
def running_web(folder: Path, context: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    """A server of the files in ``folder``, over TLS with a ``context``; ends with the block."""
    site = WebServer(folder)
    handler = type("Handler", (_Handler,), {"site": site})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        site.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()

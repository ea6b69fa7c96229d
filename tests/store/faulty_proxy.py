"""A proxy that breaks what passes through it as told: requests go on unchanged, so signatures (of the proxy's host) hold."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)


@dataclass(frozen=True)
class Request:
    """What a client asked: ``range``, ``encryption`` and ``key`` (of KMS) as in its headers, or ''."""

    method: str
    path: str
    range: str
    encryption: str = ""
    key: str = ""


@dataclass(frozen=True)
class Fault:
    """``kind``: delay (``amount`` s), reset | truncate | stall (after ``amount`` bytes of the body), 503, 403, html."""

    kind: str
    amount: float = 0


@dataclass
class Proxy:
    """``choose`` names the fault of a request (None: none); ``requests`` lists all that came."""

    upstream: tuple[str, int]
    choose: Callable[[Request], Fault | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, name: str, *methods: str) -> int:
        """Requests for paths that end with ``name``."""
        return sum(r.path.split("?")[0].endswith(name) and r.method in methods for r in self.requests)


@contextlib.contextmanager
def running_proxy(upstream_port: int) -> Iterator[Proxy]:
    """A proxy before a local port; ends, with all its connections, with the block or with ``shut``."""
    proxy = Proxy(("127.0.0.1", upstream_port))
    ended = threading.Event()
    connections: set[socket.socket] = set()
    listener = socket.create_server(("127.0.0.1", 0))
    proxy.port = listener.getsockname()[1]
    threads: list[threading.Thread] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                connections.add(client)
                thread = threading.Thread(target=_serve, args=(proxy, client, ended, connections), daemon=True)
                threads.append(thread)
                thread.start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield proxy
    finally:
        ended.set()
        for held in (listener, *list(connections)):
            with contextlib.suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)
            held.close()
        give_up_at = time.monotonic() + 10  # for all of them: they are daemons, and a busy machine may have dozens
        for thread in (acceptor, *threads):
            thread.join(max(0.0, give_up_at - time.monotonic()))


def _serve(proxy: Proxy, client: socket.socket, ended: threading.Event, connections: set[socket.socket]) -> None:
    with contextlib.suppress(OSError, EOFError), client:
        while not ended.is_set():
            head, rest = _head(client, b"")
            first = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
            encryption = "x-amz-server-side-encryption"
            named = [_header(head, name) or "" for name in ("range", encryption, f"{encryption}-aws-kms-key-id")]
            request = Request(first[0], first[1], *named)
            if _header(head, "expect"):
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = _body(client, head, rest)
            proxy.requests.append(request)
            fault = proxy.choose(request) or Fault("none")
            if fault.kind == "delay":
                ended.wait(fault.amount)
            if fault.kind in ("503", "403", "html"):
                _answer(client, fault.kind)
                continue
            with socket.create_connection(proxy.upstream) as upstream:
                connections.add(upstream)
                upstream.sendall(head + body)
                if not _relay(upstream, client, request.method, fault, ended):
                    return


def _relay(upstream: socket.socket, client: socket.socket, method: str, fault: Fault, ended: threading.Event) -> bool:
    """One response; False when the connection is to end with it."""
    head, rest = _head(upstream, b"")
    while head.split(b" ", 2)[1].startswith(b"1"):
        head, rest = _head(upstream, rest)
    no_body = method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304")
    body = b"" if no_body else _body(upstream, head, rest)
    if fault.kind in ("reset", "truncate", "stall"):
        client.sendall(head + body[: int(fault.amount)])
        if fault.kind == "stall":
            ended.wait()
        if fault.kind == "reset":  # an RST instead of a FIN
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        return False
    client.sendall(head + body)
    return True


def _answer(client: socket.socket, kind: str) -> None:
    status, body, what = {
        "503": ("503 Service Unavailable", _SLOW_DOWN, "application/xml"),
        "403": ("403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>", "application/xml"),
        "html": ("200 OK", b"<!DOCTYPE html><html><body>Please log in</body></html>", "text/html"),
    }[kind]
    head = f"HTTP/1.1 {status}\r\nContent-Type: {what}\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)


def _head(source: socket.socket, data: bytes) -> tuple[bytes, bytes]:
    while b"\r\n\r\n" not in data:
        data += _some(source)
    head, rest = data.split(b"\r\n\r\n", 1)
    return head + b"\r\n\r\n", rest


def _body(source: socket.socket, head: bytes, data: bytes) -> bytes:
    """As on the wire, chunks included."""
    if "chunked" in (_header(head, "transfer-encoding") or ""):
        while not data.endswith(b"0\r\n\r\n"):
            data += _some(source)
        return data
    length = int(_header(head, "content-length") or 0)
    while len(data) < length:
        data += _some(source)
    return data


def _some(source: socket.socket) -> bytes:
    data = source.recv(2**16)
    if not data:
        raise EOFError
    return data


def _header(head: bytes, name: str) -> str | None:
    found = re.search(rf"\r\n{name}:\s*([^\r]*)", head.decode("latin-1"), re.IGNORECASE)
    return found.group(1).strip() if found else None

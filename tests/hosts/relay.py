"""Connections carried from one network namespace into another, one port to one port: a way in, and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000
_FOLDER = "/run/netns"


@dataclass(frozen=True)
class End:
    """An address; ``namespace``: whose, None: this process's own."""

    ip: str
    port: int
    namespace: str | None = None


@contextlib.contextmanager
def relayed(listening: End, to: End) -> Iterator[int]:
    """Who connects to ``listening`` is connected to ``to`` while the block runs. Yields the port that is listened on."""
    server = _socket_of(listening.namespace)
    accepting = threading.Thread(target=_accept, args=(server, to), name="relay", daemon=True)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((listening.ip, listening.port))
        server.listen(64)
        accepting.start()
        yield server.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if accepting.ident is not None:
            accepting.join(5)
        server.close()


def _socket_of(namespace: str | None) -> socket.socket:
    """A socket is of the namespace in which its thread was when it was made, and a thread that goes there never comes back."""
    if namespace is None:
        return socket.socket()
    made: list[socket.socket | OSError] = []

    def make() -> None:
        try:
            _enter(namespace)
            made.append(socket.socket())
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def _enter(namespace: str) -> None:
    """This thread's network from here on. Raises OSError."""
    with open(f"{_FOLDER}/{namespace}") as place:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(place.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"the network namespace {namespace} can't be entered")


def _accept(server: socket.socket, to: End) -> None:
    while True:
        try:
            near, _ = server.accept()
        except OSError:  # it was shut down
            return
        threading.Thread(target=_carry, args=(near, to), name="relay", daemon=True).start()


def _carry(near: socket.socket, to: End) -> None:
    """Both ways, until one side has no more to say or is gone."""
    with near, contextlib.suppress(OSError), _socket_of(to.namespace) as far:
        far.settimeout(10)
        far.connect((to.ip, to.port))
        far.settimeout(None)
        back = threading.Thread(target=_pump, args=(far, near), name="relay", daemon=True)
        back.start()
        _pump(near, far)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

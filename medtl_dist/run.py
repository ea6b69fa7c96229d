"""Who am I, and where may I write: the one question the core asks of whatever started it.

``Run`` is answered by ``LocalRun`` here (one process, or spawned gloo processes) and by ``cluster.ray_run.RayRun``.
"""

from __future__ import annotations

import enum
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pyarrow import fs as pafs

from medtl_dist import collectives
from medtl_dist.errors import DataError


class Signal(enum.IntEnum):
    """Answer of :meth:`Run.poll`; ranks agree on the largest."""

    GO_ON = 0
    CHECKPOINT_AND_STOP = 1


@dataclass(frozen=True)
class Folder:
    """A folder as filesystem and path; names below it use ``/``. Only local filesystems are exercised so far."""

    fs: pafs.FileSystem
    path: str

    @classmethod
    def local(cls, path: str | Path) -> Folder:
        return cls(pafs.LocalFileSystem(), str(Path(path).absolute()))

    def at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises DataError where it is missing or can't be read."""
        try:
            with self.fs.open_input_stream(self.at(name)) as stream:
                return stream.read()
        except OSError as error:
            raise DataError(f"{self.at(name)}: can't be read ({_reason(error)}).") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader sees the old one or the new one, never a part. Raises OSError when full."""
        target = self.at(name)
        self.fs.create_dir(target.rpartition("/")[0], recursive=True)
        # A rename inside one folder is atomic on a local disk; object stores commit a file when its stream closes.
        local = isinstance(self.fs, pafs.LocalFileSystem)
        place = f"{target}.{os.getpid()}.tmp" if local else target
        try:
            with self.fs.open_output_stream(place) as stream:
                stream.write(data)
            if local:
                _sync(place)
                os.replace(place, target)
                _sync(os.path.dirname(target))  # the new name, too, survives a power cut
        except OSError:
            if local and os.path.exists(place):
                os.unlink(place)
            raise

    def exists(self, name: str) -> bool:
        return self.fs.get_file_info(self.at(name)).type != pafs.FileType.NotFound

    def names(self, name: str = "") -> list[str]:
        """Sorted base names of what lies in the folder ``name``; empty where it does not exist."""
        selector = pafs.FileSelector(self.at(name) if name else self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def delete_tree(self, name: str) -> None:
        if self.exists(name):
            self.fs.delete_dir(self.at(name))

    @property
    def local_path(self) -> Path:
        """The folder as a path of this machine. Raises DataError for other filesystems."""
        if not isinstance(self.fs, pafs.LocalFileSystem):
            raise DataError(f"{self.path}: this step needs a local folder.")
        return Path(self.path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or ("no such file" if isinstance(error, FileNotFoundError) else type(error).__name__)


@runtime_checkable
class Run(Protocol):
    """What the core needs to know. The same tests run against every implementation."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def folder(self) -> Folder: ...

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        """Hand over one epoch's metrics, already global. Every rank calls it equally often."""
        ...

    def poll(self) -> Signal:
        """Whether to go on; every rank gets the same answer and calls it at the same steps."""
        ...


@dataclass
class LocalRun:
    """A run in this process, or one of several spawned processes that share a gloo group.

    ``stop_on_signals`` turns SIGTERM and the first Ctrl-C into ``CHECKPOINT_AND_STOP``; a second Ctrl-C acts at once.
    """

    folder: Folder
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    reports: list[dict[str, float | int | None]] = field(default_factory=list)
    received: int | None = None
    _handlers: dict[int, Any] = field(default_factory=dict)

    def stop_on_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._note)

    def forget_signals(self) -> None:
        """Put the process's own handlers back."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _note(self, number: int, _frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        self.reports.append(dict(metrics))

    def poll(self) -> Signal:
        mine = Signal.GO_ON if self.received is None else Signal.CHECKPOINT_AND_STOP
        return Signal(collectives.largest(int(mine)))

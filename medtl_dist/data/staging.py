"""shards being written ─► DEST at once: one writer at a time, in a folder beside it, renamed when complete.

A killed writer leaves only the work folder ``.DEST.packing``; the next one clears it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medtl_dist.errors import UserError

_LOCK = "lock"


def check_destination(dest: Path) -> None:
    """Raises: UserError, ``dest`` is a file, or a folder with something in it."""
    if dest.is_dir():
        if any(dest.iterdir()):
            raise UserError(f"{dest} exists and is not empty: name a new folder with --out, or remove this one first")
    elif dest.exists() or dest.is_symlink():
        raise UserError(f"{dest} exists and is not a folder: name a new folder with --out")


@contextmanager
def work_folder(dest: Path) -> Iterator[Path]:
    """An empty folder beside ``dest``, locked for this process and removed at the end.

    Raises: UserError, another process is packing to ``dest``.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    work = dest.with_name(f".{dest.name}.packing")
    descriptor = _lock(work, dest)
    try:
        for leftover in work.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif leftover.name != _LOCK:
                leftover.unlink()
        yield work
    finally:
        # Removed while still locked; a folder that another process enters meanwhile stays for that process.
        shutil.rmtree(work, ignore_errors=True)
        os.close(descriptor)


def _lock(work: Path, dest: Path) -> int:
    path = work / _LOCK
    while True:
        work.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the holder of the lock has just removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"another process is packing to {dest}: wait for it, or name another --out") from None
        except OSError:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # we locked a file that its holder removed before letting go


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False

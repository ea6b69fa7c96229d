"""this process ↔ a line by which another one on the same machine can tell whether it still lives. Only on Linux."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def mark_of_this_process() -> str | None:
    """The machine and its boot, the namespace in which process ids count, this one's id and start. None: it can't be told."""
    pid = os.getpid()
    started = _started(pid)
    place = _place()
    return None if started is None or place is None else f"{place} {pid} {started}"


def has_ended(mark: str) -> bool:
    """Whether the process of a mark has certainly ended: it was one of this machine, boot and namespace, and is no more.

    False for a process of anywhere else, of which nothing is known from here.
    """
    place, pid, started = ([*mark.rsplit(" ", 2), "", ""])[:3]
    return place == _place() and pid.isdigit() and _started(int(pid)) != started


def _place() -> str | None:
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()  # copies of one virtual machine share it, hence the name
        return f"{platform.node()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When it started, in the kernel's ticks since boot; None: there is none, or it is a zombie, which writes no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]

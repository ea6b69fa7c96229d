"""run folder → what nobody needs any more: parts that a killed writer left, listed, and removed on request.

Only while nobody writes in the folder: the lock, or the lease, is held meanwhile. Whole checkpoints are never orphans.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from pyarrow import fs as pafs

from medtl_dist.create_only import abort_upload, unfinished_uploads
from medtl_dist.errors import UserError
from medtl_dist.run import Folder
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train.checkpoint import parse_name
from medtl_dist.train.lease import LEASES, held_lease
from medtl_dist.train.run_folder import whole_of

_CLEANING_TTL_S = 60.0
_TEMPORARY = re.compile(r".+\.\d+\.tmp|\.report\.html\.\d+|\.shared-[0-9a-f]+")
_PROBE = re.compile(r"(now|probe)-[0-9a-f]+")


@dataclass(frozen=True, order=True)
class Orphan:
    """``name`` in the run folder; ``what`` it is; ``upload``: the id of an unfinished upload, which has no name yet."""

    name: str
    what: str
    num_bytes: int
    upload: str | None = None


@dataclass(frozen=True)
class Entry:
    """A file (``num_bytes``) or a folder (None) below the run folder."""

    name: str
    num_bytes: int | None


@contextlib.contextmanager
def found_orphans(folder: Folder, owner: str) -> Iterator[list[Orphan]]:
    """The orphans of a run folder, which nobody else writes in during the block.

    Raises:
        UserError: not a run folder; or somebody writes in it, whose unfinished files are no orphans.
    """
    if not folder.exists("config.yaml"):
        raise UserError(f"{folder.url} is not a run folder: it has no config.yaml.")
    with _alone(folder, owner):
        orphans = orphans_among(_entries(folder))
        if isinstance(folder, StoreFolder):
            uploads = unfinished_uploads(folder)
            orphans += [Orphan(name, "unfinished upload", 0, upload) for name, upload in uploads]
        yield sorted(orphans)


def remove(folder: Folder, orphans: Iterable[Orphan]) -> None:
    """Remove orphans, inside the block that found them."""
    for orphan in orphans:
        if orphan.upload is not None and isinstance(folder, StoreFolder):
            abort_upload(folder, orphan.name, orphan.upload)
        elif orphan.name.endswith("/"):
            folder.delete_tree(orphan.name.rstrip("/"))
        else:
            folder.delete(orphan.name)


def orphans_among(entries: Iterable[Entry]) -> list[Orphan]:
    """Which of a run folder's files and folders, or of those of a chain's parts, are orphans; a folder counts as one."""
    folders: dict[str, tuple[str, int]] = {}
    whole: set[str] = set()
    single: list[Orphan] = []
    for entry in entries:
        parts, size = PurePosixPath(entry.name).parts, entry.num_bytes
        place, what = _folder_of(parts, is_folder=size is None)
        if place is not None:
            folders[place] = (what, folders.get(place, ("", 0))[1] + (size or 0))
            if parts[-1] == "manifest.json":
                whole.add(place)
        if size is not None and _TEMPORARY.fullmatch(parts[-1]):
            single.append(Orphan(entry.name, "temporary file", size))
        if size is not None and len(parts) > 1 and parts[-2] == LEASES and _PROBE.fullmatch(parts[-1]):
            single.append(Orphan(entry.name, "probe of the store", size))
    found = [Orphan(place, what, size) for place, (what, size) in folders.items() if place not in whole]
    return found + [orphan for orphan in single if not any(orphan.name.startswith(other.name) for other in found)]


def _folder_of(parts: tuple[str, ...], *, is_folder: bool) -> tuple[str | None, str]:
    """The checkpoint folder, or Ray's, in which the entry lies or which it is, and what it would be an orphan as."""
    for depth, part in enumerate(parts):
        inside = depth + 1 < len(parts) or is_folder
        if part == ".ray" and inside:
            return "/".join(parts[: depth + 1]) + "/", "Ray's bookkeeping"
        if depth and parts[depth - 1] == "checkpoints" and inside and parse_name(part) is not None:
            return "/".join(parts[: depth + 1]) + "/", "checkpoint never completed"
    return None, ""


def _entries(folder: Folder) -> list[Entry]:
    if isinstance(folder, StoreFolder):
        found = folder.files()
    else:
        found = folder.fs.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    return [
        Entry(info.path.removeprefix(f"{folder.path}/"), info.size if info.type == pafs.FileType.File else None)
        for info in found
    ]


@contextlib.contextmanager
def _alone(folder: Folder, owner: str) -> Iterator[None]:
    if isinstance(folder, StoreFolder):
        with held_lease(whole_of(folder), owner=owner, ttl_s=_CLEANING_TTL_S, wait=False):
            yield
        return
    try:
        lock = (folder.local_path / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{folder.url}: the run folder can't be written ({error.strerror}).") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder.url}: another process is training in this run folder; wait for it or stop it."
            ) from None
        yield

"""run folder, on a disk or in a store: opened for writing under one roof, and read by what reads local files.

On a disk it is ``run_folder``'s, with its lock. In a store the lock is a lease, and the folder handed out is fenced.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medtl_dist.config import Config, differing_keys, parse_yaml, validate
from medtl_dist.errors import UserError
from medtl_dist.run import Folder
from medtl_dist.store_folder import StoreFolder, fetched, folder_at
from medtl_dist.train import checkpoint
from medtl_dist.train.budget import BUDGET_FILE
from medtl_dist.train.lease import LEASES, FolderShelf, fenced, hand_out, held_lease, holder_of
from medtl_dist.train.run_folder import ENSEMBLE_FILE, of_single, opened_run_folder, parts_in, read_config, whole_of
from medtl_dist.train.setup import storage_of
from medtl_dist.train.status import over_all, status_of

LEASE_TTL_S = 60.0
_IGNORED = (".lease", ".ray", "config.yaml")
_FOR_STATUS = (
    "config.yaml", "log.jsonl", "progress.json", "results.json", "chain.json", "compare.json", "crossval.json", BUDGET_FILE,
)  # fmt: skip


@contextlib.contextmanager
def opened_run(place: Path | str, config: Config, *, resume: bool, say: Callable[[str], None]) -> Iterator[Folder]:
    """The run folder at a path or an address, as ``opened_run_folder`` has it. ``say`` is told what a person should know.

    Raises:
        UserError: as ``opened_run_folder``; or one training of a chain, which goes on with the chain.
        Interrupted: the store can't be reached.
    """
    folder = folder_at(place, storage_of(config))
    if not isinstance(folder, StoreFolder):
        with opened_run_folder(folder.local_path, config, resume=resume) as path:
            yield Folder.local(path)
        return
    whole = whole_of(folder)
    if whole.url != folder.url:  # under another lease two could write here at once
        raise UserError(f"{folder.url} is a part of the run {whole.url}: go on with that, or name another folder.")
    _check_use(folder, config, resume=resume)  # before waiting for a lease: most mistakes are told at once
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(held_lease(folder, owner=owner_here(), ttl_s=LEASE_TTL_S, say=say))
        folder = fenced(folder, lease.fence)
        take_up(folder, config, resume=resume)
        yield folder


@contextlib.contextmanager
def opened_part(folder: Folder, config: Config) -> Iterator[Folder]:
    """The folder of one training of a run that is open, new or to go on with: on a disk with a lock of its own, in a store under
    the lease of the whole, by which ``folder`` is fenced.

    Raises: as ``opened_run``.
    """
    if not isinstance(folder, StoreFolder):
        with opened_run_folder(folder.local_path, config, resume=True) as path:
            yield Folder.local(path)
        return
    assert folder.guard is not None
    take_up(folder, config)
    yield folder


@contextlib.contextmanager
def opened_fold(folder: Folder, config: Config) -> Iterator[Folder]:
    """The folder of a fold of a cross-validation that is open: as ``opened_part``, but in a store under a lease of its own, as
    each of several that are trained at once has one. Raises: as ``opened_run``.
    """
    if not isinstance(folder, StoreFolder):
        with opened_part(folder, config) as place:
            yield place
        return
    folder = fenced(folder, lease_on(folder))
    take_up(folder, config)
    yield folder


def lease_on(part: StoreFolder) -> int:
    """A lease on one of several trainings for its next writer, handed out by who holds the lease of the whole, by which
    ``part`` is fenced; whoever wrote there before can write no more. Raises as ``StoreFolder.write``."""
    assert part.fence is not None
    if part.guard is not None:
        part.guard(now=True)
    return hand_out(FolderShelf(part.below(LEASES)), part.fence, owner=owner_here(), ttl_s=LEASE_TTL_S)


@contextlib.contextmanager
def opened_finished(place: Path | str, *, say: Callable[[str], None]) -> Iterator[Folder]:
    """The folder of a finished single training, to be added to: in a store under the lease of the run, or of the chain or
    cross-validation of which it is a part. ``say``: as of ``opened_run``.

    Raises:
        UserError: no run, several, one that has not finished, or another process writes there.
        Interrupted: the store can't be reached.
    """
    folder = folder_at(place)
    if folder.exists(ENSEMBLE_FILE):
        raise UserError(f"{folder.url} holds several runs: name one of them, or score with medtl predict")
    read_config_in(folder)  # before a lease: nothing is written where no run is
    if not folder.exists("results.json"):
        raise UserError(f"{folder.url}: the run has not finished; `medtl train --resume` goes on with it.")
    if not isinstance(folder, StoreFolder):
        yield folder
        return
    whole = whole_of(folder)
    with held_lease(whole, owner=owner_here(), ttl_s=LEASE_TTL_S, say=say) as lease:
        yield fenced(folder, lease.fence, whole.url)


def owner_here() -> str:
    """This process, as others are told of it."""
    return f"process {os.getpid()} on {platform.node() or 'unknown'}"


def take_up(folder: StoreFolder, config: Config, *, resume: bool = True) -> None:
    """What ``opened_run`` does once it holds a lease, or the writer has been handed one. Raises likewise."""
    if _check_use(folder, config, resume=resume) != config:
        folder.write("config.yaml", config.to_yaml().encode())


def _check_use(folder: StoreFolder, config: Config, *, resume: bool) -> Config | None:
    """The config of the run that is there, if one is. Raises UserError, see ``opened_run_folder``."""
    names = [name for name in folder.names() if name not in _IGNORED]
    if not names:
        return None
    if not folder.exists("config.yaml"):
        raise UserError(f"{folder.url} is not a run folder, but it is not empty either; name another with --run-dir.")
    if not resume:
        raise UserError(
            f"{folder.url} already holds a run; add --resume to go on with it, or name another with --run-dir."
        )
    before = _config_in(folder)
    if before.sha256() != config.sha256():
        changes = "; ".join(differing_keys(before, config))
        raise UserError(f"{folder.url} holds a run of another config ({changes}); --resume needs the same one.")
    return before


def read_config_in(folder: Folder) -> Config:
    """The config of the run folder of a single training. Raises UserError where it is none."""
    if not isinstance(folder, StoreFolder):
        return read_config(folder.local_path)
    folder.expect_run()
    return of_single(_config_in(folder), folder, folder.url)


def _config_in(folder: StoreFolder) -> Config:
    text = folder.read("config.yaml").decode("utf-8", errors="replace")
    return validate(parse_yaml(text, folder.shown("config.yaml")))


def status_in(folder: Folder) -> dict[str, Any]:
    """As ``status_of``, wherever the run folder lies. Raises UserError where it holds no run."""
    if not isinstance(folder, StoreFolder):
        return status_of(folder.local_path)
    folder.expect_run()
    whole, found = whole_of(folder), _status_in(folder)
    if holder_of(FolderShelf(whole.below(LEASES))) is not None:
        # A chain's trainings come one after another under one lease: what has begun and not finished is the one that runs, of
        # folds one of those that do.
        for part in (found, *found["parts"]):
            if part["state"] == "stopped" or (part is found and whole is folder):
                part["state"] = "running"
    return found


def _status_in(folder: StoreFolder) -> dict[str, Any]:
    """A folder's own files and its parts'; "running" is told by a lease alone, and not known here."""
    with fetched(folder, _FOR_STATUS) as here:
        found = status_of(here)
    news = [folder.info(name).mtime for name in ("log.jsonl", "progress.json")]
    times = [moment.timestamp() for moment in news if moment is not None]
    parts = [_status_in(folder.part(name)) for name in parts_in(folder)]
    return found | {
        "seconds_since_news": max(0.0, time.time() - max(times)) if times else None,
        "checkpoints": checkpoint.steps(folder),
        "parts": parts,
        "budget": over_all(found["budget"], parts),
    }

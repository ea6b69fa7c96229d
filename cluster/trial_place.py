"""a trial's payload → its run folder, opened by the worker that trains there alone, and signs of life from it. No Ray.

On a disk it is locked, and a file is touched. In a store it is fenced by the lease that the driver has handed out, and what is
touched is that lease, by a thread: a training does not wait for a store to say that it is alive.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.trial_state import beat
from medtl_dist.config import validate
from medtl_dist.errors import MedtlError
from medtl_dist.storage import Folder
from medtl_dist.store_folder import StoreFolder, folder_at
from medtl_dist.train import run_store
from medtl_dist.train.lease import LEASES, FolderShelf, Lease, fenced
from medtl_dist.train.run_folder import opened_run_folder
from medtl_dist.train.setup import storage_of
from medtl_dist.train.status import status_of

BEAT_IN_STORE_S = 15.0
PREDECESSOR_S = 60.0  # a killed driver's workers are gone long before


def trial_folder(payload: Mapping[str, Any]) -> Folder:
    """The trial's run folder, in a store fenced by the payload's lease. Raises UserError, a place that can't be one."""
    folder = folder_at(payload["folder"], storage_of(validate(payload["config"])))
    return fenced(folder, payload["fence"]) if isinstance(folder, StoreFolder) else folder


@contextlib.contextmanager
def opened_trial(payload: Mapping[str, Any]) -> Iterator[Folder]:
    """The trial's run folder, made where it is missing, while nobody else can write there.

    Raises:
        UserError: see ``opened_run_folder``; on a disk, too, where another process goes on writing there for too long.
        Interrupted: the store can't be reached, or the trial has been given to another worker.
    """
    folder, config = trial_folder(payload), validate(payload["config"])
    if isinstance(folder, StoreFolder):
        run_store.take_up(folder, config)
        yield folder
        return
    _wait_for_predecessor(folder.local_path)
    with opened_run_folder(folder.local_path, config, resume=True) as path:
        yield Folder.local(path)


def _wait_for_predecessor(folder: Path) -> None:
    """After a crash of the driver its worker may still be dying: two must not write in one folder."""
    deadline = time.monotonic() + PREDECESSOR_S
    while (folder / "config.yaml").is_file() and time.monotonic() < deadline:
        if status_of(folder)["state"] != "running":
            return
        time.sleep(0.2)


@contextlib.contextmanager
def pulse_of(folder: Folder) -> Iterator[Callable[[], None]]:
    """What a training calls now and then to say that it is alive, though it has nothing to tell; it never waits, nor raises."""
    if not isinstance(folder, StoreFolder) or folder.fence is None:
        yield lambda: beat(folder.local_path)
        return
    shelf = FolderShelf(folder.below(LEASES).once())
    lease = Lease(folder.fence, run_store.owner_here(), shelf, run_store.LEASE_TTL_S, secrets.token_hex(8))
    alive, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=_renew, args=(lease, alive, ended), daemon=True, name="medtl-pulse")
    thread.start()
    try:
        yield alive.set
    finally:
        ended.set()


def _renew(lease: Lease, alive: threading.Event, ended: threading.Event) -> None:
    """Until the training has ended; then, where it ever was alive, nobody waits for the lease to run out."""
    told = False
    while not ended.wait(BEAT_IN_STORE_S):
        if alive.is_set():
            alive.clear()
            told = True
            with contextlib.suppress(MedtlError, OSError):
                lease.renew()
    if told or alive.is_set():
        with contextlib.suppress(MedtlError, OSError):
            lease.release()

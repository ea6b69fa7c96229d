"""sweep folder, on a disk or in a store: made once, locked while a driver writes, gone on with by its own sweep only. No Ray."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.sweep_mirror import Mirror
from medtl_dist.config import Config, load_config
from medtl_dist.errors import MedtlError, UserError
from medtl_dist.storage import Folder, StorageOptions
from medtl_dist.store_folder import StoreFolder, fetched, folder_at
from medtl_dist.train import run_store
from medtl_dist.train.lease import LEASES, fenced, held_lease
from medtl_dist.train.run_folder import opened_run_folder
from medtl_dist.train.run_store import owner_here
from medtl_dist.train.setup import storage_of

SPACE_FILE = "space.yaml"
# Of the section tune, what decides which trials there are and when they stop.
_DECIDING = ("num_trials", "searcher", "seed", "scheduler", "grace_epochs", "reduction_factor")


def default_sweep_folder(config: Config) -> Path:
    """``sweeps/<data set>-<backbone>-<time>`` below the current folder."""
    name = Path(config.data.shards or "data").name
    stamp = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("sweeps") / f"{name}-{config.model.backbone}-{stamp}"


def sweep_place(place: Path | str, options: StorageOptions | None = None) -> Folder:
    """The sweep folder at a path or an address. Raises: UserError, a place that can't be one."""
    try:
        return folder_at(place, options)
    except UserError as error:
        raise UserError(error.message.replace("--run-dir", "--sweep-dir")) from None


@contextlib.contextmanager
def opened_sweep_folder(folder: Path, config: Config, space: str, *, resume: bool) -> Iterator[Path]:
    """Create the sweep folder with ``config.yaml`` and ``space.yaml``, or take up an interrupted sweep's, and hold its lock.

    ``space``: the search space as YAML.

    Raises:
        UserError: the folder holds something else, or a sweep and ``resume`` is false; its config, space or rules differ;
            another driver is at work in it.
    """
    if (folder / "config.yaml").is_file() and any(
        entry.name not in (".lock", "config.yaml") for entry in folder.iterdir()
    ):
        if not (folder / SPACE_FILE).is_file():
            raise UserError(f"{folder} holds a training run, not a sweep; name another folder with --sweep-dir.")
        if not resume:
            raise UserError(
                f"{folder} already holds a sweep; add --resume to go on with it, or name another with --sweep-dir."
            )
        _check_same_sweep(folder, config, space)
    with _told_as_a_sweep(folder), opened_run_folder(folder, config, resume=resume) as opened:
        if not (opened / SPACE_FILE).is_file():
            Folder.local(opened).write(SPACE_FILE, space.encode())
        yield opened


@contextlib.contextmanager
def opened_sweep(
    place: Path | str, config: Config, space: str, *, resume: bool, say: Callable[[str], None] = lambda _text: None
) -> Iterator[Folder]:
    """The sweep folder at a path or an address, as ``opened_sweep_folder`` has it; in a store its ``Mirror``, under its lease.

    ``say`` is told what a person should know.

    Raises:
        UserError: as ``opened_sweep_folder``; or the store refuses.
        Interrupted: the store can't be reached.
    """
    store = sweep_place(place, storage_of(config))
    if not isinstance(store, StoreFolder):
        with opened_sweep_folder(store.local_path, config, space, resume=resume) as folder:
            yield Folder.local(folder)
        return
    with TemporaryDirectory(prefix="medtl-sweep-") as scratch, contextlib.ExitStack() as stack:
        look, here = (Path(scratch) / part / store.place.name for part in ("look", "mirror"))
        for folder in (look, here):
            folder.mkdir(parents=True)
            stack.enter_context(_told_by_address(folder, store.url))
        _copy_first_look(store, look)
        with opened_sweep_folder(look, config, space, resume=resume):
            pass  # before waiting for a lease: most mistakes are told at once
        owner = owner_here()
        lease = stack.enter_context(held_lease(store, owner=owner, ttl_s=run_store.LEASE_TTL_S, say=say))
        mirror = Mirror(Folder.local(here).fs, str(here), fenced(store, lease.fence))
        mirror.fetch_state()
        before = {name: _bytes(here / name) for name in ("config.yaml", SPACE_FILE)}
        stack.enter_context(opened_sweep_folder(here, config, space, resume=resume))
        mirror.publish(name for name, known in before.items() if _bytes(here / name) != known)
        yield mirror


@contextlib.contextmanager
def begun_sweep(place: str) -> Iterator[Path | None]:
    """A folder with config and space of the sweep at a path or an address, while the block runs; None where there is none.

    Raises: UserError, Interrupted, see ``StoreFolder``: without its config, the environment alone says how a store is reached.
    """
    folder = sweep_place(place)
    if not folder.exists(SPACE_FILE):
        yield None
    elif isinstance(folder, StoreFolder):
        with fetched(folder, ("config.yaml", SPACE_FILE)) as here:
            yield here
    else:
        yield folder.local_path


def _copy_first_look(store: StoreFolder, to: Path) -> None:
    """What says whether a sweep may be begun or gone on with: config, space, and the names of whatever lies beside them."""
    for name in store.names():
        if name in ("config.yaml", SPACE_FILE):
            (to / name).write_bytes(store.read(name))
        elif name not in (LEASES, ".ray"):
            (to / name).touch()


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


@contextlib.contextmanager
def _told_by_address(here: Path, url: str) -> Iterator[None]:
    """Errors that name the address, not the scratch folder, and the option of sweeps."""
    try:
        yield
    except MedtlError as error:
        message = error.message.replace(str(here), url).replace("--run-dir", "--sweep-dir")
        message = re.sub(
            r": (.+?) is writing in this run folder;", r": another driver is at work on this sweep, \1;", message
        )
        raise type(error)(message) from None


def _check_same_sweep(folder: Path, config: Config, space: str) -> None:
    before = load_config(file=folder / "config.yaml").tune
    changes = [
        f"tune.{key}: {getattr(before, key)} -> {getattr(config.tune, key)}"
        for key in _DECIDING
        if getattr(before, key) != getattr(config.tune, key)
    ]
    if (folder / SPACE_FILE).read_text(encoding="utf-8") != space:
        changes.append(f"the search space is not that of its {SPACE_FILE}")
    if changes:
        raise UserError(f"{folder} holds another sweep ({'; '.join(changes)}); --resume needs the same one.")


@contextlib.contextmanager
def _told_as_a_sweep(folder: Path) -> Iterator[None]:
    """The messages of a run folder, in a sweep's words."""
    try:
        yield
    except UserError as error:
        if "another process is training in this run folder" not in error.message:
            raise
        raise UserError(f"{folder}: another driver is at work on this sweep; wait for it or stop it.") from None

"""sweep folder: made once, locked while a driver writes in it, and taken up again only by the sweep that it is of. No Ray."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

from medtl_dist.config import Config, load_config
from medtl_dist.errors import UserError
from medtl_dist.storage import Folder
from medtl_dist.train.run_folder import opened_run_folder

SPACE_FILE = "space.yaml"
# Of the section tune, what decides which trials there are and when they stop.
_DECIDING = ("num_trials", "searcher", "seed", "scheduler", "grace_epochs", "reduction_factor")


def default_sweep_folder(config: Config) -> Path:
    """``sweeps/<data set>-<backbone>-<time>`` below the current folder."""
    name = Path(config.data.shards or "data").name
    stamp = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("sweeps") / f"{name}-{config.model.backbone}-{stamp}"


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

"""run folder: made once, refused when it is another run's, locked while a driver writes in it."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import IO

from medtl_dist.config import Config, differing_keys, load_config
from medtl_dist.errors import UserError
from medtl_dist.run import Folder
from medtl_dist.store_folder import StoreFolder, store_folder

ENSEMBLE_FILE = "ensemble.json"  # names the runs below whose mean is one model: a cross-validation's


def default_run_folder(config: Config) -> Path:
    """``runs/<data set>-<backbone>-<time>`` below the current folder."""
    name = Path(config.data.shards or "data").name
    stamp = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{config.model.backbone}-{stamp}"


@contextlib.contextmanager
def opened_run_folder(folder: Path, config: Config, *, resume: bool) -> Iterator[Path]:
    """Create the run folder with its ``config.yaml``, or take up an interrupted run's, and hold its lock.

    Raises:
        UserError: the folder holds a run and ``resume`` is false, holds something else, has another config, or another
            process is writing in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder with --run-dir.")
    # A run that failed before its first step (a mistyped weights file, say) leaves only its config: not a run yet.
    used = folder.is_dir() and any(entry.name not in (".lock", "config.yaml") for entry in folder.iterdir())
    if used and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder, but it is not empty either; name another with --run-dir.")
    if used and not resume:
        raise UserError(f"{folder} already holds a run; add --resume to go on with it, or name another with --run-dir.")
    before: Config | None = None
    if used:
        before = load_config(file=folder / "config.yaml")
        if before.sha256() != config.sha256():
            changes = "; ".join(differing_keys(before, config))
            raise UserError(f"{folder} holds a run of another config ({changes}); --resume needs the same one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: the run folder can't be written ({error.strerror}).") from None
    with lock:
        if not _locked(lock):
            raise UserError(f"{folder}: another process is training in this run folder; wait for it or stop it.")
        if before != config:  # new, or what its hash leaves out has changed: the shards have moved, other workers
            try:
                Folder.local(folder).write("config.yaml", config.to_yaml().encode())
            except OSError as error:
                raise UserError(f"{folder}: the run folder can't be written ({error.strerror}).") from None
        yield folder


def _locked(lock: IO[str]) -> bool:
    """Take the lock, unless another driver holds it: who asks for a run's status holds it too, but for an instant."""
    for _ in range(3):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.1)
        else:
            return True
    return False


def read_config(folder: Path) -> Config:
    """The config of the run folder of a single training. Raises UserError where it is none."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml.")
    return of_single(load_config(file=folder / "config.yaml"), Folder.local(folder), str(folder))


def of_single(config: Config, folder: Folder, shown: str) -> Config:
    """The config of a folder, which is that of a single training. Raises UserError for a chain's, naming its trainings."""
    if config.transfer.stages:
        parts = ", ".join(parts_in(folder)) or "none yet"
        raise UserError(f"{shown} holds a chain of trainings; name one of them: {parts}.")
    return config


def chain_finished(folder: Path) -> bool:
    """Whether the folder's chain, if it holds one, has trained its last stage, or has been compared with its target alone; or its
    cross-validation has been pooled."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return bool(json.loads((folder / "chain.json").read_text(encoding="utf-8"))["finished"])
    return (folder / "compare.json").is_file() or (folder / "crossval.json").is_file()


def parts_of(folder: Path) -> list[Path]:
    """The run folders of a chain's trainings or of folds, in their order; [] in the folder of a single training."""
    return [folder / name for name in parts_in(Folder.local(folder))]


def parts_in(folder: Folder) -> list[str]:
    """As ``parts_of``, their names in the folder, wherever that lies."""
    found = [f"{above}/{name}" for above in ("stages", "folds") for name in folder.names(above)]
    for seed in folder.names("seeds"):
        stages = f"seeds/{seed}/stages"
        found += [f"{stages}/{name}" for name in folder.names(stages)] + [f"seeds/{seed}/alone"]
    whole = [name for name in found if folder.exists(f"{name}/config.yaml")]
    return sorted(whole, key=lambda name: (name.endswith("/alone"), name))


def above(path: PurePath) -> PurePath:
    """By the names alone: the folder of the chain, comparison or cross-validation that the path is a training of, else itself."""
    whole = path
    if whole.parent.name in ("stages", "folds"):
        whole = whole.parent.parent
    elif whole.name == "alone" and whole.parent.parent.name == "seeds":
        whole = whole.parent
    return whole.parent.parent if whole.parent.name == "seeds" else whole


def whole_of(folder: StoreFolder) -> StoreFolder:
    """The run folder whose lease protects this one: that of the chain or cross-validation of which it is a part, else itself."""
    name = str(above(PurePosixPath(folder.place.path)))
    if name == folder.place.path or "/" not in name:
        return folder
    whole = store_folder(f"{folder.place.scheme}://{name}", folder.options)
    return whole if whole.exists("config.yaml") else folder

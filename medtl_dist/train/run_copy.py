"""finished run, on a disk or in a store → a local folder of what scoring reads, so that nothing after it knows of stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medtl_dist.run import Folder
from medtl_dist.store_folder import StoreFolder, fetched, put_here
from medtl_dist.train import checkpoint, results
from medtl_dist.train.predictor import members_of
from medtl_dist.train.run_folder import ENSEMBLE_FILE
from medtl_dist.train.run_store import read_config_in

_SMALL = ("config.yaml", "results.json")


@contextmanager
def scorable(run: Folder) -> Iterator[Path]:
    """The run folder itself; of a run in a store a private copy of its config, results and best checkpoint, of an ensemble that
    of each member, gone afterwards.

    A run folder on a disk is not looked at.

    Raises:
        UserError: no run in the store, or several.
        DataError: its results or its checkpoint are damaged.
        Interrupted: the store can't be reached, or there is no room for the copy.
    """
    if not isinstance(run, StoreFolder):
        yield run.local_path
        return
    with fetched(run, (ENSEMBLE_FILE, *_SMALL)) as here:
        if (here / ENSEMBLE_FILE).is_file():
            for member in members_of(here):
                name = member.relative_to(here).as_posix()
                for small in _SMALL:
                    if run.exists(f"{name}/{small}"):
                        put_here(member / small, run.read(f"{name}/{small}"))
                _fetch_best(run.part(name), member)
        else:
            read_config_in(run)
            _fetch_best(run, here)
        yield here


def _fetch_best(run: StoreFolder, here: Path) -> None:
    """The best checkpoint of a run, where it has one: else who loads the copy says that the run has not finished."""
    if (here / "results.json").is_file():
        step = results.read_results(Folder.local(here))["best_checkpoint"]
        for name, data in checkpoint.files_of(run, step).items():
            put_here(here / name, data)

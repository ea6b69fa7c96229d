"""finished run, on a disk or in a store → a local folder of what scoring reads, so that nothing after it knows of stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medtl_dist.errors import UserError
from medtl_dist.run import Folder
from medtl_dist.store_folder import StoreFolder, fetched, put_here
from medtl_dist.train import checkpoint, results
from medtl_dist.train.run_folder import ENSEMBLE_FILE
from medtl_dist.train.run_store import read_config_in


@contextmanager
def scorable(run: Folder) -> Iterator[Path]:
    """The run folder itself; of a run in a store a private copy of its config, results and best checkpoint, gone afterwards.

    A run folder on a disk is not looked at.

    Raises:
        UserError: no run in the store, or several.
        DataError: its results or its checkpoint are damaged.
        Interrupted: the store can't be reached, or there is no room for the copy.
    """
    if not isinstance(run, StoreFolder):
        yield run.local_path
        return
    if run.exists(ENSEMBLE_FILE):
        raise UserError(
            f"{run.url} holds an ensemble, which is read from a folder of this machine: copy it here first, or name one of its "
            "runs"
        )
    read_config_in(run)
    with fetched(run, ("config.yaml", "results.json")) as here:
        if (here / "results.json").is_file():  # else who loads the copy says that the run has not finished
            step = results.read_results(Folder.local(here))["best_checkpoint"]
            for name, data in checkpoint.files_of(run, step).items():
                put_here(here / name, data)
        yield here

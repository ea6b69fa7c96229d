"""A submitted job's entrypoint: run a `medtl` command in this process, then hand its small result files over by the log.

python -m medtl_dist.cli.job_entry RUN_FOLDER train --config config.yaml --run-dir RUN_FOLDER --resume
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from medtl_dist.cli.main import run
from medtl_dist.errors import MedtlError

if TYPE_CHECKING:
    from medtl_dist.storage import StorageOptions


def main(arguments: list[str]) -> int:
    """The command's exit code; its results and report follow in the log where it succeeded."""
    place, *command = arguments
    options = _options_of(command)  # before the run: Ray takes this process to another folder
    code = run(command)
    if code == 0:
        sys.stderr.flush()
        print(_handed_over(place, options), flush=True)
    return code


def _options_of(command: list[str]) -> StorageOptions | None:
    """How the run reaches its store: the endpoint may be named in its config and nowhere else."""
    from medtl_dist.config import load_config
    from medtl_dist.train.setup import storage_of

    if "--config" not in command:
        return None
    try:
        return storage_of(load_config(file=command[command.index("--config") + 1]))
    except MedtlError:
        return None  # the command itself will say so


def _handed_over(place: str, options: StorageOptions | None) -> str:
    """The small files of the run folder, framed for the log, or why they are not there: the run itself has succeeded."""
    from cluster.job_files import framed
    from medtl_dist.store_folder import folder_at

    try:
        block = framed(folder_at(place, options))
    except (MedtlError, OSError) as error:
        return f"note: results and report are in {place}, and can't be read for the log: {error}"
    return block if block is not None else f"note: results and report are in {place}, too large for the log."


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    storage = sys.modules.get("medtl_dist.storage")
    if storage is not None:
        storage.leave(exit_code)
    sys.exit(exit_code)

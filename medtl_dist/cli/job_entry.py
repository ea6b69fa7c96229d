"""A submitted job's entrypoint: run a `medtl` command in this process, then hand its small result files over by the log.

python -m medtl_dist.cli.job_entry RUN_FOLDER train --config config.yaml --run-dir RUN_FOLDER --resume
"""

from __future__ import annotations

import sys

from medtl_dist.cli.main import run


def main(arguments: list[str]) -> int:
    """The command's exit code; its results and report follow in the log where it succeeded."""
    folder, *command = arguments
    code = run(command)
    if code == 0:
        sys.stderr.flush()
        print(_handed_over(folder, command), flush=True)
    return code


def _handed_over(place: str, command: list[str]) -> str:
    """The small files of the run folder, framed for the log, or why they are not there: the run itself has succeeded."""
    from cluster.job_files import framed
    from medtl_dist.config import load_config
    from medtl_dist.errors import MedtlError
    from medtl_dist.store_folder import folder_at
    from medtl_dist.train.setup import storage_of

    try:
        # The store is reached as the run has reached it: its endpoint may be named in the config and nowhere else.
        config = load_config(file=command[command.index("--config") + 1]) if "--config" in command else None
        block = framed(folder_at(place, storage_of(config) if config is not None else None))
    except (MedtlError, OSError) as error:
        return f"note: results and report are in {place}, and can't be read for the log: {error}"
    return block if block is not None else f"note: results and report are in {place}, too large for the log."


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    storage = sys.modules.get("medtl_dist.storage")
    if storage is not None:
        storage.leave(exit_code)
    sys.exit(exit_code)

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
        from cluster.job_files import framed
        from medtl_dist.storage import Folder

        sys.stderr.flush()
        block = framed(Folder.at_url(folder))
        print(
            block if block is not None else f"note: results and report are in {folder}, too large for the log.",
            flush=True,
        )
    return code


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    storage = sys.modules.get("medtl_dist.storage")
    if storage is not None:
        storage.leave(exit_code)
    sys.exit(exit_code)

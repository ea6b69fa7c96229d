"""`medtl report RUN`: run folder → report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder that `medtl train` wrote.", show_default=False)
    ],
) -> None:
    """Write RUN/report.html, one self-contained page, from the run folder alone.

    Example: medtl report runs/pneumonia-1
    """
    from medtl_dist.report.build import build_report

    typer.echo(build_report(run))

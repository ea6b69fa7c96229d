"""`medtl report RUN`: run folder → report.html, the folder of a cross-validation → crossval.html."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that `medtl train` or `crossval` wrote.", show_default=False)
    ],
) -> None:
    """Write RUN/report.html (of a cross-validation crossval.html), one self-contained page, from the folder alone.

    Example: medtl report runs/pneumonia-1
    """
    from medtl_dist.report.build import build_report
    from medtl_dist.report.crossval_page import RECORD, build_crossval_page

    build = build_crossval_page if (run / RECORD).is_file() else build_report
    typer.echo(build(run))

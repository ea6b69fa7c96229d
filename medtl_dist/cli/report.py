"""`medtl report RUN`: run folder → report.html, the folder of a cross-validation → crossval.html."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Folder that `medtl train` or `crossval` wrote, or its address.", show_default=False
        ),
    ],
) -> None:
    """Write RUN/report.html (of a cross-validation crossval.html), one self-contained page, from the folder alone.

    Example: medtl report runs/pneumonia-1
    """
    from medtl_dist.report.build import build_report_in
    from medtl_dist.report.crossval_page import RECORD, build_crossval_page_in
    from medtl_dist.store_folder import folder_at

    folder = folder_at(run)
    typer.echo(build_crossval_page_in(folder) if folder.exists(RECORD) else build_report_in(folder))

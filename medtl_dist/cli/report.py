"""`medtl report RUN`: run folder → report.html."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Run folder that `medtl train` wrote, or its address.", show_default=False),
    ],
) -> None:
    """Write RUN/report.html, one self-contained page, from the run folder alone.

    Example: medtl report runs/pneumonia-1
    """
    from medtl_dist.report.build import build_report_in
    from medtl_dist.store_folder import folder_at

    typer.echo(build_report_in(folder_at(run)))

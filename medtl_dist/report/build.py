"""run folder → report.html: one self-contained page, made from the run folder alone and the same bytes each time."""

from __future__ import annotations

from pathlib import Path

from medtl_dist.report.cautions import cautions
from medtl_dist.report.flow import flow
from medtl_dist.report.learning import history_table, learning_figures
from medtl_dist.report.page import render_page, write_page
from medtl_dist.report.record import Record, read_run
from medtl_dist.report.tables import (
    class_rows,
    data_facts,
    numbers_table,
    provenance_facts,
    shown_splits,
    threshold_table,
    training_facts,
)
from medtl_dist.report.views import split_view
from medtl_dist.report.wording import moment
from medtl_dist.storage import Folder
from medtl_dist.store_folder import StoreFolder, fetched

REPORT = "report.html"


def build_report(run_folder: Path) -> Path:
    """Writes ``report.html`` into a run folder, all of it or nothing, and returns its path.

    Raises:
        UserError: not a run folder, its run has no results yet, or the folder can't be written.
        DataError: results.json, history.parquet or config.yaml is damaged, or of a schema version that isn't known.
    """
    folder = Path(run_folder)
    return write_page(folder / REPORT, render(read_run(folder)))


def build_report_in(folder: Folder) -> str:
    """As ``build_report``, wherever the run folder lies; returns the page's path or address."""
    if not isinstance(folder, StoreFolder):
        return str(build_report(folder.local_path))
    folder.expect_run()
    with fetched(folder, ("config.yaml", "results.json", "history.parquet")) as here:
        page = build_report(here).read_bytes()
    if not folder.exists(REPORT) or folder.read(REPORT) != page:  # a finished run's lies there untouched
        folder.write(REPORT, page)
    return folder.shown(REPORT)


def render(record: Record) -> str:
    """The page of a record, a pure function."""
    results = record.results
    keys = shown_splits(results)
    classes, class_scale = class_rows(results, keys[0])
    return render_page(
        "template.html",
        results=results,
        finished=moment(results.provenance.finished) if results.provenance.finished else "",
        headline=split_view(results, keys[0]),
        also=[split_view(results, key) for key in keys[1:]],
        cautions=cautions(results),
        numbers=numbers_table(results),
        classes=classes,
        class_scale=class_scale,
        at_thresholds=threshold_table(results, keys[0]),
        flow=flow(results.data),
        learning=learning_figures(record),
        history=history_table(record),
        training=training_facts(record),
        data=data_facts(results.data),
        provenance=list(provenance_facts(results)),
        config_yaml=record.config_yaml,
    )

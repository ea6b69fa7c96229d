"""run folder → report.html: one self-contained page, made from the run folder alone and the same bytes each time."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from medtl_dist.errors import UserError
from medtl_dist.report.cautions import cautions
from medtl_dist.report.flow import flow
from medtl_dist.report.learning import history_table, learning_figures
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
    page = render(read_run(folder))
    target = folder / REPORT
    try:
        _replace(target, page.encode("utf-8"))
    except OSError as error:
        raise UserError(
            f"{target} can't be written ({error.strerror}): free space or change the folder's rights"
        ) from error
    return target


def build_report_in(folder: Folder) -> str:
    """As ``build_report``, wherever the run folder lies; returns the page's path or address."""
    if not isinstance(folder, StoreFolder):
        return str(build_report(folder.local_path))
    folder.expect_run()
    with fetched(folder, ("config.yaml", "results.json", "history.parquet")) as here:
        folder.write(REPORT, build_report(here).read_bytes())
    return folder.shown(REPORT)


def render(record: Record) -> str:
    """The page of a record, a pure function."""
    results = record.results
    style = _packaged("style.css")
    # A policy that names the style's hash lets nothing else in: no script, no request, no style in an attribute.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    keys = shown_splits(results)
    classes, class_scale = class_rows(results, keys[0])
    return _template().render(
        results=results,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup(style),
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


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_packaged("template.html"))


def _packaged(name: str) -> str:
    return (resources.files("medtl_dist.report") / name).read_text(encoding="utf-8")


def _replace(target: Path, content: bytes) -> None:
    """Puts ``content`` at ``target`` in one step: a reader sees the old page or the whole new one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

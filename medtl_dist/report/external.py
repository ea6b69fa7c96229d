"""RUN/external/NAME/external.json → report.html beside it: a model on images from elsewhere, next to its own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medtl_dist.errors import DataError
from medtl_dist.report.build import REPORT
from medtl_dist.report.page import render_page, write_page
from medtl_dist.report.record import clean
from medtl_dist.report.schema import Results
from medtl_dist.report.tables import class_rows
from medtl_dist.report.views import split_view
from medtl_dist.report.wording import MISSING, decimals, interval, moment, percent, plural, split_name
from medtl_dist.storage import Folder
from medtl_dist.store_folder import StoreFolder, fetched

EXTERNAL_FILE = "external.json"
_KEY = "external"


def build_external_page(folder: Path) -> Path:
    """Writes ``report.html`` into a folder of an external validation and returns its path.

    Raises:
        UserError: the folder can't be written. DataError: external.json is missing or damaged.
    """
    file = folder / EXTERNAL_FILE
    try:
        content = clean(json.loads(file.read_bytes()))
        page = render_external(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}): run medtl evaluate --data again") from None
    return write_page(folder / REPORT, page)


def build_external_page_in(folder: Folder) -> str:
    """As ``build_external_page``, wherever the folder lies; returns the page's path or address."""
    if not isinstance(folder, StoreFolder):
        return str(build_external_page(folder.local_path))
    with fetched(folder, (EXTERNAL_FILE,)) as here:
        page = build_external_page(here).read_bytes()
    folder.write(REPORT, page)
    return folder.shown(REPORT)


def render_external(content: dict[str, Any]) -> str:
    """The page of an ``external.json``, a pure function."""
    shared = ("task", "classes", "positive_class", "threshold", "data", "test_openings")
    # The page is of one entry; a results.json has val or test beside it, and here that is the same one.
    told = {name: content[name] for name in shared} | {"run": content["run"]}
    results = Results.model_validate(told | {"splits": {"val": content["entry"], _KEY: content["entry"]}})
    classes, class_scale = class_rows(results, _KEY)
    return render_page(
        "external.html",
        content=content,
        results=results,
        view=split_view(results, _KEY),
        beside=beside(content),
        columns=["here", *(f"the run’s {split_name(name)}" for name in content["own"])],
        classes=classes,
        class_scale=class_scale,
        finished=moment(content["provenance"]["finished"]),
        renamed=[pair for pair in content["class_map"].items() if pair[0] != pair[1]],
    )


def beside(content: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of a measure's name and its value here and in each of the run's own splits."""
    entries = [content["entry"], *content["own"].values()]
    rows = [
        ("AUC", [_with(decimals(one.get("auc")), interval(_pair(one.get("auc_ci")))) for one in entries]),
        ("Images or patients", [plural(one.get("n"), "row") for one in entries]),
    ]
    if len(content["classes"]) == 2 and content["task"] == "binary":
        rows.append(("Prevalence", [percent(one.get("prevalence")) for one in entries]))
    else:
        rows += [
            (f"Prevalence of {name}", [percent(_prevalence(one, name)) for one in entries])
            for name in content["classes"]
        ]
    for name, words in (
        ("sensitivity", "Sensitivity at the run’s threshold"),
        ("specificity", "Specificity at the run’s threshold"),
        ("ppv", "Positive predictive value"),
        ("npv", "Negative predictive value"),
    ):
        if any(_rate(one, name) for one in entries):
            rows.append((words, [_rate(one, name) or MISSING for one in entries]))
    if any(one.get("ece") is not None for one in entries):
        rows.append(("Calibration error", [decimals(one.get("ece")) for one in entries]))
    return rows


def _with(value: str, bounds: str) -> str:
    return f"{value} ({bounds})" if bounds else value


def _pair(bounds: list[float] | None) -> tuple[float, float] | None:
    return None if bounds is None else (bounds[0], bounds[1])


def _rate(entry: dict[str, Any], name: str) -> str:
    rate = entry.get(name)
    if not isinstance(rate, dict) or rate.get("value") is None:
        return ""
    return _with(percent(rate["value"]), interval(_pair(rate.get("ci")), as_percent=True))


def _prevalence(entry: dict[str, Any], name: str) -> float | None:
    if "per_class_prevalence" in entry:
        return entry["per_class_prevalence"].get(name)
    return ((entry.get("per_class") or {}).get(name) or {}).get("prevalence")

"""Record → the page's tables: all numbers side by side, classes, training, data, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from medtl_dist.report import charts
from medtl_dist.report.figures import Table
from medtl_dist.report.record import Record
from medtl_dist.report.schema import Data, Rate, Results, SplitEntry
from medtl_dist.report.svg import Told
from medtl_dist.report.wording import (
    MISSING,
    count,
    decimals,
    duration,
    interval,
    millions,
    moment,
    percent,
    plural,
    split_name,
)


@dataclass(frozen=True)
class Value:
    """A table cell: the number, and its interval below it."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class NumbersTable:
    """Measures by columns (split and unit): ``rows`` are (measure, what it is, cells)."""

    columns: list[str]
    rows: list[tuple[str, str, list[Value]]]
    notes: list[str]


@dataclass(frozen=True)
class ClassRow:
    """One class against the rest; ``picture`` is its AUC on a scale that all rows share."""

    name: str
    n: str
    prevalence: str
    auc: str
    interval: str
    picture: Markup
    average_precision: str
    warning: str


def shown_splits(results: Results) -> list[str]:
    """The scored splits, test first: the first is the headline."""
    return [key for key in ("test", "val") if key in results.splits]


def columns_of(results: Results) -> list[tuple[str, SplitEntry]]:
    """(heading, entry) of every split at both its levels."""
    found: list[tuple[str, SplitEntry]] = []
    for key in shown_splits(results):
        entry = results.splits[key]
        for item in (entry, entry.other_level):
            if item is not None:
                found.append((f"{split_name(key).capitalize()}, by {item.unit}", item))
    return found


def numbers_table(results: Results) -> NumbersTable:
    """Every number of every split and unit; a measure that no column has is left out."""
    columns = columns_of(results)
    binary = results.binary
    rows: list[tuple[str, str, list[Value]]] = []

    def add(name: str, gloss: str, get: Callable[[SplitEntry], Value]) -> None:
        cells = [get(entry) for _, entry in columns]
        if any(cell.value != MISSING for cell in cells):
            rows.append((name, gloss, cells))

    def rate(name: str, gloss: str, get: Callable[[SplitEntry], Rate | None]) -> None:
        def cell(entry: SplitEntry) -> Value:
            found = get(entry)
            return Value(percent(found.value), interval(found.ci, as_percent=True)) if found else Value(MISSING)

        add(name, gloss, cell)

    add("Number scored", "", lambda e: Value(count(e.n)))
    if binary:
        add(f"of them {binary[1]}", "", lambda e: Value(count(e.n_positive), percent(e.prevalence, missing="")))
    add("AUC", "", lambda e: Value(decimals(e.auc, missing="undefined"), interval(e.auc_ci)))
    add(
        "AUC, bootstrap interval",
        "patients redrawn at random",
        lambda e: Value(interval(e.auc_ci_bootstrap) or MISSING),
    )
    add("Average precision", "area under precision and recall", lambda e: Value(decimals(e.average_precision)))
    rate("Sensitivity", "of those with it, recognised", lambda e: e.sensitivity)
    rate("Specificity", "of those without, passed", lambda e: e.specificity)
    rate("Positive predictive value", "of those flagged, right", lambda e: e.ppv)
    rate("Negative predictive value", "of those passed, right", lambda e: e.npv)
    rate("Accuracy", "of all, called rightly", lambda e: e.accuracy)
    rate("Balanced accuracy", "mean over the classes", lambda e: e.balanced_accuracy)
    add("F1", "sensitivity and precision in one", lambda e: Value(decimals(e.f1.value if e.f1 else None)))
    add("Brier score", "squared error of the scores, 0 is best", lambda e: Value(decimals(e.brier)))
    add("Calibration error", "mean gap of score and share, 0 is best", lambda e: Value(decimals(e.ece)))
    add(
        "Loss", "binary cross-entropy" if results.several_labels else "cross-entropy", lambda e: Value(decimals(e.loss))
    )
    return NumbersTable([heading for heading, _ in columns], rows, notes(results))


def class_rows(results: Results, key: str) -> tuple[list[ClassRow], str]:
    """A row per class and the scale of their pictures; none for a binary task, where the one AUC says it all."""
    entry = results.splits[key]
    per_class = entry.per_class or {}
    if results.binary:
        return [], ""
    found = [(name, per_class[name]) for name in dict.fromkeys(results.classes) if name in per_class]
    ends = [end for _, item in found for end in (item.auc, *(item.auc_ci or ())) if end is not None]
    low = 0.5 if min(ends, default=1.0) >= 0.5 else 0.0
    rows = []
    for index, (name, item) in enumerate(found):
        auc = decimals(item.auc, missing="undefined")
        words = f"{auc}" + (f", interval {interval(item.auc_ci)}" if item.auc_ci else "")
        picture = charts.class_interval(Told(f"{key}-class-{index}", "AUC", words), item.auc, item.auc_ci, low)
        rows.append(
            ClassRow(
                name,
                count(item.n_positive),
                percent(item.prevalence),
                auc,
                interval(item.auc_ci),
                picture,
                decimals(item.average_precision),
                item.ci_warning or (item.auc_undefined or "").removeprefix("undefined: "),
            )
        )
    return rows, f"{low:g} to 1"


def threshold_table(results: Results, key: str) -> Table | None:
    """Of several labels an image: what each class gives at its own threshold; None for other tasks."""
    entry = results.splits[key]
    if not results.several_labels or not entry.per_class:
        return None

    def cell(rate: Rate | None) -> str:
        if rate is None or rate.value is None:
            return MISSING
        return f"{percent(rate.value)} ({interval(rate.ci, as_percent=True)})" if rate.ci else percent(rate.value)

    rows = []
    for name in (name for name in results.classes if name in entry.per_class):
        item = entry.per_class[name]
        value = decimals(item.threshold.value if item.threshold else None)
        rates = [cell(rate) for rate in (item.sensitivity, item.specificity, item.ppv)]
        rows.append([name, count(item.n), count(item.n_unknown), value, *rates])
    head = ["Class", "Known", "Unknown", "Threshold", "Sensitivity", "Specificity", "Positive predictive value"]
    wording = f"Counts of {entry.unit}s; each class has a threshold of its own, fixed on validation"
    return Table(f"{wording}, and its known answers alone are counted", head, rows)


def notes(results: Results) -> list[str]:
    """What to know of the numbers table: empty cells, how patients were scored, patients of more than one class."""
    entry = results.splits[shown_splits(results)[0]]
    other = entry.other_level
    said = []
    if results.several_labels:
        said.append("Numbers of the whole are means over the classes, each over its known answers.")
    if results.binary and entry.threshold and other and not other.threshold:
        said.append(f"The threshold was fixed by {entry.unit}, so what depends on it is not given by {other.unit}.")
    patients = next((item for item in (entry, other) if item is not None and item.unit == "patient"), None)
    if patients is not None and patients.aggregate:
        how = {"mean": "mean", "max": "highest"}.get(patients.aggregate, patients.aggregate)
        said.append(f"By patient, the score is the {how} of the scores of the patient’s images (as log-odds).")
    for key in shown_splits(results):
        mixed = results.splits[key].mixed_label_groups
        if mixed is not None and mixed.count:
            verb = "has" if mixed.count == 1 else "have"
            left_out = "; by patient they are left out" if mixed.left_out_of_patient_level else ""
            listed = ", ".join(mixed.groups[:5]) + (" …" if mixed.count > 5 else "")
            said.append(
                f"In the {split_name(key)} split {plural(mixed.count, 'patient')} {verb} images of more than one class"
                f"{left_out}: {listed}."
            )
    return said


def training_facts(record: Record) -> list[tuple[str, str]]:
    """How the model was made, as (name, value); what is unknown is left out."""
    results = record.results
    model, training, speed = results.model, results.training, results.throughput
    parameters = ""
    if model.parameters is not None:
        parameters = f", {millions(model.parameters)} parameters"
        if model.trainable_parameters not in (None, model.parameters):
            parameters += f" of which {millions(model.trainable_parameters)} trained"
    facts = [
        ("Network", f"{model.backbone}{parameters}" if model.backbone else ""),
        ("Initial weights", model.weights),
        (
            "Frozen stages",
            "none" if model.frozen_depth == 0 else f"the first {model.frozen_depth}" if model.frozen_depth else "",
        ),
        ("Epochs", _epochs(results)),
        ("Images per step", count(training.global_batch_size) if training.global_batch_size is not None else ""),
        (
            "Left out per epoch",
            f"{plural(training.dropped_per_epoch, 'training image')}, others each time"
            if training.dropped_per_epoch
            else "",
        ),
        (
            "Workers",
            " ".join(filter(None, [count(training.world_size), training.device])) if training.world_size else "",
        ),
        ("Number format", "; ".join(filter(None, [training.precision, training.precision_note]))),
        ("Speed", f"{count(speed.images_per_s)} images per second" if speed.images_per_s is not None else ""),
        (
            "Waiting for data",
            f"{percent(speed.data_wait_fraction)} of the time" if speed.data_wait_fraction is not None else "",
        ),
        *[
            (f"Time, {name.replace('_', ' ')}", duration(value))
            for name, value in results.timing_s.items()
            if value is not None
        ],
    ]
    return [(name, value) for name, value in facts if value]


def _epochs(results: Results) -> str:
    if results.epochs_run is None:
        return ""
    planned = f" of {count(results.epochs_planned)} planned" if results.epochs_planned is not None else ""
    early = "; stopped early, as validation no longer improved" if results.stopped_early else ""
    return f"{count(results.epochs_run)}{planned}{early}"


def data_facts(data: Data) -> list[tuple[str, str]]:
    """What the images were and how patients were told apart."""
    none = data.group_source == "none"
    facts = [
        ("Data set", data.name),
        (
            "Patients told apart by",
            "nothing: the data set doesn’t say which images are of one patient" if none else data.group_source,
        ),
        ("Images stored as", _stored(data.preprocessing or {})),
    ]
    return [(name, value) for name, value in facts if value]


def _stored(preprocessing: dict[str, Any]) -> str:
    size, window = preprocessing.get("image_size_px"), preprocessing.get("window")
    parts = [
        f"short side {size}\u00a0px" if size else "their own size" if preprocessing else "",
        str(preprocessing.get("color") or ""),
        str(preprocessing.get("encoding") or ""),
        f"window {_window(window)}" if isinstance(window, dict) else "",
    ]
    return ", ".join(part for part in parts if part)


def _window(window: dict[str, Any]) -> str:
    """The grey window of DICOM images: its policy, or the fixed range."""
    low, high = window.get("low"), window.get("high")
    fixed = isinstance(low, int | float) and isinstance(high, int | float)
    return f"{low:g} to {high:g}" if fixed else str(window.get("policy"))


def provenance_facts(results: Results) -> Iterator[tuple[str, str, bool]]:
    """(name, value, whether it is a hash) of what identifies the run."""
    source = results.provenance
    hashes = [
        ("Data set, SHA-256", source.dataset_sha256 or results.data.sha256),
        ("Configuration, SHA-256", source.config_sha256),
        ("Initial weights, SHA-256", results.model.weights_sha256),
        ("Code, commit", source.commit),
    ]
    if source.started:
        yield "Started", moment(source.started), False
    if source.finished:
        yield "Finished", moment(source.finished), False
    if results.test_openings is not None:
        yield "Test split scored", openings(results), False
    for name, value in hashes:
        if value:
            yield name, value, True
    if source.versions:
        yield "Versions", ", ".join(f"{name} {version}" for name, version in source.versions.items()), False


def openings(results: Results) -> str:
    """How often the data set's test split was opened, in words."""
    ledger = results.test_openings
    if ledger is None:
        return MISSING
    times = {1: "once", 2: "twice"}.get(ledger.count, f"{count(ledger.count)} times")
    by = f", by {plural(ledger.configurations, 'configuration')}" if ledger.configurations is not None else ""
    return f"{times}{by}"

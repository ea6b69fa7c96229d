"""one split's results → what the page says of it: headline, sentences at the threshold, confusion matrix, figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from medtl_dist.report import charts
from medtl_dist.report.figures import Figure, binary_figures, multiclass_figures
from medtl_dist.report.schema import Rate, Results, SplitEntry
from medtl_dist.report.svg import Told
from medtl_dist.report.wording import (
    MISSING,
    count,
    decimals,
    how_the_interval_was_made,
    interval,
    level,
    macro_sentence,
    pairs_sentence,
    percent,
    plural,
    rule,
    several_labels_sentence,
    split_name,
    typeset,
)

MAX_HEAD_CHARACTERS = 64  # of all class names above a confusion matrix of several classes, on a page


@dataclass(frozen=True)
class Number:
    """One number of the headline: its name, value, interval and a remark."""

    label: str
    value: str
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of a confusion matrix; ``shade`` 0 … 9 is its share of the row, ``right`` the diagonal."""

    count: str
    share: str
    shade: int
    right: bool


@dataclass(frozen=True)
class Confusion:
    """Rows are true classes. Where the names would not fit, the columns are ``numbered``."""

    classes: list[str]
    numbered: bool
    rows: list[list[Cell]]


@dataclass(frozen=True)
class SplitView:
    """All that one split shows."""

    name: str
    counts: str
    auc: str
    auc_label: str
    auc_interval: str
    confidence: str
    sentence: str
    scale: Markup | None
    method: list[str]
    numbers: list[Number]
    operating: list[str]
    confusion: Confusion | None
    figures: list[Figure]


def split_view(results: Results, key: str) -> SplitView:
    """One split's view. ``key``: val or test, and in results.splits."""
    entry = results.splits[key]
    names = results.binary
    return SplitView(
        name=split_name(key),
        counts=_counts(results, entry, key, names),
        auc=decimals(entry.auc, missing="undefined"),
        auc_label="AUC" if names else "AUC, mean over classes",
        auc_interval=interval(entry.auc_ci),
        confidence=level(entry.ci_level),
        sentence=_headline_sentence(results, entry, names),
        scale=_scale(key, entry),
        method=_method(entry),
        numbers=_headline_numbers(entry, names),
        operating=_operating(results, entry, key, names),
        confusion=_confusion(results, entry),
        figures=_figures(results, entry, key),
    )


def _counts(results: Results, entry: SplitEntry, key: str, names: tuple[str, str] | None) -> str:
    total = plural(entry.n, entry.unit)
    known = entry.n_groups is not None and results.data.group_source != "none"
    of = f" of {plural(entry.n_groups, 'patient')}" if known and entry.unit != "patient" else ""
    if names and entry.n_positive is not None and entry.n_negative is not None:
        classes = f": {count(entry.n_positive)} {names[1]}, {count(entry.n_negative)} {names[0]}"
    else:
        classes = f", {plural(len(results.classes), 'class')}"
    return f"{split_name(key).capitalize()} split: {total}{of}{classes}"


def _headline_sentence(results: Results, entry: SplitEntry, names: tuple[str, str] | None) -> str:
    if entry.auc is None:
        return f"The AUC is undefined: {(entry.auc_undefined or 'it needs both classes').removeprefix('undefined: ')}."
    if names:
        return pairs_sentence(entry.auc, entry.auc_ci, unit=entry.unit, positive=names[1], confidence=entry.ci_level)
    defined = entry.macro.n_defined if entry.macro else None
    sentence = several_labels_sentence if results.several_labels else macro_sentence
    return sentence(entry.auc, unit=entry.unit, num_classes=len(results.classes), num_defined=defined)


def _scale(key: str, entry: SplitEntry) -> Markup | None:
    if entry.auc is None:
        return None
    low = 0.5 if min(entry.auc, *(entry.auc_ci or (1.0,))) >= 0.5 else 0.0
    words = f"AUC {decimals(entry.auc)}" + (f", interval {interval(entry.auc_ci)}" if entry.auc_ci else "")
    return charts.interval_chart(Told(f"{key}-scale", "AUC on a scale", words), entry.auc, entry.auc_ci, low)


def _method(entry: SplitEntry) -> list[str]:
    said = [how_the_interval_was_made(entry.ci_method, entry.unit)] if entry.auc_ci else []
    if entry.auc_ci_bootstrap:
        said.append(
            f"A second way, redrawing patients of each class at random (bootstrap), gives {interval(entry.auc_ci_bootstrap)}."
        )
    return [sentence for sentence in said if sentence]


def _number(label: str, rate: Rate | None, note: str = "") -> Iterator[Number]:
    if rate is not None and rate.value is not None:
        yield Number(label, percent(rate.value), interval(rate.ci, as_percent=True), note)


def _headline_numbers(entry: SplitEntry, names: tuple[str, str] | None) -> list[Number]:
    numbers: list[Number] = []
    if names:
        numbers += _number("Sensitivity", entry.sensitivity, f"{names[1]} recognised, at the threshold")
        numbers += _number("Specificity", entry.specificity, f"{names[0]} recognised, at the threshold")
    else:
        numbers += _number("Accuracy", entry.accuracy, "most likely class is right")
        numbers += _number("Balanced accuracy", entry.balanced_accuracy, "mean of the classes’ shares")
    if entry.average_precision is not None and entry.auc is not None:
        chance = entry.average_precision_chance if entry.average_precision_chance is not None else entry.prevalence
        note = f"chance: {decimals(chance)}, the prevalence" if chance is not None and names else ""
        label = "Average precision" if names else "Average precision, mean over classes"
        numbers.append(Number(label, decimals(entry.average_precision), "", note))
    return numbers


def _with_interval(rate: Rate | None, confidence: str) -> str:
    if rate is None or rate.value is None:
        return MISSING
    return f"{percent(rate.value)}" + (
        f", {confidence} interval {interval(rate.ci, as_percent=True)}" if rate.ci else ""
    )


def _operating(results: Results, entry: SplitEntry, key: str, names: tuple[str, str] | None) -> list[str]:
    if not names or entry.confusion is None:
        return []
    positive = names[1]
    threshold = entry.threshold or results.threshold
    unit, confidence = entry.unit, level(entry.ci_level)
    said: list[str] = []
    if threshold is not None:
        where = split_name(threshold.fixed_on)
        order = f", before the {split_name(key)} split was scored" if key != threshold.fixed_on else ""
        said.append(
            f"A score of {decimals(threshold.value)} or more counts as {positive}. This threshold was fixed on {where}: "
            f"{rule(threshold.rule)}{order}."
        )
    (tn, fp), (fn, tp) = entry.confusion
    if tp + fn:
        said.append(
            f"Of {plural(tp + fn, unit)} with {positive}, {count(tp)} were recognised and {count(fn)} missed "
            f"(sensitivity {_with_interval(entry.sensitivity, confidence)})."
        )
    if tn + fp:
        said.append(
            f"Of {plural(tn + fp, unit)} without, {count(tn)} were passed and {count(fp)} falsely flagged "
            f"(specificity {_with_interval(entry.specificity, confidence)})."
        )
    if tp + fp and entry.prevalence is not None:
        said.append(
            f"Of {plural(tp + fp, unit)} flagged, {count(tp)} were right (positive predictive value "
            f"{_with_interval(entry.ppv, confidence)}). This holds where {percent(entry.prevalence)} have {positive}, as here; "
            "where it is rarer, more of the flags are false."
        )
    rates = (entry.sensitivity, entry.specificity)
    method = next((rate.method for rate in rates if rate is not None and rate.method), None)
    return [*said, f"Intervals of these shares: {typeset(method)}."] if method else said


def _confusion(results: Results, entry: SplitEntry) -> Confusion | None:
    if entry.confusion is None:
        return None
    numbered = len(results.classes) > 2 and (
        len(results.classes) > 8 or sum(map(len, results.classes)) > MAX_HEAD_CHARACTERS
    )
    rows = []
    for index, counts in enumerate(entry.confusion):
        total = sum(counts)
        shares = [value / total if total else 0.0 for value in counts]
        rows.append(
            [
                Cell(count(value), percent(share) if total else MISSING, min(9, int(share * 10)), index == column)
                for column, (value, share) in enumerate(zip(counts, shares, strict=True))
            ]
        )
    return Confusion(results.classes, numbered, rows)


def _figures(results: Results, entry: SplitEntry, key: str) -> list[Figure]:
    if results.binary:
        threshold = entry.threshold or results.threshold
        return list(binary_figures(entry, key, *results.binary, threshold.value if threshold else None))
    return list(multiclass_figures(results.classes, entry, key, several_labels=results.several_labels))

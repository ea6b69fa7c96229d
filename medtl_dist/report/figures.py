"""one split's results → its figures: chart, caption, legend and the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from medtl_dist.report import charts
from medtl_dist.report.charts import Curve, Point
from medtl_dist.report.schema import CalibrationBin, Histogram, PrCurve, RocCurve, SplitEntry
from medtl_dist.report.svg import Told
from medtl_dist.report.wording import count, decimals, interval, level, percent, plural

READ_OFF_FPR = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50)
READ_OFF_RECALL = (0.50, 0.80, 0.90, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption; the first column names the row."""

    caption: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """A chart with its heading, caption, legend (line sample, name) and the numbers behind it."""

    title: str
    svg: Markup
    caption: str
    table: Table | None = None
    legend: list[tuple[Markup, str]] = field(default_factory=list)


def binary_figures(
    entry: SplitEntry, key: str, negative: str, positive: str, threshold: float | None
) -> Iterator[Figure]:
    """ROC, PR, scores by class, calibration: each where its numbers are there. ``key`` makes the ids unique."""
    curves = entry.curves
    if curves and curves.roc:
        yield _roc(entry, curves.roc, key, positive, threshold)
    if curves and curves.pr and entry.auc is not None:
        yield _pr(entry, curves.pr, key, positive, threshold)
    if entry.histogram:
        yield _histogram(entry, entry.histogram, key, (negative, positive), threshold)
    if entry.calibration:
        score, share = f"Mean score for {_short(positive)}", f"Observed share with {_short(positive)}"
        yield _calibration(entry, entry.calibration, key, (score, share), f"have {positive}")


def _at_threshold(x: float | None, y: float | None, threshold: float | None) -> Point | None:
    if x is None or y is None or threshold is None:
        return None
    return Point(x, y, f"threshold {decimals(threshold)}")


def _roc(entry: SplitEntry, curve: RocCurve, key: str, positive: str, threshold: float | None) -> Figure:
    specificity = entry.specificity.value if entry.specificity else None
    fpr = None if specificity is None else 1 - specificity
    point = _at_threshold(fpr, entry.sensitivity.value if entry.sensitivity else None, threshold)
    told = Told(f"{key}-roc", "ROC curve", f"Area under the curve {decimals(entry.auc)}.")
    return Figure(
        "ROC curve",
        charts.roc_chart(told, [Curve(positive, curve.fpr, curve.tpr)], point),
        f"Every point is a possible threshold: how much {positive} it recognises against how many {entry.unit}s "
        "without it it falsely flags. The nearer the top left, the better; the dashed line is guessing."
        + (" The dot is the threshold in use." if point else ""),
        _roc_table(curve),
    )


def _pr(entry: SplitEntry, curve: PrCurve, key: str, positive: str, threshold: float | None) -> Figure:
    recall = entry.sensitivity.value if entry.sensitivity else None
    point = _at_threshold(recall, entry.ppv.value if entry.ppv else None, threshold)
    chance = entry.average_precision_chance if entry.average_precision_chance is not None else entry.prevalence
    area = f"Average precision {decimals(entry.average_precision)}"
    told = Told(f"{key}-pr", "Precision-recall curve", f"{area}; chance {decimals(chance)}.")
    return Figure(
        "Precision and recall",
        charts.pr_chart(told, [Curve(positive, curve.recall, curve.precision)], chance, point),
        f"Of the {entry.unit}s flagged, how many have {positive} (precision), as more of it is recognised. "
        f"{area}. Precision depends on the prevalence.",
        _pr_table(curve),
    )


def _histogram(
    entry: SplitEntry, histogram: Histogram, key: str, names: tuple[str, str], threshold: float | None
) -> Figure:
    negative, positive = names
    above, below = sum(histogram.positive), sum(histogram.negative)
    bins = zip(histogram.edges, histogram.edges[1:], histogram.positive, histogram.negative, strict=False)
    rows = [[f"{low:.2f} to {high:.2f}", count(up), count(down)] for low, high, up, down in bins if up or down]
    told = Told(
        f"{key}-scores",
        "Histogram of scores by class",
        f"Scores of {plural(above, entry.unit)} with {positive} upwards, of {plural(below, entry.unit)} without down.",
    )
    return Figure(
        "Scores by class",
        charts.histogram_chart(
            told,
            histogram.edges,
            (positive, histogram.positive),
            (negative, histogram.negative),
            threshold,
            score_name=f"Score for {_short(positive)}",
            share_name=f"Share of the class’s {entry.unit}s (%)",
        ),
        f"{positive} upwards, {negative} downwards. "
        "The less the two overlap along the axis, the better they are told apart"
        + ("; what lies on the wrong side of the dashed line is called wrongly." if threshold is not None else "."),
        Table(f"Number of {entry.unit}s by score", ["Score", positive, negative], rows),
    )


def _calibration(
    entry: SplitEntry, bins: Sequence[CalibrationBin], key: str, axes: tuple[str, str], event: str
) -> Figure:
    rows = [
        [decimals(row.score_mean), percent(row.observed), interval(row.ci, as_percent=True), count(row.n)]
        for row in bins
    ]
    known = (("Brier score", entry.brier), ("calibration error", entry.ece))
    measures = ", ".join(f"{name} {decimals(value)}" for name, value in known if value is not None)
    told = Told(
        f"{key}-calibration", "Calibration plot", " ".join(f"Mean score {row[0]}: {row[1]} observed." for row in rows)
    )
    return Figure(
        "Calibration",
        charts.calibration_chart(
            told,
            [(row.score_mean, row.observed, row.ci) for row in bins],
            score_name=axes[0],
            observed_name=axes[1],
        ),
        f"Whether a score can be read as a probability: on the dashed line, 80 of 100 {entry.unit}s scored 0.8 "
        f"{event}. Below it, scores are too high. Bars: {level(entry.ci_level)} intervals."
        + (f" {measures} (0 is best)." if measures else ""),
        Table(f"{entry.unit.capitalize()}s grouped by score", ["Mean score", "Observed", "Interval", "n"], rows),
    )


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21].rstrip() + "…"


def _roc_table(curve: RocCurve) -> Table:
    points = list(zip(curve.fpr, curve.tpr, strict=True))
    rows = []
    for limit in READ_OFF_FPR:
        best = max((tpr for fpr, tpr in points if fpr <= limit + 1e-12), default=0.0)
        rows.append([f"{limit * 100:g}%", percent(best)])
    return Table("Read off the curve, afterwards", ["False-positive rate, at most", "Sensitivity"], rows)


def _pr_table(curve: PrCurve) -> Table:
    points = list(zip(curve.recall, curve.precision, strict=True))
    rows = []
    for limit in READ_OFF_RECALL:
        best = max((precision for recall, precision in points if recall >= limit - 1e-12), default=None)
        rows.append([f"{limit * 100:g}%", percent(best)])
    return Table("Read off the curve, afterwards", ["Sensitivity, at least", "Precision"], rows)


def multiclass_figures(
    classes: Sequence[str], entry: SplitEntry, key: str, *, several_labels: bool = False
) -> Iterator[Figure]:
    """ROC and PR of each class against the rest, or against those without it (``several_labels``). Beyond six classes all are
    grey but the best and the worst."""
    per_class = entry.per_class or {}
    known = [(name, per_class[name]) for name in dict.fromkeys(classes) if name in per_class]
    drawn = [(name, item, item.curves) for name, item in known if item.curves is not None]
    styles = _styles([(name, item.auc) for name, item, _ in drawn])
    coloured = " In colour: the highest and the lowest AUC." if len(drawn) > charts.NUM_STYLES else ""
    against = f"{entry.unit}s known to be without it" if several_labels else "all others"
    roc = [Curve(name, c.roc.fpr, c.roc.tpr, styles[name]) for name, _, c in drawn if c.roc]
    pr = [Curve(name, c.pr.recall, c.pr.precision, styles[name]) for name, _, c in drawn if c.pr]
    aucs = {name: decimals(item.auc, missing="undefined") for name, item, _ in drawn}
    precisions = {name: decimals(item.average_precision, missing="undefined") for name, item, _ in drawn}
    if roc:
        told = Told(f"{key}-roc", "ROC curves", _said("AUC", aucs, roc))
        yield Figure(
            "ROC curves",
            charts.roc_chart(told, _grey_first(roc), None),
            f"Each class against {against}. Every point is a possible threshold; the nearer the top left, the better. "
            f"The dashed line is guessing.{coloured}",
            legend=_legend(roc, aucs, "AUC"),
        )
    if pr:
        told = Told(f"{key}-pr", "Precision-recall curves", _said("average precision", precisions, pr))
        yield Figure(
            "Precision and recall",
            charts.pr_chart(told, _grey_first(pr), None, None),
            f"Of the {entry.unit}s given to a class, how many belong to it (precision), as more of it is recognised. "
            f"Chance is each class’s prevalence.{coloured}",
            legend=_legend(pr, precisions, "average precision"),
        )
    if entry.calibration:
        axes = "Mean score of the class called", "Share called rightly"
        yield _calibration(entry, entry.calibration, key, axes, "are called rightly")


def _styles(aucs: Sequence[tuple[str, float | None]]) -> dict[str, str]:
    if len(aucs) <= charts.NUM_STYLES:
        return {name: f"line-{index}" for index, (name, _) in enumerate(aucs)}
    ranked = sorted((auc, name) for name, auc in aucs if auc is not None)
    chosen = {ranked[0][1]: "line-1", ranked[-1][1]: "line-0"} if ranked else {}
    return {name: chosen.get(name, "line-other") for name, _ in aucs}


def _grey_first(curves: Sequence[Curve]) -> list[Curve]:
    return sorted(curves, key=lambda curve: curve.css != "line-other")


def _legend(curves: Sequence[Curve], values: dict[str, str], measure: str) -> list[tuple[Markup, str]]:
    named = [(charts.swatch(c.css), f"{c.name}, {measure} {values[c.name]}") for c in curves if c.css != "line-other"]
    others = sum(1 for curve in curves if curve.css == "line-other")
    return [*named, (charts.swatch("line-other"), f"the {others} other classes")] if others else named


def _said(measure: str, values: dict[str, str], curves: Sequence[Curve]) -> str:
    return "; ".join(f"{curve.name}: {measure} {values[curve.name]}" for curve in curves) + "."

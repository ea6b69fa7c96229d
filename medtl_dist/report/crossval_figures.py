"""crossval.json's numbers → the page's figures and tables: every fold's AUC, ROC curves within folds, who was held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from medtl_dist.report import charts
from medtl_dist.report.charts import Curve
from medtl_dist.report.figures import Figure, Table
from medtl_dist.report.svg import Axis, Frame, Told, circle, line, linear_axis, plot, text
from medtl_dist.report.wording import count, decimals, duration, interval, level

MAX_CURVES = 60  # of folds in one chart: more is a blot
MAX_CLASSES = 12
MAX_ROWS = 20  # repeats in the chart of folds


def fold_figure(found: Mapping[str, Any]) -> Figure | None:
    """The AUC of each fold as a dot, a row for each repeat; the line is the result."""
    entries = [entry for entry in found["per_fold"] if entry["auc"] is not None]
    if not entries:
        return None
    repeats = min(found["repeats"], MAX_ROWS)
    low = min(0.5, *(entry["auc"] for entry in entries))
    low = int(low * 10) / 10
    names = tuple((repeats - 1 - number, f"{number + 1}") for number in range(repeats))
    frame = Frame(
        linear_axis(low, 1.0, "AUC of a held-out fold"), Axis(-0.6, repeats - 0.4, names, "Repeat"),
        width=460, height=110 + 34 * repeats,
    )  # fmt: skip
    marks: list[Markup] = [line(frame.at_x(0.5), frame.top, frame.at_x(0.5), frame.height - frame.bottom, "reference")]
    x = frame.at_x(found["auc"])
    marks.append(line(x, frame.top, x, frame.height - frame.bottom, "threshold"))
    anchor, shift = ("end", -6) if x > frame.width / 2 else ("start", 6)
    marks.append(text(x + shift, frame.top + 6, f"all pairs {decimals(found['auc'])}", anchor=anchor, css="note"))
    at: Counter[tuple[int, float]] = Counter()  # dots at one place are drawn above one another
    for entry in entries:
        if entry["repeat"] < repeats:
            place = (entry["repeat"], round(entry["auc"], 2))
            y = frame.at_y(repeats - 1 - entry["repeat"]) - 5 * min(at[place], 4)
            marks.append(circle(frame.at_x(entry["auc"]), y, 4, "ring" if at[place] else "dot"))
            at[place] += 1
    spread = found["spread"]
    told = Told(
        "folds", "AUC of each held-out fold",
        f"From {decimals(spread['min'])} to {decimals(spread['max'])}, median {decimals(spread['median'])}.",
    )  # fmt: skip
    rest = f" The first {MAX_ROWS} repeats are drawn." if found["repeats"] > MAX_ROWS else ""
    sd = "" if spread["sd"] is None else f", standard deviation {decimals(spread['sd'])}"
    return Figure(
        "AUC of each held-out fold",
        plot(frame, told, *marks),
        f"Single folds go from {decimals(spread['min'])} to {decimals(spread['max'])}, median {decimals(spread['median'])}{sd}. "
        "A ring is one more fold of the same AUC. A fold holds few patients, so its own AUC says little; the spread is no error "
        "of the result, whose line counts all "
        f"pairs within folds.{rest}",
    )


def roc_figures(found: Mapping[str, Any]) -> list[Figure]:
    """A chart for each class asked: the folds' curves, and their mean, below which lies the AUC."""
    return list(_rocs(found))


def _rocs(found: Mapping[str, Any]) -> Iterator[Figure]:
    with_curves = [(name, entry) for name, entry in found["per_class"].items() if entry["curves"]]
    for number, (name, entry) in enumerate(with_curves[:MAX_CLASSES]):
        curves = entry["curves"]
        single = [Curve("", one["fpr"], one["tpr"], "line-other") for one in curves["folds"][:MAX_CURVES]]
        mean = Curve("mean", curves["mean"]["fpr"], curves["mean"]["tpr"], "line-0")
        told = Told(
            f"roc-{number}", f"ROC curves within folds, {name}", f"Area below the mean {decimals(entry['auc'])}."
        )
        some = f" The first {MAX_CURVES} folds are drawn." if len(curves["folds"]) > MAX_CURVES else ""
        rest = len(with_curves) - MAX_CLASSES
        more = f" {rest} more classes are in the table only." if number == MAX_CLASSES - 1 and rest > 0 else ""
        yield Figure(
            "ROC within folds" if found["task"] == "binary" else f"ROC within folds: {name}",
            charts.roc_chart(told, [*single, mean], None),
            "Each grey curve is a fold, scored by its own model. The mean is taken at each false-positive rate, a fold counting "
            f"as many times as it has pairs: the area below it, {decimals(entry['auc'])}, is the AUC of pairs within folds. It "
            f"is no curve of one model: a threshold can’t be read from it.{some}{more}",
            legend=[(charts.swatch("line-0"), "mean"), (charts.swatch("line-other"), "single folds")],
        )


def fold_table(found: Mapping[str, Any]) -> Table:
    """What was held out and trained on, fold by fold."""
    binary = found["task"] == "binary"
    signs = [f"With {found['classes'][1]}", "Without"] if binary else []
    unit = found["unit"]
    head = ["Repeat, fold", f"Held-out {unit}s", "Patients", *signs, "Trained on images", "Epoch", "Time", "AUC"]
    rows = []
    for entry in found["per_fold"]:
        counts = [count(entry["n_positive"]), count(entry["n_negative"])] if binary else []
        rows.append(
            [
                f"{entry['repeat'] + 1}, {entry['fold'] + 1}",
                count(entry["n"]),
                count(entry["n_groups"]),
                *counts,
                count(entry["train"]["samples"]),
                f"{entry['epoch'] + 1} of {entry['epochs_run']}",
                duration(entry["seconds"]),
                decimals(entry["auc"], missing="no pair"),
            ]
        )
    return Table("Each training: its report is in the folder of the fold, folds/REPEAT-FOLD", head, rows)


def class_table(found: Mapping[str, Any]) -> Table:
    """Each class against the rest."""
    rows = [
        [
            name,
            count(entry["n_positive"]),
            count(entry["n_negative"]),
            decimals(entry["auc"], missing="undefined"),
            interval(tuple(entry["auc_ci"]) if entry["auc_ci"] else None),
            count(entry["folds_without_auc"]),
        ]
        for name, entry in found["per_class"].items()
    ]
    head = ["Class", "With it", "Without", "AUC", f"{level(found['ci_level'])} interval", "Folds without a pair"]
    return Table("Each class against the rest, pairs within folds", head, rows)

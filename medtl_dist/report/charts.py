"""curves, bins and epochs → the report's charts, as inline SVG (see svg.py for the drawing ground).

Colours are Okabe and Ito's (safe for colour-blind readers), and nothing depends on colour alone: curves differ in their
dashes too, the two classes lie on two sides of an axis, and every chart has its numbers in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from medtl_dist.report.svg import (
    EMPTY,
    Axis,
    Frame,
    Told,
    circle,
    image,
    line,
    linear_axis,
    nice_step,
    path,
    plot,
    rectangle,
    share_axis,
    shorten,
    text,
)

NUM_STYLES = 6  # line-0 … line-5 in style.css: colour and dash together


@dataclass(frozen=True)
class Curve:
    """One curve of a ROC or PR chart; x and y are shares in [0, 1]. ``css`` is its class in style.css."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    css: str = "line-0"


@dataclass(frozen=True)
class Point:
    """A marked point of a curve, in shares, with its label."""

    x: float
    y: float
    label: str


def swatch(css: str) -> Markup:
    """The short piece of line that stands before a curve's name in a legend."""
    return Markup('<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true">{}</svg>').format(
        path([(1, 5), (33, 5)], css)
    )


def _mark(frame: Frame, point: Point | None, *, to_left: bool) -> Markup:
    if point is None:
        return EMPTY
    x, y = frame.at_x(point.x), frame.at_y(point.y)
    anchor, shift = ("end", -11) if to_left else ("start", 11)
    label = text(x + shift, min(y + 20, frame.height - frame.bottom - 8), point.label, anchor=anchor, css="note")
    return Markup("").join([circle(x, y, 6, "mark"), label])


def roc_chart(told: Told, curves: Sequence[Curve], point: Point | None) -> Markup:
    """ROC curves (x: false-positive rate, y: sensitivity) over the line of chance, with the threshold's point."""
    frame = Frame(share_axis("False-positive rate (1 − specificity)"), share_axis("Sensitivity"))
    corner = (frame.at_x(0), frame.at_y(0)), (frame.at_x(1), frame.at_y(1))
    turn = math.degrees(math.atan2(corner[1][1] - corner[0][1], corner[1][0] - corner[0][0]))
    chance = line(*corner[0], *corner[1], "reference")
    label = text(frame.at_x(0.26) + 5, frame.at_y(0.26) + 17, "chance", css="note", turn=turn)
    drawn = [path([(frame.at_x(x), frame.at_y(y)) for x, y in zip(c.x, c.y, strict=True)], c.css) for c in curves]
    to_left = point is not None and point.x > 0.6
    return plot(frame, told, chance, label, *drawn, _mark(frame, point, to_left=to_left))


def _stairs(recall: Sequence[float], precision: Sequence[float]) -> list[tuple[float, float]]:
    """The steps whose area is the average precision: up to recall r the precision is the one reached at r."""
    order = range(len(recall)) if not recall or recall[0] <= recall[-1] else range(len(recall) - 1, -1, -1)
    steps: list[tuple[float, float]] = []
    for index in order:
        if steps:
            steps.append((steps[-1][0], precision[index]))
        steps.append((recall[index], precision[index]))
    return steps


def pr_chart(told: Told, curves: Sequence[Curve], chance: float | None, point: Point | None) -> Markup:
    """Precision over sensitivity (recall); the dashed line is the prevalence, which chance would reach."""
    frame = Frame(share_axis("Sensitivity (recall)"), share_axis("Precision (positive predictive value)"))
    marks: list[Markup] = []
    if chance is not None:
        y = frame.at_y(chance)
        above = chance < 0.08
        marks += [line(frame.at_x(0), y, frame.at_x(1), y, "reference")]
        marks += [text(frame.at_x(0) + 8, y + (-8 if above else 18), f"chance = prevalence {chance:.2f}", css="note")]
    for curve in curves:
        steps = _stairs(curve.x, curve.y)
        marks.append(path([(frame.at_x(x), frame.at_y(y)) for x, y in steps], curve.css))
    to_left = point is None or point.x > 0.4
    return plot(frame, told, *marks, _mark(frame, point, to_left=to_left))


def calibration_chart(
    told: Told,
    bins: Sequence[tuple[float, float, tuple[float, float] | None]],
    *,
    score_name: str,
    observed_name: str,
) -> Markup:
    """Bins (mean score, observed share, its interval) against the diagonal where scores are true probabilities."""
    frame = Frame(share_axis(score_name), share_axis(observed_name))
    start, end = (frame.at_x(0), frame.at_y(0)), (frame.at_x(1), frame.at_y(1))
    turn = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
    marks = [line(*start, *end, "reference")]
    for score, _, interval in bins:
        if interval is not None:
            marks.append(
                line(frame.at_x(score), frame.at_y(interval[0]), frame.at_x(score), frame.at_y(interval[1]), "whisker")
            )
    said = frame.at_x(0.55) + 5, frame.at_y(0.55) + 17
    marks.append(text(*said, "score = observed share", anchor="middle", css="note", turn=turn))
    points = [(frame.at_x(score), frame.at_y(observed)) for score, observed, _ in bins]
    return plot(frame, told, *marks, path(points, "thin"), *[circle(*p, 4.5, "dot") for p in points])


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def histogram_chart(
    told: Told,
    edges: Sequence[float],
    above: tuple[str, Sequence[float]],
    below: tuple[str, Sequence[float]],
    threshold: float | None,
    *,
    score_name: str,
    share_name: str,
) -> Markup:
    """Scores of the class ``above`` drawn upwards and of ``below`` downwards, each as shares of its own class."""
    up, down = _shares(above[1]), _shares(below[1])
    top = max([*up, *down, 0.05]) * 1.04
    step = nice_step(top, 4)
    levels = [index * step for index in range(-int(top / step), int(top / step) + 1)]
    digits = 0 if step >= 0.01 else 1
    y_axis = Axis(-top, top, tuple((level, f"{abs(level) * 100:.{digits}f}") for level in levels), share_name)
    frame = Frame(share_axis(score_name), y_axis, top=34)
    zero = frame.at_y(0)
    marks: list[Markup] = []
    for shares, css, sign in ((up, "bar-above", 1), (down, "bar-below", -1)):
        for index, share in enumerate(shares):
            if share > 0:
                left, right = frame.at_x(edges[index]), frame.at_x(edges[index + 1])
                height = abs(frame.at_y(sign * share) - zero)
                marks.append(
                    rectangle(left + 0.6, zero - height if sign > 0 else zero, right - left - 1.2, height, css)
                )
    marks.append(line(frame.left, zero, frame.width - frame.right, zero, "axis"))
    if threshold is not None:
        x = frame.at_x(threshold)
        anchor = "middle" if 0.2 < threshold < 0.8 else "start" if threshold <= 0.2 else "end"
        marks.append(line(x, frame.top - 8, x, frame.height - frame.bottom, "threshold"))
        marks.append(text(x, frame.top - 14, f"threshold {threshold:.3f}", anchor=anchor, css="note"))
    room = (frame.width - frame.left - frame.right) * 0.6
    names = [f"{shorten(name, room)} (n = {sum(counts):,.0f})" for name, counts in (above, below)]
    marks.append(text(frame.at_x(0) + 8, frame.top + 16, names[0], css="name-above"))
    marks.append(text(frame.at_x(1) - 8, frame.height - frame.bottom - 10, names[1], anchor="end", css="name-below"))
    return plot(frame, told, *marks)


def _epoch_axis(epochs: Sequence[int]) -> Axis:
    first, last = epochs[0], epochs[-1]
    step = max(1, round(nice_step(max(last - first, 1), 8)))
    values = range(math.ceil(first / step) * step, last + 1, step)
    low, high = (
        (first - 0.5, last + 0.5) if first == last else (first - 0.02 * (last - first), last + 0.02 * (last - first))
    )
    return Axis(low, high, tuple((value, str(value)) for value in values), "Epoch")


def learning_chart(
    told: Told,
    epochs: Sequence[int],
    lines: Sequence[tuple[str, Sequence[float | None]]],
    best_epoch: int | None,
    *,
    y_name: str,
    ceiling: float | None = None,
    best_label: Callable[[float], str] | None = None,
) -> Markup:
    """Values per epoch (None leaves a gap); the best epoch is a vertical line, and a ring on the last line drawn.

    ``epochs`` is not empty and grows; each line has a value or None per epoch. The y axis ends at ``ceiling`` at most.
    """
    known = [value for _, values in lines for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 0.1
    high = high + margin if ceiling is None else min(high + margin, ceiling)
    low = max(low - margin, 0.0) if low >= 0 else low - margin
    y_axis = linear_axis(low, high, y_name, max_ticks=6)
    frame = Frame(_epoch_axis(epochs), y_axis, height=330, top=34)
    marks: list[Markup] = []
    if best_epoch is not None and epochs[0] <= best_epoch <= epochs[-1]:
        x = frame.at_x(best_epoch)
        share = (x - frame.left) / (frame.width - frame.left - frame.right)
        anchor = "middle" if 0.2 < share < 0.8 else "start" if share <= 0.2 else "end"
        marks.append(line(x, frame.top - 8, x, frame.height - frame.bottom, "threshold"))
        value = next((v for e, v in zip(epochs, lines[-1][1], strict=True) if e == best_epoch), None)
        said = f": {best_label(value)}" if best_label is not None and value is not None else ""
        marks.append(text(x, frame.top - 14, f"best epoch {best_epoch}{said}", anchor=anchor, css="note"))
        if value is not None:
            marks.append(circle(x, frame.at_y(value), 8, "ring"))
    for style, (_, values) in enumerate(lines):
        marks.append(_series(frame, epochs, values, style, dots=len(epochs) <= 40))
    return plot(frame, told, *marks)


def _series(frame: Frame, epochs: Sequence[int], values: Sequence[float | None], style: int, *, dots: bool) -> Markup:
    """One line broken where a value is missing; with few epochs each has a dot, so that a single one shows too."""
    parts: list[Markup] = []
    piece: list[tuple[float, float]] = []
    for epoch, value in [*zip(epochs, values, strict=True), (epochs[-1], None)]:
        if value is not None:
            piece.append((frame.at_x(epoch), frame.at_y(value)))
        elif piece:
            parts.append(path(piece, f"line-{style}"))
            if dots or len(piece) == 1:
                parts += [circle(x, y, 3.4, f"dot-{style}") for x, y in piece]
            piece = []
    return Markup("").join(parts)


def interval_chart(told: Told, value: float, interval: tuple[float, float] | None, low: float) -> Markup:
    """The headline's scale: AUC from ``low`` (0.5 chance, or 0) to 1 (perfect), its interval as a bar."""
    frame = Frame(Axis(low, 1.0, (), ""), Axis(0, 1, (), ""), width=420, height=62, left=24, right=24, top=0, bottom=0)
    y = 20
    marks = [line(frame.at_x(low), y, frame.at_x(1), y, "axis")]
    for tick in [low + (1 - low) * index / 5 for index in range(6)]:
        label = f"{tick:.1f}"
        label = {"0.5": "0.5 chance", "1.0": "1 perfect"}.get(label, label) if low == 0.5 else label
        anchor = "start" if tick == low else "end" if tick == 1.0 else "middle"
        marks.append(line(frame.at_x(tick), y - 4, frame.at_x(tick), y + 4, "axis"))
        shift = -8 if anchor == "start" else 8 if anchor == "end" else 0
        marks.append(text(frame.at_x(tick) + shift, y + 26, label, anchor=anchor, css="tick"))
    if interval is not None:
        left, right = frame.at_x(interval[0]), frame.at_x(interval[1])
        marks.append(rectangle(left, y - 7, max(right - left, 1.5), 14, "band"))
    marks.append(circle(frame.at_x(value), y, 6.5, "dot"))
    return image(frame.width, frame.height, told, *marks)


def class_interval(told: Told, value: float | None, interval: tuple[float, float] | None, low: float) -> Markup:
    """One row's AUC and interval as a small picture, all rows on the same scale from ``low`` to 1."""
    width, y = 180.0, 9.0

    def at(share: float) -> float:
        return 6 + (width - 12) * (share - low) / (1 - low)

    marks = [line(at(low), y, at(1), y, "grid"), line(at(0.5), 2, at(0.5), 16, "reference")]
    if interval is not None:
        marks.append(rectangle(at(interval[0]), y - 4, max(at(interval[1]) - at(interval[0]), 1), 8, "band"))
    if value is not None:
        marks.append(circle(at(value), y, 4, "dot"))
    return image(width, 18, told, *marks)

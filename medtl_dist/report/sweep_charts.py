"""trials → the sweep page's charts, as inline SVG. No chart has a label beside a mark: what a mark means stands in the legend
below it, so that labels can't overlap however the trials lie. Colour never stands alone: shapes and dashes differ too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from medtl_dist.report.charts import NUM_STYLES
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
    shorten,
    text,
)

LOG_RATIO = 20  # a positive knob whose values span more than this factor is drawn on a logarithmic axis


@dataclass(frozen=True)
class Mark:
    """One trial in the chart of AUC against a knob. ``style`` is its series'; ``role`` is "winner", "best" or ""."""

    x: float
    auc: float
    interval: tuple[float, float] | None
    style: int
    role: str = ""


@dataclass(frozen=True)
class Line:
    """One trial's validation AUC by epoch (from 1); ``css`` is a line class of style.css, ``role`` as ``Mark``."""

    epochs: Sequence[int]
    aucs: Sequence[float | None]
    css: str


def shape(x: float, y: float, style: int, *, radius: float = 5) -> Markup:
    """A trial's mark: disc, square, triangle, diamond, triangle on its head, cross; each in its own colour."""
    css, r = f"shape-{style % NUM_STYLES}", radius
    kind = style % NUM_STYLES
    if kind == 0:
        return circle(x, y, r, css)
    if kind == 1:
        return rectangle(x - r * 0.9, y - r * 0.9, 1.8 * r, 1.8 * r, css)
    corners = {
        2: [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        3: [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        4: [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
        5: [(-1, -0.35), (-0.35, -0.35), (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35),
            (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35)],
    }[kind]  # fmt: skip
    return path([(x + r * dx, y + r * dy) for dx, dy in corners], css)


def ring(x: float, y: float, role: str) -> Markup:
    """A ring around the winner; a box around the plain best."""
    if role == "winner":
        return circle(x, y, 10, "ring")
    return rectangle(x - 9, y - 9, 18, 18, "ring") if role == "best" else EMPTY


def sample(*parts: Markup) -> Markup:
    """A mark as it stands before its meaning in a legend."""
    return Markup('<svg class="swatch mark-swatch" viewBox="-12 -12 24 24" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


def auc_axis(values: Sequence[float], name: str = "Validation AUC") -> Axis:
    """An axis around some AUCs, within 0 to 1."""
    low, high = min(values, default=0.5), max(values, default=1.0)
    margin = max((high - low) * 0.08, 0.005)
    return linear_axis(max(0.0, low - margin), min(1.0, high + margin), name, max_ticks=6)


def knob_axis(values: Sequence[float], name: str) -> tuple[Axis, bool]:
    """An axis over a knob's numbers, and whether it is logarithmic; its ends are in the axis's own units."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_RATIO:
        first, last = math.log10(low) - 0.08, math.log10(high) + 0.08
        powers = range(math.ceil(first), math.floor(last) + 1)
        if len(powers) < 2:
            powers = range(math.floor(first), math.ceil(last) + 1)
        step = max(1, round(len(powers) / 6))
        ticks = tuple((float(power), _power(power)) for power in powers[::step] if first <= power <= last)
        return Axis(first, last, ticks, name), True
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    axis = linear_axis(low - margin, high + margin, name, max_ticks=5)
    return axis, False


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -4 <= power <= 4 else f"1e{power}"


def scatter_chart(told: Told, marks: Sequence[Mark], *, x_name: str) -> Markup:
    """AUC against a knob, a shape per series, intervals as thin bars. ``marks`` is not empty."""
    x_axis, is_log = knob_axis([mark.x for mark in marks], x_name)
    ends = [end for mark in marks for end in (mark.auc, *(mark.interval or ()))]
    frame = Frame(x_axis, auc_axis(ends), height=380)
    drawn: list[Markup] = []
    placed = [(mark, frame.at_x(math.log10(mark.x) if is_log else mark.x), frame.at_y(mark.auc)) for mark in marks]
    for mark, x, _ in placed:
        if mark.interval is not None:
            drawn.append(line(x, frame.at_y(mark.interval[0]), x, frame.at_y(mark.interval[1]), "faint"))
    drawn += [shape(x, y, mark.style) for mark, x, y in placed]
    drawn += [ring(x, y, mark.role) for mark, x, y in placed]
    return plot(frame, told, *drawn)


def curves_chart(told: Told, lines: Sequence[Line]) -> Markup:
    """Every trial's AUC by epoch; those in grey first, so that the others lie above them."""
    last = max((epoch for one in lines for epoch in one.epochs), default=1)
    known = [auc for one in lines for auc in one.aucs if auc is not None]
    step = max(1, round(nice_step(max(last - 1, 1), 8)))
    low, high = (0.5, 1.5) if last == 1 else (1 - 0.02 * (last - 1), last + 0.02 * (last - 1))
    ticks = tuple((float(value), str(value)) for value in range(1, last + 1) if value == 1 or value % step == 0)
    frame = Frame(Axis(low, high, _apart(ticks, high - low), "Epoch"), auc_axis(known), height=380)
    drawn = []
    for one in sorted(lines, key=lambda each: each.css != "line-other"):
        points = [
            (frame.at_x(epoch), frame.at_y(auc))
            for epoch, auc in zip(one.epochs, one.aucs, strict=True)
            if auc is not None
        ]
        drawn.append(path(points, one.css))
        if points:
            drawn.append(circle(*points[-1], 2.6, f"end-{one.css}"))
    return plot(frame, told, *drawn)


def _apart(ticks: tuple[tuple[float, str], ...], span: float) -> tuple[tuple[float, str], ...]:
    """Ticks less those that would touch the one before: a label takes about a twentieth of the axis."""
    kept: list[tuple[float, str]] = []
    for value, label in ticks:
        if not kept or value - kept[-1][0] >= span / 20:
            kept.append((value, label))
    return tuple(kept)


def parallel_chart(
    told: Told, names: Sequence[str], columns: Sequence[Sequence[Any]], styles: Sequence[str], *, width: float = 960
) -> Markup:
    """A vertical axis per column and a line per trial through its values; the last column is the AUC.

    Args:
        names, columns: of each axis its name, and a value per trial.
        styles: a line class per trial; "line-other" lies below the rest.
    """
    height, top, bottom, side = 330.0, 58.0, 26.0, 18.0
    room = 118.0  # right of the last axis, for its labels
    gap = (width - 2 * side - room) / max(len(names) - 1, 1)
    places = [side + at * gap for at in range(len(names))]
    shares, parts = [], []
    for at, (name, values) in enumerate(zip(names, columns, strict=True)):
        share, labels = spread(values)
        shares.append(share)
        x, below = places[at], 20 if at % 2 == 0 else 40
        free = 2 * gap if at + 2 <= len(names) - 1 else width - x
        parts.append(line(x, top, x, height - bottom, "axis"))
        parts.append(text(x, below, shorten(name, min(free, width - x) - 10), css="axis-name"))
        for value, label in labels:
            y = height - bottom - value * (height - top - bottom)
            wide = (gap if at < len(names) - 1 else room) - 16
            parts.append(line(x - 3, y, x + 3, y, "axis"))
            parts.append(text(x + 7, y + 4.5, shorten(label, wide), css="note"))
    drawn = []
    for trial in sorted(range(len(styles)), key=lambda each: styles[each] != "line-other"):
        points = [
            (x, height - bottom - share[trial] * (height - top - bottom))
            for x, share in zip(places, shares, strict=True)
        ]
        drawn.append(path(points, styles[trial]))
    return image(width, height, told, *drawn, *parts)


def spread(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where each value lies on an axis from 0 to 1, and the axis's labels: three for numbers, each value's own for names."""
    numbers = [float(value) for value in values if _is_number(value)]
    if len(numbers) == len(values) and len(set(numbers)) > 4:
        low, high = min(numbers), max(numbers)
        if low > 0 and high / low >= LOG_RATIO:
            at = [math.log(value / low) / math.log(high / low) for value in numbers]
            middle = math.sqrt(low * high)
        else:
            at, middle = [(value - low) / (high - low) for value in numbers], (low + high) / 2
        return at, [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")]
    texts = [shown(value) for value in values]
    order = sorted(dict.fromkeys(texts), key=_number_first)
    place = {label: index / max(len(order) - 1, 1) if len(order) > 1 else 0.5 for index, label in enumerate(order)}
    every = max(1, math.ceil(len(order) / 12))
    return [place[label] for label in texts], [(place[label], label) for label in order[::every]]


def shown(value: Any) -> str:
    """A knob's value as people write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return f"{value:.4g}"
    return str(value)


def _number_first(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def bars_chart(
    told: Told, rows: Sequence[tuple[str, float, float, float]], chance: float | None, *, x_name: str
) -> Markup:
    """A bar per knob (name, value, low, high), its range as a thin line; the dashed line is what chance reaches."""
    top_value = max([high for *_, high in rows] + [chance or 0.0, 0.05]) * 1.05
    low_value = min([low for _, _, low, _ in rows] + [0.0])
    height = 30.0 * len(rows) + 66
    frame = Frame(
        linear_axis(low_value, top_value, x_name), Axis(0, len(rows), (), ""), width=460, height=height, left=170
    )
    marks = []
    for at, (name, value, low, high) in enumerate(rows):
        y = frame.at_y(len(rows) - at - 0.5)
        left, right = sorted((frame.at_x(0), frame.at_x(value)))
        marks.append(rectangle(left, y - 7, max(right - left, 0.5), 14, "bar-below"))
        marks.append(line(frame.at_x(low), y, frame.at_x(high), y, "range"))
        marks.append(text(frame.left - 8, y + 4.5, shorten(name, frame.left - 12), anchor="end"))
    marks.append(line(frame.at_x(0), frame.top, frame.at_x(0), frame.height - frame.bottom, "axis"))
    if chance is not None:
        marks.append(
            line(frame.at_x(chance), frame.top - 6, frame.at_x(chance), frame.height - frame.bottom, "threshold")
        )
    return plot(frame, told, *marks)


def luck_chart(told: Told, best: float, corrected: float, interval: tuple[float, float] | None) -> Markup:
    """The best AUC (disc, its interval as a band) and what is left of it (ring) on one scale."""
    axis = auc_axis([best, corrected, *(interval or ())], "Validation AUC")
    frame = Frame(axis, Axis(0, 1, (), ""), height=112, left=24, right=24)
    y = frame.at_y(0.5)
    marks = []
    if interval is not None:
        marks.append(
            rectangle(
                frame.at_x(interval[0]), y - 8, max(frame.at_x(interval[1]) - frame.at_x(interval[0]), 1), 16, "band"
            )
        )
    marks += [circle(frame.at_x(best), y, 6, "dot"), circle(frame.at_x(corrected), y, 6.5, "mark")]
    return plot(frame, told, *marks)

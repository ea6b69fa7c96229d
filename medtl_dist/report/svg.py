"""numbers → inline SVG: the ground of every chart (frame, axes, lines, labels); nothing here knows what is drawn.

Text and names go through ``Markup.format``, which escapes them, so a class name can't become markup. Colours and
strokes are CSS classes of style.css: the page's policy allows no inline style.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

EMPTY = Markup("")
_CHARACTER_EM = 0.56  # mean advance of a sans-serif letter: enough to keep a label inside its frame
FONT_PX = 13


@dataclass(frozen=True)
class Axis:
    """One axis: its range in data units, its ticks (position, text) and its name with the unit."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    name: str


@dataclass(frozen=True)
class Frame:
    """A plot area in SVG units. ``left, right, top, bottom`` are the margins around it."""

    x: Axis
    y: Axis
    width: float = 460
    height: float = 452
    left: float = 60
    right: float = 14
    top: float = 16
    bottom: float = 50

    def at_x(self, value: float) -> float:
        """Horizontal SVG position of a data value."""
        span = self.width - self.left - self.right
        return self.left + span * (value - self.x.low) / (self.x.high - self.x.low)

    def at_y(self, value: float) -> float:
        """Vertical SVG position of a data value (SVG counts downwards)."""
        span = self.height - self.top - self.bottom
        return self.height - self.bottom - span * (value - self.y.low) / (self.y.high - self.y.low)


def shorten(name: str, max_px: float, font_px: float = FONT_PX) -> str:
    """Cuts a name so that it takes at most about ``max_px`` SVG units, with an ellipsis where something is missing."""
    room = max(4, int(max_px / (font_px * _CHARACTER_EM)))
    return name if len(name) <= room else name[: room - 1].rstrip() + "…"


def nice_step(span: float, max_ticks: int) -> float:
    """Smallest of 1, 2, 5 × 10^k that divides ``span`` (> 0) into at most ``max_ticks`` steps."""
    raw = span / max_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def linear_axis(low: float, high: float, name: str, *, max_ticks: int = 5, percent: bool = False) -> Axis:
    """An axis over [low, high] with round ticks; ``percent`` writes shares as per cent."""
    step = nice_step(high - low, max_ticks)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step * (100 if percent else 1)) + 1e-9))
    values = [index * step for index in range(first, last + 1)]
    ticks = tuple((value, f"{value * 100 if percent else value:.{digits}f}") for value in values)
    return Axis(low, high, ticks, name)


def share_axis(name: str) -> Axis:
    """The axis of a share or a score: 0 to 1 in fifths."""
    return linear_axis(0.0, 1.0, name)


def coordinate(value: float) -> str:
    """One decimal of an SVG unit is a tenth of a pixel: finer is only a larger file."""
    return f"{value:.1f}".removesuffix(".0")


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """A straight line in SVG units."""
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(
        coordinate(x1), coordinate(y1), coordinate(x2), coordinate(y2), css
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", css: str = "", turn: float = 0) -> Markup:
    """A label; ``turn`` rotates it by degrees about its own anchor."""
    rotated = Markup(' transform="rotate({} {} {})"').format(coordinate(turn), coordinate(x), coordinate(y))
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}"{}>{}</text>').format(
        coordinate(x), coordinate(y), anchor, css, rotated if turn else EMPTY, content
    )


def path(points: Sequence[tuple[float, float]], css: str) -> Markup:
    """A polyline through points in SVG units; points that fall on the same tenth of a pixel are drawn once."""
    written: list[str] = []
    for x, y in points:
        point = f"{coordinate(x)} {coordinate(y)}"
        if not written or written[-1] != point:
            written.append(point)
    return Markup('<path d="M{}" class="{}"/>').format(" L".join(written), css) if written else EMPTY


def rectangle(x: float, y: float, width: float, height: float, css: str) -> Markup:
    """A filled box in SVG units."""
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}"/>').format(
        coordinate(x), coordinate(y), coordinate(width), coordinate(height), css
    )


def circle(x: float, y: float, radius: float, css: str) -> Markup:
    """A dot in SVG units."""
    return Markup('<circle cx="{}" cy="{}" r="{}" class="{}"/>').format(
        coordinate(x), coordinate(y), coordinate(radius), css
    )


def axes(frame: Frame) -> Markup:
    """Grid, ticks and the names of both axes."""
    floor, ceiling = frame.height - frame.bottom, frame.top
    parts = []
    for value, label in frame.y.ticks:
        y = frame.at_y(value)
        parts.append(line(frame.left, y, frame.width - frame.right, y, "grid"))
        parts.append(text(frame.left - 8, y + 4.5, label, anchor="end", css="tick"))
    for value, label in frame.x.ticks:
        x = frame.at_x(value)
        parts.append(line(x, floor, x, floor + 5, "axis"))
        parts.append(text(x, floor + 20, label, anchor="middle", css="tick"))
    parts.append(line(frame.left, floor, frame.width - frame.right, floor, "axis"))
    middle_x = (frame.left + frame.width - frame.right) / 2
    parts.append(text(middle_x, frame.height - 8, frame.x.name, anchor="middle", css="axis-name"))
    if frame.y.name:
        parts.append(text(15, (floor + ceiling) / 2, frame.y.name, anchor="middle", css="axis-name", turn=-90))
    return Markup("").join(parts)


class Told(NamedTuple):
    """What a screen reader says of a chart: its title, then what it shows. ``ident`` is unique in the page."""

    ident: str
    title: str
    description: str


def image(width: float, height: float, told: Told, *parts: Markup) -> Markup:
    """An <svg> that is read out as one image."""
    return Markup(
        '<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{ident}-t {ident}-d">'
        '<title id="{ident}-t">{title}</title><desc id="{ident}-d">{description}</desc>{parts}</svg>'
    ).format(width=coordinate(width), height=coordinate(height), parts=Markup("").join(parts), **told._asdict())


def plot(frame: Frame, told: Told, *marks: Markup) -> Markup:
    """A chart: axes below, then the marks in the order given."""
    return image(frame.width, frame.height, told, axes(frame), *marks)

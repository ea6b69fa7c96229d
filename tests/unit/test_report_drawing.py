"""Numbers in words, and what the charts draw."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from example_run import scored_split
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.metrics.ranking import average_precision, pr_curve
from medtl_dist.report import charts, svg, wording

# ---- numbers in words


@given(value=st.one_of(st.floats(0, 1), st.floats(0.999, 1), st.floats(0, 1e-3)))
def test_rounding_never_claims_certainty(value: float) -> None:
    assert (wording.decimals(value) == "1.000") == (value == 1)
    assert (wording.decimals(value) == "0.000") == (value == 0)
    assert (wording.percent(value) == "100.0%") == (value == 1)
    assert (wording.percent(value) == "0.0%") == (value == 0)


@given(auc=st.floats(0.5, 1))
def test_pairs_never_claim_all_unless_all(auc: float) -> None:
    base, right, _ = wording.pair_counts(auc, None)
    if auc < 1 - 1e-6:
        assert right != base
    pairs = int(base.replace(",", ""))
    # Rounded to a whole pair; 1e-9 of one for the float that stands exactly between two, as 0.875.
    assert abs(int(right.replace(",", "")) - auc * pairs) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.decimals(None), "–"),
        (wording.decimals(0.9996), ">\u00a00.999"),
        (wording.decimals(1.5), "1.500"),
        (wording.percent(0.99996), ">\u00a099.9%"),
        (wording.interval((0.1, 1.0)), "0.100 to 1.000"),
        (wording.duration(4.26), "4.3\u00a0s"),
        (wording.duration(59.6), "1\u00a0min 0\u00a0s"),
        (wording.duration(7265), "2\u00a0h 1\u00a0min"),
        (wording.moment("2026-03-12T15:05:22+01:00"), "12 March 2026, 14:05 UTC"),
        (wording.moment("yesterday"), "yesterday"),
        (wording.plural(1, "image"), "1\u00a0image"),
        (wording.plural(1200, "class"), "1,200\u00a0classes"),
        (wording.pair_counts(0.9971, (0.99, 0.9999)), ("1,000", "997", "990 to 1,000")),
        (wording.rule("sensitivity >= 0.95"), "the highest score that reached sensitivity ≥ 0.95"),
    ],
)
def test_wording(said: object, expected: object) -> None:
    assert said == expected


# ---- charts


@given(low=st.floats(-5, 5), span=st.floats(1e-4, 1e4))
def test_ticks_are_round_distinct_and_inside(low: float, span: float) -> None:
    axis = svg.linear_axis(low, low + span, "x", max_ticks=6)
    values, labels = [value for value, _ in axis.ticks], [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels)
    assert 1 <= len(labels) <= 8
    assert all(low - span * 1e-6 <= value <= low + span * (1 + 1e-6) for value in values)
    assert all(abs(float(label) - value) <= span * 1e-6 for value, label in axis.ticks)


@given(seed=st.integers(0, 2**16))
def test_area_under_the_drawn_pr_steps_is_the_average_precision(seed: int) -> None:
    split = scored_split((6, 5), seed=seed, skill=1.0)
    labels, scores = np.asarray(split["labels"]) == 1, np.asarray(split["logits"])[:, 1]
    curve = pr_curve(labels, scores)
    assert curve is not None
    steps = charts._stairs(curve.x.tolist(), curve.y.tolist())
    area = sum((x1 - x0) * y1 for (x0, _), (x1, y1) in pairwise(steps))
    assert area == pytest.approx(average_precision(labels, scores), abs=1e-12)


def _points(source: str) -> Iterator[tuple[float, float]]:
    for d in re.findall(r' d="M([^"]*)"', source):
        for point in d.split(" L"):
            x, y = point.split()
            yield float(x), float(y)


@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(st.one_of(st.none(), st.floats(0, 50)), min_size=1, max_size=60),
    best=st.one_of(st.none(), st.integers(-2, 70)),
)
def test_learning_curves_stay_in_their_frame(values: list[float | None], best: int | None) -> None:
    told = svg.Told("a", "b", "c")
    drawn = charts.learning_chart(told, list(range(1, len(values) + 1)), [("loss", values)], best, y_name="Loss")
    assert all(0 <= x <= 460 and 0 <= y <= 330 for x, y in _points(drawn))
    placed = [float(value) for value in re.findall(r' (?:c?[xy]|[xy][12])="([^"]*)"', drawn)]
    assert all(0 <= value <= 460 for value in placed)


def test_learning_auc_axis_ends_at_one() -> None:
    drawn = charts.learning_chart(
        svg.Told("a", "b", "c"),
        [1, 2],
        [("auc", [1.0, 1.0])],
        1,
        y_name="AUC",
        ceiling=1.0,
        best_label=wording.decimals,
    )
    ticks = [float(tick) for tick in re.findall(r'class="tick">([\d.]+)<', drawn.split("axis-name")[0])]
    assert max(tick for tick in ticks if tick not in (1.0, 2.0) or tick == 1.0) <= 1.0
    assert "best epoch 1: 1.000" in drawn


def test_known_points_fall_where_they_belong() -> None:
    frame = svg.Frame(svg.share_axis("x"), svg.share_axis("y"))
    drawn = charts.roc_chart(svg.Told("a", "b", "c"), [charts.Curve("c", [0, 0.5, 1], [0, 1, 1])], None)
    assert list(_points(drawn)) == [
        pytest.approx((frame.at_x(x), frame.at_y(y)), abs=0.06) for x, y in ((0, 0), (0.5, 1), (1, 1))
    ]

"""Ray Tune's rules as our driver asks them: against successive halving and the median by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.trial_stop import StopRule, stop_rule_of
from medtl_dist.sections_cluster import Tune


def test_asha_stops_what_is_below_the_rung_s_quantile() -> None:
    """Rungs after 1, 3 and 9 epochs; at each a trial goes on if it is not below the upper third of those before it."""
    rule = StopRule(Tune(scheduler="asha", grace_epochs=1, reduction_factor=3), max_epochs=9)
    rng = np.random.default_rng(0)
    curves = rng.random((30, 9))
    reason = None
    for epochs in range(1, 10):
        at_rung: list[float] = []
        for number in range(30):
            auc = float(curves[number, epochs - 1])
            reason = rule.hear(number, epochs, auc)
            below = bool(at_rung) and auc < np.percentile(at_rung, (1 - 1 / 3) * 100)
            assert (reason is not None) == (epochs in (1, 3, 9) and below), (number, epochs)
            at_rung.append(auc)
    assert reason is None or "ASHA after epoch 9" in reason


def test_the_grace_is_kept_even_where_a_trial_is_shorter() -> None:
    rule = StopRule(Tune(grace_epochs=4), max_epochs=2)
    for number, auc in enumerate([0.9, 0.1]):
        assert rule.hear(number, 1, auc) is None
    assert StopRule(Tune(grace_epochs=3), max_epochs=9).hear(0, 1, 0.1) is None


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_an_undefined_auc_is_no_result(scheduler: str) -> None:
    """Told or not, the others are judged alike, and nothing breaks."""
    decisions: list[list[int]] = []
    for told in (False, True):
        rule = StopRule(Tune.model_validate({"scheduler": scheduler}), max_epochs=4)
        stopped: list[int] = []
        for epochs in range(1, 5):
            for number in range(8):
                if told:
                    assert rule.hear(100 + number, epochs, None) is None
                    assert rule.hear(200 + number, epochs, float("nan")) is None
                if number not in stopped and rule.hear(number, epochs, 0.5 + 0.05 * ((number * 5) % 8)) is not None:
                    stopped.append(number)
        decisions.append(stopped)
    assert decisions[0] == decisions[1]
    assert decisions[0]


def test_the_median_rule_stops_what_never_reached_the_median_of_the_means() -> None:
    rule = StopRule(Tune(scheduler="median", grace_epochs=2), max_epochs=4)
    for number, auc in enumerate([0.6, 0.7, 0.8]):
        for epochs in range(1, 5):
            assert rule.hear(number, epochs, auc) is None or number < 2
    assert rule.hear(3, 1, 0.5) is None  # within its grace
    reason = rule.hear(3, 2, 0.65)
    assert reason is not None
    assert "median rule after epoch 2" in reason
    assert rule.hear(4, 2, 0.75) is None


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_rule_that_recalls_decides_like_one_that_was_there(scheduler: str) -> None:
    """Whatever the order in which it is told again, and of trials that it would have stopped, too."""
    rng = np.random.default_rng(1)
    curves = rng.random((12, 9))
    curves[10] /= 20  # one of those to be judged is hopeless
    tune = Tune.model_validate({"scheduler": scheduler, "grace_epochs": 2})
    there, again = StopRule(tune, 9), StopRule(tune, 9)
    lengths: list[int] = []
    for number in range(9):
        stops = (n for n in range(1, 10) if there.hear(number, n, curves[number, n - 1]) is not None)
        lengths.append(next(stops, 9))
    assert min(lengths) < 9
    for number in (5, 8, 0, 3, 1, 7, 2, 6, 4):
        for epochs in range(1, lengths[number] + 1):
            again.recall(number, epochs, curves[number, epochs - 1])
    decisions = [
        [rule.hear(9 + k, n, curves[9 + k, n - 1]) is not None for k in range(3) for n in (1, 2)]
        for rule in (there, again)
    ]
    assert decisions[0] == decisions[1]
    assert any(decisions[0])


def test_without_a_rule_there_is_none() -> None:
    assert stop_rule_of(Tune(scheduler="none"), 4) is None

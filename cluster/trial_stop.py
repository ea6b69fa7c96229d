"""val AUC after each epoch → whether a trial goes on: Ray Tune's own rules, asked by our driver.

Only decisions are Tune's. An undefined AUC is never shown to them, and what they say becomes a cooperative stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from medtl_dist.sections_cluster import Tune

_NAMES = {"asha": "ASHA", "median": "the median rule"}


@dataclass(frozen=True)
class _Known:
    """All that Tune's rules want to know of a trial."""

    trial_id: str


class _NobodyWaits:
    """Tune's controller as its rules see it: with nothing to make room for, none of them pauses a trial."""

    def get_live_trials(self) -> list[Any]:
        return []


_CONTROLLER = cast("Any", _NobodyWaits())


class StopRule:
    """ASHA or the median rule over epochs. ``max_epochs``: those of the longest trial; no rule ever ends a trial at its end."""

    def __init__(self, tune: Tune, max_epochs: int) -> None:
        self._name = _NAMES[tune.scheduler]
        self._added: set[int] = set()
        self._rule: TrialScheduler
        if tune.scheduler == "asha":
            self._rule = ASHAScheduler(
                time_attr="epochs",
                metric="val_auc",
                mode="max",
                # A rung at max_t would stop trials that have ended; one epoch more leaves that to the trial.
                max_t=max_epochs + 1,
                grace_period=min(tune.grace_epochs, max_epochs),
                reduction_factor=tune.reduction_factor,
            )
        else:
            self._rule = MedianStoppingRule(
                time_attr="epochs", metric="val_auc", mode="max", grace_period=tune.grace_epochs
            )

    def hear(self, number: int, epochs: int, val_auc: float | None) -> str | None:
        """Tell the rule the AUC after so many epochs; the reason to stop, or None to go on."""
        if val_auc is None or not math.isfinite(val_auc):
            return None
        trial = self._known(number)
        decision = self._rule.on_trial_result(_CONTROLLER, trial, {"epochs": epochs, "val_auc": val_auc})
        if decision != TrialScheduler.STOP:
            return None
        return f"stopped by {self._name} after epoch {epochs}: others did better than its val AUC {val_auc:.3f} by then"

    def recall(self, number: int, epochs: int, val_auc: float | None) -> None:
        """Tell the rule what it, or an earlier driver's rule, has decided about already."""
        if val_auc is not None and math.isfinite(val_auc):
            # On completion a rule takes a result down and decides nothing; ASHA forgets the trial's bracket with it.
            self._rule.on_trial_complete(_CONTROLLER, self._known(number), {"epochs": epochs, "val_auc": val_auc})
            self._added.discard(number)

    def _known(self, number: int) -> Any:
        trial = cast("Any", _Known(f"{number:05d}"))
        if number not in self._added:
            self._added.add(number)
            self._rule.on_trial_add(_CONTROLLER, trial)
        return trial


def stop_rule_of(tune: Tune, max_epochs: int) -> StopRule | None:
    """The config's rule; None for ``none``."""
    return None if tune.scheduler == "none" else StopRule(tune, max_epochs)

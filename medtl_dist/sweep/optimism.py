"""val scores of every trial and epoch → how optimistic the best of them is.

The best of N trials times E epochs is partly the luckiest. Patients are drawn with replacement (within their class); the best
trial and epoch is picked on those drawn, as the sweep picked it, and the AUC of the same is taken on the patients left out.
Its mean over the draws is what the whole procedure of picking reaches on patients that had no say in it (Tsamardinos,
Greasidou & Borboudakis, Machine Learning 107, 2018, 1895-1922); the optimism is the best's own AUC less that. Where all
candidates are equally good it is unbiased; where some are better it errs on the careful side, for a draw has fewer patients to
pick by (docs/decisions.md). What it leaves out: that the network was not trained on these patients in any draw is so already,
but the trials were proposed, and perhaps stopped early, with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medtl_dist.metrics.bootstrap import in_and_out_of_bag
from medtl_dist.metrics.multilabel import patient_strata
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.sweep.scores import Scores

NUM_REPLICATES = 500
MAX_CELLS = 60_000_000  # replicates x images x candidates: about five seconds
MIN_CANDIDATES = 8
MIN_REPLICATES = 100


@dataclass(frozen=True)
class Optimism:
    """``corrected`` = ``best_auc`` - ``value``; all None where it can't be known, and ``reason`` says why.

    Attributes:
        error: standard error of ``value`` from the number of draws alone.
        candidates, considered: (trial, epoch) pairs there were, and how many of the best of them were drawn over.
        stays_best: share of the draws in which the best one is picked again.
    """

    best_auc: float | None
    corrected: float | None
    value: float | None
    error: float | None
    stays_best: float | None
    candidates: int
    considered: int
    replicates: int
    reason: str | None = None


def optimism(
    outcomes: Sequence[Outcome],
    scores: Scores | None,
    ranked: Sequence[int],
    *,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> Optimism:
    """How optimistic the best val AUC of the trials ``ranked`` is, over all their epochs whose scores were kept."""
    if scores is None:
        return _unknown("no trial left its val scores")
    kept = [(one, epoch, logits) for one in outcomes if one.number in ranked for epoch, logits in _epochs(scores, one)]
    if len(kept) < 2:
        return _unknown("the scores of fewer than two epochs were kept", len(kept))
    aucs = np.array([_auc(scores, logits) for _, _, logits in kept])
    if np.isnan(aucs).all():
        return _unknown("the AUC is undefined", len(kept))
    # Epoch, then trial, then the order given break ties, the same way at every call.
    order = np.lexsort((np.arange(len(kept)), -aucs))
    num_images = len(scores.val.labels) * len(scores.val.questions())
    replicates = num_replicates
    considered = min(len(kept), max(MIN_CANDIDATES, MAX_CELLS // max(1, replicates * num_images)))
    replicates = min(replicates, max(MIN_REPLICATES, MAX_CELLS // max(1, considered * num_images)))
    chosen = order[:considered]
    inside, outside = _drawn(scores, [kept[at][2] for at in chosen], replicates, seed)
    picked = np.nan_to_num(inside, nan=-1.0).argmax(axis=1)
    left_out = outside[np.arange(replicates), picked]
    defined = ~np.isnan(left_out)
    if defined.sum() < replicates / 2:
        return _unknown("too few patients: most draws leave out none of a class", len(kept))
    best, corrected = float(aucs[chosen[0]]), float(left_out[defined].mean())
    return Optimism(
        best_auc=best,
        corrected=corrected,
        value=best - corrected,
        error=float(left_out[defined].std(ddof=1) / np.sqrt(defined.sum())),
        stays_best=float((picked == 0).mean()),
        candidates=len(kept),
        considered=considered,
        replicates=int(defined.sum()),
    )


def _epochs(scores: Scores, outcome: Outcome) -> list[tuple[int, NDArray]]:
    return sorted(scores.epochs.get(outcome.number, {}).items())


def _auc(scores: Scores, logits: NDArray) -> float:
    parts = scores.val.components(logits)
    return float(np.mean([one.auc for one in parts])) if parts else float("nan")


def _drawn(
    scores: Scores, several: Sequence[NDArray], replicates: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUC of each candidate on the drawn and on the left-out patients, float64 [replicates, candidates] each."""
    val = scores.val
    codes = np.arange(len(val.labels)) if val.groups is None else val.groups
    questions = val.questions()
    inside, outside = in_and_out_of_bag(
        patient_strata(val.labels, codes) if val.labels.ndim == 2 else val.labels,
        [(_answers(val.labels, k), logits[:, k]) for logits in several for k, _, _ in questions],
        codes,
        num_replicates=replicates,
        seed=seed,
        known=[rows for _ in several for _, rows, _ in questions],
    )
    shape = (replicates, len(several), len(questions))
    return _mean_defined(inside.reshape(shape)), _mean_defined(outside.reshape(shape))


def _answers(labels: NDArray[np.int64], column: int) -> NDArray[np.bool_]:
    return labels[:, column] == 1 if labels.ndim == 2 else labels == column


def _mean_defined(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of what is defined; NaN where nothing is."""
    counts = (~np.isnan(values)).sum(axis=-1)
    return np.divide(np.nansum(values, axis=-1), counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def _unknown(reason: str, candidates: int = 0) -> Optimism:
    return Optimism(None, None, None, None, None, candidates, 0, 0, reason)

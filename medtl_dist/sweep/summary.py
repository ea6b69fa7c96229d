"""a sweep folder and its outcomes → sweep.json: ranking, winner beside the plain best, optimism, stops, costs, cautions."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medtl_dist.errors import DataError
from medtl_dist.storage import Folder
from medtl_dist.sweep.importance import importance
from medtl_dist.sweep.knobs import knobs_of, look_up, read_plain
from medtl_dist.sweep.optimism import Optimism, optimism
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.sweep.ranking import Gap, Ranking, rank
from medtl_dist.sweep.scores import Scores, read_scores
from medtl_dist.sweep.table import write_table

SUMMARY = "sweep.json"
SCHEMA_VERSION = 1
RULE = (
    "the simplest of the trials within one standard error of the best: deeper frozen first, then fewer epochs; the error is "
    "that of the difference from the best, paired by image and clustered by patient"
)


def write_sweep(folder: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Write ``sweep.parquet`` and ``sweep.json`` and return the content of the latter.

    Raises:
        OSError: the folder can't be written.
    """
    scores = read_scores(folder, outcomes)
    ranking = rank(outcomes, scores)
    write_table(folder, outcomes, ranking)
    content = _content(folder, outcomes, ranking, scores)
    Folder.local(folder).write(SUMMARY, json.dumps(content, indent=1, allow_nan=False).encode())
    return content


def sweep_summary(folder: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The content of ``sweep.json``, plain values only; from the outcomes, the val scores in the trials' folders, and the base
    config for what no trial overrides. Nothing is written."""
    scores = read_scores(folder, outcomes)
    return _content(folder, outcomes, rank(outcomes, scores), scores)


def read_summary(folder: Path) -> dict[str, Any]:
    """The sweep's ``sweep.json``. Raises DataError where it is missing, damaged or of another version."""
    file = folder / SUMMARY
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["schema_version"]
    except FileNotFoundError:
        raise DataError(f"{file}: there is none; is {folder} a sweep that has begun? medtl tune --resume") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{file}: damaged; the sweep writes it again from its trials: medtl tune --resume") from None
    if version != SCHEMA_VERSION:
        raise DataError(f"{file}: schema version {version}, expected {SCHEMA_VERSION}.")
    return content


def _content(folder: Path, outcomes: Sequence[Outcome], ranking: Ranking, scores: Scores | None) -> dict[str, Any]:
    by_number = {one.number: one for one in outcomes}
    ranked = [by_number[number] for number in ranking.order]
    knobs = {one.number: row for one, row in zip(outcomes, knobs_of(folder, outcomes), strict=True)}
    luck = optimism(outcomes, scores, ranking.order)
    stops = stops_by_depth(outcomes)
    mattered = importance([knobs[number] for number in ranking.order], [_auc(one) for one in ranked])
    views = look_up(read_plain(folder / "config.yaml"), "augment.views")
    return {
        "schema_version": SCHEMA_VERSION,
        "sweep": folder.resolve().name,
        "metric": "exact pooled val AUC, best epoch of each trial",
        "num_trials": len(outcomes),
        "states": {state: sum(one.state == state for one in outcomes) for state in sorted({o.state for o in outcomes})},
        "knobs": {str(number): row for number, row in knobs.items()},
        "ranking": [_ranked_row(one, ranking) for one in ranked],
        "unranked": [
            {"trial": number, "state": by_number[number].state, "reason": reason} for number, reason in ranking.unranked
        ],
        "best": _choice(by_number, ranking, ranking.best),
        "winner": _choice(by_number, ranking, ranking.chosen),
        "rule": RULE,
        "indistinguishable": sorted(ranking.indistinguishable),
        "optimism": dataclasses.asdict(luck),
        "importance": dataclasses.asdict(mattered),
        "stops_by_depth": stops,
        "cost": cost(outcomes),
        "cache": cache_savings(outcomes, views),
        "cautions": list(cautions(outcomes, ranking, scores, luck, stops)),
    }


def _ranked_row(one: Outcome, ranking: Ranking) -> dict[str, Any]:
    best, interval, gap = one.best, ranking.intervals.get(one.number), ranking.gaps.get(one.number)
    assert best is not None
    return {
        "trial": one.number,
        "state": one.state,
        "auc": best.val_auc,
        "auc_ci": list(interval.interval) if interval is not None and interval.interval is not None else None,
        "ci_method": interval.method if interval is not None else None,
        "ci_warning": (interval.warning or interval.reason) if interval is not None else "its val scores were not kept",
        "loss": best.val_loss if math.isfinite(best.val_loss) else None,
        "epoch": best.epoch,
        "frozen_depth": one.frozen_depth,
        "num_stages": one.num_stages,
        "overrides": dict(one.overrides),
        "behind_best": _behind(gap),
        "within_one_error": gap is None or gap.within_one_error,
        "indistinguishable": one.number in ranking.indistinguishable,
    }


def _behind(gap: Gap | None) -> dict[str, Any] | None:
    return dataclasses.asdict(gap) if gap is not None else None


def _choice(by_number: Mapping[int, Outcome], ranking: Ranking, number: int | None) -> dict[str, Any] | None:
    return None if number is None else _ranked_row(by_number[number], ranking) | {"folder": by_number[number].folder}


def stops_by_depth(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """How many trials of each frozen depth ended early: a scheduler compares trials at equal epochs, where what learns fast
    (much is frozen) is ahead of what may end higher."""
    rows = []
    for depth, stages in sorted({(one.frozen_depth, one.num_stages) for one in outcomes}):
        here = [one for one in outcomes if (one.frozen_depth, one.num_stages) == (depth, stages)]
        aucs = [_auc(one) for one in here if one.state != "failed" and one.best is not None]
        rows.append(
            {
                "frozen_depth": depth,
                "num_stages": stages,
                "trials": len(here),
                "finished": sum(one.state == "finished" for one in here),
                "stopped": sum(one.state == "stopped" for one in here),
                "failed": sum(one.state == "failed" for one in here),
                "mean_epochs": sum(len(one.curve) for one in here) / len(here),
                "best_auc": max(aucs, default=None),
            }
        )
    return rows


def cost(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the sweep took, over all trials and attempts."""
    return {
        "busy_s": math.fsum(one.seconds for one in outcomes),
        "cpu_hours": math.fsum(one.cpu_hours for one in outcomes),
        "gpu_hours": math.fsum(one.gpu_hours for one in outcomes),
        "epochs": sum(len(one.curve) for one in outcomes),
        "restarts": sum(max(one.attempts - 1, 0) for one in outcomes),
    }


def cache_savings(outcomes: Sequence[Outcome], views: Any) -> dict[str, Any]:
    """Seconds spent on the prefix cache by frozen depth, and an estimate of those it saved.

    The trial that spent most on it filled it: once through val and through each of the V views of train. Without a cache every
    epoch of every trial passes through the frozen stages once: a V-th part of that, so the estimate is
    ``epochs · largest / V - spent``. It counts val's share V times too seldom, and what was computed in parallel once.
    """
    num_views = views if isinstance(views, int) and not isinstance(views, bool) and views > 0 else 1
    rows = []
    for depth, stages in sorted({(one.frozen_depth, one.num_stages) for one in outcomes if one.cached_s is not None}):
        here = [one for one in outcomes if (one.frozen_depth, one.num_stages) == (depth, stages)]
        spent = [one.cached_s for one in here if one.cached_s is not None]
        epochs = sum(len(one.curve) for one in here if one.cached_s is not None)
        saved = epochs * max(spent) / num_views - math.fsum(spent)
        rows.append(
            {
                "frozen_depth": depth,
                "num_stages": stages,
                "trials": len(spent),
                "epochs": epochs,
                "spent_s": math.fsum(spent),
                "saved_s": max(saved, 0.0),
            }
        )
    return {"views": num_views, "by_depth": rows, "saved_s": math.fsum(row["saved_s"] for row in rows)}


def cautions(
    outcomes: Sequence[Outcome],
    ranking: Ranking,
    scores: Scores | None,
    luck: Optimism,
    stops: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    """What to know before believing the numbers, as ``title: sentence``, the gravest first."""
    if ranking.best is None:
        yield "No trial can be ranked: each failed, did not end, or has no AUC; their reasons are listed."
        return
    yield (
        "Chosen on val: epoch and trial were picked on these images, so the winner's AUC is optimistic; score the test "
        "split once, when the recipe is settled."
    )
    yield (
        "The interval leaves out the choice: it says what other patients would change for this one model, not that it was the "
        "best of several."
    )
    if luck.value is not None and luck.error is not None and luck.value > max(0.005, 2 * luck.error):
        yield (
            f"Optimistic by about {luck.value:.3f}: it is the best of {luck.candidates} trials and epochs; about "
            f"{luck.corrected:.3f} is left."
        )
    elif luck.value is None:
        yield f"Optimism unknown: {luck.reason}."
    if scores is not None and scores.val.groups is None:
        yield "Patients unknown: intervals and comparisons assume independent images; the true ones are wider."
    warning = ranking.intervals[ranking.best].warning if ranking.best in ranking.intervals else None
    if warning:
        yield f"Unreliable intervals: {warning.removeprefix('unreliable: ')}."
    if text := _about_stops(stops):
        yield text
    if num := sum(one.state in ("waiting", "running") for one in outcomes):
        yield f"Not ended: {num} of {len(outcomes)} trials have not run to their end; they are not ranked."
    yield from scores.notes if scores is not None else ()


def _about_stops(stops: Sequence[Mapping[str, Any]]) -> str | None:
    """A caution where trials of the shallowest depth were stopped much more often than those of the deepest."""
    shares = [(row["stopped"] / row["trials"], row) for row in stops if row["trials"] >= 2]
    if len(shares) < 2 or shares[0][0] - shares[-1][0] < 0.3:
        return None
    (_, first), (_, last) = shares[0], shares[-1]
    return (
        f"Stopped by depth: {first['stopped']} of {first['trials']} trials frozen to depth {first['frozen_depth']} were "
        f"stopped early, {last['stopped']} of {last['trials']} to depth {last['frozen_depth']}. Early epochs favour what "
        "learns fast: before calling the shallow ones worse, compare with scheduler none, or a longer grace."
    )


def _auc(outcome: Outcome) -> float:
    assert outcome.best is not None
    assert outcome.best.val_auc is not None
    return outcome.best.val_auc

"""shard set ─► findings: does an image, or a patient, sit on both sides of a split? And what else is odd about the set.

    findings = audit(open_dataset("sets/xrays")).findings

Fingerprints of all images (``fingerprint``), pairs that might be one picture (``audit_search``), registration and a
threshold from the set's own pairs of other patients (``audit_match``), then outliers and shortcuts. Nothing in a result
names a file or a patient: images are keys. The same set gives the same result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.audit_match import Threshold, fit_threshold
from medtl_dist.data.audit_null import Ladder
from medtl_dist.data.audit_outliers import outliers
from medtl_dist.data.audit_scan import Pool, Progress, Scan, open_pool, scan, score_pairs
from medtl_dist.data.audit_search import Pairs, find_pairs, fit_projection
from medtl_dist.data.audit_shortcuts import shortcuts
from medtl_dist.data.findings import Finding, Match, describe, summary_of
from medtl_dist.data.fingerprint import is_blank, variant_name
from medtl_dist.data.shards import DATASET_FILE, Dataset, open_dataset
from medtl_dist.errors import LeakageError

# Agreement of two aligned records from which a pair is registered: 99 of 100 crops of 2 to 10 % lie above 0.90.
LEAST_AGREEMENT = 0.82
_MAX_COMPARED = 20_000
# Of a set of identical images: its pairs grow with the square of them.
_MOST_REPRESENTATIVES = 64


@dataclass(frozen=True)
class Audit:
    """The result. ``findings``: the gravest first. ``matches``: the confirmed and the candidate pairs. ``summary``:
    counts, threshold and findings as ``dataset.json`` records them, items capped at 100. ``seen``: what was read."""

    findings: list[Finding]
    matches: list[Match]
    threshold: Threshold
    summary: dict[str, Any] = field(repr=False)
    seen: Scan = field(repr=False)

    @property
    def leaks(self) -> int:
        """Number of leaks across splits that nobody accepted."""
        return sum(finding.count for finding in self.findings if finding.level == "leakage")


def audit(
    dataset: Dataset,
    *,
    accepted: Mapping[frozenset[str], str] | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit a set. Leaks are returned, not raised: see ``refuse_leaks``.

    Args:
        accepted: pairs of keys that were looked at and may stay, each with its reason (``audit_accept``).
        num_workers: processes; None: one per core this process may use.
        progress: called with a stage, images or pairs done, and their total.

    Raises: DataError, a damaged set.
    """
    report = progress or (lambda stage, done, total: None)
    with open_pool(dataset, num_workers or _num_cores()) as pool:
        seen = scan(dataset, pool, report)
        sets = _identical_sets(seen)
        near, threshold = _near(seen, sets, pool, report)
    matches = [*_identical(seen, sets), *_with_copies(seen, near, sets)]
    findings = describe(seen, matches, accepted or {})
    findings += outliers(seen)
    predictable, tried = shortcuts(seen)
    findings = sorted([*findings, *predictable], key=lambda finding: finding.rank)
    return Audit(findings, matches, threshold, summary_of(seen, findings, matches, threshold, tried), seen)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identical_sets(seen: Scan) -> list[list[int]]:
    """Images of equal pixels, rising; sets of two or more."""
    pixels = seen.records["pixels"]
    order = np.lexsort((np.arange(len(seen)), pixels[:, 1], pixels[:, 0]))
    begins = np.ones(len(seen), bool)
    begins[1:] = (pixels[order][1:] != pixels[order][:-1]).any(axis=1)
    sets = np.split(order, np.flatnonzero(begins)[1:])
    return sorted(found.tolist() for found in sets if len(found) > 1)


def _identical(seen: Scan, sets: list[list[int]]) -> list[Match]:
    """Every image of a set with its first, and every two that stand for another group or split: a leak between the second
    and the third must not hide behind those with the first."""
    pairs: set[tuple[int, int]] = set()
    for images in sets:
        pairs |= {(images[0], other) for other in images[1:]}
        pairs |= set(combinations(_representatives(seen, images), 2))
    return [Match(a, b, "confirmed", 1.0, "identical pixels") for a, b in sorted(pairs)]


def _representatives(seen: Scan, images: list[int]) -> list[int]:
    """The first image of each group in each split, rising; of the first so many."""
    firsts: dict[tuple[int, int], int] = {}
    for image in images:
        firsts.setdefault((int(seen.group[image]), int(seen.split[image])), image)
    return sorted(firsts.values())[:_MOST_REPRESENTATIVES]


def _with_copies(seen: Scan, near: list[Match], sets: list[list[int]]) -> list[Match]:
    """The near-duplicates, and the same between the identical copies of either image."""
    copies = {images[0]: _representatives(seen, images) for images in sets}
    wider = []
    for match in near:
        for first in {match.first, *copies.get(match.first, ())}:
            for second in {match.second, *copies.get(match.second, ())}:
                wider.append(match._replace(first=first, second=second))
    return sorted(wider, key=lambda match: (match.first, match.second))


def _near(seen: Scan, identical: list[list[int]], pool: Pool, report: Progress) -> tuple[list[Match], Threshold]:
    """Near-duplicates among images that differ, and the threshold that tells them."""
    different = ~is_blank(seen.records)
    different[[copy for images in identical for copy in images[1:]]] = False
    places = np.flatnonzero(different)
    if len(places) < 2:
        return [], fit_threshold(np.zeros(0), 0)
    records = seen.records[places]
    found = find_pairs(records, fit_projection(records), progress=report)
    found = found._replace(first=places[found.first], second=places[found.second])
    agreeing = worth_comparing(found, len(seen))
    ladder = Ladder(found, seen.group)
    scores = np.full(len(found.first), np.nan)
    wanted = np.union1d(agreeing, np.union1d(ladder.places, ladder.last))
    copies = np.zeros(0, np.int64)
    while True:
        scores[wanted] = score_pairs(seen, found.take(wanted), pool, report)
        copies = np.union1d(copies, ladder.suspected(scores))
        if not ladder.climb_down(copies):
            break
        wanted = ladder.places[np.isnan(scores[ladder.places])]
    strangers = np.setdiff1d(ladder.places, copies)
    threshold = fit_threshold(scores[strangers], len(agreeing), len(copies))
    return _matches(found, agreeing, scores, threshold), threshold


def worth_comparing(found: Pairs, num_images: int) -> NDArray[np.int64]:
    """Positions of the pairs that are registered: those that agree, of more than 20,000 (or a fifth of the images) the
    ones that agree best. Chance makes more such pairs in a larger set, and true copies agree better."""
    agreeing = np.flatnonzero(found.score >= LEAST_AGREEMENT)
    most = max(_MAX_COMPARED, num_images // 5)
    return np.sort(agreeing[np.argsort(-found.score[agreeing], kind="stable")[:most]])


def _matches(found: Pairs, places: NDArray[np.int64], scores: NDArray, threshold: Threshold) -> list[Match]:
    matches = []
    for place in places.tolist():
        score = float(scores[place])
        if score < threshold.candidate:
            continue
        sure = threshold.confirmed is not None and score >= threshold.confirmed
        how = variant_name(int(found.variant[place]))
        pair = int(found.first[place]), int(found.second[place])
        matches.append(Match(*pair, "confirmed" if sure else "candidate", score, how))
    return matches


def refuse_leaks(dataset: Dataset, summary: Mapping[str, Any]) -> None:
    """Raises: LeakageError, the audit's summary has leaks across splits that nobody accepted."""
    leaks = [finding for finding in summary["findings"] if finding["level"] == "leakage"]
    if not leaks:
        return
    what = "; ".join(finding["text"] for finding in leaks)
    raise LeakageError(
        f"{dataset.folder}: {what}. Make a set without: medtl data audit {dataset.folder} --fix NEWDEST; or, having "
        "looked at the pairs (linkage.parquet in the private folder names them), accept them with reasons: --accept FILE"
    )


def record(dataset: Dataset, summary: Mapping[str, Any]) -> Dataset:
    """Put the summary into the set's ``dataset.json``, at once or not at all, and open the set again.

    The digest of ``dataset.json`` is the set's identity, so this makes it another set for runs that were begun before.
    """
    path = Path(dataset.folder) / DATASET_FILE
    info = json.loads(path.read_text(encoding="utf-8"))
    info["audit"] = dict(summary)
    part = path.with_name(f"{DATASET_FILE}.part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(info, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return open_dataset(dataset.folder)

"""matches ─► findings: what each pair means, given splits, groups and labels; and the summary for ``dataset.json``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from medtl_dist.data.audit_match import Threshold
from medtl_dist.data.audit_scan import Scan

LEVELS = ("leakage", "warning", "candidate", "note")
MAX_EXAMPLES = 100
SUMMARY_VERSION = 1


class Match(NamedTuple):
    """Two images (positions in the scan) that are one picture: ``level`` confirmed | candidate, ``score`` from 0 to 1,
    ``how``: ``identical pixels``, or what turns the second into the first."""

    first: int
    second: int
    level: str
    score: float
    how: str


@dataclass(frozen=True)
class Finding:
    """``level``: leakage (exit code 4) | warning | candidate | note. ``count``: of pairs, groups or images, as
    ``text`` says. ``items``: plain facts of each."""

    kind: str
    level: str
    count: int
    text: str
    items: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, str]:
        """Sorts the gravest first."""
        return (LEVELS.index(self.level), self.kind)

    def as_dict(self, most: int | None = None) -> dict[str, Any]:
        """Plain values, at most so many items."""
        return {"kind": self.kind, "level": self.level, "count": self.count, "text": self.text} | (
            {"items": self.items[:most]} if self.items else {}
        )


def components(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Image to the smallest image it is connected with, for every image in a pair."""
    parent: dict[int, int] = {}

    def root(image: int) -> int:
        parent.setdefault(image, image)
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {image: root(image) for image in list(parent)}


def describe(seen: Scan, matches: list[Match], accepted: Mapping[frozenset[str], str]) -> list[Finding]:
    """The findings about groups, duplicates and labels."""
    findings = _straddling_groups(seen)
    pairs = {match: frozenset((seen.key(match.first), seen.key(match.second))) for match in matches}
    open_ones = [match for match in matches if pairs[match] not in accepted]
    known = seen.dataset.group_source != "none"

    def across(m: Match) -> bool:
        return bool(seen.split[m.first] != seen.split[m.second])

    def other_group(m: Match) -> bool:
        return bool(seen.group[m.first] != seen.group[m.second])

    def conflicting(m: Match) -> bool:
        return bool(seen.label[m.first] != seen.label[m.second])

    confirmed = [match for match in open_ones if match.level == "confirmed"]
    kinds: list[tuple[str, str, list[Match], str]] = [
        (
            "duplicates_across_splits",
            "leakage",
            [m for m in confirmed if across(m)],
            "{} show the same picture in two splits",
        ),
        (
            "duplicates_of_other_groups",
            "warning",
            [m for m in confirmed if not across(m) and known and other_group(m)],
            "{} within a split show the same picture under two groups (--fix joins them)",
        ),
        (
            "duplicates_with_other_labels",
            "warning",
            [m for m in confirmed if conflicting(m)],
            "{} show the same picture with two labels: one is wrong, and nobody but you can say which",
        ),
        (
            "possible_duplicates",
            "candidate",
            [m for m in open_ones if m.level == "candidate" and (across(m) or other_group(m))],
            "{} may show the same picture, or the same patient twice: look at them",
        ),
        (
            "duplicates_within_split",
            "note",
            [m for m in confirmed if not across(m) and not (known and other_group(m))],
            "{} show the same picture within a split" + (" and group" if known else ""),
        ),
        (
            "accepted_duplicates",
            "note",
            [m for m in matches if pairs[m] in accepted],
            "{} were accepted",
        ),
    ]
    for kind, level, some, text in kinds:
        if some:
            items = [_item(seen, match) for match in sorted(some, key=lambda m: (-m.score, m.first, m.second))]
            for item in items if kind == "accepted_duplicates" else ():
                item["reason"] = accepted[frozenset(item["keys"])]
            findings.append(
                Finding(kind, level, len(some), text.format(_pairs(len(some))) + _spread(seen, some), items)
            )
    if idle := len(accepted.keys() - set(pairs.values())):
        text = f"{idle:,} accepted pairs are no finding: these lines of --accept are not needed"
        findings.append(Finding("needless_acceptance", "note", idle, text))
    return findings


def _pairs(count: int) -> str:
    return f"{count:,} pair{'s' if count > 1 else ''} of images"


def _spread(seen: Scan, matches: list[Match]) -> str:
    """``: 3 in train and test, 2 identical …``: where the pairs are, and what they are."""
    names = seen.dataset.splits
    where = Counter(
        " and ".join(names[s] for s in sorted({seen.split[m.first], seen.split[m.second]})) for m in matches
    )
    same = sum(match.how == "identical pixels" for match in matches)
    kinds = f"{same:,} identical, {len(matches) - same:,} near-identical"
    return f" ({', '.join(f'{count:,} in {place}' for place, count in sorted(where.items()))}; {kinds})"


def _item(seen: Scan, match: Match) -> dict[str, Any]:
    names, classes = seen.dataset.splits, seen.dataset.classes
    pair = (match.first, match.second)
    return {
        "keys": [seen.key(image) for image in pair],
        "splits": [names[seen.split[image]] for image in pair],
        "classes": [classes[seen.label[image]] if 0 <= seen.label[image] < len(classes) else None for image in pair],
        "same_group": bool(seen.group[match.first] == seen.group[match.second]),
        "score": match.score,
        "how": match.how,
    }


def _straddling_groups(seen: Scan) -> list[Finding]:
    cells = np.unique(np.stack([seen.group, seen.split], axis=1), axis=0)
    groups, counts = np.unique(cells[:, 0], return_counts=True)
    several = groups[counts > 1]
    if not len(several):
        return []
    splits: defaultdict[int, list[str]] = defaultdict(list)
    for group, split in cells.tolist():
        splits[group].append(seen.dataset.splits[split])
    items = [{"group": seen.groups[int(group)].as_py(), "splits": splits[int(group)]} for group in several]
    text = f"{len(several):,} of {len(groups):,} groups have images in more than one split"
    return [Finding("groups_in_several_splits", "leakage", len(several), text, items)]


def summary_of(
    seen: Scan,
    findings: list[Finding],
    matches: list[Match],
    threshold: Threshold,
    shortcuts: list[dict[str, Any]],
) -> dict[str, Any]:
    """What ``dataset.json`` records: counts, how, thresholds, and every finding with at most 100 items."""
    identical = [(m.first, m.second) for m in matches if m.how == "identical pixels"]
    copies = components(identical)
    near = [match for match in matches if match.how != "identical pixels"]
    records = seen.records

    def count(level: str) -> int:
        return sum(finding.count for finding in findings if finding.level == level)

    def extent(values: np.ndarray) -> list[int]:
        return [int(values.min()), int(values.max())] if len(values) else []

    counts: dict[str, Callable[[], Any]] = {
        "images": lambda: len(seen),
        "identical_sets": lambda: len(set(copies.values())),
        "identical_images": lambda: len(copies),
        "near_pairs": lambda: sum(match.level == "confirmed" for match in near),
        "candidate_pairs": lambda: sum(match.level == "candidate" for match in near),
        "leaks": lambda: count("leakage"),
        "width_px": lambda: extent(records["size"][:, 0]),
        "height_px": lambda: extent(records["size"][:, 1]),
    }
    return {
        "version": SUMMARY_VERSION,
        **{name: value() for name, value in counts.items()},
        "method": "pixel hash; 135 DCT coefficients, 16 variants, registration and correlation of detail at 128 px",
        "threshold": threshold.as_dict(),
        "shortcuts": shortcuts,
        "findings": [finding.as_dict(MAX_EXAMPLES) for finding in findings],
    }

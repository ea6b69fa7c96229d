"""counts of the shard set → the flow of images and patients: found, left out, in the data set, training/validation/test."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from medtl_dist.report.figures import Table
from medtl_dist.report.schema import Data
from medtl_dist.report.wording import MISSING, count, plural, split_name


@dataclass(frozen=True)
class FlowBox:
    """A box of the flow of images: heading, images, patients (empty when unknown), then lines (name, number)."""

    title: str
    images: str
    patients: str
    lines: list[tuple[str, str]]


@dataclass(frozen=True)
class Flow:
    """Found → left out → in the data set → training, validation, test."""

    found: FlowBox | None
    left_out: FlowBox | None
    kept: FlowBox
    splits: list[FlowBox]
    excluded: Table | None


def flow(data: Data) -> Flow:
    """The flow of images and patients, from the counts of the shard set."""
    known = data.group_source != "none"
    order = [key for key in ("train", "val", "test") if key in data.splits]
    order += [key for key in data.splits if key not in order]
    boxes = [
        FlowBox(
            split_name(key).capitalize(),
            plural(data.splits[key].samples, "image"),
            _patients(data.splits[key].groups if known else None),
            [(name, count(number)) for name, number in data.splits[key].classes.items()],
        )
        for key in order
    ]
    used = sum(split.samples for split in data.splits.values())
    groups = [split.groups for split in data.splits.values()]
    total = sum(number for number in groups if number is not None) if known and None not in groups else None
    return Flow(
        found=None if data.found is None else FlowBox("Found", plural(data.found, "image"), "", []),
        left_out=_left_out(data, used),
        kept=FlowBox("In the data set", plural(used, "image"), _patients(total), []),
        splits=boxes,
        excluded=_excluded(data, known),
    )


def _patients(number: int | None) -> str:
    return "" if number is None else plural(number, "patient")


def _left_out(data: Data, used: int) -> FlowBox | None:
    """Images left out by reason, most first; None where there are none. Counts that don't add up are shown as such."""
    reasons: dict[str, int] = defaultdict(int)
    for item in data.excluded or []:
        reasons[item.reason] += item.samples
    lines = [(reason, count(number)) for reason, number in sorted(reasons.items(), key=lambda pair: -pair[1])]
    left_out = sum(reasons.values())
    unexplained = 0 if data.found is None else data.found - left_out - used
    if unexplained:
        lines.append(("not accounted for", count(unexplained)))
    return FlowBox("Left out", plural(left_out + unexplained, "image"), "", lines) if lines else None


def _excluded(data: Data, known: bool) -> Table | None:
    """Every reason by split and class; None where nothing more is known than the sums in the diagram."""
    rows = [
        [
            item.reason,
            split_name(item.split or MISSING),
            item.class_ or MISSING,
            count(item.samples),
            count(item.groups if known else None),
        ]
        for item in data.excluded or []
        if item.split or item.class_
    ]
    return Table("Images left out", ["Reason", "Split", "Class", "Images", "Patients"], rows) if rows else None

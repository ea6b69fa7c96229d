"""two finished runs → is one better on these images, or is it chance? Paired by image, clustered by patient."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medtl_dist.config import Config, differing_keys
from medtl_dist.data.label_sets import TASK
from medtl_dist.errors import UserError
from medtl_dist.run import Folder
from medtl_dist.store_folder import folder_at
from medtl_dist.train import results
from medtl_dist.train.compare import Scored, compared, read_scored
from medtl_dist.train.run_store import read_config_in

SCHEMA_VERSION = 1


def compare_runs(first: Path | str, second: Path | str, split: str) -> dict[str, Any]:
    """The second run's AUC minus the first's on the images of ``split`` that both have scored, as plain JSON values.

    ``first``, ``second``: run folders, or the addresses of runs in a store.

    Raises:
        UserError: a run that has not finished or has not scored the split; runs of other classes, units or images.
        DataError: damaged results or predictions.
        Interrupted: a store can't be reached.
    """
    folders = [folder_at(first), folder_at(second)]
    configs = [read_config_in(folder) for folder in folders]
    known = [_finished(folder, split) for folder in folders]
    _check_alike(folders, configs, known)
    scored = [read_scored(folder, split) for folder in folders]
    _check_same_images(folders, known, scored, split)
    return {
        "schema_version": SCHEMA_VERSION,
        "split": split,
        "difference": "second minus first",
        "runs": [_of_run(folder, one, split) for folder, one in zip(folders, known, strict=True)],
        "n": len(scored[0].keys),
        "unit": scored[0].unit,
        "comparison": compared(folders[0], [(scored[0], scored[1])]),
        "config": differing_keys(configs[0], configs[1]),
        "cautions": _cautions(known, split),
    }


def describe(content: Mapping[str, Any]) -> list[str]:
    """The comparison in a few lines for a person."""
    found, runs = content["comparison"], content["runs"]
    lines = [f"{content['split']}: {content['n']} {content['unit']}s scored by both"]
    for name, run, auc in zip(("first", "second"), runs, (found["auc_a"], found["auc_b"]), strict=True):
        lines.append(f"{name:6}  AUC {'undefined' if auc is None else f'{auc:.3f}'}  {run['run']}")
    if found["difference"] is None:
        lines.append(f"no difference: {found['reason']}")
    else:
        text = f"second minus first {found['difference']:+.3f}"
        if found["interval"] is not None:
            text += f" [{found['interval'][0]:+.3f}, {found['interval'][1]:+.3f}], p {found['p_value']:.2g}"
        lines.append(f"{text} ({found['method'] if found['interval'] is not None else found['reason']})")
    if found["warning"]:
        lines.append(f"note  {found['warning']}")
    lines += [f"config  {text}" for text in content["config"] or ["no key differs that counts"]]
    return lines + [f"note  {text}" for text in content["cautions"]]


def _finished(folder: Folder, split: str) -> dict[str, Any]:
    if not folder.exists("results.json"):
        raise UserError(f"{folder.url}: the run has not finished; `medtl train --resume` goes on with it.")
    known = results.read_results(folder)
    if split not in known["splits"]:
        raise UserError(f"{folder.url} has not scored {split}: medtl evaluate {folder.url} --split {split}")
    return known


def _check_alike(folders: list[Folder], configs: list[Config], known: list[dict[str, Any]]) -> None:
    a, b = known
    if TASK in (a["task"], b["task"]):
        raise UserError(f"task {TASK} can't be compared yet; binary and multiclass can.")
    for what, one, other in (
        ("classes", a["classes"], b["classes"]),
        ("positive class", a["positive_class"], b["positive_class"]),
        ("evaluate.unit", configs[0].evaluate.unit, configs[1].evaluate.unit),
    ):
        if one != other:
            raise UserError(
                f"{folders[0].url} and {folders[1].url} differ in {what} ({one}; {other}): they measure different things."
            )


def _check_same_images(folders: list[Folder], known: list[dict[str, Any]], scored: list[Scored], split: str) -> None:
    """Whether both runs scored the same images, and with the same labels. Raises UserError that counts what differs."""
    a, b = (set(one.keys.tolist()) for one in scored)
    names = [one["data"]["name"] for one in known]
    if a != b:
        sets = "two packs" if names[0] == names[1] else "the sets"
        raise UserError(
            f"{folders[0].url} and {folders[1].url} scored different images of {split} ({sets} {names[0]} and {names[1]}: "
            f"{len(a & b)} in both, {len(a - b)} in the first alone, {len(b - a)} in the second alone): a paired comparison "
            "needs the same; score one set with both: medtl evaluate RUN --data SET"
        )
    if not np.array_equal(scored[0].labels, scored[1].labels):
        wrong = int((scored[0].labels != scored[1].labels).sum())
        raise UserError(
            f"{folders[0].url} and {folders[1].url}: {wrong} images of {split} have other labels in the one than in the other."
        )


def _of_run(folder: Folder, known: Mapping[str, Any], split: str) -> dict[str, Any]:
    entry = known["splits"][split]
    told = {name: entry.get(name) for name in ("auc", "auc_ci", "ci_method", "n", "n_groups")}
    return {"run": folder.url, "data": known["data"]["name"], "backbone": known["model"]["backbone"]} | told


def _cautions(known: list[dict[str, Any]], split: str) -> list[str]:
    found: list[str] = []
    if split == "val":
        found.append("Compared on val, where each run's epoch was chosen: both numbers are optimistic.")
    digests = {one["provenance"]["dataset_sha256"] for one in known}
    if len(digests) > 1:
        found.append("The same images and labels, but of two packs: what differs may be the packing.")
    openings = max((one.get("test_openings") or {"count": 0})["count"] for one in known) if split == "test" else 0
    if openings > 1:
        found.append(
            f"The test split was scored {openings} times: a difference picked after several looks is optimistic."
        )
    found.append("One training each: another seed may turn the difference round.")
    return found

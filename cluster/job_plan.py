"""A run's config, name and store → what a Ray job is made of: files, entrypoint, metadata, run folder. Pure; asks no server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cluster.sizing import GPU_IMAGES_PER_S, Tree
from cluster.trainings import trainings_of
from medtl_dist.config import FROM_STAGE, Config, check_reached_alike, validate
from medtl_dist.data.folds import Settings, check_settings
from medtl_dist.errors import UserError
from medtl_dist.storage import parse_place

KINDS = ("train", "tune", "crossval")
FOLDER_OPTION = {"train": "--run-dir", "tune": "--sweep-dir", "crossval": "--run-dir"}
CONFIG_FILE, SPACE_FILE = "config.yaml", "space.yaml"
_CALLED = {"tune": "sweep", "crossval": "cross-validation"}
EVALUATION_COST = 1 / 3  # of an image scored, in images trained: forward only
_NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,45}[a-z0-9])?")


def checked_run_name(name: str) -> str:
    """A name that files, URLs, job ids and Kubernetes take as it is. Raises UserError."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: expected 1 to 47 characters of a-z, 0-9 and -, a letter first and no - last; run folder and job "
            "are named by it."
        )
    return name


def checked_store(text: str) -> str:
    """The store as the cluster's nodes see it: an absolute path, s3:// or gs://. Raises UserError."""
    if "://" not in text and not text.startswith("/"):
        raise UserError(
            f"--store {text!r}: expected s3://bucket/prefix, gs://bucket/prefix, or an absolute path that every node of the "
            "cluster mounts."
        )
    place = parse_place(text)
    if place.scheme not in ("file", "s3", "gs") or not text.isprintable():
        raise UserError(f"--store {place.url}: run folders are written to s3://, gs:// or a shared folder.")
    return place.url


@dataclass(frozen=True)
class Submission:
    """One run to submit; see :func:`planned`.

    ``space``: a named search space, or the text of a space file. ``folds``: of a cross-validation.
    """

    kind: str
    name: str
    store: str
    config: Config
    space: str | None = None
    space_text: str | None = None
    test: bool = False
    max_gpu_hours: float | None = None
    folds: Settings | None = None

    @property
    def run_folder(self) -> str:
        return f"{self.store}/runs/{self.name}"

    @property
    def command(self) -> list[str]:
        """The job's argv. It resumes by run name: a new run starts, an interrupted one goes on, a finished one ends at once."""
        words = ["python", "-m", "medtl_dist.cli.job_entry", self.run_folder]
        words += [self.kind, "--config", CONFIG_FILE, FOLDER_OPTION[self.kind], self.run_folder, "--resume"]
        if self.space is not None or self.space_text is not None:
            words += ["--space", self.space if self.space_text is None else SPACE_FILE]  # type: ignore[list-item]
        if self.folds is not None:
            words += ["--folds", str(self.folds.folds), "--repeats", str(self.folds.repeats)]
            words += ["--epochs-from", self.folds.epochs_from]
            words.append("--parallel")  # one after another they would be trained by this job's driver, on the head
        if self.max_gpu_hours is not None:
            words += ["--max-gpu-hours", f"{self.max_gpu_hours:g}"]
        return words + (["--test"] if self.test else [])

    @property
    def entrypoint(self) -> str:
        """The argv as the one line that Ray hands to a shell."""
        return shlex.join(self.command)

    @property
    def files(self) -> dict[str, str]:
        """What the job's working folder holds, and nothing else."""
        return {CONFIG_FILE: self.config.to_yaml()} | ({} if self.space_text is None else {SPACE_FILE: self.space_text})

    @property
    def digest(self) -> str:
        """Of what decides the run's numbers, and where it writes; another one under the same name is refused."""
        sweep = self.config.tune.model_dump(mode="json") if self.kind == "tune" else None
        parts = [self.kind, self.config.sha256(), self.run_folder, self.space, self.space_text, sweep]
        parts += [] if self.folds is None else [dataclasses.asdict(self.folds)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def metadata(self) -> dict[str, str]:
        """What job lists show: no address of a person, no secret, no path but the run folder's."""
        return {
            "medtl_name": self.name,
            "medtl_kind": self.kind,
            "medtl_digest": self.digest,
            "medtl_run_folder": self.run_folder,
            "medtl_test": "yes" if self.test else "no",
        }


def planned(
    kind: str,
    config: Config,
    *,
    name: str,
    store: str,
    space: str | None = None,
    space_text: str | None = None,
    test: bool = False,
    max_gpu_hours: float | None = None,
    folds: Settings | None = None,
) -> Submission:
    """The submission of ``config`` as the cluster's nodes read it: relative paths lie in the store, the cluster is the job's own.

    Raises:
        UserError: a name, store, path or limit that can't be; see its message.
    """
    if kind not in KINDS:
        raise UserError(f"submit {kind}: expected {', '.join(KINDS)}.")
    if max_gpu_hours is not None and not 0 < max_gpu_hours < 1e6:
        raise UserError(f"--max-gpu-hours {max_gpu_hours:g}: expected a positive number of hours.")
    root = checked_store(store)
    if config.transfer.stages and kind != "train":
        raise UserError(
            f"submit {kind} with transfer.stages: that is a chain of trainings, and a {_CALLED[kind]} is of single ones; submit "
            "train runs the chain."
        )
    if config.transfer.stages and parse_place(root).remote:
        check_reached_alike(config)
    tree = config.model_dump(mode="json")
    for one in trainings_of(config):
        if one.config.data.shards is None:
            raise UserError(
                f"{f'stage {one.name}: ' if one.name else ''}data.shards is not set: name the shard set, a URL, or a path "
                "relative to --store."
            )
    for part in (tree, *tree["transfer"]["stages"]):
        _place(part, root)
    tree["cluster"]["address"] = "auto"  # the cluster that runs the job, never a new one beside it
    if kind == "train":  # at 0 the head would train; Ray places a worker where there is room
        tree["cluster"]["num_workers"] = max(1, config.cluster.num_workers)
    resolved = validate(tree)
    if kind == "crossval":
        folds = folds or Settings()
        check_settings(folds, resolved.train.early_stop_epochs)
    return Submission(kind, checked_run_name(name), root, resolved, space, space_text, test, max_gpu_hours, folds)


def _place(part: Tree, root: str) -> None:
    data, model = part.get("data") or {}, part.get("model") or {}
    if data.get("shards") is not None:
        data["shards"] = _placed("data.shards", data["shards"], root)
    for key in ("weights", "second_weights"):
        weights = model.get(key, "random")
        if weights not in ("imagenet", "random") and not weights.startswith(FROM_STAGE):
            model[key] = _placed(f"model.{key}", weights, root)


def _placed(key: str, path: str, root: str) -> str:
    if "://" in path:
        return parse_place(path).url  # refuses a login or signature in it
    pure = PurePosixPath(path)
    if path.startswith("~") or ".." in pure.parts:
        raise UserError(
            f"{key} = {path!r}: give a URL, an absolute path on the cluster's nodes, or a path relative to --store."
        )
    return path if pure.is_absolute() else f"{root}/{pure}"


def estimate(
    config: Config,
    count: Callable[[Config], dict[str, int] | None],
    *,
    images_per_s: float = GPU_IMAGES_PER_S,
    trials: int = 1,
) -> Tree:
    """GPU hours if every epoch of every training runs: images trained and scored over the speed of one GPU. A GPU per rank;
    start-up not counted. Of a chain or comparison ``trainings`` are told one by one.

    ``count``: images of each split of a training's set, None where it can't be read from here. Raises UserError for a speed
    that is none.
    """
    if not 0 < images_per_s < 1e9:
        raise UserError(f"--images-per-s {images_per_s:g}: expected a positive number of images per second of one GPU.")
    facts: Tree = {"images_per_s_per_gpu": images_per_s, "trials_at_most": trials}
    rows: list[Tree] = []
    for one in trainings_of(config):
        counts, epochs = count(one.config), one.config.train.epochs
        row: Tree = {"epochs": epochs} | ({} if counts is None else {"images": counts})
        images = None if counts is None else counts.get("train", 0) + EVALUATION_COST * counts.get("val", 0)
        hours = None if images is None else trials * one.times * epochs * images / images_per_s / 3600
        rows.append(row | {"gpu_hours_at_most": None if hours is None else round(hours, 4)})
        if one.name:
            rows[-1] |= {"name": one.name, "times": one.times}
    if not config.transfer.stages:
        return facts | rows[0]
    known = [row["gpu_hours_at_most"] for row in rows]
    return facts | {"trainings": rows, "gpu_hours_at_most": None if None in known else round(sum(known), 4)}


def described(submission: Submission, *, address: str, code: str, hours: Tree) -> Tree:
    """Everything that would run, for ``--dry-run``; there is no secret in it because a submission holds none."""
    config: Any = submission.config
    return {
        "submission_id": submission.name,
        "address": address,
        "entrypoint": submission.entrypoint,
        "runtime_env": {
            "working_dir": sorted(submission.files),
            "py_modules": code,
        },
        "metadata": submission.metadata,
        "resources": {
            "workers": config.cluster.num_workers,
            "cpus_per_worker": config.cluster.cpus_per_worker,
            "gpu_per_worker": config.cluster.use_gpu,
        },
        "run_folder": submission.run_folder,
        "max_gpu_hours": submission.max_gpu_hours,
        "estimate": hours,
    }

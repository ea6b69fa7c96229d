"""predictions → predictions/*.parquet, history.parquet and results.json: what a report or a paper is made from."""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from medtl_dist import __version__
from medtl_dist.config import Config
from medtl_dist.data.label_sets import TASK
from medtl_dist.data.shards import Dataset, read_split
from medtl_dist.errors import DataError
from medtl_dist.metrics.multilabel import fix_thresholds, summarise_label_sets
from medtl_dist.metrics.operating import choose_threshold
from medtl_dist.metrics.scores import by_patient
from medtl_dist.metrics.summary import summarise
from medtl_dist.models.freezing import count_parameters
from medtl_dist.run import Folder
from medtl_dist.store_folder import StoreFolder
from medtl_dist.train.clock import ACTIVITIES
from medtl_dist.train.evaluate import Predictions, predictions_table
from medtl_dist.train.ledger import (
    count_openings,
    count_openings_in_store,
    record_opening,
    record_opening_in_store,
)
from medtl_dist.train.session import Session

SCHEMA_VERSION = 1
_FOLD_CAUTION = (
    "One fold of a cross-validation: the numbers here are of images that were trained on, or that the epoch was chosen on. The "
    "result is crossval.json of the whole."
)


def write(session: Session, best: Mapping[str, Any], scored: Mapping[str, Predictions]) -> None:
    """Write everything that a finished run leaves, ``results.json`` last. Rank 0 only.

    ``best`` is the history's row of the best epoch; ``scored`` has its predictions per split. A scored test split is
    counted in the ledger first.
    """
    config, dataset, folder = session.config, session.dataset, session.run.folder
    openings = note_opening(config, dataset, folder) if "test" in scored else None
    fixed = operating_points(config, dataset, scored["val"])
    entries: dict[str, Any] = {}
    for split, predictions in scored.items():
        write_predictions(folder, dataset, split, predictions)
        entries[split] = summarise_split(config, dataset, split, predictions, fixed)
    history = [row | {"best": row["epoch"] == best["epoch"]} for row in session.position.history]
    folder.write("history.parquet", _parquet(pa.Table.from_pylist(history)))
    counts = count_parameters(session.network.model)
    results = {
        "schema_version": SCHEMA_VERSION,
        "run": folder.path.rpartition("/")[2],
        "task": dataset.task,
        "classes": list(dataset.classes),
        "positive_class": dataset.positive_class,
        "splits": entries,
        "headline": headline(entries),
        **fixed,
        "best_epoch": best["epoch"],
        "best_checkpoint": best["checkpoint"],
        "epochs_run": session.position.epoch,
        "epochs_planned": config.train.epochs,
        "stopped_early": session.position.epoch < config.train.epochs,
        "model": {
            "backbone": session.network.spec.name,
            "frozen_depth": session.network.frozen_depth,
            "parameters": counts.total,
            "trainable_parameters": counts.trainable,
            "weights": session.network.weights,
            "weights_sha256": session.network.weights_sha256,
        },
        "throughput": throughput(session.position.history),
        "training": {
            "world_size": session.run.world_size,
            "precision": session.network.precision.name,
            "precision_note": session.network.precision.note,
            "device": _device_name(session),
            "threads_per_rank": session.threads,
            "global_batch_size": config.data.global_batch_size,
            "steps_per_epoch": session.plan.num_steps,
            "dropped_per_epoch": session.plan.num_left_out,
        },
        "data": describe_data(dataset),
        "provenance": provenance(config, dataset) | {"started": session.started, "finished": _now()},
        "test_openings": openings,
        "cautions": cautions(config, dataset, session.network.weights, entries),
    }
    write_results(folder, results)


def summarise_split(
    config: Config, dataset: Dataset, split: str, predictions: Predictions, fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """A split's entry of ``results.json`` at the config's unit. ``fixed``: as ``operating_points``."""
    if dataset.task == TASK:
        return summarise_label_sets(
            classes=list(dataset.classes),
            sets=predictions.labels,
            logits=predictions.logits,
            groups=groups_of(dataset, split),
            loss=predictions.loss,
            thresholds=fixed["thresholds"],
            unit=config.evaluate.unit,
            aggregate=config.evaluate.aggregate,
            num_bootstrap=config.evaluate.bootstrap_samples,
            seed=config.train.seed,
        )
    return summarise(
        classes=list(dataset.classes),
        task=dataset.task,
        labels=predictions.labels,
        logits=predictions.logits,
        groups=groups_of(dataset, split),
        loss=predictions.loss,
        threshold=fixed["threshold"],
        unit=config.evaluate.unit,
        aggregate=config.evaluate.aggregate,
        num_bootstrap=config.evaluate.bootstrap_samples,
        seed=config.train.seed,
    )


def groups_of(dataset: Dataset, split: str) -> np.ndarray | None:
    """The patient of each image in index order, or None where the set does not know them."""
    if dataset.group_source == "none":
        return None
    return np.asarray(read_split(dataset, split, columns=["group"]).column("group").to_pylist())


def operating_points(config: Config, dataset: Dataset, val: Predictions) -> dict[str, Any]:
    """The entry ``threshold`` of ``results.json``, and of several labels an image also ``thresholds``, by class."""
    if dataset.task != TASK:
        return {"threshold": fix_threshold(config, dataset, val)}
    by_class = fix_thresholds(
        classes=dataset.classes,
        sets=val.labels,
        logits=val.logits,
        groups=groups_of(dataset, "val"),
        unit=config.evaluate.unit,
        aggregate=config.evaluate.aggregate,
        sensitivity=config.evaluate.sensitivity,
    )
    return {"threshold": None, "thresholds": by_class}


def fix_threshold(config: Config, dataset: Dataset, val: Predictions) -> dict[str, Any] | None:
    """The operating point, from val alone and at the config's unit; None for more than two classes or a val of one class."""
    if dataset.task != "binary":
        return None
    labels, logits = val.labels, val.logits
    groups = groups_of(dataset, "val")
    if config.evaluate.unit == "patient" and groups is not None:
        patients = by_patient(labels, logits, groups, aggregate=config.evaluate.aggregate)
        labels, logits = patients.labels, patients.logits
    if len(np.unique(labels)) < 2:
        return None
    return choose_threshold(labels, logits, sensitivity=config.evaluate.sensitivity)


def note_opening(config: Config, dataset: Dataset, folder: Folder) -> dict[str, int]:
    """Count this scoring of the test split in the ledger beside the run folder."""
    if isinstance(folder, StoreFolder):
        return record_opening_in_store(folder, dataset_sha256=dataset.sha256, config_sha256=config.sha256())
    return record_opening(folder.local_path, dataset_sha256=dataset.sha256, config_sha256=config.sha256())


def openings_so_far(dataset: Dataset, folder: Folder) -> dict[str, int]:
    if isinstance(folder, StoreFolder):
        return count_openings_in_store(folder, dataset.sha256)
    return count_openings(folder.local_path, dataset.sha256)


def write_predictions(folder: Folder, dataset: Dataset, split: str, predictions: Predictions) -> None:
    folder.write(f"predictions/{split}.parquet", _parquet(predictions_table(dataset, split, predictions)))


def write_results(folder: Folder, results: Mapping[str, Any]) -> None:
    folder.write("results.json", json.dumps(results, indent=1, allow_nan=False).encode())


def read_results(folder: Folder) -> dict[str, Any]:
    """The run's ``results.json``. Raises DataError where it is missing or damaged."""
    try:
        results = json.loads(folder.read("results.json"))
        if results["schema_version"] != SCHEMA_VERSION:
            raise DataError(
                f"{folder.url}/results.json: schema version {results['schema_version']}, expected {SCHEMA_VERSION}."
            )
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder.url}/results.json: damaged; run the evaluation again.") from None
    return results


def headline(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers to quote: test where it was opened, else val."""
    split = "test" if "test" in entries else "val"
    entry = entries[split]
    names = (
        "unit",
        "auc",
        "auc_undefined",
        "auc_ci",
        "ci_method",
        "ci_warning",
        "average_precision",
        "prevalence",
        "n",
        "n_groups",
    )
    return {"split": split} | {name: entry.get(name) for name in names}


def throughput(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the epochs of images/s (all ranks together), of the share of training time spent waiting for data, and of
    the seconds that rank 0 spent on each activity."""
    rates = [row["images_per_s"] for row in history if row["images_per_s"] > 0]
    waits = [row["data_wait_fraction"] for row in history if row["images_per_s"] > 0]
    return {
        "images_per_s": float(np.median(rates)) if rates else None,
        "data_wait_fraction": float(np.median(waits)) if waits else None,
        "seconds_per_epoch": {
            name: float(np.median([row.get(f"{name}_s", 0.0) for row in history])) for name in ACTIVITIES if history
        },
    }


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What a report says of the data set, without file lists."""
    splits = {
        name: {key: value for key, value in split.items() if key != "shards"}
        for name, split in dataset.info["splits"].items()
    }
    kept = ("group_source", "split_source", "found", "excluded", "preprocessing", "audit")
    return {"name": dataset.name, "sha256": dataset.sha256, "splits": splits} | {
        key: dataset.info.get(key) for key in kept
    }


def provenance(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What was computed with what: hashes, versions, and the commit where the code is a git checkout."""
    packages = ("torch", "torchvision", "ray", "numpy", "pyarrow", "scikit-learn", "opencv-python-headless")
    versions = {"medtl_dist": __version__, "python": platform.python_version()}
    for package in packages:
        versions[package] = importlib.metadata.version(package)
    return {
        "config_sha256": config.sha256(),
        "dataset_sha256": dataset.sha256,
        "versions": versions,
        "commit": _commit(),
    }


def cautions(config: Config, dataset: Dataset, weights: str, entries: Mapping[str, Any]) -> list[str]:
    """Sentences that belong beside the numbers."""
    found: list[str] = []
    if weights.startswith("random"):
        found.append("Random initial weights: nothing was transferred from another data set.")
    if dataset.group_source == "none":
        found.append(
            "The data set names no patients: intervals assume independent images, and splits may share patients."
        )
    if shifting := _what_shifts_scores(config):
        found.append(
            f"Trained with {' and '.join(shifting)}: scores are not calibrated probabilities until corrected on val."
        )
    if dataset.info.get("fold"):
        found.append(_FOLD_CAUTION)
    elif "test" not in entries:
        found.append("Validation only: the epoch was chosen on these images, so the numbers are optimistic.")
    return found


def _what_shifts_scores(config: Config) -> list[str]:
    """What of the training makes the minimum of the loss another function than the probability of the class."""
    train, augment = config.train, config.augment
    asked = {
        f"sampling by {config.data.sampling}": config.data.sampling != "natural",
        "class weights": train.class_weights != "none",
        "focal loss": train.loss == "focal" and train.focal_gamma > 0,
        "label smoothing": train.label_smoothing > 0,
        "mixup": augment.mixup_alpha > 0,
        "cutmix": augment.cutmix_alpha > 0,
    }
    return [name for name, yes in asked.items() if yes]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _device_name(session: Session) -> str:
    if session.run.device.type == "cuda":
        return torch.cuda.get_device_name(session.run.device)
    return "CPU"


def _commit() -> str | None:
    """The commit of the checkout this package lies in, or None; MEDTL_COMMIT for images built without .git."""
    if os.environ.get("MEDTL_COMMIT"):
        return os.environ["MEDTL_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

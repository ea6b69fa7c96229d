"""A run folder as training leaves it, made from simulated patients: for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.config import Config
from medtl_dist.metrics.operating import choose_threshold
from medtl_dist.metrics.scores import log_odds
from medtl_dist.metrics.summary import summarise


def scored_split(
    num_patients: Sequence[int], *, seed: int, skill: float = 2.4, known_patients: bool = True
) -> dict[str, np.ndarray | None]:
    """``num_patients`` per class with 1 to 4 images each: labels [n], logits [n, K], groups [n] (None if unknown)."""
    rng = np.random.default_rng(seed)
    num_classes = len(num_patients)
    classes = np.repeat(np.arange(num_classes), num_patients)
    images = rng.integers(1, 5, len(classes))
    labels = np.repeat(classes, images)
    own = np.repeat(rng.normal(size=(len(classes), num_classes)), images, axis=0)
    outputs = own + 0.8 * rng.normal(size=own.shape) + skill * np.eye(num_classes)[labels]
    groups = np.repeat([f"{index:032x}" for index in range(len(classes))], images)
    return {"labels": labels, "logits": log_odds(outputs), "groups": groups if known_patients else None}


def write_run(
    folder: Path,
    *,
    classes: Sequence[str] = ("NORMAL", "PNEUMONIA"),
    num_patients: Sequence[int] = (90, 150),
    known_patients: bool = True,
    test: bool = True,
    epochs: int = 12,
    unit: str = "image",
    skill: float = 2.4,
    num_bootstrap: int = 100,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write config.yaml, history.parquet and results.json into ``folder``; ``changes`` replaces top-level keys of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    task = "binary" if len(classes) == 2 else "multiclass"
    val = scored_split(num_patients, seed=1, skill=skill, known_patients=known_patients)
    scored = {"val": val}
    if test:
        scored["test"] = scored_split(num_patients, seed=2, skill=skill * 0.9, known_patients=known_patients)
    both = len(np.unique(np.asarray(val["labels"]))) == 2
    threshold = choose_threshold(val["labels"], val["logits"], sensitivity=None) if task == "binary" and both else None  # type: ignore[arg-type]
    entries = {
        name: summarise(
            classes=classes,
            task=task,
            loss=0.31,
            threshold=threshold,
            unit=unit,
            num_bootstrap=num_bootstrap,
            **split,  # type: ignore[arg-type]
        )
        for name, split in scored.items()
    }
    history = simulated_history(epochs, entries["val"]["auc"])
    pq.write_table(pa.Table.from_pylist(history), folder / "history.parquet")
    (folder / "config.yaml").write_text(Config().to_yaml(), encoding="utf-8")
    best = max(history, key=lambda row: row["val_auc"] or 0.0)["epoch"]
    results = {
        "schema_version": 1,
        "run": folder.name,
        "task": task,
        "classes": list(classes),
        "positive_class": classes[1] if task == "binary" else None,
        "splits": entries,
        "threshold": threshold,
        "best_epoch": best,
        "epochs_run": epochs,
        "epochs_planned": epochs + 8,
        "stopped_early": True,
        **surroundings(classes, {name: np.asarray(split["labels"]) for name, split in scored.items()}, known_patients),
        **(changes or {}),
    }
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
    return folder


def simulated_history(epochs: int, best_auc: float | None) -> list[dict[str, Any]]:
    """Rows of history.parquet: losses fall, then the validation loss rises again."""
    rng = np.random.default_rng(3)
    rows = []
    for epoch in range(epochs):
        share = (epoch + 1) / epochs
        auc = (
            None
            if best_auc is None
            else best_auc - 0.25 * (1 - share) ** 3 - 0.01 * max(0, share - 0.7) - 0.004 * rng.random()
        )
        rows.append(
            {
                "epoch": epoch,
                "train_loss": 0.62 * np.exp(-2.2 * share) + 0.03 + 0.01 * rng.random(),
                "lr": 1e-3 * (1 + np.cos(np.pi * share)) / 2,
                "val_auc": auc,
                "val_loss": 0.55 * np.exp(-2.0 * share) + 0.14 + 0.35 * max(0, share - 0.6) ** 2 + 0.02 * rng.random(),
                "val_average_precision": auc,
                "images_per_s": 41.0,
                "data_wait_fraction": 0.012,
                "epoch_s": 114.0,
                "best": False,
            }
        )
    return rows


def surroundings(classes: Sequence[str], labels: dict[str, np.ndarray], known_patients: bool) -> dict[str, Any]:
    """The parts of results.json that tell of model, data and provenance, for these scored splits."""
    counts = {name: np.bincount(values, minlength=len(classes)) for name, values in labels.items()}
    counts["train"] = 5 * counts["val"]
    splits = {
        name: {
            "samples": int(values.sum()),
            "groups": int(values.sum()) // 2,
            "classes": {label: int(number) for label, number in zip(classes, values, strict=True)},
            "domains": {},
        }
        for name, values in counts.items()
    }
    excluded = [
        {"reason": "unreadable image", "split": "train", "class": classes[0], "samples": 3, "groups": 2},
        {"reason": "unreadable image", "split": "val", "class": classes[1], "samples": 1, "groups": 1},
        {"reason": "label missing", "split": "train", "class": None, "samples": 7, "groups": 5},
    ]
    return {
        "model": {
            "backbone": "resnet101",
            "frozen_depth": 2,
            "parameters": 42_504_258,
            "trainable_parameters": 42_274_242,
            "weights": "imagenet (resnet101-cd907fc2.pth)",
            "weights_sha256": "cd907fc2" * 8,
        },
        "throughput": {"images_per_s": 41.3, "data_wait_fraction": 0.012},
        "timing_s": {"total": 1392.4},
        "training": {
            "world_size": 2,
            "precision": "bf16",
            "precision_note": None,
            "device": "CPU",
            "global_batch_size": 32,
            "dropped_per_epoch": 20,
        },
        "data": {
            "name": "kermany_cxr_224",
            "sha256": "0f1e2d3c" * 8,
            "group_source": "column split+patient_id" if known_patients else "none",
            "found": sum(item["samples"] for item in splits.values()) + 11,
            "excluded": excluded,
            "splits": splits,
            "preprocessing": {
                "image_size_px": 256,
                "color": "grey",
                "resize": "short_side_area",
                "window": None,
                "encoding": "jpeg95",
            },
        },
        "provenance": {
            "config_sha256": "8a9bacbd" * 8,
            "dataset_sha256": "0f1e2d3c" * 8,
            "versions": {"medtl_dist": "0.1.0", "torch": "2.14.1", "torchvision": "0.29.1", "ray": "2.60.0"},
            "commit": "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
            "started": "2026-03-12T13:41:10+00:00",
            "finished": "2026-03-12T14:05:22+00:00",
        },
        "test_openings": {"count": 3, "configurations": 2} if "test" in labels else None,
        "cautions": ["Trained with class weights: scores are not calibrated probabilities until corrected on val."],
    }

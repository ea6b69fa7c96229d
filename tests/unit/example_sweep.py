"""A sweep folder as `medtl tune` leaves it: made-up trials with val scores of every epoch; all numbers belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medtl_dist.config import load_config
from medtl_dist.metrics.ranking import roc_auc
from medtl_dist.sweep.outcome import Epoch, Outcome
from medtl_dist.sweep.summary import write_sweep
from tune_spaces.space import draw, load_space

DEPTHS = {0: 0, 3: 3, 4: 4, "all": 5}


def made_up_val(num_patients: int, num_classes: int, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """Labels int64 [n] and patients int64 [n], one to three images each, all of a patient's of one class."""
    of_patient = rng.permutation(np.arange(num_patients) % num_classes)
    groups = np.repeat(np.arange(num_patients), rng.integers(1, 4, num_patients))
    return of_patient[groups], groups


def made_up_logits(
    labels: NDArray, groups: NDArray, quality: float, num_classes: int, rng: np.random.Generator
) -> NDArray:
    """float32 [n, classes]; the images of a patient share a part of their noise."""
    shared = rng.normal(size=(groups.max() + 1, num_classes))[groups]
    signal = quality * (labels[:, None] == np.arange(num_classes))
    logits = signal + 0.8 * shared + 0.6 * rng.normal(size=(len(labels), num_classes))
    if num_classes == 2:
        logits = np.stack([-logits[:, 1] + logits[:, 0], logits[:, 1] - logits[:, 0]], axis=1) / 2
    return logits.astype(np.float32)


def macro_auc(labels: NDArray, logits: NDArray) -> float | None:
    columns = [1] if logits.shape[1] == 2 else range(logits.shape[1])
    aucs = [roc_auc(labels == k, logits[:, k]) for k in columns]
    defined = [auc for auc in aucs if auc is not None]
    return float(np.mean(defined)) if defined else None


def keep_scores(
    run: Path, labels: NDArray, groups: NDArray, by_epoch: dict[int, NDArray], classes: list[str], *, best: int | None,
    known_patients: bool = True,
) -> None:  # fmt: skip
    """What a trial leaves of its val scores: every epoch's logits, and its predictions where it came to its end."""
    (run / "predictions" / "epochs").mkdir(parents=True)
    for epoch, logits in by_epoch.items():
        np.save(run / "predictions" / "epochs" / f"{epoch:04d}.npy", logits, allow_pickle=False)
    if best is None:
        return
    columns: dict[str, Any] = {"key": [f"{row:032x}" for row in range(len(labels))], "group": groups}
    columns["label"] = labels
    columns |= {f"logit_{name}": by_epoch[best][:, k].astype(np.float64) for k, name in enumerate(classes)}
    pq.write_table(pa.table(columns), run / "predictions" / "val.parquet")
    task = "binary" if len(classes) == 2 else "multiclass"
    source = "column patient" if known_patients else "none"
    results = {"schema_version": 1, "task": task, "classes": classes, "data": {"group_source": source}}
    (run / "results.json").write_text(json.dumps(results))


def write_trials(
    folder: Path, *, num_trials: int = 12, epochs: int = 8, num_patients: int = 220,
    classes: tuple[str, ...] = ("NORMAL", "PNEUMONIA"),
    seed: int = 0, faults: bool = True, known_patients: bool = True, cached: bool = True,
) -> list[Outcome]:  # fmt: skip
    """The trials' folders and the base config; returns their outcomes. With ``faults`` one crashed, one became NaN."""
    rng = np.random.default_rng(seed)
    base = load_config(preset="resnet101", overrides=["augment.views=1", f"train.epochs={epochs}"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(base.to_yaml())
    (folder / "space.yaml").write_text(load_space("resnet101").to_yaml())
    labels, groups = made_up_val(num_patients, len(classes), rng)
    outcomes = []
    for number, overrides in enumerate(draw(load_space("resnet101"), num_trials, seed=seed, base=base)):
        depth = DEPTHS[overrides.get("model.frozen_depth", 0)]
        distance = abs(np.log10(overrides.get("optim.lr", 1e-3)) + 2.8)
        top = 2.1 - 0.5 * distance**2 + {0: 0.1, 3: 0.2, 4: 0.1, 5: -0.5}[depth]
        speed = 0.25 + 0.1 * depth
        stopped = faults and top < 1.6 and number % 2 == 0
        ran = max(2, epochs // 3) if stopped else epochs
        logits = {
            epoch: made_up_logits(labels, groups, top * (1 - np.exp(-speed * (epoch + 1))), len(classes), rng)
            for epoch in range(ran)
        }
        curve = [
            Epoch(epoch, macro_auc(labels, one), 0.69 - 0.05 * top * epoch / epochs + 0.01 * rng.random(),
                  0.69 - 0.08 * epoch / epochs, 31.0 * (epoch + 1) * (1 - 0.15 * depth))
            for epoch, one in logits.items()
        ]  # fmt: skip
        state, reason, attempts = (
            ("stopped", f"asha: below the best third after {ran} epochs", 1) if stopped else ("finished", None, 1)
        )
        if faults and number == 5:
            state, reason, attempts = "failed", "DataError: train-00003.tar: checksum differs <key>", 2
            curve = curve[:3]
        if faults and number == 7:
            curve = [Epoch(0, None, float("nan"), float("nan"), 30.0)]
            state, reason = "stopped", "its AUC is undefined: the loss became NaN in epoch 1"
        run = folder / "trials" / f"{number:05d}"
        outcome = Outcome(
            number=number, overrides=overrides, state=state, reason=reason, curve=tuple(curve), frozen_depth=depth,
            num_stages=5, seconds=curve[-1].seconds + 3, cpu_hours=curve[-1].seconds / 3600, gpu_hours=0.0, attempts=attempts,
            cached_s=(18.0 if depth >= 4 and number in (1, 4) else 0.4) if cached and depth else None,
            folder=f"trials/{number:05d}",
        )  # fmt: skip
        best = outcome.best.epoch if outcome.best is not None and state == "finished" else None
        kept = {row.epoch: logits[row.epoch] for row in curve}
        keep_scores(run, labels, groups, kept, list(classes), best=best, known_patients=known_patients)
        outcomes.append(outcome)
    return outcomes


def write_example(folder: Path, **options: Any) -> Path:
    """A whole sweep folder: trials, sweep.parquet and sweep.json."""
    write_sweep(folder, write_trials(folder, **options))
    return folder

"""run folder → predictor: the best checkpoint with all that it says of itself; the training set is not needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medtl_dist.config import Config
from medtl_dist.data.label_sets import TASK
from medtl_dist.data.transforms import EvalTransform, Image
from medtl_dist.errors import DataError, UserError
from medtl_dist.metrics.scores import log_odds
from medtl_dist.models.normalise import Normalisation
from medtl_dist.models.weights_store import FROZEN_FILE, sha256_of_both
from medtl_dist.run import Folder
from medtl_dist.storage import StorageOptions
from medtl_dist.train import checkpoint, results
from medtl_dist.train.evaluate import Scorer, forward
from medtl_dist.train.run_folder import ENSEMBLE_FILE, read_config
from medtl_dist.train.setup import create_network, scorer_of, set_threads, storage_of


@dataclass(frozen=True)
class Fitted:
    """What a network must fit: its classes, and the channels of its images."""

    classes: tuple[str, ...]
    channels: int


@dataclass(frozen=True)
class Predictor:
    """One model, or several whose logits are averaged, with what surrounds them.

    ``preprocessing``: as ``setup.preprocessing_of``, the same for all; ``threshold``: fixed on val, None where there is
    none; ``thresholds``: by class, of several labels an image; ``unit``, ``aggregate``: the level the threshold is of, and
    how images become a patient; ``checkpoints``: SHA-256 of each member's weights; ``config``: the run's, or the first
    member's; ``notes``: what the user should know.
    """

    scorers: tuple[Scorer, ...]
    classes: tuple[str, ...]
    task: str
    preprocessing: dict[str, Any]
    threshold: dict[str, Any] | None
    thresholds: dict[str, Any] | None
    unit: str
    aggregate: str
    checkpoints: tuple[str, ...]
    config: Config
    notes: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int:
        return self.scorers[0].batch_size

    @property
    def storage(self) -> StorageOptions:
        """How the run reached its set."""
        return storage_of(self.config)

    def identity(self) -> dict[str, Any]:
        """What decides its numbers, as plain JSON values."""
        first = self.scorers[0]
        return {
            "checkpoints": list(self.checkpoints),
            "classes": list(self.classes),
            "preprocessing": self.preprocessing,
            "precision": first.precision.name,
            "device": first.device.type,
            "batch_size": self.batch_size,
        }


def load_predictor(run_folder: Path, device: torch.device) -> Predictor:
    """The predictor of a finished run, or of a folder whose ``ensemble.json`` names members; ready to score on ``device``.

    Raises:
        UserError: no run folder, a run that has not finished, members that don't fit together.
        DataError: a checkpoint that is damaged, or is not of this config.
    """
    if not (run_folder / ENSEMBLE_FILE).is_file():
        return _of_run(run_folder, device)
    members = [_of_run(place, device) for place in members_of(run_folder)]
    first = members[0]
    for member in members[1:]:
        for name in ("classes", "task", "preprocessing", "aggregate"):
            if getattr(member, name) != getattr(first, name):
                raise UserError(f"{run_folder}: its members differ in {name}, so that one pass can't serve them all")
    note = f"mean of the logits of {len(members)} models; no threshold was fixed for the mean, so none is applied"
    return dataclasses.replace(
        first,
        scorers=tuple(member.scorers[0] for member in members),
        checkpoints=tuple(member.checkpoints[0] for member in members),
        threshold=None,
        thresholds=None,
        notes=(note,) if first.task in ("binary", TASK) else (f"mean of the logits of {len(members)} models",),
    )


def predict_logits(predictor: Predictor, images: Sequence[Image]) -> NDArray[np.float64]:
    """float64 [n, classes], the log-odds of each class as in ``predictions/*.parquet``, of n images uint8
    [channels, S, S], n at most the batch size: a batch always has the same shape, so that its padding changes nothing.

    Raises: DataError, a score that is not a finite number.
    """
    batch = np.zeros((predictor.batch_size, *images[0].shape), np.uint8)
    for number, image in enumerate(images):
        batch[number] = image
    pixels = torch.from_numpy(batch)
    logits = []
    with torch.no_grad():
        for scorer in predictor.scorers:
            outputs = forward(scorer, pixels)[: len(images)]
            logits.append(outputs.astype(np.float64) if predictor.task == TASK else log_odds(outputs))
    found = logits[0] if len(logits) == 1 else np.mean(logits, axis=0)
    if not np.isfinite(found).all():
        raise DataError("the model's score is not a finite number: its checkpoint is of a training that diverged")
    return found


def _of_run(folder: Path, device: torch.device) -> Predictor:
    config, place = read_config(folder), Folder.local(folder)
    if not place.exists("results.json"):
        raise UserError(f"{folder}: the run has not finished; `medtl train --resume` goes on with it.")
    known = results.read_results(place)
    set_threads(config, 1)
    step = known["best_checkpoint"]
    weights, _, meta = checkpoint.load(place, step)
    preprocessing = meta["preprocessing"]
    classes = tuple(meta["classes"])
    network = create_network(
        config, Fitted(classes, preprocessing["channels"]), device=device, rank=0, load_weights=False
    )
    try:
        network.model.load_state_dict(weights)
    except RuntimeError:
        raise DataError(
            f"{folder}: its best checkpoint does not fit its config.yaml; one of them was changed."
        ) from None
    network.model.eval()
    return Predictor(
        scorers=(_as_trained(scorer_of(config, network), preprocessing),),
        classes=classes,
        task=meta["task"],
        preprocessing=preprocessing,
        threshold=known.get("threshold"),
        thresholds=known.get("thresholds"),
        unit=config.evaluate.unit,
        aggregate=config.evaluate.aggregate,
        checkpoints=(_weights_sha256(place, step),),
        config=config,
        notes=_notes(config, known, meta),
    )


def _as_trained(scorer: Scorer, preprocessing: Mapping[str, Any]) -> Scorer:
    """The scorer with the checkpoint's view and normalisation, whatever the config's present meaning."""
    told = preprocessing["normalisation"]
    return dataclasses.replace(
        scorer,
        transform=EvalTransform(preprocessing["image_size_px"], preprocessing["eval_view"]),
        normalisation=Normalisation(tuple(told["mean"]), tuple(told["std"])),
        views=preprocessing["views"],
    )


def _notes(config: Config, known: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader of the scores must know."""
    notes = [text for text in known["cautions"] if "not calibrated" in text]
    if meta["task"] == "binary" and known.get("threshold") is None:
        notes.append("the run has no threshold (its val has one class only), so none is applied")
    elif meta["task"] == "binary" and config.evaluate.unit == "patient":
        notes.append("the threshold was fixed for patients, so it is applied to patients (--group-col), not to images")
    return tuple(notes)


def _weights_sha256(folder: Folder, step: int) -> str:
    files = json.loads(folder.read(f"checkpoints/{step:08d}/manifest.json"))["files"]
    return sha256_of_both(files[checkpoint.WEIGHTS_FILE]["sha256"], files.get(FROZEN_FILE, {}).get("sha256"))


def members_of(folder: Path) -> list[Path]:
    """The run folders that the ensemble in a folder names, below it. Raises DataError, UserError."""
    file = folder / ENSEMBLE_FILE
    try:
        names = json.loads(file.read_bytes())["members"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f'{file} is damaged; {{"members": [relative run folders]}} expected') from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file} names no members; a list of relative run folders expected")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
        raise UserError(f"{file} names a folder outside its own; relative run folders below it expected")
    if len(set(names)) < len(names):
        raise UserError(f"{file} names a member twice")
    return [folder / name for name in names]

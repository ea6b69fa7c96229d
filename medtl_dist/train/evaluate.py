"""fit → predictions: every image of a split scored exactly once, pooled by key; numbers come later and elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from medtl_dist import collectives
from medtl_dist.data.label_sets import TASK, UNKNOWN
from medtl_dist.data.loader import Loader
from medtl_dist.data.shards import Dataset, read_split
from medtl_dist.data.stream import Batch, Kept, eval_batches
from medtl_dist.data.transforms import EvalTransform
from medtl_dist.errors import MedtlError
from medtl_dist.metrics.pooling import pool
from medtl_dist.metrics.scores import log_odds, probability
from medtl_dist.models.normalise import Normalisation, normalise
from medtl_dist.train.precision import Precision
from medtl_dist.train.prefix import Prefix, boundary_of


@dataclass(frozen=True)
class Scorer:
    """How an image becomes outputs: the model with everything around it that must be as in training."""

    model: nn.Module
    transform: EvalTransform
    normalisation: Normalisation
    precision: Precision
    device: torch.device
    channels_last: bool
    batch_size: int
    views: str = "one"
    prefix: Prefix | None = None  # of the model: its frozen layers, where they are computed apart


@dataclass(frozen=True)
class Predictions:
    """A split's pooled scores in index order: ``keys`` [n] hex, ``labels`` int64 [n], or label sets [n, classes] with -1 for
    unknown, ``outputs`` float64 [n, classes]."""

    keys: list[str]
    labels: np.ndarray
    outputs: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """float64 [n, classes], log-odds of each class: against the others, of a label set against its absence."""
        return self.outputs.astype(np.float64) if self.labels.ndim == 2 else log_odds(self.outputs)

    @property
    def loss(self) -> float:
        """Mean over the images, of label sets over the known answers; no weights, no smoothing."""
        mean = binary_cross_entropy if self.labels.ndim == 2 else cross_entropy
        return mean(self.outputs, self.labels)


def cross_entropy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Mean ``-log p(label)`` in float64; no class weights, no smoothing. ``outputs`` [n, classes], ``labels`` int64 [n]."""
    z = outputs.astype(np.float64)
    peak = z.max(axis=1, keepdims=True)
    log_sum = peak[:, 0] + np.log(np.exp(z - peak).sum(axis=1))
    return float((log_sum - z[np.arange(len(labels)), labels]).mean())


def binary_cross_entropy(outputs: np.ndarray, sets: np.ndarray) -> float:
    """Mean ``-log p(answer)`` in float64 over what is known; 0 where nothing is. ``outputs`` [n, classes], ``sets`` int
    [n, classes] of 1, 0 and -1."""
    known = sets != UNKNOWN
    signed = np.where(sets == 1, -1.0, 1.0)[known] * outputs.astype(np.float64)[known]
    return float(np.logaddexp(0.0, signed).mean()) if known.any() else 0.0


@torch.no_grad()
def score_split(
    scorer: Scorer,
    dataset: Dataset,
    split: str,
    *,
    rank: int,
    world_size: int,
    loader: Loader | None = None,
    kept: Kept | None = None,
) -> Predictions | None:
    """Score every image of ``split`` once. Collective: every rank calls it; rank 0 gets the pooled predictions, others None.

    A batch holds the same images in the same places at every world size, the last one padded to the same shape, so an
    image's score does not depend on the world size. ``kept``: where the boundaries of the scorer's prefix can be had.

    Raises:
        DataError: on every rank, where one rank met a damaged shard or a key is missing or scored differently twice.
    """
    keys: list[str] = []
    labels: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    failure: MedtlError | None = None
    was_training = scorer.model.training
    scorer.model.eval()
    try:
        for batch in _batches(scorer, dataset, split, rank, world_size, loader, kept):
            keys += batch.keys
            labels.append(batch.labels.numpy())
            outputs.append(forward(scorer, batch.images, at_boundary=batch.at_boundary)[: batch.num_real])
    except MedtlError as error:
        failure = error
    finally:
        scorer.model.train(was_training)
    collectives.raise_together(failure)
    num_classes = len(dataset.classes)
    no_labels = (0, num_classes) if dataset.task == TASK else (0,)
    part = {
        "keys": keys,
        "labels": np.concatenate(labels) if labels else np.zeros(no_labels, np.int64),
        "logits": np.concatenate(outputs) if outputs else np.zeros((0, num_classes), np.float32),
    }
    parts = collectives.gather_to_rank_0(part)
    pooled: Predictions | None = None
    if rank == 0:
        try:
            expected = hex_keys(read_split(dataset, split, columns=["key"]))
            whole = pool(parts, expected, split)
            pooled = Predictions(expected, whole["labels"], whole["logits"])
        except MedtlError as error:
            failure = error
    collectives.raise_together(failure)
    return pooled


def forward(scorer: Scorer, images: torch.Tensor, *, at_boundary: bool = False) -> np.ndarray:
    """Outputs float32 [batch, classes] of images uint8 [batch, channels, size, size], the mean over the scorer's views.

    ``at_boundary``: of what came out of the scorer's prefix for one view of them."""
    images = images.to(scorer.device, non_blocking=True)
    outputs = []
    for view in [images] if at_boundary else views_of(images, scorer.views):
        if scorer.prefix is None:
            with scorer.precision.autocast():
                inputs = normalise(view, scorer.normalisation, channels_last=scorer.channels_last)
                outputs.append(scorer.model(inputs).float())
        else:
            boundary = view if at_boundary else boundary_of(scorer.prefix, view)
            with scorer.precision.autocast():
                outputs.append(scorer.prefix.split.suffix(boundary).float())
    return torch.stack(outputs).mean(dim=0).cpu().numpy() if len(outputs) > 1 else outputs[0].cpu().numpy()


def views_of(images: torch.Tensor, name: str) -> list[torch.Tensor]:
    """The square images [batch, channels, size, size] as ``evaluate.views`` says, themselves first; no pixel is made up."""
    if name == "one":
        return [images]
    both = [images, images.flip(-1)]
    if name == "mirror":
        return both
    return [one.rot90(turns, (-2, -1)) for one in both for turns in range(4)]


def hex_keys(table: pa.Table) -> list[str]:
    """The binary ``key`` column as hexadecimal strings."""
    return [key.hex() for key in table.column("key").to_pylist()]


def predictions_table(dataset: Dataset, split: str, predictions: Predictions) -> pa.Table:
    """The table of ``predictions/{split}.parquet``: key, group, domain, kept columns, label (of label sets label_ per
    class, null for unknown), logit_ and score_ per class."""
    index = read_split(dataset, split)
    own = {"key", "sha256", "split", "label", "shard", "offset", "size", "width", "height", "channels"}
    columns: dict[str, pa.Array | pa.ChunkedArray | np.ndarray | list[str]] = {"key": predictions.keys}
    columns |= {name: index.column(name) for name in index.column_names if name not in own}
    if predictions.labels.ndim == 2:
        for k, name in enumerate(dataset.classes):
            values = predictions.labels[:, k].astype(np.int8)
            columns[f"label_{name}"] = pa.array(values, mask=values == UNKNOWN)
    else:
        columns["label"] = predictions.labels
    logits = predictions.logits
    for k, name in enumerate(dataset.classes):
        columns[f"logit_{name}"] = logits[:, k]
    for k, name in enumerate(dataset.classes):
        columns[f"score_{name}"] = probability(logits[:, k])
    return pa.table(columns)


def _batches(
    scorer: Scorer, dataset: Dataset, split: str, rank: int, world_size: int, loader: Loader | None, kept: Kept | None
) -> Iterator[Batch]:
    return eval_batches(
        dataset,
        split,
        transform=scorer.transform,
        batch_size=scorer.batch_size,
        rank=rank,
        world_size=world_size,
        loader=loader,
        kept=kept,
    )

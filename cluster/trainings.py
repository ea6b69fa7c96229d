"""a config → the trainings that it asks for (one, a chain's stages, a comparison's), and what they need of a cluster together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from cluster.placement import Store
from cluster.sizing import UNKNOWN_SIZE_PX, RankSize, Resources, Shape, Tree, gpu_shape
from medtl_dist.config import Config, stages_of
from medtl_dist.data.plan import check_world_size
from medtl_dist.errors import UserError

# Beside the weights, to score a batch in fp32 on a CPU; measured at 224 px, 32 images: 804 for VGG16, 285 for ResNet101.
SCORED_BYTES_PER_PX = 1024


@dataclass(frozen=True)
class Training:
    """One of a run's trainings: its complete config, ``name`` of the stage ("" where there is one training only), and how often
    it is trained, with other seeds."""

    name: str
    config: Config
    times: int = 1


def trainings_of(config: Config) -> list[Training]:
    """What the config trains: itself; or its stages in order, of a comparison with each seed, and the last alone as often."""
    stages = stages_of(config)
    if not stages:
        return [Training("", config)]
    times = max(1, len(config.transfer.seeds)) if config.transfer.compare else 1
    found = [Training(stage.name, stage.config, times) for stage in stages]
    # Alone it begins with other weights, which changes neither its images nor its epochs.
    alone = [Training(f"{found[-1].name} alone", found[-1].config, times)] if config.transfer.compare else []
    return found + alone


def training_shape(config: Config, **amounts: Any) -> Shape:
    """The pods of a run's trainings, which use the same ones after each other: of the size that the largest needs.

    ``amounts``: as of :func:`cluster.sizing.gpu_shape`, but for the batch and the image. Raises UserError likewise.
    """
    shapes = [
        gpu_shape(**amounts, global_batch_size=data.global_batch_size, image_size_px=data.image_size_px)
        for data in (one.config.data for one in trainings_of(config))
    ]
    return max(shapes, key=lambda shape: shape.rank.memory_gib)


def with_driver(shape: Shape, config: Config) -> Shape:
    """The shape with a head that holds the run's driver: that of a comparison also scores the source's val by the last model,
    without a GPU."""
    if not config.transfer.compare:
        return shape
    data = [one.config.data for one in trainings_of(config)]
    largest = max(one.eval_batch_size * (one.image_size_px or UNKNOWN_SIZE_PX) ** 2 for one in data)
    more_gib = math.ceil(SCORED_BYTES_PER_PX * largest / 2**30)
    head = Resources(max(shape.head.cpus, shape.rank.cpus), shape.head.memory_gib + more_gib)
    return replace(shape, head=head)


def check_ranks(config: Config, ranks: int) -> None:
    """Whether every training's global batch has a lane for every rank. Raises UserError."""
    for one in trainings_of(config):
        batch, limit = one.config.data.global_batch_size, one.config.data.lanes
        lanes = max(n for n in range(1, min(limit, batch) + 1) if batch % n == 0)
        try:
            check_world_size(lanes, ranks, batch)
        except UserError as error:
            raise UserError(f"stage {one.name}: {error.message}" if one.name else error.message) from None


def placed_stages(config: Config, store: Store, rank: RankSize) -> list[Tree]:
    """The stages' own keys as pods read them: paths in the store, and a rank's CPUs where a stage asks for the machine's.

    Raises:
        UserError: a path that pods can't see; a stage without a set.
    """
    found: list[Tree] = []
    for stage, entry in zip(stages_of(config), config.transfer.stages, strict=True):
        own: Tree = {key: value if key == "name" else dict(value) for key, value in entry.items()}
        data, model, train = (own.get(section, {}) for section in ("data", "model", "train"))
        if "shards" in data or stage.config.data.shards is None:  # the latter raises
            data["shards"] = store.place(f"stage {stage.name}: data.shards", stage.config.data.shards)
        for key in ("weights", "second_weights"):
            if key in model:
                model[key] = store.place_weights(model[key], f"stage {stage.name}: model.{key}")
        if data.get("loader_workers", 0) is None:
            data["loader_workers"] = rank.loaders
        if train.get("threads", 0) is None:
            train["threads"] = rank.cpus - rank.loaders
        found.append(own)
    return found

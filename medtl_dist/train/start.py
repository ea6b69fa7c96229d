"""config, run and shard set → one rank's training in progress, restored from the newest checkpoint that verifies."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medtl_dist import collectives
from medtl_dist.config import Config
from medtl_dist.data.label_sets import TASK
from medtl_dist.data.plan import EpochPlan, check_world_size, train_plan
from medtl_dist.data.shards import Dataset
from medtl_dist.data.strata import Strata, strata_of
from medtl_dist.data.stream import Batch, Kept, run_length_of, train_batches
from medtl_dist.errors import UserError
from medtl_dist.models.join import spec_of
from medtl_dist.models.split import split
from medtl_dist.run import Run
from medtl_dist.train import checkpoint, losses, mixing, optim
from medtl_dist.train.ema import ema_of
from medtl_dist.train.journal import Journal
from medtl_dist.train.parallel import check_batch_norm, own_batch_of, wrap
from medtl_dist.train.prefix_cache import cache_of
from medtl_dist.train.recompute import recompute_stages
from medtl_dist.train.session import Position, Session
from medtl_dist.train.setup import (
    check_augmentation,
    check_label_sets,
    create_network,
    open_shards,
    scorer_of,
    set_threads,
    train_transform_of,
)
from medtl_dist.train.state import check_same_run, restore
from medtl_dist.train.unfreeze import check_unfreezing, depth_at
from medtl_dist.train.warm import Warm


def start(config: Config, run: Run, warm: Warm | None = None) -> Session:
    """Everything up to the next step. Collective. Raises MedtlError, the same on every rank."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    threads = set_threads(config, run.world_size)
    torch.manual_seed(config.train.seed * 1009 + run.rank)
    one_of_many = warm is not None
    keep, warm = warm.network if warm else None, warm or Warm()
    dataset = collectives.agreed(lambda: warm.dataset(config, open_shards))
    collectives.agreed(lambda: check_augmentation(config, dataset))
    collectives.agreed(lambda: check_label_sets(config, dataset))
    strata = collectives.agreed(lambda: sampling_of(config, dataset))
    plan = collectives.agreed(lambda: plan_of(config, dataset, strata=strata))
    own_batch = collectives.agreed(lambda: own_batch_of(plan, run))
    collectives.agreed(lambda: check_unfreezing(config, spec_of(config.model)))
    warnings: list[str] = []
    step = collectives.from_rank_0(
        collectives.agreed(lambda: checkpoint.latest(run.folder, warnings.append) if run.rank == 0 else None)
    )
    saved = collectives.agreed(lambda: checkpoint.load(run.folder, step)) if step is not None else None
    if saved is not None:
        collectives.agreed(lambda: check_same_run(config, dataset, run, saved))
    network = create_network(
        config,
        dataset,
        device=run.device,
        rank=run.rank,
        load_weights=saved is None,
        frozen_depth=depth_at(config, spec_of(config.model), saved[2]["epoch"] if saved is not None else 0),
        keep=keep,
    )
    least_frozen = depth_at(config, network.spec, config.train.epochs)
    collectives.agreed(lambda: check_batch_norm(config, own_batch, all_frozen=least_frozen == network.spec.num_stages))
    if config.train.activation_checkpointing:
        recompute_stages(network.model, network.spec)
    ema = ema_of(network.model, config.train.ema_decay) if config.train.ema_decay is not None else None
    scorer = scorer_of(config, network)
    prefix = scorer.prefix
    if ema is not None:
        averaged = prefix and dataclasses.replace(prefix, split=split(ema.model, network.spec, prefix.depth))
        scorer = dataclasses.replace(scorer, model=ema.model, prefix=averaged)
    session = Session(
        config=config,
        run=run,
        dataset=dataset,
        strata=strata,
        network=network,
        stepper=wrap(config, network, dataset.channels, own_batch, prefix),
        optimizer=optim.create_optimizer(
            config.optim, optim.parameter_groups(config.optim, network.model, network.spec)
        ),
        scaler=network.precision.scaler(),
        ema=ema,
        loader=warm.loader(_loader_workers(config, run, threads)),
        scorer=scorer,
        class_weights=collectives.agreed(lambda: _class_weights(config, dataset, run.device)),
        plan=plan,
        threads=threads,
        journal=collectives.agreed(lambda: Journal(run, config, first_step=step or 0, one_of_many=one_of_many)),
        position=Position(),
        started=started,
        saved_step=step,
        warm=warm,
        prefix=prefix,
    )
    if saved is not None:
        collectives.agreed(lambda: restore(session, saved))
    for text in [*warnings, *_how_it_begins(session, network.message)]:
        session.journal.note(text)
    collectives.agreed(lambda: warm.store)  # made now, where ranks still fail together
    session.cache = cache_of(session)
    return session


def _how_it_begins(session: Session, weights: str) -> Iterator[str]:
    position, precision = session.position, session.network.precision
    resumed = f"resumed at epoch {position.epoch}, step {position.step}, from checkpoint {session.saved_step}"
    yield weights if session.saved_step is None else resumed
    if precision.note:
        yield f"precision {precision.name}: {precision.note}"


def check_inputs(config: Config, *, open_test: bool = False) -> None:
    """Whether the data set fits the config, without touching an image. Raises UserError or DataError."""
    dataset = open_shards(config)
    if open_test and not dataset.shards("test"):
        raise UserError(f"{dataset.folder} has no test images, so there is nothing to open with --test.")
    check_unfreezing(config, spec_of(config.model))
    check_augmentation(config, dataset)
    check_label_sets(config, dataset)
    _class_weights(config, dataset, torch.device("cpu"))
    check_world_size(
        plan_of(config, dataset, strata=sampling_of(config, dataset)).num_lanes,
        max(config.cluster.num_workers, 1),
        config.data.global_batch_size,
    )


def check_same_data(config: Config, results: Mapping[str, Any], run_folder: Path | str) -> None:
    """Whether a finished run's results are of the config's data set. Raises UserError."""
    if open_shards(config).sha256 != results["provenance"]["dataset_sha256"]:
        raise UserError(
            f"{run_folder}: its results are of another data set than {config.data.shards}; use a new run folder."
        )


def sampling_of(config: Config, dataset: Dataset) -> Strata | None:
    """How the config weighs the training images, if it does. Raises UserError for names or weights that don't fit."""
    if config.data.sampling == "natural":
        return None
    return strata_of(dataset, "train", config.data.sampling, config.data.sampling_weights)


def plan_of(config: Config, dataset: Dataset, epoch: int = 0, strata: Strata | None = None) -> EpochPlan:
    """The epoch's order of the training split. Raises UserError where there are too few images for one step."""
    return train_plan(
        [shard.samples for shard in dataset.shards("train")],
        global_batch_size=config.data.global_batch_size,
        seed=config.train.seed,
        epoch=epoch,
        max_lanes=config.data.lanes,
        run_length=run_length_of(dataset, "train", config.data.global_batch_size, config.data.lanes, strata),
        weighting=strata and strata.weighting,
    )


def _class_weights(config: Config, dataset: Dataset, device: torch.device) -> Tensor | None:
    entry = dataset.info["splits"]["train"]
    counts = [entry["classes"].get(name, 0) for name in dataset.classes]
    if dataset.task == TASK:
        negatives = [entry["negatives"].get(name, 0) for name in dataset.classes]
        weights = losses.positive_weights_of(config.train.class_weights, dataset.classes, counts, negatives)
    else:
        weights = losses.class_weights_of(config.train.class_weights, dataset.classes, counts)
    return None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)


def _loader_workers(config: Config, run: Run, threads: int) -> int:
    """Decoding processes of a rank: with a GPU its other CPUs decode; on a CPU decoding shares the computing threads."""
    if config.data.loader_workers is not None:
        return config.data.loader_workers
    return min(8, max(threads - 1, 1)) if run.device.type == "cuda" else 0


def train_stream(session: Session, kept: Kept | None = None) -> Iterator[Batch]:
    """The rest of the current epoch's batches of this rank, from the position's step on, mixed where the config says so.

    ``kept``: where the boundaries of their images can be had."""
    config, position, run = session.config, session.position, session.run
    mixes = mixing.on(config.augment)
    batches = train_batches(
        session.dataset,
        "train",
        transform=train_transform_of(config, session.network.image_size_px),
        global_batch_size=config.data.global_batch_size,
        seed=config.train.seed,
        epoch=position.epoch,
        rank=run.rank,
        world_size=run.world_size,
        start_step=max(position.step - 1, 0) if mixes else position.step,
        max_lanes=config.data.lanes,
        loader=session.loader,
        verify=config.data.verify_checksums,
        pin_memory=run.device.type == "cuda",
        strata=session.strata,
        views=config.augment.views,
        kept=kept,
    )
    if not mixes:
        return batches
    return mixing.mixed(
        batches,
        config.augment,
        num_classes=len(session.dataset.classes),
        seed=config.train.seed,
        epoch=position.epoch,
        start_step=position.step,
        device=run.device,
    )

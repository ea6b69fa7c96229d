"""config, run and shard set → one rank's training in progress, restored from the newest checkpoint that verifies."""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medtl_dist import collectives
from medtl_dist.config import Config
from medtl_dist.data.loader import Loader
from medtl_dist.data.plan import EpochPlan, check_world_size, train_plan
from medtl_dist.data.shards import Dataset
from medtl_dist.data.stream import Batch, run_length_of, train_batches
from medtl_dist.errors import MedtlError, TrainingError, UserError
from medtl_dist.models.freezing import resolve_depth
from medtl_dist.models.normalise import normalise
from medtl_dist.models.registry import spec
from medtl_dist.run import Run
from medtl_dist.train import checkpoint, optim
from medtl_dist.train.evaluate import Scorer
from medtl_dist.train.journal import Journal
from medtl_dist.train.setup import (
    Network,
    create_network,
    open_shards,
    preprocessing_of,
    scorer_of,
    set_threads,
    train_transform_of,
)

T = TypeVar("T")


@dataclass
class Position:
    """Where training stands; all of it is in a checkpoint. ``epoch`` and ``step`` (in the epoch) are the next to run."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    loss_total: float = 0.0  # this epoch's summed loss over all ranks, up to ``step``
    weight_total: float = 0.0  # and its denominator
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Session:
    """One rank's training in progress."""

    config: Config
    run: Run
    dataset: Dataset
    network: Network
    stepper: nn.Module  # the model, wrapped in DDP where there are several ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    loader: Loader
    scorer: Scorer
    class_weights: Tensor | None
    plan: EpochPlan  # of epoch 0: its number of steps holds for every epoch
    threads: int
    journal: Journal
    position: Position
    started: str


def start(config: Config, run: Run) -> Session:
    """Everything up to the next step. Collective. Raises MedtlError, the same on every rank."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    threads = set_threads(config, run.world_size)
    torch.manual_seed(config.train.seed * 1009 + run.rank)
    dataset = agreed(lambda: open_shards(config))
    plan = agreed(lambda: plan_of(config, dataset))
    own_batch = agreed(lambda: len(plan.lanes_of(run.rank, run.world_size))) * plan.lane_batch
    warnings: list[str] = []
    step = collectives.from_rank_0(
        agreed(lambda: checkpoint.latest(run.folder, warnings.append) if run.rank == 0 else None)
    )
    network = create_network(config, dataset, device=run.device, rank=run.rank, load_weights=step is None)
    agreed(lambda: _check_batch_norm(config, network, own_batch))
    session = Session(
        config=config,
        run=run,
        dataset=dataset,
        network=network,
        stepper=_wrap(config, network, dataset.channels, own_batch),
        optimizer=optim.create_optimizer(
            config.optim, optim.parameter_groups(config.optim, network.model, network.spec)
        ),
        scaler=network.precision.scaler(),
        loader=Loader(_loader_workers(config, run, threads)),
        scorer=scorer_of(config, network),
        class_weights=_class_weights(config, dataset, run.device),
        plan=plan,
        threads=threads,
        journal=Journal(run, first_step=step or 0),
        position=Position(),
        started=started,
    )
    for text in warnings:
        session.journal.note(text)
    if step is None:
        session.journal.note(network.message)
    else:
        agreed(lambda: _restore(session, step))
        session.journal.note(
            f"resumed at epoch {session.position.epoch}, step {session.position.step}, from checkpoint {step}"
        )
    if network.precision.note:
        session.journal.note(f"precision {network.precision.name}: {network.precision.note}")
    return session


def agreed(action: Callable[[], T]) -> T:
    """``action()`` on every rank, or the first rank's MedtlError on every rank."""
    failure: MedtlError | None = None
    value: T | None = None
    try:
        value = action()
    except MedtlError as error:
        failure = error
    collectives.raise_together(failure)
    return value  # type: ignore[return-value]


def check_inputs(config: Config, *, open_test: bool = False) -> None:
    """Whether the data set fits the config, without touching an image. Raises UserError or DataError."""
    dataset = open_shards(config)
    if open_test and not dataset.shards("test"):
        raise UserError(f"{dataset.folder} has no test images, so there is nothing to open with --test.")
    resolve_depth(spec(config.model.backbone), config.model.frozen_depth)
    check_world_size(
        plan_of(config, dataset).num_lanes, max(config.cluster.num_workers, 1), config.data.global_batch_size
    )


def check_same_data(config: Config, results: Mapping[str, Any], run_folder: Path) -> None:
    """Whether a finished run's results are of the config's data set. Raises UserError."""
    if open_shards(config).sha256 != results["provenance"]["dataset_sha256"]:
        raise UserError(
            f"{run_folder}: its results are of another data set than {config.data.shards}; use a new run folder."
        )


def plan_of(config: Config, dataset: Dataset, epoch: int = 0) -> EpochPlan:
    """The epoch's order of the training split. Raises UserError where there are too few images for one step."""
    return train_plan(
        [shard.samples for shard in dataset.shards("train")],
        global_batch_size=config.data.global_batch_size,
        seed=config.train.seed,
        epoch=epoch,
        max_lanes=config.data.lanes,
        run_length=run_length_of(dataset, "train", config.data.global_batch_size, config.data.lanes),
    )


def save(session: Session) -> None:
    """Commit a checkpoint of the present position. Collective. Raises TrainingError on every rank where the disk is full."""
    position, run = session.position, session.run
    random_states = collectives.gather_to_rank_0(_random_state(run.device))
    # Within an epoch each rank has BatchNorm statistics of its own; at its end they have been averaged.
    buffers = collectives.gather_to_rank_0(_buffers(session.network.model) if position.step > 0 else {})
    failure: MedtlError | None = None
    if run.rank == 0:
        state = {
            "optimizer": session.optimizer.state_dict(),
            "scaler": session.scaler.state_dict(),
            "random": random_states,
            "buffers": buffers,
        }
        best = best_row(position.history)
        meta = {
            "format_version": checkpoint.FORMAT_VERSION,
            "epoch": position.epoch,
            "step": position.step,
            "global_step": position.global_step,
            "loss_total": position.loss_total,
            "weight_total": position.weight_total,
            "history": position.history,
            "best": best,
            "world_size": run.world_size,
            "threads": session.threads,
            "config_sha256": session.config.sha256(),
            "dataset_sha256": session.dataset.sha256,
            "task": session.dataset.task,
            "classes": list(session.dataset.classes),
            "positive_class": session.dataset.positive_class,
            "preprocessing": preprocessing_of(session.config, session.dataset, session.network),
            "weights": {"from": session.network.weights, "sha256": session.network.weights_sha256},
        }
        try:
            checkpoint.save(
                run.folder, position.global_step, weights=session.network.model.state_dict(), state=state, meta=meta
            )
            checkpoint.retain(run.folder, best=best["checkpoint"] if best else None, newest=position.global_step)
        except OSError as error:
            failure = disk_error(run, error)
    collectives.raise_together(failure)


def disk_error(run: Run, error: OSError) -> TrainingError:
    """A failed write as an error that a restart would not mend."""
    return TrainingError(
        f"{run.folder.path}: can't be written ({error.strerror or error}). What was committed before is whole: free space, "
        "then the same command with --resume goes on."
    )


def best_row(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The epoch with the highest val AUC, ties by the lower val loss, then the earlier one; undefined AUCs come last."""
    if not history:
        return None
    return max(
        history, key=lambda row: (row["val_auc"] is not None, row["val_auc"] or 0.0, -row["val_loss"], -row["epoch"])
    )


def _restore(session: Session, step: int) -> None:
    weights, state, meta = checkpoint.load(session.run.folder, step)
    if meta["config_sha256"] != session.config.sha256() or meta["dataset_sha256"] != session.dataset.sha256:
        raise UserError(
            f"{session.run.folder.path}: its checkpoints are of another config or data set; use a new run folder."
        )
    session.network.model.load_state_dict(weights)
    session.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where the run began without loss scaling
        session.scaler.load_state_dict(state["scaler"])
    position = session.position
    position.epoch, position.step, position.global_step = meta["epoch"], meta["step"], meta["global_step"]
    position.loss_total, position.weight_total = meta["loss_total"], meta["weight_total"]
    position.history = meta["history"]
    session.network = dataclasses.replace(
        session.network, weights=meta["weights"]["from"], weights_sha256=meta["weights"]["sha256"]
    )
    if meta["world_size"] == session.run.world_size:
        _set_random_state(state["random"][session.run.rank], session.run.device)
        session.network.model.load_state_dict(state["buffers"][session.run.rank], strict=False)


def _wrap(config: Config, network: Network, channels: int, own_batch: int) -> nn.Module:
    """DDP around the model, its buckets already in their final order; the model itself in one process."""
    if not collectives.active():
        return network.model
    device_ids = [network_device(network)] if network_device(network).type == "cuda" else None
    # BatchNorm statistics are averaged over the ranks before each evaluation, not copied from rank 0 at every step.
    wrapped = DistributedDataParallel(
        network.model, device_ids=device_ids, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
    # DDP rebuilds its buckets after the first backward, and gloo's sums depend on the place in a bucket. One discarded
    # backward here, before any state is loaded, makes a resumed run add in the same order as an undisturbed one.
    before = copy.deepcopy(network.model.state_dict())
    network.model.train()
    size = network.image_size_px
    images = torch.zeros(
        (max(2, own_batch // config.train.accumulation_steps), channels, size, size), dtype=torch.uint8
    )
    with network.precision.autocast():
        inputs = normalise(
            images.to(network_device(network)), network.normalisation, channels_last=config.train.channels_last
        )
        outputs = wrapped(inputs)
    outputs.float().sum().backward()
    wrapped.zero_grad(set_to_none=True)
    network.model.load_state_dict(before)
    return wrapped


def network_device(network: Network) -> torch.device:
    return next(network.model.parameters()).device


def _check_batch_norm(config: Config, network: Network, own_batch: int) -> None:
    smallest = own_batch // config.train.accumulation_steps
    if smallest < 2 and network.frozen_depth < len(network.spec.stages):
        raise UserError(
            f"data.global_batch_size = {config.data.global_batch_size} leaves {smallest} image per worker and part; "
            "BatchNorm that is not frozen needs at least 2: raise it, or lower cluster.num_workers or train.accumulation_steps."
        )


def _class_weights(config: Config, dataset: Dataset, device: torch.device) -> Tensor | None:
    if config.train.class_weights == "none":
        return None
    counts = dataset.info["splits"]["train"]["classes"]
    weights = optim.balanced_class_weights([counts.get(name, 0) for name in dataset.classes])
    return torch.tensor(weights, dtype=torch.float32, device=device)


def _loader_workers(config: Config, run: Run, threads: int) -> int:
    """Decoding processes of a rank: with a GPU its other CPUs decode; on a CPU decoding shares the computing threads."""
    if config.data.loader_workers is not None:
        return config.data.loader_workers
    return min(8, max(threads - 1, 1)) if run.device.type == "cuda" else 0


def train_stream(session: Session) -> Iterator[Batch]:
    """The rest of the current epoch's batches of this rank, from the position's step on."""
    config, position, run = session.config, session.position, session.run
    return train_batches(
        session.dataset,
        "train",
        transform=train_transform_of(config, session.network),
        global_batch_size=config.data.global_batch_size,
        seed=config.train.seed,
        epoch=position.epoch,
        rank=run.rank,
        world_size=run.world_size,
        start_step=position.step,
        max_lanes=config.data.lanes,
        loader=session.loader,
        verify=config.data.verify_checksums,
        pin_memory=run.device.type == "cuda",
    )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

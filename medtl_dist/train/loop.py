"""batches and model → checkpoints, history, predictions: the training loop, the same in one process and on a cluster.

One run: model and newest checkpoint (``session``); then per epoch train, evaluate, checkpoint, report; at the end the
best checkpoint is scored and the results are written. Ranks fail together: see ``collectives.raise_together``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from medtl_dist import collectives
from medtl_dist.collectives import agreed
from medtl_dist.config import Config
from medtl_dist.data.label_sets import UNKNOWN
from medtl_dist.data.stream import Batch
from medtl_dist.errors import Interrupted, MedtlError
from medtl_dist.metrics.ranking import average_precision, roc_auc
from medtl_dist.models.normalise import normalise
from medtl_dist.run import Run, Signal
from medtl_dist.train import ema, losses, nonfinite, optim
from medtl_dist.train.clock import Clock, DeviceTime
from medtl_dist.train.conclude import conclude
from medtl_dist.train.evaluate import Predictions, score_split
from medtl_dist.train.prefix import boundary_of
from medtl_dist.train.prefix_cache import kept_train, kept_val
from medtl_dist.train.session import Session
from medtl_dist.train.setup import average_buffers
from medtl_dist.train.start import start, train_stream
from medtl_dist.train.state import best_row, due, save
from medtl_dist.train.stragglers import watch
from medtl_dist.train.unfreeze import unfreeze
from medtl_dist.train.warm import Warm, keep_epoch_scores

_POLL_EVERY_STEPS = 5
_POLL_EVERY_S = 5.0  # slower steps are polled more often: a notice may leave half a minute


def fit(config: Config, run: Run, *, open_test: bool = False, warm: Warm | None = None) -> None:
    """Train, or go on from the newest checkpoint in the run folder, and leave predictions and ``results.json`` there.

    Collective: every rank calls it with the same arguments. ``open_test`` scores the test split once at the end.
    ``warm``: what this process keeps between trainings.

    Raises:
        MedtlError: the same on every rank; Interrupted where ``run.poll`` asked to stop, after a checkpoint.
    """
    session = start(config, run, warm)
    try:
        while not finished(session):
            close_epoch(session, train_epoch(session))
            if not finished(session) and _told_to_stop(session):
                raise Interrupted(
                    f"stopped as asked after epoch {session.position.epoch}; the same command with --resume goes on."
                )
        conclude(session, open_test=open_test)
    finally:
        if warm is None:
            session.warm.close()
        session.journal.close()


def finished(session: Session) -> bool:
    """All epochs done, or no better val AUC for ``train.early_stop_epochs``: decided from the history, so alike on all ranks."""
    history, patience = session.position.history, session.config.train.early_stop_epochs
    if session.position.epoch >= session.config.train.epochs:
        return True
    best = best_row(history)
    # Only between epochs: an epoch that was interrupted is finished first.
    if best is None or patience is None or session.position.step > 0:
        return False
    return history[-1]["epoch"] - best["epoch"] >= patience


def train_epoch(session: Session) -> Clock:
    """Run the rest of the current epoch's steps and return where their time went.

    Raises Interrupted, after a checkpoint, where the run was told to stop; TrainingError where the loss keeps not being
    finite (``nonfinite.skipped``).
    """
    position, clock = session.position, Clock(forward=DeviceTime(session.run.device))
    session.network.model.train()  # what is frozen stays in eval
    loss_here = torch.tensor(position.loss_total, dtype=torch.float64, device=session.run.device)
    statistics, polled = nonfinite.Statistics(session.network.model), time.monotonic()
    with clock.during("prefix_cache"):
        kept_val(session)  # first: a stop while it is filled loses no step
        kept = kept_train(session)
    batches = agreed(lambda: train_stream(session, kept))
    while position.step < session.plan.num_steps:
        with clock.during("data_wait"):
            batch, failure = _next(batches)
        own_weight = losses.loss_weight(batch.labels, session.class_weights) if batch is not None else 0.0
        with clock.during("communication"):
            # One small reduction a step: the loss's global denominator, whether any rank has failed, and whether by
            # rank 0's clock it is time for a checkpoint, or to poll.
            first = session.run.rank == 0
            wanted, asked = first and due(session), first and time.monotonic() - polled > _POLL_EVERY_S
            numbers = collectives.totals([own_weight, float(failure is not None), float(wanted), float(asked)])
            weight, num_failed, checkpoint_due, poll_due = numbers
        collectives.raise_together(failure, failed=num_failed > 0)
        assert batch is not None
        with clock.during("compute"):
            statistics.keep()
            loss, applied = train_step(session, batch, weight, clock.forward)
        if applied:
            loss_here += loss
            position.weight_total += weight
            position.nonfinite_in_row = 0
        else:
            statistics.put_back()
            nonfinite.skipped(session, loss, batch.keys)
        position.step += 1
        position.global_step += 1
        clock.num_steps += 1
        if session.journal.due():
            session.journal.progress(_progress(session, clock, float(loss) / max(own_weight, 1e-12)))
        if position.step == session.plan.num_steps:
            break  # the epoch's own checkpoint comes next, and fit asks again after it
        stop = False
        if poll_due or position.global_step % _POLL_EVERY_STEPS == 0:
            stop, polled = _told_to_stop(session), time.monotonic()
        if checkpoint_due or stop:
            position.loss_total = float(loss_here)
            with clock.during("checkpoint"):
                save(session)
        if stop:
            raise Interrupted(
                f"stopped as asked in epoch {position.epoch}, after step {position.step}; the same command with --resume goes on."
            )
    position.loss_total = float(loss_here)
    clock.train_s = clock.elapsed() - clock.seconds["prefix_cache"]
    return clock


def _told_to_stop(session: Session) -> bool:
    return session.run.poll() is Signal.CHECKPOINT_AND_STOP


def train_step(
    session: Session, batch: Batch, global_weight: float, forward: DeviceTime | None = None
) -> tuple[Tensor, bool]:
    """One optimiser step on this rank's part of the global batch; returns its summed loss, float64, detached, and whether
    the step was applied: it is not, on any rank, where some rank's loss is not finite. ``forward`` takes the time of the
    forward passes.

    DDP averages the ranks' gradients, so each rank's summed loss is scaled by W / (global denominator): the result is
    the gradient of the global mean, however unequal the ranks' counts. Parts of a batch (accumulation) add up likewise.
    """
    config, network = session.config, session.network
    factor = optim.lr_factor(
        config.schedule,
        step=session.position.global_step,
        steps_per_epoch=session.plan.num_steps,
        epochs=config.train.epochs,
    )
    optim.set_lr(session.optimizer, factor)
    forward = forward or DeviceTime()
    images = batch.images.to(session.run.device, non_blocking=True)
    if session.prefix is not None and not batch.at_boundary:
        with forward.during():
            images = boundary_of(session.prefix, images)
    labels = batch.labels.to(session.run.device, non_blocking=True)
    total = torch.zeros((), dtype=torch.float64, device=session.run.device)
    scale = session.run.world_size / global_weight if global_weight > 0 else 0.0
    parts = min(config.train.accumulation_steps, len(labels))
    for part, (some_images, some_labels) in enumerate(
        zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    ):
        with _no_sync(session.stepper) if part < parts - 1 else contextlib.nullcontext():
            with forward.during(), network.precision.autocast():
                logits = session.stepper(_inputs(session, some_images))
            loss = losses.loss_sum(logits, some_labels, config.train, session.class_weights)
            session.scaler.scale(loss * scale).backward()
        total += loss.detach().double()
    if not nonfinite.counts(total):
        session.optimizer.zero_grad(set_to_none=True)
        return total, False
    if config.optim.clip_norm is not None:
        session.scaler.unscale_(session.optimizer)
        trainable = [p for group in session.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trainable, config.optim.clip_norm)
    session.scaler.step(session.optimizer)
    session.scaler.update()
    session.optimizer.zero_grad(set_to_none=True)
    if session.ema is not None:
        ema.update(session.ema, network.model)
    return total, True


def _inputs(session: Session, images: Tensor) -> Tensor:
    """What the stepper takes: normalised images, or boundaries as they are."""
    if session.prefix is not None:
        return images
    return normalise(images, session.network.normalisation, channels_last=session.config.train.channels_last)


def close_epoch(session: Session, clock: Clock) -> None:
    """Score val, append to the history, commit a checkpoint, report. Collective; decided once, on rank 0, for all ranks."""
    position, run = session.position, session.run
    average_buffers(session.network.model)
    if session.ema is not None:
        average_buffers(session.ema.model)
    with clock.during("prefix_cache"):
        kept = kept_val(session)
    with clock.during("evaluation"):
        predictions = score_split(
            session.scorer,
            session.dataset,
            "val",
            rank=run.rank,
            world_size=run.world_size,
            loader=session.loader,
            kept=kept,
        )
        numbers = collectives.from_rank_0(_val_numbers(predictions, session) if predictions is not None else {})
    if predictions is not None and session.warm.keep_epoch_scores:
        keep_epoch_scores(run, position.epoch, predictions)
    (loss_total,) = collectives.totals([position.loss_total])
    row: dict[str, Any] = {
        "epoch": position.epoch,
        "train_loss": loss_total / position.weight_total if position.weight_total > 0 else 0.0,
        "lr": session.optimizer.param_groups[0]["lr"],
        **numbers,
        "nonfinite_steps": position.nonfinite_steps,
        **clock.row(session.config.data.global_batch_size),
        "epoch_s": clock.elapsed(),
        "checkpoint": position.global_step,
    }
    row = collectives.from_rank_0(row)
    position.history.append(row)
    position.epoch += 1
    position.step, position.loss_total, position.weight_total, position.nonfinite_steps = 0, 0.0, 0.0, 0
    unfreeze(session)  # before the checkpoint, which is of the coming epoch
    with clock.during("checkpoint"):
        save(session)
    row["checkpoint_s"] = clock.seconds["checkpoint"]  # of the checkpoint itself it can't be in its copy of the history
    stragglers, pace = watch(session, clock)
    session.journal.epoch(row | ({"stragglers": stragglers} if stragglers else {}), step=position.global_step)
    session.journal.progress(_progress(session, Clock(), row["train_loss"]))
    own = clock.of_rank(session.config.data.global_batch_size / run.world_size)
    run.report({name: value for name, value in row.items() if not isinstance(value, str)} | own | pace)


def _val_numbers(predictions: Predictions, session: Session) -> dict[str, float | None]:
    """The quick numbers of an epoch; intervals and curves are made once, at the end."""
    logits, labels = predictions.logits, predictions.labels
    columns = [1] if session.dataset.task == "binary" else range(logits.shape[1])
    if labels.ndim == 2:
        known = [labels[:, k] != UNKNOWN for k in columns]
        questions = [(labels[rows, k] == 1, logits[rows, k]) for k, rows in zip(columns, known, strict=True)]
    else:
        questions = [(labels == k, logits[:, k]) for k in columns]
    aucs = [roc_auc(*question) for question in questions]
    precisions = [average_precision(*question) for question in questions]
    return {
        "val_auc": _mean_defined(aucs),
        "val_loss": predictions.loss,
        "val_average_precision": _mean_defined(precisions),
    }


def _mean_defined(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(defined) if defined else None


def _next(batches: Iterator[Batch]) -> tuple[Batch | None, MedtlError | None]:
    try:
        return next(batches), None
    except MedtlError as error:
        return None, error


def _no_sync(stepper: nn.Module) -> contextlib.AbstractContextManager[object]:
    return stepper.no_sync() if hasattr(stepper, "no_sync") else contextlib.nullcontext()  # type: ignore[operator]


def _progress(session: Session, clock: Clock, loss: float) -> dict[str, Any]:
    config, position = session.config, session.position
    best = best_row(position.history)
    elapsed = clock.elapsed()
    rate = clock.num_steps * config.data.global_batch_size / elapsed if clock.num_steps else None
    steps_left = session.plan.num_steps * (config.train.epochs - position.epoch) - position.step
    return {
        "epoch": position.epoch,
        "epochs": config.train.epochs,
        "step": position.step,
        "steps": session.plan.num_steps,
        "loss": loss if math.isfinite(loss) else None,
        "images_per_s": rate,
        "data_wait_fraction": clock.seconds["data_wait"] / elapsed if clock.num_steps else None,
        "best_val_auc": best["val_auc"] if best else None,
        "seconds_left": steps_left * config.data.global_batch_size / rate if rate else None,
    }

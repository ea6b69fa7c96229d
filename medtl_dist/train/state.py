"""one rank's training in progress ↔ checkpoint: all that a resumed run needs to go on with the same bits."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from medtl_dist import collectives
from medtl_dist.config import Config
from medtl_dist.data.shards import Dataset
from medtl_dist.errors import MedtlError, TrainingError, UserError
from medtl_dist.models.freezing import frozen_names
from medtl_dist.run import Run
from medtl_dist.train import checkpoint
from medtl_dist.train.nonfinite import check_weights
from medtl_dist.train.session import Session
from medtl_dist.train.setup import preprocessing_of

Saved = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]  # what checkpoint.load returns


def save(session: Session) -> None:
    """Commit a checkpoint of the present position. Collective.

    Raises TrainingError on every rank where the disk is full or the weights are not finite.

    It holds the weights that are scored: the averaged ones where ``train.ema_decay`` is set, with those
    that learn beside them in the state.
    """
    position, run, ema = session.position, session.run, session.ema
    # Within an epoch each rank has BatchNorm statistics of its own; at its end they have been averaged.
    within = position.step > 0
    own = {
        "random": _random_state(run.device),
        "loss_total": position.loss_total,
        "buffers": _buffers(session.network.model) if within else {},
        "ema_buffers": _buffers(ema.model) if within and ema is not None else {},
    }
    ranks = collectives.gather_to_rank_0(own)
    failure: MedtlError | None = None
    if run.rank == 0:
        state: dict[str, Any] = {
            "optimizer": session.optimizer.state_dict(),
            "scaler": session.scaler.state_dict(),
            "ranks": ranks,
        }
        weights = session.network.model.state_dict()
        if ema is not None:
            state |= {"learning_weights": weights, "ema_updates": ema.num_updates}
            weights = ema.model.state_dict()
        best = best_row(position.history)
        try:
            check_weights(session.network.model)
            session.frozen = checkpoint.save(
                run.folder, position.global_step, weights=weights, state=state, meta=_meta(session, best),
                frozen=frozen_names(weights, session.network.spec, session.network.frozen_depth), before=session.frozen,
            )  # fmt: skip
            checkpoint.retain(run.folder, best=best["checkpoint"] if best else None, newest=position.global_step)
        except MedtlError as error:  # of weights that are not finite, or a store's
            failure = error
        except OSError as error:
            failure = disk_error(run, error)
    session.saved_at = time.monotonic()
    collectives.raise_together(failure)
    session.saved_step = position.global_step


def due(session: Session) -> bool:
    """Whether the coming step should be followed by a checkpoint, even within the epoch. By rank 0's clock: let it decide."""
    train = session.config.train
    by_steps = train.checkpoint_every_steps is not None and (
        (session.position.global_step + 1) % train.checkpoint_every_steps == 0
    )
    minutes = (time.monotonic() - session.saved_at) / 60
    return by_steps or (train.checkpoint_every_minutes is not None and minutes >= train.checkpoint_every_minutes)


def restore(session: Session, saved: Saved) -> None:
    """Put a session where a checkpoint was written. Another world size gets the same position, not the same bits."""
    weights, state, meta = saved
    model, position, ema = session.network.model, session.position, session.ema
    if ema is not None:
        ema.model.load_state_dict(weights)
        ema.num_updates = state["ema_updates"]
        weights = state["learning_weights"]
    model.load_state_dict(weights)
    session.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty where the run began without loss scaling
        session.scaler.load_state_dict(state["scaler"])
    position.epoch, position.step, position.global_step = meta["epoch"], meta["step"], meta["global_step"]
    position.weight_total = meta["weight_total"]
    position.history = meta["history"]
    position.nonfinite_steps, position.nonfinite_in_row = meta.get("nonfinite", (0, 0))
    session.network = dataclasses.replace(
        session.network, weights=meta["weights"]["from"], weights_sha256=meta["weights"]["sha256"]
    )
    if meta["world_size"] == session.run.world_size:
        own = state["ranks"][session.run.rank]
        _set_random_state(own["random"], session.run.device)
        model.load_state_dict(own["buffers"], strict=False)
        if ema is not None:
            ema.model.load_state_dict(own["ema_buffers"], strict=False)
        position.loss_total = own["loss_total"]
    elif session.run.rank == 0:
        position.loss_total = sum(other["loss_total"] for other in state["ranks"])


def check_same_run(config: Config, dataset: Dataset, run: Run, saved: Saved) -> None:
    """Whether a checkpoint is of this config and data set. Raises UserError."""
    meta = saved[2]
    if meta["config_sha256"] != config.sha256() or meta["dataset_sha256"] != dataset.sha256:
        raise UserError(f"{run.folder.path}: its checkpoints are of another config or data set; use a new run folder.")


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


def _meta(session: Session, best: dict[str, Any] | None) -> dict[str, Any]:
    position = session.position
    return {
        "format_version": checkpoint.FORMAT_VERSION,
        "epoch": position.epoch,
        "step": position.step,
        "global_step": position.global_step,
        "weight_total": position.weight_total,
        "nonfinite": [position.nonfinite_steps, position.nonfinite_in_row],
        "history": position.history,
        "best": best,
        "world_size": session.run.world_size,
        "threads": session.threads,
        "config_sha256": session.config.sha256(),
        "dataset_sha256": session.dataset.sha256,
        "task": session.dataset.task,
        "classes": list(session.dataset.classes),
        "positive_class": session.dataset.positive_class,
        "preprocessing": preprocessing_of(session.config, session.dataset, session.network),
        "weights": {"from": session.network.weights, "sha256": session.network.weights_sha256},
    }


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

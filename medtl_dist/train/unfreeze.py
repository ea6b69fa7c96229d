"""fit → fit: stages that begin to learn at a later epoch, by ``train.unfreeze``."""

from __future__ import annotations

import dataclasses
import gc

from medtl_dist.config import Config
from medtl_dist.errors import UserError
from medtl_dist.models.folding import fold_frozen
from medtl_dist.models.freezing import freeze, resolve_depth
from medtl_dist.models.registry import BackboneSpec
from medtl_dist.train.optim import carry_over, create_optimizer, parameter_groups
from medtl_dist.train.parallel import own_batch_of, wrap
from medtl_dist.train.session import Session


def depth_at(config: Config, spec: BackboneSpec, epoch: int) -> int:
    """Stages that are frozen in ``epoch`` (from 0)."""
    depth = resolve_depth(spec, config.model.frozen_depth)
    return min([depth, *(later for begin, later in config.train.unfreeze.items() if begin <= epoch)])


def check_unfreezing(config: Config, spec: BackboneSpec) -> None:
    """Raises UserError for depths that don't fall from epoch to epoch, or epochs that never come."""
    before = resolve_depth(spec, config.model.frozen_depth)
    for epoch, depth in sorted(config.train.unfreeze.items()):
        if epoch >= config.train.epochs:
            raise UserError(
                f"train.unfreeze: epoch {epoch} never comes; train.epochs = {config.train.epochs}, counted from 0."
            )
        if depth >= before:
            raise UserError(
                f"train.unfreeze: at epoch {epoch} depth {depth} unfreezes nothing, {before} of the {spec.num_stages} stages "
                "of the backbone are frozen before it; depths must fall, from model.frozen_depth on."
            )
        before = depth


def unfreeze(session: Session) -> None:
    """Let the stages learn whose epoch has come; nothing where none has. Between epochs. Collective.

    What learned before keeps its optimiser state. DDP fixes what it reduces when it wraps, so it wraps anew.
    """
    network, config = session.network, session.config
    depth = depth_at(config, network.spec, session.position.epoch)
    if depth == network.frozen_depth:
        return
    for model in (network.model, session.ema.model if session.ema else None):
        if model is not None:
            freeze(model, network.spec, depth)
            if config.model.fold_frozen:
                fold_frozen(model, network.spec, depth)
    session.network = dataclasses.replace(network, frozen_depth=depth)
    # The old wrapper's hooks on the parameters go with it, and it lies in a reference cycle.
    session.stepper = network.model
    gc.collect()
    own_batch = own_batch_of(session.plan, session.run)
    session.stepper = wrap(config, session.network, session.dataset.channels, own_batch, session.prefix)
    session.optimizer = carry_over(
        session.optimizer,
        create_optimizer(config.optim, parameter_groups(config.optim, network.model, network.spec)),
    )
    session.journal.note(f"epoch {session.position.epoch + 1}: {depth} of {network.spec.num_stages} stages stay frozen")

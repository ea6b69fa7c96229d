"""a step's loss → whether the step counts: one whose loss is not finite leaves no trace, and several in a row end the run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medtl_dist import collectives
from medtl_dist.errors import TrainingError
from medtl_dist.train.session import Session

_NAMED = 8  # keys in a message; the log has them all


class Statistics:
    """A copy of the buffers that a forward pass moves (BatchNorm's running values), to take that pass back."""

    def __init__(self, model: nn.Module) -> None:
        self._now = [b for module in model.modules() if module.training for b in module.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._now]

    @torch.no_grad()
    def keep(self) -> None:
        if self._now:  # one call for all of them: a network has hundreds
            torch._foreach_copy_(self._kept, self._now)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def put_back(self) -> None:
        if self._now:
            torch._foreach_copy_(self._now, self._kept)  # pyright: ignore[reportPrivateImportUsage]


def counts(loss: Tensor) -> bool:
    """Whether the step's loss is finite on every rank. Collective: one rank's gradient is part of every rank's."""
    return collectives.largest(int(not bool(torch.isfinite(loss)))) == 0


def skipped(session: Session, loss: Tensor, keys: list[str]) -> None:
    """Note a step that was not applied. Collective.

    Raises TrainingError on every rank at the ``train.max_nonfinite_steps``-th in a row, naming the step, the images of the
    ranks whose loss it was, and the last checkpoint.
    """
    position, limit = session.position, session.config.train.max_nonfinite_steps
    position.nonfinite_in_row += 1
    position.nonfinite_steps += 1
    mine = [] if bool(torch.isfinite(loss)) else keys
    images = [key for part in collectives.gather_to_all(mine) for key in part]
    where = f"epoch {position.epoch}, step {position.step}"
    session.journal.note(f"the loss is not finite in {where}: the step was left out. Its images: {', '.join(images)}")
    if position.nonfinite_in_row < limit:
        return
    before = "there is no checkpoint from before it"
    if session.saved_step is not None:
        before = f"the last checkpoint, of step {session.saved_step}, is from before it"
    steps = f"{limit} steps in a row, the last one" if limit > 1 else "a step:"
    raise TrainingError(
        f"the loss was not finite in {steps} {where} (images {', '.join(images[:_NAMED])}"
        f"{', … all in log.jsonl' if len(images) > _NAMED else ''}): lower optim.lr, set optim.clip_norm, or compute in fp32 "
        f"(train.precision=fp32), in a new run folder; {before}."
    )


def check_weights(model: nn.Module) -> None:
    """Refuse to keep weights that are not finite: a checkpoint is something to go on from. Raises TrainingError."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"{name} is not finite any more, so no checkpoint was written; the ones before are whole. Lower optim.lr, set "
                "optim.clip_norm, or compute in fp32 (train.precision=fp32), in a new run folder."
            )

"""One rank's training in progress, as every part of the loop passes it on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medtl_dist.config import Config
from medtl_dist.data.loader import Loader
from medtl_dist.data.plan import EpochPlan
from medtl_dist.data.shards import Dataset
from medtl_dist.data.strata import Strata
from medtl_dist.run import Run
from medtl_dist.train.checkpoint import Frozen
from medtl_dist.train.ema import Ema
from medtl_dist.train.evaluate import Scorer
from medtl_dist.train.journal import Journal
from medtl_dist.train.network import Network
from medtl_dist.train.prefix import Prefix
from medtl_dist.train.prefix_lookup import PrefixCache
from medtl_dist.train.warm import Warm


@dataclass
class Position:
    """Where training stands; all of it is in a checkpoint. ``epoch`` and ``step`` (in the epoch) are the next to run."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    loss_total: float = 0.0  # this rank's summed loss of this epoch, up to ``step``
    weight_total: float = 0.0  # its denominator, over all ranks
    nonfinite_steps: int = 0  # of this epoch, left out since their loss was not finite
    nonfinite_in_row: int = 0  # of them, the latest without a finite one between, over epochs too
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Session:
    """One rank's training in progress."""

    config: Config
    run: Run
    dataset: Dataset
    strata: Strata | None  # of weighted sampling
    network: Network
    stepper: nn.Module  # the model, wrapped in DDP where there are several ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    ema: Ema | None  # the average of the weights; where there is one, it is what is scored
    loader: Loader
    scorer: Scorer
    class_weights: Tensor | None
    plan: EpochPlan  # of epoch 0: its number of steps holds for every epoch
    threads: int
    journal: Journal
    position: Position
    started: str
    warm: Warm
    prefix: Prefix | None  # of the model that learns, where its frozen layers are computed apart
    cache: PrefixCache | None = None
    saved_at: float = field(default_factory=time.monotonic)  # when a checkpoint was last written, or the run began
    saved_step: int | None = None  # of the newest checkpoint
    frozen: Frozen | None = None  # what does not learn, as that checkpoint holds it
    slow_before: frozenset[int] = frozenset()  # ranks that were slow in the epoch before

"""model → fit: the model as several ranks step it, in DDP, and the limits that BatchNorm sets to a rank's share."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medtl_dist import collectives
from medtl_dist.config import Config
from medtl_dist.data.plan import EpochPlan
from medtl_dist.errors import UserError
from medtl_dist.models.normalise import normalise
from medtl_dist.run import Run
from medtl_dist.train.network import Network
from medtl_dist.train.prefix import FromBoundary, Prefix


def wrap(config: Config, network: Network, channels: int, own_batch: int, prefix: Prefix | None = None) -> nn.Module:
    """DDP around the model, its buckets already in their final order; the model itself in one process.

    With a ``prefix`` what is wrapped takes its boundaries instead of normalised images. Leaves the model's state and the
    random generators as they were. Collective.
    """
    stepped = network.model if prefix is None else FromBoundary(network.model, prefix.split.suffix)
    if not collectives.active():
        return stepped
    device = device_of(network)
    on_gpu = [device] if device.type == "cuda" else []
    # BatchNorm statistics are averaged over the ranks before each evaluation, not copied from rank 0 at every step.
    wrapped = DistributedDataParallel(
        stepped, device_ids=on_gpu or None, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
    # DDP rebuilds its buckets after the first backward, and gloo's sums depend on the place in a bucket. One discarded
    # backward here, before any state is loaded, makes a resumed run add in the same order as an undisturbed one.
    before = copy.deepcopy(network.model.state_dict())
    network.model.train()
    size, num_rows = network.image_size_px, max(2, own_batch // config.train.accumulation_steps)
    with torch.random.fork_rng(devices=on_gpu):  # dropout draws here too
        with network.precision.autocast():
            if prefix is None:
                images = torch.zeros((num_rows, channels, size, size), dtype=torch.uint8, device=device)
                inputs = normalise(images, network.normalisation, channels_last=config.train.channels_last)
            else:
                inputs = prefix.blank(num_rows)
            outputs = wrapped(inputs)
        outputs.float().sum().backward()
    wrapped.zero_grad(set_to_none=True)
    network.model.load_state_dict(before)
    return wrapped


def own_batch_of(plan: EpochPlan, run: Run) -> int:
    """Images of a step that are this rank's. Raises UserError where there are more ranks than lanes."""
    return len(plan.lanes_of(run.rank, run.world_size)) * plan.lane_batch


def device_of(network: Network) -> torch.device:
    return next(network.model.parameters()).device


def check_batch_norm(config: Config, own_batch: int, *, all_frozen: bool) -> None:
    """Raises UserError where BatchNorm that is not frozen would see a single image."""
    smallest = own_batch // config.train.accumulation_steps
    if smallest < 2 and not all_frozen:
        raise UserError(
            f"data.global_batch_size = {config.data.global_batch_size} leaves {smallest} image per worker and part; "
            "BatchNorm that is not frozen needs at least 2: raise it, or lower cluster.num_workers or train.accumulation_steps."
        )

"""a sweep → what it would do, told before anything starts: trials, resources, shared prefixes, and how long at most."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.trial_state import TrialSpec
from cluster.trials import reserved_for
from medtl_dist.config import Config
from medtl_dist.models.freezing import resolve_depth
from medtl_dist.models.join import spec_of
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train import losses
from medtl_dist.train.loop import train_step
from medtl_dist.train.prefix_plan import plan_groups
from medtl_dist.train.setup import available_cpus, open_shards
from medtl_dist.train.start import plan_of, start, train_stream

_STEPS = 3


def plan_sweep(base: Config, specs: Sequence[TrialSpec]) -> dict[str, Any]:
    """Everything that ``--dry-run`` prints, as plain values. Trains a few steps of each frozen depth in a temporary folder.

    ``concurrency`` is that of a cluster on this machine; null where the config or ``RAY_ADDRESS`` names another one, which
    is not asked. ``estimate.seconds_at_most``: every trial to its last epoch, nothing shared.

    Raises:
        MedtlError: as a training would.
    """
    on_this_machine = base.cluster.address is None and "RAY_ADDRESS" not in os.environ
    reserved = reserved_for(base, num_gpus=torch.cuda.device_count() if on_this_machine else 0)
    num_workers = max(base.cluster.num_workers, 1)
    concurrency = None
    if on_this_machine:
        cpus = max(float(available_cpus()), reserved.cpus if base.cluster.num_workers > 0 else 0.0)
        by_gpus = torch.cuda.device_count() / reserved.gpus if reserved.gpus else float("inf")
        concurrency = int(min(cpus / reserved.cpus, by_gpus) + 1e-9)
    groups = prefix_groups(specs)
    for group in groups:
        group["epoch_s"] = measured_epoch_s(_spec(specs, group["trials"][0]).config)
    by_trial = {number: group["epoch_s"] for group in groups for number in group["trials"]}
    total = sum(by_trial[spec.number] * spec.config.train.epochs for spec in specs) / num_workers
    return {
        "trials": [{"number": spec.number, "overrides": dict(spec.overrides), "epochs": spec.config.train.epochs}
                   for spec in specs],
        "resources": {"workers": num_workers, "cpus": reserved.cpus, "gpus": reserved.gpus},
        "concurrency": concurrency,
        "groups": groups,
        "estimate": {"seconds_at_most": total / max(concurrency or 1, 1), "measured_on": "this machine, one process"},
    }  # fmt: skip


def prefix_groups(specs: Sequence[TrialSpec]) -> list[dict[str, Any]]:
    """Trials that share their frozen stages' outputs, the first one's group first: what the cache would keep for them, or why
    it would keep nothing. Trials of one depth that can't share are a group, too: they take as long."""
    if not specs:
        return []
    configs = [spec.config for spec in specs]
    device = torch.device("cuda" if torch.cuda.is_available() and configs[0].cluster.use_gpu is not False else "cpu")
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for found in plan_groups(configs, open_shards(configs[0]), device):
        first = specs[found.trials[0]].config
        backbone = spec_of(first.model)
        frozen = resolve_depth(backbone, first.model.frozen_depth)
        key = (found.label,) if found.reason is None else (first.model.backbone, frozen, found.reason)
        group = merged.setdefault(
            key,
            {
                "backbone": first.model.backbone, "frozen_depth": frozen, "num_stages": backbone.num_stages, "trials": [],
                "cache_mib": None if found.reason else 0.0, "uncached_because": found.reason,
            },
        )  # fmt: skip
        group["trials"] += [specs[place].number for place in found.trials]
        if found.reason is None:
            group["cache_mib"] += found.bytes / 2**20
    return list(merged.values())


def _spec(specs: Sequence[TrialSpec], number: int) -> TrialSpec:
    return next(spec for spec in specs if spec.number == number)


def measured_epoch_s(config: Config) -> float:
    """Seconds of an epoch of training and of scoring val, from a few steps in this process; the first, which warms up, is
    not counted."""
    with tempfile.TemporaryDirectory(prefix="medtl-calibration-") as folder:
        session = start(config, LocalRun(Folder.local(Path(folder))))
        try:
            session.network.model.train()
            seconds: list[float] = []
            images = None
            stream = train_stream(session)
            for _ in range(min(1 + _STEPS, session.plan.num_steps)):
                began = time.perf_counter()
                batch = next(stream)
                loss, _ = train_step(session, batch, losses.loss_weight(batch.labels, session.class_weights))
                float(loss)
                seconds.append(time.perf_counter() - began)
                images = batch.images
            assert images is not None
            step_s = min(seconds[1:] or seconds)
            image_s = _forward_s(session, images) / len(images)
        finally:
            session.loader.close()
            session.journal.close()
    dataset = open_shards(config)
    num_val = sum(shard.samples for shard in dataset.shards("val"))
    return plan_of(config, dataset).num_steps * step_s + num_val * image_s


def _forward_s(session: Any, images: torch.Tensor) -> float:
    """Seconds of scoring a batch once, decoding aside."""
    from medtl_dist.models.normalise import normalise

    network = session.network
    network.model.eval()
    with torch.inference_mode(), network.precision.autocast():
        inputs = normalise(
            images.to(session.run.device), network.normalisation, channels_last=session.config.train.channels_last
        )
        network.model(inputs)
        began = time.perf_counter()
        float(network.model(inputs).float().sum())
        return time.perf_counter() - began

"""one trial on several Ray Train workers: its rank 0 talks to the sweep's driver, and nothing of it outlives the sweep."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cluster.launch import set_environment
from cluster.node_cache import on_this_node
from cluster.ray_run import RayRun, Why
from cluster.trial_place import pulse_of, trial_folder
from cluster.trial_run import BEAT_EVERY_S, ending
from cluster.trial_state import beat
from medtl_dist import collectives
from medtl_dist.config import validate
from medtl_dist.errors import BY_NAME, MedtlError
from medtl_dist.run import Folder, Signal
from medtl_dist.train.loop import fit
from medtl_dist.train.warm import Warm


@dataclass
class DdpTrialRun(RayRun):
    """A rank of a trial. Rank 0 hands each epoch to the trial's actor and asks it whether to stop; the ranks agree."""

    trial: Any = None
    alive: Callable[[], None] | None = field(default=None, repr=False)  # None: a file in the folder is touched
    _beat_at: float = field(default=0.0, repr=False)

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        super().report(metrics)
        if self.rank == 0:
            ray.get(self.trial.post.remote(dict(metrics)))

    def poll(self) -> Signal:
        if self.rank == 0 and time.monotonic() - self._beat_at >= BEAT_EVERY_S:
            self._beat_at = time.monotonic()
            self.alive() if self.alive is not None else beat(self.folder.local_path)
        asked: Any = self.rank == 0 and ray.get(self.trial.asked.remote())
        return Signal(max(int(super().poll()), collectives.largest(int(asked))))


def train_ddp_trial(payload: Mapping[str, Any], trial: Any) -> dict[str, Any]:
    """As :func:`cluster.trial_run.train_trial`, on the config's workers. ``trial``: handle of the actor that this runs in."""
    why = Why.NO_REASON

    def train(folder: Folder) -> None:
        nonlocal why
        config = validate(payload["config"])
        use_gpu = payload["gpus_per_worker"] > 0
        # Of the trial, and new for each attempt: Ray has nothing to resume from.
        name = f"trial-{Path(payload['folder']).name}-{uuid.uuid4().hex[:8]}"
        # Ray Train reads its clocks in the process that calls fit: this one, to which the sweep's driver has passed on nothing.
        set_environment(own_cluster=False)
        os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(config.train.collective_timeout_s))
        trainer = TorchTrainer(
            work,
            train_loop_config={"trial": trial, "attempt": name}
            | {key: payload[key] for key in ("config", "folder", "fence", "warm_options", "num_sharing")},
            scaling_config=ScalingConfig(
                num_workers=config.cluster.num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": config.cluster.cpus_per_worker}
                | ({"GPU": payload["gpus_per_worker"]} if use_gpu else {}),
            ),
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=config.train.collective_timeout_s
            ),
            run_config=RunConfig(
                name=name,
                storage_path=folder.at(".ray"),
                storage_filesystem=folder.fs if folder.remote else None,
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        try:
            status = trainer.fit().return_value
        except TrainingFailedError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
            raise RuntimeError(f"its workers' restarts are used up: {lines[-1][:200]}") from None
        finally:
            with contextlib.suppress(OSError, MedtlError):
                folder.delete_tree(".ray")  # Ray's own bookkeeping; nothing of ours is in it
        if isinstance(status, dict) and status.get("error"):
            why = Why(status["why"])
            raise BY_NAME.get(status["error"], MedtlError)(status["message"])

    def asked() -> bool:
        return why is not Why.NO_REASON or bool(ray.get(trial.asked.remote()))

    return ending(payload, train, asked=asked)


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """The training function of a trial's worker. What cannot go on is returned: Ray would retry whatever is raised."""
    run: DdpTrialRun | None = None
    try:
        warm = Warm(**on_this_node(payload["warm_options"]))
        warm.cache_trials = payload["num_sharing"]
        folder = trial_folder(payload)
        with pulse_of(folder) as alive:
            run = DdpTrialRun(folder, payload["attempt"], trial=payload["trial"], alive=alive)
            fit(validate(payload["config"]), run, warm=warm)
    except MedtlError as error:
        return {"error": type(error).__name__, "message": error.message, "why": int(run.why) if run else 0}
    return {"error": "", "message": "", "why": 0}


def leftover_groups() -> list[str]:
    """Ids of this job's placement groups that are still there."""
    from ray.util.state import list_placement_groups

    job = ray.get_runtime_context().get_job_id()
    found: Any = list_placement_groups(
        filters=[("creator_job_id", "=", job)], limit=10_000, raise_on_missing_output=False
    )
    return [group.placement_group_id for group in found if group.state != "REMOVED"]


def remove_leftover_groups() -> None:
    """Remove what a trial that died could not: its placement groups would hold their CPUs until the cluster ends."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    with contextlib.suppress(
        Exception
    ):  # without the State API there is nothing to ask; the cluster's end removes them too
        for group in leftover_groups():
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))

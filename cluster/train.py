"""Start a training run on Ray Train: read the config, build scaling and run config, call fit, return the core's status."""

from __future__ import annotations

import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cluster.ray_run import RayRun
from medtl_dist.config import Config, validate
from medtl_dist.errors import BY_NAME, MedtlError, TrainingError, UserError
from medtl_dist.run import Folder
from medtl_dist.train.loop import fit
from medtl_dist.train.setup import available_cpus


def train_on_ray(config: Config, run_folder: Path, *, open_test: bool = False) -> None:
    """Train with ``cluster.num_workers`` Ray Train workers in ``run_folder``; returns when the results are written.

    Every attempt gets a Ray run name of its own, so Ray has nothing to resume from: the newest checkpoint in the run
    folder decides, here and after a lost worker.

    Raises:
        MedtlError: what the workers agreed on, as in :func:`medtl_dist.train.loop.fit`; TrainingError where restarts
            are used up.
    """
    with connected(config):
        use_gpu = _use_gpu(config)
        storage = run_folder / ".ray"
        trainer = TorchTrainer(
            work,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "folder": str(run_folder),
                "open_test": open_test,
            },
            scaling_config=ScalingConfig(
                num_workers=config.cluster.num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": config.cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
            ),
            # The core's small agreements are CPU tensors, so a GPU group needs gloo beside NCCL.
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=config.train.collective_timeout_s
            ),
            run_config=RunConfig(
                name=f"attempt-{uuid.uuid4().hex[:12]}",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        try:
            status = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _exhausted(error, run_folder, config) from None
        finally:
            shutil.rmtree(storage, ignore_errors=True)  # Ray's own bookkeeping; nothing of ours is in it
    if isinstance(status, dict) and status.get("error"):
        raise BY_NAME.get(status["error"], MedtlError)(status["message"])


def work(payload: dict[str, Any]) -> dict[str, str]:
    """The training function of a Ray Train worker. What cannot go on is returned: Ray would retry whatever is raised."""
    try:
        fit(validate(payload["config"]), RayRun(Folder.local(payload["folder"])), open_test=payload["open_test"])
    except MedtlError as error:
        return {"error": type(error).__name__, "message": error.message}
    return {"error": "", "message": ""}


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """A connection to the configured cluster, or a cluster on this machine that ends with the block."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            # Where more workers are asked for than there are CPUs they share them, slowly but surely.
            needed = math.ceil(config.cluster.num_workers * config.cluster.cpus_per_worker)
            ray.init(address="local", num_cpus=max(available_cpus(), needed), **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, AuthenticationError) as error:
        where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
        raise UserError(f"can't reach or start {where}: {str(error).splitlines()[0]}") from None
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _use_gpu(config: Config) -> bool:
    """One GPU per worker where wished, or, left open, where the cluster has enough. Raises UserError where it has not."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.cluster.use_gpu is None:
        return gpus >= config.cluster.num_workers > 0
    if config.cluster.use_gpu and config.cluster.address is None and gpus < config.cluster.num_workers:
        raise UserError(
            f"cluster.use_gpu = true with cluster.num_workers = {config.cluster.num_workers}, but this machine has {gpus} GPUs: "
            "lower cluster.num_workers, name a cluster with cluster.address, or set cluster.use_gpu=false."
        )
    return bool(config.cluster.use_gpu)


def _exhausted(error: TrainingFailedError, run_folder: Path, config: Config) -> TrainingError:
    """The error of a run whose restarts are used up; the whole story goes into a file of the run folder."""
    causes = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else [error]
    lines = [line.strip() for line in str(causes[0] if causes else error).splitlines() if line.strip()] or [repr(error)]
    # A traceback ends with its message; what Ray says of a lost worker begins with it.
    cause = (lines[-1] if lines[0].startswith(("Traceback", "\x1b[36m")) else lines[0])[:300]
    (run_folder / "failure.txt").write_text(str(error), encoding="utf-8")
    return TrainingError(
        f"training stopped after {config.cluster.max_failures} restarts: {cause} "
        f"Details: {run_folder / 'failure.txt'}; the same command with --resume goes on from the last checkpoint."
    )

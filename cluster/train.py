"""Start a training run on Ray Train: read the config, build scaling and run config, call fit, return the core's status."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cluster import notices
from cluster.ray_run import RayRun, Why
from cluster.room import needs_of, room_now
from cluster.shared_folder import check_shared
from medtl_dist.config import Config, validate
from medtl_dist.errors import BY_NAME, Interrupted, MedtlError, TrainingError, UserError
from medtl_dist.run import Folder
from medtl_dist.storage import given_up
from medtl_dist.store_folder import StoreFolder, folder_at
from medtl_dist.train.budget import budgeted
from medtl_dist.train.lease import fenced
from medtl_dist.train.loop import fit
from medtl_dist.train.setup import available_cpus, storage_of

_WATCH_EVERY_S = 0.2
_LOOK_FOR_ROOM_EVERY_S = 5.0


def train_on_ray(config: Config, run_folder: Path | Folder, *, open_test: bool = False) -> None:
    """Train with ``cluster.num_workers`` Ray Train workers in ``run_folder``; returns when the results are written.

    Every attempt gets a Ray run name of its own, so Ray has nothing to resume from: the newest checkpoint in the run
    folder decides, here and after a lost worker. A lost worker is started again by Ray, at most ``cluster.max_failures``
    times. Where a node or a worker is told to end, all ranks write a checkpoint and stop, and another attempt goes on
    where there is room; that costs no retry.

    Raises:
        MedtlError: what the workers agreed on, as in :func:`medtl_dist.train.loop.fit`; TrainingError where restarts
            are used up; Interrupted where this process got SIGTERM, after a checkpoint, or where the cluster could not
            hold the workers for ``cluster.wait_for_workers_s``.
        KeyboardInterrupt: after a checkpoint likewise.
    """
    folder = run_folder if isinstance(run_folder, Folder) else Folder.local(run_folder)
    with connected(config), notices.noting_signals() as signals:
        check_shared(config, folder)
        payload = {
            "config": config.model_dump(mode="json"),
            "folder": folder.url,
            "fence": folder.fence if isinstance(folder, StoreFolder) else None,
            "leased_at": folder.leased_at if isinstance(folder, StoreFolder) else None,
            "open_test": open_test,
        }
        use_gpu = _use_gpu(config)  # once for all attempts: a lost node must not turn a run on GPUs into one on CPUs
        while True:
            status = Attempt(config, folder, use_gpu, signals).run(payload)
            if status["why"] not in (Why.PREEMPTED, Why.TERMINATED) or signals.received is not None:
                break
    if status["error"] == Interrupted.__name__ and signals.received == signal.SIGINT:
        raise KeyboardInterrupt
    if status["error"]:
        raise BY_NAME.get(status["error"], MedtlError)(status["message"])


class Attempt:
    """One Ray Train run, watched from the main thread, so that signals are heard while it goes on."""

    def __init__(self, config: Config, folder: Folder, use_gpu: bool, signals: notices.Signals) -> None:
        self._config, self._folder, self._signals = config, folder, signals
        self._name = f"attempt-{uuid.uuid4().hex[:12]}"
        self._use_gpu, self._needs = use_gpu, needs_of(config, use_gpu=use_gpu)
        self._enough = config.cluster.min_workers or config.cluster.num_workers
        self._outcome: dict[str, Any] | BaseException | None = None

    def run(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The workers' status: ``error`` (the name of a class, or ""), ``message`` and ``why`` it was told to stop."""
        trainer = self._trainer(payload | {"attempt": self._name})
        # Ray Train takes over Ctrl-C in the main thread, and kills: in another one it leaves the signals to us.
        fitting = threading.Thread(target=self._fit, args=(trainer,), name="ray-train", daemon=True)
        fitting.start()
        try:
            self._watch(fitting)
            notices.forget(self._name)
        except RayError as error:  # the control service itself is gone
            raise _lost(error) from None
        finally:
            given_up(fitting)  # where it is still in Ray's hands, ending as usual crashes: the exit code would be lost
            with suppress(OSError, MedtlError):
                self._folder.delete_tree(".ray")  # Ray's own bookkeeping; nothing of ours is in it
        if isinstance(self._outcome, TrainingFailedError):
            raise _exhausted(self._outcome, self._folder, self._config) from None
        if isinstance(self._outcome, RayError):
            raise _lost(self._outcome) from None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def _trainer(self, payload: dict[str, Any]) -> TorchTrainer:
        cluster = self._config.cluster
        # What Ray Train takes from the environment; what the user has set stays.
        os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(self._config.train.collective_timeout_s))
        elastic = cluster.min_workers is not None and cluster.min_workers < cluster.num_workers
        return TorchTrainer(
            work,
            train_loop_config=payload,
            scaling_config=ScalingConfig(
                num_workers=(cluster.min_workers or 1, cluster.num_workers) if elastic else cluster.num_workers,
                use_gpu=self._use_gpu,
                resources_per_worker=self._needs,
            ),
            # The core's small agreements are CPU tensors, so a GPU group needs gloo beside NCCL.
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if self._use_gpu else "gloo",
                timeout_s=self._config.train.collective_timeout_s,
            ),
            run_config=RunConfig(
                name=self._name,
                storage_path=self._folder.at(".ray"),
                storage_filesystem=self._folder.fs if self._folder.remote else None,
                failure_config=FailureConfig(max_failures=cluster.max_failures),
                callbacks=[notices.NoteSigterm()],  # pyright: ignore[reportArgumentType]
            ),
        )

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            self._outcome = trainer.fit().return_value
        except BaseException as error:  # raised again in the main thread
            self._outcome = error

    def _watch(self, fitting: threading.Thread) -> None:
        """Until the run ends. Raises Interrupted where it does not end in time after a signal, or lacks room for too long."""
        asked_at: float | None = None
        room_at, looked_at = time.monotonic(), -math.inf
        while fitting.is_alive():
            fitting.join(_WATCH_EVERY_S)
            now = time.monotonic()
            if self._signals.received is not None and asked_at is None:
                asked_at = now
                notices.ask_to_stop(self._name)
            if asked_at is not None and fitting.is_alive() and now - asked_at > self._grace_s():
                raise Interrupted(
                    f"stopped as asked; the workers had no checkpoint to write, or took longer than cluster.stop_grace_s = "
                    f"{self._config.cluster.stop_grace_s}. The same command with --resume goes on from the last checkpoint."
                )
            if now - looked_at > _LOOK_FOR_ROOM_EVERY_S:
                looked_at = now  # Ray Train has asked for room, so an autoscaler may be making it
                if self._has_room():
                    room_at = now
                elif now - room_at > self._config.cluster.wait_for_workers_s:
                    raise self._no_room()

    def _grace_s(self) -> float:
        """How long to wait for the workers after a signal: not at all while there are none that could hear of it."""
        return self._config.cluster.stop_grace_s if notices.has_begun(self._name) else 0.0

    def _has_room(self) -> bool:
        if not _shared_cluster(self._config):
            return True
        # Workers on a node that is drained still have a checkpoint to write; new ones are not put there.
        return room_now(self._needs, even_leaving=notices.has_begun(self._name)) >= self._enough

    def _no_room(self) -> Interrupted:
        each = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items())
        return Interrupted(
            f"the cluster's nodes have room for {room_now(self._needs)} workers ({each} each), and {self._enough} are needed: "
            "add nodes, or set cluster.min_workers; the same command with --resume goes on from the last checkpoint."
        )


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """The training function of a Ray Train worker. What cannot go on is returned: Ray would retry whatever is raised."""
    run: RayRun | None = None
    try:
        config = validate(payload["config"])
        folder = folder_at(payload["folder"], storage_of(config))
        if isinstance(folder, StoreFolder) and payload["fence"] is not None:
            folder = fenced(folder, payload["fence"], payload["leased_at"])
        run = RayRun(folder, payload["attempt"])
        if run.rank == 0:
            notices.mark_begun(run.attempt)
        with budgeted(run) as limited:
            fit(config, limited, open_test=payload["open_test"])
    except MedtlError as error:
        return {"error": type(error).__name__, "message": error.message, "why": int(run.why) if run else 0}
    return {"error": "", "message": "", "why": 0}


def _shared_cluster(config: Config) -> bool:
    """Whether the cluster is more than this process's own."""
    return (config.cluster.address or os.environ.get("RAY_ADDRESS")) is not None


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
        return gpus >= (config.cluster.min_workers or config.cluster.num_workers) > 0
    if config.cluster.use_gpu and config.cluster.address is None and gpus < config.cluster.num_workers:
        raise UserError(
            f"cluster.use_gpu = true with cluster.num_workers = {config.cluster.num_workers}, but this machine has {gpus} GPUs: "
            "lower cluster.num_workers, name a cluster with cluster.address, or set cluster.use_gpu=false."
        )
    return bool(config.cluster.use_gpu)


def _lost(error: Exception) -> Interrupted:
    """The error of a run whose cluster is gone: its head, or the node of this process."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return Interrupted(
        f"lost the Ray cluster: {reason} The same command with --resume goes on from the last checkpoint, here or elsewhere."
    )


def _exhausted(error: TrainingFailedError, folder: Folder, config: Config) -> TrainingError:
    """The error of a run whose restarts are used up; the whole story goes into a file of the run folder."""
    causes = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else [error]
    lines = [line.strip() for line in str(causes[0] if causes else error).splitlines() if line.strip()] or [repr(error)]
    # A traceback ends with its message; what Ray says of a lost worker begins with it.
    cause = (lines[-1] if lines[0].startswith(("Traceback", "\x1b[36m")) else lines[0])[:300]
    with suppress(OSError, MedtlError):
        folder.write("failure.txt", str(error).encode())
    return TrainingError(
        f"training stopped after {config.cluster.max_failures} restarts: {cause} "
        f"Details: {folder.url}/failure.txt; the same command with --resume goes on from the last checkpoint."
    )

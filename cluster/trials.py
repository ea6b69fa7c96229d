"""trials → their outcomes, on warm Ray workers: for sweeps, and for whatever else is many trainings in one folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.launch import has_own_cluster, set_environment
from cluster.trial_desk import Desk, Propose, Rule
from cluster.trial_state import Reserved, TrialSpec, place_of, read_trial
from medtl_dist.config import Config
from medtl_dist.errors import UserError
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Outcome

__all__ = ["Stopped", "TrialSpec", "run_trials"]


class Stopped:
    """Whether the driver was told to stop (Ctrl-C, SIGTERM), and by which signal; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    def note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@contextmanager
def stopping_on_signals() -> Iterator[Stopped]:
    """The first Ctrl-C or SIGTERM is noted while the block runs; only the main thread can listen."""
    stopped = Stopped()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, stopped.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_trials(
    folder: Path | Folder,
    trials: Sequence[TrialSpec],
    base: Config,
    *,
    stop_rule: Rule | None = None,
    on_news: Callable[[list[Outcome]], None] | None = None,
    propose: Propose | None = None,
    stopped: Callable[[], bool] = lambda: False,
    warm_options: dict[str, Any] | None = None,
    at_end: Callable[[list[Outcome]], None] | None = None,
) -> list[Outcome]:
    """Run each trial's config as an ordinary training in ``trials/NNNNN`` of a folder, or of a ``Mirror`` of one in a store; the
    outcomes of all, by number.

    Single-worker trials (``base.cluster.num_workers`` 0 or 1) share warm processes, one trial after another in each; others
    start their own Ray Train workers. As many run at once as the cluster has room for. What ``folder`` says has ended
    is not run again, and what was interrupted goes on from its checkpoint. The caller holds the folder's lock.

    Args:
        stop_rule: told of every epoch, it may stop a trial early; None: every trial runs its epochs.
        on_news: told how all trials stand, after every event and at least every half second.
        propose: asked for one more trial when nothing waits.
        stopped: whether to stop: running trials then stop after a checkpoint, and nothing new begins.
        warm_options: arguments of the workers' :class:`medtl_dist.train.warm.Warm`; a ``NodeFolder`` as its ``cache_dir`` is
            made on each node.
        at_end: called once no worker is left, while the cluster is still connected.

    Raises:
        UserError: no cluster, no room for even one trial, or a folder or shard set that not every node sees.
    """
    place = place_of(folder)
    set_environment(own_cluster=has_own_cluster(base))
    from cluster.shared_folder import check_shared
    from cluster.train import connected
    from cluster.trial_workers import Crew, drive, slots_on_cluster
    from medtl_dist.models.freezing import resolve_depth
    from medtl_dist.models.join import spec_of

    def stages(spec: TrialSpec) -> tuple[int, int]:
        backbone = spec_of(spec.config.model)
        return resolve_depth(backbone, spec.config.model.frozen_depth), backbone.num_stages

    def desk_for(reserved: Reserved) -> Desk:
        return Desk(
            place, trials, reserved=reserved, stages=stages, max_failures=base.tune.max_trial_failures,
            rule=stop_rule, propose=propose, silence_s=base.tune.silence_timeout_s,
        )  # fmt: skip

    if propose is None and all(read_trial(place.local_path, spec).ended for spec in trials):
        return desk_for(reserved_for(base, num_gpus=0)).outcomes()
    num_workers = max(base.cluster.num_workers, 1)
    with connected(base):
        import ray

        check_shared(trials[0].config if trials else base, place)
        reserved = reserved_for(base, num_gpus=int(ray.cluster_resources().get("GPU", 0)))
        slots = slots_on_cluster(reserved, num_workers)
        if slots < 1:
            raise UserError(_no_room(base, reserved, ray.cluster_resources()))
        desk = desk_for(reserved)
        drive(
            desk,
            Crew(place, slots, reserved, num_workers, warm_options or {}),
            told_to_stop=stopped,
            tick=lambda: on_news(desk.outcomes()) if on_news is not None else None,
            grace_s=base.cluster.stop_grace_s,
        )
        if num_workers > 1:
            from cluster.trial_ddp import remove_leftover_groups

            remove_leftover_groups()
        if at_end is not None:
            at_end(desk.outcomes())
    return desk.outcomes()


def _no_room(base: Config, reserved: Reserved, there: Mapping[str, float]) -> str:
    num_workers = max(base.cluster.num_workers, 1)
    gpus = f" and {reserved.gpus / num_workers:g} GPUs" if reserved.gpus else ""
    return (
        f"no room for one trial: {num_workers} workers of {base.cluster.cpus_per_worker:g} CPUs{gpus} each, and the cluster has "
        f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs: lower cluster.cpus_per_worker or "
        "cluster.num_workers, or set cluster.use_gpu=false."
    )


def reserved_for(base: Config, *, num_gpus: int) -> Reserved:
    """What one trial reserves: ``cluster.cpus_per_worker`` for each worker, and a GPU, or the fraction of one asked for.

    Raises:
        UserError: a fraction of a GPU for each of several workers.
    """
    num_workers, wish = max(base.cluster.num_workers, 1), base.cluster.use_gpu
    if wish is None:
        gpus = 1.0 if num_gpus >= num_workers else 0.0
    else:
        gpus = float(wish)
        if 0 < gpus < 1 < num_workers:
            raise UserError(
                f"cluster.use_gpu = {gpus:g} with cluster.num_workers = {num_workers}: the ranks of one training can't share "
                "a GPU; set cluster.use_gpu=true, or cluster.num_workers=1 so that trials share it."
            )
    return Reserved(cpus=base.cluster.cpus_per_worker * num_workers, gpus=gpus * num_workers)

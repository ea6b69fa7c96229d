"""From the command line to Ray, in the order that Ray needs: its environment first, its import second."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from medtl_dist.config import Config
from medtl_dist.errors import UserError
from medtl_dist.storage import Folder
from medtl_dist.train.setup import available_cpus

_WORKERS_PER_CPU = 4

# Ray Train's own clocks, shorter than its defaults (2, 60, 600 and 5 s), so that a lost worker is seen and replaced soon. The
# start time-out is what an elastic run waits for workers on a node that has just died, before it takes fewer.
_TRAIN_CLOCKS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}


def launch_training(config: Config, run_folder: Path | Folder, *, open_test: bool = False) -> None:
    """Train on Ray; see :func:`cluster.train.train_on_ray` for what it does and raises."""
    own_cluster = has_own_cluster(config)
    if (
        own_cluster
        and config.cluster.num_workers * config.cluster.cpus_per_worker > _WORKERS_PER_CPU * available_cpus()
    ):
        raise UserError(
            f"cluster.num_workers = {config.cluster.num_workers} on this machine's {available_cpus()} CPUs: at most "
            f"{_WORKERS_PER_CPU} can share a CPU; lower it, or name a cluster with cluster.address."
        )
    set_environment(own_cluster=own_cluster)
    from cluster.train import train_on_ray  # Ray reads the variables above when it is imported, and not again

    train_on_ray(config, run_folder, open_test=open_test)


def has_own_cluster(config: Config) -> bool:
    """Whether a cluster is started on this machine for the command: none is named by the config or ``RAY_ADDRESS``."""
    return config.cluster.address is None and "RAY_ADDRESS" not in os.environ


def set_environment(*, own_cluster: bool) -> None:
    """Set what Ray reads at import; whatever the user has set stays.

    A cluster of our own gets token authentication with a token that only this user can read and that ends with the
    process: its jobs API runs code for whoever reaches it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a hospital's jobs leaves it unasked
    for name, seconds in _TRAIN_CLOCKS.items():
        os.environ.setdefault(name, seconds)
    if own_cluster and "RAY_AUTH_MODE" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="medtl-token-"))  # mode 0700
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        (folder / "token").write_text(secrets.token_hex(32), encoding="ascii")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
        os.environ["RAY_AUTH_MODE"] = "token"

"""a sweep → where its workers keep frozen layers' outputs: on their own node's disk, for this user alone, gone with the sweep."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtl_dist.errors import UserError

_REMOVAL_S = 60.0


@dataclass(frozen=True)
class NodeFolder:
    """A folder of the same name on every node: below ``base``, or below the node's own temporary folder (``TMPDIR``)."""

    name: str
    base: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.base or tempfile.gettempdir()) / f"medtl-{os.geteuid()}" / self.name

    def made(self) -> Path:
        """The folder on this node, made where it is missing.

        Raises:
            UserError: it can't be made, or somebody else could write there: what is kept there decides numbers.
        """
        path = self.path
        try:
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            for place in (path.parent, path):
                place.mkdir(mode=0o700, exist_ok=True)
                found = place.lstat()  # of a link, not of what it leads to: its mode is 0777
                if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                    raise UserError(
                        f"prefix cache: {place} is not a folder of this user alone (mode 0700); remove it, name another place "
                        "with tune.prefix_cache_dir, or set tune.prefix_cache=off."
                    )
        except OSError as error:
            raise UserError(
                f"prefix cache: {path} can't be made ({error.strerror}); name a folder on a local disk with "
                "tune.prefix_cache_dir, or set tune.prefix_cache=off."
            ) from None
        return path

    def remove(self) -> None:
        """Delete it on this node, if it is there."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another sweep's may be in it
            self.path.parent.rmdir()


def cache_place(sweep: Path | str, base: str | None, *, own_cluster: bool) -> Path | NodeFolder:
    """Where a sweep's cache lies. ``sweep``: its folder, or its address in a store; ``base``: ``tune.prefix_cache_dir``.

    On a cluster of this machine's own it lies in the sweep's folder, where everybody sees it. The nodes of
    another cluster share that folder, or a store, over a network, which is no place for what is read in every step.
    """
    if base is None and own_cluster and isinstance(sweep, Path):
        return sweep / "cache"
    known_as = str(sweep.absolute()) if isinstance(sweep, Path) else sweep
    return NodeFolder(f"sweep-{hashlib.sha256(known_as.encode()).hexdigest()[:16]}", base)


def on_this_node(warm_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``Warm`` with the cache's folder made on this node. Raises UserError, see ``NodeFolder.made``."""
    place = warm_options.get("cache_dir")
    off = warm_options.get("cache_mode") == "off"
    return dict(warm_options) | ({"cache_dir": None if off else place.made()} if isinstance(place, NodeFolder) else {})


def remove_on_nodes(place: NodeFolder) -> None:
    """Delete it on every living node of the connected cluster; where that fails, say so: it is made from patients' images."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tasks: list[Any] = []
    for node in ray.nodes():
        if node["Alive"]:
            there: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            tasks.append(ray.remote(num_cpus=0, scheduling_strategy=there, max_retries=0)(_remove).remote(place))
    done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=_REMOVAL_S)
    failed = len(tasks) - len(done)
    for task in done:
        try:
            ray.get(task)
        except RayError:
            failed += 1
    if failed:
        logging.getLogger(__name__).warning(
            "the prefix cache could not be removed on %d of %d nodes: delete %s there", failed, len(tasks), place.path
        )


def _remove(place: NodeFolder) -> None:
    place.remove()

"""a process's earlier trainings → the next one: what a sweep's trials share, so that only the first pays for it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medtl_dist.config import Config
from medtl_dist.data.loader import Loader
from medtl_dist.data.shards import DATASET_FILE, Dataset
from medtl_dist.models.backbones import Created
from medtl_dist.run import Run
from medtl_dist.train.evaluate import Predictions
from medtl_dist.train.prefix_store import Entry, Store

_MOST_NETWORKS = 2
_MIB = 2**20


@dataclass
class Warm:
    """What a process keeps between trainings. Nothing in it changes a number: with or without it, the same bits.

    Attributes:
        keep_epoch_scores: write the pooled val logits of every epoch, ``predictions/epochs/<epoch>.npy`` (float32
            [n, classes], in the index's order), so that a sweep can say how optimistic its best epoch is.
        cache_dir: folder on a local disk for what comes out of frozen layers (``train/prefix_cache.py``); None: not kept.
        cache_mode: auto: kept where it fits and pays; on: kept where it fits; off.
        cache_limit_mib: its size limit; None: half of what is free on the disk.
        cache_trials: trainings that will read what this one keeps, itself included; auto counts with them.
    """

    keep_epoch_scores: bool = False
    cache_dir: Path | None = None
    cache_mode: Literal["auto", "on", "off"] = "auto"
    cache_limit_mib: int | None = None
    cache_trials: int = 1
    entries: dict[str, Entry] = field(default_factory=dict, init=False)
    _datasets: dict[Any, Dataset] = field(default_factory=dict, init=False)
    _networks: dict[Any, Created] = field(default_factory=dict, init=False)
    _loaders: dict[int, Loader] = field(default_factory=dict, init=False)

    @functools.cached_property
    def store(self) -> Store | None:
        """Where boundaries are kept. Raises UserError, the folder can't be made."""
        if self.cache_dir is None or self.cache_mode == "off":
            return None
        return Store(self.cache_dir, None if self.cache_limit_mib is None else self.cache_limit_mib * _MIB)

    def dataset(self, config: Config, open_it: Callable[[Config], Dataset]) -> Dataset:
        """The config's set, opened once as long as its ``dataset.json`` stays as it is."""
        data = config.data
        given = (data.shards, data.endpoint_url, data.ca_bundle, data.anonymous, data.cache_dir, data.cache_mib)
        key = (*given, data.storage_timeout_s, data.storage_retries, _state_of(f"{data.shards}/{DATASET_FILE}"))
        if key not in self._datasets:
            self._datasets[key] = open_it(config)
        return self._datasets[key]

    def network(self, key: tuple[Any, ...], files: Iterable[str], create: Callable[[], Created]) -> Created:
        """A new copy of the network that ``create`` makes, made once as long as these weights ``files`` stay as they are."""
        full = (*key, *(_state_of(file) for file in files))
        if full not in self._networks:
            while len(self._networks) >= _MOST_NETWORKS:
                del self._networks[next(iter(self._networks))]
            self._networks[full] = create()
        created = self._networks[full]
        return dataclasses.replace(created, model=copy.deepcopy(created.model))

    def loader(self, num_workers: int) -> Loader:
        """A loader whose processes, where it has any, outlast the training."""
        return self._loaders.setdefault(num_workers, Loader(num_workers))

    def let_go(self, but: Iterable[str] = ()) -> None:
        """Close the entries of the prefix cache but those named, so that they can make room."""
        for name in set(self.entries) - set(but):
            self.entries.pop(name).close()

    def close(self) -> None:
        """End the loader processes and let go of everything."""
        self.let_go()
        for loader in self._loaders.values():
            loader.close()
        for kept in (self._loaders, self._datasets, self._networks):
            kept.clear()


def keep_epoch_scores(run: Run, epoch: int, predictions: Predictions) -> None:
    """Write an epoch's pooled val logits. Rank 0 only. Raises OSError when the disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, predictions.logits.astype(np.float32), allow_pickle=False)
    run.folder.write(epoch_scores(epoch), buffer.getvalue())


def epoch_scores(epoch: int) -> str:
    """Where an epoch's val logits lie in a run folder."""
    return f"predictions/epochs/{epoch:04d}.npy"


def _state_of(path: str) -> tuple[str, int, int, int]:
    """What changes when a local file does; of what is no local file the name alone."""
    try:
        status = os.stat(os.path.expanduser(path))
    except (OSError, ValueError):
        return path, 0, 0, 0
    return path, status.st_mtime_ns, status.st_size, status.st_ino

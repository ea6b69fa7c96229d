"""boundary activations of a data set → batches, for every training on the node that has the same frozen layers.

An entry holds one split as one epoch shows it: of training images with V views, epoch e shows of each image the view
(hash + e) mod V, so there are V entries, and epoch e reads the one of e mod V; of val there is one. An entry's name is a
hash of all that its numbers depend on. Where nothing is kept the same numbers are computed (``train/prefix.py``), so
whether, where and since when an entry is kept decides nothing but time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medtl_dist import __version__, collectives
from medtl_dist.config import Config
from medtl_dist.data.plan import IntArray
from medtl_dist.data.shards import Dataset
from medtl_dist.data.stream import Batch, Kept, rows_batches
from medtl_dist.data.transforms import EvalTransform
from medtl_dist.errors import Interrupted, MedtlError, UserError
from medtl_dist.models.registry import BackboneSpec
from medtl_dist.models.split import between
from medtl_dist.run import Signal
from medtl_dist.train.network import Network
from medtl_dist.train.prefix import Prefix, boundary_of, in_rows, prefix_of, weights_digests
from medtl_dist.train.prefix_lookup import PrefixCache
from medtl_dist.train.prefix_store import FORMAT_VERSION, Entry, Shape
from medtl_dist.train.session import Session
from medtl_dist.train.setup import train_transform_of

CHUNK_ROWS = 256  # a multiple of every Prefix.rows; half a minute of ResNet101 on two cores
_WAIT_S = 0.05
_READ_BYTES_PER_S = 1e9
_WRITE_BYTES_PER_S = 3e8
_MIB = 2**20


def cache_of(session: Session) -> PrefixCache | None:
    """The session's way to what is kept, or None; why is told in the journal. Collective; rank 0 decides."""
    warm = session.warm
    store, mode = warm.store, warm.cache_mode
    if store is None or mode == "off":
        return None
    if session.prefix is None:
        session.journal.note(f"prefix cache off: {prefix_of(session.config, session.network)[1]}")
        return None
    network = session.network
    digests = weights_digests(network.model, network.spec, session.prefix.depth)
    lineage = lineage_of(
        session.config, session.dataset, network.spec, session.prefix, session.threads, network.frozen_depth
    )
    cache = PrefixCache(store, session.prefix, lineage, digests, warm.entries)
    needed = [cache.name(shown) for shown in _needed(session)]
    warm.let_go(needed)
    reason, told = collectives.from_rank_0(_decision(session, cache) if session.run.rank == 0 else (None, ""))
    session.journal.note(f"prefix cache off: {reason}" if reason else f"prefix cache on: {told}")
    return None if reason else cache


def lineage_of(
    config: Config, dataset: Dataset, spec: BackboneSpec, prefix: Prefix, threads: int | None, frozen_depth: int
) -> dict[str, Any]:
    """What a boundary's bits depend on, apart from its depth, the weights and what is shown.

    ``frozen_depth``: stages that are frozen now. They are those that are folded, and a norm after the boundary can be folded
    into a convolution before it.
    """
    return {
        "format": FORMAT_VERSION,
        "versions": _versions(),
        "processor": _processor(prefix.device),
        "threads": threads,
        "backbone": spec.name,
        "join": config.model.join,
        "channels": dataset.channels,
        "folded": frozen_depth if config.model.fold_frozen else None,
        "precision": prefix.precision.name,
        "channels_last": prefix.channels_last,
        "image_size_px": prefix.image_size_px,
        "normalisation": [list(prefix.normalisation.mean), list(prefix.normalisation.std)],
        "rows": prefix.rows,
        "dataset": dataset.sha256,
    }


def train_shown(config: Config, image_size_px: int, epoch: int) -> dict[str, Any]:
    """What of the training images an epoch shows."""
    views = config.augment.views
    assert views is not None
    transform = dataclasses.asdict(train_transform_of(config, image_size_px))
    return {"split": "train", "turn": epoch % views, "views": views, "seed": config.train.seed, "transform": transform}


def val_shown(transform: EvalTransform) -> dict[str, Any]:
    """What of the val images every epoch shows."""
    return {"split": "val", "transform": dataclasses.asdict(transform)}


def shown_from(config: Config, image_size_px: int, transform: EvalTransform, epoch: int) -> list[dict[str, Any]]:
    """What a training that has boundaries to keep shows from an epoch on to its end."""
    assert config.augment.views is not None
    epochs = range(epoch, config.train.epochs)[: config.augment.views]
    val = [val_shown(transform)] if config.evaluate.views == "one" else []
    return [*(train_shown(config, image_size_px, epoch) for epoch in epochs), *val]


def kept_train(session: Session) -> Kept | None:
    """The current epoch's boundaries by place in the training split, computed now where they are not there yet; None: they
    are not kept. Collective.

    Raises:
        MedtlError: the same on every rank: damaged images; Interrupted where the run was told to stop meanwhile.
    """
    if session.cache is None:
        return None
    shown = train_shown(session.config, session.network.image_size_px, session.position.epoch)
    return _kept(session, session.cache, shown)


def kept_val(session: Session) -> Kept | None:
    """As :func:`kept_train`, of val."""
    if session.cache is None or session.scorer.views != "one":
        return None
    return _kept(session, session.cache, val_shown(session.scorer.transform))


def _kept(session: Session, cache: PrefixCache, shown: Mapping[str, Any]) -> Kept | None:
    if session.config.model.fold_frozen:  # stages may have been unfrozen since
        cache.lineage["folded"] = session.network.frozen_depth
    try:
        rows = _filled(session, cache, shown)
        why = "no room is left below its limit"
    except OSError as error:
        rows, why = None, f"{cache.store.folder} can't be written ({error.strerror or error})"
    if rows is None:
        session.journal.note(f"prefix cache off: {why}; going on without")
        session.cache = None
        session.warm.let_go()  # so that its room can be had
        return None
    table = _tensor(rows)

    def kept(places: IntArray, num_rows: int) -> Tensor:
        found = torch.zeros((num_rows, table.shape[1]), dtype=torch.uint8)
        torch.index_select(table, 0, torch.from_numpy(places), out=found[: len(places)])
        return cache.prefix.from_rows(found)

    return kept


def _tensor(rows: np.ndarray) -> Tensor:
    """The rows in place. Never written to: the memory is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(rows)


def _filled(session: Session, cache: PrefixCache, shown: Mapping[str, Any]) -> np.ndarray | None:
    """The rows of the entry, every chunk there and checked; None where there is no room. In rounds of a chunk a rank, so that
    ranks fail, stop and give up together."""
    name, run = cache.name(shown), session.run
    try:
        entry = _opened(session, cache, name, shown)
    except OSError:
        entry = None
    if collectives.largest(int(entry is None)):
        return None
    assert entry is not None
    first = run.rank * entry.shape.num_chunks // run.world_size
    compute = _computer(session, cache, shown)
    began, num_filled = time.monotonic(), 0
    while True:
        failure: MedtlError | None = None
        broken: OSError | None = None
        rows, state = None, "complete"
        try:
            state = entry.fill_one(compute, first)
            rows = entry.rows() if state == "complete" else None
            if state == "complete" and rows is None:
                session.journal.note("prefix cache: a part of it was damaged and is computed again")
        except MedtlError as error:
            failure = error
        except OSError as error:
            broken = error
        collectives.raise_together(failure)
        unfinished = collectives.largest(2 if broken else int(rows is None))
        if unfinished == 2:
            raise broken or OSError("on another rank")
        num_filled += state == "filled"
        if unfinished == 0:
            if num_filled:
                what = f"{shown['split']}, view {shown['turn'] + 1} of {shown['views']}" if "turn" in shown else "val"
                seconds = time.monotonic() - began
                session.journal.note(f"prefix cache: {what}: {entry.shape.num_rows} images in {seconds:.1f} s")
            return rows
        if run.poll() is Signal.CHECKPOINT_AND_STOP:
            raise Interrupted(
                "stopped as asked while the prefix cache was being filled; the same command with --resume goes on."
            )
        if state != "filled":
            time.sleep(_WAIT_S)


def _opened(session: Session, cache: PrefixCache, name: str, shown: Mapping[str, Any]) -> Entry | None:
    if name not in cache.held:
        prefix = cache.prefix
        num_rows = sum(shard.samples for shard in session.dataset.shards(shown["split"]))
        shape = Shape(num_rows, prefix.row_bytes, CHUNK_ROWS)
        about = {"shape": list(prefix.shape), "dtype": str(prefix.dtype).removeprefix("torch."), "depth": prefix.depth}
        entry = cache.store.open(name, shape, about)
        if entry is None:
            return None
        cache.held[name] = entry
    return cache.held[name]


def _computer(session: Session, cache: PrefixCache, shown: Mapping[str, Any]) -> Callable[[int, int], np.ndarray]:
    """What computes rows [start, stop) of the entry: from images, or from a shallower entry of the same lineage."""
    config, prefix = session.config, cache.prefix
    split = shown["split"]
    is_train = split == "train"
    below: list[tuple[Prefix, Callable[[Tensor], Tensor], Tensor]] = []

    def from_images(start: int, stop: int) -> np.ndarray:
        batches = rows_batches(
            session.dataset,
            split,
            transform=train_transform_of(config, prefix.image_size_px) if is_train else session.scorer.transform,
            batch_size=prefix.rows,
            start=start,
            stop=stop,
            shown=(shown["seed"], shown["turn"], shown["views"]) if is_train else None,
            loader=session.loader,
            verify=config.data.verify_checksums,
        )
        return torch.cat([prefix.to_rows(boundary_of(prefix, _images(batch, prefix))) for batch in batches]).numpy()

    def from_shallower(start: int, stop: int) -> np.ndarray:
        shallow, rest, table = below[0]
        made = []
        for first in range(start, stop, prefix.rows):
            inputs = shallow.from_rows(table[first : min(first + prefix.rows, stop)].clone()).to(prefix.device)
            made.append(prefix.to_rows(in_rows(prefix, rest, inputs, shallow.blank)))
        return torch.cat(made).numpy()

    def compute(start: int, stop: int) -> np.ndarray:
        if not below:
            found = _shallower(session.network, cache, shown, session.dataset.shards(split))
            if found is None:
                return from_images(start, stop)
            below.append(found)
        return from_shallower(start, stop)

    return compute


def _images(batch: Batch, prefix: Prefix) -> Tensor:
    return batch.images[: batch.num_real].to(prefix.device)


def _shallower(
    network: Network, cache: PrefixCache, shown: Mapping[str, Any], shards: Any
) -> tuple[Prefix, Callable[[Tensor], Tensor], Tensor] | None:
    """The deepest complete entry of fewer stages, what leads on from there, and its rows; None: there is none."""
    for depth in range(cache.prefix.depth - 1, 0, -1):
        name = cache.name(shown, depth)
        about = cache.store.about(name)
        if about is None or about.get("depth") != depth:
            continue
        dtype = getattr(torch, str(about["dtype"]))
        prefix = dataclasses.replace(cache.prefix, depth=depth, shape=tuple(about["shape"]), dtype=dtype)
        num_rows = sum(shard.samples for shard in shards)
        entry = cache.held.get(name) or cache.store.open(name, Shape(num_rows, prefix.row_bytes, CHUNK_ROWS), about)
        rows = entry.rows() if entry is not None else None
        if entry is None or rows is None:
            continue
        cache.held[name] = entry
        try:
            return prefix, between(network.model, network.spec, depth, cache.prefix.depth), _tensor(rows)
        except UserError:
            continue
    return None


def _needed(session: Session) -> list[dict[str, Any]]:
    transform = session.scorer.transform
    return shown_from(session.config, session.network.image_size_px, transform, session.position.epoch)


def _decision(session: Session, cache: PrefixCache) -> tuple[str | None, str]:
    """(why nothing is kept, or None; what is kept), on rank 0."""
    try:
        return _decided(session, cache)
    except OSError as error:
        return f"{cache.store.folder} can't be read ({error.strerror or error})", ""


def _decided(session: Session, cache: PrefixCache) -> tuple[str | None, str]:
    prefix = cache.prefix
    counts = {split: sum(s.samples for s in session.dataset.shards(split)) for split in ("train", "val")}
    missing = [shown for shown in _needed(session) if not cache.store.is_complete(cache.name(shown))]
    missing_images = sum(counts[shown["split"]] for shown in missing)
    num_bytes = missing_images * prefix.row_bytes
    size = f"{prefix.row_bytes / 1024:.1f} KiB an image, {num_bytes / _MIB:.1f} MiB in all"
    if num_bytes > cache.store.limit:
        return f"would not fit: {size}, the limit is {cache.store.limit / _MIB:.0f} MiB", ""
    if session.warm.cache_mode == "auto" and missing:
        epochs_left = session.config.train.epochs - session.position.epoch
        reads = session.warm.cache_trials * epochs_left * (counts["train"] + counts["val"])
        seconds = _seconds_per_image(prefix)
        saved = (reads - missing_images) * seconds
        spent = reads * prefix.row_bytes / _READ_BYTES_PER_S + num_bytes / _WRITE_BYTES_PER_S
        if saved <= spent:
            return (
                f"would not pay: {reads} images read for {missing_images} computed at {seconds * 1000:.2f} ms each save "
                f"{saved:.1f} s, and keeping them ({size}) costs {spent:.1f} s"
            ), ""
    held = f"{prefix.depth} frozen stages of {session.network.spec.name}"
    return None, f"{held}, {size} to compute, {len(missing)} of {len(_needed(session))} entries are new"


def _seconds_per_image(prefix: Prefix) -> float:
    """Of the frozen layers here and now; the first pass of a process, which is slower, does not count."""
    size = (prefix.rows, prefix.normalisation.channels, prefix.image_size_px, prefix.image_size_px)
    images = torch.zeros(size, dtype=torch.uint8, device=prefix.device)
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        boundary_of(prefix, images).sum().item()
        seconds.append(time.monotonic() - start)
    return min(seconds) / prefix.rows


@functools.cache
def _versions() -> list[str]:
    """Of all that has a part in an image's way to the boundary."""
    return [__version__, *(_version(name) for name in ("torch", "torchvision", "timm", "opencv-python-headless"))]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

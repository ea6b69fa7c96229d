"""images per second → the CPUs and memory of a rank, and ranks → pods, so that decoding keeps up with the GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from medtl_dist.errors import UserError

# Measured, 2026-11: reading, checksum, decoding, crop, rotation and contrast of packed grey JPEG, 256 to 224 px, took a second
# of one core's time per 1,590 images (median of six passes over 544 made-up radiographs).
LOADER_IMAGES_PER_S_CORE = 1500.0
# Assumed, not measured (no GPU was at hand): ResNet101 training at 224 px in bf16 on a GPU of the A100's class.
GPU_IMAGES_PER_S = 1200.0
# Decoding shares the machine with other pods and with the network: it gets a third more than it needs on paper.
LOADER_HEADROOM = 4 / 3
LOADERS_MAX = 16
UNKNOWN_SIZE_PX = 384  # of a backbone's own input where the config leaves it open; enters the memory only

Tree = dict[str, Any]

RANK_GIB = 6.0  # a process with torch and CUDA's host side, its model, and Ray's own
LOADER_GIB = 0.25  # a loader process: windows of two runs per lane, no torch
SLOTS = 4  # batches in flight between loaders and a rank
SHM_GIB = 2  # /dev/shm counts against the pod's memory: Ray's object store (metrics only) and NCCL within the node
OBJECT_STORE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Resources:
    """What a container gets; requests equal limits, so that a pod is never put where it does not fit."""

    cpus: int
    memory_gib: int
    gpus: int = 0

    def as_tree(self) -> Tree:
        amounts: Tree = {"cpu": str(self.cpus), "memory": f"{self.memory_gib}Gi"}
        if self.gpus:
            amounts["nvidia.com/gpu"] = str(self.gpus)
        return {"limits": dict(amounts), "requests": dict(amounts)}


HEAD = Resources(cpus=2, memory_gib=8)  # the driver imports torch; training itself runs on the workers


@dataclass(frozen=True)
class RankSize:
    """What one rank needs: ``cpus`` (loaders included), ``loaders`` (decoding processes), ``memory_gib`` without /dev/shm."""

    cpus: int
    loaders: int
    memory_gib: int


def rank_size(
    *,
    loader_images_per_s_core: float = LOADER_IMAGES_PER_S_CORE,
    gpu_images_per_s: float = GPU_IMAGES_PER_S,
    batch_images: int,
    image_size_px: int,
) -> RankSize:
    """CPUs and memory of a rank with a GPU that trains ``gpu_images_per_s``.

    One core feeds the GPU; the others decode, with a third to spare. Memory: the process, its loaders, and
    four batches of 3 × ``image_size_px``² bytes an image.

    Raises:
        UserError: a speed that is not a positive number, or one that no sensible number of loaders reaches.
    """
    for name, speed in (("loader-images-per-s-core", loader_images_per_s_core), ("gpu-images-per-s", gpu_images_per_s)):
        if not (math.isfinite(speed) and speed > 0):
            raise UserError(f"--{name} {speed}: expected a positive number of images per second.")
    wanted = gpu_images_per_s * LOADER_HEADROOM / loader_images_per_s_core
    if wanted > LOADERS_MAX:
        raise UserError(
            f"a GPU at {gpu_images_per_s:g} images/s needs {math.ceil(wanted):,} cores that load {loader_images_per_s_core:g} "
            f"images/s each; the limit is {LOADERS_MAX}. Pack smaller images (`medtl data pack --image-size`), or state "
            "the speeds that you measured with --gpu-images-per-s and --loader-images-per-s-core."
        )
    loaders = math.ceil(wanted)
    batches_gib = SLOTS * batch_images * 3 * image_size_px**2 / 2**30
    return RankSize(loaders + 1, loaders, math.ceil(RANK_GIB + loaders * LOADER_GIB + batches_gib))


@dataclass(frozen=True)
class Shape:
    """How many pods, and what is in each: ``ranks_per_pod`` ranks of ``rank``'s size, each with a GPU if ``gpu``.

    ``min_pods`` < ``pods``: the autoscaler may go down to it and comes back up. ``ranks_per_gpu``: trials that share a GPU.
    ``head``: the pod of the driver.
    """

    pods: int
    ranks_per_pod: int
    rank: RankSize
    gpu: bool
    min_pods: int
    ranks_per_gpu: int = 1
    head: Resources = HEAD

    @property
    def ranks(self) -> int:
        return self.pods * self.ranks_per_pod

    @property
    def elastic(self) -> bool:
        return self.min_pods < self.pods

    @property
    def worker(self) -> Resources:
        n = self.ranks_per_pod
        return Resources(
            n * self.rank.cpus, n * self.rank.memory_gib + SHM_GIB, n // self.ranks_per_gpu if self.gpu else 0
        )


def gpu_shape(
    *,
    gpus: int,
    gpus_per_worker: int,
    min_gpus: int | None,
    global_batch_size: int,
    image_size_px: int | None,
    loader_images_per_s_core: float = LOADER_IMAGES_PER_S_CORE,
    gpu_images_per_s: float = GPU_IMAGES_PER_S,
) -> Shape:
    """``gpus`` ranks in pods of ``gpus_per_worker``; elastic down to ``min_gpus``, or fixed where that is None.

    Raises:
        UserError: numbers of GPUs that don't divide into pods, or speeds that :func:`rank_size` refuses.
    """
    least = gpus if min_gpus is None else min_gpus
    if gpus < 1 or gpus_per_worker < 1 or gpus % gpus_per_worker or least % gpus_per_worker or not 0 <= least <= gpus:
        raise UserError(
            f"--gpus {gpus} --gpus-per-worker {gpus_per_worker}"
            + ("" if min_gpus is None else f" --min-gpus {min_gpus}")
            + ": expected "
            "multiples of --gpus-per-worker, the minimum within 0 and --gpus."
        )
    rank = rank_size(
        loader_images_per_s_core=loader_images_per_s_core,
        gpu_images_per_s=gpu_images_per_s,
        batch_images=math.ceil(global_batch_size / gpus),
        image_size_px=image_size_px or UNKNOWN_SIZE_PX,
    )
    return Shape(gpus // gpus_per_worker, gpus_per_worker, rank, gpu=True, min_pods=least // gpus_per_worker)


def cpu_shape(*, workers: int, cpus_per_worker: int) -> Shape:
    """``workers`` pods of one rank each; decoding shares the rank's CPUs with computing. Raises UserError below one."""
    if workers < 1 or cpus_per_worker < 1:
        raise UserError(f"--cpu-workers {workers} --cpus-per-worker {cpus_per_worker}: expected 1 or more of each.")
    return Shape(workers, 1, RankSize(cpus_per_worker, 0, 4), gpu=False, min_pods=workers)

"""a sweep's config and space → what its pods need: room for whole trials, a bounded prefix cache, the space beside the config."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.job_plan import SPACE_FILE
from cluster.placement import Store
from cluster.pods import CACHE, CONFIG_FOLDER
from cluster.sizing import (
    GPU_IMAGES_PER_S,
    LOADER_IMAGES_PER_S_CORE,
    UNKNOWN_SIZE_PX,
    Shape,
    gpu_shape,
    rank_size,
)
from medtl_dist.config import Config
from medtl_dist.errors import UserError
from tune_spaces.space import Space, check, load_space, names

# What frozen layers put out is kept in the pod's cache volume. Its limit is always said: half of what is free on the disk, the
# default elsewhere, would be half of the node's, and a pod that outgrows its volume is evicted.
PREFIX_CACHE_MIB = 20 * 1024
_URL_WITH_SECRET = re.compile(r"://\S*[@?]")


@dataclass(frozen=True)
class ShippedSpace:
    """A search space as the job is told of it: ``word`` on its command line, ``text`` of the file beside its config, None for a
    packaged space."""

    word: str
    text: str | None
    space: Space

    @property
    def files(self) -> dict[str, str]:
        return {} if self.text is None else {SPACE_FILE: self.text}


def read_space(name_or_file: str, config: Config) -> ShippedSpace:
    """The packaged space of that name, or that in a file of this machine; it fits the config.

    Raises:
        ConfigError: no such space, a file that holds none, a key that the config lacks or a value that it refuses.
        UserError: a chain of trainings; a URL with a login or a query in the file.
    """
    if config.transfer.stages:
        raise UserError(
            "transfer.stages: a sweep runs single trainings, and this is a chain of them: sweep a stage's config by itself."
        )
    packaged = name_or_file in names()
    file = Path(name_or_file).expanduser()
    space = load_space(name_or_file if packaged else str(file))
    check(space, config)
    if packaged:
        return ShippedSpace(name_or_file, None, space)
    text = file.read_text(encoding="utf-8")
    if _URL_WITH_SECRET.search(text):
        raise UserError(
            f"--space {name_or_file} holds a URL with a login or a query: a ConfigMap is no place for secrets."
        )
    return ShippedSpace(f"{CONFIG_FOLDER}/{SPACE_FILE}", text, space)


def trial_shape(
    config: Config,
    space: Space,
    *,
    gpus: int,
    gpus_per_worker: int,
    min_gpus: int | None,
    loader_images_per_s_core: float = LOADER_IMAGES_PER_S_CORE,
    gpu_images_per_s: float = GPU_IMAGES_PER_S,
) -> Shape:
    """Pods of ``gpus_per_worker`` GPUs, each GPU with CPUs and memory for the trials' workers on it: one, or as many as share
    it where ``cluster.use_gpu`` is a fraction. Sized for the largest batch and image that the space can draw.

    Raises:
        UserError: numbers of GPUs that don't divide into pods, speeds that can't be, a GPU shared by ranks of one trial.
    """
    wish, workers = config.cluster.use_gpu, workers_of_trial(config)
    share = float(wish) if isinstance(wish, float) else 1.0
    if share < 1 < workers:
        raise UserError(
            f"cluster.use_gpu = {share:g} with cluster.num_workers = {workers}: the ranks of one training can't share a GPU; set "
            "cluster.use_gpu=true, or cluster.num_workers=1 so that trials share it."
        )
    pods = gpu_shape(
        gpus=gpus, gpus_per_worker=gpus_per_worker, min_gpus=min_gpus, global_batch_size=1, image_size_px=None,
        loader_images_per_s_core=loader_images_per_s_core, gpu_images_per_s=gpu_images_per_s,
    )  # fmt: skip
    sharing = int(1 / share + 1e-9)
    rank = rank_size(
        loader_images_per_s_core=loader_images_per_s_core,
        gpu_images_per_s=gpu_images_per_s / sharing,
        batch_images=math.ceil(max(_drawn(space, "data.global_batch_size", config.data.global_batch_size)) / workers),
        image_size_px=max(_drawn(space, "data.image_size_px", config.data.image_size_px or UNKNOWN_SIZE_PX)),
    )
    return replace(pods, ranks_per_pod=pods.ranks_per_pod * sharing, rank=rank, ranks_per_gpu=sharing)


def workers_of_trial(config: Config) -> int:
    """Workers of one trial, each with CPUs, and a GPU, of its own."""
    return max(config.cluster.num_workers, 1)


def trials_at_once(config: Config, shape: Shape) -> int:
    """How many trials the pods have room for. Raises UserError where that is none."""
    workers = workers_of_trial(config)
    if shape.ranks < workers:
        have, option = (
            (f"--gpus {shape.ranks}", "--gpus") if shape.gpu else (f"--cpu-workers {shape.pods}", "--cpu-workers")
        )
        raise UserError(
            f"{have}: no room for one trial, which has {workers} workers (cluster.num_workers); give {option} {workers} or more, "
            "a multiple of it for several trials at once, or lower cluster.num_workers."
        )
    return shape.ranks // workers


def describe_trials(config: Config, shape: Shape) -> str:
    """For the terminal: how many run at once, and what no trial can use."""
    at_once, unused = trials_at_once(config, shape), shape.ranks % workers_of_trial(config)
    left = f"; {unused} {'GPUs' if shape.gpu else 'workers'} stay unused" if unused else ""
    return f"{min(at_once, config.tune.num_trials)} of {config.tune.num_trials} trials at once{left}"


def cluster_section(config: Config, shape: Shape) -> dict[str, Any]:
    """Keys of ``cluster`` that follow from the pods: of a trial's workers, not of all."""
    wish = config.cluster.use_gpu
    share = wish if isinstance(wish, float) and shape.gpu else shape.gpu
    return {"num_workers": config.cluster.num_workers, "use_gpu": share}


def tune_section(config: Config, shipped: ShippedSpace) -> dict[str, Any]:
    """Keys of ``tune`` that name places: the space's file, and the cache, in the pod's own volume."""
    mib = config.tune.prefix_cache_mib or PREFIX_CACHE_MIB
    return {"space": shipped.word, "prefix_cache_dir": CACHE, "prefix_cache_mib": mib}


def prefix_cache_gib(config: Config) -> int:
    """What the cache volume holds beyond a training's: the prefix cache's limit, or nothing where it is off."""
    if config.tune.prefix_cache == "off":
        return 0
    return math.ceil((config.tune.prefix_cache_mib or PREFIX_CACHE_MIB) / 1024)


def check_weights(space: Space, store: Store) -> None:
    """Whether pods can see the weights that the space names. Raises UserError for files of this machine."""
    for key in ("model.weights", "model.second_weights"):
        for weights in _drawn(space, key):
            placed = store.place_weights(weights, key)
            if placed != weights:
                raise UserError(
                    f"--space: {key} = {weights!r}: trials read the space as it is; give the address, {placed}."
                )


def tune_command(sweep_folder: str, shipped: ShippedSpace) -> list[str]:
    """The job's argv: that of a submitted sweep. It resumes by name: a new sweep starts, an interrupted one goes on."""
    command = ["medtl", "tune", "--config", f"{CONFIG_FOLDER}/config.yaml", "--sweep-dir", sweep_folder, "--resume"]
    return [*command, "--space", shipped.word]


def _drawn(space: Space, key: str, *known: Any) -> list[Any]:
    """Values of a config key: ``known``, and every choice and end of a range that the space sets it to."""
    found = [knob.sets(value).get(key) for knob in space.knobs for value in knob.ends()]
    return [*known, *(value for value in found if value is not None)]

"""config and shard set → everything a training loop needs: model, preprocessing, precision, the same on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from medtl_dist import collectives
from medtl_dist.config import Config
from medtl_dist.data.label_sets import TASK
from medtl_dist.data.shards import Dataset, open_dataset
from medtl_dist.data.transforms import EvalTransform, TrainTransform
from medtl_dist.errors import MedtlError, UserError
from medtl_dist.models.backbones import Created
from medtl_dist.models.folding import fold_frozen
from medtl_dist.models.freezing import freeze, resolve_depth
from medtl_dist.models.join import create_network_of, spec_of
from medtl_dist.models.normalise import Normalisation
from medtl_dist.models.registry import BackboneSpec, native_normalisation
from medtl_dist.sections import Model
from medtl_dist.storage import StorageOptions
from medtl_dist.train import mixing
from medtl_dist.train.evaluate import Scorer
from medtl_dist.train.network import Network
from medtl_dist.train.precision import resolve
from medtl_dist.train.prefix import prefix_of

TASKS = ("binary", "multiclass", TASK)

# Makes a network, or copies one that is kept: what it depends on, the weights files that it is read from, how to make it.
Keep = Callable[[tuple[Any, ...], Iterable[str], Callable[[], Created]], Created]


class Shape(Protocol):
    """What a network must fit: a ``Dataset``, or what a checkpoint says of one."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def channels(self) -> int: ...


def open_shards(config: Config) -> Dataset:
    """The config's shard set. Raises UserError where none is named, or it is one this version cannot train on."""
    if config.data.shards is None:
        raise UserError("data.shards is not set: give the folder of a shard set, for example --set data.shards=my_set.")
    dataset = open_dataset(config.data.shards, storage_of(config))
    if dataset.task not in TASKS:
        raise UserError(f"{config.data.shards}: task {dataset.task!r} is not known; {', '.join(TASKS)} are.")
    for split in ("train", "val"):
        if not dataset.shards(split):
            raise UserError(f"{config.data.shards}: the set has no {split} images; pack it with a {split} split.")
    return dataset


def storage_of(config: Config) -> StorageOptions:
    """How the config's shard set is reached, where it lies in a store."""
    data = config.data
    return StorageOptions(
        endpoint_url=data.endpoint_url,
        ca_bundle=data.ca_bundle,
        kms_key=data.kms_key,
        anonymous=data.anonymous,
        timeout_s=data.storage_timeout_s,
        retries=data.storage_retries,
        cache_dir=data.cache_dir,
        cache_mib=data.cache_mib,
    )


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(config: Config, world_size: int) -> int:
    """Fix this rank's CPU threads (its share of the cores unless configured) and return them."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    threads = config.train.threads or max(1, available_cpus() // max(local_ranks, 1))
    torch.set_num_threads(threads)
    return threads


def create_network(
    config: Config,
    dataset: Shape,
    *,
    device: torch.device,
    rank: int,
    load_weights: bool = True,
    frozen_depth: int | None = None,
    keep: Keep | None = None,
) -> Network:
    """Build the config's network for the data set. Collective: rank 0 reads the weights, the others receive them.

    ``load_weights=False``: the caller loads a checkpoint next, so initial weights need not exist any more.
    ``frozen_depth``: None for the config's, that of epoch 0. ``keep``: where an equal network may be had from.
    Raises UserError on every rank where the weights can't be had or don't fit.
    """
    backbone = spec_of(config.model)
    depth = resolve_depth(backbone, config.model.frozen_depth if frozen_depth is None else frozen_depth)
    normalisation = normalisation_of(config, backbone, dataset.channels)
    given = config.model if rank == 0 and load_weights else _without_weights(config.model)
    sizes = (len(dataset.classes), dataset.channels, config.data.image_size_px, config.train.seed)

    def create() -> Created:
        num_outputs, in_channels, image_size_px, seed = sizes
        return create_network_of(
            given,
            num_outputs=num_outputs,
            in_channels=in_channels,
            normalisation=normalisation,
            image_size_px=image_size_px,
            seed=seed,
            storage=storage_of(config),
        )

    created = None
    failure: MedtlError | None = None
    try:
        if keep is None:
            created = create()
        else:
            frozen = {"frozen_depth", "fold_frozen"}  # come later
            key = (given.model_dump_json(exclude=frozen), *sizes, normalisation)
            created = keep(key, (given.weights, given.second_weights), create)
    except MedtlError as error:
        failure = error
    collectives.raise_together(failure)
    assert created is not None
    model = synchronised(created.model, device) if config.train.sync_batchnorm else created.model
    freeze(model, backbone, depth)
    model.to(device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if collectives.active():
        broadcast_state(model)
    num_folded = fold_frozen(model, backbone, depth) if config.model.fold_frozen else None
    message = created.message if num_folded is None else f"{created.message}; {num_folded} frozen norms folded"
    message, weights, digest = collectives.from_rank_0((message, created.weights, created.weights_sha256))
    return Network(
        model=model,
        spec=backbone,
        frozen_depth=depth,
        normalisation=normalisation,
        image_size_px=config.data.image_size_px or backbone.image_size_px,
        precision=resolve(config.train.precision, device),
        message=message,
        weights=weights,
        weights_sha256=digest,
    )


def normalisation_of(config: Config, backbone: BackboneSpec, channels: int) -> Normalisation:
    """What the config's images, grey (1 channel) or RGB, are normalised with."""
    if config.data.normalisation == "half":
        return Normalisation((0.5,) * channels, (0.5,) * channels)
    return native_normalisation(backbone, channels)


def _without_weights(model: Model) -> Model:
    return model.model_copy(update={"weights": "random", "second_weights": "random"})


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with BatchNorm over all ranks, the same tensors in it; unchanged in one process.

    Raises UserError, on every rank, on CPUs: torch has it for GPUs only.
    """
    if not collectives.active():
        return model
    if device.type != "cuda":
        raise UserError("train.sync_batchnorm = true needs a GPU per worker; on CPUs leave it false.")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def broadcast_state(model: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)


def average_buffers(model: nn.Module) -> None:
    """Give every rank the mean of the ranks' floating-point buffers (BatchNorm statistics), so that they score alike."""
    if not collectives.active():
        return
    for module in model.modules():
        if not module.training:  # frozen: its statistics are equal already, and (x + x + x) / 3 is not always x
            continue
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(dist.get_world_size())


def scorer_of(config: Config, network: Network) -> Scorer:
    """How the network scores an image of val or test."""
    return Scorer(
        model=network.model,
        transform=EvalTransform(network.image_size_px, mode=config.data.eval_view),
        normalisation=network.normalisation,
        precision=network.precision,
        device=next(network.model.parameters()).device,
        channels_last=config.train.channels_last,
        batch_size=config.data.eval_batch_size,
        views=config.evaluate.views,
        prefix=prefix_of(config, network)[0],
    )


def train_transform_of(config: Config, image_size_px: int) -> TrainTransform:
    """The config's random training view."""
    return TrainTransform(
        image_size_px,
        mode=config.data.eval_view,
        crop_area_min=config.augment.crop_area_min,
        hflip=config.augment.horizontal_flip,
        rotation_deg=config.augment.rotation_deg,
        brightness=config.augment.brightness,
        contrast=config.augment.contrast,
        right_angles=config.augment.right_angles,
        stain_jitter=config.augment.stain_jitter,
        stain_model=config.augment.stain_model,
    )


def check_augmentation(config: Config, dataset: Dataset) -> None:
    """Raises UserError where two stains are to be told apart in grey images."""
    augment = config.augment
    if augment.stain_jitter > 0 and augment.stain_model == "hematoxylin_eosin" and dataset.channels != 3:
        raise UserError(
            f"augment.stain_model = hematoxylin_eosin needs RGB images, and {dataset.folder} holds grey ones: give "
            "augment.stain_model=color, or augment.stain_jitter=0."
        )


def check_label_sets(config: Config, dataset: Dataset) -> None:
    """Raises UserError for what has no meaning where an image has several labels, some of them unknown."""
    if dataset.task != TASK:
        return
    if mixing.on(config.augment):
        raise UserError(
            f"{dataset.folder} has several labels an image, and what of a mixed image is unknown would be anyone's guess: "
            "give augment.mixup_alpha=0 and augment.cutmix_alpha=0."
        )
    if config.train.label_smoothing > 0:
        raise UserError(
            f"train.label_smoothing spreads one label over the classes, and {dataset.folder} has several labels an image: "
            "give train.label_smoothing=0."
        )


def preprocessing_of(config: Config, dataset: Dataset, network: Network) -> dict[str, Any]:
    """All that happened to an image from its file to the network, pack time included, as plain JSON values."""
    return {
        "pack": dataset.info["preprocessing"],
        "image_size_px": network.image_size_px,
        "eval_view": config.data.eval_view,
        "views": config.evaluate.views,
        "channels": dataset.channels,
        "normalisation": {"mean": list(network.normalisation.mean), "std": list(network.normalisation.std)},
    }

"""configs ─► which of them share frozen layers, and what keeping those layers' outputs would take; nothing is computed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from medtl_dist.config import Config
from medtl_dist.data.shards import Dataset
from medtl_dist.data.transforms import EvalTransform
from medtl_dist.errors import UserError
from medtl_dist.models.freezing import freeze
from medtl_dist.models.join import create_network_of, spec_of
from medtl_dist.models.registry import native_normalisation
from medtl_dist.models.split import Split, split
from medtl_dist.sections import Model
from medtl_dist.train.precision import Precision, resolve
from medtl_dist.train.prefix import Prefix, boundary_depth, rows_on, why_whole
from medtl_dist.train.prefix_cache import lineage_of, shown_from
from medtl_dist.train.setup import normalisation_of


@dataclass(frozen=True)
class Group:
    """Trainings that share what comes out of their frozen layers, or one that shares with none.

    Attributes:
        label: the same for trainings that share, in every process (no name of an entry: that needs the weights themselves).
        depth: frozen stages that they share; 0 where nothing can be kept.
        trials: places in the list of configs.
        bytes: what all of them together keep, at most.
        reason: why nothing can be kept; None: it can.
    """

    label: str
    depth: int
    trials: tuple[int, ...]
    bytes: int
    reason: str | None


@dataclass(frozen=True)
class Estimate:
    """Of one training: a boundary's ``shape`` and ``dtype`` (float32 where it could not be told: an upper bound), ``row_bytes``
    of one image's, ``num_bytes`` of all that the training would keep."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int
    num_bytes: int


def plan_groups(configs: Sequence[Config], dataset: Dataset, device: torch.device | None = None) -> list[Group]:
    """The configs grouped by what they can share on ``device`` (None: the CPU), the first one's group first.

    Raises: UserError, an unknown backbone or a depth that it does not have.
    """
    device = device or torch.device("cpu")
    members: dict[str, list[int]] = {}
    shown: dict[str, dict[str, int]] = {}
    facts: dict[str, tuple[int, str | None]] = {}
    for place, config in enumerate(configs):
        spec = spec_of(config.model)
        found = estimate(config, dataset, device)
        if isinstance(found, str):
            label = f"alone-{place}"
            members[label], shown[label], facts[label] = [place], {}, (0, found)
            continue
        prefix = _stand_in(config, dataset, device, found)
        needed = shown_from(config, prefix.image_size_px, _eval_transform(config, prefix), 0)
        told = lineage_of(config, dataset, spec, prefix, config.train.threads)
        told |= {"depth": prefix.depth, "weights": _weights_of(config), "shown": _without_turn(needed[0])}
        label = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        members.setdefault(label, []).append(place)
        facts[label] = (prefix.depth, None)
        for entry in needed:
            name = json.dumps(entry, sort_keys=True)
            shown.setdefault(label, {})[name] = _num_images(dataset, entry["split"]) * found.row_bytes
    return [
        Group(label, depth, tuple(members[label]), sum(shown[label].values()), reason)
        for label, (depth, reason) in facts.items()
    ]


def estimate(config: Config, dataset: Dataset, device: torch.device | None = None) -> Estimate | str:
    """What keeping the frozen layers' outputs of a training would take, or why they can't be kept."""
    device = device or torch.device("cpu")
    spec = spec_of(config.model)
    reason = why_whole(config, spec)
    if reason is not None:
        return reason
    size = config.data.image_size_px or spec.image_size_px
    kept = config.model.model_dump_json(
        exclude={"weights", "second_weights", "frozen_depth", "fold_frozen", "keep_head"}
    )
    found = _boundary(kept, boundary_depth(config, spec), size, resolve(config.train.precision, device))
    if isinstance(found, str):
        return found
    shape, dtype = found
    row_bytes = math.prod(shape) * dtype.itemsize
    shown = shown_from(config, size, EvalTransform(size, mode=config.data.eval_view), 0)
    num_images = sum(_num_images(dataset, entry["split"]) for entry in shown)
    return Estimate(shape, dtype, row_bytes, num_images * row_bytes)


@lru_cache(maxsize=64)
def _boundary(text: str, depth: int, size: int, precision: Precision) -> tuple[tuple[int, ...], torch.dtype] | str:
    """Shape and type of a boundary from tensors without values, or why the network can't be cut there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = Model.model_validate(json.loads(text) | {"weights": "random", "second_weights": "random"})
    spec = spec_of(model)

    def through(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        freeze(network, spec, depth)
        with torch.no_grad(), precision.autocast():
            return split(network, spec, depth).prefix(images)

    try:
        # RGB, whatever the set is: the first convolution's output is the same.
        with FakeTensorMode(allow_non_fake_inputs=True):
            created = create_network_of(
                model, num_outputs=2, in_channels=3, normalisation=native_normalisation(spec, 3), image_size_px=size, seed=0
            )  # fmt: skip
            boundary = through(created.model, torch.zeros(1, 3, size, size))
        return tuple(boundary.shape[1:]), boundary.dtype
    except UserError as error:
        return error.message
    except RuntimeError:  # a network whose making looks at values
        with torch.device("meta"):
            boundary = through(spec.build_for(size), torch.zeros(1, 3, size, size))
        return tuple(boundary.shape[1:]), torch.float32


def _stand_in(config: Config, dataset: Dataset, device: torch.device, found: Estimate) -> Prefix:
    """All of a prefix but its modules."""
    spec = spec_of(config.model)

    def nothing(inputs: Any) -> Any:
        raise NotImplementedError

    return Prefix(
        depth=boundary_depth(config, spec),
        split=Split(nothing, nothing),
        rows=rows_on(device),
        normalisation=normalisation_of(config, spec, dataset.channels),
        precision=resolve(config.train.precision, device),
        device=device,
        channels_last=config.train.channels_last,
        image_size_px=config.data.image_size_px or spec.image_size_px,
        shape=found.shape,
        dtype=found.dtype,
    )


def _eval_transform(config: Config, prefix: Prefix) -> EvalTransform:
    return EvalTransform(prefix.image_size_px, mode=config.data.eval_view)


def _weights_of(config: Config) -> list[Any]:
    """Where the weights come from; random ones from the seed."""
    model = config.model
    seeded = "random" in (model.weights, model.second_weights if model.join else "")
    return [model.weights, model.second_weights, model.zero_init_residual, config.train.seed if seeded else None]


def _without_turn(shown: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in shown.items() if key != "turn"}


def _num_images(dataset: Dataset, part: str) -> int:
    return sum(shard.samples for shard in dataset.shards(part))

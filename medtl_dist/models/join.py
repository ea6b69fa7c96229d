"""batches → model: two networks as one, side by side under a new head (concat) or one after the other (serial)."""

from __future__ import annotations

import dataclasses
import functools
from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor, fx, nn

from medtl_dist.errors import UserError
from medtl_dist.models.backbones import Created, check_image_size, create_model
from medtl_dist.models.normalise import Normalisation
from medtl_dist.models.registry import BackboneSpec, has_prefix, native_normalisation, spec
from medtl_dist.models.split import _outline
from medtl_dist.models.weights import find_weights, tensors_of
from medtl_dist.sections import Model
from medtl_dist.storage import StorageOptions

_SECOND_STREAM = 1 << 33  # the second network's random numbers are not the first's, even where both are alike


class Concat(nn.Module):
    """images float [batch, channels, height, width] → both networks' pooled features, side by side → ``head`` → logits."""

    def __init__(self, first: nn.Module, second: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(images), self.second(images)], dim=1))


class Serial(nn.Module):
    """images → the first network's last feature map → 1x1 convolution to 3 channels → resized → the second network → logits."""

    def __init__(self, first: nn.Module, adapter: nn.Conv2d, second: nn.Module, size_px: int) -> None:
        super().__init__()
        self.first, self.adapter, self.second, self.size_px = first, adapter, second, size_px

    def forward(self, images: Tensor) -> Tensor:
        maps = self.adapter(self.first(images))
        size = (self.size_px, self.size_px)
        return self.second(nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False))


def spec_of(model: Model) -> BackboneSpec:
    """What is known of the config's network, of one or of two.

    ``concat``: stage k is the k-th of both, so that a frozen depth freezes both from the input on. ``serial``: the first
    network's stages up to its last feature map, the adapter, the second network's stages.

    Raises:
        UserError: an unknown backbone, two that can't be joined.
    """
    if model.join is None:
        return spec(model.backbone)
    assert model.second_backbone is not None
    return _joined(model.join, spec(model.backbone), spec(model.second_backbone))


@functools.lru_cache(maxsize=32)
def _joined(join: str, first: BackboneSpec, second: BackboneSpec) -> BackboneSpec:
    own, others = _inside("first", first.stages), _inside("second", second.stages)
    common = {"name": f"{first.name}+{second.name}", "first_conv": f"first.{first.first_conv}", "weights_urls": ()}
    common |= {"zero_init": (), "position": None, "left_out": (), "renames": (), "hub": None}
    if join == "concat":
        if (first.mean, first.std) != (second.mean, second.std):
            raise UserError(
                f"model.join = concat: {first.name} and {second.name} were trained with different normalisations, and both see "
                "the same images: choose another model.second_backbone."
            )
        stages = tuple((*one, *other) for one, other in zip_longest(own, others, fillvalue=()))
        dim = first.feature_dim + second.feature_dim
        return dataclasses.replace(first, stages=stages, head="head", feature_dim=dim, **common)
    kept = {f"first.{name}" for name in _map_of(first)[1]}
    own = tuple(stage for stage in own if all(any(has_prefix(name, [part]) for name in kept) for part in stage))
    head, dim = f"second.{second.head}", second.feature_dim
    return dataclasses.replace(first, stages=(*own, ("adapter",), *others), head=head, feature_dim=dim, **common)


def create_network_of(
    model: Model,
    *,
    num_outputs: int,
    in_channels: int,
    normalisation: Normalisation,
    image_size_px: int | None,
    seed: int,
    storage: StorageOptions | None = None,
) -> Created:
    """The config's network with its weights, as `backbones.create_model` makes one.

    Of two networks each has weights of its own, ``weights`` and ``second_weights``, without their heads; where ``weights`` is
    a file of both (an earlier stage's), all comes from it, the head too where ``keep_head`` says so and it fits.
    ``storage``: how weights at an address are reached.

    Raises:
        UserError: as `create_model`; two networks that can't be joined; a file of two that does not fit.
    """
    weights = model.weights
    create = functools.partial(create_model, num_outputs=num_outputs, image_size_px=image_size_px, storage=storage)
    if model.join is None:
        return create(
            model.backbone, in_channels=in_channels, weights=weights, normalisation=normalisation,
            keep_head=model.keep_head, zero_init_residual=model.zero_init_residual, seed=seed,
        )  # fmt: skip
    assert model.second_backbone is not None
    joined, first_spec, second_spec = spec_of(model), spec(model.backbone), spec(model.second_backbone)
    file = find_weights(weights, first_spec, storage)
    whole = tensors_of(file) if file is not None else {}
    if not {name.partition(".")[0] for name in whole} >= {"first", "second"}:
        whole = {}
    first = create(
        model.backbone, in_channels=in_channels, weights="random" if whole else weights, normalisation=normalisation,
        keep_head=False, seed=seed,
    )  # fmt: skip
    serial = model.join == "serial"
    size_px = image_size_px or (second_spec if serial else first_spec).image_size_px
    check_image_size(second_spec, size_px)
    second = functools.partial(create_model, num_outputs=num_outputs, image_size_px=size_px, storage=storage)(
        model.second_backbone,
        in_channels=3 if serial else in_channels,
        weights="random" if whole else model.second_weights,
        normalisation=native_normalisation(second_spec, 3) if serial else normalisation,
        keep_head=False,
        seed=seed + _SECOND_STREAM,
    )
    network = _put_together(model.join, first, second, num_outputs, size_px, seed)
    if whole:
        assert file is not None
        remark = _load_whole(network, joined, whole, str(file.path), keep_head=model.keep_head)
        return Created(
            network, joined, f"{joined.name} ({model.join}): {file.label}; {remark}", file.label, file.sha256
        )
    message = f"{joined.name} ({model.join}): {first.message} | {second.message}"
    return Created(network, joined, message, f"{first.weights} and {second.weights}", first.weights_sha256)


def _put_together(join: str, first: Created, second: Created, num_outputs: int, size_px: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed + 2 * _SECOND_STREAM)
        if join == "serial":
            channels, _ = _map_of(first.spec)
            return Serial(_feature_map(first.model, first.spec), nn.Conv2d(channels, 3, 1), second.model, size_px)
        head = nn.Linear(first.spec.feature_dim + second.spec.feature_dim, num_outputs)
    for one in (first, second):
        one.model.set_submodule(one.spec.head, nn.Identity(), strict=True)
    return Concat(first.model, second.model, head)


def _load_whole(
    model: nn.Module, joined: BackboneSpec, tensors: dict[str, Tensor], path: str, *, keep_head: bool
) -> str:
    expected = model.state_dict()
    heads = [name for name in expected if has_prefix(name, [joined.head])]
    fits = all(name in tensors and tensors[name].shape == expected[name].shape for name in heads)
    if not (keep_head and fits):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in heads}
        tensors |= {name: expected[name] for name in heads}
    wrong = [
        n
        for n in {**expected, **tensors}
        if n not in tensors or n not in expected or tensors[n].shape != expected[n].shape
    ]
    if wrong:
        raise UserError(
            f"model.weights: {path} holds two joined networks that are not {joined.name}, or of sets of another colour "
            f"({len(wrong)} tensors differ, {wrong[0]} for one): give the same join and networks, and sets of one colour."
        )
    model.load_state_dict(tensors, strict=True)
    return "head from the file" if keep_head and fits else "new head"


def _inside(name: str, stages: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"{name}.{part}" for part in stage) for stage in stages)


@functools.lru_cache(maxsize=32)
def _map_of(backbone: BackboneSpec) -> tuple[int, tuple[str, ...]]:
    """(channels, tensor names) of the network up to its last feature map."""
    with torch.device("meta"), torch.no_grad():
        part = _feature_map(backbone.build_for(None).eval(), backbone)
        maps = part(torch.zeros(2, 3, backbone.image_size_px, backbone.image_size_px))
    return int(maps.shape[1]), tuple(part.state_dict())


def _feature_map(model: nn.Module, backbone: BackboneSpec) -> fx.GraphModule:
    """The network up to what goes into its last pooling, under its own tensor names, weights shared with ``model``.

    Raises UserError where there is no such pooling, as in a ViT.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in _outline(model, backbone).nodes:
        if _pools(model, node):
            graph.output(copies[cast(fx.Node, node.args[0])])
            return fx.GraphModule(model, graph)
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    raise UserError(
        f"model.join = serial: {backbone.name} has no feature map that is pooled at its end: choose another network."
    )


def _pools(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        kind = type(model.get_submodule(str(node.target))).__name__
        return "Adaptive" in kind and "Pool" in kind
    return node.op == "call_function" and "adaptive_avg_pool2d" in str(node.target)

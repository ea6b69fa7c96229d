"""model, what there is to choose from: the table of backbones, their stages, heads and native input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torchvision.models import get_model_builder, get_model_weights, get_weight

from medtl_dist.errors import UserError
from medtl_dist.models.normalise import Normalisation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneSpec:
    """What the rest of the project needs to know of an architecture. Names are those inside the model.

    A stage lists modules or single parameters; with the head, the stages hold every tensor of the model, each once.
    """

    name: str
    build: Callable[[], nn.Module]  # random weights, RGB input, the original head
    stages: tuple[tuple[str, ...], ...]  # from the input to the head
    head: str  # a nn.Linear
    first_conv: str
    feature_dim: int  # inputs of the head
    weights_urls: tuple[str, ...]  # ImageNet weights; the file name carries the start of its sha256; first = default
    zero_init: tuple[str, ...] = ()  # the last norm of each residual branch
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    image_size_px: int = 224

    @property
    def num_stages(self) -> int:
        return len(self.stages)


def spec(name: str) -> BackboneSpec:
    """The backbone called ``name``.

    Raises:
        UserError: an unknown name; the message lists the valid ones.
    """
    if name not in _BACKBONES:
        raise UserError(f"model.backbone: unknown backbone '{name}'; choose one of: {', '.join(names())}")
    return _BACKBONES[name]


def names() -> list[str]:
    """All backbones, in the order of the table."""
    return list(_BACKBONES)


def native_normalisation(backbone: BackboneSpec, in_channels: int) -> Normalisation:
    """What the backbone's ImageNet weights were trained with; for grey (1 channel) the mean of means and of stds."""
    if in_channels == 3:
        return Normalisation(backbone.mean, backbone.std)
    if in_channels == 1:
        return Normalisation((sum(backbone.mean) / 3,), (sum(backbone.std) / 3,))
    raise ValueError(f"images have 1 (grey) or 3 (RGB) channels, not {in_channels}")


def has_prefix(tensor_name: str, prefixes: Iterable[str]) -> bool:
    """Whether the tensor or module ``tensor_name`` is one of ``prefixes`` or lies inside one."""
    return any(tensor_name == prefix or tensor_name.startswith(prefix + ".") for prefix in prefixes)


def _torchvision_urls(name: str) -> tuple[str, ...]:
    """Download addresses of the ImageNet-1k weights for classification, torchvision's recommended ones first."""
    weights = get_model_weights(name)
    default = get_weight(f"{weights.__name__}.DEFAULT")
    members = sorted(weights, key=lambda member: member != default)  # stable: the others keep their order
    return tuple(member.url for member in members if member.name.startswith("IMAGENET1K"))


def _resnets() -> Iterator[BackboneSpec]:
    table = {  # blocks in layer1 to layer4, last norm of a block, feature_dim
        "resnet18": ((2, 2, 2, 2), "bn2", 512),
        "resnet34": ((3, 4, 6, 3), "bn2", 512),
        "resnet50": ((3, 4, 6, 3), "bn3", 2048),
        "resnet101": ((3, 4, 23, 3), "bn3", 2048),
        "resnet152": ((3, 8, 36, 3), "bn3", 2048),
    }
    for name, (num_blocks, last_norm, feature_dim) in table.items():
        yield BackboneSpec(
            name=name,
            build=get_model_builder(name),
            stages=(("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)),
            head="fc",
            first_conv="conv1",
            feature_dim=feature_dim,
            weights_urls=_torchvision_urls(name),
            zero_init=tuple(
                f"layer{layer}.{block}.{last_norm}"
                for layer, count in enumerate(num_blocks, start=1)
                for block in range(count)
            ),
        )


# A new family is one more function here.
_BACKBONES: dict[str, BackboneSpec] = {backbone.name: backbone for family in (_resnets,) for backbone in family()}

"""model, torchvision's part of the registry: a table of numbers per family; names, sizes and weights are torchvision's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torchvision.models import get_model_builder, get_model_weights, get_weight

from medtl_dist.models.spec import BackboneSpec


def torchvision_backbones() -> Iterator[BackboneSpec]:
    """Every torchvision backbone of the project, in the order in which the documentation lists them."""
    for family in (_alexnet, _vggs, _resnets, _inception, _densenets, _efficientnets, _convnexts, _vits):
        yield from family()


def _backbone(name: str, **fields: Any) -> BackboneSpec:
    """A record whose weights, native input size and normalisation are those that torchvision publishes for ``name``."""
    published = get_weight(f"{get_model_weights(name).__name__}.DEFAULT").transforms()
    native = {
        "build": get_model_builder(name),
        "weights_urls": _torchvision_urls(name),
        "mean": tuple(published.mean),
        "std": tuple(published.std),
        "image_size_px": published.crop_size[0],
    }
    return BackboneSpec(name=name, **(native | fields))


def _torchvision_urls(name: str) -> tuple[str, ...]:
    """Download addresses of the ImageNet-1k weights for classification, torchvision's recommended ones first."""
    weights = get_model_weights(name)
    default = get_weight(f"{weights.__name__}.DEFAULT")
    members = sorted(weights, key=lambda member: member != default)  # stable: the others keep their order
    return tuple(
        member.url
        for member in members
        if member.name.startswith("IMAGENET1K") and not member.name.endswith("FEATURES")
    )


def _alexnet() -> Iterator[BackboneSpec]:
    # A stage per layer with weights; dropout goes with the layer it feeds, and is off where that is frozen.
    convs = [(f"features.{index}",) for index in (0, 3, 6, 8, 10)]
    yield _backbone(
        "alexnet",
        stages=(*convs, ("classifier.0", "classifier.1"), ("classifier.3", "classifier.4")),
        head="classifier.6",
        first_conv="features.0",
        feature_dim=4096,
    )


def _vggs() -> Iterator[BackboneSpec]:
    table = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # convolutions a block
    for depth, blocks in table.items():
        for suffix, layers_each in (("", 2), ("_bn", 3)):  # convolution, (norm,) ReLU; a pooling layer ends the block
            stages, first = [], 0
            for count in blocks:
                stages.append(tuple(f"features.{index}" for index in range(first, first + count * layers_each)))
                first += count * layers_each + 1
            yield _backbone(
                f"vgg{depth}{suffix}",
                stages=(*stages, ("classifier.0",), ("classifier.2", "classifier.3")),
                head="classifier.6",
                first_conv="features.0",
                feature_dim=4096,
            )


def _resnets() -> Iterator[BackboneSpec]:
    table = {  # blocks in layer1 to layer4, last norm of a block, feature_dim
        "resnet18": ((2, 2, 2, 2), "bn2", 512),
        "resnet34": ((3, 4, 6, 3), "bn2", 512),
        "resnet50": ((3, 4, 6, 3), "bn3", 2048),
        "resnet101": ((3, 4, 23, 3), "bn3", 2048),
        "resnet152": ((3, 8, 36, 3), "bn3", 2048),
        "wide_resnet50_2": ((3, 4, 6, 3), "bn3", 2048),
        "wide_resnet101_2": ((3, 4, 23, 3), "bn3", 2048),
        "resnext50_32x4d": ((3, 4, 6, 3), "bn3", 2048),
        "resnext101_32x8d": ((3, 4, 23, 3), "bn3", 2048),
        "resnext101_64x4d": ((3, 4, 23, 3), "bn3", 2048),
    }
    for name, (num_blocks, last_norm, feature_dim) in table.items():
        yield _backbone(
            name,
            stages=(("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)),
            head="fc",
            first_conv="conv1",
            feature_dim=feature_dim,
            zero_init=tuple(
                f"layer{layer}.{block}.{last_norm}"
                for layer, count in enumerate(num_blocks, start=1)
                for block in range(count)
            ),
        )


def _inception() -> Iterator[BackboneSpec]:
    yield _backbone(
        "inception_v3",
        # Its published pipeline normalises as ResNet's and undoes that inside the model (transform_input): the same as 0.5.
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        build=partial(get_model_builder("inception_v3"), aux_logits=False, transform_input=False, init_weights=True),
        stages=(
            ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
            ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
            ("Mixed_5b", "Mixed_5c", "Mixed_5d"),
            ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
            ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
        ),
        head="fc",
        first_conv="Conv2d_1a_3x3.conv",
        feature_dim=2048,
        left_out=("AuxLogits",),
    )


def _densenets() -> Iterator[BackboneSpec]:
    table = {"densenet121": 1024, "densenet161": 2208, "densenet169": 1664, "densenet201": 1920}
    for name, feature_dim in table.items():
        yield _backbone(
            name,
            stages=(
                ("features.conv0", "features.norm0"),
                *((f"features.denseblock{n}", f"features.transition{n}") for n in (1, 2, 3)),
                ("features.denseblock4", "features.norm5"),
            ),
            head="classifier",
            first_conv="features.conv0",
            feature_dim=feature_dim,
            renames=((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),),
        )


def _efficientnets() -> Iterator[BackboneSpec]:
    table = dict(zip((f"b{n}" for n in range(8)), (1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560), strict=True))
    table |= {"v2_s": 1280, "v2_m": 1280, "v2_l": 1280}
    for name, feature_dim in table.items():
        yield _backbone(
            f"efficientnet_{name}",
            stages=tuple((f"features.{n}",) for n in range(8 if name == "v2_s" else 9)),
            head="classifier.1",
            first_conv="features.0.0",
            feature_dim=feature_dim,
        )


def _convnexts() -> Iterator[BackboneSpec]:
    table = {"convnext_tiny": 768, "convnext_small": 768, "convnext_base": 1024, "convnext_large": 1536}
    for name, feature_dim in table.items():
        yield _backbone(
            name,
            # A stage is the reduction of the resolution and the blocks after it; the norm before the head ends the last.
            stages=(
                ("features.0",),
                ("features.1",),
                ("features.2", "features.3"),
                ("features.4", "features.5"),
                ("features.6", "features.7", "classifier.0"),
            ),
            head="classifier.2",
            first_conv="features.0.0",
            feature_dim=feature_dim,
        )


def _vits() -> Iterator[BackboneSpec]:
    table = {  # patch, layers, feature_dim
        "vit_b_16": (16, 12, 768),
        "vit_b_32": (32, 12, 768),
        "vit_l_16": (16, 24, 1024),
        "vit_l_32": (32, 24, 1024),
        "vit_h_14": (14, 32, 1280),
    }
    for name, (patch_px, num_layers, feature_dim) in table.items():
        layers = [(f"encoder.layers.encoder_layer_{n}",) for n in range(num_layers)]
        yield _backbone(
            name,
            build=partial(_build_vit, name),
            stages=(
                ("conv_proj", "class_token", "encoder.pos_embedding", "encoder.dropout"),
                *layers[:-1],
                (*layers[-1], "encoder.ln"),
            ),
            head="heads.head",
            first_conv="conv_proj",
            feature_dim=feature_dim,
            patch_px=patch_px,
            position="encoder.pos_embedding",
            renames=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
        )


def _build_vit(name: str, image_size_px: int = 224) -> nn.Module:
    return get_model_builder(name)(image_size=image_size_px)

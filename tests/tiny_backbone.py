"""A network with a ResNet's names and a thousandth of its weights, where a test is about training and not about networks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from torch import nn

from medtl_dist.models import registry

NAME = "tiny"
_WIDTH = 8


def _block(stride: int) -> nn.Sequential:
    conv = nn.Conv2d(_WIDTH, _WIDTH, 3, stride, 1, bias=False)
    return nn.Sequential(OrderedDict(conv1=conv, bn1=nn.BatchNorm2d(_WIDTH), relu=nn.ReLU()))


def build(dropout: float = 0.0) -> nn.Module:
    """Stages conv1 + bn1, layer1 … layer4, head fc."""
    parts: dict[str, Any] = {"conv1": nn.Conv2d(3, _WIDTH, 3, 2, 1, bias=False), "bn1": nn.BatchNorm2d(_WIDTH)}
    parts |= {f"layer{number}": _block(1 + number % 2) for number in range(1, 5)}
    parts["layer4"].append(nn.Dropout(dropout))
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(_WIDTH, 1000)}
    return nn.Sequential(OrderedDict(parts))


@contextlib.contextmanager
def tiny_registered() -> Iterator[None]:
    """``model.backbone=tiny`` inside, or ``tiny_dropout``; every rank registers for itself."""
    spec = dataclasses.replace(
        registry.spec("resnet18"), name=NAME, build=build, feature_dim=_WIDTH, weights_urls=(), zero_init=()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._BACKBONES, NAME, spec)
        dropping = dataclasses.replace(spec, name=f"{NAME}_dropout", build=partial(build, 0.3))
        patch.setitem(registry._BACKBONES, dropping.name, dropping)
        yield

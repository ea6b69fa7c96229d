"""Folded convolutions against the unfolded model: the same numbers within rounding, the same files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from shard_sets import write_set
from torch import Tensor, nn

from medtl_dist.config import load_config
from medtl_dist.models.backbones import create_model, native_normalisation, spec
from medtl_dist.models.folding import fold_frozen
from medtl_dist.models.freezing import freeze
from medtl_dist.models.split import split
from medtl_dist.train.setup import create_network


def learned(name: str, *, in_channels: int = 3, size: int = 64) -> nn.Module:
    """A model whose norms have statistics and weights of their own, as after training."""
    normalisation = native_normalisation(spec(name), in_channels)
    model = create_model(
        name, num_outputs=3, in_channels=in_channels, weights="random", normalisation=normalisation, seed=0
    ).model
    generator = torch.Generator().manual_seed(1)
    model(torch.randn((4, in_channels, size, size), generator=generator))  # statistics of something
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.copy_(torch.rand(part.weight.shape, generator=generator) + 0.5)
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator) * 0.2)
    return model.eval()


def images_of(model: nn.Module, in_channels: int, size: int = 64) -> Tensor:
    return torch.randn((2, in_channels, size, size), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("name", "in_channels", "pairs"),
    [
        ("resnet18", 1, 20),
        ("resnet50", 3, 53),
        ("densenet121", 1, 59),  # the first, and one of the two norms of each of its 58 layers
        ("efficientnet_b0", 3, 49),
        ("vgg11_bn", 3, None),
        ("timm/tf_efficientnet_lite0", 1, 49),
        ("timm/resnet18", 3, 20),
    ],
)
def test_folded_equals_unfolded_in_float32(name: str, in_channels: int, pairs: int | None) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    if pairs is None:  # half a gigabyte for nothing new: the layers of a VGG are enough
        with torch.device("meta"):
            model = spec(name).build()
        assert fold_frozen(model, spec(name), "all") == 8
        return
    model, backbone = learned(name, in_channels=in_channels), spec(name)
    freeze(model, backbone, "all")
    images = images_of(model, in_channels)
    with torch.no_grad():
        expected = model(images)
        prefix = split(model, backbone, "all").prefix(images)
        assert fold_frozen(model, backbone, "all") == pairs
        result = model(images)
        folded_prefix = split(model, backbone, "all").prefix(images)
    # Other roundings of 2^-24 in each of up to 120 layers; not one bit of difference would mean that nothing was folded.
    assert 0 < (result - expected).norm() < 1e-4 * expected.norm()
    torch.testing.assert_close(folded_prefix, prefix, rtol=1e-4, atol=1e-4 * float(prefix.abs().max()))


def test_only_the_frozen_stages_are_folded_and_zero_undoes_it() -> None:
    model, backbone = learned("resnet18"), spec("resnet18")
    images = images_of(model, 3)
    with torch.no_grad():
        expected = model(images)
        assert fold_frozen(model, backbone, 2) == 5  # the stem and two blocks of two
        assert {name for name, part in model.named_modules() if "forward" in vars(part)} == {
            "conv1", "bn1", *(f"layer1.{block}.{kind}{n}" for block in (0, 1) for kind in ("conv", "bn") for n in (1, 2))
        }  # fmt: skip
        assert fold_frozen(model, backbone, 1) == 1
        assert fold_frozen(model, backbone, 0) == 0
        assert torch.equal(model(images), expected)


def test_saved_tensors_know_nothing_of_folding() -> None:
    model, backbone = learned("resnet18", in_channels=1), spec("resnet18")
    before = save({name: tensor.clone() for name, tensor in model.state_dict().items()})
    freeze(model, backbone, 3)
    fold_frozen(model, backbone, 3)
    with torch.no_grad():
        folded = model(images_of(model, 1))
    assert save(dict(model.state_dict())) == before
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in learned("resnet18").named_buffers()]
    other = create_model(
        "resnet18",
        num_outputs=3,
        in_channels=1,
        weights="random",
        normalisation=native_normalisation(backbone, 1),
        seed=9,
    ).model
    freeze(other.eval(), backbone, 3)
    fold_frozen(other, backbone, 3)
    with torch.no_grad():
        assert not torch.equal(other(images_of(model, 1)), folded)
        other.load_state_dict(load(before))  # after a first pass: what was folded then must not stay
        assert torch.equal(other(images_of(model, 1)), folded)


def test_the_config_folds_and_builds_for_the_images_size(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [4], "val": [4]})
    overrides = ["model.weights=random", "model.frozen_depth=2", "model.fold_frozen=true", "data.image_size_px=64"]
    for backbone, remark in (("resnet18", "5 frozen norms folded"), ("vit_b_32", "0 frozen norms folded")):
        config = load_config(overrides=[*overrides, f"model.backbone={backbone}"])
        network = create_network(config, dataset, device=torch.device("cpu"), rank=0)
        assert remark in network.message
        with torch.no_grad():
            outputs = network.model.eval()(torch.zeros(1, dataset.channels, 64, 64))
        assert outputs.shape == (1, len(dataset.classes))


def test_a_copy_folds_on_its_own() -> None:
    model, backbone = learned("resnet18"), spec("resnet18")
    freeze(model, backbone, "all")
    fold_frozen(model, backbone, "all")
    images = images_of(model, 3)
    with torch.no_grad():
        expected = model(images)
        twin = copy.deepcopy(model)
        twin.get_submodule("conv1").weight.mul_(2)  # type: ignore[operator]
        assert not torch.equal(twin(images), expected)
        assert torch.equal(model(images), expected)


def test_what_learns_still_learns_above_folded_layers() -> None:
    model, backbone = learned("resnet18"), spec("resnet18")
    freeze(model, backbone, 4)
    model.train()
    plain = copy.deepcopy(model)
    fold_frozen(model, backbone, 4)
    for one in (plain, model):
        one(images_of(model, 3)).square().sum().backward()
    for (name, parameter), (_, reference) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if parameter.grad is not None and reference.grad is not None:
            assert (parameter.grad - reference.grad).norm() <= 1e-3 * reference.grad.norm(), name

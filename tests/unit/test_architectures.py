"""Every registered backbone: structure on the meta device for all, real numbers for small members of each family."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from medtl_dist.models.backbones import create_model
from medtl_dist.models.freezing import freeze, frozen_parameter_names
from medtl_dist.models.grey import GreyConv2d, grey_conv
from medtl_dist.models.normalise import normalise
from medtl_dist.models.registry import names, spec
from medtl_dist.models.spec import has_prefix, native_normalisation
from medtl_dist.models.split import separable, split

SMALL = {  # the smallest member of each family, at the smallest size it can take or near it
    "alexnet": 64,
    "vgg11_bn": 32,
    "resnext50_32x4d": 32,
    "inception_v3": 75,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "convnext_tiny": 32,
    "vit_b_32": 64,
    "timm/tf_efficientnet_lite0": 33,
    "timm/vit_tiny_patch16_224": 32,
    "timm/convnext_atto": 32,
}


@cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return spec(name).build_for(None)


def small_model(name: str, *, in_channels: int = 3, weights: str = "random", seed: int = 0) -> nn.Module:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    return create_model(
        name,
        num_outputs=3,
        in_channels=in_channels,
        weights=weights,
        normalisation=native_normalisation(spec(name), in_channels),
        image_size_px=SMALL[name],
        seed=seed,
    ).model


def random_images(name: str, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = SMALL[name]
    return torch.randint(0, 256, (2, channels, size, size), dtype=torch.uint8, generator=generator)


def inputs(name: str, channels: int = 3) -> Tensor:
    return normalise(random_images(name, channels), native_normalisation(spec(name), channels))


@pytest.mark.parametrize("name", names())
def test_the_record_describes_the_model(name: str) -> None:
    backbone, model = spec(name), on_meta(name)
    parts = [*backbone.stages, (backbone.head,)]
    for tensor in model.state_dict():
        assert sum(has_prefix(tensor, part) for part in parts) == 1, tensor
    known = {*dict(model.named_modules()), *dict(model.named_parameters())}
    assert all(prefix in known for part in parts for prefix in part)
    head, first_conv = model.get_submodule(backbone.head), model.get_submodule(backbone.first_conv)
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features) == (backbone.feature_dim, 1000)
    assert isinstance(first_conv, nn.Conv2d)
    assert isinstance(grey_conv(first_conv, native_normalisation(backbone, 3), native_normalisation(backbone, 1)), GreyConv2d)
    assert next(iter(model.named_parameters()))[0].startswith((backbone.first_conv, *backbone.stages[0]))
    last_norms = {
        f"{key}.bn{2 if isinstance(block, BasicBlock) else 3}"
        for key, block in model.named_modules()
        if isinstance(block, BasicBlock | Bottleneck)
    }
    assert set(backbone.zero_init) == last_norms
    assert separable(model, backbone)


@pytest.mark.parametrize("name", names())
def test_every_depth_freezes_its_stages_and_no_dropout_is_left_on_below(name: str) -> None:
    backbone, model = spec(name), on_meta(name)
    model.train()
    for depth in range(backbone.num_stages + 1):
        freeze(model, backbone, depth)
        stages = [prefix for stage in backbone.stages[:depth] for prefix in stage]
        frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen == set(frozen_parameter_names(model, backbone, depth))
        assert frozen == {key for key, _ in model.named_parameters() if has_prefix(key, stages)}
        if depth == backbone.num_stages:
            assert set(dict(model.named_parameters())) - frozen == {f"{backbone.head}.weight", f"{backbone.head}.bias"}
    freeze(model, backbone, 0)


@pytest.mark.parametrize("name", names())
def test_forward_and_backward_reach_what_is_not_frozen(name: str) -> None:
    backbone, model = spec(name), on_meta(name)
    depth = backbone.num_stages // 2 + 1
    freeze(model, backbone, depth)
    model.train()
    model.zero_grad(set_to_none=True)
    size = backbone.image_size_px
    parts = split(model, backbone, depth)
    boundary = parts.prefix(torch.zeros(2, 3, size, size, device="meta"))
    assert boundary.shape[0] == 2
    assert not boundary.requires_grad
    logits = parts.suffix(boundary)
    assert logits.shape == (2, 1000)
    logits.sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), key
    assert model(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 1000)
    model.zero_grad(set_to_none=True)
    freeze(model, backbone, 0)


@pytest.mark.parametrize("name", SMALL)
def test_only_what_should_move_moves_at_each_depth(name: str) -> None:
    backbone, model = spec(name), shrunk(small_model(name))
    images, labels = inputs(name), torch.tensor([0, 2])
    model.train()
    for depth in range(backbone.num_stages + 1):
        freeze(model, backbone, depth)
        stages = [prefix for stage in backbone.stages[:depth] for prefix in stage]
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        torch.manual_seed(0)  # dropout and stochastic depth
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
        after = model.state_dict()
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        assert not {key for key in moved if has_prefix(key, stages)}
        # A value of zero stays zero where no gradient reaches it (a bias behind dead units); weights all move.
        still = {key for key in after if key not in moved and not has_prefix(key, stages)}
        assert all(before[key].count_nonzero() == 0 for key in still), still
        assert f"{backbone.head}.weight" in moved


@pytest.mark.parametrize("name", SMALL)
def test_prefix_then_suffix_is_the_model_to_the_last_bit(name: str) -> None:
    backbone, model = spec(name), shrunk(small_model(name))
    images = inputs(name)
    with torch.no_grad():
        whole = model.eval()(images)
        assert whole.shape == (2, 3)
        for depth in range(backbone.num_stages + 1):
            parts = split(model, backbone, depth)
            boundary = parts.prefix(images)
            assert isinstance(boundary, Tensor)
            kept = boundary.clone()
            assert torch.equal(parts.suffix(boundary), whole)
            assert torch.equal(boundary, kept), "the suffix wrote into what a cache would hold"
            if depth == backbone.num_stages:
                assert boundary.flatten(1).shape == (2, model.get_submodule(backbone.head).in_features)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SMALL)
def test_training_keeps_activations_of_the_suffix_only(name: str) -> None:
    backbone, model = spec(name), shrunk(small_model(name))
    images = inputs(name)
    model.train()
    for depth in (1, backbone.num_stages - 1):
        freeze(model, backbone, depth)
        parts = split(model, backbone, depth)
        torch.manual_seed(0)
        whole = saved_bytes(lambda: model(images))
        torch.manual_seed(0)
        boundary = parts.prefix(images)
        assert whole == saved_bytes(lambda: parts.suffix(boundary)), depth  # noqa: B023


def saved_bytes(forward) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    del output
    return sum(kept.values())


@pytest.mark.parametrize("name", SMALL)
def test_weights_come_back_from_a_file_and_grey_is_replicated_rgb(name: str, tmp_path: Path) -> None:
    model = small_model(name).eval()
    path = tmp_path / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    loaded = small_model(name, weights=str(path), seed=1).eval()
    grey = small_model(name, in_channels=1, weights=str(path), seed=1).eval()
    path.unlink()
    grey_images = random_images(name, 1)
    with torch.no_grad():
        assert torch.equal(loaded(inputs(name)), model(inputs(name)))
        rgb = native_normalisation(spec(name), 3)
        expected = model(normalise(grey_images.expand(-1, 3, -1, -1), rgb))
        result = grey(normalise(grey_images, native_normalisation(spec(name), 1)))
    assert (result - expected).norm() < 1e-4 * expected.norm()  # float32 through the whole network


def shrunk(model: nn.Module) -> nn.Module:
    """AlexNet and VGG with 16 hidden units instead of 4096: the same layers, without half a gigabyte of weights."""
    classifier = getattr(model, "classifier", None)
    linear = [key for key, part in model.named_modules() if isinstance(part, nn.Linear) and key.startswith("classifier")]
    if not isinstance(classifier, nn.Sequential) or len(linear) != 3:
        return model
    torch.manual_seed(0)
    first = model.get_submodule(linear[0])
    assert isinstance(first, nn.Linear)
    for key, layer in zip(
        linear, (nn.Linear(first.in_features, 16), nn.Linear(16, 16), nn.Linear(16, 3)), strict=True
    ):
        model.set_submodule(key, layer)
    return model

"""Every registered backbone: structure on the meta device for all, real numbers for small members of each family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
from medtl_dist.models.spec import BackboneSpec, has_prefix, native_normalisation
from medtl_dist.models.split import separable, split
from medtl_dist.models.weights import find_weights, load_weights

SMALL = {  # a small member of each family (VGG is built like AlexNet), at the smallest size it can take or near it
    "alexnet": 64,
    "resnext50_32x4d": 32,
    "inception_v3": 75,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "convnext_tiny": 32,
    "vit_b_32": 64,
    "timm/tf_efficientnet_lite0": 33,
    "timm/vit_tiny_patch16_224": 32,
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
    assert isinstance(
        grey_conv(first_conv, native_normalisation(backbone, 3), native_normalisation(backbone, 1)), GreyConv2d
    )
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
def test_native_images_pass_through_prefix_and_suffix(name: str) -> None:
    backbone, model = spec(name), on_meta(name)
    depth = backbone.num_stages // 2 + 1
    size = backbone.image_size_px
    parts = split(model, backbone, depth)
    with torch.no_grad():
        boundary = parts.prefix(torch.zeros(2, 3, size, size, device="meta"))
        assert boundary.shape[0] == 2
        assert parts.suffix(boundary).shape == (2, 1000)


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """A model with random weights, made once; whoever changes it copies it."""
    return request.param, small_model(request.param)


def test_only_what_should_move_moves_at_each_depth(small: tuple[str, nn.Module]) -> None:
    name, model = small[0], narrow(small[1])
    backbone = spec(name)
    images, labels = inputs(name), torch.tensor([0, 2])
    model.train()
    for depth in depths_of(backbone):
        freeze(model, backbone, depth)
        stages = [prefix for stage in backbone.stages[:depth] for prefix in stage]
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        torch.manual_seed(0)  # dropout and stochastic depth
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.SGD(learning, lr=0.05, weight_decay=0.1)
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)  # BatchNorm over two values: gradients of 10^7
        optimiser.step()
        optimiser.zero_grad()
        after = model.state_dict()
        assert all(tensor.isfinite().all() for tensor in after.values())
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        assert not {key for key in moved if has_prefix(key, stages)}
        # Weight decay moves every value but 0, which stays where no gradient comes: a bias behind units that are off.
        still = {key for key in after if key not in moved and not has_prefix(key, stages)}
        assert all(before[key].count_nonzero() == 0 for key in still), still
        assert f"{backbone.head}.weight" in moved


def test_prefix_then_suffix_is_the_model_to_the_last_bit(small: tuple[str, nn.Module]) -> None:
    name, model = small
    backbone, images = spec(name), inputs(name)
    with torch.no_grad():
        whole = model.eval()(images)
        assert whole.shape == (2, 3)
        boundary = images
        for depth in depths_of(backbone):
            parts = split(model, backbone, depth)
            boundary = parts.prefix(images)
            assert isinstance(boundary, Tensor)
            kept = boundary.clone()
            assert torch.equal(parts.suffix(boundary), whole)
            assert torch.equal(boundary, kept), "the suffix wrote into what a cache would hold"
    assert boundary.flatten(1).shape == (2, backbone.feature_dim)


def test_training_keeps_activations_of_the_suffix_only(small: tuple[str, nn.Module]) -> None:
    name, model = small[0], narrow(small[1])
    backbone, images = spec(name), inputs(name)
    model.train()
    for depth in (1, backbone.num_stages - 1):
        freeze(model, backbone, depth)
        parts = split(model, backbone, depth)
        boundary = parts.prefix(images)
        assert saved_bytes(model, images) == saved_bytes(parts.suffix, boundary) > 0


def test_dropout_before_the_head_stays_with_the_head() -> None:
    name = "inception_v3"
    model, backbone = small_model(name), spec(name)
    freeze(model, backbone, "all")
    model.train()
    parts = split(model, backbone, "all")
    boundaries, logits = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        boundaries.append(parts.prefix(inputs(name)))
        logits.append(parts.suffix(torch.ones_like(boundaries[0])).detach())  # random features are close to 0
    assert torch.equal(*boundaries)
    assert not torch.equal(*logits)


def depths_of(backbone: BackboneSpec) -> Sequence[int]:
    """Every depth; of a transformer's dozen equal layers the first, one in the middle and the last."""
    last = backbone.num_stages
    return range(last + 1) if last < 11 else (0, 1, 6, last - 1, last)


def saved_bytes(forward: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # dropout and stochastic depth
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward(images)
    assert output.requires_grad
    return sum(kept.values())


def test_weights_come_back_from_a_file_and_grey_is_replicated_rgb(small: tuple[str, nn.Module], tmp_path: Path) -> None:
    name, model = small
    model.eval()
    rgb, grey = native_normalisation(spec(name), 3), native_normalisation(spec(name), 1)
    path = tmp_path / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    file = find_weights(str(path), spec(name))
    assert file is not None
    load_weights(loaded, spec(name), file, rgb, grey)
    one_channel = small_model(name, in_channels=1, weights=str(path), seed=1).eval()
    path.unlink()
    images = random_images(name, 1)
    with torch.no_grad():
        expected = model(normalise(images.expand(-1, 3, -1, -1), rgb))
        assert torch.equal(loaded(normalise(images.expand(-1, 3, -1, -1), rgb)), expected)
        result = one_channel(normalise(images, grey))
    assert (result - expected).norm() < 1e-4 * expected.norm()  # float32 through the whole network


def narrow(model: nn.Module) -> nn.Module:
    """A copy; AlexNet's with 16 hidden units instead of 4096: the same layers without a quarter of a gigabyte."""
    linear = [
        key for key, part in model.named_modules() if isinstance(part, nn.Linear) and key.startswith("classifier.")
    ]
    if len(linear) != 3:
        return copy.deepcopy(model)
    first = model.get_submodule(linear[0])
    assert isinstance(first, nn.Linear)
    torch.manual_seed(0)
    layers = (nn.Linear(first.in_features, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    wide = {key: model.get_submodule(key) for key in linear}
    for key, layer in zip(linear, layers, strict=True):
        model.set_submodule(key, layer)
    copied = copy.deepcopy(model)
    for key, layer in wide.items():
        model.set_submodule(key, layer)
    return copied

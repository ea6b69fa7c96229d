from __future__ import annotations

import pickle
from collections import Counter

import pytest
import torch
from torchvision.models import get_model

from medtl_dist.errors import UserError
from medtl_dist.models.backbones import Created, check_image_size, create_model, names, native_normalisation, spec
from medtl_dist.models.grey import GreyConv2d
from medtl_dist.models.normalise import Normalisation
from medtl_dist.models.spec import has_prefix

GREY = native_normalisation(spec("resnet18"), 1)
RGB = native_normalisation(spec("resnet18"), 3)


def create(
    backbone: str = "resnet18", *, in_channels: int = 3, num_outputs: int = 2, seed: int = 0, zero_init: bool = False
) -> Created:
    return create_model(
        backbone,
        num_outputs=num_outputs,
        in_channels=in_channels,
        weights="random",
        normalisation=RGB if in_channels == 3 else GREY,
        zero_init_residual=zero_init,
        seed=seed,
    )


def test_the_families_are_there() -> None:
    number = Counter(name.split("_")[0].rstrip("0123456789") for name in names())
    assert number == {
        "alexnet": 1,
        "vgg": 8,
        "resnet": 5,
        "wide": 2,
        "resnext": 3,
        "inception": 1,
        "densenet": 4,
        "efficientnet": 11,
        "convnext": 4,
        "vit": 5,
    }


def test_a_prefix_ends_at_a_dot() -> None:
    assert has_prefix("layer1", ["layer1"])
    assert has_prefix("layer1.0.bn1.weight", ["conv1", "layer1"])
    assert not has_prefix("layer10.0.weight", ["layer1"])


def test_recommended_imagenet_weights_come_first() -> None:
    assert spec("resnet101").weights_urls[0].endswith("/resnet101-cd907fc2.pth")
    assert spec("resnet50").weights_urls[0].endswith("/resnet50-11ad3fa6.pth")
    assert len(spec("resnet18").weights_urls) == 1


def test_specs_are_picklable() -> None:
    assert pickle.loads(pickle.dumps(spec("resnet34"))) == spec("resnet34")  # noqa: S301


def test_an_unknown_backbone_lists_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"unknown backbone 'resnet20' \(did you mean resnet\d+\?\); .*resnet18, .*timm/NAME$"
    ):
        spec("resnet20")


def test_native_normalisation_of_grey_is_the_mean_of_the_channels() -> None:
    assert Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) == RGB
    assert pytest.approx((0.449, 0.226)) == (GREY.mean[0], GREY.std[0])
    with pytest.raises(ValueError, match=r"1 \(grey\) or 3 \(RGB\) channels, not 4"):
        native_normalisation(spec("resnet18"), 4)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_logits_have_a_column_per_output(name: str, in_channels: int) -> None:
    created = create(name, in_channels=in_channels, num_outputs=5)
    assert created.model.training
    assert all(parameter.requires_grad for parameter in created.model.parameters())
    assert isinstance(created.model.get_submodule("conv1"), GreyConv2d) == (in_channels == 1)
    with torch.no_grad():
        assert created.model(torch.zeros(2, in_channels, 33, 40)).shape == (2, 5)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_tensor_names_are_torchvisions(in_channels: int) -> None:
    ours = set(create(in_channels=in_channels).model.state_dict())
    with torch.device("meta"):
        theirs = set(get_model("resnet18").state_dict())
    assert ours - theirs == ({"conv1.offset"} if in_channels == 1 else set())


def test_random_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = create(seed=7).model.state_dict()
    torch.manual_seed(2)
    again, other = create(seed=7).model.state_dict(), create(seed=8).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    create(in_channels=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_new_head_is_the_same_whatever_the_backbone_drew() -> None:
    assert torch.equal(create("resnet18", seed=3).model.fc.weight, create("resnet34", seed=3).model.fc.weight)  # type: ignore[union-attr]


def test_random_weights_say_so() -> None:
    created = create(seed=4, zero_init=True)
    assert created.weights == "random initial weights"
    assert created.weights_sha256 is None
    assert created.message == "resnet18: random initial weights; seed 4; residual branches start at zero"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_starts_every_block_as_the_identity(name: str) -> None:
    model = create(name, zero_init=True).model.eval()
    zero = Counter(torch.count_nonzero(model.get_parameter(f"{norm}.weight")).item() for norm in spec(name).zero_init)
    assert zero == {0: len(spec(name).zero_init)}
    block = model.get_submodule("layer2.1")  # without a downsampling path
    generator = torch.Generator().manual_seed(0)
    activations = torch.rand((2, 128 if name == "resnet18" else 512, 6, 6), generator=generator)
    with torch.no_grad():
        assert torch.equal(block(activations), activations)


def test_zero_init_of_given_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"zero_init_residual=true would erase part of the weights .*imagenet"):
        create_model(
            "resnet18",
            num_outputs=2,
            in_channels=3,
            weights="imagenet",
            normalisation=RGB,
            zero_init_residual=True,
            seed=0,
        )


def test_zero_init_without_residual_branches_is_refused() -> None:
    with pytest.raises(UserError, match=r"zero_init_residual=true goes with the ResNets, not with alexnet"):
        create("alexnet", zero_init=True)


@pytest.mark.parametrize(
    ("backbone", "size", "told"),
    [
        ("inception_v3", 48, r"data\.image_size_px=48 is nothing that inception_v3 can take .* own size is 299$"),
        ("vit_b_16", 100, r"own size is 224, a multiple of 16$"),
    ],
)
def test_images_of_an_impossible_size_are_refused(backbone: str, size: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_image_size(spec(backbone), size)


@pytest.mark.parametrize(
    ("backbone", "size"), [("resnet18", 32), ("resnet18", 999), ("inception_v3", 75), ("vit_b_32", 64)]
)
def test_images_of_a_possible_size_pass(backbone: str, size: int) -> None:
    check_image_size(spec(backbone), size)


def test_channels_that_contradict_the_normalisation_are_refused() -> None:
    with pytest.raises(ValueError, match="normalisation has 3 channels, the images have 1"):
        create_model("resnet18", num_outputs=2, in_channels=1, weights="random", normalisation=RGB, seed=0)

"""The grey first convolution against its definition: the RGB network on the image replicated in three channels."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medtl_dist.models.backbones import create_model, native_normalisation, spec
from medtl_dist.models.grey import GreyConv2d, grey_conv, grey_from_rgb, rgb_from_grey
from medtl_dist.models.normalise import Normalisation, normalise

NATIVE_RGB = native_normalisation(spec("resnet18"), 3)
NATIVE_GREY = native_normalisation(spec("resnet18"), 1)
HALF_RGB, HALF_GREY = Normalisation((0.5,) * 3, (0.5,) * 3), Normalisation((0.5,), (0.5,))
PAIRS = [(NATIVE_RGB, NATIVE_GREY), (HALF_RGB, HALF_GREY), (NATIVE_RGB, HALF_GREY)]
PAIR_IDS = ["native", "half", "native-rgb-half-grey"]


def random_grey(height: int, width: int, num: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 1, height, width), dtype=torch.uint8, generator=generator)


def random_conv(kernel: int = 7, stride: int = 2, padding: int = 3, bias: bool = False, seed: int = 0) -> nn.Conv2d:
    conv = nn.Conv2d(3, 8, kernel, stride, padding, bias=bias, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return conv


def replicated(images: torch.Tensor, rgb: Normalisation, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normalise(images.expand(-1, 3, -1, -1), rgb, dtype)


CONVS = st.builds(
    random_conv,
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 4),
    bias=st.booleans(),
)
SIZES = st.tuples(st.integers(7, 20), st.integers(7, 20))
MEANS = st.tuples(*[st.floats(0, 1)] * 4)
STDS = st.tuples(*[st.floats(0.1, 1)] * 4)


@settings(deadline=None, max_examples=40)
@given(conv=CONVS, size=SIZES, means=MEANS, stds=STDS)
def test_equals_the_rgb_convolution_everywhere(
    conv: nn.Conv2d, size: tuple[int, int], means: tuple[float, ...], stds: tuple[float, ...]
) -> None:
    rgb, grey = Normalisation(means[:3], stds[:3]), Normalisation(means[3:], stds[3:])
    images = random_grey(*size)
    expected = conv(replicated(images, rgb))
    result = grey_conv(conv, rgb, grey)(normalise(images, grey, torch.float64))
    # float64: sums of at most 147 products of size ~10, rounded at 1e-16 each
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("rgb", "grey"), PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 9)], ids=str)
def test_borders_and_inside_agree_at_native_statistics(
    rgb: Normalisation, grey: Normalisation, size: tuple[int, int]
) -> None:
    images = random_grey(*size)
    conv = random_conv()
    expected = conv(replicated(images, rgb))
    difference = (grey_conv(conv, rgb, grey)(normalise(images, grey, torch.float64)) - expected).abs()
    assert difference.max() < 1e-12 * expected.abs().max()
    for border in (difference[:, :, 0], difference[:, :, -1], difference[..., 0], difference[..., -1]):
        assert border.max() < 1e-12 * expected.abs().max()


def test_a_bias_could_not_do_what_the_offset_does() -> None:
    conv, images = random_conv(), random_grey(32, 32)
    twin = grey_conv(conv, NATIVE_RGB, NATIVE_GREY)
    expected = conv(replicated(images, NATIVE_RGB))
    with torch.no_grad():
        bias = twin.offset.sum(dim=(1, 2, 3)).view(1, -1, 1, 1)
        twin.offset.zero_()
        difference = (twin(normalise(images, NATIVE_GREY, torch.float64)) + bias - expected).abs()
    assert difference[:, :, 2:-2, 2:-2].max() < 1e-10
    assert difference[:, :, 0].max() > 0.01


def test_equal_normalisation_of_the_channels_needs_no_offset() -> None:
    _, offset = grey_from_rgb(random_conv().weight.detach(), HALF_RGB, HALF_GREY)
    assert torch.count_nonzero(offset) == 0


@pytest.mark.parametrize(("rgb", "grey"), PAIRS, ids=PAIR_IDS)
def test_float32_convolution_within_rounding(rgb: Normalisation, grey: Normalisation) -> None:
    conv = random_conv().float()
    images = random_grey(33, 32)
    expected = conv(replicated(images, rgb, torch.float32))
    result = grey_conv(conv, rgb, grey)(normalise(images, grey))
    # 147 products of size ~3 to 10, each rounded at 6e-8, in another order
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "grey"),
    [("resnet18", NATIVE_GREY), ("resnet18", HALF_GREY), ("resnet50", NATIVE_GREY)],
    ids=["resnet18-native", "resnet18-half", "resnet50-native"],
)
def test_whole_network_equals_replicated_rgb_at_initialisation(backbone: str, grey: Normalisation) -> None:
    rgb = NATIVE_RGB if grey == NATIVE_GREY else HALF_RGB
    images = random_grey(45, 32)
    options = {"num_outputs": 3, "weights": "random", "seed": 5}
    one = create_model(backbone, in_channels=1, normalisation=grey, **options).model.eval()
    three = create_model(backbone, in_channels=3, normalisation=rgb, **options).model.eval()
    with torch.no_grad():
        result, expected = one(normalise(images, grey)), three(replicated(images, rgb, torch.float32))
        assert (result - expected).norm() < 1e-5 * expected.norm()  # float32 through 18 or 50 layers
        one, three = one.double(), three.double()
        one.set_submodule("conv1", grey_conv(three.get_submodule("conv1"), rgb, grey))  # type: ignore[arg-type]
        result, expected = one(normalise(images, grey, torch.float64)), three(replicated(images, rgb))
        assert (result - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize(("rgb", "grey"), PAIRS, ids=PAIR_IDS)
def test_there_and_back_acts_the_same_on_grey_images(rgb: Normalisation, grey: Normalisation) -> None:
    conv, images = random_conv(), random_grey(20, 21)
    expected = conv(replicated(images, rgb))
    with torch.no_grad():
        back = rgb_from_grey(*grey_from_rgb(conv.weight, rgb, grey), rgb, grey)
        assert not torch.allclose(back, conv.weight)  # colour is forgotten: only the effect on grey comes back
        conv.weight.copy_(back)
    torch.testing.assert_close(conv(replicated(images, rgb)), expected, rtol=0, atol=1e-9)


def test_layout_of_the_output_follows_channels_last_input() -> None:
    twin = grey_conv(random_conv().float(), NATIVE_RGB, NATIVE_GREY)
    result = twin(normalise(random_grey(16, 16), NATIVE_GREY, channels_last=True))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_weight_and_offset_learn_and_travel_in_the_state_dict() -> None:
    twin = grey_conv(random_conv(bias=True), NATIVE_RGB, NATIVE_GREY)
    twin(normalise(random_grey(9, 9), NATIVE_GREY, torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in twin.parameters())
    assert list(twin.state_dict()) == ["weight", "bias", "offset"]
    assert {tuple(twin.weight.shape), tuple(twin.offset.shape)} == {(8, 1, 7, 7)}
    copied = copy.deepcopy(twin)
    assert isinstance(copied, GreyConv2d)
    assert torch.equal(copied.offset, twin.offset)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(1, 4, 3), nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")],
    ids=["one channel", "groups", "reflect padding"],
)
def test_convolutions_it_would_get_wrong_are_refused(conv: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="3 input channels, 1 group and zero padding"):
        grey_conv(conv, NATIVE_RGB, NATIVE_GREY)

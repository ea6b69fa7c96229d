from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.models.normalise import Normalisation, normalise

NATIVE = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Normalisation((0.449,), (0.226,))


def random_images(channels: int, seed: int = 0, num: int = 3, height: int = 5, width: int = 7) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (num, channels, height, width), dtype=np.uint8))


def in_numpy(images: torch.Tensor, normalisation: Normalisation) -> np.ndarray:
    mean = np.array(normalisation.mean).reshape(1, -1, 1, 1)
    std = np.array(normalisation.std).reshape(1, -1, 1, 1)
    return (images.numpy().astype(np.float64) / 255 - mean) / std


@settings(deadline=None, max_examples=40)
@given(
    channels=st.sampled_from([1, 3]),
    means=st.tuples(*[st.floats(0, 1)] * 3),
    stds=st.tuples(*[st.floats(0.05, 1)] * 3),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_numpy_in_float64_and_float32(
    channels: int, means: tuple[float, ...], stds: tuple[float, ...], channels_last: bool, seed: int
) -> None:
    normalisation = Normalisation(means[:channels], stds[:channels])
    images = random_images(channels, seed)
    reference = in_numpy(images, normalisation)
    exact = normalise(images, normalisation, torch.float64, channels_last)
    np.testing.assert_allclose(exact.numpy(), reference, rtol=0, atol=1e-13)
    single = normalise(images, normalisation, torch.float32, channels_last)
    assert single.dtype == torch.float32
    # Values reach 1 / 0.05 = 20 on both sides of the subtraction; three roundings of 2^-24 each.
    np.testing.assert_allclose(single.numpy(), reference, rtol=0, atol=20 * 3 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(dtype: torch.dtype) -> None:
    images = random_images(3)
    assert torch.equal(normalise(images, NATIVE, dtype), normalise(images, NATIVE).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalisation", [GREY, NATIVE], ids=["grey", "rgb"])
def test_channels_last_has_nhwc_strides_with_one_channel_too(dtype: torch.dtype, normalisation: Normalisation) -> None:
    channels = normalisation.channels
    images = random_images(channels)
    result = normalise(images, normalisation, dtype, channels_last=True)
    assert result.stride() == (5 * 7 * channels, 1, 7 * channels, channels)
    assert torch.equal(result, normalise(images, normalisation, dtype, channels_last=False))


def test_images_are_left_as_they_were() -> None:
    images = random_images(1)
    before = images.clone()
    normalise(images, GREY)
    assert torch.equal(images, before)


def test_normalised_images_are_not_normalised_again() -> None:
    with pytest.raises(TypeError, match=r"uint8 images, not torch\.float32"):
        normalise(normalise(random_images(1), GREY), GREY)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 4, 4)])
def test_wrong_shape_names_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \[.*\], its normalisation needs \[batch, 3, height, width\]"):
        normalise(torch.zeros(shape, dtype=torch.uint8), NATIVE)


@pytest.mark.parametrize(
    ("mean", "std"), [((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((float("nan"),), (1.0,)), ((0.5,), (-1.0,))]
)
def test_impossible_normalisations_are_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="mean"):
        Normalisation(mean, std)


def test_lists_from_a_config_become_tuples() -> None:
    from_lists = Normalisation([0.5], [0.25])  # type: ignore[arg-type]
    assert from_lists == Normalisation((0.5,), (0.25,))
    assert hash(from_lists) == hash(Normalisation((0.5,), (0.25,)))

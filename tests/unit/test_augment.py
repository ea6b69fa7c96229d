from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtl_dist.config import load_config
from medtl_dist.data.augment import restain, right_angle
from medtl_dist.data.transforms import TrainTransform, augment_draws
from medtl_dist.sections import AUGMENT_SETS

_H, _E = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])  # Ruifrok and Johnston 2001, table of stains
_H, _E = _H / np.linalg.norm(_H), _E / np.linalg.norm(_E)


def _slide(h: np.ndarray, e: np.ndarray) -> np.ndarray:
    """uint8 [1, n, 3]: pixels with the given amounts of haematoxylin and eosin, by the law of Beer and Lambert."""
    density = np.outer(h, _H) + np.outer(e, _E)
    return np.rint(256 * np.exp(-density) - 1).astype(np.uint8)[None]


_AMOUNTS = np.array([(h, e) for h in (0.0, 0.2, 0.6, 1.0) for e in (0.0, 0.2, 0.6)])


@pytest.mark.parametrize(("draws", "factors"), [((0.9, 0.5, 0.5), (1.4, 1)), ((0.5, 0.0, 0.5), (1, 0.5))])
def test_a_stain_is_changed_as_if_the_slide_had_been_stained_with_more_or_less(draws, factors) -> None:
    given_slide = _slide(*_AMOUNTS.T)
    expected = _slide(*(_AMOUNTS * factors).T)
    found = restain(given_slide, np.array(draws), 0.5, "hematoxylin_eosin")
    assert np.abs(found.astype(int) - expected).max() <= 2  # the slide itself was rounded
    assert np.abs(found.astype(int) - given_slide).max() > 30


def test_color_jitter_is_a_power_of_each_channels_light() -> None:
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    found = restain(image, np.array([1.0, 0.5, 0.0]), 0.25, "color")
    for channel, factor in enumerate((1.25, 1.0, 0.75)):
        expected = 256 * ((np.arange(1, 257)) / 256) ** factor - 1
        expected[0] = 0  # black stays black
        np.testing.assert_allclose(found[0, :, channel], expected, atol=0.5 + 1e-9)
    grey = restain(image[:, :, :1], np.array([1.0, 0.5, 0.0]), 0.25, "color")
    assert np.array_equal(grey[:, :, 0], found[:, :, 0])
    assert np.array_equal(restain(image[:, :, 0], np.array([1.0, 0.5, 0.0]), 0.25, "color"), found[:, :, 0])


@settings(deadline=None, max_examples=25)
@given(draws=st.lists(st.floats(0, 0.999), min_size=3, max_size=3), jitter=st.floats(0, 0.9))
@pytest.mark.parametrize("model", ["hematoxylin_eosin", "color"])
def test_glass_stays_white_and_bars_black(model, draws: list[float], jitter: float) -> None:
    image = np.full((4, 4, 3), 255, np.uint8)
    image[0] = 0
    before = image.copy()
    assert np.array_equal(restain(image, np.array(draws), jitter, model), before)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("model", ["hematoxylin_eosin", "color"])
def test_no_jitter_is_no_change(model) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    assert np.abs(restain(image, np.full(3, 0.5), 0.5, model).astype(int) - image).max() <= 1


def test_right_angles_are_all_four_and_come_evenly() -> None:
    image = np.arange(9, dtype=np.uint8).reshape(3, 3, 1)
    turned = [right_angle(image, draw)[:, :, 0].tolist() for draw in (0.0, 0.25, 0.5, 0.75)]
    assert turned[0] == image[:, :, 0].tolist()
    assert turned[2] == image[::-1, ::-1, 0].tolist()
    assert len({str(one) for one in turned}) == 4
    assert right_angle(image, 0.999)[0, 0, 0] == 6


def _transform(**knobs) -> TrainTransform:
    return TrainTransform(32, crop_area_min=1.0, **knobs)


def test_turns_and_mirror_together_show_all_eight_views() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    transform = _transform(hflip=True, right_angles=True)
    seen = {transform(image, augment_draws(0, epoch, b"k" * 16)).tobytes() for epoch in range(100)}
    assert len(seen) == 8
    eight = {np.rot90(one, k).transpose(2, 0, 1).tobytes() for one in (image, image[:, ::-1]) for k in range(4)}
    assert seen == eight


def test_the_new_knobs_leave_the_old_ones_draws_alone() -> None:
    """A knob turned on changes what it is for: cropping and light are as they were."""
    image = np.random.default_rng(2).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    random = augment_draws(7, 1, b"s" * 16)
    plain = TrainTransform(32, crop_area_min=0.5, brightness=0.2)(image, random)
    turned = TrainTransform(32, crop_area_min=0.5, brightness=0.2, right_angles=True)(image, random)
    assert any(np.array_equal(np.rot90(plain, k, (1, 2)), turned) for k in range(4))


def test_a_named_set_gives_values_and_what_is_given_keeps_its_own(tmp_path) -> None:
    config = load_config(overrides=["augment.name=histology", "augment.stain_jitter=0.3"]).augment
    assert (config.right_angles, config.horizontal_flip, config.rotation_deg, config.stain_jitter) == (
        True,
        True,
        0,
        0.3,
    )
    assert load_config(overrides=["augment.stain_jitter=0.3", "augment.name=histology"]).augment == config
    assert load_config(overrides=["augment.name=cytology"]).augment.stain_model == "color"
    assert load_config(overrides=["augment.name=radiograph"]) == load_config()
    assert not load_config(overrides=["augment.name=radiograph"]).augment.horizontal_flip
    for name in AUGMENT_SETS:  # the resolved tree shows every value and repeats itself
        resolved = load_config(overrides=[f"augment.name={name}"])
        (tmp_path / "config.yaml").write_text(resolved.to_yaml())
        assert load_config(file=tmp_path / "config.yaml") == resolved
    quiet = load_config(overrides=["augment.name=none"]).augment
    off = _transform()
    assert (quiet.crop_area_min, quiet.rotation_deg, quiet.brightness, quiet.contrast) == (
        off.crop_area_min,
        off.rotation_deg,
        off.brightness,
        off.contrast,
    )


def test_loader_processes_stain_without_torch() -> None:
    code = "import sys, medtl_dist.data.transforms; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Intensity augmentation: reproducible from its seed, bounded, switched off by zeros, and without any geometry."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from datasets.samples.augment import AugmentOptions, ViewAugmenter, gaussian_blur, window

NAMES = ("window", "gamma", "blur", "noise", "contrast", "brightness")


def make_hu(shape=(20, 24, 28)) -> np.ndarray:
    smooth = gaussian_filter(np.random.default_rng(0).normal(0, 1, shape), 2)
    return (smooth / smooth.std() * 120 + 50).astype(np.int16)


def seed(value: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(value)


def test_window_maps_hu_linearly_and_clips():
    hu = np.array([-1024, -125, 50, 225, 3071], dtype=np.int16).reshape(1, 1, 5)
    assert window(hu, -125, 225).flatten().tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    assert window(hu, -125, 225).shape == (1, 1, 1, 5)


def test_same_seed_same_view_and_other_seed_other_view():
    augmenter = ViewAugmenter(AugmentOptions(), -125, 225)
    hu, before = make_hu(), make_hu()
    views = [augmenter(hu, seed(i)) for i in range(8)]
    again = ViewAugmenter(AugmentOptions(), -125, 225)
    for i in (5, 0, 7):  # in another order, with another object
        assert torch.equal(again(hu, seed(i)), views[i])
    for i in range(1, 8):
        assert not torch.equal(views[0], views[i])
    assert (hu == before).all()


def test_views_are_plain_float32_in_range():
    strong = AugmentOptions(noise_std=1.0, brightness=1.0, contrast=1.0, window_jitter_hu=500)
    for i in range(20):
        view = ViewAugmenter(strong, -125, 225)(make_hu(), seed(i))
        assert type(view) is torch.Tensor and view.dtype == torch.float32 and view.shape == (1, 20, 24, 28)
        assert view.min() >= 0 and view.max() <= 1 and torch.isfinite(view).all()


def test_off_is_the_plain_window():
    assert torch.equal(ViewAugmenter(AugmentOptions.off(), -125, 225)(make_hu(), seed(3)), window(make_hu(), -125, 225))


@pytest.mark.parametrize("name", NAMES)
def test_each_augmentation_alone_changes_the_view_and_its_zero_does_not(name):
    off_values = {
        "window": {"window_jitter_hu": 0.0},
        "gamma": {"gamma_range": (1.0, 1.0)},
        "blur": {"blur_sigma_vox": (0.0, 0.0)},
        "noise": {"noise_std": 0.0},
        "contrast": {"contrast": 0.0},
        "brightness": {"brightness": 0.0},
    }
    plain = window(make_hu(), -125, 225)
    alone = dataclasses.replace(AugmentOptions.off(), **{f"{name}_prob": 1.0})
    assert (ViewAugmenter(alone, -125, 225)(make_hu(), seed(1)) - plain).abs().mean() > 1e-3
    zero = dataclasses.replace(alone, **off_values[name])
    assert torch.allclose(ViewAugmenter(zero, -125, 225)(make_hu(), seed(1)), plain, atol=1e-5)


def test_probability_is_kept():
    half = dataclasses.replace(AugmentOptions.off(), noise_prob=0.3)
    augmenter, hu, plain = ViewAugmenter(half, -125, 225), make_hu((4, 4, 4)), window(make_hu((4, 4, 4)), -125, 225)
    share = np.mean([not torch.equal(augmenter(hu, seed(i)), plain) for i in range(500)])
    assert 0.22 < share < 0.38  # 4 standard deviations


def test_no_geometry_a_bright_voxel_stays_where_it_is():
    hu = np.full((16, 16, 16), 0, dtype=np.int16)
    hu[5, 9, 12] = 200
    quiet = dataclasses.replace(AugmentOptions(), noise_std=0.01)
    for i in range(20):
        view = ViewAugmenter(quiet, -125, 225)(hu, seed(i))[0]
        assert np.unravel_index(int(view.argmax()), (16, 16, 16)) == (5, 9, 12)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.6])
def test_blur_equals_scipy(sigma):
    image = torch.rand(2, 9, 12, 10, generator=torch.Generator().manual_seed(0))
    radius = max(1, round(2.5 * sigma))
    expected = np.stack([gaussian_filter(c, sigma, mode="nearest", radius=radius) for c in image.numpy()])
    assert np.allclose(gaussian_blur(image, [sigma] * 3).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"noise_prob": 1.2}, {"contrast": -0.1}, {"gamma_range": (0.0, 1.0)}, {"blur_sigma_vox": (1.0, 5.0)}],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentOptions(**wrong)


def test_a_window_never_gets_narrower_than_half():
    augmenter = ViewAugmenter(dataclasses.replace(AugmentOptions(), window_prob=1.0, window_jitter_hu=300.0), -125, 225)
    drawn = [augmenter._draw_window(np.random.RandomState(number), None) for number in range(200)]
    widths = np.array([high - low for low, high in drawn])
    assert widths.min() == pytest.approx(175) and widths.max() > 500
    assert (widths > 175.1).mean() < 0.9, "the bound is reached often with so large a jitter"

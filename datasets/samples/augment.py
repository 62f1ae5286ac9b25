"""Intensity augmentation of one view: the paths w and v of Alice's figure 2. Geometry is not touched (see `move.py`).

Every view (student and teacher alike) is cut from HU with its own jittered window and then gets its own draw of gamma,
blur, noise, brightness and contrast; tokens of a student view and of its teacher view still correspond by position.
Gamma, brightness and contrast are MONAI's. Noise and blur are ours: for 96 x 96 x 96 voxels on one core MONAI's take 28
and 45 ms, ours 7 and 7 ms, and loading must keep up with a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import RandAdjustContrast, RandomizableTransform, RandScaleIntensity, RandShiftIntensity

from datasets.ct.intensity import CT_WINDOW_HU, window_hu


@dataclass(frozen=True)
class AugmentOptions:
    """Strength and probability of each intensity augmentation; a probability of 0 switches one off.

    Attributes:
        window_prob: probability of a jittered HU window.
        window_jitter_hu: largest shift of either end of the window, in HU (0 = off). For a radiograph or an MR
            the width of its window stands for the 350 HU of CT's default one.
        gamma_prob: probability of x ** gamma.
        gamma_range: gamma is uniform in this range (1, 1 = off).
        blur_prob: probability of a Gaussian blur.
        blur_sigma_vox: its standard deviation is uniform in this range, in voxels (0, 0 = off; at most 2).
        noise_prob: probability of additive Gaussian noise.
        noise_std: its standard deviation is uniform in [0, noise_std], on the [0, 1] scale (0 = off).
        contrast_prob: probability of scaling by 1 + uniform(-contrast, contrast).
        contrast: see above (0 = off).
        brightness_prob: probability of adding uniform(-brightness, brightness).
        brightness: see above, on the [0, 1] scale (0 = off).
    """

    window_prob: float = 0.5
    window_jitter_hu: float = 30.0
    gamma_prob: float = 0.3
    gamma_range: tuple[float, float] = (0.7, 1.5)
    blur_prob: float = 0.2
    blur_sigma_vox: tuple[float, float] = (0.4, 1.0)
    noise_prob: float = 0.5
    noise_std: float = 0.08
    contrast_prob: float = 0.5
    contrast: float = 0.15
    brightness_prob: float = 0.5
    brightness: float = 0.1

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith("_prob") and not 0.0 <= value <= 1.0:
                raise ValueError(f"augmentation {item.name} is {value}, expected a probability in [0, 1] (0 = off)")
            if item.name in ("window_jitter_hu", "noise_std", "contrast", "brightness") and value < 0:
                raise ValueError(f"augmentation {item.name} is {value}, expected 0 (off) or more")
        if not 0 < self.gamma_range[0] <= self.gamma_range[1]:
            raise ValueError(f"augmentation gamma_range is {self.gamma_range}, expected 0 < low <= high (1 1 = off)")
        if not 0 <= self.blur_sigma_vox[0] <= self.blur_sigma_vox[1] <= 2:
            raise ValueError(
                f"augmentation blur_sigma_vox is {self.blur_sigma_vox}, expected 0 <= low <= high <= 2 (0 0 = off)"
            )

    @classmethod
    def off(cls) -> "AugmentOptions":
        """No augmentation at all: every view is the windowed crop."""
        return cls(window_prob=0, gamma_prob=0, blur_prob=0, noise_prob=0, contrast_prob=0, brightness_prob=0)


def window(hu: np.ndarray, hu_min: float, hu_max: float) -> torch.Tensor:
    """A crop's window: int16 HU [D, H, W] -> float32 [1, D, H, W] in [0, 1]; channels [C, D, H, W] stay."""
    shown = window_hu(torch.from_numpy(np.ascontiguousarray(hu)), hu_min, hu_max)
    return shown.unsqueeze_(0) if shown.ndim == 3 else shown


class ViewAugmenter:
    """Makes an augmented view of an HU crop; the result depends on the crop and the seed alone.

    Args:
        options: strengths and probabilities.
        hu_min, hu_max: the window in HU that becomes [0, 1] (before jitter).
        first: random transforms of the windowed crop that come before these.
    """

    def __init__(
        self, options: AugmentOptions, hu_min: float, hu_max: float, first: Sequence[RandomizableTransform] = ()
    ) -> None:
        self.options = options
        self.hu_min = hu_min
        self.hu_max = hu_max
        self._transforms: list[RandomizableTransform] = [
            *first,
            RandAdjustContrast(prob=options.gamma_prob, gamma=options.gamma_range),
            RandGaussianBlur(options.blur_sigma_vox, prob=options.blur_prob),
            RandFastNoise(options.noise_std, prob=options.noise_prob),
            RandScaleIntensity(factors=options.contrast, prob=options.contrast_prob),
            RandShiftIntensity(offsets=options.brightness, prob=options.brightness_prob),
        ]

    def __call__(
        self, hu: np.ndarray, seed: np.random.SeedSequence, own_window: tuple[float, float] | None = None
    ) -> torch.Tensor:
        """An augmented view.

        Args:
            hu: int16 [D, H, W] in HU, or [C, D, H, W].
            seed: decides every draw.
            own_window: of a radiograph or an MR, in its stored values; None = a CT in the augmenter's window.

        Returns:
            float32 [C, D, H, W] in [0, 1], C = 1 of a single channel.
        """
        random = np.random.RandomState(np.random.MT19937(seed))
        low, high = self._draw_window(random, own_window)
        view = window(hu, low, high)
        for transform in self._transforms:
            view = transform.set_random_state(state=random)(view).as_subclass(torch.Tensor)  # sheds MONAI's MetaTensor
        return view.clamp_(0.0, 1.0)

    def _draw_window(
        self, random: np.random.RandomState, own_window: tuple[float, float] | None
    ) -> tuple[float, float]:
        """This view's window; an extreme draw never makes it narrower than half of the given one."""
        low, high = own_window or (self.hu_min, self.hu_max)
        if random.uniform() >= self.options.window_prob:
            return low, high
        unit = 1.0 if own_window is None else (high - low) / (CT_WINDOW_HU[1] - CT_WINDOW_HU[0])
        shift = random.uniform(-1.0, 1.0, size=2) * self.options.window_jitter_hu * unit
        return low + shift[0], max(high + shift[1], low + shift[0] + (high - low) / 2)


class RandFastNoise(RandomizableTransform):
    """Additive Gaussian noise in float32, its standard deviation uniform in [0, std].

    Args:
        std: largest standard deviation, on the image's scale.
        prob: probability that noise is added at all.
    """

    def __init__(self, std: float, prob: float) -> None:
        RandomizableTransform.__init__(self, prob)
        self.std = std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Noise on an image of any shape."""
        self.randomize(None)
        if not self._do_transform or self.std == 0:
            return image
        std = self.R.uniform(0.0, self.std)
        generator = torch.Generator().manual_seed(int(self.R.randint(0, 2**63 - 1, dtype=np.int64)))
        return image + torch.randn(image.shape, generator=generator).mul_(std)


class RandGaussianBlur(RandomizableTransform):
    """Separable Gaussian blur with one standard deviation for all axes, truncated at 2.5 of them; borders continue.

    Args:
        sigma_vox: range of the standard deviation, in voxels.
        prob: probability that the image is blurred at all.
    """

    def __init__(self, sigma_vox: tuple[float, float], prob: float) -> None:
        RandomizableTransform.__init__(self, prob)
        self.sigma_vox = sigma_vox

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Blur an image [C, D, H, W]."""
        self.randomize(None)
        if not self._do_transform:
            return image
        sigma = self.R.uniform(*self.sigma_vox)
        return gaussian_blur(image, [sigma] * 3)


def gaussian_blur(image: torch.Tensor, sigmas_vox: Sequence[float]) -> torch.Tensor:
    """Gaussian blur of [C, D, H, W] as shifted sums along each axis (elementwise, so thread counts change no bit).

    Args:
        sigmas_vox: standard deviation along D, H and W in voxels; 0 = none.
    """
    for axis, sigma_vox in enumerate(sigmas_vox, start=1):
        if sigma_vox == 0:
            continue
        radius = max(1, round(2.5 * sigma_vox))
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_vox) ** 2)
        weights = (weights / weights.sum()).tolist()
        side = image.shape[axis]
        padding = [0] * 6
        padding[2 * (3 - axis)] = padding[2 * (3 - axis) + 1] = radius
        padded = F.pad(image.unsqueeze(0), padding, mode="replicate").squeeze(0)
        image = padded.narrow(axis, 0, side) * weights[0]
        for tap, weight in enumerate(weights[1:], start=1):
            image.add_(padded.narrow(axis, tap, side), alpha=weight)
    return image

"""Intensity augmentation of one view: the paths w and v of Alice's figure 2. Geometry is not touched (see `move.py`).

Every view (student and teacher alike) is cut from HU with its own jittered window and then gets its own draw of gamma,
blur, noise, contrast and brightness; tokens of a student view and of its teacher view still correspond by position.

What a view will be is drawn where its crop is cut, as a few numbers. Its voxels are made where they are needed, on the
training device, and are the same on every device up to rounding. Nothing there waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from datasets.ct.intensity import CT_WINDOW_HU, window_hu
from datasets.samples.counted_noise import KEYS, normal_field
from datasets.samples.move import ViewMover

Draws = dict[str, torch.Tensor]  # what a view will be: a few numbers, on the CPU
LOOK = ("low", "high", "gamma", "sigma_vox", "noise_std", "noise_key", "factor", "offset")
PLAIN_LOOK = {"gamma": 1.0, "sigma_vox": 0.0, "noise_std": 0.0, "noise_key": 0.0, "factor": 1.0, "offset": 0.0}


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


def window(hu: np.ndarray | torch.Tensor, hu_min: float, hu_max: float) -> torch.Tensor:
    """A crop's window: int16 HU [D, H, W] -> float32 [1, D, H, W] in [0, 1]; channels [C, D, H, W] stay."""
    if isinstance(hu, np.ndarray):
        hu = torch.from_numpy(np.ascontiguousarray(hu))
    shown = window_hu(hu, hu_min, hu_max)
    return shown.unsqueeze_(0) if shown.ndim == 3 else shown


class ViewAugmenter:
    """Makes an augmented view of an HU crop; the result depends on the crop and the seed alone.

    Args:
        options: strengths and probabilities.
        hu_min, hu_max: the window in HU that becomes [0, 1] (before jitter).
        mover: moves the windowed crop before its intensities are changed; None = the geometry stays.
    """

    def __init__(self, options: AugmentOptions, hu_min: float, hu_max: float, mover: ViewMover | None = None) -> None:
        self.options, self.mover = options, mover
        self.hu_min, self.hu_max = hu_min, hu_max

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
        return self.make(torch.from_numpy(np.ascontiguousarray(hu)), self.draw(seed, own_window))

    def draw(self, seed: np.random.SeedSequence, own_window: tuple[float, float] | None = None) -> Draws:
        """What a view will be: "look", the numbers that `LOOK` names, and "move" where there is a mover."""
        options, random = self.options, np.random.RandomState(np.random.MT19937(seed))
        low, high = self._draw_window(random, own_window)
        move = {} if self.mover is None else {"move": self.mover.draw(random)}
        look = {"low": low, "high": high, **PLAIN_LOOK}
        if random.uniform() < options.gamma_prob:
            look["gamma"] = random.uniform(*options.gamma_range)
        if random.uniform() < options.blur_prob:
            look["sigma_vox"] = random.uniform(*options.blur_sigma_vox)
        if random.uniform() < options.noise_prob and options.noise_std > 0:
            look["noise_std"] = random.uniform(0.0, options.noise_std)
            look["noise_key"] = random.randint(0, KEYS, dtype=np.int64)
        if random.uniform() < options.contrast_prob:
            look["factor"] = 1 + random.uniform(-options.contrast, options.contrast)
        if random.uniform() < options.brightness_prob:
            look["offset"] = random.uniform(-options.brightness, options.brightness)
        return {"look": torch.tensor([look[name] for name in LOOK], dtype=torch.float64), **move}

    def make(self, hu: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The view that was drawn.

        Args:
            hu: int16 [D, H, W] in HU, or [C, D, H, W], on any device.
            draws: as from `draw`; on the CPU, since the host decides by them what there is to do.

        Returns:
            float32 [C, D, H, W] in [0, 1] on the crop's device.
        """
        look = dict(zip(LOOK, draws["look"].tolist(), strict=True))
        view = window(hu, look["low"], look["high"])
        if self.mover is not None:
            view = self.mover.make(view, draws["move"])
        if look["gamma"] != 1:
            view = power(view, look["gamma"])
        if look["sigma_vox"] > 0:
            view = gaussian_blur(view, [look["sigma_vox"]] * 3)
        if look["noise_std"] > 0:
            noise = normal_field(int(look["noise_key"]), tuple(view.shape), view.device)
            view = view.add_(noise, alpha=look["noise_std"])
        return view.mul_(look["factor"]).add_(look["offset"]).clamp_(0.0, 1.0)

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


def power(image: torch.Tensor, gamma: float) -> torch.Tensor:
    """Intensities to the power of gamma, between the image's own lowest and highest value, which stay; in place."""
    low, high = image.aminmax()
    span = high - low
    return image.sub_(low).div_(span + 1e-7).pow_(gamma).mul_(span).add_(low)


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

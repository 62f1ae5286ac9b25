"""Random changes of a scan's intensities, in HU: contrast phase, noise, sharpness.

Yan et al., "SAM", TMI 2022, Sec. III-A use noise and blur. Contrast agents change organs by 20 to 200 HU, differently
for each, so a view may also pass through a random intensity curve and get smooth additive fields in its soft tissue.
Where labels are known, each organ may get an intensity of its own, as Billot et al., "SynthSeg", Medical Image Analysis
86, 2023, draw one for every label: a network that is taught so must find organs by shape and place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.samples.augment import gaussian_blur

SOFT_TISSUE_HU = (-30.0, 300.0)
CURVE_KNOTS_HU = (-1024.0, -500.0, -120.0, -20.0, 30.0, 80.0, 180.0, 350.0, 900.0, 3071.0)


@dataclass(frozen=True)
class IntensityOptions:
    """Amounts of change; its fields are flags.

    Attributes:
        curve_hu: std of the random intensity curve in soft tissue, HU, 5 times that in bone and lung; 0 = off
        field_hu: std of smooth fields in soft tissue, HU (organs take up contrast differently); 0 = off
        noise_hu: largest std of the noise, HU; 0 = off
        blur_vox: largest std of the blur, voxels, drawn per axis; 0 = off
    """

    curve_hu: float = 15.0
    field_hu: float = 25.0
    noise_hu: float = 40.0
    blur_vox: float = 0.8


TO_OTHER_SCANNERS = IntensityOptions(curve_hu=25.0, field_hu=40.0, noise_hu=60.0)  # for segmenters
ORGAN_HU = 50.0  # largest std of the organs' own shifts


def uniform(rng: torch.Generator, low: float, high: float, size: tuple[int, ...] = ()) -> Tensor:
    """Uniform random numbers, float64."""
    return torch.rand(size, generator=rng, dtype=torch.float64) * (high - low) + low


def change_intensity(
    view_hu: Tensor, spacing_mm: Sequence[float], options: IntensityOptions, rng: torch.Generator
) -> Tensor:
    """A random contrast, noise and sharpness for one view; HU in, HU out, float32 [D, H, W]."""
    if options.curve_hu > 0:
        view_hu = through_random_curve(view_hu, options.curve_hu, rng)
    if options.field_hu > 0:
        weight = soft_tissue_weight(view_hu)
        view_hu = view_hu + weight * smooth_field(view_hu.shape, spacing_mm, options.field_hu, rng)
    if options.blur_vox > 0:
        sigmas_vox = [float(uniform(rng, 0.0, options.blur_vox)) for _ in range(3)]
        view_hu = gaussian_blur(view_hu[None], sigmas_vox)[0]
    if options.noise_hu > 0:
        amount = float(uniform(rng, 0.0, options.noise_hu))
        view_hu = view_hu + torch.randn(view_hu.shape, generator=rng) * amount
    return view_hu


def through_random_curve(view_hu: Tensor, amount_hu: float, rng: torch.Generator) -> Tensor:
    """Shift the curve's knots at random: `amount_hu` in soft tissue and fat, five times that in lung and bone."""
    knots = torch.tensor(CURVE_KNOTS_HU)
    amounts = torch.where((knots >= -120) & (knots <= 180), 1.0, 5.0) * amount_hu
    values = knots + torch.randn(len(knots), generator=rng) * amounts * float(uniform(rng, 0.0, 1.0))
    return torch.from_numpy(np.interp(view_hu.numpy(), knots.numpy(), values.numpy()).astype(np.float32))


def soft_tissue_weight(view_hu: Tensor) -> Tensor:
    """1 inside the soft-tissue range, falling to 0 within 30 HU outside."""
    low, high = SOFT_TISSUE_HU
    return (torch.minimum(view_hu - low, high - view_hu) / 30 + 1).clamp(0, 1)


def smooth_field(shape: Sequence[int], spacing_mm: Sequence[float], most_hu: float, rng: torch.Generator) -> Tensor:
    """A smooth random field (HU) [D, H, W] on a lattice of 40 to 100 mm; its deviation is drawn up to `most_hu`."""
    step = float(uniform(rng, 40.0, 100.0))
    nodes = [max(2, round((n - 1) * s / step) + 1) for n, s in zip(shape, spacing_mm)]
    amount = most_hu * float(uniform(rng, 0.0, 1.0))
    lattice = torch.randn((1, 1, *nodes), generator=rng) * amount
    return F.interpolate(lattice, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]


def change_organs(hu: Tensor, label: Tensor, most_hu: float, rng: torch.Generator) -> Tensor:
    """Shift every organ by an amount of its own, HU; the deviation of these amounts is drawn up to `most_hu`.

    Args:
        hu: float32 [D, H, W], HU.
        label: integers [D, H, W], 0 to 255; 0 is background, which stays.
    """
    shifts = torch.randn(256, generator=rng) * most_hu * float(uniform(rng, 0.0, 1.0))
    shifts[0] = 0
    return hu + shifts[label.long()]

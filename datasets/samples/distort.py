"""Distorted views and their clean targets: the corruptions of Models Genesis (Zhou et al., MICCAI 2019, figure 2).

A distorted view is an augmented one (`augment.py`) in which then, each with its own probability,

- voxels are shuffled inside small tiles (sides of 1 voxel to 1/10 of the crop's),
- intensities go through a random cubic Bezier curve, which half of the time does not rise everywhere,
- or parts are painted over: inside (1 to 5 blocks, sides of 1/6 to 1/3 of the crop's), or, four times as often, outside
  of 1 to 5 windows (sides of 3/7 to 4/7 of the crop's).

Half of the views are mirrored left to right, and the target with them: no network could undo a flip that it cannot see.
Painted places hold noise, or 0, which looks like air. The published shuffling draws 10,000 overlapping windows of
random sizes; here the tiles of one view have one size and lie side by side, which takes a fraction of the time.

Everything is written in shares of a side, so that crops of depth 1 are distorted within their plane.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from monai.transforms import RandCoarseDropout, RandomizableTransform

from datasets.samples.augment import ViewAugmenter, window

SHUFFLE_PROB, CURVE_PROB, PAINT_PROB, OUTSIDE_SHARE, FLIP_PROB = 0.5, 0.9, 0.9, 0.8, 0.5
TILE_SHARE = 1 / 10  # largest side of a tile
INSIDE_SHARES, OUTSIDE_SHARES = (1 / 6, 1 / 3), (3 / 7, 4 / 7)  # smallest and largest side of blocks and windows
MOST_BLOCKS = 5
CURVE_LEVELS = 1024


@dataclass(frozen=True)
class DistortOptions:
    """How views are distorted.

    Attributes:
        distort_fill: what painted places of distorted views hold: uniform noise, or zero, which looks like air
    """

    distort_fill: Literal["noise", "zero"] = "noise"


class ViewDistorter:
    """Makes a distorted view of an HU crop and its target; both depend on the crop and the seed alone."""

    def __init__(self, augmenter: ViewAugmenter, roi: Sequence[int], options: DistortOptions | None = None) -> None:
        """`roi`: the crop (D, H, W) in voxels."""
        fill = (0.0, 1.0) if (options or DistortOptions()).distort_fill == "noise" else 0.0
        self.augmenter = augmenter
        self.shuffle = RandTileShuffle(sides(roi, TILE_SHARE), SHUFFLE_PROB)
        self.curve = RandBezierCurve(CURVE_PROB)
        self.paint_outside, self.paint_inside = (
            RandCoarseDropout(
                holes=1, max_holes=MOST_BLOCKS, spatial_size=sides(roi, low), max_spatial_size=sides(roi, high),
                dropout_holes=is_inside, fill_value=fill, prob=PAINT_PROB,
            )
            for is_inside, (low, high) in ((False, OUTSIDE_SHARES), (True, INSIDE_SHARES))
        )  # fmt: skip

    def __call__(
        self, hu: np.ndarray, seed: np.random.SeedSequence, own_window: tuple[float, float] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The view and its target, float32 [1, D, H, W] in [0, 1] each, of an int16 crop [D, H, W] in HU.

        `own_window` is that of a radiograph or an MR, as in `ViewAugmenter`.
        """
        looks, corrupts = seed.spawn(2)
        view = self.augmenter(hu, looks, own_window)
        target = window(hu, *(own_window or (self.augmenter.hu_min, self.augmenter.hu_max)))
        random = np.random.RandomState(np.random.MT19937(corrupts))
        paint = self.paint_outside if random.uniform() < OUTSIDE_SHARE else self.paint_inside
        is_flipped = random.uniform() < FLIP_PROB
        for transform in (self.shuffle, self.curve, paint):
            view = transform.set_random_state(state=random)(view).as_subclass(torch.Tensor)  # sheds MONAI's MetaTensor
        return (view.flip(-1), target.flip(-1)) if is_flipped else (view, target)


def sides(roi: Sequence[int], share: float) -> tuple[int, ...]:
    """This share of each side in whole voxels, at least one."""
    return tuple(max(1, int(side * share)) for side in roi)


class RandTileShuffle(RandomizableTransform):
    """Cuts the image into tiles and shuffles the voxels of each; a rest smaller than a tile stays at the borders.

    Args:
        most: largest side of a tile along each axis, voxels; the sides of one image's tiles are uniform from 1 to it.
        prob: probability that the image is shuffled at all.
    """

    def __init__(self, most: tuple[int, ...], prob: float) -> None:
        RandomizableTransform.__init__(self, prob)
        self.most = most

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """A shuffled copy of an image [1, D, H, W]."""
        self.randomize(None)
        if not self._do_transform:
            return image
        tile = [int(self.R.randint(1, most + 1)) for most in self.most]
        nums = [side // one for side, one in zip(image.shape[1:], tile)]
        starts = [self.R.randint(0, side - n * t + 1) for side, n, t in zip(image.shape[1:], nums, tile)]
        shuffled = image.clone()
        part = shuffled[0][tuple(slice(start, start + n * t) for start, n, t in zip(starts, nums, tile))]
        d, h, w, a, b, c = *nums, *tile
        tiles = part.reshape(d, a, h, b, w, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, a * b * c)  # [tiles, voxels]
        tiles = tiles.gather(1, torch.from_numpy(self.R.random_sample(tuple(tiles.shape)).argsort(axis=1)))
        part.copy_(tiles.reshape(d, h, w, a, b, c).permute(0, 3, 1, 4, 2, 5).reshape(part.shape))
        return shuffled


class RandBezierCurve(RandomizableTransform):
    """Maps intensities in [0, 1] through a cubic Bezier curve from (0, 0) to (1, 1) with two random control points.

    Half of the time the heights are sorted, so that the curve rises; else it may fall in between.

    Args:
        prob: probability that the image is changed at all.
    """

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """The image of any shape, values in [0, 1], through the curve."""
        self.randomize(None)
        if not self._do_transform:
            return image
        x1, x2, y1, y2 = self.R.uniform(size=4)
        along = np.linspace(0, 1, CURVE_LEVELS)
        first, second, last = 3 * along * (1 - along) ** 2, 3 * along**2 * (1 - along), along**3
        heights = first * y1 + second * y2 + last
        if self.R.uniform() < 0.5:
            heights = np.sort(heights)
        table = np.interp(along, first * x1 + second * x2 + last, heights)
        return torch.from_numpy(table.astype(np.float32))[(image * (CURVE_LEVELS - 1)).round().int()]

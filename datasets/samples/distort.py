"""Distorted views and their clean targets: the corruptions of Models Genesis (Zhou et al., MICCAI 2019, figure 2).

A distorted view is an augmented one (`augment.py`) in which then, each with its own probability,

- voxels are shuffled inside small tiles (sides of 1 voxel to 1/10 of the crop's),
- intensities go through a random cubic Bezier curve, which half of the time does not rise everywhere,
- or parts are painted over: inside (1 to 5 blocks, sides of 1/6 to 1/3 of the crop's), or, four times as often, outside
  of 1 to 5 windows (sides of 3/7 to 4/7 of the crop's).

Half of the views are mirrored left to right, and the target with them: no network could undo a flip that it cannot see.
Painted places hold noise, or 0, which looks like air. The published shuffling draws 10,000 overlapping windows of
random sizes; here the tiles of one view have one size and lie side by side, which takes a fraction of the time.

Everything is written in shares of a side, so that crops of depth 1 are distorted within their plane. As in
`augment.py`, what happens to a view is drawn where its crop is cut, and done where the view is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from datasets.samples.augment import Draws, ViewAugmenter, window
from datasets.samples.counted_noise import KEYS, random_bits, uniform_field

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
        self.augmenter, self.roi = augmenter, tuple(roi)
        self.has_noise = (options or DistortOptions()).distort_fill == "noise"
        self.most_tile = sides(roi, TILE_SHARE)
        self.shuffle_prob, self.curve_prob, self.paint_prob = SHUFFLE_PROB, CURVE_PROB, PAINT_PROB
        self._boxes = {True: boxes_within(self.roi, INSIDE_SHARES), False: boxes_within(self.roi, OUTSIDE_SHARES)}

    def __call__(
        self, hu: np.ndarray, seed: np.random.SeedSequence, own_window: tuple[float, float] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The view and its target, float32 [1, D, H, W] in [0, 1] each, of an int16 crop [D, H, W] in HU.

        `own_window` is that of a radiograph or an MR, as in `ViewAugmenter`.
        """
        return self.make(torch.from_numpy(np.ascontiguousarray(hu)), self.draw(seed, own_window))

    def draw(self, seed: np.random.SeedSequence, own_window: tuple[float, float] | None = None) -> Draws:
        """What a view and its target will be.

        "look": as of `ViewAugmenter`; "window": of the target [2]; "tiles": their sides [3] (0 = none), the first
        one's start [3] and a key; "curve": a table [CURVE_LEVELS]; "blocks": start and end [MOST_BLOCKS, 2, 3] of
        what is painted, or of what is left of all; "paint": whether there are blocks, whether they are painted
        inside, and a key; "flip": 0 or 1.
        """
        looks, corrupts = seed.spawn(2)
        random = np.random.RandomState(np.random.MT19937(corrupts))
        is_inside, is_flipped = random.uniform() >= OUTSIDE_SHARE, random.uniform() < FLIP_PROB
        blocks = np.zeros((MOST_BLOCKS, 2, 3))
        tiles, curve = self._draw_tiles(random), draw_curve(random, self.curve_prob)
        paint = random.uniform() < self.paint_prob
        if paint:
            drawn = self._draw_blocks(random, is_inside)
            blocks[: len(drawn)] = drawn
        drawn = {
            "window": own_window or (self.augmenter.hu_min, self.augmenter.hu_max),
            "tiles": tiles,
            "curve": curve,
            "blocks": blocks,
            "paint": (paint, is_inside, random.randint(0, KEYS, dtype=np.int64)),
            "flip": is_flipped,
        }
        return self.augmenter.draw(looks, own_window) | {
            # The curve alone goes to the device, and not every device knows float64.
            name: torch.as_tensor(value, dtype=torch.float32 if name == "curve" else torch.float64)
            for name, value in drawn.items()
        }

    def make(self, hu: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """The view and its target, on the crop's device; `hu` and `draws` as for `ViewAugmenter.make`."""
        view, target = self.augmenter.make(hu, draws), window(hu, *draws["window"].tolist())
        *sizes, key = map(int, draws["tiles"].tolist())
        if sizes[0]:
            shuffle_tiles(view[0], sizes[:3], sizes[3:], key)
        if draws["curve"][-1] > 0:
            view = through_curve(view, draws["curve"])
        has_blocks, is_inside, key = draws["paint"].tolist()
        if has_blocks:
            self._paint(view, draws["blocks"], bool(is_inside), int(key))
        return (view.flip(-1), target.flip(-1)) if draws["flip"] else (view, target)

    def _draw_tiles(self, random: np.random.RandomState) -> list[int]:
        """Sides of tiles, uniform from 1 to the most; where the first one begins; and the key of their shuffles.

        A rest smaller than a tile stays at the borders.
        """
        if random.uniform() >= self.shuffle_prob:
            return [0] * 7
        tile = [int(random.randint(1, most + 1)) for most in self.most_tile]
        starts = [int(random.randint(0, side % one + 1)) for side, one in zip(self.roi, tile)]
        return [*tile, *starts, random.randint(0, KEYS, dtype=np.int64)]

    def _draw_blocks(self, random: np.random.RandomState, is_inside: bool) -> list[list[list[int]]]:
        """Starts and ends of 1 to 5 blocks (inside) or windows; MONAI draws them."""
        boxes = self._boxes[is_inside].set_random_state(state=random)
        boxes.randomize(self.roi)
        return [[[part.start for part in hole[1:]], [part.stop for part in hole[1:]]] for hole in boxes.hole_coords]

    def _paint(self, view: torch.Tensor, blocks: torch.Tensor, is_inside: bool, key: int) -> None:
        """Paint over the blocks, or over all but them, in place."""
        shape = tuple(view.shape)
        paint = uniform_field(key, shape, view.device) if self.has_noise else torch.zeros_like(view)
        boxes = [(slice(None), *map(slice, start, stop)) for start, stop in blocks.long().tolist() if stop > start]
        if is_inside:
            for box in boxes:
                view[box] = paint[box]
            return
        for box in boxes:
            paint[box] = view[box]
        view.copy_(paint)


def boxes_within(roi: Sequence[int], shares: tuple[float, float]):
    """MONAI's draw of 1 to 5 boxes, whose sides are between two shares of the crop's."""
    from monai.transforms import RandCoarseDropout  # here: MONAI takes seconds, and most methods distort nothing

    smallest, largest = (sides(roi, share) for share in shares)
    return RandCoarseDropout(holes=1, max_holes=MOST_BLOCKS, spatial_size=smallest, max_spatial_size=largest, prob=1.0)


def sides(roi: Sequence[int], share: float) -> tuple[int, ...]:
    """This share of each side in whole voxels, at least one."""
    return tuple(max(1, int(side * share)) for side in roi)


def shuffle_tiles(image: torch.Tensor, tile: Sequence[int], starts: Sequence[int], key: int) -> None:
    """Shuffle the voxels of each tile of an image [D, H, W], in place.

    Args:
        tile: sides of a tile, voxels.
        starts: where the first tile begins; a rest smaller than a tile stays at the borders.
        key: decides the shuffles.
    """
    nums = [(side - start) // one for side, start, one in zip(image.shape, starts, tile)]
    part = image[tuple(slice(start, start + n * t) for start, n, t in zip(starts, nums, tile))]
    d, h, w, a, b, c = *nums, *tile
    tiles = part.reshape(d, a, h, b, w, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, a * b * c)  # [tiles, voxels]
    tiles = tiles.gather(1, random_orders(key, *tiles.shape, image.device))
    part.copy_(tiles.reshape(d, h, w, a, b, c).permute(0, 3, 1, 4, 2, 5).reshape(part.shape))


def random_orders(key: int, num: int, length: int, device: torch.device) -> torch.Tensor:
    """`num` permutations of 0 to `length` - 1, int64 [num, length].

    Positions stand in the lowest bits of what is sorted. So no two are equal, and every sort gives the same order:
    NumPy's, which is seven times as fast as PyTorch's on a CPU, and a GPU's.
    """
    spare = 2 ** max(1, (length - 1).bit_length()) - 1
    keys = random_bits(key, num * length, device).view(num, length)
    keys = keys.bitwise_and_(~spare).bitwise_or_(torch.arange(length, dtype=torch.int32, device=device))
    if keys.device.type == "cpu":
        return torch.from_numpy(keys.numpy().argsort(axis=1))
    return keys.argsort(dim=1)


def draw_curve(random: np.random.RandomState, prob: float) -> np.ndarray:
    """A cubic Bezier curve from (0, 0) to (1, 1) with two random control points, as a table over [0, 1].

    Half of the time the heights are sorted, so that the curve rises; else it may fall in between. Without a curve
    (probability 1 - `prob`) the table is 0.
    """
    if random.uniform() >= prob:
        return np.zeros(CURVE_LEVELS)
    x1, x2, y1, y2 = random.uniform(size=4)
    along = np.linspace(0, 1, CURVE_LEVELS)
    first, second, last = 3 * along * (1 - along) ** 2, 3 * along**2 * (1 - along), along**3
    heights = first * y1 + second * y2 + last
    if random.uniform() < 0.5:
        heights = np.sort(heights)
    return np.interp(along, first * x1 + second * x2 + last, heights)


def through_curve(image: torch.Tensor, curve: torch.Tensor) -> torch.Tensor:
    """An image of any shape, values in [0, 1], through a table over [0, 1], interpolated linearly."""
    curve = curve.to(image.device, torch.float32, non_blocking=True)
    place = image.flatten().mul(len(curve) - 1)
    below = place.floor().clamp_(0, len(curve) - 2)
    index = below.int()
    rise = curve.diff().index_select(0, index)
    return place.sub_(below).mul_(rise).add_(curve.index_select(0, index)).view(image.shape)

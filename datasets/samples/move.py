"""Views that are zoomed, mirrored and turned, each in its own way: the published protocol of IoU-based positives.

    zoom      with probability 0.75, one factor in [0.8, 1.2] for all axes, about the centre; what comes in is 0
    mirror    along each axis, with probability 0.5
    turn      with probability 0.5, by 90, 180 or 270 degrees within the slice

(Konieczkowicz, AGH Kraków 2023.) The crop's size stays. Intensity augmentation follows, as in `augment.py`. Places of
such a view are not those of its crop: this is for methods that compare views as wholes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import RandFlip, RandomizableTransform, RandRotate90, RandZoom

ZOOM_PROB, MIRROR_PROB, TURN_PROB = 0.75, 0.5, 0.5
ZOOM_RANGE = (0.8, 1.2)


@dataclass(frozen=True)
class MoveOptions:
    """Whether views are moved.

    Attributes:
        move_views: zoom, mirror and turn each view in its own way, before intensity augmentation
    """

    move_views: bool = False


class RandMove(RandomizableTransform):
    """Zoom, mirrors and turn of a crop; a crop of depth 1 stays in its plane."""

    def __init__(self, roi: Sequence[int]) -> None:
        """`roi`: the crop (D, H, W) in voxels.

        Raises:
            ValueError: slices that are not square, which cannot turn.
        """
        RandomizableTransform.__init__(self)
        if roi[1] != roi[2]:
            raise ValueError(f"--move_views turns slices: expected --roi_y as --roi_x, received {roi[1]} and {roi[2]}")
        self.is_flat = roi[0] == 1
        num_axes = 2 if self.is_flat else 3
        mode = "bilinear" if self.is_flat else "trilinear"
        self.transforms: list[RandomizableTransform] = [
            RandZoom(ZOOM_PROB, *ZOOM_RANGE, mode=mode, padding_mode="constant"),
            *(RandFlip(MIRROR_PROB, axis) for axis in range(num_axes)),
            RandRotate90(TURN_PROB, max_k=3, spatial_axes=(num_axes - 2, num_axes - 1)),
        ]

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> "RandMove":
        """All parts draw from one generator, one after the other."""
        for transform in self.transforms:
            transform.set_random_state(seed, state)
        return self

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """A crop [C, D, H, W] in [0, 1], moved."""
        moved = image.squeeze(1) if self.is_flat else image
        for transform in self.transforms:
            moved = transform(moved)
        return moved.unsqueeze(1) if self.is_flat else moved

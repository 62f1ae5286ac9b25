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
import torch.nn.functional as F

ZOOM_PROB, MIRROR_PROB, TURN_PROB = 0.75, 0.5, 0.5
ZOOM_RANGE = (0.8, 1.2)


@dataclass(frozen=True)
class MoveOptions:
    """Whether views are moved.

    Attributes:
        move_views: zoom, mirror and turn each view in its own way, before intensity augmentation
    """

    move_views: bool = False


class ViewMover:
    """Zoom, mirrors and turn of a crop; a crop of depth 1 stays in its plane."""

    def __init__(self, roi: Sequence[int]) -> None:
        """`roi`: the crop (D, H, W) in voxels.

        Raises:
            ValueError: slices that are not square, which cannot turn.
        """
        if roi[1] != roi[2]:
            raise ValueError(f"--move_views turns slices: expected --roi_y as --roi_x, received {roi[1]} and {roi[2]}")
        self.is_flat = roi[0] == 1

    def draw(self, random: np.random.RandomState) -> torch.Tensor:
        """A move: zoom (1 = none), whether D, H and W are mirrored, quarter turns; float64 [5]."""
        zoom = random.uniform(*ZOOM_RANGE) if random.uniform() < ZOOM_PROB else 1.0
        mirrors = [random.uniform() < MIRROR_PROB and not (self.is_flat and axis == 0) for axis in range(3)]
        turns = random.randint(1, 4) if random.uniform() < TURN_PROB else 0
        return torch.tensor([zoom, *mirrors, turns], dtype=torch.float64)

    def make(self, image: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        """A crop [C, D, H, W] in [0, 1], on any device, moved."""
        zoom, *mirrors, turns = move.tolist()
        if zoom != 1:
            image = zoomed(image.squeeze(1), zoom).unsqueeze(1) if self.is_flat else zoomed(image, zoom)
        image = image.flip([axis for axis, is_mirrored in enumerate(mirrors, start=1) if is_mirrored])
        return image.rot90(int(turns), (2, 3))


def zoomed(image: torch.Tensor, factor: float) -> torch.Tensor:
    """An image [C, (D,) H, W] magnified about its centre, interpolated linearly; what comes in is 0."""
    num_axes = image.ndim - 1
    scaled = torch.eye(num_axes, num_axes + 1, device=image.device).div_(factor)
    grid = F.affine_grid(scaled[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)[0]

"""Where crops lie: a fixed number of voxels around a world point, boxes of possible positions, and their overlap (IoU).

Legend: `roi` = crop size (D, H, W) in voxels; a crop's *start* is its first voxel, its *centre* the fractional index
start + (roi - 1) / 2, so that an even-sized crop is centred between two voxels. `record` is a store's `CaseRecord`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datasets.ct.geometry import index_to_world, world_to_index
from datasets.ct.intensity import CT_WINDOW_HU, fill_ends


@dataclass(frozen=True)
class CropOptions:
    """What a crop is: its size, its HU window, and whether its views are augmented.

    Attributes:
        roi_x: crop size along W (towards the patient's left), voxels (multiple of 32 for swin_unetr and resenc, else
            16)
        roi_y: crop size along H (posterior), voxels
        roi_z: crop size along D (superior), voxels; 1 = axial slices, for 2-D networks (not unet, nnformer, resenc)
        a_min: HU that becomes 0; unset = -125, of MR -1000, and the darkest grey of each radiograph
        a_max: HU that becomes 1; unset = 225, of MR 1000, and the brightest grey of each radiograph
        augment: intensity augmentation, another one for every view
    """

    roi_x: int = 96
    roi_y: int = 96
    roi_z: int = 96
    a_min: float | None = None
    a_max: float | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        low, high = fill_ends((self.a_min, self.a_max), CT_WINDOW_HU)
        if low >= high:
            raise ValueError(
                f"--a_min {low}, --a_max {high}: expected a low end below the high end (HU; for radiographs, in "
                "stored grey, and MR, from -1000 to 1000, give both or none)"
            )

    @property
    def roi(self) -> tuple[int, int, int]:
        """The crop's size (D, H, W) in voxels."""
        return self.roi_z, self.roi_y, self.roi_x


def start_at(record, point_mm: np.ndarray, roi: Sequence[int]) -> np.ndarray:
    """First voxel int64 [3] of the crop whose centre lies nearest to a world point (mm)."""
    centre = world_to_index(record.affine, np.asarray(point_mm, dtype=np.float64))
    return np.floor(centre - (np.asarray(roi) - 1) / 2 + 0.5).astype(np.int64)


def centre_mm(record, start: np.ndarray, roi: Sequence[int]) -> np.ndarray:
    """World point (mm, [..., 3]) at the centre of the crop(s) that begin at voxel `start` [..., 3]."""
    return index_to_world(record.affine, np.asarray(start) + (np.asarray(roi) - 1) / 2)


def cut(store, name: str, point_mm: np.ndarray, roi: Sequence[int]) -> np.ndarray:
    """The crop of case `name` around a world point, int16 HU [D, H, W]; outside of it is `CaseRecord.outside`."""
    start = start_at(store.record(name), point_mm, roi)
    return store.crop(name, tuple(int(s) for s in start), tuple(roi))


def start_range(
    low: np.ndarray, high: np.ndarray, roi: Sequence[int], max_outside: float
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest start (inclusive, int64 [3] each) of crops that cover the box [low, high) well.

    Along every axis at most `max_outside` of the crop's side may overhang the box; where the box is smaller than the
    crop, the crop must contain it instead.
    """
    size = np.asarray(roi)
    slack = np.floor(max_outside * size).astype(np.int64)
    first = np.asarray(low, dtype=np.int64) - slack
    last = np.asarray(high, dtype=np.int64) - size + slack
    return np.minimum(first, last), np.maximum(first, last)


def body_start_range(record, roi: Sequence[int], max_outside: float) -> tuple[np.ndarray, np.ndarray]:
    """`start_range` over the case's body box: where crops of this case may begin."""
    return start_range(np.asarray(record.body_start), np.asarray(record.body_stop), roi, max_outside)


def draw_starts(rng: np.random.Generator, first: np.ndarray, last: np.ndarray, num: int) -> np.ndarray:
    """`num` starts uniformly in the inclusive range [first, last], int64 [num, 3]."""
    return rng.integers(first, last, size=(num, 3), endpoint=True)


def draw_centre(rng: np.random.Generator, record, roi: Sequence[int]) -> np.ndarray:
    """The centre (world mm [3]) of a crop that lies anywhere in the case's body box."""
    first, last = body_start_range(record, roi, 0.0)
    return centre_mm(record, draw_starts(rng, first, last, 1)[0], roi)


def crop_iou(start_a: np.ndarray, start_b: np.ndarray, roi: Sequence[int]) -> np.ndarray:
    """Intersection over union of two crops of one size on one grid; broadcasts over leading axes, in [0, 1]."""
    size = np.asarray(roi)
    overlap = np.clip(size - np.abs(np.asarray(start_a) - np.asarray(start_b)), 0, None).prod(axis=-1)
    return overlap / (2 * size.prod() - overlap)


def shared_shift_mm(
    query, query_mm: np.ndarray, key, key_mm: np.ndarray, roi: Sequence[int], max_outside: float
) -> np.ndarray:
    """The smallest world shift (mm, [3]) that brings two matched crops inside their bodies' boxes, the same for both.

    Matched points near the skin or a scan's end would give crops of much air. Moving both crops by one vector keeps
    them at the same anatomy. Along each axis at most `max_outside` of the crop may overhang the box; where no shift
    serves both cases, the shift lies halfway, so that both overhang alike.

    Args:
        query, key: records of the two cases.
        query_mm, key_mm: the matched points, world mm [3].
        roi: crop size in voxels.
        max_outside: share of the side in [0, 1]; 1 = never shift.
    """
    query_low, query_high = _shift_limits_mm(query, query_mm, roi, max_outside)
    key_low, key_high = _shift_limits_mm(key, key_mm, roi, max_outside)
    low, high = np.maximum(query_low, key_low), np.minimum(query_high, key_high)
    shift = np.where(low > high, (low + high) / 2, np.minimum(np.maximum(0.0, low), high))
    directions = np.asarray(query.affine)[:3, :3] / np.linalg.norm(np.asarray(query.affine)[:3, :3], axis=0)
    return directions @ shift


def _shift_limits_mm(
    record, point_mm: np.ndarray, roi: Sequence[int], max_outside: float
) -> tuple[np.ndarray, np.ndarray]:
    """How far (mm along the volume's axes D, H, W, [3] each) a crop around this point may and must move."""
    first, last = body_start_range(record, roi, max_outside)
    spacing = np.linalg.norm(np.asarray(record.affine)[:3, :3], axis=0)
    half = (np.asarray(roi) - 1) / 2
    index = world_to_index(record.affine, np.asarray(point_mm, dtype=np.float64))
    return (first + half - index) * spacing, (last + half - index) * spacing

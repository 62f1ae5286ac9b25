"""Planes of a CT as radiologists see them: the patient's right on the left, anterior or the head on top.

Volumes are in the canonical orientation (`datasets.ct.geometry`): indices grow to Superior, Posterior and Left. Axial
and coronal pictures show the patient's left on the right; sagittal ones the front on the left.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Plane(NamedTuple):
    """The axis that is cut, the axes shown down and across, and whether the picture's top is the end of the first."""

    cut: int
    down: int
    across: int
    is_flipped: bool


PLANES = {"axial": Plane(0, 1, 2, False), "coronal": Plane(1, 0, 2, True), "sagittal": Plane(2, 0, 1, True)}


def planes_of(shape: Sequence[int], wanted: Sequence[str] = tuple(PLANES)) -> tuple[str, ...]:
    """The planes of `wanted` to show of a volume of this shape (D, H, W); of a slice (D = 1) the axial one alone."""
    return ("axial",) if shape[0] == 1 else tuple(wanted)


def cut_plane(volume: np.ndarray, plane: str, at: int | Sequence[int] | None = None) -> np.ndarray:
    """One plane of a volume; a view, rows from the top of the picture.

    Args:
        volume: [D, H, W], or [D, H, W, C] of colours.
        plane: "axial", "coronal" or "sagittal".
        at: index along the axis that is cut, or a voxel (d, h, w) that the plane goes through; None = the middle.

    Returns:
        axial [H, W], coronal [D, W] or sagittal [D, H], with C at the end where the volume has it.
    """
    cut, _, _, is_flipped = PLANES[plane]
    if at is None:
        at = volume.shape[cut] // 2
    picture = volume[(slice(None),) * cut + (at if np.isscalar(at) else at[cut],)]
    return picture[::-1] if is_flipped else picture


def pixel_aspect(plane: str, voxel_mm: Sequence[float]) -> float:
    """Height of a pixel of `cut_plane` per width, for voxels of `voxel_mm` (D, H, W)."""
    return voxel_mm[PLANES[plane].down] / voxel_mm[PLANES[plane].across]

"""Checks of a file's voxel grid that are the same for every format: its axes, its affine and its size."""

import logging
import math
from pathlib import Path

import numpy as np

from datasets.ct.geometry import spacing_of

SPACING_RANGE_MM = (0.05, 20.0)
# The longest side of a CT of a patient, or of a part of one.
EXTENT_RANGE_MM = (5.0, 3000.0)
TILT_DEGREES = 1.0  # by which an axis may lean before it is said

logger = logging.getLogger(__name__)


class CTReadError(ValueError):
    """A file that cannot be used as CT or label; the message names the file, what it holds and what was expected."""


def three_axes(shape: tuple[int, ...], path: str | Path) -> tuple[int, int, int]:
    """The shape without trailing axes of length 1 beyond the third; other 4-D files hold channels."""
    kept = tuple(int(size) for size in shape)
    while len(kept) > 3 and kept[-1] == 1:
        kept = kept[:-1]
    if len(kept) != 3:
        raise CTReadError(f"{path}: shape {tuple(shape)} is {len(kept)}-D, expected one 3-D volume")
    if min(kept) < 1:
        raise CTReadError(f"{path}: shape {kept} holds no voxels")
    return kept


def channel_axes(shape: tuple[int, ...], path: str | Path) -> tuple[int, int, int, int]:
    """The shape as X, Y, Z and channels; 5-D files (X, Y, Z, 1, C) are vectors in NIfTI's words."""
    channels = [int(size) for size in shape[3:] if size != 1]
    if len(channels) > 1:
        raise CTReadError(
            f"{path}: shape {tuple(shape)} has more than one axis of channels, expected X, Y, Z, channels"
        )
    return *three_axes(shape[:3], path), *(channels or [1])


def check_affine(affine: np.ndarray, path: str | Path) -> None:
    """Check that an affine can place voxels in the world, and note sheared axes in the log.

    Args:
        affine: float64 [4, 4], index -> world mm.
        path: the file, for messages.

    Raises:
        CTReadError: values that are not finite, a spacing of zero, or two axes that point the same way.
    """
    spacing = spacing_of(affine)
    if not np.isfinite(affine).all():
        raise CTReadError(f"{path}: the affine is not finite: {affine.tolist()}")
    if min(spacing) < 1e-6:
        raise CTReadError(f"{path}: the affine has a voxel spacing of zero: {spacing} mm")
    directions = affine[:3, :3] / spacing
    if abs(np.linalg.det(directions)) < 1e-3:
        raise CTReadError(f"{path}: singular affine, two axes point the same way: {affine[:3, :3].tolist()}")
    cosine = np.abs(directions.T @ directions - np.eye(3)).max()
    if cosine > math.sin(math.radians(TILT_DEGREES)):
        logger.warning(
            "%s: its axes are sheared by %.0f degrees (a tilted gantry): places in mm stay right, but networks see a "
            "sheared patient; resample it (dcm2niix does) before it is stored",
            path,
            math.degrees(math.asin(min(cosine, 1.0))),
        )


def check_extent(affine: np.ndarray, shape: tuple[int, int, int], path: str | Path) -> None:
    """Raise CTReadError where voxels or volume have a size that no CT of a patient has: wrong units, most likely."""
    spacing = np.array(spacing_of(affine))
    extent = (spacing * shape).max()
    (low, high), (shortest, longest) = SPACING_RANGE_MM, EXTENT_RANGE_MM
    if spacing.min() < low or spacing.max() > high or not shortest <= extent <= longest:
        sizes = " x ".join(f"{value:.3g}" for value in spacing)
        raise CTReadError(
            f"{path}: voxels of {sizes} mm and a longest side of {extent:.3g} mm, expected {low:g} to {high:g} mm and "
            f"{shortest:g} to {longest:g} mm; are the header's units right?"
        )

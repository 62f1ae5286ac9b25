"""Where voxels are: one canonical orientation, index <-> world millimetres, resampling, and the body in the picture.

Arrays are [D, H, W] in orientation "SPL": the index grows towards Superior, Posterior and Left. That is what the
published SAM saw (array axes z, y, x of an LPS+ image), and what MONAI gives with `Orientationd(keys, axcodes="SPL")`.
An affine here maps an array index (d, h, w), voxel centres at integers, to world RAS+ millimetres (x, y, z).
"""

import math
from collections.abc import Sequence

import nibabel as nib
import numpy as np
from scipy import ndimage

from datasets.ct.intensity import AIR_HU

CANONICAL_AXCODES = "SPL"
BODY_HU = -500  # between air and lung on one side, fat (-120 HU) and everything denser on the other

# Neighbours within an axial slice only: scans end abruptly above and below.
IN_SLICE = np.zeros((3, 3, 3), dtype=bool)
IN_SLICE[1] = ndimage.generate_binary_structure(2, 1)

# Enough input for one step of `resample`, in voxels: bounds its memory at about 16 bytes a voxel of this.
SLAB_VOX = 16 * 2**20


def index_to_world(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    """World mm [..., 3] (x, y, z) of array indices [..., 3] (d, h, w); fractions of a voxel are fine."""
    affine = np.asarray(affine, dtype=np.float64)
    return np.asarray(index, dtype=np.float64) @ affine[:3, :3].T + affine[:3, 3]


def world_to_index(affine: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """Fractional array indices [..., 3] (d, h, w) of world points [..., 3] (x, y, z) in mm."""
    affine = np.asarray(affine, dtype=np.float64)
    return (np.asarray(points_mm, dtype=np.float64) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm along (D, H, W)."""
    lengths = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    return tuple(float(length) for length in lengths)


def to_canonical(array: np.ndarray, nifti_affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn and flip a volume into the canonical orientation; nothing is interpolated.

    Args:
        array: [X, Y, Z] as the file holds it.
        nifti_affine: [4, 4], index in `array` -> world RAS+ mm; oblique and sheared ones keep their angles.

    Returns:
        A view [D, H, W] of `array`, and its affine float64 [4, 4].
    """
    affine = np.asarray(nifti_affine, dtype=np.float64)
    orientations = nib.orientations
    turn = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.axcodes2ornt(tuple(CANONICAL_AXCODES))
    )
    return orientations.apply_orientation(array, turn), affine @ orientations.inv_ornt_aff(turn, array.shape)


def resampled_grid(
    shape: Sequence[int], affine: np.ndarray, spacing_mm: Sequence[float]
) -> tuple[tuple[int, int, int], np.ndarray]:
    """The grid of `spacing_mm` over the same field of view: same centre, size rounded to whole voxels.

    Returns:
        Its shape (D, H, W) and affine float64 [4, 4].
    """
    if len(spacing_mm) != 3 or not all(math.isfinite(value) and value > 0 for value in spacing_mm):
        raise ValueError(f"spacing_mm must be three positive lengths (D, H, W), received {tuple(spacing_mm)}")
    old_shape, affine = np.asarray(shape), np.asarray(affine, dtype=np.float64)
    step = np.asarray(spacing_mm, dtype=np.float64) / spacing_of(affine)  # old voxels per new voxel
    new_shape = np.maximum(1, np.rint(old_shape / step)).astype(int)
    first = (old_shape - 1) / 2 - step * (new_shape - 1) / 2  # old index of the new voxel 0
    new_affine = affine.copy()
    new_affine[:3, :3] = affine[:3, :3] * step
    new_affine[:3, 3] = index_to_world(affine, first)
    return tuple(int(size) for size in new_shape), new_affine


def resample(
    array: np.ndarray, affine: np.ndarray, spacing_mm: Sequence[float], order: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Resample a volume; what was at a place in the world stays there.

    Linear with a triangle filter as wide as the new voxel where it shrinks (so thin structures fade, but do not alias),
    plain linear where it grows. Beyond the border, the border's voxels continue. Works in slabs: memory beyond input
    and output stays near 300 MB at most.

    Args:
        array: [D, H, W] or [C, D, H, W], any real dtype, which the result keeps (integers are rounded).
        affine: [4, 4] index -> world mm.
        spacing_mm: wanted voxel size along (D, H, W).
        order: 1 for intensities, 0 (nearest voxel) for labels.

    Returns:
        The array on the grid of `resampled_grid`, and that grid's affine.
    """
    if order not in (0, 1):
        raise ValueError(f"order must be 0 (nearest, for labels) or 1 (linear), received {order}")
    if array.ndim == 4:
        channels = [resample(channel, affine, spacing_mm, order) for channel in array]
        return np.stack([channel for channel, _ in channels]), channels[0][1]
    shape, new_affine = resampled_grid(array.shape, affine, spacing_mm)
    step = np.asarray(spacing_mm, dtype=np.float64) / spacing_of(affine)
    if shape == array.shape and np.allclose(step, 1, atol=1e-6):
        return array.copy(), new_affine
    if order == 0:
        nearest = [_taps(old, new, s, nearest=True)[0][0] for old, new, s in zip(array.shape, shape, step)]
        return array[np.ix_(*nearest)], new_affine
    taps = [_taps(old, new, s) for old, new, s in zip(array.shape, shape, step)]
    return _resample_linear(array, shape, taps), new_affine


def _taps(num_old: int, num_new: int, step: float, nearest: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Which old voxels make each new one along an axis: indices and weights [T, num_new]; weights sum to 1 over T."""
    centre = (num_old - 1) / 2 + step * (np.arange(num_new) - (num_new - 1) / 2)
    if nearest:
        return np.clip(np.floor(centre + 0.5).astype(int), 0, num_old - 1)[None], np.ones((1, num_new), np.float32)
    reach = max(step, 1.0)
    first = np.floor(centre - reach).astype(int) + 1
    index = first + np.arange(int(math.ceil(2 * reach)))[:, None]  # [T, num_new]
    weight = np.maximum(0, 1 - np.abs(index - centre) / reach)
    weight = weight / weight.sum(axis=0)
    # A sampled triangle leans to one side by up to a few hundredths of a voxel; tilt it upright, so that a ramp stays.
    mean = (weight * index).sum(axis=0)
    variance = (weight * (index - mean) ** 2).sum(axis=0)
    weight = weight * (1 + (centre - mean) * (index - mean) / np.where(variance > 0, variance, 1))
    used = np.abs(weight).max(axis=1) > 0
    return np.clip(index[used], 0, num_old - 1), weight[used].astype(np.float32)


def _resample_linear(array: np.ndarray, shape: tuple[int, int, int], taps: list) -> np.ndarray:
    """Separable resampling, a slab of output slices at a time: in the slices first, then across them."""
    out = np.empty(shape, dtype=array.dtype)
    depth_index, depth_weight = taps[0]
    num_slices = max(1, int(SLAB_VOX / array[0].size * shape[0] / array.shape[0]))
    for begin in range(0, shape[0], num_slices):
        wanted = slice(begin, min(begin + num_slices, shape[0]))
        index, weight = depth_index[:, wanted], depth_weight[:, wanted]
        low, high = int(index.min()), int(index.max()) + 1
        slab = _combine(array[low:high], *taps[1], axis=1)
        slab = _combine(slab, *taps[2], axis=2)
        slab = _combine(slab, index - low, weight, axis=0)
        if np.issubdtype(array.dtype, np.integer):
            np.rint(slab, out=slab)
        out[wanted] = slab
    return out


def _combine(array: np.ndarray, index: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """Sum over taps of weight times the taken voxels along `axis`; float32."""
    if len(index) == 1 and index.shape[1] == array.shape[axis] and np.array_equal(index[0], np.arange(index.shape[1])):
        return array.astype(np.float32)
    around = [1, 1, 1]
    around[axis] = -1
    total = None
    for tap_index, tap_weight in zip(index, weight):
        part = np.take(array, tap_index, axis=axis).astype(np.float32, copy=False)
        part *= tap_weight.reshape(around)
        total = part if total is None else np.add(total, part, out=total)
    return total


def body_mask(hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The patient without air and table: the largest object above -500 HU, its holes (lungs, gas) filled.

    The object is found at about 4 mm, where what is thinner than 12 mm in the slice (table plates, sheets, tubes) is
    opened away unless it is the wall of a lung; its surface is then taken at full resolution.

    Args:
        hu: [D, H, W] in HU; padding below -1024 counts as air.
        spacing_mm: voxel size (D, H, W).

    Returns:
        bool [D, H, W]; all False where nothing is denser than -500 HU.
    """
    affine = np.diag([*spacing_mm, 1.0])
    coarse_mm = [max(4.0, value) for value in spacing_mm]
    coarse, _ = resample(np.maximum(hu, AIR_HU), affine, coarse_mm)
    inside = _largest_object(coarse > BODY_HU)
    if not inside.any():
        return np.zeros(hu.shape, dtype=bool)
    core = ndimage.binary_erosion(inside, IN_SLICE, border_value=1)
    rim = ndimage.binary_dilation(inside, IN_SLICE)
    nearest = np.ix_(
        *(
            _taps(num_coarse, num_fine, fine_mm / wide_mm, nearest=True)[0][0]
            for num_coarse, num_fine, fine_mm, wide_mm in zip(coarse.shape, hu.shape, spacing_mm, coarse_mm)
        )
    )
    return core[nearest] | (rim[nearest] & (hu > BODY_HU))


def _largest_object(dense: np.ndarray) -> np.ndarray:
    """The largest component of a mask after an opening in each slice, with its thin walls and its holes."""
    opened = ndimage.binary_dilation(ndimage.binary_erosion(dense, IN_SLICE, border_value=1), IN_SLICE)
    labels, num_objects = ndimage.label(opened)
    if num_objects == 0:
        return opened
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    regrown = ndimage.binary_dilation(largest, IN_SLICE, iterations=2, mask=dense)
    # A chest wall thinner than the opening has gaps now, through which the lungs would count as outside.
    lungs = _enclosed_cavities(ndimage.binary_propagation(regrown, IN_SLICE, mask=dense), regrown)
    wall = ndimage.binary_dilation(lungs, IN_SLICE, iterations=3, mask=dense)
    return _fill_slices(regrown | lungs | wall)


def _enclosed_cavities(outline: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """The holes that `outline` has in its slices and that are bounded mostly by its part `solid`.

    So lungs behind a thin wall count, and neither the inside of a table nor the gap between it and the back does.
    """
    cavities, num_cavities = ndimage.label(_fill_slices(outline) & ~outline, IN_SLICE)
    border, solid_border = np.zeros(num_cavities + 1), np.zeros(num_cavities + 1)
    for axis in (1, 2):
        for step in (-1, 1):
            beside = np.roll(cavities, step, axis)
            border += np.bincount(beside[outline], minlength=num_cavities + 1)
            solid_border += np.bincount(beside[solid], minlength=num_cavities + 1)
    accepted = solid_border > 0.6 * border
    accepted[0] = False
    return accepted[cavities]


def _fill_slices(mask: np.ndarray) -> np.ndarray:
    """The mask with the holes of every slice filled."""
    return np.stack([ndimage.binary_fill_holes(axial) for axial in mask])


def mask_box(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box around a mask: first voxel and one past the last, int [3] each; the whole volume if the mask is empty."""
    start, stop = np.zeros(3, dtype=int), np.array(mask.shape)
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        if len(used):
            start[axis], stop[axis] = used[0], used[-1] + 1
    return start, stop


def grown_box(
    start: np.ndarray, stop: np.ndarray, margin: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A box with a margin around it, voxels [3], rounded up, as far as a volume of `shape` goes."""
    margin = np.ceil(margin).astype(int)
    return np.maximum(start - margin, 0), np.minimum(stop + margin, shape)

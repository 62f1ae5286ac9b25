"""Reading CT and labels, and writing NIfTI: one canonical orientation, int16 HU, errors that name file and reason.

Files come in any orientation, integer or float, with or without scl_slope, padded with -3024 outside the field of view.
What comes out is always [D, H, W] in "SPL" (see `datasets.ct.geometry`), clamped to [-1024, 3071] HU.
"""

import gzip
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from datasets.ct.file_checks import CTReadError, check_extent
from datasets.ct.formats import NIFTI_SUFFIXES, read_voxels
from datasets.ct.geometry import index_to_world, spacing_of, to_canonical
from datasets.store.files import write_bytes

HU_MIN, HU_MAX = -1024, 3071
# Metal fills less of a CT than this share; a CT spans more HU. What breaks either is in other units.
MOST_ABOVE = 0.01
LEAST_SPAN = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Volume:
    """A volume in the canonical orientation.

    Attributes:
        array: [D, H, W]; int16 HU of a CT, uint8 or int16 of labels. [C, D, H, W] of several channels.
        affine: float64 [4, 4], array index (d, h, w) -> world RAS+ mm.
        path: the file it was read from.
    """

    array: np.ndarray
    affine: np.ndarray
    path: str

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along (D, H, W)."""
        return spacing_of(self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return self.array.shape[-3:]

    @property
    def num_channels(self) -> int:
        return 1 if self.array.ndim == 3 else self.array.shape[0]


def read_ct(path: str | Path) -> Volume:
    """Read one CT volume from `.nii`, `.nii.gz`, `.mha`, `.mhd`, `.nrrd` or the folder of a DICOM series.

    Returns:
        int16 HU [D, H, W], clamped to [-1024, 3071] (so that padding with -3024 becomes air).

    NaN that reaches from the volume's border inwards is padding and becomes air, with a note.

    Raises:
        CTReadError: missing, truncated or damaged file, another format, not 3-D (a trailing axis of length 1 is
            dropped), zero spacing, singular affine, a size that no patient has, no voxels, one value throughout, voxels
            that are not finite, or values in other units, which would be cut off or rounded away; for a DICOM folder
            also what `dicom.open_series` refuses.
    """
    raw, affine = read_voxels(path)
    raw = _with_air_for_nan(raw, path)
    low, high = finite_range(raw, path)
    if low == high:
        raise CTReadError(f"{path}: every voxel is {low:g}; expected a CT with contrast between air and tissue")
    if high - low < LEAST_SPAN and raw.dtype.kind == "f" and (raw != np.rint(raw)).any():
        raise CTReadError(
            f"{path}: values lie in [{low:g}, {high:g}], which is no CT in HU (scaled to [0, 1]?) and would be rounded "
            "to whole numbers; expected HU, or other units stretched to some hundreds"
        )
    if high > HU_MAX and (above := float((raw > HU_MAX).mean())) > MOST_ABOVE:
        raise CTReadError(
            f"{path}: {above:.0%} of voxels lie above {HU_MAX} (up to {high:g}) and would be cut off there; expected "
            f"HU. Store MR with --modality mr (scripts/prepare_volumes.py); rescale raw scanner values to "
            f"{HU_MIN} to {HU_MAX}"
        )
    array = _as_int16(raw, HU_MIN, HU_MAX)
    if array.min() == array.max():
        raise CTReadError(
            f"{path}: all values lie in [{low:g}, {high:g}], outside of {HU_MIN} to {HU_MAX} HU; expected a CT in HU"
        )
    check_extent(affine, raw.shape, path)
    return Volume(*canonical(array, affine), str(path))


def read_label(path: str | Path) -> Volume:
    """Read one label map: whole numbers from 0 to 32767, as uint8 where they fit and int16 otherwise.

    Raises:
        CTReadError: as `read_ct`, and for values that are no labels; a map of zeros is fine.
    """
    raw, affine = read_voxels(path)
    low, high = finite_range(raw, path)
    if low < 0 or high > np.iinfo(np.int16).max:
        raise CTReadError(f"{path}: label values run from {low:g} to {high:g}, expected 0 to 32767")
    array = raw.astype(np.uint8 if high <= 255 else np.int16)
    if np.issubdtype(raw.dtype, np.floating) and not np.allclose(array, raw, rtol=0, atol=1e-3):
        # A float label a hair below its whole number (scl_slope arithmetic) would be cut, so round before judging.
        array = np.rint(raw).astype(array.dtype)
        if not np.allclose(array, raw, rtol=0, atol=1e-3):
            raise CTReadError(f"{path}: label values are not whole numbers; is this an image?")
    return Volume(*canonical(array, affine), str(path))


def read_label_of(image: Volume, path: str | Path) -> Volume:
    """Read the label map of an image.

    Raises:
        CTReadError: as `read_label`, and for a map that does not lie on the image's grid.
    """
    label = read_label(path)
    check_same_grid(label, image.shape, image.affine, image.path)
    return label


def check_same_grid(label: Volume, shape: tuple[int, int, int], affine: np.ndarray, image_path: str | Path) -> None:
    """Check that a label's voxels are those of its image.

    Raises:
        CTReadError: another shape, or a corner further than half a voxel beside the image's; less is rounding.
    """
    if label.shape != shape:
        raise CTReadError(f"{label.path}: label has shape {label.shape}, its image {image_path} has {shape}")
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape])).reshape(3, -1).T
    apart_mm = np.abs(index_to_world(label.affine, corners) - index_to_world(affine, corners)).max()
    if apart_mm > min(spacing_of(affine)) / 2:
        raise CTReadError(
            f"{label.path}: label lies {apart_mm:.1f} mm beside its image {image_path}; write it with that affine"
        )


def write_nifti(path: str | Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a canonical array [D, H, W] so that every reader puts its voxels at the same world place.

    The file's axes are (W, H, D), i.e. LPS like most converted DICOM. Whole file or none appears at `path`.

    Args:
        path: `.nii` or `.nii.gz`.
        array: [D, H, W]; bool and 64-bit integers are stored in a smaller integer type.
        affine: [4, 4], array index -> world mm.

    Raises:
        ValueError: another suffix, or an array that is not 3-D.
    """
    if array.ndim != 3:
        raise ValueError(f"{path}: expected an array [D, H, W], received shape {array.shape}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype in (np.int64, np.uint64):
        array = array.astype(np.int16 if np.abs(array).max(initial=0) <= np.iinfo(np.int16).max else np.int32)
    file_affine = np.asarray(affine, dtype=np.float64)[:, [2, 1, 0, 3]]
    write_image(path, nib.Nifti1Image(array.transpose(2, 1, 0), file_affine))


def write_image(path: str | Path, image: nib.Nifti1Image) -> None:
    """Write a NIfTI image; whole file or none appears at `path`, and the same image gives the same file.

    Raises:
        ValueError: another suffix than .nii or .nii.gz.
    """
    path = Path(path)
    if not path.name.endswith(NIFTI_SUFFIXES):
        raise ValueError(f"{path}: expected a name ending in .nii or .nii.gz")
    content = image.to_bytes()
    write_bytes(path, gzip.compress(content, compresslevel=5, mtime=0) if path.name.endswith(".gz") else content)


def _with_air_for_nan(raw: np.ndarray, path: str | Path) -> np.ndarray:
    """The voxels, air instead of the NaN with which some resamplers fill what lies outside of the scan."""
    if raw.dtype.kind != "f" or not np.isnan(raw.min()):
        return raw
    is_nan = np.isnan(raw)
    parts, num_parts = ndimage.label(is_nan)
    at_border = np.unique(np.concatenate([parts.take((0, -1), axis).ravel() for axis in range(3)]))
    if is_nan.all() or len(at_border[at_border > 0]) < num_parts:  # NaN within the patient is damage
        return raw
    logger.warning("%s: %.1f %% of voxels are NaN, all at the border; read as air", path, 100 * is_nan.mean())
    return np.where(is_nan, raw.dtype.type(HU_MIN), raw)


def finite_range(raw: np.ndarray, path: str | Path) -> tuple[float, float]:
    """Lowest and highest value; NaN and infinities show up in one of the two, without a mask as big as the volume."""
    low, high = float(raw.min()), float(raw.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        num_bad = int(np.count_nonzero(~np.isfinite(raw)))
        raise CTReadError(f"{path}: {num_bad} of {raw.size} voxels are not finite (NaN or infinite)")
    return low, high


def _as_int16(raw: np.ndarray, low: int, high: int) -> np.ndarray:
    """Rounded and clamped to [low, high]."""
    if raw.dtype.kind == "f":
        return np.rint(np.clip(raw, low, high)).astype(np.int16)
    info = np.iinfo(raw.dtype)
    return np.clip(raw, max(low, info.min), min(high, info.max)).astype(np.int16)


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turned to SPL, contiguous and writable."""
    turned, turned_affine = to_canonical(array, affine)
    return np.require(turned, requirements=["C", "W", "O"]), turned_affine

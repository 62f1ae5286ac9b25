"""The header of a NIfTI file: checked, and turned into voxels' places in world mm.

The affine is the one that nibabel takes: sform, else qform, else the spacing alone. Lengths in metres or microns
(xyzt_units) become mm. What is legal but may surprise is said once per file, in the log.
"""

import io
import itertools
import logging
import math
from pathlib import Path

import nibabel as nib
import numpy as np

from datasets.ct.file_checks import CTReadError, check_affine
from datasets.ct.geometry import index_to_world, spacing_of

MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}
SPACING_TOLERANCE = 0.01  # by which pixdim and the affine may differ before it is said

logger = logging.getLogger(__name__)


def read_header(content: bytes, path: str | Path) -> nib.Nifti1Header:
    """The NIfTI-1 or NIfTI-2 header of a single-file image."""
    if not content:
        raise CTReadError(f"{path}: the file is empty (0 bytes)")
    for kind, magic_at in ((nib.Nifti1Header, 344), (nib.Nifti2Header, 4)):
        if content[magic_at : magic_at + 4] in (b"n+1\0", b"n+2\0"):
            try:
                # Unchecked: nibabel's check would quietly turn a zero spacing into 1 mm.
                header = kind.from_fileobj(io.BytesIO(content), check=False)
                # All raise on what does not exist: codes, a NaN for an offset, a shape that no file has.
                header.get_data_dtype(), header.get_slope_inter(), header.get_data_shape(), header.get_data_offset()
                return header
            except KeyError as error:
                raise CTReadError(f"{path}: unknown voxel type code {error} in the header") from error
            except (
                nib.spatialimages.HeaderDataError,
                nib.wrapstruct.WrapStructError,
                ValueError,
                OverflowError,
            ) as error:
                raise CTReadError(f"{path}: damaged NIfTI header ({error})") from error
    raise CTReadError(f"{path}: not a NIfTI file; the header does not say n+1 or n+2")


def checked_affine(header: nib.Nifti1Header, shape: tuple[int, int, int], path: str | Path) -> np.ndarray:
    """The affine in mm, if it can place voxels in the world.

    Raises:
        CTReadError: it cannot.
    """
    pixdim = np.array([float(value) for value in header["pixdim"][1:4]])
    if not all(math.isfinite(value) and value != 0 for value in pixdim):
        raise CTReadError(f"{path}: voxel spacing {tuple(pixdim.tolist())} mm, expected three lengths above zero")
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise CTReadError(f"{path}: unusable orientation in the header ({error})") from error
    mm_per_unit = _mm_per_unit(header)
    affine[:3] *= mm_per_unit
    check_affine(affine, path)
    for note in _notes(header, affine, np.abs(pixdim) * mm_per_unit, mm_per_unit, shape):
        logger.warning("%s: %s", path, note)
    return affine


def _mm_per_unit(header: nib.Nifti1Header) -> float:
    """Of the lengths in the header; what states no unit, or none that exists, is in mm."""
    try:
        return MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    except KeyError:
        return 1.0


def _notes(
    header: nib.Nifti1Header, affine: np.ndarray, pixdim_mm: np.ndarray, mm_per_unit: float, shape: tuple[int, int, int]
) -> list[str]:
    """What a reader of the same file by other rules would see otherwise."""
    notes, spacing = [], np.array(spacing_of(affine))
    if np.abs(pixdim_mm / spacing - 1).max() > SPACING_TOLERANCE:
        values = ", ".join(f"{value:.4g}" for value in pixdim_mm), ", ".join(f"{value:.4g}" for value in spacing)
        notes.append(f"pixdim says voxels of {values[0]} mm, the affine {values[1]} mm, which counts")
    if header["sform_code"] > 0 and header["qform_code"] > 0:
        corners = np.array(list(itertools.product(*((0, size - 1) for size in shape))))
        qform = np.asarray(header.get_qform(), dtype=np.float64)
        qform[:3] *= mm_per_unit
        apart_mm = np.linalg.norm(index_to_world(qform, corners) - index_to_world(affine, corners), axis=1).max()
        if apart_mm > spacing.min():
            notes.append(
                f"sform and qform differ by up to {apart_mm:.3g} mm; the sform counts. Labels made by software that "
                "follows the qform (ITK may) lie elsewhere"
            )
    return notes

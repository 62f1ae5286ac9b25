"""Displacement fields: where the places of one volume lie in another one, in the form that ITK and 3D Slicer read.

A field maps a point p of the fixed volume to p + u(p) in the moving one, so that resampling by it brings the moving
volume onto the fixed one's voxels. ITK counts in LPS+ mm; arguments here are RAS+ as everywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from datasets.ct.geometry import spacing_of
from datasets.ct.intensity import AIR_HU
from datasets.ct.itk_files import LPS_TO_RAS
from datasets.ct.nifti import Volume, write_image

if TYPE_CHECKING:
    import SimpleITK


def write_displacement(path: str | Path, displacement_mm: np.ndarray, affine: np.ndarray) -> None:
    """Write a field that `SimpleITK.ReadImage` and `DisplacementFieldTransform` take. Whole file or none appears.

    Args:
        path: `.nii` or `.nii.gz`.
        displacement_mm: [d, h, w, 3], RAS+ mm.
        affine: [4, 4], node index (d, h, w) -> world RAS+ mm of the fixed volume.
    """
    vectors_lps, affine = _padded(displacement_mm, affine)
    voxels = vectors_lps.astype(np.float32).transpose(2, 1, 0, 3)[:, :, :, None]  # [X, Y, Z, time, vector]
    image = nib.Nifti1Image(voxels, affine[:, [2, 1, 0, 3]])
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    write_image(path, image)


def warp(
    moving: Volume, displacement_mm: np.ndarray, affine: np.ndarray, shape: Sequence[int], fixed_affine: np.ndarray
) -> np.ndarray:
    """The moving CT on a fixed grid: int16 HU of `shape`; linear interpolation, air where it ends.

    Args:
        displacement_mm, affine: as for `write_displacement`.
        shape, fixed_affine: the grid, (D, H, W) and index -> world RAS+ mm.
    """
    import SimpleITK

    vectors_lps, affine = _padded(displacement_mm, affine)
    field = SimpleITK.GetImageFromArray(vectors_lps.astype(np.float64), isVector=True)
    _place(field, affine)
    transform = SimpleITK.DisplacementFieldTransform(field)
    resampler = SimpleITK.ResampleImageFilter()
    resampler.SetTransform(transform)
    resampler.SetDefaultPixelValue(AIR_HU)
    resampler.SetSize([int(size) for size in reversed(shape)])
    origin, spacing, direction = _itk_grid(fixed_affine)
    resampler.SetOutputOrigin(origin)
    resampler.SetOutputSpacing(spacing)
    resampler.SetOutputDirection(direction)
    resampler.SetOutputPixelType(SimpleITK.sitkFloat32)  # as integers ITK would cut off what follows the point
    image = SimpleITK.GetImageFromArray(moving.array)
    _place(image, moving.affine)
    return np.rint(SimpleITK.GetArrayFromImage(resampler.Execute(image))).astype(np.int16)


def _padded(displacement_mm: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The field in LPS+ mm with one node more at each end, since ITK takes it for 0 beyond its outermost nodes."""
    first = np.eye(4)
    first[:3, 3] = -1
    vectors = np.pad(displacement_mm @ LPS_TO_RAS, ((1, 1),) * 3 + ((0, 0),), mode="edge")
    return vectors, np.asarray(affine, dtype=np.float64) @ first


def _place(image: "SimpleITK.Image", affine: np.ndarray) -> None:
    """Tell an image that was made of an array [D, H, W] where it lies."""
    origin, spacing, direction = _itk_grid(affine)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(direction)


def _itk_grid(affine: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """Origin, spacing and direction in ITK's order (w, h, d) and LPS+ mm."""
    spacing = np.array(spacing_of(affine))
    steps = LPS_TO_RAS @ (np.asarray(affine)[:3, :3] / spacing)
    return (LPS_TO_RAS @ affine[:3, 3]).tolist(), spacing[::-1].tolist(), steps[:, ::-1].ravel().tolist()

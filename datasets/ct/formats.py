"""The file formats of CT and label maps: chosen by name, read as voxels in file order.

NIfTI is read with nibabel; .mha, .mhd, .nrrd and folders that hold one DICOM series with SimpleITK.
"""

from pathlib import Path

import nibabel as nib
import numpy as np

from datasets.ct import dicom, itk_files, metaimage, nifti_voxels
from datasets.ct.file_checks import CTReadError, channel_axes

NIFTI_SUFFIXES = (".nii.gz", ".nii")
META_SUFFIXES = (".mha", ".mhd")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *META_SUFFIXES, ".nrrd")
EXPECTED = ".nii, .nii.gz, .mha, .mhd, .nrrd, or a folder that holds one DICOM series"


def read_voxels(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a volume as its file holds it.

    Returns:
        Voxels [X, Y, Z] in the file's order (rescaled where the file says how), and the affine float64 [4, 4], index ->
        world RAS+ mm.

    Raises:
        CTReadError: missing, truncated or damaged file, another format, not 3-D, no real numbers, or an unusable
            affine; of a DICOM folder also what `dicom.open_series` refuses.
    """
    if is_nifti(path):
        return nifti_voxels.read_nifti(path)
    if is_volume_file(path):
        return itk_files.read_itk(path)
    return dicom.read_series(_series_folder(path))


def read_channels(path: str | Path) -> tuple[list[np.ndarray], np.ndarray]:
    """As `read_voxels`, but a NIfTI file may be 4-D: voxels [X, Y, Z] of every channel, and the affine."""
    if is_nifti(path):
        return nifti_voxels.read_nifti_channels(path)
    raw, affine = read_voxels(path)
    return [raw], affine


def count_channels(path: str | Path) -> int:
    """The channels of a file as `read_channels` gives them; no voxel is read.

    Raises:
        CTReadError: not a readable NIfTI file by its name, or several axes of channels.
    """
    if not is_nifti(path):
        return 1
    try:
        return channel_axes(nib.load(path).shape, path)[3]
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError, KeyError) as error:
        raise CTReadError(f"{path}: not readable as NIfTI ({error})") from error


def read_grid(path: str | Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape (X, Y, Z) and affine of a file that is not NIfTI, as `read_voxels` gives them; no voxel is read."""
    if is_volume_file(path):
        header = itk_files.read_header(path)
        return header.shape, header.affine
    series = dicom.open_series(_series_folder(path))
    return series.shape, series.affine


def files_of(path: str | Path) -> list[Path]:
    """The files that hold an image or a label map: one, or a MetaImage header and its data, or a folder's slices.

    Raises:
        CTReadError: no MetaImage header.
    """
    path = Path(path)
    if path.name.endswith(META_SUFFIXES) and path.is_file():
        return list(dict.fromkeys((path, metaimage.read_header(path).data_file)))
    return dicom.dicom_files(path)[0] if path.is_dir() else [path]


def is_nifti(path: str | Path) -> bool:
    """Whether a file is NIfTI by its name."""
    return str(path).endswith(NIFTI_SUFFIXES)


def is_volume_file(path: str | Path) -> bool:
    """Whether a file is one of the formats above by its name."""
    return str(path).endswith(VOLUME_SUFFIXES)


def _series_folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        there = "this is neither" if Path(path).exists() else "there is no such file or folder"
        raise CTReadError(f"{path}: expected {EXPECTED}; {there}")
    return Path(path)

"""The voxel grid of a CT file as it is on disk: does a label lie on it, and writing label maps that do.

Inside the project volumes are canonical; a user's viewer and scripts want a prediction with the input file's own axis
order, shape and affine.
"""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from datasets.ct.formats import is_nifti, read_grid
from datasets.ct.geometry import CANONICAL_AXCODES, to_canonical
from datasets.ct.nifti import CTReadError, write_image

SCANNER = 1  # NIfTI's code of a world that the scanner defines
CONFIDENCE_STEPS = 128  # a power of 2: the header's float32 then holds the step exactly, and 1 is read as 1


@dataclass(frozen=True)
class FileGrid:
    """A file's first three axes: shape [X, Y, Z], affine [4, 4] and the codes that say what its world is."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    world_code: int

    def canonical(self) -> tuple[tuple[int, int, int], np.ndarray]:
        """Shape (D, H, W) and affine of this file's volume once it is turned; no voxel is read."""
        turned, affine = to_canonical(np.broadcast_to(np.uint8(0), self.shape), self.affine)
        return turned.shape, affine

    def from_canonical(self, array: np.ndarray) -> np.ndarray:
        """Turn a canonical array [D, H, W] back to the file's axes [X, Y, Z].

        Raises:
            ValueError: the array is not this file's volume turned.
        """
        orientations = nib.orientations
        back = orientations.ornt_transform(
            orientations.axcodes2ornt(tuple(CANONICAL_AXCODES)), orientations.io_orientation(self.affine)
        )
        turned = orientations.apply_orientation(array, back)
        if turned.shape != self.shape:
            raise ValueError(f"an array of {array.shape} becomes {turned.shape}, expected the file's {self.shape}")
        return turned


def read_file_grid(path: str | Path) -> FileGrid:
    """The grid of an image file, from its header.

    Raises:
        CTReadError: not a readable NIfTI file, or as `formats.read_grid`.
    """
    if not is_nifti(path):
        return FileGrid(*read_grid(path), SCANNER)
    try:
        image = nib.load(path)
        world_code = int(image.header["sform_code"]) or int(image.header["qform_code"])
        return FileGrid(tuple(image.shape[:3]), np.asarray(image.affine, dtype=np.float64), world_code)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError, KeyError) as error:
        raise CTReadError(f"{path}: not readable as NIfTI ({error})") from error


def write_label_like(path: str | Path, labels: np.ndarray, grid: FileGrid) -> None:
    """Write a canonical label map [D, H, W] on a file's own grid. Whole file or none appears at `path`.

    Raises:
        ValueError: another suffix than .nii or .nii.gz, or labels of another volume.
    """
    write_image(path, _image_on(grid, labels))


def write_ct_like(path: str | Path, hu: np.ndarray, grid: FileGrid) -> None:
    """Write a canonical CT [D, H, W], int16 HU, on a file's own grid. Whole file or none appears at `path`.

    Raises:
        ValueError: as `write_label_like`.
    """
    write_image(path, _image_on(grid, hu))


def write_confidence_like(path: str | Path, confidence: np.ndarray, grid: FileGrid) -> None:
    """Write a canonical map [D, H, W] of shares from 0 to 1 on a file's own grid, in steps of 1/128 (a byte a voxel).

    Raises:
        ValueError: as `write_label_like`.
    """
    image = _image_on(grid, np.rint(confidence * CONFIDENCE_STEPS).astype(np.uint8))
    image.header.set_slope_inter(1 / CONFIDENCE_STEPS, 0)
    write_image(path, image)


def _image_on(grid: FileGrid, array: np.ndarray) -> nib.Nifti1Image:
    """A canonical array [D, H, W] as an image with a file's axes and place."""
    image = nib.Nifti1Image(grid.from_canonical(array), grid.affine)
    image.header.set_xyzt_units("mm")
    code = grid.world_code or SCANNER
    image.set_sform(grid.affine, code)
    image.set_qform(grid.affine, code)
    return image

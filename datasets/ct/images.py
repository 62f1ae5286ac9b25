"""Reading an image and its labels by what the file is, and writing labels: PNG is a radiograph, all else CT."""

from pathlib import Path

import numpy as np

from datasets.ct import file_grid, nifti, radiograph
from datasets.ct.nifti import Volume

CT, RADIOGRAPH = "ct", "radiograph"


def kind_of(path: str | Path) -> str:
    """What a file holds by its name: RADIOGRAPH for `.png`, else CT."""
    return RADIOGRAPH if Path(path).suffix.lower() == radiograph.SUFFIX else CT


def read_image(path: str | Path) -> Volume:
    """A CT (`nifti.read_ct`) or a `Radiograph` (`radiograph.read_radiograph`), with their errors."""
    return radiograph.read_radiograph(path) if kind_of(path) == RADIOGRAPH else nifti.read_ct(path)


def read_labels_of(image: Volume, path: str | Path) -> Volume:
    """The label map of an image (`nifti.read_label_of`), or the mask of a radiograph (`radiograph.read_mask_of`)."""
    read = radiograph.read_mask_of if kind_of(path) == RADIOGRAPH else nifti.read_label_of
    return read(image, path)


def write_labels_like(path: str | Path, labels: np.ndarray, like: str | Path) -> None:
    """Write label values [D, H, W] on the voxels of a file: a grey PNG beside PNG, NIfTI beside any CT.

    Raises:
        ValueError: another suffix than that kind has, or labels of another volume.
    """
    if kind_of(like) == RADIOGRAPH:
        radiograph.write_mask_like(path, labels, like)
    else:
        file_grid.write_label_like(path, labels, file_grid.read_file_grid(like))

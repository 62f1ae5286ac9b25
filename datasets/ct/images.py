"""Reading an image and its labels by what the file is, and writing labels.

A PNG is a radiograph. All other files hold CT or MR, which their names do not say. Whoever reads MR gives the
percentiles of its intensity map (`datasets.ct.mr`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.ct import file_grid, mr, nifti, radiograph
from datasets.ct.nifti import CTReadError, Volume

CT, RADIOGRAPH, MR = "ct", "radiograph", "mr"
NAMES = {CT: "CT", RADIOGRAPH: "radiographs", MR: "MR"}  # for messages


def kind_of(path: str | Path) -> str:
    """What a file holds by its name: RADIOGRAPH for `.png`, else CT (or MR, which no name says)."""
    return RADIOGRAPH if Path(path).suffix.lower() == radiograph.SUFFIX else CT


def read_image(source: str | Path | Sequence[str | Path], mr_percentiles: Sequence[float] | None = None) -> Volume:
    """A CT (`nifti.read_ct`), a `Radiograph` (`radiograph.read_radiograph`) or an `MRVolume` (`mr.read_mr`).

    Args:
        source: a file; of MR also several ones, with a channel each.
        mr_percentiles: of an MR's intensity map; None = a CT or a radiograph.

    Raises:
        CTReadError: as the three, or several files that are no MR.
    """
    if mr_percentiles is not None:
        return mr.read_mr(source, mr_percentiles)
    if not isinstance(source, str | Path):
        raise CTReadError(f"{source[0]}: a case of {len(source)} files; only MR has channels (--modality mr)")
    return radiograph.read_radiograph(source) if kind_of(source) == RADIOGRAPH else nifti.read_ct(source)


def read_labels_of(image: Volume, path: str | Path) -> Volume:
    """The label map of an image (`nifti.read_label_of`), or the mask of a radiograph (`radiograph.read_mask_of`)."""
    read = radiograph.read_mask_of if kind_of(path) == RADIOGRAPH else nifti.read_label_of
    return read(image, path)


def write_labels_like(path: str | Path, labels: np.ndarray, like: str | Path) -> None:
    """Write label values [D, H, W] on the voxels of a file: a grey PNG beside PNG, NIfTI beside any CT or MR.

    Raises:
        ValueError: another suffix than that kind has, or labels of another volume.
    """
    if kind_of(like) == RADIOGRAPH:
        radiograph.write_mask_like(path, labels, like)
    else:
        file_grid.write_label_like(path, labels, file_grid.read_file_grid(like))

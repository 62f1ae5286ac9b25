"""Reading an image and its labels by what the file is: NIfTI is CT, PNG is a radiograph."""

from pathlib import Path

from datasets.ct import nifti, radiograph
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

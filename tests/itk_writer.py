"""Volumes written with SimpleITK: files, and folders of DICOM slices with any tag that a test wants."""

import locale
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from datasets.ct.itk_files import USERS_LOCALE

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
CT_TAGS = {"0008|0060": "CT", "0008|103e": "THIN", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4"}
SLOPE, INTERCEPT = "0028|1053", "0028|1052"


def itk_image(array: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """An image of array [X, Y, Z] that lies in the world as a NIfTI file of this affine (RAS+) does."""
    image = SimpleITK.GetImageFromArray(array.T)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((LPS_TO_RAS @ affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((LPS_TO_RAS @ affine[:3, 3]).tolist())
    return image


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray, compress: bool = False) -> Path:
    """Write array [X, Y, Z] as `.mha`, `.mhd` or `.nrrd`."""
    SimpleITK.WriteImage(itk_image(array, affine), str(path), useCompression=compress)
    return path


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    tags: Mapping[str, str] | None = None,
    tags_of: Callable[[int], Mapping[str, str]] = lambda number: {},
    skip: Sequence[int] = (),
    position_of: Callable[[int, np.ndarray], np.ndarray] = lambda number, position: position,
) -> Path:
    """Write array [X, Y, Z] as DICOM slices along Z.

    Args:
        folder: where; made if missing.
        array, affine: as a NIfTI file (RAS+) would have them.
        tags: of all slices, beside `CT_TAGS`.
        tags_of: slice number -> further tags.
        skip: slices that are not written.
        position_of: slice number and right position (LPS+) -> the position written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = LPS_TO_RAS @ affine[:3, :3]
    spacing = np.linalg.norm(steps, axis=0)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(array.shape[2]):
        if number in skip:
            continue
        image = SimpleITK.GetImageFromArray(array[:, :, number].T)
        image.SetSpacing(spacing[:2].tolist())
        position = position_of(number, LPS_TO_RAS @ affine[:3, 3] + number * steps[:, 2])
        place = {
            "0020|0032": "\\".join(f"{value:.6f}" for value in position),
            "0020|0037": "\\".join(f"{value:.8f}" for value in (steps / spacing)[:, :2].T.ravel()),
            "0020|0013": str(number),
        }
        series = (tags or {}).get("0020|000e", CT_TAGS["0020|000e"])
        for tag, value in (
            CT_TAGS | {"0008|0018": f"{series}.{number + 1}"} | place | dict(tags or {}) | dict(tags_of(number))
        ).items():
            image.SetMetaData(tag, value)
        # Not in order: names say nothing of places.
        writer.SetFileName(str(folder / f"{series}_{number * 7 % 101:03d}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_CTYPE, USERS_LOCALE)  # writing DICOM leaves C's, and files open as ASCII
    return folder

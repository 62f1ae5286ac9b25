"""Reading .mha, .mhd and .nrrd files with SimpleITK, which is imported only when one is read.

ITK's world is LPS+ (x to the left, y to the back); affines are turned to RAS+ here.
"""

import locale
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.ct import metaimage
from datasets.ct.file_checks import CTReadError, check_affine, three_axes

if TYPE_CHECKING:
    import SimpleITK

NRRD_SUFFIX = ".nrrd"
USERS_LOCALE = locale.setlocale(locale.LC_CTYPE)  # once, since threads that read side by side would see each other's
REAL_TYPE = re.compile(r"(\d+)-bit (?:signed integer|unsigned integer|float)")
MOST_SHRUNK = 1100  # deflate packs at most 1032 bytes into one
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class ItkHeader:
    """What a file says of its voxels.

    Attributes:
        shape: (X, Y, Z), in the file's order.
        affine: float64 [4, 4], index -> world RAS+ mm.
        reader: the SimpleITK reader, ready to read the voxels.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    reader: "SimpleITK.ImageFileReader"


def read_itk(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels of a `.mha`, `.mhd` or `.nrrd` file.

    Returns:
        Voxels [X, Y, Z] in the file's order and type, and the affine float64 [4, 4] to world RAS+ mm.

    Raises:
        CTReadError: missing, truncated or damaged file, another format, not 3-D, several channels, no real numbers, or
            an unusable affine.
    """
    import SimpleITK

    header = read_header(path)
    image = attempt(header.reader.Execute, path)
    return SimpleITK.GetArrayFromImage(image).T.reshape(header.shape), header.affine


def read_header(path: str | Path) -> ItkHeader:
    """Shape and affine of a `.mha`, `.mhd` or `.nrrd` file, checked; a compressed MetaImage is unpacked for it.

    Raises:
        CTReadError: as `read_itk`.
    """
    import SimpleITK

    path = Path(path)
    if not path.is_file():
        raise CTReadError(f"{path}: {'cannot be read (no regular file)' if path.exists() else 'no such file'}")
    is_nrrd = path.name.endswith(NRRD_SUFFIX)
    if is_nrrd:
        _check_one_file(path)
    else:
        metaimage.read_header(path)
    reader = open_reader(path, "NrrdImageIO" if is_nrrd else "MetaImageIO")
    shape = three_axes(reader.GetSize(), path)
    if reader.GetNumberOfComponents() != 1:
        raise CTReadError(f"{path}: {reader.GetNumberOfComponents()} values a voxel, expected one channel")
    voxel_type = SimpleITK.GetPixelIDValueAsString(reader.GetPixelIDValue())
    if not (found := REAL_TYPE.fullmatch(voxel_type)):
        raise CTReadError(f"{path}: voxel type {voxel_type} is not a real number; expected integers or floats")
    num_bytes = math.prod(shape) * int(found[1]) // 8
    if not is_nrrd:
        metaimage.check_voxels(path, num_bytes)
    elif num_bytes > MOST_SHRUNK * path.stat().st_size:  # before ITK asks for the memory
        raise CTReadError(
            f"{path}: truncated; shape {shape} of {voxel_type} needs {num_bytes} bytes, received {path.stat().st_size}"
        )
    num_axes = reader.GetDimension()
    directions = np.array(reader.GetDirection()).reshape(num_axes, num_axes)[:3, :3]
    affine = ras_affine(directions * reader.GetSpacing()[:3], reader.GetOrigin()[:3])
    check_affine(affine, path)
    return ItkHeader(shape, affine, reader)


def open_reader(path: Path, image_io: str) -> "SimpleITK.ImageFileReader":
    """A reader of one file that has read the header.

    Args:
        path: the file.
        image_io: the only format to try, as ITK names it.

    Raises:
        CTReadError: ITK cannot read the header.
    """
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    attempt(reader.ReadImageInformation, path)
    return reader


def attempt(read: Callable[[], Any], path: str | Path) -> Any:
    """What `read` returns; ITK's errors become a CTReadError that names the file.

    Where several threads read, ITK may leave the C locale behind, in which Python opens text files as ASCII; the user's
    is put back.
    """
    try:
        return read()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in reversed(lines) if line and not line.startswith("Reason:")), "no reason given")
        raise CTReadError(f"{path}: truncated, damaged or not of its format ({reason})") from error
    finally:
        locale.setlocale(locale.LC_CTYPE, USERS_LOCALE)


def ras_affine(steps_lps: np.ndarray, origin_lps: np.ndarray) -> np.ndarray:
    """The affine float64 [4, 4] to RAS+ mm of columns [3, 3] and an origin [3] in ITK's and DICOM's LPS+ mm."""
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ steps_lps
    affine[:3, 3] = LPS_TO_RAS @ origin_lps
    return affine


def _check_one_file(path: Path) -> None:
    """Refuse a NRRD header whose voxels are elsewhere: ITK would even wait for them on standard input."""
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(metaimage.MAX_LINE_BYTES).strip().lower(), b""):
            if line.replace(b" ", b"").startswith(b"datafile:"):
                raise CTReadError(f"{path}: its voxels lie elsewhere ({line.decode('latin-1')}); expected one file")

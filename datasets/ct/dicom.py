"""Reading a folder that holds one CT series as DICOM slices, with SimpleITK, which is imported only then.

The slices are ordered by their place along the slice normal, and each is rescaled to HU by its own slope and intercept.
Nothing is interpolated: a series whose slices do not form an even, straight stack is refused.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.ct.file_checks import TILT_DEGREES, CTReadError, check_affine
from datasets.ct.itk_files import attempt, open_reader, ras_affine

if TYPE_CHECKING:
    import SimpleITK

MARKER, MARKER_AT = b"DICM", 128
SLICE_SUFFIXES = (".dcm", ".ima")
INDEX_FILE = "DICOMDIR"  # a table of contents, which has the marker as well
IMAGE_IO = "GDCMImageIO"
MODALITY, DESCRIPTION, SERIES = "0008|0060", "0008|103e", "0020|000e"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
GAP_TOLERANCE = 0.1  # of a gap, by which a slice may lie off its place in an even stack
NUM_SHOWN = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slice:
    """The header of one slice; lengths in mm, directions and places in DICOM's LPS+.

    Attributes:
        file: its file.
        size: (columns, rows).
        steps: [3, 2], from a pixel to the next along a row, and along a column.
        position: [3], centre of the first pixel.
    """

    file: Path
    size: tuple[int, int]
    steps: np.ndarray
    position: np.ndarray

    @property
    def normal(self) -> np.ndarray:
        """Unit vector [3] across the slice."""
        normal = np.cross(self.steps[:, 0], self.steps[:, 1])
        return normal / np.linalg.norm(normal)


@dataclass(frozen=True)
class Series:
    """A series whose slices form an even, straight stack.

    Attributes:
        files: its slices, in order.
        shape: (X, Y, Z): columns, rows, slices.
        affine: float64 [4, 4], index -> world RAS+ mm.
    """

    files: tuple[Path, ...]
    shape: tuple[int, int, int]
    affine: np.ndarray


def dicom_files(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The DICOM files directly in a folder, and the others, both by name; hidden ones do not count."""
    files = sorted(file for file in Path(folder).iterdir() if not file.name.startswith(".") and not file.is_dir())
    found = [file for file in files if is_dicom(file)]
    return found, sorted(set(files) - set(found))


def is_dicom(file: Path) -> bool:
    """Whether a file has DICOM's marker, and is no DICOMDIR."""
    if file.name.upper() == INDEX_FILE or not file.is_file():  # opening a pipe would wait
        return False
    try:
        with file.open("rb") as opened:
            opened.seek(MARKER_AT)
            return opened.read(len(MARKER)) == MARKER
    except OSError:
        return False


def read_series(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the one CT series of a folder.

    Returns:
        HU [X, Y, Z] (columns, rows, slices), and the affine float64 [4, 4] to world RAS+ mm.

    Raises:
        CTReadError: as `open_series`, or a slice whose pixels cannot be read.
    """
    import SimpleITK

    series = open_series(folder)
    slices = []
    for file in series.files:
        image = attempt(open_reader(file, IMAGE_IO).Execute, file)
        slices.append(SimpleITK.GetArrayFromImage(image)[0])
    return np.stack(slices).T, series.affine


def open_series(folder: str | Path) -> Series:
    """The one CT series of a folder, from the headers of its slices.

    Files that are no DICOM are left out, with a note in the log. Subfolders are not searched.

    Raises:
        CTReadError: no DICOM file, a `.dcm` file that is none, a file whose header cannot be read, several series,
            another modality than CT, slices without a place, of several sizes or directions, or at one place, unequal
            gaps (a missing slice), a tilted gantry, a single slice, or several frames in a file.
    """
    try:
        files, others = dicom_files(folder)
    except OSError as error:
        raise CTReadError(f"{folder}: cannot be read ({error.strerror or error})") from error
    if not files:
        raise CTReadError(f"{folder}: a folder without DICOM files ({len(others)} others); expected one CT series")
    if lost := [file for file in others if file.suffix.lower() in SLICE_SUFFIXES]:
        raise CTReadError(f"{lost[0]}: named like a slice, but not DICOM (it lacks the marker); is it truncated?")
    if others:
        logger.warning("%s: %d of %d files are no DICOM and left out", folder, len(others), len(others) + len(files))
    readers = {file: open_reader(file, IMAGE_IO) for file in files}
    _check_one_ct_series(readers.values(), folder)
    slices = [_slice(file, reader) for file, reader in readers.items()]
    _check_alike(slices)
    normal = slices[0].normal
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    affine = ras_affine(np.column_stack([slices[0].steps, _step(slices, folder)]), slices[0].position)
    check_affine(affine, folder)
    return Series(tuple(one.file for one in slices), (*slices[0].size, len(slices)), affine)


def _text(reader: "SimpleITK.ImageFileReader", tag: str) -> str:
    """The value of a tag without padding; empty where the file lacks it."""
    if not reader.HasMetaDataKey(tag):
        return ""
    return reader.GetMetaData(tag).encode(errors="replace").decode().strip(" \0")


def _check_one_ct_series(readers: Iterable["SimpleITK.ImageFileReader"], folder: str | Path) -> None:
    """Raise CTReadError for several series, listed with their sizes, or one that is no CT."""
    by_series = defaultdict(list)
    for reader in readers:
        by_series[_text(reader, SERIES)].append({tag: _text(reader, tag) for tag in (DESCRIPTION, MODALITY)})
    if len(by_series) > 1:
        largest = sorted(by_series.values(), key=len, reverse=True)
        shown = "; ".join(
            f"{len(members)} files '{members[0][DESCRIPTION]}' ({members[0][MODALITY] or 'no modality'})"
            for members in largest[:NUM_SHOWN]
        )
        more = f"; {len(by_series) - NUM_SHOWN} more" if len(by_series) > NUM_SHOWN else ""
        raise CTReadError(
            f"{folder}: holds {len(by_series)} DICOM series, expected one. Give each its own folder: {shown}{more}"
        )
    (members,) = by_series.values()
    if other := {tags[MODALITY] for tags in members} - {"CT"}:
        raise CTReadError(f"{folder}: a DICOM series of modality {', '.join(sorted(other)) or 'unknown'}, expected CT")


def _slice(file: Path, reader: "SimpleITK.ImageFileReader") -> Slice:
    """The header of a file that holds one slice with a place."""
    missing = [tag for tag in (POSITION, ORIENTATION, PIXEL_SPACING) if not reader.HasMetaDataKey(tag)]
    num_frames = math.prod(reader.GetSize()[2:])
    if num_frames > 1:
        raise CTReadError(f"{file}: holds {num_frames} frames, expected one slice a file; convert it with dcm2niix")
    if missing:
        raise CTReadError(f"{file}: has no tag {', '.join(missing)}, which would say where the slice is")
    if reader.GetNumberOfComponents() != 1:
        raise CTReadError(f"{file}: {reader.GetNumberOfComponents()} values a pixel, expected one channel")
    steps = np.array(reader.GetDirection()).reshape(reader.GetDimension(), -1)[:3, :2] * reader.GetSpacing()[:2]
    position = np.array(reader.GetOrigin()[:3])
    if not (np.isfinite(position).all() and np.linalg.norm(np.cross(steps[:, 0], steps[:, 1])) > 0):
        raise CTReadError(f"{file}: cannot place the slice; position {position.tolist()}, steps {steps.T.tolist()} mm")
    return Slice(file, tuple(reader.GetSize()[:2]), steps, position)


def _check_alike(slices: Sequence[Slice]) -> None:
    """Raise CTReadError for slices of another size, pixel or direction than the first."""
    first = slices[0]
    for one in slices[1:]:
        if one.size != first.size or not np.allclose(one.steps, first.steps, atol=1e-3):
            raise CTReadError(
                f"{one.file}: {one.size} pixels, steps of {one.steps.T.round(4).tolist()} mm; but {first.file.name} of "
                f"the same series has {first.size} pixels, steps of {first.steps.T.round(4).tolist()} mm"
            )


def _step(slices: Sequence[Slice], folder: str | Path) -> np.ndarray:
    """From one slice to the next, [3] mm in LPS+."""
    if len(slices) < 2:
        raise CTReadError(f"{folder}: holds a single DICOM slice, expected a volume")
    normal = slices[0].normal
    places = np.array([one.position @ normal for one in slices])
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    if (same := np.flatnonzero(gaps <= GAP_TOLERANCE * abs(usual))).size:
        pair = slices[same[0]].file.name, slices[same[0] + 1].file.name
        raise CTReadError(
            f"{folder}: {same.size} of its {len(slices)} slices lie where another one does, first {pair[0]} and "
            f"{pair[1]}; are several scans in one series?"
        )
    if np.abs(places - np.linspace(places[0], places[-1], len(places))).max() > GAP_TOLERANCE * usual:
        widest = sorted(np.argsort(-np.abs(gaps - usual), kind="stable")[:NUM_SHOWN])
        shown = ", ".join(
            f"{gaps[at]:.4g} mm between {places[at]:.1f} and {places[at + 1]:.1f} mm"
            for at in widest
            if abs(gaps[at] - usual) > GAP_TOLERANCE * usual
        )
        raise CTReadError(
            f"{folder}: gaps between slices are not equal: mostly {usual:.4g} mm, from {gaps.min():.4g} to "
            f"{gaps.max():.4g} mm{'; ' if shown else ''}{shown}. Is a slice missing?"
        )
    step = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    degrees = math.degrees(math.acos(min(1.0, float(step @ normal) / float(np.linalg.norm(step)))))
    if degrees > TILT_DEGREES:
        raise CTReadError(
            f"{folder}: the gantry was tilted by {degrees:.0f} degrees, the slices form a sheared stack; convert the "
            "series with dcm2niix, which resamples it"
        )
    return step

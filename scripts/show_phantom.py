"""Draw a contact sheet of CT volumes: axial, coronal and sagittal slices of each, labels outlined where there are any.

    python scripts/show_phantom.py --images data/phantom/FLARE22Train/images/*.nii.gz --output phantom.png
    python scripts/show_phantom.py --images a.nii.gz b.nii.gz --output lungs.png --hu_min -1100 --hu_max 100
    python scripts/show_phantom.py --images data/xray/images/Xray_Tr_*.png --output xray.png

A radiograph (PNG) is shown in its whole range, and once more with its mask outlined. Reads any NIfTI, so that phantoms
can be looked at next to real CT. Patient's right is on the picture's left.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np
from PIL import Image

from datasets.ct.geometry import spacing_of, to_canonical
from datasets.ct.images import RADIOGRAPH, kind_of, read_labels_of
from datasets.ct.intensity import window_hu
from datasets.ct.planes import PLANES, cut_plane
from datasets.ct.radiograph import read_radiograph
from engine.flags import make_parser, run_main

COLOURS = np.array(
    [(0, 0, 0), (200, 90, 60), (255, 210, 0), (170, 60, 255), (255, 150, 60), (255, 0, 0), (60, 120, 255)]
    + [(0, 255, 150), (0, 255, 255), (60, 200, 60), (220, 130, 220), (130, 130, 255), (255, 255, 130), (255, 170, 200)]
    + [(255, 255, 255)],
    np.uint8,
)


def make_flags():
    """The parser of this script."""
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=str, nargs="+", required=True, help="NIfTI or PNG files, a row each")
    parser.add_argument("--output", type=str, required=True, help="PNG file to write")
    parser.add_argument("--num_axial", type=int, default=5, help="axial slices per file, evenly spaced")
    parser.add_argument("--hu_min", type=float, default=-160.0, help="HU shown black")
    parser.add_argument("--hu_max", type=float, default=240.0, help="HU shown white")
    parser.add_argument("--pixel_mm", type=float, default=1.8, help="size of a picture's pixel in mm")
    return parser


def read_any(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The values of any NIfTI as they are, float32 [D, H, W] in canonical orientation, and the voxel size (mm).

    Raises:
        ValueError: no file, or one that nibabel cannot read.
    """
    try:
        image = nib.load(path)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path}: not readable as NIfTI ({error}); --images expects .nii or .nii.gz files") from error
    array, affine = to_canonical(np.asarray(image.dataobj, np.float32), image.affine)
    return array, spacing_of(affine)


def picture(
    plane: np.ndarray,
    labels: np.ndarray | None,
    pixel_mm: tuple[float, float],
    window: tuple[float, float],
    shown_mm: float,
) -> np.ndarray:
    """A plane as an RGB picture with outlined labels.

    Args:
        plane, labels: [height, width].
        pixel_mm: size of the plane's pixels, down and across.
        window: values that are black and white.
        shown_mm: size of the picture's pixels.
    """
    size = tuple(max(int(n * mm / shown_mm), 1) for n, mm in zip(plane.shape, pixel_mm))[::-1]
    grey = (window_hu(plane, *window) * 255).astype(np.uint8)
    rgb = np.repeat(np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))[..., None], 3, axis=-1)
    if labels is not None:
        ids = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
        edge = (ids != np.roll(ids, 1, 0)) | (ids != np.roll(ids, 1, 1))
        rgb = np.where((edge & (ids > 0))[..., None], COLOURS[ids % len(COLOURS)], rgb)
    return rgb.astype(np.uint8)


def row_of(path: Path, flags) -> np.ndarray:
    """The pictures of one file, side by side."""
    return radiograph_row(path, flags) if kind_of(path) == RADIOGRAPH else ct_row(path, flags)


def radiograph_row(path: Path, flags) -> np.ndarray:
    """A radiograph, and once more with its mask where there is one."""
    image = read_radiograph(path)
    mask = path.parent.parent / "labels" / path.name
    labels = [None, read_labels_of(image, mask).array[0]] if mask != path and mask.exists() else [None]
    window = (float(image.array.min()), float(image.array.max()))
    tiles = [picture(image.array[0], outlined, image.spacing_mm[1:], window, flags.pixel_mm) for outlined in labels]
    return stack(tiles, axis=1)


def ct_row(path: Path, flags) -> np.ndarray:
    """Slices of a CT."""
    hu, voxel_mm = read_any(path)
    label = path.parent.parent / "labels" / path.name.replace("_0000.nii.gz", ".nii.gz")  # in FLARE22's layout
    ids = read_any(label)[0] if label != path and label.exists() else None
    depth, height, width = hu.shape
    cuts = [("axial", int(d)) for d in np.linspace(0.06, 0.94, flags.num_axial) * (depth - 1)]
    cuts += [("coronal", height - 1 - int(0.45 * height)), ("sagittal", width - 1 - width // 2)]
    tiles = []
    for plane, at in cuts:
        pixel_mm = [voxel_mm[axis] for axis in (PLANES[plane].down, PLANES[plane].across)]
        outlined = None if ids is None else cut_plane(ids, plane, at)
        window = (flags.hu_min, flags.hu_max)
        tiles.append(picture(cut_plane(hu, plane, at), outlined, pixel_mm, window, flags.pixel_mm))
    return stack(tiles, axis=1)


def stack(tiles: list[np.ndarray], axis: int) -> np.ndarray:
    """Pictures in a row (axis 1) or column (axis 0), padded with black."""
    longest = max(tile.shape[1 - axis] for tile in tiles)
    padded = [np.pad(tile.swapaxes(0, axis), [(0, 0), (0, longest - tile.shape[1 - axis]), (0, 0)]) for tile in tiles]
    return np.concatenate(padded).swapaxes(0, axis)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    if not flags.hu_min < flags.hu_max:
        raise ValueError(f"--hu_min must be below --hu_max, got {flags.hu_min} and {flags.hu_max}")
    sheet = stack([row_of(Path(name), flags) for name in flags.images], axis=0)
    Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(flags.output)
    print(f"{flags.output}: {sheet.shape[1]} x {sheet.shape[0]} pixels, {len(flags.images)} volumes")


if __name__ == "__main__":
    run_main(main)

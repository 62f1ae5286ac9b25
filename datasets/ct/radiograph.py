"""Reading and writing radiographs as grey PNG: volumes [1, H, W] of int16, and masks whose grey values are labels.

Grey of n bits is stored less 2^(n-1): 8 bits become -128 to 127, 16 bits -32768 to 32767. A 12-bit picture in a 16-bit
file keeps its values. The picture's axes take the canonical places of an axial slice: rows H go to "posterior", columns
W to "left", and one voxel is 1 mm thick. World places are therefore the picture's own; they say nothing of the patient.
A pixel is as large as the file says (its pHYs chunk, in metres), and 1 mm where it says nothing.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.ct.nifti import CTReadError, Volume
from datasets.store.files import write_bytes

SUFFIX = ".png"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of the PNG header: bytes 24 and 25 are the bits of a sample and the colour type.
BITS_AT, COLOUR_AT, HEADER_BYTES = 24, 25, 33
PALETTE = 3
INCH_MM = 25.4


@dataclass(frozen=True)
class Radiograph(Volume):
    """A radiograph [1, H, W].

    Attributes:
        bits: of the file's grey, 8 or 16; grey = array + 2^(bits - 1).
        is_scaled: whether the file says how large a pixel is.
    """

    bits: int
    is_scaled: bool = True


def read_radiograph(path: str | Path) -> Radiograph:
    """Read one grey picture from `.png`: 8 or 16 bits, or 8-bit colour whose channels are equal.

    Raises:
        CTReadError: missing, truncated or damaged file, not PNG, fewer than 8 bits, a palette, true colour, transparent
            pixels, or one grey throughout.
    """
    grey, bits, pixel_mm = _read_grey(path)
    if grey.min() == grey.max():
        raise CTReadError(f"{path}: every pixel is {grey.min()}; expected a radiograph with contrast")
    array = (grey.astype(np.int32) - 2 ** (bits - 1)).astype(np.int16)
    return Radiograph(array[None], picture_affine(pixel_mm or (1.0, 1.0)), str(path), bits, pixel_mm is not None)


def read_mask_of(image: Volume, path: str | Path) -> Volume:
    """Read the mask of a radiograph, a PNG whose grey values are the labels: uint8, or int16 of a 16-bit file.

    Raises:
        CTReadError: as `read_radiograph` (a mask of one value is fine), labels above 32767, or a mask of another shape.
    """
    grey, bits, _ = _read_grey(path)
    if grey.max() > np.iinfo(np.int16).max:
        raise CTReadError(f"{path}: label values run up to {grey.max()}, expected 0 to 32767")
    if (1, *grey.shape) != image.shape:
        raise CTReadError(f"{path}: label has shape {(1, *grey.shape)}, its image {image.path} has {image.shape}")
    return Volume(grey[None].astype(np.uint8 if bits == 8 else np.int16), image.affine, str(path))


def write_grey(path: str | Path, grey: np.ndarray, pixel_mm: tuple[float, float] | None) -> None:
    """Write a grey PNG; whole file or none appears at `path`, and the same picture gives the same file.

    Args:
        grey: uint8 or uint16 [H, W].
        pixel_mm: size of a pixel, down and across; None = not written.
    """
    content, size = io.BytesIO(), {}
    if pixel_mm is not None:
        size["dpi"] = tuple(INCH_MM / side for side in reversed(pixel_mm))  # across first
    Image.fromarray(grey).save(content, "PNG", **size)
    write_bytes(path, content.getbuffer())


def write_mask_like(path: str | Path, labels: np.ndarray, like: str | Path) -> None:
    """Write label values [1, H, W] (0 to 32767) as the grey of a PNG, with the pixel size of the PNG `like`.

    Raises:
        ValueError: another suffix than .png, or labels of a picture of another size.
        CTReadError: `like` is not a grey PNG.
    """
    if Path(path).suffix.lower() != SUFFIX:
        raise ValueError(f"{path}: expected a name ending in {SUFFIX}")
    grey, _, pixel_mm = _read_grey(like)
    if labels.shape != (1, *grey.shape):
        raise ValueError(f"{path}: labels have shape {labels.shape}, {like} has {(1, *grey.shape)}")
    write_grey(path, labels[0].astype(np.uint8 if labels.dtype == np.uint8 else np.uint16), pixel_mm)


def picture_affine(pixel_mm: tuple[float, float]) -> np.ndarray:
    """Index (d, h, w) -> mm of a picture in canonical axes, its first pixel at the origin."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 1.0, -pixel_mm[0], -pixel_mm[1], 1.0
    return affine


def _read_grey(path: str | Path) -> tuple[np.ndarray, int, tuple[float, float] | None]:
    """Grey uint8 or uint16 [H, W], its bits, and the size of a pixel (mm, down and across; None = not in the file)."""
    content = _read_png(Path(path))
    bits, colour = content[BITS_AT], content[COLOUR_AT]
    if bits not in (8, 16) or colour == PALETTE:
        received = f"colours of a palette of {2**bits}" if colour == PALETTE else f"{bits}-bit grey"
        raise CTReadError(f"{path}: holds {received}, expected grey of 8 or 16 bits; convert the file")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
            pixels = np.asarray(picture)
            info = picture.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CTReadError(f"{path}: truncated or damaged PNG ({error})") from error
    if "transparency" in info:
        raise CTReadError(f"{path}: declares a transparent colour; expected plain grey")
    across, down = info.get("dpi", (0, 0))
    pixel_mm = (INCH_MM / down, INCH_MM / across) if down and across else None
    return _grey_of(pixels, bits, path), bits, pixel_mm


def _read_png(path: Path) -> bytes:
    """The file's content, if it begins like a PNG file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CTReadError(f"{path}: no such file") from error
    except OSError as error:
        raise CTReadError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not content.startswith(PNG_SIGNATURE):
        raise CTReadError(f"{path}: not a PNG file ({len(content)} bytes)")
    if len(content) < HEADER_BYTES:
        raise CTReadError(f"{path}: truncated PNG; it ends in its header ({len(content)} bytes)")
    return content


def _grey_of(pixels: np.ndarray, bits: int, path: str | Path) -> np.ndarray:
    """One channel [H, W] of pixels [H, W] or [H, W, C]: colours must be equal, and nothing transparent."""
    if pixels.ndim == 2:
        return pixels.astype(np.uint8 if bits == 8 else np.uint16)
    if bits == 16:  # Pillow would cut these to 8 bits
        raise CTReadError(f"{path}: holds 16-bit colour or transparency, expected one channel of grey")
    if pixels.shape[-1] in (2, 4):
        if (pixels[..., -1] != 255).any():
            raise CTReadError(f"{path}: has transparent pixels; expected plain grey")
        pixels = pixels[..., :-1]
    if (pixels != pixels[..., :1]).any():
        raise CTReadError(f"{path}: is a colour picture, its three channels differ; expected grey")
    return pixels[..., 0]

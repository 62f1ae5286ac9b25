"""Reading the voxels of a NIfTI file, with errors that name the file and the reason."""

import gzip
import math
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from datasets.ct.file_checks import CTReadError, channel_axes, three_axes
from datasets.ct.nifti_header import checked_affine, read_header

GZIP_MAGIC = b"\x1f\x8b"


def read_nifti(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels of a `.nii` or `.nii.gz` file as they are.

    Returns:
        Scaled voxels [X, Y, Z] in the file's order and type, and the affine float64 [4, 4] to world RAS+ mm.

    Raises:
        CTReadError: missing, truncated or damaged file, not NIfTI, not 3-D, no real numbers, or an unusable affine.
    """
    content = _read_bytes(Path(path))
    header = read_header(content, path)
    return _voxels_of(content, header, three_axes(header.get_data_shape(), path), path)


def read_nifti_channels(path: str | Path) -> tuple[list[np.ndarray], np.ndarray]:
    """As `read_nifti`, of a 3-D or 4-D file: voxels [X, Y, Z] of every channel."""
    content = _read_bytes(Path(path))
    header = read_header(content, path)
    raw, affine = _voxels_of(content, header, channel_axes(header.get_data_shape(), path), path)
    return [raw[..., channel] for channel in range(raw.shape[3])], affine


def _voxels_of(
    content: bytes, header: nib.Nifti1Header, shape: tuple[int, ...], path: str | Path
) -> tuple[np.ndarray, np.ndarray]:
    """Scaled voxels of the given shape, and the affine."""
    affine = checked_affine(header, shape[:3], path)
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise CTReadError(f"{path}: voxel type {dtype} is not a real number; expected integers or floats")
    offset, num_bytes = int(header.get_data_offset()), math.prod(shape) * dtype.itemsize
    if offset < 0:
        raise CTReadError(f"{path}: damaged NIfTI header (vox_offset is {offset}, expected the voxels' first byte)")
    if len(content) < offset + num_bytes:
        raise CTReadError(
            f"{path}: truncated; shape {shape} of {dtype} needs {offset + num_bytes} bytes, received {len(content)}"
        )
    raw = np.frombuffer(content, dtype, count=math.prod(shape), offset=offset).reshape(shape, order="F")
    slope, intercept = header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1, 0):
        # float32 is exact for every HU; 64 bits are kept where the file itself has more than 24 bits of mantissa.
        num_bits = np.finfo(dtype).nmant if dtype.kind == "f" else 8 * dtype.itemsize
        wide = np.float64 if num_bits > 24 else np.float32
        raw = raw.astype(wide) * wide(slope) + wide(intercept)
    return raw, affine


def _read_bytes(path: Path) -> bytes:
    """The file's content, decompressed if it is gzip whatever its name; gzip's own checksum is checked."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except FileNotFoundError as error:
        raise CTReadError(f"{path}: no such file") from error
    except EOFError as error:
        raise CTReadError(f"{path}: truncated; the compressed stream ends early ({len(content)} bytes)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CTReadError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise CTReadError(f"{path}: cannot be read ({error.strerror or error})") from error

"""The compressed arrays of a volume store: written once, read in part, and checked.

Whole files have a BLAKE2b checksum, which scripts/prepare_volumes.py compares with `--verify`. Chunks have a CRC-32,
which every crop compares: without it, most flipped bits are read as other voxels.
"""

import zlib
from pathlib import Path

import blosc2
import numpy as np

from datasets.store.format import (
    ARRAY,
    BLOCK_VOX,
    CHUNK_VOX,
    FLAT_BLOCK_VOX,
    FLAT_CHUNK_VOX,
    LABEL,
    ZSTD_LEVEL,
    CaseRecord,
    StoreError,
    case_file,
    checksum_of,
)

# One thread: a DataLoader worker or a builder is one of many processes, and a pool of threads does not survive a fork.
NUM_THREADS = 1
REBUILD_ADVICE = "Run scripts/prepare_volumes.py with --verify to find damaged cases and store them again."


def files_of(record: CaseRecord, store_dir: Path) -> list[tuple[Path, str]]:
    """The data files of a case and their checksums."""
    files = [(case_file(store_dir, record.name, ARRAY), record.checksum)]
    if record.has_label:
        files.append((case_file(store_dir, record.name, LABEL), record.label_checksum))
    return files


def compress(array: np.ndarray) -> bytes:
    """The array [D, H, W] or [C, D, H, W] as the bytes of a `.b2nd` file."""
    cparams = blosc2.CParams(
        codec=blosc2.Codec.ZSTD,
        clevel=ZSTD_LEVEL,
        nthreads=NUM_THREADS,
        filters=[blosc2.Filter.SHUFFLE],
        filters_meta=[0],
    )
    is_flat, one_channel = array.shape[-3] == 1, (1,) * (array.ndim - 3)
    chunks = one_channel + (FLAT_CHUNK_VOX if is_flat else (CHUNK_VOX,) * 3)
    blocks = one_channel + (FLAT_BLOCK_VOX if is_flat else (BLOCK_VOX,) * 3)
    packed = blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=cparams)
    return packed.to_cframe()


def chunk_checksums(content: bytes) -> str:
    """CRC-32 of a compressed array's layout and of each of its chunks, 8 hexadecimal digits each."""
    array = blosc2.ndarray_from_cframe(content)
    chunks = (array.schunk.get_chunk(number) for number in range(array.schunk.nchunks))
    return "".join(f"{zlib.crc32(part):08x}" for part in (_layout_of(array), *chunks))


def _layout_of(array: blosc2.NDArray) -> bytes:
    """What decides where a chunk's voxels belong."""
    return repr((array.shape, array.chunks, array.blocks, array.dtype.str)).encode()


def read_region(path: Path, record: CaseRecord, region: tuple[slice, ...] | None = None) -> np.ndarray:
    """A part of a case's array or labels; decompresses only the blocks it touches, and checks their chunks.

    Opening a file takes under a millisecond, so handles need not be kept.

    Args:
        path: the case's ARRAY or LABEL.
        record: of the case.
        region: (d, h, w), each from its first voxel to one past the last; None = all. All channels are read.

    Raises:
        StoreError: the file is missing, damaged, or not the one that the record describes.
    """
    is_label = path.name.endswith(LABEL)
    shape = record.shape if is_label else record.array_shape
    whole = tuple(slice(0, size) for size in shape)
    region = whole if region is None else whole[:-3] + region
    try:
        array = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=NUM_THREADS))
        if array.shape != shape or array.dtype not in ((np.uint8, np.int16) if is_label else (np.int16,)):
            raise StoreError(
                f"{path}: holds {array.dtype} of shape {array.shape}, expected shape {shape}; file and manifest "
                f"differ. {REBUILD_ADVICE}"
            )
        _check_chunks(array, region, record.label_chunk_crc32 if is_label else record.chunk_crc32, path)
        return array[region]
    except (RuntimeError, OSError) as error:
        raise StoreError(f"{path}: missing or damaged ({error}). {REBUILD_ADVICE}") from error


def _check_chunks(array: blosc2.NDArray, region: tuple[slice, ...], expected: str, path: Path) -> None:
    """Raise StoreError where a chunk that the region touches is not as it was stored."""
    if not expected:  # a store from before there were checksums of chunks
        return
    touched = [range(part.start // size, (part.stop - 1) // size + 1) for part, size in zip(region, array.chunks)]
    num_chunks = [-(-size // chunk) for size, chunk in zip(array.shape, array.chunks)]
    numbers = np.ravel_multi_index(np.meshgrid(*touched, indexing="ij"), num_chunks).ravel().tolist()
    parts = [(0, _layout_of(array)), *((number + 1, array.schunk.get_chunk(number)) for number in numbers)]
    for position, content in parts:
        if f"{zlib.crc32(content):08x}" != expected[8 * position : 8 * position + 8]:
            raise StoreError(f"{path}: a checksum differs: the file was damaged or stored anew. {REBUILD_ADVICE}")


def check_file(path: Path, expected: str) -> None:
    """Raise StoreError unless the file's digest is the expected one."""
    try:
        found = checksum_of(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}). {REBUILD_ADVICE}") from error
    if found != expected:
        raise StoreError(f"{path}: checksum is {found}, expected {expected}: the file was damaged. {REBUILD_ADVICE}")

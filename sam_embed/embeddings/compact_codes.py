"""Small codes for many vectors, in which `sam_embed.embeddings.compact` stores embeddings.

Vectors are rotated to principal axes, rounded to whole steps, then Huffman-coded, so that an axis along which vectors
hardly differ costs hardly anything. Rounding by one step s on all axes shifts a cosine by 0.29 s (std), however many
channels there are. Axes are fitted to the case itself, so that a file needs no other; decoded vectors have all channels
again and can be compared with any other case's.

Legend: C channels, N vectors, K kept axes.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_FIT = 50_000  # vectors to which axes are fitted
NUM_RATE = 10_000  # vectors by which the bytes are foretold
BLOCK = 1 << 13  # vectors in work at a time, even; 4 MB at 128 channels stay in cache
LARGEST_CODE = 127
LARGEST_IN_PAIR = 7
WIDEN = 1.08  # factor by which a step grows until the codes are small enough

Parts = dict[str, Tensor]
Decoder = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Voxels:
    """Some voxels of a map as vectors.

    Attributes:
        values: [C, d, h, w], contiguous.
        index: int64 [N], which of the d * h * w voxels; None for all.
    """

    values: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return self.values[0].numel() if self.index is None else len(self.index)

    def block(self, first: int, last: int) -> Tensor:
        """float32 [C, last - first]."""
        flat = self.values.flatten(1)
        return (flat[:, first:last] if self.index is None else flat[:, self.index[first:last]]).float()

    def sample(self, number: int) -> Tensor:
        """float32 [C, about `number`], evenly drawn; all where there are fewer."""
        every = max(1, len(self) // number)
        index = torch.arange(len(self)) if self.index is None else self.index
        return self.values.flatten(1)[:, index[::every]].float()


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """(first, last) of pieces of at most BLOCK."""
    for first in range(0, length, BLOCK):
        yield first, min(length, first + BLOCK)


def squeeze(values: np.ndarray) -> Tensor:
    """Bytes, Huffman-coded with runs, as uint8 [bytes]; a checksum shows damage.

    zlib's full search for repeats finds few in such noise and takes several times as long.
    """
    coder = zlib.compressobj(level=1, memLevel=9, strategy=zlib.Z_RLE)
    packed = coder.compress(np.ascontiguousarray(values)) + coder.flush()
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def expand(packed: Tensor, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """What `squeeze` took; never more bytes than `shape` asks for.

    Raises:
        ValueError: there are fewer or more, or they are damaged.
    """
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(packed.numpy().tobytes(), expected + 1)  # one more, to notice too many
    except zlib.error as error:
        raise ValueError(f"codes do not decompress ({error})") from error
    if len(found) != expected or not decoder.eof:
        raise ValueError(f"codes decompress to {len(found)} bytes, cut off or with more to come; expected {expected}")
    return np.frombuffer(found, dtype=dtype).reshape(shape)


def principal_axes(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and axes [C, C] (columns, largest variance first) of vectors [C, N]."""
    mean = sample.mean(dim=1)
    centred = sample - mean[:, None]
    _, axes = torch.linalg.eigh(centred @ centred.T / max(1, sample.shape[1]))
    return mean, axes.flip(1)


def pack_rows(codes: np.ndarray) -> tuple[np.ndarray, Parts]:
    """Rows of small whole numbers as bytes: two neighbours share one where all of a row lies in -7..7.

    Half the bytes to code, in half the time; and the Huffman code of a pair profits from similar neighbours.

    Args:
        codes: int8 [K, N].

    Returns:
        The order in which the K rows are stored, and `codes` (wide rows), `pairs` (the others), `num_wide` [1].
    """
    is_wide = np.abs(codes).max(axis=1, initial=0) > LARGEST_IN_PAIR
    narrow = (codes[~is_wide] + (LARGEST_IN_PAIR + 1)).astype(np.uint8)
    narrow = np.pad(narrow, ((0, 0), (0, narrow.shape[1] % 2)))
    order = np.concatenate([np.flatnonzero(is_wide), np.flatnonzero(~is_wide)])
    parts = {"codes": squeeze(codes[is_wide]), "pairs": squeeze(narrow[:, ::2] << 4 | narrow[:, 1::2])}
    return order, parts | {"num_wide": torch.tensor([int(is_wide.sum())])}


def unpack_rows(parts: Parts, num_rows: int, num_vectors: int) -> Decoder:
    """Reader of `pack_rows`: (first, last) -> float32 [K, last - first], rows as stored; `first` must be even."""
    num_wide = int(parts["num_wide"])
    _check(0 <= num_wide <= num_rows, f"{num_wide} of {num_rows} rows are wide")
    wide = torch.from_numpy(expand(parts["codes"], (num_wide, num_vectors), np.int8).copy())
    pairs = torch.from_numpy(expand(parts["pairs"], (num_rows - num_wide, (num_vectors + 1) // 2), np.uint8).copy())

    def decode(first: int, last: int) -> Tensor:
        rows = torch.empty(num_rows, last - first)
        rows[:num_wide] = wide[:, first:last]
        packed = pairs[:, first // 2 : (last + 1) // 2]
        rows[num_wide:, ::2] = packed >> 4
        rows[num_wide:, 1::2] = (packed & 15)[:, : (last - first) // 2]
        rows[num_wide:] -= LARGEST_IN_PAIR + 1
        return rows

    return decode


def _rounded(rotated: Tensor, step: float) -> Tensor:
    return torch.round(rotated / step).clamp_(-LARGEST_CODE, LARGEST_CODE)


def affordable_step(rotated: Tensor, step: float, max_bytes: float) -> float:
    """The smallest step from `step` on with which rotated vectors [C, N] take at most `max_bytes` each."""
    while np.isfinite(max_bytes):
        _, parts = pack_rows(_rounded(rotated, step).to(torch.int8).numpy())
        if sum(tensor.numel() for tensor in parts.values()) <= max_bytes * rotated.shape[1]:
            break
        step *= WIDEN
    return step


def encode_pca(voxels: Voxels, step: float, max_bytes: float) -> Parts:
    """Whole steps along principal axes.

    Args:
        step: of the rounding, in units of a vector's length; raised where the codes would take more than ...
        max_bytes: ... this per vector.

    Returns:
        `codes`, `pairs` and `num_wide` of `pack_rows` [K, N], `scale` float32 [K], `axes` float16 [C, K], `mean`
        float32 [C].
    """
    sample = voxels.sample(NUM_FIT)
    mean, axes = principal_axes(sample)
    axes = axes.half().float()  # as they will be read
    step = affordable_step(axes.T @ (sample[:, :: max(1, NUM_FIT // NUM_RATE)] - mean[:, None]), step, max_bytes)
    codes = np.empty((len(mean), len(voxels)), dtype=np.int8)
    product, square = torch.zeros(len(mean)), torch.zeros(len(mean))
    for first, last in blocks(len(voxels)):
        rotated = axes.T @ (voxels.block(first, last) - mean[:, None])
        rounded = _rounded(rotated, step)
        product += (rotated * rounded).sum(dim=1)
        square += rounded.square().sum(dim=1)
        codes[:, first:last] = rounded.to(torch.int8).numpy()
    kept = square.numpy() > 0
    order, parts = pack_rows(codes[kept])
    order = torch.from_numpy(np.flatnonzero(kept)[order])
    # Not the step itself but the least-squares scale: along weak axes, where most codes are 0, it is smaller.
    return parts | {"scale": (product / square)[order], "axes": axes[:, order].half(), "mean": mean}


def decoder_of_pca(parts: Parts, num_channels: int, num_vectors: int) -> Decoder:
    """The decoder of `encode_pca`: (first, last) -> float32 [C, last - first]."""
    axes, mean = parts["axes"].float() * parts["scale"], parts["mean"][:, None]
    _check(len(axes) == len(mean) == num_channels, f"axes of {len(axes)} channels, expected {num_channels}")
    rows = unpack_rows(parts, axes.shape[1], num_vectors)
    return lambda first, last: torch.addmm(mean, axes, rows(first, last))


def _check(holds: bool, complaint: str) -> None:
    if not holds:
        raise ValueError(complaint)

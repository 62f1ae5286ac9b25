"""Embeddings that can be read at single places: SAM's vectors of a hundred points of a crop, while training.

The compact form of `sam_embed.embeddings.compact` is one piece of code a case: to read one place, all of it must be
decoded, which takes longer than cutting a crop. Each case is therefore decoded once into
`<embed_dir>/opened/<case>.safetensors`, where every voxel has its own bytes, and later reads touch those alone.

    rows     int8 [N, C]            fine unit vectors of the N stored voxels, one scale a file
    row_of   int32 [d, h, w]        the row of each fine voxel, -1 where none is stored (outside of the patient)
    coarse   int8 [d', h', w', C']  the coarse map

A file is mapped into memory for one read and let go, so that a process grows by nothing however many cases it meets.
The vector of a place is SAM's: fine and coarse map interpolated, unit length each, joined and divided by sqrt(2). The
scalar product of two of them is the mean of both cosines, the score of a match (Yan et al., TMI 2022, Sec. III-B).
"""

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from datasets.ct.geometry import index_to_world
from datasets.store.files import write_bytes
from datasets.store.format import is_same_volume
from sam_embed.embeddings.embedding_store import (
    SUFFIX,
    EmbedDirError,
    common_weights,
    embedding_path,
    load_embedding,
    named,
    stored_header,
)

FOLDER = "opened"
FORMAT = "sam_embed.opened.1"
LARGEST_CODE = 127
PART_TYPES = {"row_of": np.int32, "rows": np.int8, "coarse": np.int8}


def opened_path(embed_dir: str | Path, name: str) -> Path:
    """Where the opened form of a case lies."""
    return Path(embed_dir) / FOLDER / f"{name}{SUFFIX}"


def check_embeddings(embed_dir: str | Path, identities: Mapping[str, str]) -> str:
    """The weights behind the embeddings of some cases.

    Args:
        identities: case -> identity of its volume now (`CaseRecord.identity`).

    Raises:
        EmbedDirError: cases without an embedding, embeddings of several SAMs, or of other files than the volumes.
    """
    headers = {name: stored_header(embed_dir, name) for name in identities}
    weights = common_weights(embed_dir, headers)
    sources = {name: header.get("source", "") for name, header in headers.items()}
    if moved := [name for name, source in sources.items() if is_same_volume(source, identities[name]) is False]:
        raise EmbedDirError(
            f"--embed_dir {embed_dir}: {len(moved)} of {len(headers)} cases were embedded from other files than those "
            f"of --store_dir, first {named(moved)}; embed them again (scripts/generate_sam_embeddings.py)"
        )
    return weights


def num_channels(embed_dir: str | Path, names: Sequence[str]) -> int:
    """Channels of the vectors that `OpenedVectors` reads: fine and coarse joined, as the first embedded case has them.

    Raises:
        EmbedDirError: none of the cases has a usable embedding.
    """
    for name in names:
        if not stored_header(embed_dir, name):
            continue
        header = read_header(embedding_path(embed_dir, name))
        compact = header["__metadata__"].get("compact")
        maps = json.loads(compact)["maps"] if compact else header
        return maps["fine"]["shape"][0] + maps["coarse"]["shape"][0]
    raise EmbedDirError(
        f"--embed_dir {embed_dir} holds no embedding of these {len(names)} cases (--json_list); run "
        "scripts/generate_sam_embeddings.py with this --embed_dir"
    )


def open_embeddings(embed_dir: str | Path, names: Sequence[str], progress: bool = False) -> None:
    """Write the opened form of each case that lacks it, or whose embedding has changed since."""
    missing = [name for name in names if not is_opened(embed_dir, name)]
    for name in tqdm(missing, desc="opening embeddings", unit="case", disable=not progress):
        write_opened(embed_dir, name)


def origin_of(embed_dir: str | Path, name: str) -> str:
    """A text that changes when the embedding's file does."""
    stat = embedding_path(embed_dir, name).stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def is_opened(embed_dir: str | Path, name: str) -> bool:
    """Whether the opened form is there and of the embedding as it is now."""
    path = opened_path(embed_dir, name)
    if not path.is_file():
        return False
    metadata = read_header(path)["__metadata__"]
    return metadata.get("format") == FORMAT and metadata.get("origin") == origin_of(embed_dir, name)


def write_opened(embed_dir: str | Path, name: str) -> None:
    """Decode one case and write its opened form."""
    origin = origin_of(embed_dir, name)
    embedding = load_embedding(embed_dir, name)
    shape = embedding.fine.shape[1:]
    stored = torch.ones(shape, dtype=torch.bool) if embedding.body is None else embedding.body
    row_of = torch.full(shape, -1, dtype=torch.int32)
    row_of[stored] = torch.arange(int(stored.sum()), dtype=torch.int32)
    parts = {
        "row_of": row_of,
        "rows": to_codes(embedding.fine[:, stored].T),  # [N, C]
        "coarse": to_codes(embedding.coarse.permute(1, 2, 3, 0)),  # [d', h', w', C]
    }
    header = {
        "format": FORMAT,
        "origin": origin,
        "fine_affine": json.dumps(np.asarray(embedding.fine_affine).tolist()),
        "coarse_affine": json.dumps(np.asarray(embedding.coarse_affine).tolist()),
    }
    write_bytes(opened_path(embed_dir, name), save(parts, metadata=header))


def to_codes(vectors: Tensor) -> Tensor:
    """Vectors as whole numbers: int8, the largest component of all becomes 127. Their common scale is dropped."""
    vectors = vectors.float()
    return (vectors * (LARGEST_CODE / vectors.abs().max().clamp_min(1e-6))).round().to(torch.int8).contiguous()


def read_header(path: Path) -> dict:
    """The JSON header of a safetensors file: name -> dtype, shape and data_offsets, and `__metadata__`.

    The first 8 bytes say how long it is; offsets count from its end. `offset` of the result is where that lies.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)) | {"offset": 8 + length}


class Grids:
    """The fine and the coarse grid of a case, and where a world point lies between their voxels.

    Both are asked at once: a read is a matter of many small steps, and each costs as much as its numbers.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], affines: Sequence[np.ndarray]) -> None:
        """Shapes (d, h, w) and affines (index -> world mm) of the two."""
        self.shape, self.affine = np.array(shapes), affines  # [2, 3]
        self.strides = np.stack([self.shape[:, 1] * self.shape[:, 2], self.shape[:, 2], [1, 1]], axis=1)
        inverse = np.linalg.inv(np.stack(affines))
        self.turn, self.shift = inverse[:, :3, :3].transpose(0, 2, 1), inverse[:, None, :3, 3]
        corners = np.array(list(np.ndindex(2, 2, 2)))
        self.steps = ((corners * (self.shape > 1)[:, None]) @ self.strides[:, :, None])[:, None, :, 0]  # [2, 1, 8]

    def nearest(self, points_mm: np.ndarray) -> np.ndarray:
        """The number of the nearest fine voxel, in the order of the array, int64 [N]; -1 outside of the grid."""
        index = np.rint(points_mm @ self.turn[0] + self.shift[0]).astype(np.int64)
        within = ((index >= 0) & (index < self.shape[0])).all(axis=1)
        return np.where(within, index @ self.strides[0], -1)

    def around(self, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the 8 voxels around each point in both grids, and their trilinear weights.

        Beyond the outermost voxels of a grid their value continues.

        Returns:
            int64 and float32 [2, N, 8].
        """
        last = self.shape[:, None] - 1
        index = np.clip(points_mm @ self.turn + self.shift, 0, last)  # [2, N, 3]
        low = np.minimum(index.astype(np.int64), np.maximum(last - 1, 0))
        share = (index - low).astype(np.float32)
        d, h, w = np.moveaxis(np.stack([1 - share, share], axis=-1), 2, 0)  # [2, N, 2] each
        weights = d[..., :, None, None] * h[..., None, :, None] * w[..., None, None, :]  # [2, N, 2, 2, 2]
        return low @ self.strides[:, :, None] + self.steps, weights.reshape(*weights.shape[:2], 8)


class OpenedFile:
    """Where the parts of one case's file lie, and where its voxels lie in the world."""

    def __init__(self, path: Path) -> None:
        """Read the file's header."""
        header = read_header(path)
        metadata = header["__metadata__"]
        self.path = path
        self.starts = {name: header["offset"] + header[name]["data_offsets"][0] for name in PART_TYPES}
        self.shapes = {name: tuple(header[name]["shape"]) for name in PART_TYPES}
        affines = [np.array(json.loads(metadata[f"{name}_affine"])) for name in ("fine", "coarse")]
        self.grids = Grids([self.shapes["row_of"], self.shapes["coarse"][:3]], affines)


class MappedCase:
    """The vectors of one case, mapped into memory until the last use (`CaseVectors` of `datasets.samples.anatomy`)."""

    def __init__(self, file: OpenedFile) -> None:
        self.grids = file.grids
        with file.path.open("rb", buffering=0) as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        parts = {
            name: np.ndarray(file.shapes[name], dtype, content, file.starts[name]) for name, dtype in PART_TYPES.items()
        }
        self.row_of, self.rows = parts["row_of"].reshape(-1), parts["rows"]
        self.coarse_rows = parts["coarse"].reshape(-1, file.shapes["coarse"][3])

    def inside(self, points_mm: np.ndarray) -> np.ndarray:
        """Which world points [N, 3] lie in a stored fine voxel, that is in the patient: bool [N]."""
        voxels = self.grids.nearest(points_mm)
        return (voxels >= 0) & (self.row_of[np.maximum(voxels, 0)] >= 0)

    def vectors(self, points_mm: np.ndarray) -> np.ndarray:
        """Unit vectors at world points [N, 3] inside of the patient, float32 [N, C]: fine and coarse joined."""
        voxels, weights = self.grids.around(points_mm)
        rows = self.row_of[voxels[0]]  # [N, 8]
        fine = interpolated(self.rows[np.maximum(rows, 0)], weights[0] * (rows >= 0))
        coarse = interpolated(self.coarse_rows[voxels[1]], weights[1])
        return np.concatenate([fine, coarse], axis=1) * np.float32(0.5**0.5)

    def random_places(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """World mm [num, 3] of the centres of random stored voxels."""
        stored = np.flatnonzero(self.row_of >= 0)
        chosen = np.unravel_index(stored[rng.integers(len(stored), size=num)], tuple(self.grids.shape[0]))
        return index_to_world(self.grids.affine[0], np.stack(chosen, axis=1))


class OpenedVectors:
    """The cases of a folder (a `VectorReader` of `datasets.samples.anatomy`).

    It keeps a few kilobytes a case, and no file open. Processes may share it.
    """

    def __init__(self, embed_dir: str | Path, names: Sequence[str]) -> None:
        """Read the headers of `names`, which `open_embeddings` has opened."""
        self.files = {name: OpenedFile(opened_path(embed_dir, name)) for name in names}

    def __getitem__(self, name: str) -> MappedCase:
        """The vectors of one case."""
        return MappedCase(self.files[name])


def interpolated(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of int8 vectors [N, 8, C], made unit length: float32 [N, C]."""
    total = np.matmul(weights[:, None, :], codes.astype(np.float32))[:, 0]
    length = np.sqrt(np.einsum("nc,nc->n", total, total))
    return total / np.maximum(length, 1e-6)[:, None]

"""Finding the place in one volume that corresponds to a point in another, by the similarity of embeddings.

Yan et al., "SAM", TMI 2022, Sec. III-B: the similarity of a query vector to every key voxel is the mean of the cosines
of the fine and of the coarse embedding (UAE-S: and of the semantic one); the best voxel is the match, its similarity
the score. Points are world mm; voxels are found through the embeddings' affines. How the best voxel is searched for:
`sam_embed.matching.search`. Matching runs on the device on which the embeddings lie (`on_device`).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.ct.geometry import index_to_world, world_to_index
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.search import (
    QueryVectors,
    coarse_similarities,
    grid_of,
    search_all,
    search_where_possible,
    similarity_slab,
)

DEFAULT_MEMORY_MB = 64  # small blocks stay in the allocator's pool and in cache: faster than large ones


class Matches(NamedTuple):
    """What `match_points` found for N points.

    Attributes:
        points_mm: float64 [N, 3], world mm in the key volume; NaN where the query lies outside of its volume.
        score: float32 [N], similarity in [-1, 1]; NaN likewise.
    """

    points_mm: np.ndarray
    score: np.ndarray


def inside(embedding: Embedding, points_mm: np.ndarray) -> np.ndarray:
    """bool [N]: which world points [N, 3] lie within half a fine voxel of the embedded (body) box."""
    index = world_to_index(embedding.fine_affine, points_mm)
    return np.all((index >= -0.5) & (index <= np.array(embedding.fine.shape[1:]) - 0.5), axis=-1)


def describe_box(embedding: Embedding) -> str:
    """The embedded (body) box in words: "x -88..91, y ..., z ... mm"."""
    corners = index_to_world(embedding.fine_affine, [[0, 0, 0], np.array(embedding.fine.shape[1:]) - 1])
    low, high = np.sort(corners, axis=0).round().astype(int).tolist()
    return ", ".join(f"{axis} {first}..{last}" for axis, first, last in zip("xyz", low, high)) + " mm"


def sample_vectors(values: Tensor, index: np.ndarray) -> Tensor:
    """Vectors at fractional indices, trilinearly interpolated and made unit length.

    Args:
        values: [C, d, h, w].
        index: [N, 3]; outside of the grid its border continues.

    Returns:
        float32 [N, C].
    """
    size = np.array(values.shape[1:])
    index = np.clip(index, 0, size - 1)
    low = np.minimum(np.floor(index).astype(np.int64), np.maximum(size - 2, 0))
    weight = index - low
    total = torch.zeros(len(index), values.shape[0], device=values.device)
    read = _reader(values, len(index))
    for corner in np.ndindex(2, 2, 2):
        at = torch.from_numpy(np.minimum(low + corner, size - 1)).to(values.device)
        share = np.prod(np.where(corner, weight, 1 - weight), axis=1).astype(np.float32)
        total += torch.from_numpy(share).to(values.device)[:, None] * read(at)
    return F.normalize(total, dim=1)


def vectors_at(values: Tensor, index: Tensor) -> Tensor:
    """The vectors of whole voxels.

    Args:
        values: [C, d, h, w].
        index: int64 [N, 3], inside of the grid.

    Returns:
        float32 [N, C].
    """
    return _reader(values, len(index))(index)


def _reader(values: Tensor, num_vectors: int) -> Callable[[Tensor], Tensor]:
    """`vectors_at` for these values; what is the same for each set of so many vectors is done once."""
    (_, _, height, width), table = values.shape, values.flatten(1)
    # On a CPU three times as fast as values[:, d, h, w], and faster still from rows, where those are soon made.
    rows = table.T.contiguous() if table.shape[1] <= num_vectors else None

    def read(index: Tensor) -> Tensor:
        d, h, w = index.unbind(dim=1)
        flat = (d * height + h) * width + w
        return (table.index_select(1, flat).T if rows is None else rows.index_select(0, flat)).float()

    return read


def query_vectors(embedding: Embedding, points_mm: np.ndarray) -> QueryVectors:
    """The embedding at world points [N, 3], between voxels interpolated."""
    fine_index = world_to_index(embedding.fine_affine, points_mm)
    coarse_index = world_to_index(embedding.coarse_affine, points_mm)
    semantic = None if embedding.semantic is None else sample_vectors(embedding.semantic, fine_index)
    return QueryVectors(
        sample_vectors(embedding.fine, fine_index), sample_vectors(embedding.coarse, coarse_index), semantic
    )


def similarity_map(query: Embedding, key: Embedding, point_mm: np.ndarray) -> Tensor:
    """float32 [d, h, w]: similarity of one world point [3] of the query to every fine voxel of the key."""
    check_same_network(query, key)
    vectors = query_vectors(query, np.asarray(point_mm, dtype=np.float64)[None])
    return similarity_slab(vectors, coarse_similarities(vectors, key), key, 0, key.fine.shape[1])[0]


def check_same_network(query: Embedding, key: Embedding) -> None:
    """Embeddings of different weights live in different spaces; comparing them gives noise."""
    if query.fingerprint != key.fingerprint or query.fine.shape[0] != key.fine.shape[0]:
        raise ValueError(
            f"embeddings of {query.name!r} and {key.name!r} come from different weights "
            f"({query.fingerprint} and {key.fingerprint}); embed both with one --checkpoint_file"
        )


def on_device(embedding: Embedding, device: torch.device | str) -> Embedding:
    """The embedding with its tensors on a device; the same object where it lies there already."""
    moved = {name: part.to(device) for name, part in embedding.tensors().items()}
    if moved["fine"] is embedding.fine:
        return embedding
    return dataclasses.replace(embedding, **moved)


@torch.no_grad()
def best_voxels(
    vectors: QueryVectors, key: Embedding, memory_mb: float = DEFAULT_MEMORY_MB, by_tiles: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The most similar fine voxel of the key for each query vector: int64 index [N, 3] and float32 score [N].

    Args:
        by_tiles: look only where the coarse map leaves a chance, with the same result. None = on the CPU, where the
            coarse grid is much coarser than the fine one; a GPU is faster with everything.
    """
    if by_tiles is None:
        by_tiles = key.fine.device.type == "cpu" and grid_of(key).has_large_cells
    where, best = (search_where_possible if by_tiles else search_all)(vectors, key, memory_mb)
    return torch.stack(torch.unravel_index(where, key.fine.shape[1:]), dim=1), best


def match_points(
    query: Embedding, key: Embedding, points_mm: np.ndarray, memory_mb: float = DEFAULT_MEMORY_MB, refine: bool = True
) -> Matches:
    """Match world points of one volume to another, all together; between voxels, query vectors are interpolated.

    Args:
        query, key: embeddings by the same weights.
        points_mm: [N, 3] world mm in the query volume.
        memory_mb: working memory beyond the embeddings, where all voxels are looked at.
        refine: find the place between voxels by a parabola through the similarities beside the best one.

    Returns:
        Matches; points outside of the query's embedded box have NaN for place and score.
    """
    check_same_network(query, key)
    points_mm = np.asarray(points_mm, dtype=np.float64).reshape(-1, 3)
    usable = inside(query, points_mm)
    found = np.full(points_mm.shape, np.nan)
    score = np.full(len(points_mm), np.nan, dtype=np.float32)
    if usable.any():
        vectors = query_vectors(query, points_mm[usable])
        index, best = best_voxels(vectors, key, memory_mb)
        place = index.double() + (_parabola_offset(vectors, key, index) if refine else 0.0)
        found[usable] = index_to_world(key.fine_affine, place.cpu().numpy())
        score[usable] = best.cpu().numpy()
    return Matches(found, score)


def cycle_error_mm(
    query: Embedding,
    key: Embedding,
    points_mm: np.ndarray,
    matches: Matches,
    memory_mb: float = DEFAULT_MEMORY_MB,
    refine: bool = True,
) -> np.ndarray:
    """float64 [N]: mm between each query point and the place to which its match is matched back; NaN if unmatched."""
    back = match_points(key, query, matches.points_mm, memory_mb, refine)
    return np.linalg.norm(back.points_mm - np.asarray(points_mm, dtype=np.float64).reshape(-1, 3), axis=1)


def score_at(query: Embedding, key: Embedding, points_mm: np.ndarray, places_mm: np.ndarray) -> np.ndarray:
    """The score that places in the key have as matches of points in the query: similarity to the nearest fine voxel.

    Args:
        points_mm, places_mm: [N, 3] world mm.

    Returns:
        float32 [N] in [-1, 1]; NaN where a place is not known, or the point lies outside of the query's embedded box.
    """
    score = np.full(len(points_mm), np.nan, dtype=np.float32)
    usable = inside(query, points_mm) & np.isfinite(places_mm).all(axis=1)
    if usable.any():
        index = np.rint(world_to_index(key.fine_affine, places_mm[usable])).astype(np.int64)
        index = torch.from_numpy(np.clip(index, 0, np.array(key.fine.shape[1:]) - 1)).to(key.fine.device)
        score[usable] = _similarity_at(query_vectors(query, points_mm[usable]), key, index).cpu().numpy()
    return score


def _similarity_at(vectors: QueryVectors, key: Embedding, index: Tensor) -> Tensor:
    """Similarity [N] of each query vector to one fine voxel [N, 3] of the key."""
    voxels = index.cpu().numpy().T
    coarse_index = [positions[axis_index] for positions, axis_index in zip(key.coarse_positions, voxels)]
    coarse_at = sample_vectors(key.coarse, np.stack(coarse_index, axis=1))
    total = (vectors.fine * vectors_at(key.fine, index)).sum(dim=1) + (vectors.coarse * coarse_at).sum(dim=1)
    if vectors.semantic is None:
        return total / 2
    return (total + (vectors.semantic * vectors_at(key.semantic, index)).sum(dim=1)) / 3


def _parabola_offset(vectors: QueryVectors, key: Embedding, index: Tensor) -> Tensor:
    """Per axis, where a parabola through both neighbours peaks: [N, 3] in (-0.5, 0.5) fine voxels, 0 at borders."""
    size = torch.tensor(key.fine.shape[1:], device=index.device)
    centre = _similarity_at(vectors, key, index)
    offset = torch.zeros(len(index), 3, dtype=torch.float64, device=index.device)
    for axis in range(3):
        step = torch.zeros_like(size)
        step[axis] = 1
        has_both = (index[:, axis] > 0) & (index[:, axis] < size[axis] - 1)
        below = _similarity_at(vectors, key, (index - step).clamp_min(0))
        above = _similarity_at(vectors, key, torch.minimum(index + step, size - 1))
        curvature = below - 2 * centre + above
        peak = 0.5 * (below - above) / curvature.clamp(max=-1e-6)
        offset[:, axis] = torch.where(has_both, peak.clamp(-0.5, 0.5), 0.0).double()
    return offset

"""An embedding on a wide grid of nodes, on which dense matching works."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.ct.geometry import index_to_world
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.match import query_vectors

NODES_PER_BLOCK = 2048  # whose windows are compared at a time: neighbouring windows share vectors, found in the cache


@dataclass(frozen=True, eq=False)
class Nodes:
    """An embedding on a wide grid that is parallel to its fine one.

    Attributes:
        shape: nodes along (D, H, W); affine: float64 [4, 4], node index -> world mm.
        vectors: float32 [d * h * w, C]; the product of two is SAM's similarity: the mean cosine of its levels.
        body: bool [d, h, w], nodes inside the patient.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    vectors: Tensor
    body: np.ndarray

    @cached_property
    def points_mm(self) -> np.ndarray:
        """World mm [d, h, w, 3] of all nodes."""
        return points_of_grid(self.shape, self.affine)

    @cached_property
    def spacing_mm(self) -> np.ndarray:
        """mm between neighbouring nodes along (D, H, W)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def every_second(self) -> "Nodes":
        """The grid with half as many nodes along each axis."""
        kept = (slice(None, None, 2),) * 3
        vectors = self.vectors.view(*self.shape, -1)[kept]
        shape = tuple(vectors.shape[:3])
        return Nodes(shape, self.affine @ np.diag([2.0, 2, 2, 1]), vectors.flatten(0, 2), self.body[kept])


def points_of_grid(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """World mm [d, h, w, 3] of all nodes of a grid."""
    return index_to_world(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))


def make_nodes(embedding: Embedding, spacing_mm: float) -> Nodes:
    """Sample an embedding about every `spacing_mm`: every so many of its fine voxels, at least every one."""
    axes, affine = _node_axes(embedding, spacing_mm)
    shape = tuple(map(len, axes))
    points_mm = index_to_world(embedding.fine_affine, np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))
    parts = [part for part in query_vectors(embedding, points_mm) if part is not None]
    vectors = torch.cat(parts, dim=1) / len(parts) ** 0.5
    body = np.ones(shape, bool) if embedding.body is None else embedding.body.cpu().numpy()[np.ix_(*axes)]
    return Nodes(shape, affine, vectors, body)


def thinned(embedding: Embedding, spacing_mm: float) -> Embedding:
    """Only those fine voxels that `make_nodes` samples: dense matching at this spacing needs no others."""
    axes, affine = _node_axes(embedding, spacing_mm)
    kept = tuple(slice(axis.start, axis.stop, axis.step) for axis in axes)
    own = {"fine": embedding.fine, "semantic": embedding.semantic}
    parts = {name: part[(slice(None), *kept)].contiguous() for name, part in own.items() if part is not None}
    body = None if embedding.body is None else embedding.body[kept].contiguous()
    return dataclasses.replace(embedding, **parts, body=body, fine_affine=affine)


def _node_axes(embedding: Embedding, spacing_mm: float) -> tuple[list[range], np.ndarray]:
    """The fine indices along (D, H, W) that are nodes, and the nodes' affine."""
    step = np.maximum(1, np.rint(spacing_mm / np.array(embedding.fine_spacing_mm))).astype(int)
    fine_shape = np.array(embedding.fine.shape[1:])
    first = (fine_shape - 1) % step // 2  # what remains is shared by both ends
    affine = embedding.fine_affine @ np.diag([*step, 1.0])
    affine[:3, 3] = index_to_world(embedding.fine_affine, first)
    return [range(*map(int, ends)) for ends in zip(first, fine_shape, step)], affine


def window_cost(vectors: Tensor, reference: Nodes, centre: np.ndarray, offsets: np.ndarray) -> Tensor:
    """1 - similarity [N, P] of vectors [N, C] to the nodes at centre [N, 3] + offsets [P, 3]; 1 outside of the grid."""
    reach = int(np.abs(offsets).max())
    rim = 2 * reach + 1  # of zero vectors: a window may begin outside of the grid
    padded = F.pad(reference.vectors.view(*reference.shape, -1), (0, 0, *(rim,) * 6))
    shape = np.array(reference.shape)
    start = np.clip(centre, -reach - 1, shape + reach) + rim
    steps = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    rows = padded.flatten(0, 2)
    first, further = torch.from_numpy(start @ steps), (offsets @ steps).tolist()
    cost = torch.empty(len(offsets), len(centre))
    for begin in range(0, len(centre), NODES_PER_BLOCK):
        block = slice(begin, begin + NODES_PER_BLOCK)
        for number, step in enumerate(further):
            there = rows.index_select(0, first[block] + step)
            torch.sum(there.mul_(vectors[block]), dim=1, out=cost[number, block])
    return cost.neg_().add_(1).T

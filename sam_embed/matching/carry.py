"""Carrying labels from labelled scans to a new one: dense maps to several references, and a weighted vote.

Every reference is mapped to the scan (`sam_embed.matching.dense`), its labels are read at the mapped places, and the
references vote with their trust. Among several references, one that looks more like the scan at a place than the
others, and from which the map leads back to the place, weighs more there. A place that a reference does not show, or
whose labels end before it, gets no vote from it. Outside of the scan's body there are no votes at all. The scan's own
intensities may sharpen them (`sam_embed.matching.intensity`), and a network may have its say
(`sam_embed.matching.opinion`).

Maps are found on a grid of about 8 mm, votes are counted on the caller's grid or on one of about 3 mm and interpolated
from there, so that time and memory grow little with the size of the scan. No files, no network: embeddings, label maps
and affines.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates

from datasets.ct.geometry import mask_box, spacing_of, world_to_index
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.beyond import Beyond
from sam_embed.matching.dense import (
    DenseMap,
    cycle_of_maps_mm,
    is_shown,
    map_both_ways,
    score_at_places,
)
from sam_embed.matching.intensity import sharpened, shrunk
from sam_embed.matching.match import check_same_network
from sam_embed.matching.nodes import Nodes, make_nodes, points_of_grid
from sam_embed.matching.opinion import Opinion, joined
from sam_embed.matching.reference import Reference
from sam_embed.matching.search import linear_weights

NODE_MM = 8.0
VOTE_MM = 3.0
# Among several references: a similarity lower by 0.7 times the first, or a cycle error of the second, counts half.
SCORE_SCALE = 0.05
CYCLE_SCALE_MM = 12.0
BACKGROUND = 0
LEAST_BODY = 0.25  # of the nodes around a voxel: beyond, maps are extrapolated


class Carried(NamedTuple):
    """Labels carried to a scan.

    Attributes:
        labels: [D, H, W], uint8 where the values fit and int32 otherwise; 0 where background won or nobody voted.
        confidence: float32 [D, H, W], 0 to 1: the trusted votes for this label.
    """

    labels: np.ndarray
    confidence: np.ndarray


def carry_labels(
    scan: Embedding,
    references: Sequence[Reference],
    shape: Sequence[int],
    affine: np.ndarray,
    node_mm: float = NODE_MM,
    vote_mm: float = VOTE_MM,
    hu: np.ndarray | None = None,
    opinion: Opinion | None = None,
) -> Carried:
    """Label a scan by references.

    Args:
        scan: embedding of the scan.
        references: one or more; each is asked for once, so that a sequence may read it from a file.
        shape, affine: the grid to label, (D, H, W) and index -> world mm of the scan; in any orientation.
        node_mm: distance of the nodes that are matched, mm.
        vote_mm: votes are counted on voxels of at least this size, mm, and interpolated to the grid.
        hu: intensities of the scan on the grid to label, HU; they sharpen the votes. None = votes alone.
        opinion: of a network, on the grid where votes are counted; it is joined with them before they are sharpened.

    Raises:
        ValueError: no reference, embeddings by different weights, labels that are no three-dimensional integers or
            that the opinion does not know, or intensities on another grid.
    """
    shape = tuple(int(size) for size in shape)
    if hu is not None and hu.shape != shape:
        raise ValueError(f"intensities of shape {hu.shape} do not fit the grid to label, {shape}")
    vote_shape, vote_affine = coarser_grid(shape, affine, vote_mm)
    votes, values, *_ = count_votes(scan, references, vote_shape, vote_affine, node_mm)
    if opinion is not None:
        votes = joined(votes, values.tolist(), opinion(vote_shape, vote_affine))
    if hu is not None:
        votes = sharpened(votes, shrunk(hu, vote_shape), spacing_of(vote_affine))
    return _winners(votes, values, shape)


class Counted(NamedTuple):
    """What references say of every voxel of a grid.

    Attributes:
        votes: float32 [K, D, H, W], trust of the references where this label was read, 0 to 1; mean over the
            references, weighed by `_agreement` where there are several.
        values: the K labels that were read anywhere, ascending, 0 first.
        reach: float32 [D, H, W], share of the references that reach a voxel.
        beyond: of each reference, the voxels of the body that it does not reach.
    """

    votes: np.ndarray
    values: np.ndarray
    reach: np.ndarray
    beyond: list[Beyond]


def count_votes(
    scan: Embedding,
    references: Sequence[Reference],
    shape: Sequence[int],
    affine: np.ndarray,
    node_mm: float = NODE_MM,
) -> Counted:
    """The votes of references for every label at every voxel of a grid.

    Args:
        as for `carry_labels`.
    """
    if not len(references):
        raise ValueError("carrying labels needs at least one labelled reference")
    shape = tuple(int(size) for size in shape)
    num_voxels = int(np.prod(shape))
    votes = {BACKGROUND: np.zeros(num_voxels, dtype=np.float32)}
    reach, total = (np.zeros(num_voxels, dtype=np.float32) for _ in range(2))
    nodes = make_nodes(scan, node_mm)

    def asked(reference: Reference) -> Ballot:
        _check_labels(reference)
        check_same_network(scan, reference.embedding)
        return _ballot(nodes, reference, shape, affine, node_mm, len(references) == 1)

    beyond = []
    for label, exists, weight, trust, not_shown in _in_order(asked, references):
        beyond.append(not_shown)
        reach += exists
        total += weight
        strength = weight * trust
        for value in np.unique(label[exists]).tolist():
            if value not in votes:
                votes[value] = np.zeros(num_voxels, dtype=np.float32)
            voted = np.flatnonzero(exists & (label == value))
            votes[value][voted] += strength[voted]
    values = np.array(sorted(votes))
    counted = np.stack([votes[value].reshape(shape) for value in values.tolist()])
    return Counted(counted / total.reshape(shape), values, (reach / np.float32(len(references))).reshape(shape), beyond)


class Ballot(NamedTuple):
    """What one reference says of every voxel of the grid, [N]: its label, whether it has one, its weight and trust.

    `beyond` are those of the body where it has none.
    """

    label: np.ndarray
    exists: np.ndarray
    weight: np.ndarray
    trust: np.ndarray
    beyond: Beyond


def _ballot(
    nodes: Nodes, reference: Reference, shape: tuple[int, int, int], affine: np.ndarray, node_mm: float, is_alone: bool
) -> Ballot:
    """Map the scan's nodes to a reference and read its labels there."""
    theirs = make_nodes(reference.embedding, node_mm)
    found, back = map_both_ways(nodes, theirs)
    agreement = np.ones_like(found.trust) if is_alone else _agreement(nodes, theirs, found, back)
    layers = np.stack([found.trust, agreement, is_shown(theirs, back, nodes.points_mm), nodes.body], axis=-1)
    places_mm, trust, weight, shown, body = sample_map(found, layers, shape, affine)
    label, exists = _labels_at(reference, places_mm)
    exists &= shown > 0.5
    in_body = body > LEAST_BODY
    voxels = np.flatnonzero(in_body & ~exists)
    return Ballot(label, exists & in_body, weight, trust, Beyond(voxels, places_mm[voxels]))


def _in_order(work: Callable[[Reference], Ballot], references: Iterable[Reference]) -> Iterator[Ballot]:
    """`work` of each reference in their order, in as many threads as PyTorch has; few are held at a time."""
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads) as pool:
        running: deque[Future[Ballot]] = deque()
        for reference in references:
            running.append(pool.submit(work, reference))
            if len(running) > num_threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def sample_map(
    found: DenseMap, layers: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Interpolate a dense map, and further layers [d, h, w, L] on its nodes, to a grid of the scan.

    Returns:
        Places float32 [N, 3], world mm in the other volume, and the L layers float32 [N]; for all N = D * H * W voxels.
    """
    index = torch.from_numpy(np.linalg.inv(found.affine) @ np.asarray(affine, dtype=np.float64)).float()
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in shape), indexing="ij")
    nodes = torch.stack([sum(index[row, k] * axes[k] for k in range(3)) + index[row, 3] for row in range(3)], dim=-1)
    size = torch.tensor(found.trust.shape, dtype=torch.float32)
    nodes = (2 * nodes + 1) / size - 1  # grid_sample's coordinates: -1 and 1 are the outer faces of the outer nodes
    maps = np.concatenate([found.places_mm, layers], axis=-1, dtype=np.float32)
    maps = torch.from_numpy(np.moveaxis(maps, -1, 0).copy())[None]
    sampled = F.grid_sample(maps, nodes.flip(-1)[None], mode="bilinear", padding_mode="border", align_corners=False)
    sampled = sampled[0].flatten(1).numpy()
    return sampled[:3].T, *sampled[3:]


def is_outside(scan: Embedding, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Which voxels of a grid, index -> world mm, lie outside of a scan's body, where no organ is; bool [D, H, W]."""
    index = world_to_index(scan.fine_affine, points_of_grid(tuple(shape), affine))
    share = map_coordinates(scan.body.numpy().astype(np.float32), np.moveaxis(index, -1, 0), order=1, mode="nearest")
    # The embedded box is the body's, but for rounding: within a voxel of it the body may go on to the scan's end.
    return (share <= LEAST_BODY) | ((index < -1) | (index > scan.body.shape)).any(axis=-1)


def _agreement(scan: Nodes, reference: Nodes, found: DenseMap, back: DenseMap) -> np.ndarray:
    """Weight of a reference among others at every node [d, h, w], more than 0: by score and cycle error."""
    score = np.clip(score_at_places(scan, reference, found.places_mm), -1, 1)
    cycle_mm = cycle_of_maps_mm(found, back)
    return (np.exp((score - 1) / SCORE_SCALE) / (1 + (cycle_mm / CYCLE_SCALE_MM) ** 2)).astype(np.float32)


def _check_labels(reference: Reference) -> None:
    labels, name = reference.labels, reference.embedding.name
    if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of {name!r}: expected integers [D, H, W], got {labels.dtype} {labels.shape}")
    if labels.size and labels.min() < 0:
        raise ValueError(f"labels of {name!r}: expected 0 or more, got {labels.min()}")


def _labels_at(reference: Reference, places_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label of the voxel nearest to each place [N], and whether the place lies in the volume."""
    index = np.rint(world_to_index(reference.affine, places_mm)).astype(np.int64)
    size = np.array(reference.labels.shape)
    exists = ((index >= 0) & (index < size)).all(axis=1)
    d, h, w = np.clip(index, 0, size - 1).T
    return reference.labels[d, h, w], exists


def coarser_grid(shape: Sequence[int], affine: np.ndarray, least_mm: float) -> tuple[tuple[int, int, int], np.ndarray]:
    """A grid over the same box whose voxels are at least `least_mm` large, but for rounding."""
    size = np.asarray(shape) * spacing_of(affine)
    coarse = np.minimum(np.maximum(1, np.rint(size / least_mm)), shape).astype(int)
    factor = np.asarray(shape) / coarse
    step = np.diag([*factor, 1.0])
    step[:3, 3] = (factor - 1) / 2
    return tuple(int(n) for n in coarse), np.asarray(affine, dtype=np.float64) @ step


def _winners(votes: np.ndarray, values: np.ndarray, shape: tuple[int, int, int]) -> Carried:
    """The label with most votes at every voxel of a finer grid over the same box; votes are interpolated linearly."""
    weights = [_upsampling(coarse, fine) for coarse, fine in zip(votes.shape[1:], shape)]
    confidence = _upsample(votes[0], weights)
    labels = np.zeros(shape, dtype=np.uint8 if values.max() <= 255 else np.int32)
    for vote, value in zip(votes[1:], values[1:]):
        if not vote.any():
            continue
        voted = [slice(*ends) for ends in zip(*mask_box(vote > 0))]
        parts = [weight[:, part] for weight, part in zip(weights, voted)]
        box = tuple(slice(*np.flatnonzero(part.any(axis=1))[[0, -1]] + (0, 1)) for part in parts)
        fine = _upsample(vote[tuple(voted)], [part[rows] for part, rows in zip(parts, box)])
        better = fine > confidence[box]
        labels[box][better] = value
        np.maximum(confidence[box], fine, out=confidence[box])
    return Carried(labels, confidence)


def _upsampling(num_coarse: int, num_fine: int) -> np.ndarray:
    """Linear interpolation between grids over the same length, as a matrix [num_fine, num_coarse]."""
    positions = (np.arange(num_fine) + 0.5) * num_coarse / num_fine - 0.5
    return linear_weights(positions, num_coarse)[1]


def _upsample(values: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Interpolate [d, h, w] along each axis by the matrices [D, d], [H, h], [W, w]."""
    along_d, along_h, along_w = weights
    in_slice = along_h @ (values @ along_w.T)
    return (along_d @ in_slice.reshape(len(values), -1)).reshape(len(along_d), *in_slice.shape[1:])

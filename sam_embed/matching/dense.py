"""Dense matching of one embedded volume to another: a smooth map that says where every place of the scan lies there.

Single matches of SAM's vectors are right in most places and far off in some. A map of the whole body is found in three
steps, on two grids of nodes that lie `spacing_mm` and twice that apart:

1. Every body node of the wider grid is matched to the most similar one of the other volume, and back. A robust
   affine map is fitted to these matches, and a smooth map to those that agree with it.
2. Around the place that the map gives to a node, all nodes within a window are compared. Nodes choose the one that
   combines similarity and closeness to the smoothed choices of their neighbours; closeness weighs more in each round
   (coupled convex optimisation: Heinrich et al., MICCAI 2014; with SAM's vectors: Li et al., "SAMConvex", MICCAI 2023).
3. The same on the narrow grid, with a smaller window, and then a continuous correction (`sam_embed.matching.instance`).

How well a node's own most similar place agrees with the map, averaged over its neighbourhood, says how far to trust it.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates
from scipy.spatial import cKDTree
from torch import Tensor

from datasets.ct.geometry import index_to_world, world_to_index
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.instance import optimised
from sam_embed.matching.match import check_same_network
from sam_embed.matching.nodes import Nodes, make_nodes, points_of_grid, window_cost

NUM_ROUNDS = 8  # of re-weighting the affine map
AFFINE_SCALE_MM = 20.0  # matches that miss the affine map by more weigh less
LOCAL_SCALE_MM = 24.0  # likewise the smooth map; neighbours of one organ differ from an affine map by about this
CYCLE_SCALE_MM = 24.0  # matches that come back farther from where they started weigh less
SMOOTH_NODES = 1.5  # sigma of the smoothing of displacements, in nodes of the grid at hand
CLOSENESS = (0.003, 0.01, 0.03, 0.1)  # per squared node, against similarities; of Heinrich's rounds the first ones
LEAST_WEIGHT = 1e-3  # of the largest one: less around a node is nothing
NEAR_MM = 16.0  # two nodes: mapped places lie about a node apart, more where the scan's patient is larger
TRUST_SCALE_MM = 12.0  # a node whose own most similar place lies as far from the map is half trusted
BYTES_PER_BLOCK = 2**24


@dataclass(frozen=True, eq=False)
class DenseMap:
    """Where a scan's nodes lie in another volume.

    Attributes:
        affine: float64 [4, 4], node index (d, h, w) of the scan -> world mm.
        places_mm: float32 [d, h, w, 3], world mm in the other volume; extrapolated outside of the body.
        trust: float32 [d, h, w], 0 to 1: agreement of the nodes around with the map.
    """

    affine: np.ndarray
    places_mm: np.ndarray
    trust: np.ndarray

    @property
    def points_mm(self) -> np.ndarray:
        """World mm [d, h, w, 3] of the scan's nodes."""
        return points_of_grid(self.trust.shape, self.affine)

    @property
    def displacement_mm(self) -> np.ndarray:
        """[d, h, w, 3], from each node to its place."""
        return self.places_mm - self.points_mm


@torch.no_grad()
def dense_map(scan: Embedding, reference: Embedding, spacing_mm: float = 8.0) -> DenseMap:
    """Find where every place of a scan lies in another volume.

    Args:
        scan, reference: embeddings by the same weights, of volumes that share a part of the body.
        spacing_mm: about the distance of the nodes, mm.

    Raises:
        ValueError: embeddings by different weights, or without a body.
    """
    check_same_network(scan, reference)
    return map_nodes(make_nodes(scan, spacing_mm), make_nodes(reference, spacing_mm))


@torch.no_grad()
def map_nodes(scan: Nodes, reference: Nodes) -> DenseMap:
    """As `dense_map`, with nodes that were made before."""
    wide, wide_reference = _wide_nodes(scan, reference)
    return _map(scan, reference, wide, wide_reference, _matches(wide, wide_reference))


@torch.no_grad()
def map_both_ways(scan: Nodes, reference: Nodes) -> tuple[DenseMap, DenseMap]:
    """The map from scan to reference, and the one from reference to scan; single matches are sought once for both."""
    wide, wide_reference = _wide_nodes(scan, reference)
    found, back = _matches(wide, wide_reference)
    there = scan, reference, wide, wide_reference, (found, back)
    returning = reference, scan, wide_reference, wide, (back, found)
    with ThreadPoolExecutor(2) as pool:  # much of the work is that of one thread
        to_reference, to_scan = pool.map(lambda arguments: _map(*arguments), (there, returning))
    return to_reference, to_scan


def _wide_nodes(scan: Nodes, reference: Nodes) -> tuple[Nodes, Nodes]:
    """The wider grids of both.

    Raises:
        ValueError: one of them has no body.
    """
    wide = scan.every_second(), reference.every_second()
    if not all(nodes.body.any() for nodes in (scan, reference, *wide)):
        raise ValueError("dense matching needs a body in both volumes, and one of the embeddings has none")
    return wide


def _matches(scan: Nodes, reference: Nodes) -> tuple[np.ndarray, np.ndarray]:
    """The most similar body node of the reference for each one of the scan [N], and the reverse [M]."""
    return _best_of_all(*(nodes.vectors[np.flatnonzero(nodes.body)] for nodes in (scan, reference)))


@torch.no_grad()
def _map(
    scan: Nodes, reference: Nodes, wide: Nodes, wide_reference: Nodes, matches: tuple[np.ndarray, np.ndarray]
) -> DenseMap:
    """The map from scan to reference, given the matches between the body's nodes of the wider grids, and back."""
    displacement = _global_displacement(wide, wide_reference, *matches)
    displacement, _ = _refine(wide, wide_reference, displacement, radius=2)
    index = world_to_index(wide.affine, scan.points_mm.reshape(-1, 3)).T
    displacement = np.stack(
        [map_coordinates(displacement[..., axis], index, order=1, mode="nearest") for axis in range(3)], axis=-1
    ).reshape(*scan.shape, 3)
    displacement, trust = _refine(scan, reference, displacement, radius=2)
    displacement = optimised(scan, reference, displacement)
    return DenseMap(scan.affine, (scan.points_mm + displacement).astype(np.float32), trust.astype(np.float32))


def score_at_places(scan: Nodes, reference: Nodes, places_mm: np.ndarray) -> np.ndarray:
    """Similarity [d, h, w] of each node of the scan to the reference's node nearest to its place [d, h, w, 3]."""
    index = np.rint(world_to_index(reference.affine, places_mm.reshape(-1, 3))).astype(np.int64)
    index = np.clip(index, 0, np.array(reference.shape) - 1)
    rows = torch.from_numpy(np.ravel_multi_index(tuple(index.T), reference.shape))
    score = torch.einsum("nc,nc->n", scan.vectors, reference.vectors.index_select(0, rows))
    return score.numpy().reshape(scan.shape)


def cycle_of_maps_mm(found: DenseMap, back: DenseMap) -> np.ndarray:
    """How far from each node [d, h, w] its place is mapped back to, mm; `back` maps the other volume to the scan."""
    index = world_to_index(back.affine, found.places_mm.reshape(-1, 3)).T
    returned = [map_coordinates(back.places_mm[..., axis], index, order=1, mode="nearest") for axis in range(3)]
    start_mm = found.points_mm.reshape(-1, 3)
    return np.linalg.norm(np.stack(returned, axis=-1) - start_mm, axis=-1).reshape(found.trust.shape)


def is_shown(reference: Nodes, back: DenseMap, points_mm: np.ndarray) -> np.ndarray:
    """Whether the reference shows a place of the scan: bool [...] for points [..., 3], world mm in the scan.

    It does where a place of its body is mapped to within 16 mm. The map from scan to reference cannot tell: it finds a
    most similar place for everything, and moves what lies beyond the reference's ends onto those ends.

    Args:
        back: maps the reference to the scan.
    """
    tree = cKDTree(back.places_mm[reference.body])
    distance_mm, _ = tree.query(points_mm.reshape(-1, 3), distance_upper_bound=NEAR_MM)
    return np.isfinite(distance_mm).reshape(points_mm.shape[:-1])


def _smooth(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted mean of each node's surroundings; where there is no weight around, the nearest such mean goes on.

    Args:
        values: [d, h, w, K]; weight: [d, h, w], 0 or more.
    """
    total = gaussian_filter(weight, SMOOTH_NODES, mode="constant")
    known = total > LEAST_WEIGHT * weight.max()
    parts = [gaussian_filter(part * weight, SMOOTH_NODES, mode="constant") for part in np.moveaxis(values, -1, 0)]
    mean = np.stack(parts, axis=-1) / np.where(known, total, 1)[..., None]
    if known.all():
        return mean
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return mean[tuple(nearest)]


def _global_displacement(scan: Nodes, reference: Nodes, found: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Displacements [d, h, w, 3], mm, of a smooth map through the single matches of the body's nodes (`_matches`)."""
    rows, keys = np.flatnonzero(scan.body), np.flatnonzero(reference.body)
    points = scan.points_mm.reshape(-1, 3)[rows]
    places = reference.points_mm.reshape(-1, 3)[keys][found]
    cycle_mm = np.linalg.norm(points[back[found]] - points, axis=1)
    trusted = 1 / (1 + (cycle_mm / CYCLE_SCALE_MM) ** 2)
    affine, weight = _robust_affine(points, places, trusted)
    predicted = np.concatenate([scan.points_mm, np.ones((*scan.shape, 1))], axis=-1) @ affine
    residual, weights = np.zeros((*scan.shape, 3)), np.zeros(scan.shape)
    residual.reshape(-1, 3)[rows] = places - predicted.reshape(-1, 3)[rows]
    weights.reshape(-1)[rows] = weight
    smooth = _smooth(residual, weights)
    miss = np.linalg.norm(residual - smooth, axis=-1)
    smooth = _smooth(residual, weights / (1 + (miss / LOCAL_SCALE_MM) ** 2) ** 2)
    return predicted - scan.points_mm + smooth


def _best_of_all(queries: Tensor, keys: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The most similar key of each query [N], and the most similar query of each key [M]."""
    found, back = [], torch.zeros(len(keys), dtype=torch.int64)
    best = torch.full((len(keys),), -torch.inf)
    num_rows = max(1, BYTES_PER_BLOCK // (4 * len(keys)))
    for first in range(0, len(queries), num_rows):
        similarity = queries[first : first + num_rows] @ keys.T
        found.append(similarity.argmax(dim=1))
        score, row = similarity.max(dim=0)
        back = torch.where(score.cpu() > best, row.cpu() + first, back)
        best = torch.maximum(best, score.cpu())
    return torch.cat(found).cpu().numpy(), back.numpy()


def _robust_affine(points: np.ndarray, places: np.ndarray, trusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An affine map [4, 3] from points to places [N, 3] by re-weighted least squares, and the final weights [N]."""
    basis = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    middle = np.median(points, axis=0)
    shift = np.median(places - points, axis=0)
    prior = np.concatenate([np.eye(3), shift[None]])  # with few matches: a translation
    spread = np.concatenate([points - middle, np.ones((len(points), 1))], axis=1)  # the same map, well conditioned
    to_spread = np.linalg.lstsq(spread, basis, rcond=None)[0]
    prior = to_spread @ prior
    ridge = np.diag([100.0**2] * 3 + [1e-3])
    weight = trusted
    for _ in range(NUM_ROUNDS):
        normal = (spread * weight[:, None]).T @ spread + ridge
        fitted = np.linalg.solve(normal, (spread * weight[:, None]).T @ places + ridge @ prior)
        miss = np.linalg.norm(places - spread @ fitted, axis=1)
        scale = max(AFFINE_SCALE_MM, float(np.median(miss)))
        weight = trusted / (1 + (miss / scale) ** 2) ** 2
    shifted = fitted.copy()
    shifted[3] = fitted[3] - middle @ fitted[:3]
    return shifted, weight


def _refine(scan: Nodes, reference: Nodes, displacement: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Improve a map by what lies around its places.

    Args:
        displacement: [d, h, w, 3], mm.
        radius: of the window, a ball, nodes of the reference.

    Returns:
        The better displacement, and trust [d, h, w].
    """
    rows = np.flatnonzero(scan.body)
    points = scan.points_mm.reshape(-1, 3)[rows]
    smooth = displacement.reshape(-1, 3)[rows]
    centre = np.rint(world_to_index(reference.affine, points + smooth)).astype(np.int64)
    offsets = np.array(list(itertools.product(range(-radius, radius + 1), repeat=3)))
    offsets = offsets[(offsets**2).sum(axis=1) <= radius**2 + 1]
    cost = window_cost(scan.vectors[rows], reference, centre, offsets)
    # Squared distance of a candidate from the smooth map, in nodes: |base|^2 + 2 base . offset + |offset|^2.
    node_mm = float(reference.spacing_mm.mean())
    steps_mm = offsets @ reference.affine[:3, :3].T
    base_mm = index_to_world(reference.affine, centre) - points
    body = scan.body.astype(float)
    field = np.zeros((*scan.shape, 3))
    own = None
    for closeness in CLOSENESS:
        away = torch.from_numpy((base_mm - smooth).astype(np.float32))
        steps = torch.from_numpy(steps_mm.astype(np.float32))
        total = torch.addmm(cost, away, steps.T, alpha=2 * closeness / node_mm**2)
        total += closeness / node_mm**2 * (steps**2).sum(dim=1)
        chosen = base_mm + steps_mm[total.argmin(dim=1).numpy()]
        own = chosen if own is None else own
        field.reshape(-1, 3)[rows] = chosen
        smoothed = _smooth(field, body)
        smooth = smoothed.reshape(-1, 3)[rows]
    miss = np.zeros((*scan.shape, 1))
    miss.reshape(-1)[rows] = 1 / (1 + (np.linalg.norm(own - smooth, axis=1) / TRUST_SCALE_MM) ** 2)
    return smoothed, _smooth(miss, body)[..., 0]

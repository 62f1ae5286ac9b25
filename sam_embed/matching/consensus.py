"""Neighbourhood consensus: a match is believed where the points around it are matched alongside.

What the SAM literature calls stable points. The neighbours of a query point are matched too; anatomy deforms smoothly,
so that their displacements agree with a local affine map where the matches are right, while far outliers (another
vertebra, the other side of the body) scatter. The map is fitted robustly: outliers lose their say over some rounds of
re-weighting. It says where the point itself should lie, and the neighbours' distance from it says how far to trust it.
"""

import itertools
from typing import NamedTuple

import numpy as np

from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.match import Matches, match_points, score_at

NUM_ROUNDS = 8  # of re-weighting
SCALE_FLOOR_MM = 2.0  # residuals up to here are all right: matches are no better than a fraction of a voxel
RIDGE_MM = 30.0  # the linear part is held near the identity, more so the fewer neighbours speak for another one
# Eight neighbours: the corners of a cube, at distance 1 from its centre.
CORNERS = np.array(list(itertools.product((-1.0, 1.0), repeat=3))) / np.sqrt(3.0)


class Consensus(NamedTuple):
    """What the neighbourhoods of N points say.

    Attributes:
        points_mm: float64 [N, 3], where the local maps put the points; NaN where no neighbour was matched.
        spread_mm: float64 [N], median distance of the neighbours' matches (and the point's own) from the local map.
    """

    points_mm: np.ndarray
    spread_mm: np.ndarray


def consensus(query: Embedding, key: Embedding, points_mm: np.ndarray, radius_mm: float, **matching) -> Consensus:
    """Match points together with their neighbours, which are asked where the points should lie.

    Args:
        query, key: embeddings by the same weights.
        points_mm: [N, 3] world mm in the query volume.
        radius_mm: distance of the neighbours; about two fine voxels.
        matching: passed to `match_points`.

    Returns:
        What the neighbourhoods say.
    """
    points_mm = np.asarray(points_mm, dtype=np.float64).reshape(-1, 3)
    offsets = np.concatenate([np.zeros((1, 3)), CORNERS * radius_mm])
    found = match_points(query, key, (points_mm[:, None] + offsets).reshape(-1, 3), **matching)
    return fit_local_maps(offsets, found.points_mm.reshape(len(points_mm), len(offsets), 3))


def match_with_neighbours(
    query: Embedding, key: Embedding, points_mm: np.ndarray, radius_mm: float, **matching
) -> tuple[Matches, np.ndarray]:
    """Match points where their neighbourhoods put them.

    Args:
        as for `consensus`, but that with a radius of 0 each point is matched by itself.

    Returns:
        The matches, and their spread float64 [N], mm; NaN where it was not measured.
    """
    if not radius_mm:
        return match_points(query, key, points_mm, **matching), np.full(len(points_mm), np.nan)
    agreed = consensus(query, key, points_mm, radius_mm, **matching)
    return Matches(agreed.points_mm, score_at(query, key, points_mm, agreed.points_mm)), agreed.spread_mm


def fit_local_maps(offsets: np.ndarray, places_mm: np.ndarray) -> Consensus:
    """Fit place = centre + linear x offset to each neighbourhood, by re-weighted least squares (Geman-McClure).

    Args:
        offsets: [P, 3] mm from the point, the point itself (0, 0, 0) first.
        places_mm: [N, P, 3], where those were matched to; NaN where they were not.
    """
    known = np.isfinite(places_mm).all(axis=2)
    moved = np.where(known[:, :, None], places_mm - offsets, 0.0)  # of a pure translation all are the same place
    has_any = known.any(axis=1)
    # Zeros stand in where nothing is known, and are taken out again below.
    centre = np.nanmedian(np.where((known | ~has_any[:, None])[:, :, None], moved, np.nan), axis=1)
    basis = np.concatenate([np.ones((len(offsets), 1)), offsets], axis=1)  # [P, 4]
    ridge = np.diag([0.0, *[RIDGE_MM**2] * 3])
    residual_mm = np.linalg.norm(moved - centre[:, None], axis=2)
    for _ in range(NUM_ROUNDS):
        scale = np.maximum(_median_of(residual_mm, known), SCALE_FLOOR_MM)[:, None]
        weight = known / (1 + (residual_mm / scale) ** 2) ** 2
        normal = np.einsum("np,pa,pb->nab", weight, basis, basis) + ridge + 1e-9 * np.eye(4)
        fitted = np.linalg.solve(normal, np.einsum("np,pa,npc->nac", weight, basis, moved))  # [N, 4, 3]
        residual_mm = np.linalg.norm(moved - basis @ fitted, axis=2)
    return Consensus(
        np.where(has_any[:, None], fitted[:, 0], np.nan),
        np.where(has_any, _median_of(residual_mm, known), np.nan),
    )


def _median_of(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Median of each row's known values; 0 where there is none."""
    held = np.where(known, values, np.inf)
    held.sort(axis=1)
    middle = np.maximum(known.sum(axis=1) - 1, 0) // 2
    found = held[np.arange(len(held)), middle]
    return np.where(np.isfinite(found), found, 0.0)

"""Mining: which points of every volume match which points of some others.

For every query case, K points spread over the body are matched to M partner cases, and back. The cases stand on a
circle in an order that the seed decides, and each is matched to the M that follow it: neighbours on the circle share
all but two of their partners, so that one walk around it reads every embedding about once and keeps M + 1 in memory
(fewer, where the cache is smaller, at the price of reading some again). Points and partners depend on the seed, the
names and the patients only, never on who mines or in which order. A whole corpus: `sam_embed.matching.mine_corpus`.
"""

import dataclasses
import hashlib
import itertools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import ndimage

from datasets.ct.geometry import index_to_world, world_to_index
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import ANY_MM, within
from sam_embed.embeddings.embedding_store import Embedding, EmbeddingCache
from sam_embed.matching.consensus import match_with_neighbours
from sam_embed.matching.match import Matches, cycle_error_mm, on_device

NUM_CANDIDATES = 16  # per point: the farthest of so many random places from the points already drawn is taken
GPU_MEMORY_MB = 2048.0  # a GPU is fast with large products, a CPU with small ones


@dataclasses.dataclass(frozen=True)
class MiningOptions:
    """What decides the rows; its fields are flags.

    Attributes:
        num_points: query points per case
        num_partners: key cases per query case; more than there are = all
        min_score: rows below are not stored; training applies its own threshold
        border_mm: distance that query points keep from the skin and from the ends of the scan, mm
        seed: of points and partners
        consensus_mm: distance of the neighbours that are matched too and decide where a match lies, mm; 0 = off
        max_spread_mm: with consensus, drop matches about whose place the neighbours disagree by more, mm; 1e6 = any
    """

    num_points: int = 200
    num_partners: int = 8
    min_score: float = 0.0
    border_mm: float = 12.0
    seed: int = 0
    consensus_mm: float = 20.0
    max_spread_mm: float = ANY_MM

    def __post_init__(self) -> None:
        if self.num_points < 1 or self.num_partners < 1:
            received = f"{self.num_points} and {self.num_partners}"
            raise ValueError(f"--num_points and --num_partners must be at least 1, received {received}")
        if self.border_mm < 0:
            raise ValueError(f"--border_mm must not be negative, received {self.border_mm}")
        if self.consensus_mm < 0 or self.max_spread_mm <= 0:
            received = f"{self.consensus_mm} and {self.max_spread_mm}"
            raise ValueError(f"--consensus_mm must be 0 or more and --max_spread_mm above 0, received {received}")
        if not self.consensus_mm and self.max_spread_mm < ANY_MM:
            raise ValueError(
                f"--max_spread_mm {self.max_spread_mm:g} needs --consensus_mm above 0: only consensus measures a spread"
            )


def draw_points(embedding: Embedding, options: MiningOptions) -> np.ndarray:
    """Query points of one case: world mm float64 [K, 3], spread over the body, off its surface and the scan's ends.

    Where no place is far enough from the border (a thin slab), the deepest fifth of the body is taken.
    """
    inside = np.ones(embedding.fine.shape[1:], dtype=bool) if embedding.body is None else embedding.body.cpu().numpy()
    # The padding makes the ends of the embedded box count as border.
    depth_mm = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=embedding.fine_spacing_mm)[1:-1, 1:-1, 1:-1]
    deep = depth_mm >= options.border_mm
    if not deep.any():
        deep = depth_mm >= np.quantile(depth_mm[inside], 0.8) if inside.any() else np.ones_like(inside)
    rng = np.random.default_rng([options.seed, zlib.crc32(embedding.name.encode())])
    voxels = np.argwhere(deep)
    drawn = rng.integers(len(voxels), size=(options.num_points, NUM_CANDIDATES))
    jitter = rng.uniform(-0.5, 0.5, (options.num_points, NUM_CANDIDATES, 3))
    candidates = np.clip(voxels[drawn] + jitter, 0, np.array(inside.shape) - 1)
    places_mm = index_to_world(embedding.fine_affine, candidates)  # [K, NUM_CANDIDATES, 3]
    chosen = np.empty((options.num_points, 3))
    chosen[0] = places_mm[0, 0]
    for number in range(1, options.num_points):
        distance = np.linalg.norm(places_mm[number][:, None] - chosen[None, :number], axis=2).min(axis=1)
        chosen[number] = places_mm[number, distance.argmax()]
    return chosen


def circle_of(names: Sequence[str], seed: int) -> list[str]:
    """The cases in the order of their digests: as good as random, and another case more changes its neighbours only."""
    return sorted(set(names), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())


def partners_on(
    circle: Sequence[str], query: str, num_partners: int, patient_of: Mapping[str, str] | None = None
) -> list[str]:
    """Key cases of one query case: those that follow it on the circle, nearest first, but no scan of its own patient.

    Args:
        patient_of: case -> its patient; a case that it does not hold is a patient of its own.
    """
    patient_of = patient_of or {}
    at, own = circle.index(query), patient_of.get(query)
    following = (circle[(at + step) % len(circle)] for step in range(1, len(circle)))
    others = (name for name in following if own is None or patient_of.get(name) != own)
    return list(itertools.islice(others, num_partners))


def circles_of(names: Sequence[str], sections: Sequence[Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Case -> the circle of its section; that of all cases for one that is alone in its section, or in none."""
    circle_by_name = dict.fromkeys(names, circle_of(names, seed))
    for section in sections:
        if len(set(section)) > 1:
            circle_by_name |= dict.fromkeys(section, circle_of(section, seed))
    return circle_by_name


def mine_case(
    cache: EmbeddingCache,
    names: Sequence[str],
    query: str,
    partners: Sequence[str],
    options: MiningOptions,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Rows (`ROW_DTYPE`) of one query case, sorted by key case; case numbers index `names`.

    Args:
        partners: the key cases, in the order in which they are read.
    """
    embedding = on_device(cache[query], device)
    points_mm = draw_points(embedding, options)
    rows_of = {name: _mine_pair(embedding, on_device(cache[name], device), points_mm, options) for name in partners}
    number_of = {name: number for number, name in enumerate(names)}
    for name, rows in rows_of.items():
        rows["query_case"], rows["key_case"] = number_of[query], number_of[name]
    return np.concatenate([np.zeros(0, ROW_DTYPE), *(rows_of[name] for name in sorted(partners))])


def _mine_pair(query: Embedding, key: Embedding, points_mm: np.ndarray, options: MiningOptions) -> np.ndarray:
    """Rows of one pair of cases, without the cases' numbers."""
    matching = {} if query.fine.device.type == "cpu" else {"memory_mb": GPU_MEMORY_MB}
    matches, spread_mm = match_with_neighbours(query, key, points_mm, options.consensus_mm, **matching)
    # Scores and places of unmatched points are NaN, so that both are False.
    kept = (matches.score >= options.min_score) & lies_in_body(key, matches.points_mm)
    kept &= within(spread_mm, options.max_spread_mm)
    points_mm, matches = points_mm[kept], Matches(matches.points_mm[kept], matches.score[kept])
    rows = np.zeros(len(points_mm), dtype=ROW_DTYPE)
    rows["query_mm"], rows["key_mm"], rows["score"] = points_mm, matches.points_mm, matches.score
    rows["spread_mm"] = spread_mm[kept]
    rows["cycle_mm"] = cycle_error_mm(query, key, points_mm, matches, **matching)
    return rows


def lies_in_body(embedding: Embedding, points_mm: np.ndarray) -> np.ndarray:
    """Which of the world points [N, 3] lie in a fine voxel of the patient (bool [N]): matches in air are wrong."""
    known = np.isfinite(points_mm).all(axis=1)
    if embedding.body is None:
        return known
    index = np.rint(world_to_index(embedding.fine_affine, np.where(known[:, None], points_mm, 0.0))).astype(int)
    last = np.array(embedding.body.shape) - 1
    known &= ((index >= 0) & (index <= last)).all(axis=1)
    return known & embedding.body.cpu().numpy()[tuple(np.clip(index, 0, last).T)]

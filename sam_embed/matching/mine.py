"""Mining: which points of every volume match which points of some others, once for the whole corpus.

For every query case, K points spread over the body are matched to M partner cases, and back. The cases stand on a
circle in an order that the seed decides, and each is matched to the M that follow it: neighbours on the circle share
all but two of their partners, so that one walk around it reads every embedding about once and keeps M + 1 in memory
(fewer, where the cache is smaller, at the price of reading some again). A query case's rows are one small file, so
that a killed run continues where it was and several processes share the work; the files are then joined into one table
(`datasets.samples.correspondences`). Points and partners depend on the seed and the names only, never on who mines or
in which order.
"""

import dataclasses
import hashlib
import io
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from datasets.ct.geometry import index_to_world, world_to_index
from datasets.samples.correspondences import ROW_DTYPE, CorrespondenceTable
from datasets.store.files import write_bytes
from sam_embed.embeddings.embedding_store import Embedding, EmbeddingCache, stored_header
from sam_embed.matching.consensus import consensus
from sam_embed.matching.match import Matches, cycle_error_mm, match_points, on_device

SHARD_FOLDER = "mined"
NUM_CANDIDATES = 16  # per point: the farthest of so many random places from the points already drawn is taken
GPU_MEMORY_MB = 2048.0  # a GPU is fast with large products, a CPU with small ones
WAIT_LIMIT_S = 3600.0  # without any new file from the other processes


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
        max_spread_mm: with consensus, drop matches about whose place the neighbours disagree by more, mm (10 is strict)
    """

    num_points: int = 200
    num_partners: int = 8
    min_score: float = 0.0
    border_mm: float = 12.0
    seed: int = 0
    consensus_mm: float = 20.0
    max_spread_mm: float = 1e6

    def __post_init__(self) -> None:
        if self.num_points < 1 or self.num_partners < 1:
            received = f"{self.num_points} and {self.num_partners}"
            raise ValueError(f"--num_points and --num_partners must be at least 1, received {received}")
        if self.border_mm < 0:
            raise ValueError(f"--border_mm must not be negative, received {self.border_mm}")
        if self.consensus_mm < 0 or self.max_spread_mm <= 0:
            received = f"{self.consensus_mm} and {self.max_spread_mm}"
            raise ValueError(f"--consensus_mm must be 0 or more and --max_spread_mm above 0, received {received}")


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


def partners_on(circle: Sequence[str], query: str, num_partners: int) -> list[str]:
    """Key cases of one query case: those that follow it on the circle, nearest first."""
    at = circle.index(query)
    return [circle[(at + step) % len(circle)] for step in range(1, min(num_partners, len(circle) - 1) + 1)]


def circles_of(names: Sequence[str], groups: Sequence[Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Case -> the circle of its group; that of all cases for one that is alone in its group, or in none."""
    circle_by_name = dict.fromkeys(names, circle_of(names, seed))
    for group in groups:
        if len(set(group)) > 1:
            circle_by_name |= dict.fromkeys(group, circle_of(group, seed))
    return circle_by_name


def mine_case(
    cache: EmbeddingCache,
    names: Sequence[str],
    query: str,
    options: MiningOptions,
    device: torch.device | str = "cpu",
    circle: Sequence[str] | None = None,
) -> np.ndarray:
    """Rows (`ROW_DTYPE`) of one query case, sorted by key case; case numbers index `names`.

    Args:
        circle: cases that partners are taken from, in order; None = `circle_of` all.
    """
    circle = circle or circle_of(names, options.seed)
    partners = partners_on(circle, query, options.num_partners)
    if circle.index(query) % 2:
        partners.reverse()  # there and back: a cache too small for all partners still holds the last ones
    embedding = on_device(cache[query], device)
    points_mm = draw_points(embedding, options)
    rows_of = {name: _mine_pair(embedding, on_device(cache[name], device), points_mm, options) for name in partners}
    number_of = {name: number for number, name in enumerate(names)}
    for name, rows in rows_of.items():
        rows["query_case"], rows["key_case"] = number_of[query], number_of[name]
    return np.concatenate([rows_of[name] for name in sorted(partners)])


def _mine_pair(query: Embedding, key: Embedding, points_mm: np.ndarray, options: MiningOptions) -> np.ndarray:
    """Rows of one pair of cases, without the cases' numbers."""
    matching = {} if query.fine.device.type == "cpu" else {"memory_mb": GPU_MEMORY_MB}
    if options.consensus_mm:
        matches, agreed = consensus(query, key, points_mm, options.consensus_mm, **matching)
        is_agreed = agreed.spread_mm <= options.max_spread_mm
        matches = Matches(np.where(is_agreed[:, None], agreed.points_mm, np.nan), matches.score)
    else:
        matches = match_points(query, key, points_mm, **matching)
    # Both are False for the NaN of unmatched points.
    kept = (matches.score >= options.min_score) & lies_in_body(key, matches.points_mm)
    points_mm, matches = points_mm[kept], Matches(matches.points_mm[kept], matches.score[kept])
    rows = np.zeros(len(points_mm), dtype=ROW_DTYPE)
    rows["query_mm"], rows["key_mm"], rows["score"] = points_mm, matches.points_mm, matches.score
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


def _settings_digest(
    options: MiningOptions, sources: Mapping[str, str], fingerprint: str, groups: Sequence[Sequence[str]]
) -> str:
    """Changes with everything that decides the rows, so that old files are not mistaken for new ones.

    Args:
        sources: case name -> identity of the CT behind its embedding.
    """
    settings = {
        **dataclasses.asdict(options),
        "sources": dict(sources),
        "fingerprint": fingerprint,
        "partners": "those that follow on the circle",
        "groups": [sorted(group) for group in groups],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _one_fingerprint(embed_dir: str | Path, headers: Mapping[str, Mapping[str, str]]) -> str:
    """The weights behind all embeddings, or a complaint about mixed ones."""
    by_fingerprint: dict[str | None, list[str]] = {}
    for name, header in headers.items():
        by_fingerprint.setdefault(header.get("fingerprint"), []).append(name)
    if None in by_fingerprint:
        raise ValueError(
            f"{embed_dir}: {len(by_fingerprint[None])} of {len(headers)} cases have no usable embedding, first "
            f"{', '.join(by_fingerprint[None][:3])}; run scripts/generate_sam_embeddings.py"
        )
    if len(by_fingerprint) > 1:
        listed = "; ".join(f"{key}: {', '.join(cases[:3])}" for key, cases in by_fingerprint.items())
        raise ValueError(f"{embed_dir}: embeddings of different weights ({listed}); embed all with one checkpoint")
    return next(iter(by_fingerprint))


def mine_corpus(
    embed_dir: str | Path,
    names: Sequence[str],
    output_dir: str | Path,
    options: MiningOptions,
    provenance: dict | None = None,
    cache_mb: float = 2048,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    groups: Sequence[Sequence[str]] = (),
) -> CorrespondenceTable | None:
    """Mine this rank's share of the cases; rank 0 then waits for the others and joins everything into one table.

    Args:
        embed_dir: folder of the embeddings.
        names: cases to mine, as queries and as keys; at least two.
        output_dir: the table's folder; each case's rows lie in `mined/` below it.
        options: what to mine.
        provenance: plain values to state in the table beside the options.
        cache_mb: embeddings kept in memory, beside the two in use.
        device: where to match.
        groups: parts of `names` (sections of a data list) whose cases are paired among themselves, so that held-out
            cases meet held-out ones; empty = all with all.

    Returns:
        The table on rank 0, None elsewhere.
    """
    names = sorted(names)
    if len(names) < 2:
        raise ValueError(f"{embed_dir}: mining needs at least 2 embedded cases, found {len(names)} (--embed_dir)")
    headers = {name: stored_header(embed_dir, name) for name in names}
    fingerprint = _one_fingerprint(embed_dir, headers)
    sources = {name: header.get("source", "") for name, header in headers.items()}
    digest = _settings_digest(options, sources, fingerprint, groups)
    shards = {name: Path(output_dir) / SHARD_FOLDER / f"{name}.{digest}.npy" for name in names}
    cache = EmbeddingCache(embed_dir, cache_mb)
    circle_by_name = circles_of(names, groups, options.seed)
    circles = {id(circle): circle for circle in circle_by_name.values()}.values()
    circle = [name for circle in circles for name in circle if circle_by_name[name] is circle]
    arc = circle[len(circle) * rank // world_size : len(circle) * (rank + 1) // world_size]
    for name in tqdm(arc, desc="mining", unit="case", disable=rank > 0):
        if not shards[name].exists():
            buffer = io.BytesIO()
            np.save(buffer, mine_case(cache, names, name, options, device, circle_by_name[name]))
            write_bytes(shards[name], buffer.getbuffer())
    if rank > 0:
        return None
    _wait_for(list(shards.values()))
    rows = np.concatenate([np.load(shard) for shard in shards.values()])
    stated = {**dataclasses.asdict(options), "weights": fingerprint, **(provenance or {})}
    table = CorrespondenceTable.write(output_dir, names, rows, stated)
    for shard in shards.values():
        shard.unlink()
    return table


def _wait_for(files: list[Path]) -> None:
    """Until all files are there; gives up when none has appeared for an hour."""
    missing, last_news = [file for file in files if not file.exists()], time.monotonic()
    while missing:
        if time.monotonic() - last_news > WAIT_LIMIT_S:
            raise ValueError(
                f"{missing[0].parent}: {len(missing)} of {len(files)} cases were not mined by the other processes, "
                f"first {missing[0].name}; run the command again to mine the rest"
            )
        time.sleep(0.5)
        still_missing = [file for file in missing if not file.exists()]
        if len(still_missing) < len(missing):
            last_news = time.monotonic()
        missing = still_missing

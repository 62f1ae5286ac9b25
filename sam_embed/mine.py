"""Mining: which points of every volume match which points of some others, once for the whole corpus.

For every query case, K points spread over the body are matched to M partner cases, and back. Two embeddings are in use
at a time, a few more stay cached. A query case's rows are one small file, so that a killed run continues where it was
and several processes share the work; the files are then joined into one table (`datasets.correspondences`). Points and
partners depend on the seed and the case's name only, never on who mines or in which order.
"""

import dataclasses
import hashlib
import io
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from datasets.correspondences import ROW_DTYPE, CorrespondenceTable
from datasets.files import write_bytes
from datasets.geometry import index_to_world, world_to_index
from sam_embed.embedding_store import Embedding, EmbeddingCache, stored_fingerprint
from sam_embed.match import cycle_error_mm, match_points

SHARD_FOLDER = "mined"
NUM_CANDIDATES = 16  # per point: the farthest of so many random places from the points already drawn is taken
WAIT_LIMIT_S = 3600.0  # without any new file from the other processes


@dataclasses.dataclass(frozen=True)
class MiningOptions:
    """What decides the rows.

    Attributes:
        num_points: query points per case.
        num_partners: key cases per query case; more than there are means all.
        min_score: rows below are not stored. A floor to save room: training applies its own threshold.
        border_mm: distance that query points keep from the body's surface and from the ends of the scan.
        seed: of points and partners.
    """

    num_points: int = 200
    num_partners: int = 8
    min_score: float = 0.0
    border_mm: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_points < 1 or self.num_partners < 1:
            received = f"{self.num_points} and {self.num_partners}"
            raise ValueError(f"--num_points and --num_partners must be at least 1, received {received}")
        if self.border_mm < 0:
            raise ValueError(f"--border_mm must not be negative, received {self.border_mm}")


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def draw_points(embedding: Embedding, options: MiningOptions) -> np.ndarray:
    """Query points of one case: world mm float64 [K, 3], spread over the body, off its surface and the scan's ends.

    Where no place is far enough from the border (a thin slab), the deepest fifth of the body is taken.
    """
    inside = np.ones(embedding.fine.shape[1:], dtype=bool) if embedding.body is None else embedding.body.numpy()
    # The padding makes the ends of the embedded box count as border.
    depth_mm = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=embedding.fine_spacing_mm)[1:-1, 1:-1, 1:-1]
    deep = depth_mm >= options.border_mm
    if not deep.any():
        deep = depth_mm >= np.quantile(depth_mm[inside], 0.8) if inside.any() else np.ones_like(inside)
    rng = _generator(options.seed, embedding.name)
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


def draw_partners(names: Sequence[str], query: str, options: MiningOptions) -> list[str]:
    """Key cases of one query case, sorted; the same whatever the order of `names`."""
    others = sorted(set(names) - {query})
    if options.num_partners >= len(others):
        return others
    rng = _generator(options.seed + 1, query)
    return sorted(others[number] for number in rng.choice(len(others), options.num_partners, replace=False))


def mine_case(cache: EmbeddingCache, names: Sequence[str], query: str, options: MiningOptions) -> np.ndarray:
    """Rows (`ROW_DTYPE`) of one query case; case numbers index `names`."""
    number_of = {name: number for number, name in enumerate(names)}
    embedding = cache[query]
    points_mm = draw_points(embedding, options)
    parts = []
    for partner in draw_partners(names, query, options):
        key = cache[partner]
        matches = match_points(embedding, key, points_mm)
        # Both are False for the NaN of unmatched points.
        kept = (matches.score >= options.min_score) & lies_in_body(key, matches.points_mm)
        rows = np.zeros(int(kept.sum()), dtype=ROW_DTYPE)
        rows["query_case"], rows["key_case"] = number_of[query], number_of[partner]
        rows["query_mm"], rows["key_mm"] = points_mm[kept], matches.points_mm[kept]
        rows["score"] = matches.score[kept]
        rows["cycle_mm"] = cycle_error_mm(embedding, key, points_mm, matches)[kept]
        parts.append(rows)
    return np.concatenate(parts)


def lies_in_body(embedding: Embedding, points_mm: np.ndarray) -> np.ndarray:
    """Which of the world points [N, 3] lie in a fine voxel of the patient (bool [N]): matches in air are wrong."""
    known = np.isfinite(points_mm).all(axis=1)
    if embedding.body is None:
        return known
    index = np.rint(world_to_index(embedding.fine_affine, np.where(known[:, None], points_mm, 0.0))).astype(int)
    last = np.array(embedding.body.shape) - 1
    known &= ((index >= 0) & (index <= last)).all(axis=1)
    return known & embedding.body.numpy()[tuple(np.clip(index, 0, last).T)]


def _settings_digest(options: MiningOptions, names: Sequence[str], fingerprint: str) -> str:
    """Changes with everything that decides the rows, so that old files are not mistaken for new ones."""
    settings = {**dataclasses.asdict(options), "names": list(names), "fingerprint": fingerprint}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _one_fingerprint(embed_dir: Path, names: Sequence[str]) -> str:
    """The weights behind all embeddings, or a complaint about mixed ones."""
    by_fingerprint: dict[str | None, list[str]] = {}
    for name in names:
        by_fingerprint.setdefault(stored_fingerprint(embed_dir, name), []).append(name)
    if None in by_fingerprint:
        raise ValueError(
            f"{embed_dir}: {len(by_fingerprint[None])} of {len(names)} cases have no usable embedding, first "
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
) -> CorrespondenceTable | None:
    """Mine this rank's share of the cases; rank 0 then waits for the others and joins everything into one table.

    Args:
        embed_dir: folder of the embeddings.
        names: cases to mine, as queries and as keys; at least two.
        output_dir: the table's folder; each case's rows lie in `mined/` below it.
        options: what to mine.
        provenance: plain values to state in the table beside the options.
        cache_mb: embeddings kept in memory.

    Returns:
        The table on rank 0, None elsewhere.
    """
    names = sorted(names)
    if len(names) < 2:
        raise ValueError(f"{embed_dir}: mining needs at least 2 embedded cases, found {len(names)} (--embed_dir)")
    fingerprint = _one_fingerprint(Path(embed_dir), names)
    digest = _settings_digest(options, names, fingerprint)
    shards = {name: Path(output_dir) / SHARD_FOLDER / f"{name}.{digest}.npy" for name in names}
    cache = EmbeddingCache(embed_dir, cache_mb)
    for name in tqdm(names[rank::world_size], desc="mining", unit="case", disable=rank > 0):
        if not shards[name].exists():
            buffer = io.BytesIO()
            np.save(buffer, mine_case(cache, names, name, options))
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

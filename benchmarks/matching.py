"""Matching: finding 256 points of one 2 mm torso volume in another and back, beside similarity maps for each point.

    python -m benchmarks.matching --quick --output results/benchmarks/matching.json

Yan et al., "SAM", TMI 2022, Sec. III-B. A matched point costs a search in the key and, for its cycle error, one back in
the query. Beside it: the published way, which upsamples the coarse map for each search; and the same with the upsampled
maps kept, their making spread over all points. The embeddings have the size that the published network gives a volume
of 205x205x250 voxels. Ours is timed on vectors that vary in space as those of a trained network do, and on random ones,
where the coarse map rules nothing out; it makes everything it derives from an embedding anew in each repeat.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jsonargparse
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import Rows, benchmark_parser, command, table, timed
from datasets.ct.geometry import index_to_world, world_to_index
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.match import Matches, match_points

GRID_MM = 2.0
TORSO_VOX = (250, 205, 205)  # the 2 mm grid of a 512x512x200 CT
QUICK_VOX = (125, 104, 104)
FINE_STRIDE, COARSE_STRIDE = (2, 2, 2), (4, 16, 16)
NUM_CHANNELS = 128
SCORE_TOLERANCE = 1e-4
WANTED = 20
# Distances over which the cosines of a SAM trained on phantoms fall to 0.6, and noise as two patients differ there.
FINE_WIDTH_MM, COARSE_WIDTH_MM, FINE_NOISE = 8.5, 56.0, 0.65


class Place(NamedTuple):
    """The best fine voxel of the key, [3], and its similarity."""

    index: np.ndarray
    score: float


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "volumes of an eighth", num_threads=1)
    parser.add_argument("--grid", type=list[int], default=None, help="2 mm voxels (D, H, W) of the embedded volumes")
    parser.add_argument("--num_channels", type=int, default=NUM_CHANNELS, help="channels of each embedding")
    parser.add_argument("--num_points", type=int, default=256, help="points to match")
    parser.add_argument("--num_maps", type=int, default=2, help="points to time with maps of their own")
    parser.add_argument("--num_repeats", type=int, default=2, help="repeats of ours on smooth vectors")
    return parser


def published_embedding(
    name: str, grid: Sequence[int], volume_affine: np.ndarray, make_vectors: Callable[..., Tensor]
) -> Embedding:
    """An embedding in the published layout.

    Args:
        grid: voxels (D, H, W) on a 2 mm grid.
        volume_affine: float64 [4, 4], index on that grid -> world mm.
        make_vectors: (shape, affine, is_fine) of an output -> its unit vectors, float16 [C, d, h, w].
    """
    outputs, affines = [], []
    for stride in (FINE_STRIDE, COARSE_STRIDE):
        shape = [max(2, -(-size // step)) for size, step in zip(grid, stride)]
        # Both outputs cover the same box, which is what upsampling one to the other's size assumes.
        affines.append(coarser_affine(volume_affine, np.divide(grid, shape)))
        outputs.append(make_vectors(shape, affines[-1], stride == FINE_STRIDE))
    return Embedding(name, *outputs, *affines, fingerprint="made up")


def random_embedding(
    name: str, grid: Sequence[int], volume_affine: np.ndarray, num_channels: int, seed: int
) -> Embedding:
    """Random unit vectors in the published layout: an untrained network, which leaves nothing out."""
    generator = torch.Generator().manual_seed(seed)

    def make_vectors(shape: Sequence[int], *_: object) -> Tensor:
        return F.normalize(torch.randn(num_channels, *shape, generator=generator), dim=0).half()

    return published_embedding(name, grid, volume_affine, make_vectors)


def smooth_embedding(
    name: str, grid: Sequence[int], volume_affine: np.ndarray, num_channels: int, seed: int
) -> Embedding:
    """As similar to itself at a distance as a trained network's, and to another volume's as that is to another patient.

    Random cosines of the world place (their mean product is a Gaussian of the distance; the same ones for every seed),
    and noise of the seed's own on the fine ones, which takes the best similarity to about 0.85.
    """
    generator = torch.Generator().manual_seed(seed)

    def make_vectors(shape: Sequence[int], affine: np.ndarray, is_fine: bool) -> Tensor:
        width_mm, noise = (FINE_WIDTH_MM, FINE_NOISE) if is_fine else (COARSE_WIDTH_MM, 0.0)
        shared = torch.Generator().manual_seed(int(width_mm * 10))
        waves = torch.randn(num_channels, 3, generator=shared) / width_mm
        phase = torch.rand(num_channels, 1, generator=shared) * 2 * math.pi
        result = torch.empty(num_channels, *shape, dtype=torch.float16)
        for number in range(shape[0]):
            index = np.stack(np.meshgrid([number], *map(np.arange, shape[1:]), indexing="ij"), axis=-1)
            place = torch.from_numpy(index_to_world(affine, index).reshape(-1, 3)).float()
            values = F.normalize((waves @ place.T + phase).cos_(), dim=0)
            if noise:
                values += torch.randn(values.shape, generator=generator) * (noise / math.sqrt(num_channels))
            result[:, number] = F.normalize(values, dim=0).view(num_channels, *shape[1:]).half()
        return result

    return published_embedding(name, grid, volume_affine, make_vectors)


STRUCTURES = {"smooth": smooth_embedding, "random": random_embedding}


def coarser_affine(affine: np.ndarray, factor: Sequence[float]) -> np.ndarray:
    """The affine of a grid over the same box whose voxels are `factor` [3] times as large."""
    step = np.diag([*factor, 1.0])
    step[:3, 3] = (np.asarray(factor) - 1) / 2
    return affine @ step


def coarse_upsampled(embedding: Embedding) -> Tensor:
    """The coarse embedding on the fine grid with all its channels, float32 [C, d, h, w], unit length."""
    size = tuple(embedding.fine.shape[1:])
    return F.normalize(F.interpolate(embedding.coarse.float()[None], size=size, mode="trilinear")[0], dim=0)


def place_by_map(fine: Tensor, coarse: Tensor, key: Embedding, key_coarse: Tensor) -> Place:
    """The maximum of the full similarity map of one query.

    Args:
        fine, coarse: the query's vectors [C].
        key_coarse: `coarse_upsampled` of the key.
    """
    similarity = torch.einsum("c,cdhw->dhw", fine, key.fine.float())
    similarity = (similarity + torch.einsum("c,cdhw->dhw", coarse, key_coarse)) / 2
    best = int(similarity.argmax())
    return Place(np.array(np.unravel_index(best, similarity.shape)), float(similarity.flatten()[best]))


def match_and_back(query: Embedding, key: Embedding, points_mm: np.ndarray) -> tuple[Matches, Matches]:
    """Ours, as mining does it. Copies of the embeddings have none of what ours derives from them and keeps."""
    query, key = dataclasses.replace(query), dataclasses.replace(key)
    matches = match_points(query, key, points_mm, refine=False)
    return matches, match_points(key, query, matches.points_mm, refine=False)


def maps_and_back(query: Embedding, key: Embedding, index: np.ndarray, upsampled: Callable) -> tuple[Place, Place]:
    """The published way: a similarity map of the key for a fine voxel [3] of the query, and one back for its best."""
    query_coarse, key_coarse = upsampled(query), upsampled(key)  # each once for both searches of a point
    there = place_by_map(*_vectors(query, query_coarse, index), key, key_coarse)
    return there, place_by_map(*_vectors(key, key_coarse, there.index), query, query_coarse)


def _vectors(embedding: Embedding, coarse: Tensor, index: np.ndarray) -> tuple[Tensor, Tensor]:
    d, h, w = index
    return embedding.fine[:, d, h, w].float(), coarse[:, d, h, w]


def measure_maps(
    query: Embedding, key: Embedding, ours: Sequence[Matches], mapped: np.ndarray, num_points: int
) -> dict:
    """Seconds per point of the ways with one map per search, and how well ours agrees with them.

    Args:
        ours: matches of the query's points and back.
        mapped: fine voxels [N, 3] of the first of these points.
        num_points: over which kept maps are shared.
    """
    published = timed(lambda index: maps_and_back(query, key, index, coarse_upsampled), mapped)
    kept_maps = timed(coarse_upsampled, [query, key])
    kept_of = dict(zip((query, key), kept_maps.results))
    kept = timed(lambda index: maps_and_back(query, key, index, kept_of.__getitem__), mapped)
    result = {}
    for clock in ("wall_s", "cpu_s"):
        result[f"published_{clock}"] = getattr(published, clock)
        result[f"kept_{clock}"] = getattr(kept, clock) + 2 * getattr(kept_maps, clock) / num_points
    differences, same = [], []
    for way in (published, kept):
        for number, places in enumerate(way.results):
            for place, matches, embedding in zip(places, ours, (key, query)):
                differences.append(abs(place.score - float(matches.score[number])))
                index = np.rint(world_to_index(embedding.fine_affine, matches.points_mm[number]))
                same.append(np.array_equal(place.index, index))
    return result | {"score_difference": max(differences), "same_voxel": float(np.mean(same))}


def run(flags: jsonargparse.Namespace) -> dict:
    """Make the embeddings, measure, check that all ways agree."""
    if not 1 <= flags.num_maps <= flags.num_points or flags.num_repeats < 1:
        raise ValueError(
            f"--num_maps {flags.num_maps} must lie in 1..--num_points ({flags.num_points}) and --num_repeats "
            f"({flags.num_repeats}) must be 1 or more"
        )
    torch.set_num_threads(flags.num_threads)
    grid = flags.grid or (QUICK_VOX if flags.quick else TORSO_VOX)
    affine = np.eye(4)[[2, 1, 0, 3]] * [GRID_MM, -GRID_MM, -GRID_MM, 1]
    found = {}
    for structure, make in STRUCTURES.items():
        query, key = (make(f"torso{n}", grid, affine, flags.num_channels, n) for n in range(2))
        index = np.random.default_rng(0).integers(0, query.fine.shape[1:], size=(flags.num_points, 3))
        points_mm = index_to_world(query.fine_affine, index)
        num_repeats = flags.num_repeats if structure == "smooth" else 1
        ours = timed(partial(match_and_back, query, key), [points_mm] * num_repeats)
        found |= {f"ours_{structure}_{clock}": getattr(ours, clock) / flags.num_points for clock in ("wall_s", "cpu_s")}
        if structure == "smooth":
            found |= measure_maps(query, key, ours.results[0], index[: flags.num_maps], flags.num_points)
    found["agree"] = found["score_difference"] < SCORE_TOLERANCE and found["same_voxel"] == 1.0
    if not found["agree"]:
        raise RuntimeError(f"the ways of matching disagree: {found}")
    for way in ("published", "kept"):
        for structure in STRUCTURES:
            name = f"speedup_over_{way}" + ("" if structure == "smooth" else f"_{structure}")
            found[name] = found[f"{way}_wall_s"] / found[f"ours_{structure}_wall_s"]
            found[f"{name}_cpu"] = found[f"{way}_cpu_s"] / found[f"ours_{structure}_cpu_s"]
    return found | {
        "fine_shape": list(query.fine.shape),
        "coarse_shape": list(query.coarse.shape),
        "num_points": flags.num_points,
        "num_threads": flags.num_threads,
    }


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted: a line for each comparison."""
    ways = {
        "published": ("two maps per point, coarse upsampled for each", f">= {WANTED}x"),
        "kept": ("two maps per point, coarse upsampled once", ""),
    }
    structures = {"smooth": "", "random": "_random"}
    return [
        (
            f"matching, per point of {found['num_points']}, with cycle ({structure} vectors)",
            f"{found[f'ours_{structure}_wall_s'] * 1e3:.2f} ms (CPU {found[f'ours_{structure}_cpu_s'] * 1e3:.2f})",
            f"{found[f'{way}_wall_s'] * 1e3:.1f} ms (CPU {found[f'{way}_cpu_s'] * 1e3:.1f}), {title}",
            f"{found[f'speedup_over_{way}{suffix}']:.0f}x (CPU {found[f'speedup_over_{way}{suffix}_cpu']:.0f}x)",
            wanted,
        )
        for structure, suffix in structures.items()
        for way, (title, wanted) in ways.items()
    ]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

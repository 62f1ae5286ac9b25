"""Matching: finding 256 points of one 2 mm torso volume in another and back, beside similarity maps for each point.

    python -m benchmarks.matching
    python -m benchmarks.matching --quick --output results/benchmarks/matching.json

Yan et al., "SAM", TMI 2022, Sec. III-B. A matched point costs a search in the key and, for its cycle error, one back in
the query. Beside it: the published way, which upsamples the coarse map for each search; and the same with the upsampled
maps kept, their making spread over all points. The embeddings have the size that the published network gives a volume
of 205x205x250 voxels. Ours is timed on vectors that vary in space as those of a trained network do, and on random ones,
where the coarse map rules nothing out; it makes everything it derives from an embedding anew in each repeat. All runs
in this process; medians of wall and of CPU time. About a minute of CPU time; with --quick seconds.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jsonargparse
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import benchmark_parser, show_and_save, timed
from datasets.ct.geometry import index_to_world, world_to_index
from engine.flags import git_commit, run_main
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


class Layout(NamedTuple):
    """Voxels (d, h, w) of an output, and its affine [4, 4], index -> world mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray


class Place(NamedTuple):
    """The best fine voxel of the key, [3], and its similarity."""

    index: np.ndarray
    score: float


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "volumes of an eighth")
    parser.add_argument("--grid", type=list[int], default=None, help="2 mm voxels (D, H, W) of the embedded volumes")
    parser.add_argument("--num_channels", type=int, default=NUM_CHANNELS, help="channels of each embedding")
    parser.add_argument("--num_points", type=int, default=256, help="points to match")
    parser.add_argument("--num_maps", type=int, default=2, help="points to time with maps of their own")
    parser.add_argument("--num_repeats", type=int, default=2, help="repeats of ours on smooth vectors")
    parser.add_argument("--num_threads", type=int, default=1, help="threads of PyTorch, for every way")
    return parser


def published_layout(grid: Sequence[int], volume_affine: np.ndarray) -> tuple[Layout, Layout]:
    """Shape and affine of the fine and of the coarse output for a volume of `grid` voxels (D, H, W)."""
    fine_shape, coarse_shape = (
        tuple(-(-size // step) for size, step in zip(grid, stride)) for stride in (FINE_STRIDE, COARSE_STRIDE)
    )
    fine_affine = coarser_affine(volume_affine, np.divide(grid, fine_shape))
    # Both outputs cover the same box, which is what upsampling one to the other's size assumes.
    return Layout(fine_shape, fine_affine), Layout(
        coarse_shape, coarser_affine(fine_affine, np.divide(fine_shape, coarse_shape))
    )


def random_embedding(
    name: str, grid: Sequence[int], volume_affine: np.ndarray, num_channels: int, seed: int
) -> Embedding:
    """Random unit vectors in the published layout: an untrained network, which leaves nothing out.

    Args:
        grid: voxels (D, H, W) on a 2 mm grid.
        volume_affine: float64 [4, 4], index on that grid -> world mm.
    """
    generator = torch.Generator().manual_seed(seed)
    fine, coarse = published_layout(grid, volume_affine)

    def output(shape: tuple[int, ...]) -> Tensor:
        return F.normalize(torch.randn(num_channels, *shape, generator=generator), dim=0).half()

    return Embedding(name, output(fine.shape), output(coarse.shape), fine.affine, coarse.affine, fingerprint="random")


def smooth_embedding(
    name: str, grid: Sequence[int], volume_affine: np.ndarray, num_channels: int, seed: int
) -> Embedding:
    """As similar to itself at a distance as a trained network's, and to another volume's as that is to another patient.

    Random cosines of the world place (their mean product is a Gaussian of the distance; the same ones for every seed),
    and noise of the seed's own on the fine ones, which takes the best similarity to about 0.85.
    """
    generator = torch.Generator().manual_seed(seed)
    fine, coarse = published_layout(grid, volume_affine)

    def output(layout: Layout, width_mm: float, noise: float) -> Tensor:
        shared = torch.Generator().manual_seed(int(width_mm * 10))
        waves = torch.randn(num_channels, 3, generator=shared) / width_mm
        phase = torch.rand(num_channels, 1, generator=shared) * 2 * math.pi
        result = torch.empty(num_channels, *layout.shape, dtype=torch.float16)
        for number in range(layout.shape[0]):
            index = np.stack(np.meshgrid([number], *map(np.arange, layout.shape[1:]), indexing="ij"), axis=-1)
            place = torch.from_numpy(index_to_world(layout.affine, index).reshape(-1, 3)).float()
            values = F.normalize((waves @ place.T + phase).cos_(), dim=0)
            if noise:
                values += torch.randn(values.shape, generator=generator) * (noise / math.sqrt(num_channels))
            result[:, number] = F.normalize(values, dim=0).view(num_channels, *layout.shape[1:]).half()
        return result

    fine_map = output(fine, FINE_WIDTH_MM, FINE_NOISE)
    return Embedding(
        name, fine_map, output(coarse, COARSE_WIDTH_MM, 0), fine.affine, coarse.affine, fingerprint="smooth"
    )


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


def measure_ours(
    query: Embedding, key: Embedding, flags: jsonargparse.Namespace, num_repeats: int
) -> tuple[tuple[Matches, Matches], dict]:
    """What ours finds, and its seconds per point."""
    points_mm = index_to_world(query.fine_affine, indices_of(query, flags))
    ours = timed(lambda _: match_and_back(query, key, points_mm), range(num_repeats))
    return ours.results[0], {"wall_s": ours.wall_s / flags.num_points, "cpu_s": ours.cpu_s / flags.num_points}


def indices_of(query: Embedding, flags: jsonargparse.Namespace) -> np.ndarray:
    """Random fine voxels, int [N, 3]."""
    return np.random.default_rng(0).integers(0, query.fine.shape[1:], size=(flags.num_points, 3))


def measure_maps(query: Embedding, key: Embedding, ours: Sequence[Matches], flags: jsonargparse.Namespace) -> dict:
    """Seconds per point of the ways with one map per search, and how well ours agrees with them."""
    mapped = indices_of(query, flags)[: flags.num_maps]
    published = timed(lambda index: maps_and_back(query, key, index, coarse_upsampled), mapped)
    kept_maps = timed(coarse_upsampled, [query, key])
    kept_of = dict(zip((query, key), kept_maps.results))
    kept = timed(lambda index: maps_and_back(query, key, index, kept_of.__getitem__), mapped)
    result = {}
    for clock in ("wall_s", "cpu_s"):
        result[f"published_{clock}"] = getattr(published, clock)
        result[f"kept_{clock}"] = getattr(kept, clock) + 2 * getattr(kept_maps, clock) / flags.num_points
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
        ours, seconds = measure_ours(query, key, flags, flags.num_repeats if structure == "smooth" else 1)
        found |= {f"ours_{structure}_{clock}": value for clock, value in seconds.items()}
        if structure == "smooth":
            found |= measure_maps(query, key, ours, flags)
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
        "commit": git_commit(),
    }


def rows(found: dict) -> list[tuple[str, str, str, str, str]]:
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


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    found = run(flags)
    print(f"fine {found['fine_shape']}, coarse {found['coarse_shape']}, {flags.num_threads} thread(s)")
    show_and_save(found, rows(found), flags.output)


if __name__ == "__main__":
    run_main(main)

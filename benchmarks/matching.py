"""Matching: finding 256 points of one 2 mm torso volume in another, beside one similarity map per point.

    python -m benchmarks.matching
    python -m benchmarks.matching --quick --output results/benchmarks/matching.json

Yan et al., "SAM", TMI 2022, Sec. III-B. Beside it: the published way, which upsamples the coarse map for each point;
and the same with the upsampled map kept, its making spread over all points. The embeddings are random unit vectors of
the size that the published network gives a volume of 205x205x250 voxels; ours makes everything it derives from them
anew in each repeat. All runs in this process; medians of wall and of CPU time. About a minute; with --quick seconds.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.files import write_text
from datasets.geometry import index_to_world, world_to_index
from engine.flags import add_switch, git_commit, make_parser, run_main
from sam_embed.embedding_store import Embedding
from sam_embed.match import match_points

GRID_MM = 2.0
TORSO_VOX = (250, 205, 205)  # the 2 mm grid of a 512x512x200 CT
QUICK_VOX = (125, 104, 104)
FINE_STRIDE, COARSE_STRIDE = (2, 2, 2), (4, 16, 16)
NUM_CHANNELS = 128
SCORE_TOLERANCE = 1e-4
WANTED = 20


class Place(NamedTuple):
    """The best fine voxel of the key, [3], and its similarity."""

    index: np.ndarray
    score: float


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--grid", type=list[int], default=None, help="2 mm voxels (D, H, W) of the embedded volumes")
    parser.add_argument("--num_channels", type=int, default=NUM_CHANNELS, help="channels of each embedding")
    parser.add_argument("--num_points", type=int, default=256, help="points to match")
    parser.add_argument("--num_maps", type=int, default=5, help="points to time with one map each")
    parser.add_argument("--num_repeats", type=int, default=3, help="repeats of ours")
    parser.add_argument("--num_threads", type=int, default=1, help="threads of PyTorch, for every way")
    add_switch(parser, "--quick", False, "volumes of an eighth, fewer repeats")
    parser.add_argument("--output", type=str, default=None, help="JSON file for the results")
    return parser


def random_embedding(
    name: str, grid: Sequence[int], volume_affine: np.ndarray, num_channels: int, seed: int
) -> Embedding:
    """Random unit vectors in the published layout.

    Args:
        grid: voxels (D, H, W) on a 2 mm grid.
        volume_affine: float64 [4, 4], index on that grid -> world mm.
    """
    generator = torch.Generator().manual_seed(seed)

    def output(stride: tuple[int, int, int]) -> Tensor:
        shape = [-(-size // step) for size, step in zip(grid, stride)]
        return F.normalize(torch.randn(num_channels, *shape, generator=generator), dim=0).half()

    fine, coarse = output(FINE_STRIDE), output(COARSE_STRIDE)
    fine_affine = coarser_affine(volume_affine, np.divide(grid, fine.shape[1:]))
    # Both outputs cover the same box, which is what upsampling one to the other's size assumes.
    coarse_affine = coarser_affine(fine_affine, np.divide(fine.shape[1:], coarse.shape[1:]))
    return Embedding(name, fine, coarse, fine_affine, coarse_affine, fingerprint="random")


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


class Timed(NamedTuple):
    """Results of several calls, and the medians of their wall and CPU seconds."""

    results: list
    wall_s: float
    cpu_s: float


def timed(run: Callable, arguments: Sequence) -> Timed:
    """One call for each argument, after one to warm up. CPU time (all threads) tells what a busy machine hides."""
    run(arguments[0])
    results, wall_s, cpu_s = [], [], []
    for argument in arguments:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        results.append(run(argument))
        wall_s.append(time.perf_counter() - begin)
        cpu_s.append(time.process_time() - begin_cpu)
    return Timed(results, statistics.median(wall_s), statistics.median(cpu_s))


def measure(query: Embedding, key: Embedding, flags: jsonargparse.Namespace) -> dict:
    """Seconds per point of the three ways, and how well they agree."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, query.fine.shape[1:], size=(flags.num_points, 3))
    points_mm = index_to_world(query.fine_affine, indices)
    query_coarse = coarse_upsampled(query)

    def vectors(index: np.ndarray) -> tuple[Tensor, Tensor]:
        return query.fine[:, index[0], index[1], index[2]].float(), query_coarse[:, index[0], index[1], index[2]]

    # Copies of both embeddings have none of what ours derives from them and keeps.
    ours = timed(
        lambda _: match_points(dataclasses.replace(query), dataclasses.replace(key), points_mm),
        range(flags.num_repeats),
    )
    mapped = indices[: flags.num_maps]
    published = timed(lambda index: place_by_map(*vectors(index), key, coarse_upsampled(key)), mapped)
    upsampled = timed(lambda _: coarse_upsampled(key), range(1))
    kept = timed(lambda index: place_by_map(*vectors(index), key, upsampled.results[0]), mapped)
    matches = ours.results[0]
    ours_index = np.rint(world_to_index(key.fine_affine, matches.points_mm[: len(mapped)]))
    seconds = {}
    for clock in ("wall_s", "cpu_s"):
        seconds[f"ours_{clock}"] = getattr(ours, clock) / flags.num_points
        seconds[f"published_{clock}"] = getattr(published, clock)
        seconds[f"kept_{clock}"] = getattr(kept, clock) + getattr(upsampled, clock) / flags.num_points
    differences = [
        abs(place.score - float(score)) for way in (published, kept) for place, score in zip(way.results, matches.score)
    ]
    return seconds | {
        "score_difference": max(differences),
        # Ours refines a match by less than half a voxel, so that rounding gives the voxel back.
        "same_voxel": float(
            np.mean([np.array_equal(place.index, at) for place, at in zip(published.results, ours_index)])
        ),
    }


def run(flags: jsonargparse.Namespace) -> dict:
    """Make the embeddings, measure, check that all ways agree."""
    if flags.quick:
        flags.num_repeats, flags.num_maps = min(2, flags.num_repeats), min(3, flags.num_maps)
    if not 1 <= flags.num_maps <= flags.num_points or flags.num_repeats < 1:
        raise ValueError(
            f"--num_maps {flags.num_maps} must lie in 1..--num_points ({flags.num_points}) and --num_repeats "
            f"({flags.num_repeats}) must be 1 or more"
        )
    torch.set_num_threads(flags.num_threads)
    grid = flags.grid or (QUICK_VOX if flags.quick else TORSO_VOX)
    affine = np.eye(4)[[2, 1, 0, 3]] * [GRID_MM, -GRID_MM, -GRID_MM, 1]
    query, key = (random_embedding(f"torso{n}", grid, affine, flags.num_channels, n) for n in range(2))
    found = measure(query, key, flags)
    found["agree"] = found["score_difference"] < SCORE_TOLERANCE and found["same_voxel"] == 1.0
    if not found["agree"]:
        raise RuntimeError(f"the ways of matching disagree: {found}")
    return found | {
        "speedup_over_published": found["published_wall_s"] / found["ours_wall_s"],
        "speedup_over_published_cpu": found["published_cpu_s"] / found["ours_cpu_s"],
        "speedup_over_kept": found["kept_wall_s"] / found["ours_wall_s"],
        "speedup_over_kept_cpu": found["kept_cpu_s"] / found["ours_cpu_s"],
        "fine_shape": list(query.fine.shape),
        "coarse_shape": list(query.coarse.shape),
        "num_points": flags.num_points,
        "num_threads": flags.num_threads,
        "commit": git_commit(),
    }


def rows(found: dict) -> list[tuple[str, str, str, str, str]]:
    """What, ours, beside, ratio, wanted: a line for each comparison."""
    what, ours = f"matching, per point of {found['num_points']}", f"{found['ours_wall_s'] * 1e3:.2f} ms"
    ways = {
        "published": ("one map per point, coarse upsampled for each", f">= {WANTED}x"),
        "kept": ("one map per point, coarse upsampled once", ""),
    }
    return [
        (
            what,
            ours,
            f"{found[f'{way}_wall_s'] * 1e3:.1f} ms, {title}",
            f"{found[f'speedup_over_{way}']:.0f}x (CPU {found[f'speedup_over_{way}_cpu']:.0f}x)",
            wanted,
        )
        for way, (title, wanted) in ways.items()
    ]


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    found = run(flags)
    print(f"fine {found['fine_shape']}, coarse {found['coarse_shape']}, {flags.num_threads} thread(s)")
    for row in rows(found):
        print(" | ".join(row))
    if flags.output:
        write_text(flags.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)

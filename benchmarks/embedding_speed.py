"""Embedding a torso at 2 mm with SAM: seconds and memory of our way beside the plain network on the whole volume.

    python -m benchmarks.embedding_speed --output results/benchmarks/embedding_speed.json

The published layout (128 channels, stem at full resolution) with random weights on a phantom's voxels, or the network
of --checkpoint_file on the same voxels. Each way runs in a process of its own. Memory is what the process holds at its
peak above what it held before embedding. Are matches unchanged? Points of the volume are found again in a noisy box cut
out of it, with the embeddings of each way; shown are the share that arrives in the plain way's voxel, and the cosines
to its vectors. bf16 is left out on a CPU that only emulates it: there it takes half an hour.
"""

import math
import tempfile
import time

import jsonargparse
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.corpus import phantom_hu
from benchmarks.results import (
    Rows,
    benchmark_parser,
    command,
    measure_apart,
    reset_peak_resident,
    resident_bytes,
    table,
)
from engine.device import fast_precision, keep_freed_memory
from sam_embed.checkpoint import load_embedder
from sam_embed.embeddings.embed import embed_tensor, for_inference, output_affine
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.match import match_points
from sam_embed.network import AnatomicalEmbedder

TORSO, QUICK_TORSO = (250, 205, 205), (64, 64, 64)
WAYS = {  # name -> (precision, or None for the plain network; whether freed memory is kept)
    "the plain network, fp32": (None, False),
    "folded norms, channels last, slabs": ("fp32", False),
    "the same, freed memory kept": ("fp32", True),
    "the same in bf16": ("bf16", True),
}
PLAIN = next(iter(WAYS))
QUICK_NETWORK = {"width": 16, "embed_dim": 16}
NUM_POINTS, NOISE = 200, 2.0  # noise on the network's input scale (0 to 255)
GB = 2**30


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    quick = "a small network and volume: does every way run?"
    parser = benchmark_parser(__doc__, quick, num_threads=torch.get_num_threads())
    add = parser.add_argument
    add("--checkpoint_file", type=str, default=None, help="trained SAM; none = the published layout, random weights")
    add("--memory_mb", type=float, default=512.0, help="working memory of our way")
    add("--only", type=str, default=None, help="one way (for the processes that this command starts)")
    add("--kept", type=str, default=None, help="file for the embeddings of --only")
    return parser


def make_network(flags) -> AnatomicalEmbedder:
    """The network; without a checkpoint random weights, with statistics in its norms as training leaves them."""
    if flags.checkpoint_file:
        return load_embedder(flags.checkpoint_file)[0]
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**(QUICK_NETWORK if flags.quick else {})).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def make_volume(shape: tuple[int, int, int]) -> Tensor:
    """A phantom on the network's input scale: float32 [1, 1, D, H, W]."""
    values = (np.clip(phantom_hu(shape), -1024, 3071) + 1024) * (255 / 4095) - 50
    return torch.from_numpy(values.astype(np.float32))[None, None]


def run_one(flags) -> dict:
    """Embed the volume, timed, then the noisy box; both embeddings go to --kept."""
    precision, is_kept = WAYS[flags.only]
    torch.set_num_threads(flags.num_threads)
    if is_kept:
        keep_freed_memory()
    network, volume = make_network(flags), make_volume(QUICK_TORSO if flags.quick else TORSO)
    fast = network if precision is None else for_inference(network, precision)
    volume = volume.to(next(fast.parameters()).dtype)

    @torch.no_grad()
    def embed(values: Tensor) -> list[Tensor]:
        if precision is None:
            return [output[0].half() for output in fast(values)]
        return list(embed_tensor(fast, values, flags.memory_mb))

    corner, size = box_of(volume.shape[2:])
    box = volume[(..., *(slice(first, first + side) for first, side in zip(corner, size)))].clone()
    box += NOISE * torch.randn(box.shape, generator=torch.Generator().manual_seed(1)).to(box.dtype)
    embed(box[:, :, :32])  # warm up
    before = resident_bytes()
    reset_peak_resident()
    started = time.perf_counter()
    outputs = embed(volume)
    seconds, peak = time.perf_counter() - started, resident_bytes(peak=True)
    torch.save({"volume": outputs[:2], "box": embed(box)[:2]}, flags.kept)
    return {"seconds": seconds, "peak_gb": None if peak is None else (peak - before) / GB}


def box_of(shape: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """Corner and size of the box: half of each side, at multiples of 16 voxels so that all strides divide them."""
    corner = [16 * (side // 64) for side in shape]
    return corner, [max(32, 16 * (side // 32)) for side in shape]


def embedding_of(outputs: list[Tensor], network: AnatomicalEmbedder, corner: list[int], name: str) -> Embedding:
    """Outputs on a grid of 1 mm whose voxel `corner` they begin with (the voxel size does not matter here)."""
    affine = np.eye(4)
    affine[:3, 3] = corner
    grids = network.fine_grid(), network.coarse_grid()
    affines = [output_affine(affine, grid) for grid in grids]
    return Embedding(name, outputs[0], outputs[1], *affines, fingerprint="benchmark")


def compare(kept: dict[str, dict], network: AnatomicalEmbedder, shape: tuple[int, int, int]) -> dict[str, dict]:
    """Each way's vectors and matches beside the plain way's."""
    corner, size = box_of(shape)
    rng = np.random.default_rng(0)
    inside = corner + rng.uniform(0.15, 0.85, (NUM_POINTS, 3)) * size
    found, plain_mm = {}, None
    for way, outputs in kept.items():
        query = embedding_of(outputs["volume"], network, [0, 0, 0], "volume")
        key = embedding_of(outputs["box"], network, corner, "box")
        matched_mm = match_points(query, key, inside).points_mm
        plain_mm = matched_mm if plain_mm is None else plain_mm
        cosines = [
            F.cosine_similarity(mine.float(), plain.float(), dim=0)
            for mine, plain in zip(outputs["volume"], kept[PLAIN]["volume"])
        ]
        apart = np.linalg.norm(matched_mm - plain_mm, axis=1)
        found[way] = {
            "least_cosine": min(float(cosine.min()) for cosine in cosines),
            "median_cosine": min(float(cosine.median()) for cosine in cosines),
            "same_voxel": float((apart < 1.0).mean()),
        }
    return found


def ways_here() -> list[str]:
    """The names of `WAYS` that this CPU has units for."""
    have_units = (None, "fp32", fast_precision(torch.device("cpu")))
    return [way for way, (precision, _) in WAYS.items() if precision in have_units]


def run(flags) -> dict:
    """Every way in a process of its own; with --only the figures of that way alone, {"ways": {way: figures}}."""
    if flags.only:
        return {"ways": {flags.only: run_one(flags)}}
    found, kept = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/kept.pt"
        for way in ways_here():
            try:
                found |= measure_apart("benchmarks.embedding_speed", flags, only=way, kept=file)["ways"]
            except RuntimeError as error:
                raise RuntimeError(f"{way}: {error}") from None
            kept[way] = torch.load(file)
            print(f"{way}: {found[way]['seconds']:.1f} s", flush=True)
    shape = QUICK_TORSO if flags.quick else TORSO
    for way, figures in compare(kept, make_network(flags), shape).items():
        found[way] |= figures
    return {"shape": list(shape), "num_threads": flags.num_threads, "ways": found}


def rows(found: dict) -> Rows:
    """Seconds, memory and matches of each way beside the plain network; nothing with --only."""
    lines, (plain, *ways) = [], (found["ways"].get(way) for way in WAYS)
    for way, figures in zip(list(WAYS)[1:], ways):
        if plain is None or figures is None:
            continue
        ratio = plain["seconds"] / figures["seconds"]
        seconds = (f"{figures['seconds']:.1f} s", f"{plain['seconds']:.1f} s", f"{ratio:.1f}x", ">= 4x")
        lines.append((f"embedding: {way}", *seconds))
        if figures["peak_gb"] is not None:
            share = figures["peak_gb"] / plain["peak_gb"] if plain["peak_gb"] else math.nan
            memory = (f"{figures['peak_gb']:.2f} GB", f"{plain['peak_gb']:.2f} GB", f"{share:.2f}", "<= 0.33")
            lines.append((f"memory: {way}", *memory))
        same = f"{figures['same_voxel']:.1%} in the same voxel"
        lines.append((f"matches: {way}", same, f"cosine >= {figures['least_cosine']:.4f}", "", "unchanged"))
    return lines


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

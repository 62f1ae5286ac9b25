"""Pairing: everything between "I need a pair" and two windowed crops in memory, per training sample.

    python -m benchmarks.pairing --quick --output results/benchmarks/pairing.json

Alice (ICCV 2023, figure 2) crops its two views around points that SAM matched across two patients. Ours draws a mined
row and reads two crops from the volume store. Beside it, re-enacted naively: the published way of finding the match
while training, which loads two pickled embeddings and both whole NIfTI files, makes the full similarity map of a
candidate point, and crops. It gets one candidate, which always passes, and reads each file once; the published code
draws up to 101 and reads the files again for each. Patients are phantoms; their embeddings follow the place in the
volume, so that matches are sensible. Both ways give the same crops. One process; medians of wall and of CPU time.
"""

import itertools
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, ScaleIntensityRange
from torch import Tensor

from benchmarks.corpus import make_store, write_phantoms
from benchmarks.matching import (
    GRID_MM,
    NUM_CHANNELS,
    coarse_upsampled,
    coarser_affine,
    place_by_map,
    published_embedding,
)
from benchmarks.results import Rows, benchmark_parser, command, table, timed
from datasets.ct.geometry import CANONICAL_AXCODES, index_to_world, world_to_index
from datasets.lists.data_list import Case
from datasets.samples.augment import window
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.crops import CropOptions, cut
from datasets.samples.dataset import CropDataset
from datasets.samples.pairings import PairingOptions, SamPairing
from models.methods import Alice
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.match import match_points

HU_MIN, HU_MAX = -125.0, 225.0
NUM_CASES = 2
PATTERN_VOX = (16, 16, 16)  # the embeddings of all cases are one random pattern, stretched to each volume
CROP_TOLERANCE = 1e-5
WANTED = 300
CUT_MS = 8  # wanted of a loading core at 96^3


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    quick = "phantoms of 112 to 144 instead of 512 pixels a side, fewer repeats"
    parser = benchmark_parser(__doc__, quick, num_threads=1)
    parser.add_argument("--roi", type=int, default=96, help="side of the crops in voxels")
    parser.add_argument("--num_channels", type=int, default=NUM_CHANNELS, help="channels of each embedding")
    parser.add_argument("--num_rows", type=int, default=64, help="mined matches for each ordered pair of cases")
    parser.add_argument("--num_samples", type=int, default=50, help="samples of ours to time")
    parser.add_argument("--num_published", type=int, default=3, help="samples of the published way to time")
    parser.add_argument("--coarsen", type=float, default=1.0, help="factor on the phantoms' voxel sizes; with --quick")
    return parser


def make_embedding(record, pattern: tuple[Tensor, Tensor], seed: int) -> Embedding:
    """Vectors in the published layout that depend on the place in the volume, with noise.

    Args:
        record: the case's `CaseRecord`.
        pattern: for fine and coarse, float32 [C, *PATTERN_VOX].
    """
    generator = torch.Generator().manual_seed(seed)
    grid = [round(size * step / GRID_MM) for size, step in zip(record.shape, record.spacing_mm)]

    def make_vectors(shape: Sequence[int], _: np.ndarray, is_fine: bool) -> Tensor:
        stretched = F.interpolate(pattern[not is_fine][None], size=shape, mode="trilinear")[0]
        noise = torch.randn(stretched.shape, generator=generator)
        return F.normalize(stretched.add_(noise, alpha=0.1), dim=0).half()

    affine = coarser_affine(record.affine, np.divide(record.shape, grid))
    return published_embedding(record.name, grid, affine, make_vectors)


def mine_table(embeddings: list[Embedding], num_rows: int) -> CorrespondenceTable:
    """Matches between the fine voxels of the cases, each case with each other one."""
    rng = np.random.default_rng(0)
    parts = []
    for (query_case, query), (key_case, key) in itertools.permutations(enumerate(embeddings), 2):
        size = np.array(query.fine.shape[1:])
        index = rng.integers(size // 4, size - size // 4, size=(num_rows, 3))
        rows = np.zeros(num_rows, ROW_DTYPE)
        rows["query_case"], rows["key_case"] = query_case, key_case
        rows["cycle_mm"] = rows["spread_mm"] = np.nan  # not measured
        rows["query_mm"] = index_to_world(query.fine_affine, index)
        # Whole voxels, as the published way finds them.
        rows["key_mm"], rows["score"] = match_points(query, key, rows["query_mm"], refine=False)
        parts.append(rows)
    return CorrespondenceTable.from_rows([embedding.name for embedding in embeddings], np.concatenate(parts))


class PublishedWay:
    """Finds the match and cuts both crops from whole files each time.

    Args:
        cases: their .nii.gz files; folder: where `<name>.pkl` lies, [fine, coarse] in half precision.
        roi: side of the crops in voxels.
    """

    def __init__(self, cases: Sequence[Case], folder: Path, roi: int) -> None:
        self.images = {case.name: case.image for case in cases}
        self.folder, self.roi = folder, roi
        self.load = Compose(
            [
                LoadImage(image_only=True),
                EnsureChannelFirst(),
                Orientation(CANONICAL_AXCODES, labels=None),
                ScaleIntensityRange(HU_MIN, HU_MAX, 0.0, 1.0, clip=True),
            ]
        )

    def __call__(self, pair: tuple[str, str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Crops float32 [1, D, H, W] around a point (world mm) of the first case and its match in the second."""
        query_name, key_name, point_mm = pair
        volumes = [self.load(self.images[name]) for name in (query_name, key_name)]
        query, key = (self._embedding(name, volume) for name, volume in zip((query_name, key_name), volumes))
        at = np.rint(world_to_index(query.fine_affine, np.asarray(point_mm, dtype=np.float64))).astype(int)
        vectors = (values[:, at[0], at[1], at[2]] for values in (query.fine.float(), coarse_upsampled(query)))
        place = place_by_map(*vectors, key, coarse_upsampled(key))
        # The table holds points in single precision.
        key_mm = index_to_world(key.fine_affine, place.index).astype(np.float32)
        return self._crop(volumes[0], point_mm), self._crop(volumes[1], key_mm)

    def _embedding(self, name: str, volume: Tensor) -> Embedding:
        with (self.folder / f"{name}.pkl").open("rb") as file:
            fine, coarse = pickle.load(file)  # noqa: S301 (written by this process)
        affine = volume.affine.numpy().astype(np.float64)
        affines = [coarser_affine(affine, np.divide(volume.shape[1:], values.shape[1:])) for values in (fine, coarse)]
        return Embedding(name, fine, coarse, *affines)

    def _crop(self, volume: Tensor, point_mm: np.ndarray) -> Tensor:
        centre = world_to_index(volume.affine.numpy().astype(np.float64), np.asarray(point_mm, dtype=np.float64))
        start = np.floor(centre - (self.roi - 1) / 2 + 0.5).astype(int)
        low, high = np.maximum(start, 0), np.minimum(start + self.roi, volume.shape[1:])
        crop = torch.zeros(1, *(self.roi,) * 3)
        inside, source = ((slice(None), *map(slice, low - by, high - by)) for by in (start, 0))
        crop[inside] = volume.as_tensor()[source]
        return crop


def pair_of(sample: dict, table: CorrespondenceTable) -> tuple[bool, tuple[str, str, np.ndarray]]:
    """Whether a sample's key comes first, and the (query, key, point) that its match was mined from."""
    points_mm, cases = sample["centre_mm"].numpy(), sample["case"].tolist()
    for is_swapped, (query, key) in enumerate(((0, 1), (1, 0))):
        near = np.abs(table.rows["query_mm"] - points_mm[query]).max(axis=1) < 1e-3
        near &= np.abs(table.rows["key_mm"] - points_mm[key]).max(axis=1) < 1e-3
        near &= table.rows["query_case"] == cases[query]
        if near.any():
            row = table.rows[int(near.argmax())]
            names = (table.case_names[row["query_case"]], table.case_names[row["key_case"]])
            return bool(is_swapped), (*names, row["query_mm"])
    raise RuntimeError("a sample was drawn that is no row of the table")


def measure(folder: Path, flags: jsonargparse.Namespace) -> dict:
    """Seconds per sample of both ways, and the largest difference of their crops."""
    coarsen = flags.coarsen if flags.quick else 1.0
    cases = write_phantoms(folder, NUM_CASES, "abdomen", coarsen, full_size=not flags.quick)
    store = make_store(cases, folder / "store")
    generator = torch.Generator().manual_seed(1)
    pattern = tuple(torch.randn(flags.num_channels, *PATTERN_VOX, generator=generator) for _ in range(2))
    embeddings = [make_embedding(store.record(case.name), pattern, number) for number, case in enumerate(cases)]
    for embedding in embeddings:
        with (folder / f"{embedding.name}.pkl").open("wb") as file:
            pickle.dump([embedding.fine, embedding.coarse], file, protocol=pickle.HIGHEST_PROTOCOL)
    table = mine_table(embeddings, flags.num_rows)
    # Neither jitter nor shifts, which the published way lacks: the crops must be the same.
    options = PairingOptions(min_score=-1, max_cycle_mm=np.inf, jitter_mm=0, max_outside=1)
    rule = SamPairing(store, store.names, (flags.roi,) * 3, options, table)
    dataset = CropDataset(store, rule, Alice.views, CropOptions(a_min=HU_MIN, a_max=HU_MAX))

    def two_crops(index: int) -> list[Tensor]:
        places = dataset.places(index)
        cuts = (cut(store, name, point_mm, rule.roi) for name, point_mm in zip(places.names, places.points_mm))
        return [window(hu, HU_MIN, HU_MAX) for hu in cuts]

    crops = timed(two_crops, range(flags.num_samples))
    cuts = timed(dataset.cut, range(flags.num_samples))
    samples = timed(dataset.__getitem__, range(flags.num_samples))
    pairs = [pair_of(sample, table) for sample in samples.results[: flags.num_published]]
    published = timed(PublishedWay(cases, folder, flags.roi), [pair for _, pair in pairs])
    difference = 0.0
    for theirs, ours, sample, (is_swapped, _) in zip(published.results, crops.results, samples.results, pairs):
        for one, two, three in zip(theirs[::-1] if is_swapped else theirs, ours, sample["crop"]):
            difference = max(difference, float((one - two).abs().max()), float((one - three).abs().max()))
    ways = {"crops": crops, "cut": cuts, "sample": samples, "published": published}
    seconds = {f"{name}_{clock}": getattr(way, clock) for name, way in ways.items() for clock in ("wall_s", "cpu_s")}
    return seconds | {
        "crop_difference": difference,
        "shapes": [list(store.record(case.name).shape) for case in cases],
        "pickle_bytes": [(folder / f"{case.name}.pkl").stat().st_size for case in cases],
    }


def run(flags: jsonargparse.Namespace) -> dict:
    """Measure in a temporary folder and check that both ways give the same crops."""
    if flags.quick:
        flags.num_samples, flags.num_published = min(20, flags.num_samples), min(2, flags.num_published)
    if not 1 <= flags.num_published <= flags.num_samples:
        raise ValueError(f"--num_published {flags.num_published} must lie in 1..--num_samples ({flags.num_samples})")
    torch.set_num_threads(flags.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), flags)
    found["agree"] = found["crop_difference"] < CROP_TOLERANCE
    if not found["agree"]:
        raise RuntimeError(f"the crops of both ways differ: {found}")
    speedups = {
        f"speedup_{way}{suffix}": found[f"published_{clock}"] / found[f"{way}_{clock}"]
        for way in ("crops", "cut", "sample")
        for suffix, clock in (("", "wall_s"), ("_cpu", "cpu_s"))
    }
    return found | {
        **speedups,
        "roi": flags.roi,
        "num_threads": flags.num_threads,
    }


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted: a line for each comparison."""
    pickles = f"pickles of {max(found['pickle_bytes']) / 2**20:.0f} MiB"
    beside = f"{found['published_wall_s']:.2f} s, {pickles}, whole files and one similarity map"
    ways = (
        ("crops", "two crops", f">= {WANTED}x"),
        ("cut", "what a loading process does: crops as they are stored, masks, draws of four views", f"<= {CUT_MS} ms"),
        ("sample", "all of it, four augmented views too", ""),
    )
    return [
        (
            f"pairing, a sample of {found['roi']}³: {title}",
            f"{found[f'{way}_wall_s'] * 1e3:.1f} ms",
            beside,
            f"{found[f'speedup_{way}']:.0f}x (CPU {found[f'speedup_{way}_cpu']:.0f}x)",
            wanted,
        )
        for way, title, wanted in ways
    ]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

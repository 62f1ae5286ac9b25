"""What the dense term asks of a loading process: its share of a sample's time, and memory over many cases.

    python -m benchmarks.anatomy_reading --output results/benchmarks/anatomy_reading.json

Samples are Alice's (IoU pairs, all augmentation) of phantom CT at 2 x 1.5 x 1.5 mm. Embeddings are random vectors of
the body in the compact form, on a grid of --grid_mm as of the SAM of configs/sam_quickstart.yaml. The share is the CPU
time of drawing points and reading their vectors over that of the same sample without them, medians of samples of both
kinds in turn. For memory, the vectors of --num_cases files are read one case after the other, twice; each is a file of
its own. A full run wants some 5 GB in the folder for temporary files.
"""

import shutil
import tempfile
from pathlib import Path

import jsonargparse
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.corpus import make_store, write_phantoms
from benchmarks.corpus_scale import memory_mb
from benchmarks.results import Rows, benchmark_parser, command, table, timed
from datasets.ct.geometry import BODY_HU, index_to_world
from datasets.samples.anatomy import AnatomyPoints
from datasets.samples.crops import CropOptions
from datasets.samples.dataset import CropDataset
from datasets.samples.pairings import IouPairing
from datasets.store.volumes import VolumeStore
from models.methods import Alice
from models.methods.alice import AliceOptions
from sam_embed.embeddings.compact import Storage
from sam_embed.embeddings.embedding_store import Embedding, embedding_path, save_embedding
from sam_embed.embeddings.opened import OpenedVectors, open_embeddings, opened_path

SPACING_MM = (2.0, 1.5, 1.5)
COARSE_STEP = 8  # fine voxels from one coarse voxel to the next
VARIANTS = ("distil", "across")
NUM_SAMPLES = 40
WANTED = "< 5 %"


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "two small phantoms, small crops, 20 cases", num_threads=1)
    add = parser.add_argument
    add("--num_phantoms", type=int, default=4, help="volumes that samples are cut from")
    add("--num_cases", type=int, default=2000, help="embeddings that are read one after the other")
    add("--rois", type=list[int], default=[64, 96], help="sides of crops, voxels")
    add("--grid_mm", type=float, default=8.0, help="voxel size of the fine map, mm")
    add("--num_channels", type=int, default=32, help="channels of either map")
    return parser


def random_embedding(store: VolumeStore, name: str, grid_mm: float, num_channels: int, seed: int) -> Embedding:
    """Random vectors in the body of a case."""
    record, hu = store.record(name), store.read(name).array
    generator = torch.Generator().manual_seed(seed)
    size_mm = (np.asarray(record.body_stop) - record.body_start) * record.spacing_mm
    shape = tuple(int(side) for side in np.ceil(size_mm / grid_mm))
    step = np.diag([*(grid_mm / np.asarray(record.spacing_mm)), 1.0])
    affine = record.affine @ step
    affine[:3, 3] = index_to_world(record.affine, record.body_start)
    coarse_shape = tuple(-(-side // COARSE_STEP) for side in shape)

    def vectors(shape: tuple[int, ...]) -> torch.Tensor:
        return F.normalize(torch.randn(num_channels, *shape, generator=generator), dim=0).half()

    coarse_affine = affine @ np.diag([COARSE_STEP, COARSE_STEP, COARSE_STEP, 1.0])
    nearest = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) @ step[:3, :3] + record.body_start
    nearest = np.minimum(np.rint(nearest).astype(int), np.array(hu.shape) - 1)
    body = torch.from_numpy(hu[tuple(np.moveaxis(nearest, -1, 0))] > BODY_HU)
    return Embedding(name, vectors(shape), vectors(coarse_shape), affine, coarse_affine, None, body, "random")


def measure_share(store: VolumeStore, reader: OpenedVectors, roi: int, variant: str) -> dict[str, float]:
    """CPU ms of a sample without points, and of the points alone."""
    rule, crops = IouPairing(store, store.names, (roi,) * 3), CropOptions(roi, roi, roi)
    request = AliceOptions(lambda4=1.0, dense_variant=variant).anatomy_request
    plain = CropDataset(store, rule, Alice.views, crops)
    more = CropDataset(store, rule, Alice.views, crops, anatomy=AnatomyPoints(reader, request))
    samples = [(plain.places(index), np.random.SeedSequence([0, index])) for index in range(NUM_SAMPLES)]
    for index in range(2):
        more[index]
    # In turn, so that what the machine does besides falls on both.
    taken = [(timed(plain.__getitem__, [index]), timed(lambda given: more._anatomy(*given), [samples[index]]))
             for index in range(NUM_SAMPLES)]  # fmt: skip
    return {
        "sample_ms": 1e3 * float(np.median([sample.cpu_s for sample, _ in taken])),
        "points_ms": 1e3 * float(np.median([points.cpu_s for _, points in taken])),
    }


def measure_memory(embed_dir: Path, names: list[str], num_points: int) -> dict[str, float]:
    """Memory of this process while it reads all cases twice, and ms of a read."""
    reader, rng = OpenedVectors(embed_dir, names), np.random.default_rng(0)
    places = {name: reader[name].random_places(num_points, rng) for name in names[:20]}
    own_places, memory, order = list(places.values()), [], [*names, *names]
    for number, name in enumerate(tqdm(order, desc="cases")):
        reader[name].vectors(own_places[number % len(own_places)])
        if number in (len(order) // 20, len(order) - 1):
            memory.append(memory_mb("self")["private"])
    taken = timed(lambda name: reader[name].vectors(own_places[0]), names)
    return {"private_mb_at_5_percent": memory[0], "private_mb_at_the_end": memory[1], "read_ms": 1e3 * taken.cpu_s}


def run(flags: jsonargparse.Namespace) -> dict:
    """Measure in a temporary folder; returns the figures."""
    coarsen = 1.0
    if flags.quick:
        flags.num_phantoms, flags.num_cases, flags.rois, coarsen = 2, 20, [32], 3.0
    torch.set_num_threads(flags.num_threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = write_phantoms(folder, flags.num_phantoms, "chest_abdomen_pelvis", coarsen)
        store = make_store(cases, folder / "store", spacing_mm=SPACING_MM)
        embed_dir = folder / "embeddings"
        for seed, name in enumerate(store.names):
            save_embedding(
                embed_dir,
                random_embedding(store, name, flags.grid_mm, flags.num_channels, seed),
                Storage(),
            )
        opened = timed(lambda name: open_embeddings(embed_dir, [name]), store.names)
        reader = OpenedVectors(embed_dir, store.names)
        found = {
            f"{variant}_{roi}": measure_share(store, reader, roi, variant) for roi in flags.rois for variant in VARIANTS
        }
        sizes = [
            [path(embed_dir, name).stat().st_size for name in store.names] for path in (embedding_path, opened_path)
        ]
        copies = [f"copy{number:05d}" for number in range(flags.num_cases)]
        for number, name in enumerate(copies):
            shutil.copyfile(opened_path(embed_dir, store.names[number % len(store)]), opened_path(embed_dir, name))
        memory = measure_memory(embed_dir, copies, AliceOptions.dense_points)
    return {
        "shares": found,
        "compact_mb": float(np.mean(sizes[0])) / 1e6,
        "opened_mb": float(np.mean(sizes[1])) / 1e6,
        "open_ms": 1e3 * opened.cpu_s,
        "num_cases": flags.num_cases,
        **memory,
    }


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted."""
    lines = []
    for name, taken in found["shares"].items():
        variant, roi = name.split("_")
        share = taken["points_ms"] / taken["sample_ms"]
        lines.append(
            (f"points and vectors of a pair of {roi}³, {variant}", f"{taken['points_ms']:.1f} ms of CPU",
             f"{taken['sample_ms']:.0f} ms, the sample without", f"{100 * share:.1f} %", WANTED)
        )  # fmt: skip
    start, end = found["private_mb_at_5_percent"], found["private_mb_at_the_end"]
    lines.append(
        (f"memory of a process, vectors of {found['num_cases']} cases read twice", f"{end:.0f} MB",
         f"{start:.0f} MB at 5 %", f"{end / start:.2f}x", "1x")
    )  # fmt: skip
    opened = f"{found['opened_mb']:.1f} MB, made in {found['open_ms']:.0f} ms"
    lines.append(("an opened embedding", opened, f"compact {found['compact_mb']:.1f} MB", "", ""))
    return lines


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

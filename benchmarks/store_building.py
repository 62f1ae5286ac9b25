"""Building the volume store beside nibabel and MONAI's Spacing, one case after the other.

    python -m benchmarks.store_building --output results/benchmarks/store_building.json

Both read the same .nii.gz files, bring them to one orientation and one voxel size and write int16: ours to the
compressed store with checksums and several processes, the other to plain .npy, which costs it nothing to compress.
Files are in the cache for both, and our time is that of the whole command, start of Python included. A real CT of the
shared reference data, or else a noisy synthetic torso, cut at other places for each case.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing

from benchmarks.results import Rows, benchmark_parser, command, run_command, table, words
from benchmarks.volume_store import source_volume
from datasets.ct.nifti import write_nifti
from datasets.lists.data_list import Case, write_data_list
from datasets.store.volumes import VolumeStore

SPACING_MM = (2.0, 1.5, 1.5)  # D, H, W: main_ddp.py's default
MAX_MEAN_DIFFERENCE_HU = 2.0


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(
        __doc__, "fewer and smaller files, one process (starting several takes longer than these)"
    )
    parser.add_argument("--num_cases", type=int, default=8, help="files to store")
    parser.add_argument("--num_slices", type=int, default=120, help="of 512x512 voxels in each")
    parser.add_argument(
        "--num_workers", type=int, default=2, help="processes of ours; PyTorch threads of the other way"
    )
    return parser


def write_cases(folder: Path, flags: jsonargparse.Namespace) -> tuple[list[Case], str]:
    """The files, and where their voxels come from."""
    array, affine, source = source_volume(None)
    side = 256 if flags.quick else None
    cases = []
    for number in range(flags.num_cases):
        first = number * (len(array) - flags.num_slices) // max(1, flags.num_cases - 1)
        part = array[first : first + flags.num_slices, :side, :side]
        cases.append(Case(f"case{number}", folder / f"case{number}.nii.gz"))
        write_nifti(cases[-1].image, np.ascontiguousarray(part), affine)
    return cases, source


def one_by_one(cases: Sequence[Case], folder: Path) -> None:
    """The obvious way: nibabel, MONAI's Orientation and Spacing, numpy."""
    orient, resample = Orientation(axcodes="RAS"), Spacing(pixdim=SPACING_MM[::-1], mode="bilinear")
    for case in cases:
        image = nib.load(case.image)
        voxels = torch.from_numpy(image.get_fdata(dtype=np.float32))[None]
        resampled = resample(orient(MetaTensor(voxels, affine=torch.from_numpy(image.affine))))
        np.save(folder / f"{case.name}.npy", resampled[0].round().to(torch.int16).numpy())


def by_command(cases: Sequence[Case], folder: Path, num_workers: int) -> float:
    """Seconds of the project's command, from its start to its end."""
    write_data_list(folder / "list.json", folder, cases)
    given = {"data_dir": folder, "json_list": folder / "list.json", "store_dir": folder / "store"}
    given |= {"num_workers": num_workers, "spacing_mm": SPACING_MM}
    began = time.perf_counter()
    run_command("scripts.prepare_volumes", words(**given))
    return time.perf_counter() - began


def run(flags: jsonargparse.Namespace) -> dict:
    """Measure in a temporary folder; the ways agree on what they write."""
    if flags.quick:
        flags.num_cases, flags.num_slices, flags.num_workers = min(flags.num_cases, 4), min(flags.num_slices, 40), 1
    torch.set_num_threads(flags.num_workers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases, source = write_cases(folder, flags)
        one_by_one(cases[:1], folder)  # imports and caches
        began = time.perf_counter()
        one_by_one(cases, folder)
        plain_s = time.perf_counter() - began
        store_s = by_command(cases, folder, flags.num_workers)
        difference = mean_difference(VolumeStore(folder / "store"), cases, folder)
    if difference > MAX_MEAN_DIFFERENCE_HU:
        raise RuntimeError(f"the two ways differ by {difference:.1f} HU in the mean")
    return {
        "store_wall_s": store_s / flags.num_cases,
        "plain_wall_s": plain_s / flags.num_cases,
        "speedup": plain_s / store_s,
        "mean_difference_hu": difference,
        "num_cases": flags.num_cases,
        "num_workers": flags.num_workers,
        "source": source,
    }


def mean_difference(store: VolumeStore, cases: Sequence[Case], folder: Path) -> float:
    """Largest difference between the two ways of a case's mean HU, over the middle half of each axis.

    Their grids may be shifted by less than a voxel and end at other places, and their axes point elsewhere.
    """
    differences = []
    for case in cases:
        ours = store.crop(case.name, (0, 0, 0), store.record(case.name).shape)
        middles = [
            float(array[tuple(slice(side // 4, side - side // 4) for side in array.shape)].mean())
            for array in (ours, np.load(folder / f"{case.name}.npy"))
        ]
        differences.append(abs(middles[0] - middles[1]))
    return max(differences)


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted."""
    workers = f"{found['num_workers']} process{'es' * (found['num_workers'] > 1)}"
    ours = f"{found['store_wall_s']:.2f} s a case, {workers}"
    plain = f"{found['plain_wall_s']:.2f} s a case, nibabel and MONAI Spacing"
    return [("building the store", ours, plain, f"{found['speedup']:.1f}x faster", ">= 2x on 2 cores")]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

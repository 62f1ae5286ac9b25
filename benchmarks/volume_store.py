"""Volume store: a random 96³ crop and the size on disk, beside what users would do instead.

    python -m benchmarks.volume_store --quick
    python -m benchmarks.volume_store --image some_ct.nii.gz --output results/benchmarks/volume_store.json

Beside it: MONAI's LoadImage of the .nii.gz and a crop; a crop from a memory-mapped .npy; the file cache is warm for
everybody. Without --image, a real CT of the shared reference data, mirrored to 512x512x200, or else a noisy torso.
"""

import tempfile
import time
from pathlib import Path

import jsonargparse
import numpy as np
import torch
from monai.transforms import LoadImage
from scipy import ndimage

from benchmarks.corpus import fit
from benchmarks.results import Rows, benchmark_parser, command, real_ct_dir, table, timed
from datasets.ct.nifti import read_ct, write_nifti
from datasets.lists.data_list import Case
from datasets.store.volumes import VolumeStore, build_store

SHAPE_VOX = (200, 512, 512)
QUICK_SLICES = 100


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "half the slices and fewer repeats")
    parser.add_argument("--image", type=str, default=None, help="a CT to use as it is, .nii or .nii.gz")
    parser.add_argument("--roi", type=int, default=96, help="side of the crop in voxels")
    parser.add_argument("--num_crops", type=int, default=100, help="crops to time from the store and the memory map")
    parser.add_argument("--num_loads", type=int, default=3, help="whole loads to time with MONAI")
    return parser


def source_volume(image: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """The voxels to store, int16 HU [D, H, W], their affine, and where they come from."""
    if image is not None:
        volume = read_ct(image)
        return volume.array, volume.affine, Path(image).name
    real = real_ct_dir() / "upper_abdomen_5mm_b.nii.gz"
    affine = np.eye(4)[[2, 1, 0, 3]] * [2.5, -0.8, -0.8, 1]
    if real.exists():
        return fit(read_ct(real).array, SHAPE_VOX), affine, f"{real.name}, mirrored to {SHAPE_VOX[0]} slices"
    return noisy_torso(), affine, "synthetic torso with noise of 12 HU"


def noisy_torso() -> np.ndarray:
    """A body of smooth tissue in air, with the correlated noise of a reconstruction, which decides the stored size."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : SHAPE_VOX[1] * 1j, -1 : 1 : SHAPE_VOX[2] * 1j]
    body = (y / 0.55) ** 2 + (x / 0.8) ** 2 < 1
    slices = []
    for _ in range(SHAPE_VOX[0]):
        noise = ndimage.gaussian_filter(rng.normal(size=SHAPE_VOX[1:]), 0.7)
        tissue = 40 + 60 * np.sin(9 * x) * np.cos(7 * y) + 12 * noise / noise.std()
        slices.append(np.where(body, tissue, -1024).astype(np.int16))
    return np.stack(slices)


def measure(array: np.ndarray, affine: np.ndarray, flags: jsonargparse.Namespace, folder: Path) -> dict:
    """Times and sizes of the three ways."""
    nifti, npy = folder / "ct.nii.gz", folder / "ct.npy"
    write_nifti(nifti, array, affine)
    np.save(npy, array)
    begin = time.perf_counter()
    build_store([Case("ct", nifti)], folder / "store", progress=False)
    build_s = time.perf_counter() - begin
    store, mapped, load = VolumeStore(folder / "store"), np.load(npy, mmap_mode="r"), LoadImage(image_only=True)
    size = (flags.roi,) * 3
    starts = np.random.default_rng(0).integers(0, np.maximum(1, np.subtract(array.shape, size) + 1), size=(1000, 3))

    def region(number: int) -> tuple[slice, ...]:
        return tuple(slice(int(a), int(a) + flags.roi) for a in starts[number])

    def from_monai(number: int) -> np.ndarray:
        # The file's axes are (W, H, D).
        return load(nifti).numpy()[region(number)[::-1]].transpose(2, 1, 0).astype(np.int16)

    def from_map(number: int) -> np.ndarray:
        return np.array(mapped[region(number)])

    def from_store(number: int) -> np.ndarray:
        return store.crop("ct", starts[number], size)

    for number in range(3):
        assert np.array_equal(from_store(number), from_map(number))
        assert np.array_equal(from_store(number), from_monai(number))
    return {
        "crop_store_s": timed(from_store, range(flags.num_crops)).wall_s,
        "crop_npy_s": timed(from_map, range(flags.num_crops)).wall_s,
        "crop_monai_s": timed(from_monai, range(flags.num_loads)).wall_s,
        "build_s": build_s,
        "store_bytes": (folder / "store" / "cases" / "ct.b2nd").stat().st_size,
        "nifti_bytes": nifti.stat().st_size,
        "npy_bytes": npy.stat().st_size,
    }


def run(flags: jsonargparse.Namespace) -> dict:
    """Measure in a temporary folder."""
    torch.set_num_threads(1)
    array, affine, source = source_volume(flags.image)
    if flags.quick:
        array = array[:QUICK_SLICES]
        flags.num_crops, flags.num_loads = min(20, flags.num_crops), min(1, flags.num_loads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(array, affine, flags, Path(folder))
    return found | {
        "speedup_over_monai": found["crop_monai_s"] / found["crop_store_s"],
        "slowdown_to_npy": found["crop_store_s"] / found["crop_npy_s"],
        "size_ratio_to_nifti": found["store_bytes"] / found["nifti_bytes"],
        "source": source,
        "shape": list(array.shape),
        "roi": flags.roi,
    }


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted: a line for each comparison."""
    what, ours = f"random crop of {found['roi']}³", f"{found['crop_store_s'] * 1e3:.1f} ms"
    monai, npy = (f"{found[f'crop_{way}_s'] * 1e3:.1f} ms" for way in ("monai", "npy"))
    store_mib, nifti_mib = (f"{found[f'{kind}_bytes'] / 2**20:.1f} MiB" for kind in ("store", "nifti"))
    return [
        (what, ours, f"{monai}, MONAI LoadImage and a crop", f"{found['speedup_over_monai']:.0f}x faster", ">= 200x"),
        (what, ours, f"{npy}, warm memory-mapped .npy", f"{found['slowdown_to_npy']:.1f}x slower", "<= 5x"),
        ("size on disk", store_mib, f"{nifti_mib}, .nii.gz", f"{found['size_ratio_to_nifti']:.2f}", "<= 0.8"),
    ]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

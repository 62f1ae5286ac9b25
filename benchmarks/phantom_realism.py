"""How far phantoms are from real CT, in figures and in one picture.

    python -m benchmarks.phantom_realism --output results/benchmarks/phantom_realism.json \\
        --picture results/benchmarks/phantom_realism.png

The tests' real scans (--ct_dir) beside --num_phantoms phantoms of this commit's generator. Noise: its standard
deviation and the correlation of neighbours within flat soft tissue, on the file's own voxels. Everything else at 3 mm:
median gradient in the body, shares of the body that are fat, soft tissue, bone, and gas or lung, width and depth of the
body, and the median HU of labelled organs (real: of the labelled abdomen). The phantoms' figures are the lowest, the
median and the highest of all; a real figure outside of that range is a way in which phantoms are not yet like CT.
"""

from pathlib import Path

import jsonargparse
import numpy as np
from PIL import Image
from scipy import ndimage

from benchmarks.labels_from_phantoms import read_truth
from benchmarks.real_ct_matching import ABDOMEN, SCANS
from benchmarks.results import benchmark_parser, command, real_ct_dir, table
from datasets.ct.geometry import body_mask, resample
from datasets.ct.intensity import window_hu
from datasets.ct.nifti import Volume, read_ct
from datasets.lists.label_classes import FLARE22
from datasets.phantom.cases import GENERATOR, PhantomCase, render

SPACING_MM = (3.0, 3.0, 3.0)
BLOCK_VOX = 5  # in the slice; noise is compared within flat blocks of so many voxels a side
SOFT_HU = (0.0, 200.0)
FLAT_BLOCKS = 0.2  # share of the soft blocks, those with the smallest spread
TISSUES = {"fat": (-150, -30), "soft": (-30, 150), "bone": (200, 4000), "gas or lung": (-2000, -300)}
PICTURE_PX, PICTURE_MM, NUM_SLICES = (230, 310), 1.6, 5


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "three phantoms")
    add = parser.add_argument
    add("--ct_dir", type=str, default=str(real_ct_dir()), help="folder of the real scans")
    add("--num_phantoms", type=int, default=16, help="phantoms to compare with")
    add("--data_seed", type=int, default=0, help="of the phantoms")
    add("--coarsen", type=float, default=1.0, help="factor on the phantoms' voxel sizes, to see that it runs")
    add("--picture", type=str | None, default=None, help="PNG file: slices of every real scan and of some phantoms")
    return parser


def noise_figures(volume: Volume) -> dict[str, float]:
    """Standard deviation (HU) and correlation of in-slice neighbours of the noise in flat soft tissue.

    Blocks in which all voxels are soft tissue are ranked by their spread; anatomy adds to it, so that the lowest ones
    are noise. The mean of a block is taken from it, which lowers the correlation by about 0.04.
    """
    depth, height, width = (size // step * step for size, step in zip(volume.shape, (1, BLOCK_VOX, BLOCK_VOX)))
    blocks = volume.array[:depth, :height, :width].astype(np.float32)
    blocks = blocks.reshape(depth, height // BLOCK_VOX, BLOCK_VOX, width // BLOCK_VOX, BLOCK_VOX)
    blocks = blocks.transpose(0, 1, 3, 2, 4).reshape(-1, BLOCK_VOX, BLOCK_VOX)
    mean, spread = blocks.mean(axis=(1, 2)), blocks.std(axis=(1, 2))
    soft = (mean > SOFT_HU[0]) & (mean < SOFT_HU[1]) & (blocks.min(axis=(1, 2)) > -200) & (spread > 0)
    if not soft.any():
        return {"noise_hu": float("nan"), "noise_lag1": float("nan")}
    flat = soft & (spread <= np.quantile(spread[soft], FLAT_BLOCKS))
    rest = blocks[flat] - mean[flat][:, None, None]
    power = (rest**2).mean()
    lagged = 0.5 * ((rest[:, 1:] * rest[:, :-1]).mean() + (rest[:, :, 1:] * rest[:, :, :-1]).mean())
    return {"noise_hu": float(power**0.5), "noise_lag1": float(lagged / power)}


def body_figures(volume: Volume) -> dict[str, float]:
    """Gradient (HU/mm), shares of tissues, and the body's width and depth (mm)."""
    hu, _ = resample(volume.array, volume.affine, SPACING_MM)
    body = body_mask(hu, SPACING_MM)
    inner = ndimage.binary_erosion(body, iterations=2)
    gradient = np.linalg.norm(np.gradient(hu.astype(np.float32), *SPACING_MM), axis=0)
    width, depth = (body.any(axis=axis).sum(axis=1) * SPACING_MM[0] for axis in (1, 2))
    inside = hu[body]
    shares = {name: float(((inside >= low) & (inside < high)).mean()) for name, (low, high) in TISSUES.items()}
    return {
        "gradient_hu_mm": float(np.median(gradient[inner])),
        **shares,
        "width_mm": float(np.median(width)),
        "depth_mm": float(np.median(depth)),
    }


def organ_figures(hu: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Median HU of every organ that is there."""
    values = {name: hu[label == value] for value, name in enumerate(FLARE22, start=1)}
    return {name: float(np.median(found)) for name, found in values.items() if len(found)}


def figures(volume: Volume, label: np.ndarray | None) -> dict[str, float]:
    """All figures of one scan."""
    organs = {} if label is None else organ_figures(volume.array, label)
    return {**noise_figures(volume), **body_figures(volume), **organs}


def make_phantom(seed: int, index: int, coarsen: float) -> tuple[Volume, np.ndarray, str]:
    """A phantom as a canonical volume, its label, and its contrast phase."""
    done = render(PhantomCase(f"FLARE22_Tr_{index:04d}", seed, index, True, coarsen=coarsen))
    turn = (slice(None), slice(None, None, -1), slice(None, None, -1))  # [Z, Y, X] towards superior, posterior, left
    affine = done.affine @ np.eye(4)[:, [2, 1, 0, 3]] @ np.diag([1.0, -1, -1, 1])
    last = np.array(done.hu.shape)[[2, 1, 0]] - 1
    affine[:3, 3] = (done.affine @ np.eye(4)[:, [2, 1, 0, 3]] @ [0, last[1], last[2], 1])[:3]
    hu = np.maximum(done.hu.transpose(2, 1, 0)[turn].round(), -1024).astype(np.int16)
    return Volume(hu, affine, f"phantom {index}"), done.label.transpose(2, 1, 0)[turn], done.patient.phase


def slices_of(volume: Volume) -> np.ndarray:
    """A row of evenly spaced axial slices in an abdominal window, uint8."""
    tiles = []
    for depth in np.linspace(0.08, 0.92, NUM_SLICES) * (volume.shape[0] - 1):
        grey = (window_hu(volume.array[int(depth)], -160, 240) * 255).astype(np.uint8)
        size = [int(n * mm / PICTURE_MM) for n, mm in zip(grey.shape, volume.spacing_mm[1:])]
        pixels = np.asarray(Image.fromarray(grey).resize(size[::-1], Image.Resampling.BILINEAR))
        cut = [max(0, (have - want) // 2) for have, want in zip(pixels.shape, PICTURE_PX)]
        pixels = pixels[cut[0] : cut[0] + PICTURE_PX[0], cut[1] : cut[1] + PICTURE_PX[1]]
        missing = [(want - have) // 2 for have, want in zip(pixels.shape, PICTURE_PX)]
        tile = np.zeros(PICTURE_PX, np.uint8)
        tile[missing[0] : missing[0] + pixels.shape[0], missing[1] : missing[1] + pixels.shape[1]] = pixels
        tiles.append(tile)
    return np.concatenate(tiles, axis=1)


def run(flags: jsonargparse.Namespace) -> dict:
    """Figures of every real scan and the range of the phantoms'; empty where there is no real CT."""
    ct_dir = Path(flags.ct_dir)
    there = [name for name in SCANS if (ct_dir / f"{name}.nii.gz").is_file()]
    if not there:
        print(f"skipped: no real CT in {ct_dir}; see --ct_dir and ALICE_SHARED")
        return {}
    real, rows = {}, []
    for name in there:
        volume = read_ct(ct_dir / f"{name}.nii.gz")
        has_label = name == ABDOMEN and (ct_dir / f"{ABDOMEN}_label_names.json").is_file()
        real[name] = figures(volume, read_truth(ct_dir).array if has_label else None)
        rows.append(slices_of(volume))
    num_phantoms = 3 if flags.quick else flags.num_phantoms
    phantoms = {}
    for index in range(1, num_phantoms + 1):
        volume, label, phase = make_phantom(flags.data_seed, index, flags.coarsen)
        phantoms[f"phantom {index}, {phase}"] = figures(volume, label)
        if index <= len(there):
            rows.append(slices_of(volume))
    if flags.picture:
        Path(flags.picture).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(rows)).save(flags.picture)
    return {"generator": GENERATOR, "real": real, "phantoms": phantoms, "range": ranges(phantoms, real)}


def ranges(phantoms: dict[str, dict], real: dict[str, dict]) -> dict[str, list[float]]:
    """Lowest, median and highest figure of the phantoms; for organs, of those in the real abdomen's phase (native)."""
    names = list(dict.fromkeys(name for found in (*real.values(), *phantoms.values()) for name in found))
    found = {}
    for name in names:
        of_organ = name in FLARE22
        values = [f[name] for case, f in phantoms.items() if name in f and (not of_organ or case.endswith("native"))]
        values = [value for value in values if np.isfinite(value)]
        if values:
            found[name] = [float(np.min(values)), float(np.median(values)), float(np.max(values))]
    return found


def markdown(found: dict) -> str:
    """A line for every figure: the phantoms' range, and every real scan."""
    lines = []
    for name, values in found["range"].items():
        digits = 2 if max(map(abs, values)) < 2 else 0
        cells = [" to ".join(f"{value:.{digits}f}" for value in values)]
        cells += [f"{scan[name]:.{digits}f}" if name in scan else "" for scan in found["real"].values()]
        lines.append((name, *cells))
    return table(lines, ("", f"phantoms, generator {found['generator']}", *found["real"]))


main = command(__name__, make_flags, run, markdown)

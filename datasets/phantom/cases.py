"""Phantom CT: synthetic patients with known truth, in FLARE22's folder layout (design: "The phantom").

One atlas anatomy is drawn at the atlas coordinates of every voxel of a patient's scan, so that labels, landmarks and
the dense map between any two patients are exact. `phantom_atlas` says where things are, `phantom_deform` how patients
differ in shape, `phantom_patient` how they differ in HU and how they are scanned (with the HU ranges and their
sources).

    <out>/FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz    labelled CT
    <out>/FLARE22Train/labels/FLARE22_Tr_0001.nii.gz         its labels, 1-13
    <out>/FLARE22Unlabeled/Case_00001_0000.nii.gz            unlabelled CT
    <out>/landmarks/<case>.json                              landmarks in world mm (RAS), for all cases
    <out>/atlas_maps/<case>.npz                              on request: `atlas_mm` float16 [3, X, Y, Z] of every voxel
                                                             in world (RAS) order, and `affine` [4, 4]
"""

import gzip
import io
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from datasets.phantom.landmarks import atlas_landmarks
from datasets.phantom.organs import paint_organs
from datasets.phantom.patient import Patient, Scan, sample_patient, sample_scan
from datasets.phantom.shapes import Canvas
from datasets.phantom.skeleton import paint_skeleton
from datasets.phantom.trunk import paint_trunk
from datasets.store.files import write_bytes, write_text

GENERATOR = 1  # version of everything that decides how a phantom looks; results of different versions differ
SLAB_VOXELS = 3_000_000
PADDING_HU = -3024


@dataclass(frozen=True)
class PhantomCase:
    """What defines a case: its name and the seeds; the same values make the same files, byte for byte.

    Args:
        name: file stem, `FLARE22_Tr_0001` or `Case_00001`; labelled: whether it has a label file.
        range_name: a key of SCAN_RANGES, or None to draw one.
        coarsen: factor on voxel sizes, above 1 for tiny volumes in tests.
    """

    name: str
    seed: int
    index: int
    labelled: bool
    full_size: bool = False
    range_name: str | None = None
    coarsen: float = 1.0

    def sample(self) -> tuple[Patient, Scan, np.random.Generator]:
        """The patient, the scan and the generator for the scanner's noise."""
        rng = np.random.Generator(np.random.PCG64([self.seed, int(self.labelled), self.index]))
        patient = sample_patient(rng)
        scan = sample_scan(rng, patient, self.full_size, self.range_name)
        if self.coarsen != 1.0:
            shape = tuple(max(int(n / self.coarsen), 16) for n in scan.shape)
            spacing = tuple(s * n / m for s, n, m in zip(scan.spacing_mm, scan.shape, shape))
            scan = Scan(**{**scan.__dict__, "shape": shape, "spacing_mm": spacing})
        return patient, scan, rng


@dataclass(frozen=True)
class RenderedCase:
    """A scan in world order: HU float32 [X, Y, Z], labels uint8 [X, Y, Z], affine [4, 4], landmarks in world mm."""

    hu: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    landmarks_mm: dict[str, np.ndarray]
    scan: Scan
    patient: Patient


def _axes(scan: Scan) -> tuple[np.ndarray, ...]:
    """World mm of the voxel centres along x, y, z."""
    return tuple(o + s * np.arange(n) for o, s, n in zip(scan.origin_mm, scan.spacing_mm, scan.shape))


def atlas_coordinates(case: PhantomCase) -> tuple[np.ndarray, np.ndarray]:
    """The dense truth: atlas mm [3, X, Y, Z] (float32) of every voxel in world (RAS) order, and its affine [4, 4]."""
    patient, scan, _ = case.sample()
    return np.stack(patient.deformation.grid(_axes(scan))), _affine(scan)


def _affine(scan: Scan) -> np.ndarray:
    affine = np.diag([*scan.spacing_mm, 1.0])
    affine[:3, 3] = scan.origin_mm
    return affine


def render(case: PhantomCase) -> RenderedCase:
    """Draw a case: anatomy in slabs of bounded memory, then the scanner."""
    patient, scan, rng = case.sample()
    xs, ys, zs = _axes(scan)
    hu = np.empty(scan.shape, np.float32)
    label = np.empty(scan.shape, np.uint8)
    softness = max(1.0, float(np.prod(scan.spacing_mm)) ** (1 / 3))
    step = max(8, SLAB_VOXELS // (scan.shape[0] * scan.shape[1]))
    for start in range(0, scan.shape[2], step):
        stop = min(start + step, scan.shape[2])
        canvas = Canvas(tuple(patient.deformation.grid((xs, ys, zs[start:stop]))), ys.astype(np.float32), softness)
        paint_trunk(canvas, patient)
        paint_organs(canvas, patient)
        paint_skeleton(canvas, patient.bone_hu)
        hu[:, :, start:stop], label[:, :, start:stop] = canvas.hu, canvas.label
    landmarks = _landmarks_inside(patient, scan)
    hu = _scan(hu, patient, scan, rng)
    return RenderedCase(hu, label, _affine(scan), landmarks, scan, patient)


def _landmarks_inside(patient: Patient, scan: Scan) -> dict[str, np.ndarray]:
    """World mm of the atlas' landmarks that lie within the scan's voxels (and its circle, where it has one)."""
    names, points = zip(*atlas_landmarks().items())
    world = patient.deformation.to_world(np.array(points))
    index = (world - scan.origin_mm) / scan.spacing_mm
    inside = ((index >= 0) & (index <= np.array(scan.shape) - 1)).all(axis=1)
    if scan.circle:
        middle = (np.array(scan.shape[:2]) - 1) / 2
        inside &= np.linalg.norm((index[:, :2] - middle) / (middle + 0.5), axis=1) < 1
    return {name: point for name, point, kept in zip(names, world, inside) if kept}


def _scan(hu: np.ndarray, patient: Patient, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """The scanner: table, in-plane blur, correlated noise that grows towards the middle, padding outside the circle."""
    xs, ys, _ = _axes(scan)
    if scan.table_mm is not None:
        _add_table(hu, scan, xs, ys)
    blur = (scan.blur_vox, scan.blur_vox, 0.35)
    hu = gaussian_filter(hu, blur, truncate=2.5)
    noise = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (0.65, 0.65, 0.3), truncate=2.5)
    noise *= scan.noise_hu / noise.std()
    middle = patient.deformation.to_world(np.array([[0.0, 12.0, 100.0]]))[0]
    radius2 = ((xs[:, None] - middle[0]) / 190) ** 2 + ((ys[None] - middle[1]) / 130) ** 2
    hu += noise * (0.55 + 0.75 * np.exp(-radius2)).astype(np.float32)[..., None]
    hu = np.clip(hu, -1024, 3071)
    if scan.circle:
        fx = np.linspace(-1, 1, scan.shape[0])[:, None]
        fy = np.linspace(-1, 1, scan.shape[1])[None]
        hu[fx**2 + fy**2 > 1] = PADDING_HU
    return hu


def _add_table(hu: np.ndarray, scan: Scan, xs: np.ndarray, ys: np.ndarray) -> None:
    """A curved table top with a bright skin and a foam core, `table_mm` below the lowest point of the body."""
    middle = scan.origin_mm[0] + 0.5 * scan.spacing_mm[0] * scan.shape[0]
    curved = (xs - middle) ** 2 / 900.0
    body = (hu > -300).any(axis=2)
    top = (ys[None] - curved[:, None])[body].min() - 2.0 - scan.table_mm + curved
    depth = (top[:, None] - ys[None]).astype(np.float32)
    width = np.float32(max(0.9 * scan.spacing_mm[1], 1.5))
    skin = np.exp(-((depth / width) ** 2)) + np.exp(-(((depth - 26) / width) ** 2))
    table = -1000 + 1050 * np.minimum(skin, 1) + 60 * ((depth > 0) & (depth < 26))
    wide = np.abs(xs - middle)[:, None] < 210
    np.maximum(hu, np.where(wide, table, -1000).astype(np.float32)[..., None], out=hu)


def nifti_bytes(array: np.ndarray, affine: np.ndarray, orientation: str, storage: str) -> bytes:
    """A gzipped NIfTI file of a world-ordered (RAS) array; without time stamp, so that equal data give equal bytes.

    Args:
        array: [X, Y, Z] HU or labels; affine: [4, 4] of that array; orientation: axis codes of the file.
        storage: "uint8", "int16", "int32", "float32", or "scaled": int16 holding HU + 1024 with scl_inter -1024.
    """
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    moved = np.round(apply_orientation(array, change))
    shift = 1024 if storage == "scaled" else 0
    stored = (moved + shift).astype("int16" if storage == "scaled" else storage)
    image = nib.Nifti1Image(stored, affine @ inv_ornt_aff(change, array.shape))
    image.header.set_xyzt_units("mm", "sec")
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([1.0, -shift], image.header.endianness + "f4").tobytes()  # scl_slope, scl_inter
    return gzip.compress(bytes(raw), 3, mtime=0)


def case_files(out_dir: Path, case: PhantomCase, save_atlas_map: bool = False) -> dict[str, Path]:
    """The files of one case: image, landmarks, and label and atlas_map where wanted."""
    out_dir = Path(out_dir)
    if case.labelled:
        files = {
            "image": out_dir / "FLARE22Train" / "images" / f"{case.name}_0000.nii.gz",
            "label": out_dir / "FLARE22Train" / "labels" / f"{case.name}.nii.gz",
        }
    else:
        files = {"image": out_dir / "FLARE22Unlabeled" / f"{case.name}_0000.nii.gz"}
    if save_atlas_map:
        files["atlas_map"] = out_dir / "atlas_maps" / f"{case.name}.npz"
    files["landmarks"] = out_dir / "landmarks" / f"{case.name}.json"  # last: it says that the case is whole
    return files


def write_case(out_dir: Path, case: PhantomCase, save_atlas_map: bool = False) -> bool:
    """Render and write one case; returns False when all its files are there already."""
    files = case_files(out_dir, case, save_atlas_map)
    if all(path.exists() for path in files.values()):
        return False
    done = render(case)
    scan = done.scan
    write_bytes(files["image"], nifti_bytes(done.hu, done.affine, scan.orientation, scan.storage))
    if "label" in files:
        write_bytes(files["label"], nifti_bytes(done.label, done.affine, scan.orientation, "uint8"))
    if "atlas_map" in files:
        # float16 is at most 0.13 mm off
        atlas_mm, affine = atlas_coordinates(case)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, atlas_mm=atlas_mm.astype(np.float16), affine=affine)
        write_bytes(files["atlas_map"], buffer.getbuffer())
    record = {
        "case": case.name,
        "landmarks_mm": {name: np.round(point, 3).tolist() for name, point in done.landmarks_mm.items()},
        "phase": done.patient.phase,
        "scan_range": scan.range_name,
        "seed": [case.seed, int(case.labelled), case.index],
        "full_size": case.full_size,
        "generator": GENERATOR,
    }
    write_text(files["landmarks"], json.dumps(record, indent=1) + "\n")
    return True


def list_cases(num_unlabelled: int, num_labelled: int, seed: int, full_size: bool = False) -> list[PhantomCase]:
    """The cases of a data set. A case depends on its own number and the seed only, so sets can be extended."""
    cases = [PhantomCase(f"Case_{k:05d}", seed, k, False, full_size) for k in range(1, num_unlabelled + 1)]
    return cases + [PhantomCase(f"FLARE22_Tr_{k:04d}", seed, k, True, full_size) for k in range(1, num_labelled + 1)]


def write_dataset(out_dir: Path, cases: list[PhantomCase], num_workers: int, save_atlas_map: bool = False) -> int:
    """Write all cases in `num_workers` processes (0 or 1: in this one); returns how many were made anew."""
    return write_cases(partial(write_case, out_dir, save_atlas_map=save_atlas_map), cases, num_workers)


def write_cases(write: Callable[[PhantomCase], bool], cases: Sequence[PhantomCase], num_workers: int) -> int:
    """Call `write`, which says whether it made anything, for all cases; returns how many were made anew."""
    num_made = 0
    with tqdm(total=len(cases), desc="phantom cases", unit="case") as bar:
        if num_workers <= 1:
            for case in cases:
                num_made += write(case)
                bar.update()
            return num_made
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(num_workers, len(cases)), mp_context=spawn) as pool:
            for job in as_completed([pool.submit(write, case) for case in cases]):
                num_made += job.result()
                bar.update()
    return num_made

"""Phantom CT: synthetic patients with known truth, in FLARE22's folder layout (design: "The phantom").

One atlas anatomy is drawn at the atlas coordinates of every voxel of a patient's scan, so that labels, landmarks and
the dense map between any two patients are exact. `atlas` says where things are, `deform` how patients differ in shape,
`variants` what some have and others lack, `patient` how they differ in HU (with the ranges and their sources), `scan`
and `scanner` how they are imaged. A structure that a patient lacks has neither label nor landmark.

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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from tqdm import tqdm

from datasets.ct.images import CT
from datasets.phantom.landmarks import atlas_landmarks
from datasets.phantom.organs import paint_organs
from datasets.phantom.patient import Patient, sample_patient
from datasets.phantom.scan import Scan, sample_scan
from datasets.phantom.scanner import scan_volume
from datasets.phantom.shapes import Canvas
from datasets.phantom.skeleton import paint_skeleton
from datasets.phantom.trunk import paint_trunk
from datasets.phantom.variants import Shares, sample_variants
from datasets.store.files import write_bytes, write_text

GENERATOR = 2  # version of everything that decides how a phantom looks; results of different versions differ
SLAB_VOXELS = 3_000_000
VARIANT_STREAM = 1  # the random numbers of variants are a patient's own stream


@dataclass(frozen=True)
class PhantomCase:
    """What defines a case: its name and the seeds; the same values make the same files, byte for byte.

    Args:
        name: file stem, `FLARE22_Tr_0001` or `Case_00001`; labelled: whether it has a label file.
        range_name: a key of SCAN_RANGES, or None to draw one.
        coarsen: factor on voxel sizes, above 1 for tiny volumes in tests.
        shares: how often variants and artefacts occur.
    """

    name: str
    seed: int
    index: int
    labelled: bool
    full_size: bool = False
    range_name: str | None = None
    coarsen: float = 1.0
    shares: Shares = Shares()

    @property
    def modality(self) -> str:
        """What is imaged; cases of another one are not taken for this one's files."""
        return CT

    def sample(self) -> tuple[Patient, Scan, np.random.Generator]:
        """The patient, the scan and the generator for the scanner's noise."""
        key = [self.seed, int(self.labelled), self.index]
        rng = np.random.Generator(np.random.PCG64(key))
        anatomy, artefacts = sample_variants(np.random.Generator(np.random.PCG64([*key, VARIANT_STREAM])), self.shares)
        patient = sample_patient(rng, anatomy)
        scan = sample_scan(rng, patient, artefacts, self.full_size, self.range_name)
        return patient, scan if self.coarsen == 1.0 else scan.coarser(self.coarsen), rng


@dataclass(frozen=True)
class RenderedCase:
    """A scan in world order: HU float32 [X, Y, Z], labels uint8 [X, Y, Z], affine [4, 4], landmarks in world mm."""

    hu: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    landmarks_mm: dict[str, np.ndarray]
    scan: Scan
    patient: Patient


def atlas_coordinates(case: PhantomCase) -> tuple[np.ndarray, np.ndarray]:
    """The dense truth: atlas mm [3, X, Y, Z] (float32) of every voxel in world (RAS) order, and its affine [4, 4]."""
    patient, scan, _ = case.sample()
    return np.stack(scan.atlas_grid(patient, 0, scan.shape[2])), scan.affine


def render(case: PhantomCase) -> RenderedCase:
    """Draw a case: anatomy in slabs of bounded memory, then the scanner."""
    patient, scan, rng = case.sample()
    hu = np.empty(scan.shape, np.float32)
    label = np.empty(scan.shape, np.uint8)
    softness = max(1.0, float(np.prod(scan.spacing_mm)) ** (1 / 3))
    ys = scan.axes_mm[1].astype(np.float32)
    step = max(8, SLAB_VOXELS // (scan.shape[0] * scan.shape[1]))
    for start in range(0, scan.shape[2], step):
        stop = min(start + step, scan.shape[2])
        canvas = Canvas(tuple(scan.atlas_grid(patient, start, stop)), ys, softness, patient.texture_mm)
        paint_patient(canvas, patient)
        hu[:, :, start:stop], label[:, :, start:stop] = canvas.hu, canvas.label
    landmarks = _landmarks_inside(patient, scan)
    return RenderedCase(scan_volume(hu, scan, rng), label, scan.affine, landmarks, scan, patient)


def paint_patient(canvas: Canvas, patient: Patient) -> None:
    """Paint everything a patient has."""
    paint_trunk(canvas, patient)
    paint_organs(canvas, patient)
    paint_skeleton(canvas, patient)


def _landmarks_inside(patient: Patient, scan: Scan) -> dict[str, np.ndarray]:
    """World mm of the patient's landmarks that lie within the scan's voxels (and its circle, where it has one)."""
    names, points = zip(*atlas_landmarks(patient.anatomy).items())
    world = scan.from_atlas(patient, np.array(points))
    inside = scan.is_scanned(world)
    if scan.circle:
        index = (world - scan.origin_mm) / scan.spacing_mm
        middle = (np.array(scan.shape[:2]) - 1) / 2
        inside &= np.linalg.norm((index[:, :2] - middle) / (middle + 0.5), axis=1) < 1
    return {name: point for name, point, kept in zip(names, world, inside) if kept}


def nifti_bytes(array: np.ndarray, affine: np.ndarray, orientation: str, storage: str) -> bytes:
    """A gzipped NIfTI file of a world-ordered (RAS) array; without time stamp, so that equal data give equal bytes.

    Args:
        array: [X, Y, Z] HU or labels, or [X, Y, Z, C]; affine: [4, 4] of that array.
        orientation: axis codes of the file.
        storage: "uint8", "int16", "int32", "float32", or "scaled": int16 holding HU + 1024 with scl_inter -1024.
    """
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    moved = np.round(apply_orientation(array, change))
    shift = 1024 if storage == "scaled" else 0
    stored = (moved + shift).astype("int16" if storage == "scaled" else storage)
    image = nib.Nifti1Image(stored, affine @ inv_ornt_aff(change, array.shape[:3]))
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


def write_case(
    out_dir: Path,
    case: PhantomCase,
    save_atlas_map: bool = False,
    draw: Callable[[PhantomCase], RenderedCase] = render,
) -> bool:
    """Render and write one case; returns False when all its files are there already.

    Args:
        draw: makes the case's voxels.

    Raises:
        ValueError: they are there, by another version of the generator, with other shares of variants, or of another
            modality.
    """
    files = case_files(out_dir, case, save_atlas_map)
    if all(path.exists() for path in files.values()):
        _check_made_alike(files["landmarks"], case)
        return False
    done = draw(case)
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
        "shares": asdict(case.shares),
        "anatomy": asdict(done.patient.anatomy),
        "artefacts": asdict(scan.artefacts),
    } | ({} if case.modality == CT else {"modality": case.modality})
    write_text(files["landmarks"], json.dumps(record, indent=1) + "\n")
    return True


def _check_made_alike(path: Path, case: PhantomCase) -> None:
    record = json.loads(path.read_text())
    wanted = {"generator": GENERATOR, "shares": asdict(case.shares)}
    if any(record.get(name) != value for name, value in wanted.items()):
        raise ValueError(
            f"{path}: this case was made by generator {record.get('generator', 1)} (now {GENERATOR}) or with "
            "other shares of variants; choose another --out_dir, or delete the old phantoms"
        )
    if (made := record.get("modality", CT)) != case.modality:
        raise ValueError(
            f"{path}: this case is {made}, expected {case.modality} (--modality); choose another --out_dir"
        )


def list_cases(
    num_unlabelled: int, num_labelled: int, seed: int, full_size: bool = False, shares: Shares | None = None
) -> list[PhantomCase]:
    """The cases of a data set. A case depends on its own number and the seed only, so sets can be extended."""
    options = {"full_size": full_size, "shares": shares or Shares()}
    cases = [PhantomCase(f"Case_{k:05d}", seed, k, False, **options) for k in range(1, num_unlabelled + 1)]
    return cases + [PhantomCase(f"FLARE22_Tr_{k:04d}", seed, k, True, **options) for k in range(1, num_labelled + 1)]


def write_dataset(
    out_dir: Path,
    cases: list[PhantomCase],
    num_workers: int,
    save_atlas_map: bool = False,
    draw: Callable[[PhantomCase], RenderedCase] = render,
) -> int:
    """Write all cases in `num_workers` processes (0 or 1: in this one); returns how many were made anew.

    `draw` makes a case's voxels. `<out_dir>/dataset.json` says which version of the generator made them.
    """
    write_text(Path(out_dir) / "dataset.json", json.dumps({"generator": GENERATOR}, indent=1) + "\n")
    return write_cases(partial(write_case, out_dir, save_atlas_map=save_atlas_map, draw=draw), cases, num_workers)


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

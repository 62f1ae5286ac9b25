"""Phantom CT, patients and scans: everything that differs between two cases, drawn from one seed.

HU ranges by contrast phase (native, late arterial at about 35 s, portal venous at about 70 s), after textbooks and
surveys. Unenhanced: liver 50-65, spleen 40-55 (8-10 below the liver), pancreas 35-50, kidney 28-40, adrenal 10-40
(lipid-rich adenomas lie below 10), blood 35-50, muscle 45-65, bile 0-20, urine and water about 0, fat -120 to -90,
lung -900 to -750. Late arterial: aorta 250-350, renal cortex 150-210 far above the medulla, pancreas 90-120, spleen
110-150 with stripes. Portal venous: liver 95-125, spleen 105-140, portal vein 150-190, aorta 140-180, kidney 150-200.
Bae, Radiology 2010;256:32 (timing and height of enhancement); Lamba et al., AJR 2014 (unenhanced organs); Boland et
al., AJR 1998 (adrenals); Pickhardt et al., Ann Intern Med 2013 (cancellous bone).
"""

from dataclasses import dataclass

import numpy as np

from datasets.phantom.deform import Deformation, sample_deformation

PHASES = ("native", "arterial", "portal")

# Tissue -> range of the patient's mean HU per phase: native, arterial, portal.
TISSUE_HU = {
    "liver": ((48, 64), (62, 84), (96, 124)),
    "spleen": ((40, 53), (108, 145), (106, 136)),
    "renal_cortex": ((29, 38), (150, 205), (160, 195)),
    "renal_medulla": ((27, 35), (55, 90), (140, 180)),
    "pancreas": ((34, 48), (88, 118), (78, 104)),
    "adrenal": ((16, 36), (54, 80), (50, 76)),
    "aorta": ((36, 48), (250, 340), (140, 180)),
    "cava": ((34, 46), (50, 75), (125, 165)),
    "renal_vein": ((34, 46), (120, 170), (145, 180)),
    "portal_vein": ((36, 48), (95, 145), (152, 190)),
    "hepatic_vein": ((34, 46), (60, 82), (140, 178)),
    "right_heart": ((35, 47), (150, 260), (130, 165)),
    "myocardium": ((40, 50), (92, 120), (98, 122)),
    "esophagus": ((32, 44), (44, 64), (50, 68)),
    "stomach_wall": ((34, 46), (62, 88), (72, 94)),
    "bowel_wall": ((34, 46), (76, 106), (74, 100)),
    "muscle": ((46, 58), (50, 62), (54, 68)),
    "bile": ((2, 18), (2, 18), (2, 18)),
    "urine": ((-2, 12), (-2, 12), (-2, 14)),
    "gut_fluid": ((8, 34), (8, 34), (8, 34)),
    "fat": ((-114, -98), (-112, -96), (-110, -94)),
    "lung": ((-885, -815), (-880, -810), (-880, -805)),
}

# Name -> atlas z (mm) of the lower and upper end, before jitter.
SCAN_RANGES = {
    "chest_abdomen_pelvis": (-158, 440),
    "abdomen_pelvis": (-158, 262),
    "abdomen": (18, 258),
    "chest_upper_abdomen": (62, 440),
}
RANGE_WEIGHTS = (0.22, 0.28, 0.32, 0.18)

ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "LPI", "RPS", "PIR", "ASL", "SPL", "IRP")
ORIENTATION_WEIGHTS = (0.22, 0.2, 0.12, 0.1, 0.08, 0.08, 0.05, 0.05, 0.05, 0.05)


@dataclass(frozen=True)
class Lesion:
    """A round change inside an organ, seen only in this patient: atlas centre (mm), radius (mm) and HU."""

    centre_mm: tuple[float, float, float]
    radius_mm: float
    hu: float


@dataclass(frozen=True)
class Patient:
    """One synthetic patient.

    Args:
        hu: mean HU per tissue of TISSUE_HU in this phase; bone_hu: cancellous bone.
        noise_offset_mm: where this patient's own textures are read in the noise tables.
        gas: 0..1, how much gas stomach and bowel hold; stool: 0..1, how solid the colon's contents are.
        seed: of the patient's own bowel loops.
    """

    deformation: Deformation
    phase: str
    hu: dict[str, float]
    bone_hu: float
    noise_offset_mm: tuple[float, float, float]
    gas: float
    stool: float
    oral_contrast: bool
    lesions: tuple[Lesion, ...]
    seed: int


@dataclass(frozen=True)
class Scan:
    """How a patient is imaged and how the file is written.

    Args:
        shape: voxels along world x, y, z; spacing_mm likewise; origin_mm: world position of the first voxel, x, y, z.
        noise_hu: standard deviation of noise behind an average body; blur_vox: Gaussian sigma in the slice.
        table_mm: height of the table below the back (mm), None without one; circle: -3024 outside the field of view.
        orientation: axis codes of the file; storage: "int16", "int32", "float32" or "scaled" (int16 with intercept).
    """

    range_name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    noise_hu: float
    blur_vox: float
    table_mm: float | None
    circle: bool
    orientation: str
    storage: str


def sample_patient(rng: np.random.Generator) -> Patient:
    """Draw a patient: habitus, shape, contrast phase, tissues, gas and lesions."""
    weight = float(np.clip(rng.normal(), -1.8, 2.0))  # thin to obese
    fat = float(np.clip(1.0 + 0.38 * weight + rng.normal(0, 0.1), 0.4, 1.9))
    size = (
        np.array([1.0 + 0.05 * weight, 1.0 + 0.07 * weight, 1.0]) * rng.normal(1.0, 0.02, 3) * rng.normal(0.97, 0.045)
    )
    phase = PHASES[rng.choice(3, p=(0.25, 0.2, 0.55))]
    column = PHASES.index(phase)
    enhancement = rng.uniform()  # tissues of one patient enhance together, with some play
    hu = {}
    for tissue, ranges in TISSUE_HU.items():
        low, high = ranges[column]
        hu[tissue] = float(low + (high - low) * np.clip(enhancement + rng.normal(0, 0.25), 0, 1))
    return Patient(
        deformation=sample_deformation(rng, fat, size),
        phase=phase,
        hu=hu,
        bone_hu=float(rng.uniform(105, 230)),
        noise_offset_mm=tuple(rng.uniform(20, 230, 3).tolist()),
        gas=float(rng.uniform(0.1, 0.9)),
        stool=float(rng.uniform(0, 1)),
        oral_contrast=bool(rng.uniform() < 0.15),
        lesions=tuple(_sample_lesions(rng, phase)),
        seed=int(rng.integers(2**31)),
    )


def _sample_lesions(rng: np.random.Generator, phase: str) -> list[Lesion]:
    """Cysts of liver and kidneys and a few solid liver lesions, none in half of the patients."""
    if rng.uniform() < 0.5:
        return []
    places = [((85, 10, 165), 34), ((60, 40, 180), 24), ((80, 4, 60), 6), ((-84, 2, 130), 6), ((-84, 2, 76), 6)]
    lesions = []
    for _ in range(rng.integers(1, 4)):
        centre, spread = places[rng.integers(len(places))]
        solid = rng.uniform() < 0.35
        where = tuple((np.array(centre) + rng.uniform(-spread, spread, 3)).tolist())
        lesions.append(
            Lesion(where, float(rng.uniform(3, 13)), float(rng.uniform(35, 75) if solid else rng.uniform(0, 14)))
        )
    return lesions


def sample_scan(rng: np.random.Generator, patient: Patient, full_size: bool, range_name: str | None = None) -> Scan:
    """Draw a scan of a patient; `range_name` fixes the scan range instead of drawing it from SCAN_RANGES."""
    drawn = list(SCAN_RANGES)[rng.choice(len(SCAN_RANGES), p=RANGE_WEIGHTS)]
    range_name = range_name or drawn
    low, high = SCAN_RANGES[range_name]
    ends = patient.deformation.to_world(np.array([[0, 20, low], [0, 20, high]], float))[:, 2] + rng.normal(0, 6, 2)
    length = ends[1] - ends[0]
    middle = patient.deformation.to_world(np.array([[0.0, 12.0, 100.0]]))[0]
    width = 372 * float(patient.deformation.scale[0])
    field = float(np.clip(width * rng.uniform(1.0, 1.22) + 18, 330, 500))
    if full_size:
        pixels, thickness = 512, float(rng.choice((1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0)))
        thickness = max(thickness, length / 250)
    else:
        pixels = int(rng.choice((112, 120, 128, 136, 144)))
        thickness = float(rng.choice((1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)))
        thickness = min(max(thickness, round(length / 112, 2)), 5.0)
    spacing = (field / pixels, field / pixels, thickness)
    shape = (pixels, pixels, int(round(length / thickness)) + 1)
    centre = middle[:2] + rng.normal(0, (5.0, 7.0))
    origin = (centre[0] - field / 2, centre[1] - field / 2 - 8.0, ends[0])
    return Scan(
        range_name=range_name,
        shape=shape,
        spacing_mm=tuple(float(round(s, 6)) for s in spacing),
        origin_mm=tuple(float(round(o, 3)) for o in origin),
        noise_hu=float(rng.uniform(6, 20)) * (1.15 if full_size else 1.0),
        blur_vox=float(rng.uniform(0.3, 0.6)) * (1.6 if full_size else 1.0),
        table_mm=float(rng.uniform(2, 26)) if rng.uniform() < 0.8 else None,
        circle=bool(rng.uniform() < 0.3),
        orientation=str(rng.choice(ORIENTATIONS, p=ORIENTATION_WEIGHTS)),
        storage=str(rng.choice(("int16", "int32", "float32", "scaled"), p=(0.6, 0.1, 0.15, 0.15))),
    )

"""Phantom CT, patients: shape, tissues, fillings and lesions, drawn from one seed.

HU ranges by contrast phase (native, late arterial at about 35 s, portal venous at about 70 s), after textbooks and
surveys. Unenhanced: liver 50-65 (fatty ones below 40), spleen 40-55, pancreas 35-50 (fatty ones about 0), kidney 28-40,
adrenal 10-40 (lipid-rich adenomas lie below 10), blood 35-50, muscle 45-65 (old patients' 20-40), bile 0-20, urine and
water about 0, fat -120 to -90, lung -900 to -750. Late arterial: aorta 250-350, renal cortex 150-210 far above the
medulla, pancreas 90-120, spleen 110-150 with stripes. Portal venous: liver 95-125, spleen 105-140, portal vein 150-190,
aorta 140-180, kidney 150-200.
Bae, Radiology 2010;256:32 (timing and height of enhancement); Lamba et al., AJR 2014 (unenhanced organs); Boland et
al., AJR 1998 (adrenals); Pickhardt et al., Ann Intern Med 2013 (cancellous bone).
"""

from dataclasses import dataclass

import numpy as np

from datasets.phantom.deform import Deformation, sample_deformation
from datasets.phantom.variants import Anatomy

PHASES = ("native", "arterial", "portal")

# Tissue -> range of the patient's mean HU per phase: native, arterial, portal.
TISSUE_HU = {
    "liver": ((36, 64), (54, 84), (84, 124)),
    "spleen": ((34, 52), (108, 145), (106, 136)),
    "renal_cortex": ((18, 36), (150, 205), (160, 195)),
    "renal_medulla": ((16, 34), (55, 90), (140, 180)),
    "pancreas": ((2, 46), (66, 116), (56, 102)),
    "adrenal": ((0, 34), (54, 80), (50, 76)),
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
    "muscle": ((34, 58), (38, 62), (42, 68)),
    "bile": ((2, 18), (2, 18), (2, 18)),
    "urine": ((-2, 12), (-2, 12), (-2, 14)),
    "gut_fluid": ((8, 34), (8, 34), (8, 34)),
    "fat": ((-114, -98), (-112, -96), (-110, -94)),
    "lung": ((-885, -815), (-880, -810), (-880, -805)),
}


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
        texture_mm: where this patient's own textures lie in the noise tables.
        seed: of the patient's own vessel trees and bowel loops.
        gas: 0..1, how much gas stomach and bowel hold; stool: 0..1, how solid the colon's contents are.
        marbling: 0..1, fat between the muscles' fibres.
        width: organ -> factor on the radius of tubes (CALIBRES).
    """

    deformation: Deformation
    phase: str
    hu: dict[str, float]
    bone_hu: float
    texture_mm: tuple[float, float, float]
    seed: int
    gas: float
    stool: float
    marbling: float
    width: dict[str, float]
    lesions: tuple[Lesion, ...]
    anatomy: Anatomy


# Tube -> range of the factor on its radius.
CALIBRES = {
    "stomach": (0.55, 1.2),
    "duodenum": (0.75, 1.15),
    "pancreas": (0.75, 1.15),
    "colon": (0.75, 1.35),
    "small_bowel": (0.85, 1.25),
    "gallbladder": (0.75, 1.25),
    "aorta": (0.9, 1.2),
}


def sample_patient(rng: np.random.Generator, anatomy: Anatomy) -> Patient:
    """Draw a patient with a given anatomy: habitus, shape, contrast phase, tissues, fillings and lesions."""
    weight = float(np.clip(rng.normal(0.2, 1.0), -1.7, 2.0))  # thin to obese
    fat = float(np.clip(1.0 + 0.36 * weight + rng.normal(0, 0.15), 0.4, 1.9))
    size = np.array([1.02 + 0.05 * weight, 1.08 + 0.07 * weight, 1.0])
    size = size * rng.normal(1.0, 0.025, 3) * rng.normal(0.99, 0.045)
    phase = PHASES[rng.choice(3, p=(0.3, 0.2, 0.5))]
    return Patient(
        deformation=sample_deformation(rng, fat, size, belly_mm=float(rng.normal(8 + 10 * weight, 7))),
        phase=phase,
        hu=_sample_tissues(rng, phase),
        bone_hu=float(rng.uniform(90, 230)),
        texture_mm=tuple(rng.uniform(0, 256, 3).tolist()),
        seed=int(rng.integers(2**31)),
        gas=float(rng.uniform(0.1, 0.9)),
        stool=float(rng.uniform(0, 1)),
        marbling=float(rng.uniform(0, 1)),
        width={name: float(rng.uniform(*ends)) for name, ends in CALIBRES.items()},
        lesions=tuple(_sample_lesions(rng)),
        anatomy=anatomy,
    )


def _sample_tissues(rng: np.random.Generator, phase: str) -> dict[str, float]:
    """HU of every tissue; those of one patient enhance together, with some play."""
    column, enhancement, hu = PHASES.index(phase), rng.uniform(), {}
    for tissue, ranges in TISSUE_HU.items():
        low, high = ranges[column]
        hu[tissue] = float(low + (high - low) * np.clip(enhancement + rng.normal(0, 0.25), 0, 1))
    return hu


def _sample_lesions(rng: np.random.Generator) -> list[Lesion]:
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

"""Phantom CT, gut: esophagus, stomach, duodenum, small bowel with its mesentery, and colon."""

from functools import lru_cache

import numpy as np

from datasets.phantom.atlas import CURVES, cavity_distance, diaphragm_height
from datasets.phantom.patient import Patient
from datasets.phantom.shapes import Canvas, Region, noise
from datasets.phantom.trunk import grow_tree

STOMACH, DUODENUM, ESOPHAGUS = 11, 12, 10
NUM_LOOP_KNOTS = 170
COLON_STEP_MM = 11.0
NUM_TRANSVERSE = (4, 10)  # knots of the colon's curve, first and last, that hang down by the patient's own length
CONTRAST_HU = 230.0


def paint_small_bowel(canvas: Canvas, patient: Patient) -> None:
    """Winding loops in the front of the belly, and vessels that fan out in the fat of their mesentery."""
    points = _loops(patient.seed)
    radii = patient.width["small_bowel"] * (12.0 + 1.6 * np.sin(np.arange(len(points)) * 0.9 + patient.seed % 11))
    region, distance, position = canvas.tube(points, radii, pad_mm=3)
    own = noise(region, "middle")
    folds = np.sin(position * np.float32(2 * np.pi / 8))
    distance = _inside_belly(region, distance)
    canvas.paint(region, distance + 0.8 * own, np.float32(patient.hu["bowel_wall"]))
    content = patient.hu["gut_fluid"] + 12 * own + (CONTRAST_HU if patient.anatomy.oral_contrast else 0)
    lumen = distance + 3 + 1.2 * folds
    canvas.paint(region, lumen, content)
    airy = np.sin(position * np.float32(1 / 45) + patient.seed % 5) > 1.45 - patient.gas
    canvas.paint(region, np.where(airy, lumen + 3 - 2 * own, np.float32(9)), np.float32(-900.0))
    canvas.paint_segments(_mesenteric_tree(patient.seed), patient.hu["portal_vein"])


@lru_cache(maxsize=2)
def _loops(seed: int) -> np.ndarray:
    """Knots of a patient's small bowel: a winding walk between the flexure and the caecum."""
    rng = np.random.Generator(np.random.PCG64(seed))
    low, high = np.array([-96.0, 42, -88]), np.array([92.0, 102, 78])
    points = [np.array([-44.0, 68, 84])]
    heading = np.array([0.3, 0.2, -1.0])
    for step in range(NUM_LOOP_KNOTS):
        part = step / NUM_LOOP_KNOTS
        goal = np.array([-14 + 66 * np.sin(2 * np.pi * 3.5 * part + 3), 74.0, 60 - 138 * part])
        drift = goal - points[-1]
        heading = 0.72 * heading + rng.normal(0, 0.75, 3) * [1.2, 0.6, 1] + 0.009 * drift
        heading /= np.linalg.norm(heading)
        points.append(np.clip(points[-1] + 21 * heading, low, high))
    return np.array(points)


@lru_cache(maxsize=2)
def _mesenteric_tree(seed: int) -> list:
    rng = np.random.Generator(np.random.PCG64([5150, seed]))
    targets = rng.uniform((-85, 55, -55), (85, 96, 70), (46, 3))
    return grow_tree(rng, (6, 72, 40), targets, 0.9, 0.32)


def paint_colon(canvas: Canvas, patient: Patient) -> None:
    """The colon with pouches; stool with bubbles or fluid, gas on top: course and contents are the patient's own."""
    region, distance, position = canvas.tube(*_colon_course(patient.seed, patient.width["colon"]), pad_mm=6)
    own = noise(region, "middle")
    shape = noise(region, "coarse")
    pouches = np.abs(np.sin(position * np.float32(np.pi / 27) + shape))
    distance = _inside_belly(region, distance + 3.2 * (1 - pouches) + 1.6 * shape)
    canvas.paint(region, distance, np.float32(patient.hu["bowel_wall"] - 10))
    lumen = distance + 2.6
    stool = 30 - 420 * np.clip(own - 0.2 + 0.5 * (patient.stool - 0.5), 0, 1.2)
    content = np.where(patient.stool > 0.3, stool, 20 + 6 * own)
    if patient.anatomy.colon_contrast:
        content = content + CONTRAST_HU * (1 + 0.3 * shape)
    canvas.paint(region, lumen, content.astype(np.float32))
    level = gas_level(patient, (0, 84, 60), 34.0) + 12 * np.sin(position * np.float32(1 / 60) + patient.seed % 7)
    canvas.paint(region, np.maximum(lumen + 1, level - world_y(canvas, region)), np.float32(-960.0))


@lru_cache(maxsize=2)
def _colon_course(seed: int, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre line and radii of a patient's colon: the transverse part hangs down, the sigmoid lies elsewhere."""
    rng = np.random.Generator(np.random.PCG64([3003, seed]))
    points, radii = CURVES["colon"]
    along = np.linspace(0, 1, len(points))
    sag = np.exp(-(((along - 0.38) / 0.09) ** 2))[:, None] * [rng.normal(0, 14), 0, rng.normal(-12, 20)]
    sigmoid = np.exp(-(((along - 0.83) / 0.06) ** 2))[:, None] * rng.normal(0, (16, 8, 16))
    own = sum(
        np.sin(2 * np.pi * k * along + rng.uniform(0, 6.3))[:, None] * rng.normal(0, (2.5, 2.5, 3.5)) for k in (3, 5, 8)
    )
    swollen = 1 + 0.2 * np.sin(2 * np.pi * 3 * along + rng.uniform(0, 6.3))
    ends = np.clip(np.minimum(along, 1 - along) * 12, 0, 1)[:, None]
    return points + ends * (sag + sigmoid + own), radii * (1 + ends[:, 0] * (width * swollen - 1))


def _inside_belly(region: Region, distance: np.ndarray) -> np.ndarray:
    """Cut gut where it would press through the belly's wall; the pelvic floor stays open."""
    wall = cavity_distance(region.x, region.y, region.z) + 1.5
    return np.maximum(distance, np.where(region.z > -75, wall, np.float32(-9)))


def paint_stomach(canvas: Canvas, patient: Patient) -> None:
    """Full or collapsed, with folds that are thicker the emptier it is."""
    wall_mm = 4.0 + 3.0 * (1.2 - patient.width["stomach"])
    _paint_gut(canvas, patient, "stomach", wall_mm, STOMACH, "stomach_wall", (-55, 60, 140), 36.0, -960.0)


def paint_duodenum(canvas: Canvas, patient: Patient) -> None:
    _paint_gut(canvas, patient, "duodenum", 3.0, DUODENUM, "bowel_wall", (45, 58, 105), 26.0, -900.0)


def _paint_gut(
    canvas: Canvas, patient: Patient, name: str, wall_mm: float, label: int, wall: str,
    gas_around: tuple, gas_reach_mm: float, gas_hu: float,
) -> None:  # fmt: skip
    """Paint a stretch of gut: folded wall, fluid and gas on top of it."""
    points, radii = CURVES[name]
    region, distance, _ = canvas.tube(points, radii * patient.width[name], pad_mm=4)
    own = noise(region, "middle", float(label))
    distance = distance + 1.6 * noise(region, "coarse", float(label))
    if name == "stomach":
        distance = np.maximum(distance, (region.z - diaphragm_height(region.x, region.y) + 4) * np.float32(0.85))
    canvas.paint(region, distance, np.float32(patient.hu[wall]) + 4 * own, label)
    lumen = distance + wall_mm + 1.3 * np.maximum(own, 0)
    content = patient.hu["gut_fluid"] + 8 * own + (CONTRAST_HU if patient.anatomy.oral_contrast else 0)
    canvas.paint(region, lumen, content.astype(np.float32), label)
    gas = np.maximum(lumen + 1, gas_level(patient, gas_around, gas_reach_mm) - world_y(canvas, region))
    canvas.paint(region, gas, np.float32(gas_hu), label)


def paint_esophagus(canvas: Canvas, patient: Patient) -> None:
    """A flat tube with a few bubbles."""
    region, distance, _ = canvas.tube(*CURVES["esophagus"], stretch=(0.85, 1.2, 1), pad_mm=2)
    canvas.paint(region, distance, np.float32(patient.hu["esophagus"]), ESOPHAGUS)
    bubbles = 6.6 + 2.4 * noise(region, "middle")
    canvas.paint(region, distance + bubbles, np.float32(-500.0), None, opacity=0.7)


def world_y(canvas: Canvas, region: Region) -> np.ndarray:
    """Front-back world mm of a region's voxels, [1, Y, 1]: gas rises along it."""
    return canvas.world_y_mm[region.index[1]][None, :, None]


def gas_level(patient: Patient, atlas_mm, reach_mm: float) -> float:
    """World y (mm) above which a hollow organ around an atlas point holds gas."""
    middle = patient.deformation.to_world(np.array([atlas_mm], float))[0, 1]
    return middle + reach_mm * (1 - 1.5 * patient.gas)

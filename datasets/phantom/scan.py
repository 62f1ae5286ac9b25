"""Phantom CT, scans: field of view, voxels, noise, artefacts and file of one case, drawn from its seed."""

from dataclasses import dataclass, replace

import numpy as np

from datasets.phantom.patient import Patient
from datasets.phantom.variants import Artefacts

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
TRUNCATED_SHARE = 0.86  # of the body's width, of a field of view that is too narrow
MAX_STEP_MM = 7.0  # of breathing


@dataclass(frozen=True)
class Breathing:
    """A patient who breathes between slabs of slices: from each height on, everything lies at another depth.

    Real patients move along their axis too, which hides and repeats anatomy; here every place is seen exactly once.

    Args:
        heights_mm: [K] world z, ascending, where a new slab begins; forwards_mm: [K + 1], each slab's shift along y.
    """

    heights_mm: np.ndarray
    forwards_mm: np.ndarray

    def slab_of(self, z_mm: np.ndarray) -> np.ndarray:
        """Number of the slab that shows each height."""
        return np.searchsorted(self.heights_mm, z_mm, side="right")

    def moved(self, points_mm: np.ndarray, sign: int) -> np.ndarray:
        """Places [N, 3] moved as their slabs are (sign 1), or back (sign -1)."""
        points_mm = np.array(points_mm, float)
        points_mm[:, 1] += sign * self.forwards_mm[self.slab_of(points_mm[:, 2])]
        return points_mm


@dataclass(frozen=True)
class Scan:
    """How a patient is imaged and how the file is written.

    Args:
        shape: voxels along world x, y, z; spacing_mm likewise; origin_mm: world position of the first voxel, x, y, z.
        noise_hu: standard deviation of noise behind an average body; noise_mm: Gaussian sigma of its correlation.
        blur_mm: Gaussian sigma in the slice.
        table_mm: height of the table below the back (mm), None without one; circle: -3024 outside the field of view.
        orientation: axis codes of the file; storage: "int16", "int32", "float32" or "scaled" (int16 with intercept).
        breathing: None where the breath was held.
    """

    range_name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    noise_hu: float
    noise_mm: float
    blur_mm: float
    table_mm: float | None
    circle: bool
    orientation: str
    storage: str
    artefacts: Artefacts
    breathing: Breathing | None

    @property
    def axes_mm(self) -> tuple[np.ndarray, ...]:
        """World mm of the voxel centres along x, y, z."""
        return tuple(o + s * np.arange(n) for o, s, n in zip(self.origin_mm, self.spacing_mm, self.shape))

    @property
    def affine(self) -> np.ndarray:
        """Voxel index (x, y, z) -> world mm."""
        affine = np.diag([*self.spacing_mm, 1.0])
        affine[:3, 3] = self.origin_mm
        return affine

    def coarser(self, factor: float) -> "Scan":
        """The same field of view in larger voxels."""
        shape = tuple(max(int(n / factor), 16) for n in self.shape)
        spacing = tuple(s * n / m for s, n, m in zip(self.spacing_mm, self.shape, shape))
        return replace(self, shape=shape, spacing_mm=spacing)

    def to_atlas(self, patient: Patient, points_mm: np.ndarray) -> np.ndarray:
        """Atlas mm [N, 3] of world points [N, 3] of this scan."""
        points_mm = np.asarray(points_mm, float)
        if self.breathing is not None:
            points_mm = self.breathing.moved(points_mm, -1)
        return patient.deformation.to_atlas(points_mm)

    def from_atlas(self, patient: Patient, atlas_mm: np.ndarray) -> np.ndarray:
        """World mm [N, 3] in this scan of atlas points [N, 3]."""
        world = patient.deformation.to_world(atlas_mm)
        return world if self.breathing is None else self.breathing.moved(world, 1)

    def atlas_grid(self, patient: Patient, first: int, last: int) -> list[np.ndarray]:
        """Atlas x, y, z (float32 [X, Y, last - first] each) of the slices first..last (exclusive)."""
        xs, ys, zs = self.axes_mm
        zs = zs[first:last]
        if self.breathing is None:
            return patient.deformation.grid((xs, ys, zs))
        slab = self.breathing.slab_of(zs)
        parts = [
            patient.deformation.grid((xs, ys - self.breathing.forwards_mm[number], zs[slab == number]))
            for number in np.unique(slab)
        ]
        return [np.concatenate(axis, axis=2) for axis in zip(*parts)]

    def is_scanned(self, points_mm: np.ndarray, margin_vox: float = 0.0) -> np.ndarray:
        """bool [N]: which world points [N, 3] lie within the outermost voxels' centres, or so many voxels farther."""
        index = (np.asarray(points_mm) - self.origin_mm) / self.spacing_mm
        return ((index >= -margin_vox) & (index <= np.array(self.shape) - 1 + margin_vox)).all(axis=-1)

    @property
    def outside_circle(self) -> np.ndarray:
        """bool [X, Y]: outside of the round field of view."""
        fx, fy = np.linspace(-1, 1, self.shape[0])[:, None], np.linspace(-1, 1, self.shape[1])[None]
        return fx**2 + fy**2 > 1


def sample_scan(
    rng: np.random.Generator, patient: Patient, artefacts: Artefacts, full_size: bool, range_name: str | None = None
) -> Scan:
    """Draw a scan of a patient; `range_name` fixes the scan range instead of drawing it from SCAN_RANGES."""
    drawn = list(SCAN_RANGES)[rng.choice(len(SCAN_RANGES), p=RANGE_WEIGHTS)]
    range_name = range_name or drawn
    low, high = SCAN_RANGES[range_name]
    ends = patient.deformation.to_world(np.array([[0, 20, low], [0, 20, high]], float))[:, 2] + rng.normal(0, 6, 2)
    length = ends[1] - ends[0]
    field = float(np.clip(372 * float(patient.deformation.scale[0]) * rng.uniform(1.0, 1.22) + 18, 330, 500))
    if artefacts.truncation:
        field = TRUNCATED_SHARE * 330 * float(patient.deformation.scale[0])
    if full_size:
        pixels, thickness = 512, float(rng.choice((1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0)))
        thickness = max(thickness, length / 250)
    else:
        pixels = int(rng.choice((112, 120, 128, 136, 144)))
        thickness = float(rng.choice((1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)))
        thickness = min(max(thickness, round(length / 112, 2)), 5.0)
    spacing = (field / pixels, field / pixels, thickness)
    shape = (pixels, pixels, int(round(length / thickness)) + 1)
    middle = patient.deformation.to_world(np.array([[0.0, 12.0, 100.0]]))[0]
    centre = middle[:2] + rng.normal(0, (5.0, 7.0))
    origin = (centre[0] - field / 2, centre[1] - field / 2 - 8.0, ends[0])
    breathing = _sample_breathing(rng, ends)
    return Scan(
        range_name=range_name,
        shape=shape,
        spacing_mm=tuple(float(round(s, 6)) for s in spacing),
        origin_mm=tuple(float(round(o, 3)) for o in origin),
        noise_hu=float(rng.uniform(4, 15)),
        noise_mm=float(rng.uniform(0.4, 0.75)),
        blur_mm=float(rng.uniform(0.5, 1.0)),
        table_mm=float(rng.uniform(2, 26)) if rng.uniform() < 0.8 else None,
        circle=bool(rng.uniform() < 0.3) or artefacts.truncation,
        orientation=str(rng.choice(ORIENTATIONS, p=ORIENTATION_WEIGHTS)),
        storage=str(rng.choice(("int16", "int32", "float32", "scaled"), p=(0.6, 0.1, 0.15, 0.15))),
        artefacts=artefacts,
        breathing=breathing if artefacts.breathing else None,
    )


def _sample_breathing(rng: np.random.Generator, ends_mm: np.ndarray) -> Breathing:
    """One to four steps between slabs that are more and less inhaled."""
    share = np.sort(rng.uniform(0.1, 0.9, rng.integers(1, 5)))
    forwards_mm = np.concatenate([[0.0], rng.uniform(-MAX_STEP_MM, MAX_STEP_MM, len(share))])
    return Breathing(ends_mm[0] + share * (ends_mm[1] - ends_mm[0]), forwards_mm)

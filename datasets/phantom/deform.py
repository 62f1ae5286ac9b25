"""Phantom CT, patients' shapes: a smooth invertible map from a patient's world mm to atlas mm.

A patient is the atlas seen through `atlas = q + u(q)`, `q = (world - offset) / scale`, where u is a cubic B-spline on
a 20 mm lattice. u holds a small rotation, smooth random displacement at two scales, shifts and swellings of single
organs, and the stretch of the fat under the skin. Sampling shrinks u until its Jacobian determinant is above
`MIN_DETERMINANT`.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from datasets.phantom.atlas import MUSCLE, outline_distance

LATTICE_LOW_MM = np.array([-320.0, -300.0, -280.0])
LATTICE_SHAPE = (33, 31, 47)
LATTICE_STEP_MM = 20.0
MIN_DETERMINANT = 0.15
MAX_FAT_FACTOR = 2.8

# Centre, reach (Gaussian sigma), shift sigma (x, y, z) in mm, and relative swelling sigma, of what moves on its own.
ORGAN_MOTIONS = {
    "diaphragm": ((0, 15, 200), (190, 160, 60), (0, 0, 11), 0.0),
    "liver": ((70, 30, 160), (70, 70, 60), (4, 4, 5), 0.10),
    "spleen": ((-105, -15, 168), (38, 45, 48), (3, 5, 7), 0.16),
    "right_kidney": ((62, 2, 94), (38, 38, 62), (4, 4, 11), 0.08),
    "left_kidney": ((-64, 0, 106), (38, 38, 62), (4, 4, 11), 0.08),
    "stomach": ((-60, 50, 160), (50, 45, 50), (5, 5, 7), 0.12),
    "pancreas": ((0, 60, 112), (60, 35, 35), (4, 3, 6), 0.05),
    "gallbladder": ((56, 70, 112), (32, 32, 32), (4, 4, 5), 0.14),
    "heart": ((-15, 45, 268), (60, 55, 55), (4, 4, 5), 0.10),
    "bladder": ((0, 40, -104), (45, 42, 40), (2, 3, 4), 0.16),
    "belly": ((0, 115, 70), (110, 75, 110), (0, 10, 0), 0.0),
    "waist": ((0, 20, 60), (200, 200, 90), (0, 0, 0), 0.05),
    "chest": ((0, 0, 330), (200, 200, 90), (0, 0, 0), 0.05),
}
# Away from the spine: the belly's wall and bowel, and what lies in the fat behind and in front of the peritoneum.
FORWARD_WITH_FAT = {
    "belly": 1.0,
    "right_kidney": 0.5,
    "left_kidney": 0.5,
    "liver": 0.3,
    "stomach": 0.5,
    "pancreas": 0.3,
}


def _basis(t: np.ndarray, derivative: bool) -> np.ndarray:
    """The four cubic B-spline weights [N, 4] at fractions t in [0, 1) of a cell, or their derivatives by t."""
    if derivative:
        return np.stack([-((1 - t) ** 2) / 2, (3 * t * t - 4 * t) / 2, (-3 * t * t + 2 * t + 1) / 2, t * t / 2], -1)
    return np.stack(
        [(1 - t) ** 3 / 6, (3 * t**3 - 6 * t * t + 4) / 6, (-3 * t**3 + 3 * t * t + 3 * t + 1) / 6, t**3 / 6], -1
    )


@dataclass(frozen=True)
class Deformation:
    """A patient's map from world mm to atlas mm, its inverse and its Jacobian.

    Args:
        scale: [3] size of the patient relative to the atlas; offset_mm: [3] world position of the atlas origin.
        lattice_mm: [33, 31, 47, 3] B-spline coefficients of the displacement.
    """

    scale: np.ndarray
    offset_mm: np.ndarray
    lattice_mm: np.ndarray

    def _weights(self, axis: int, q: np.ndarray, derivative: bool) -> tuple[np.ndarray, np.ndarray]:
        """Index of the first of four lattice planes and their weights, for coordinates on one axis."""
        cell = (q - LATTICE_LOW_MM[axis]) / LATTICE_STEP_MM
        cell = np.clip(cell, 1.0, LATTICE_SHAPE[axis] - 2.001)
        first = np.floor(cell).astype(np.int64)
        weights = _basis(cell - first, derivative)
        return first - 1, weights / LATTICE_STEP_MM if derivative else weights

    def grid(self, axes_mm: tuple[np.ndarray, ...], derivative_axis: int | None = None) -> list[np.ndarray]:
        """Atlas x, y, z (float32 [X, Y, Z] each) on the grid spanned by three world axes (mm).

        With `derivative_axis` it gives the change of each atlas coordinate per mm of that axis of q instead.
        """
        qs = [(np.asarray(axis, float) - o) / s for axis, o, s in zip(axes_mm, self.offset_mm, self.scale)]
        field = self.lattice_mm.astype(np.float32)
        for axis in (2, 1, 0):  # smallest intermediate arrays first; fixed order of sums, so no rounding differs
            first, weights = self._weights(axis, qs[axis], derivative_axis == axis)
            view = [1, 1, 1, 1]
            view[axis] = len(first)
            field = sum(
                np.take(field, first + tap, axis=axis) * weights[:, tap].astype(np.float32).reshape(view)
                for tap in range(4)
            )
        out = []
        for axis in range(3):
            view = [1, 1, 1]
            view[axis] = -1
            identity = qs[axis].astype(np.float32).reshape(view)
            if derivative_axis is not None:
                identity = np.float32(axis == derivative_axis)
            out.append(np.ascontiguousarray(field[..., axis]) + identity)
        return out

    def to_atlas(self, points_mm: np.ndarray) -> np.ndarray:
        """Atlas mm [N, 3] of world points [N, 3]."""
        q = (np.asarray(points_mm, float) - self.offset_mm) / self.scale
        return q + self._displacement(q)[0]

    def _displacement(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Displacement [N, 3] and its Jacobian [N, 3 (component), 3 (by q axis)] at points q [N, 3]."""
        first, plain, slope = [], [], []
        for axis in range(3):
            start, weights = self._weights(axis, q[:, axis], False)
            first.append(start[:, None] + np.arange(4))
            plain.append(weights)
            slope.append(self._weights(axis, q[:, axis], True)[1])
        i, j, k = first
        values = self.lattice_mm[i[:, :, None, None], j[:, None, :, None], k[:, None, None, :]]  # [N, 4, 4, 4, 3]
        u = np.einsum("na,nb,nc,nabcd->nd", *plain, values)
        columns = [
            np.einsum("na,nb,nc,nabcd->nd", *(slope[m] if m == axis else plain[m] for m in range(3)), values)
            for axis in range(3)
        ]
        return u, np.stack(columns, axis=-1)

    def to_world(self, atlas_mm: np.ndarray, num_steps: int = 40) -> np.ndarray:
        """World mm [N, 3] of atlas points [N, 3]: Newton steps of at most 25 mm, to 1e-6 mm."""
        target = np.asarray(atlas_mm, float)
        q = target.copy()
        for _ in range(num_steps):
            u, slope = self._displacement(q)
            miss = target - q - u
            if np.abs(miss).max() < 1e-6:
                break
            step = np.linalg.solve(np.eye(3) + slope, miss[..., None])[..., 0]
            length = np.linalg.norm(step, axis=1, keepdims=True)
            q = q + step * np.minimum(1.0, 25.0 / np.maximum(length, 1e-9))
        return q * self.scale + self.offset_mm

    def min_determinant(self, step_mm: float = 10.0) -> float:
        """Smallest Jacobian determinant of world -> atlas over the lattice's inner domain, relative to 1 / scale."""
        axes = [
            np.arange(low + LATTICE_STEP_MM, low + (count - 2) * LATTICE_STEP_MM, step_mm) * s + o
            for low, count, s, o in zip(LATTICE_LOW_MM, LATTICE_SHAPE, self.scale, self.offset_mm)
        ]
        a, b, c = (self.grid(axes, derivative_axis=axis) for axis in range(3))
        cross = [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
        return float((cross[0] * c[0] + cross[1] * c[1] + cross[2] * c[2]).min())


def _smooth_noise(rng: np.random.Generator, scale_mm: float, std_mm: float) -> np.ndarray:
    """Random displacement whose features are about `scale_mm` (Gaussian sigma) and whose spread is `std_mm`."""
    pad = int(np.ceil(2 * scale_mm / LATTICE_STEP_MM))
    white = rng.standard_normal(tuple(n + 2 * pad for n in LATTICE_SHAPE) + (3,))
    smooth = gaussian_filter(white, (scale_mm / LATTICE_STEP_MM,) * 3 + (0,), truncate=3)
    smooth = smooth[pad:-pad, pad:-pad, pad:-pad]
    expected = (2 * np.sqrt(np.pi) * scale_mm / LATTICE_STEP_MM) ** -1.5  # spread of filtered white noise
    return smooth * (std_mm / expected)


def _organ_displacement(rng: np.random.Generator, points: np.ndarray, belly_mm: float) -> np.ndarray:
    """Shift and swelling of every entry of ORGAN_MOTIONS, as a sum of Gaussian bumps.

    Fat in the belly pushes FORWARD_WITH_FAT forwards, by these shares of `belly_mm`.
    """
    total = np.zeros_like(points)
    for name, (centre, reach, shift_std, swell_std) in ORGAN_MOTIONS.items():
        shift = rng.standard_normal(3) * shift_std
        shift[1] += belly_mm * FORWARD_WITH_FAT.get(name, 0.0)
        swell = np.clip(rng.standard_normal() * swell_std, -2 * swell_std, 2 * swell_std)
        away = points - np.asarray(centre, float)
        weight = np.exp(-0.5 * ((away / reach) ** 2).sum(-1, keepdims=True))
        total -= weight * (shift + swell * away)
    return total


def _fat_stretch(points: np.ndarray, fat_factor: float, belly_factor: float, breast_factor: float) -> np.ndarray:
    """Pull points outside the muscles towards them, so that fat becomes `fat_factor` times as thick as the atlas'.

    The belly's and the breasts' fat is thicker by their own factors on top.
    """
    x, y, z = (points[..., axis].astype(np.float32) for axis in range(3))
    beyond, direction = outline_distance(MUSCLE, x, y, z, with_direction=True)
    beyond = 60.0 * np.tanh(np.maximum(beyond, 0) / 60.0)
    front = np.clip(y / 120.0, 0, 1)
    belly = front * np.exp(-(((z - 30) / 120.0) ** 2))
    breast = np.clip((y - 30) / 40.0, 0, 1) * np.exp(-(((np.abs(x) - 78) / 42.0) ** 2) - ((z - 312) / 48.0) ** 2)
    factor = fat_factor * (1 + (belly_factor - 1) * belly) * (1 + (breast_factor - 1) * breast)
    factor = np.minimum(factor, MAX_FAT_FACTOR)
    return direction * (beyond * (1 / factor - 1))[..., None]


def sample_deformation(rng: np.random.Generator, fat_factor: float, size: np.ndarray, belly_mm: float) -> Deformation:
    """Draw a patient's shape.

    Args:
        rng: source of randomness; fat_factor: thickness of the fat under the skin relative to the atlas, 0.4 to 2.4.
        size: [3] width, depth and height relative to the atlas.
        belly_mm: how far the fat in the belly pushes it forwards.
    """
    axes = [low + LATTICE_STEP_MM * np.arange(count) for low, count in zip(LATTICE_LOW_MM, LATTICE_SHAPE)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    parts = _smooth_noise(rng, 75.0, 7.0) + _smooth_noise(rng, 38.0, 2.6)
    moved = _organ_displacement(rng, points, belly_mm)
    turn = rng.standard_normal(3) * np.radians([1.5, 1.5, 2.5])  # a small rotation around the middle of the torso
    parts += moved + np.cross(turn, points - np.array([0.0, 20.0, 130.0]))
    breast_factor = rng.uniform(1.3, 2.6) if rng.uniform() < 0.45 else 1.0
    fat = _fat_stretch(points, fat_factor, rng.uniform(0.8, 1.4), breast_factor)
    offset = rng.normal(0.0, (8.0, 12.0, 120.0))
    amount = 1.0
    while True:
        deformation = Deformation(np.asarray(size, float), offset, (amount * parts + fat).astype(np.float64))
        if deformation.min_determinant() > MIN_DETERMINANT:
            return deformation
        amount *= 0.85
        if amount < 0.05:  # only the fat is left: thin it towards the atlas' own
            fat *= 0.8

"""Phantom CT, drawing: signed-distance shapes painted with soft edges into voxels that know their atlas place.

All shapes are functions of ATLAS millimetres (x right, y anterior, z superior, origin in the fifth lumbar vertebra),
so that a shape lands in the right place of every deformed patient. Distances are negative inside. They are exact for
tubes and triangles and first-order for ellipsoids; the error is far below a voxel at the edge, where alone it
matters.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

from datasets.ct.geometry import mask_box

FAR_MM = 1.0e3
NOISE_CELL_MM = 1.6
NOISE_CELLS = 160
NOISE_SCALES_MM = {"coarse": 11.0, "middle": 4.0, "fine": 1.7}


@dataclass(frozen=True)
class Region:
    """A box of voxels: its slices in the canvas, views of the three atlas coordinates (mm) there, and `texture_mm`.

    `texture_mm` says where the patient's own textures lie in the noise tables.
    """

    index: tuple[slice, ...]
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    texture_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def is_empty(self) -> bool:
        return not self.x.size

    def within(self, other: "Region") -> tuple[slice, ...]:
        """Where this region's voxels stand in the arrays of a larger one."""
        return tuple(slice(p.start - r.start, p.stop - r.start) for p, r in zip(self.index, other.index))


class Canvas:
    """A block of voxels being painted: HU, labels, and the atlas coordinates of every voxel.

    Args:
        atlas_mm: three float32 arrays [X, Y, Z], the atlas x, y, z of each voxel.
        world_y_mm: float32 [Y], the patient's own front-back coordinate, which decides where gas rises to.
        softness_mm: width of the blend across an edge, about one voxel: the partial-volume effect.
        texture_mm: of the patient, see `Region`.
    """

    BLOCK = (8, 8, 4)

    def __init__(
        self,
        atlas_mm: tuple[np.ndarray, ...],
        world_y_mm: np.ndarray,
        softness_mm: float,
        texture_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ):
        self.texture_mm = texture_mm
        self.atlas_mm = atlas_mm
        self.world_y_mm = world_y_mm
        self.softness_mm = softness_mm
        self.shape = atlas_mm[0].shape
        self.hu = np.full(self.shape, -1000.0, np.float32)
        self.label = np.zeros(self.shape, np.uint8)
        self._block_low, self._block_high = zip(*(self._block_bounds(axis) for axis in atlas_mm))

    def _block_bounds(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest value in each block of voxels."""
        low = high = values
        for axis, step in enumerate(self.BLOCK):
            starts = np.arange(0, self.shape[axis], step)
            low = np.minimum.reduceat(low, starts, axis=axis)
            high = np.maximum.reduceat(high, starts, axis=axis)
        return low, high

    def region(self, low_mm, high_mm, within: Region | None = None) -> Region:
        """The smallest box of whole blocks that holds every voxel between two atlas corners (mm); perhaps an empty one.

        `within`, an untrimmed region that is known to hold them, makes the search shorter.
        """
        first = (0, 0, 0)
        blocks = slice(None)
        if within is not None:
            first = tuple(part.start // step for part, step in zip(within.index, self.BLOCK))
            blocks = tuple(slice(f, -(-part.stop // step)) for f, part, step in zip(first, within.index, self.BLOCK))
        active = self._block_low[2][blocks] <= high_mm[2] + self.softness_mm
        active &= self._block_high[2][blocks] >= low_mm[2] - self.softness_mm
        for axis in (0, 1):
            active &= self._block_low[axis][blocks] <= high_mm[axis] + self.softness_mm
            active &= self._block_high[axis][blocks] >= low_mm[axis] - self.softness_mm
        box = (slice(0, 0),) * 3
        if active.any():
            box = tuple(
                slice((low + f) * step, min((high + f) * step, size))
                for low, high, f, step, size in zip(*mask_box(active), first, self.BLOCK, self.shape)
            )
        return Region(box, *(axis[box] for axis in self.atlas_mm), self.texture_mm)

    def trim(self, region: Region, distance: np.ndarray, *others: np.ndarray, pad_mm: float = 0.0) -> tuple:
        """Cut a region and its arrays to the box where `distance` is below `pad_mm` and an edge's softness."""
        near = distance < pad_mm + self.softness_mm
        box = tuple(map(slice, *mask_box(near))) if near.any() else (slice(0, 0),) * 3
        index = tuple(slice(r.start + b.start, r.start + b.stop) for r, b in zip(region.index, box))
        places = (values[box] for values in (region.x, region.y, region.z))
        return Region(index, *places, self.texture_mm), distance[box], *(a[box] for a in others)

    def around(self, centre_mm, radius_mm) -> Region:
        """The voxels within `radius_mm` (a number or one per axis) of an atlas point."""
        centre, radius = np.asarray(centre_mm, float), np.asarray(radius_mm, float)
        return self.region(centre - radius, centre + radius)

    def paint(self, region: Region, distance: np.ndarray, hu, label: int | None = 0, opacity: float = 1.0) -> None:
        """Blend `hu` over the region where `distance` (mm) is negative; `label` None leaves the labels alone."""
        weight = np.clip(0.5 - distance * (1.0 / self.softness_mm), 0.0, 1.0)
        if opacity != 1.0:
            weight *= opacity
        target = self.hu[region.index]
        target += weight * (hu - target)
        if label is not None:
            self.label[region.index][distance < 0] = label

    def tube(self, points_mm: np.ndarray, radii_mm: np.ndarray, stretch=(1.0, 1.0, 1.0), pad_mm: float = 0.0):
        """Distance to a tube along a polyline, computed near each of its segments only.

        Args:
            points_mm: [N, 3] centre line; radii_mm: [N] radius at each point.
            stretch: factors on x, y, z before distances are taken (2 in y makes the section half as deep).
            pad_mm: how far outside the tube the distance must still be right.
        Returns:
            Region, distance and position, the arc length (mm) along the centre line of the nearest point.
        """
        reach = (float(np.max(radii_mm)) + pad_mm) / np.asarray(stretch)
        region = self.region(points_mm.min(0) - reach, points_mm.max(0) + reach)
        distance = np.full(region.x.shape, FAR_MM, np.float32)
        position = np.zeros(region.x.shape, np.float32)
        arc_mm = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points_mm, axis=0), axis=1))])
        for k in range(len(points_mm) - 1):
            a, b = points_mm[k], points_mm[k + 1]
            part = self.region(np.minimum(a, b) - reach, np.maximum(a, b) + reach, region)
            if part.is_empty:  # most segments lie beside a thin slab
                continue
            inner = part.within(region)
            found, t = capsule(part, a, b, radii_mm[k], radii_mm[k + 1], stretch)
            nearer = found < distance[inner]
            np.copyto(distance[inner], found, where=nearer)
            np.copyto(position[inner], arc_mm[k] + t * np.float32(arc_mm[k + 1] - arc_mm[k]), where=nearer)
        return self.trim(region, distance, position, pad_mm=pad_mm)

    def plates(self, triangles_mm, thickness_mm: float) -> tuple[Region, np.ndarray]:
        """Distance to a sheet made of triangles [N][3 corners][3], computed near each of them only."""
        corners = np.asarray(triangles_mm, float)
        reach = thickness_mm / 2 + 1
        region = self.region(corners.min((0, 1)) - reach, corners.max((0, 1)) + reach)
        distance = np.full(region.x.shape, FAR_MM, np.float32)
        for corner in corners:
            part = self.region(corner.min(0) - reach, corner.max(0) + reach, region)
            inner = distance[part.within(region)]
            np.minimum(inner, triangle(part, *corner, thickness_mm), out=inner)
        return self.trim(region, distance)

    def paint_segments(self, segments, hu: float, only_label: int | None = None) -> None:
        """Paint a tree of tubes (start, stop, radius, radius) over the HU; with `only_label` inside that organ only."""
        for start, stop, first, last in segments:
            reach = max(first, last)
            region = self.region(np.minimum(start, stop) - reach, np.maximum(start, stop) + reach)
            if region.is_empty:
                continue
            distance = capsule(region, start, stop, first, last)[0]
            if only_label is not None:
                distance = np.where(self.label[region.index] == only_label, distance, np.float32(FAR_MM))
            self.paint(region, distance, np.float32(hu), None)

    def paint_tube(self, points_mm, radii_mm, hu, label: int | None = 0, stretch=(1.0, 1.0, 1.0)) -> None:
        """Paint a tube in one value."""
        region, distance, _ = self.tube(np.asarray(points_mm, float), np.asarray(radii_mm, float), stretch)
        self.paint(region, distance, hu, label)

    def paint_ellipsoid(self, centre_mm, radii_mm, hu, label: int | None = 0) -> None:
        """Paint an ellipsoid with axes along x, y, z in one value."""
        region = self.around(centre_mm, radii_mm)
        self.paint(region, ellipsoid(region, centre_mm, radii_mm), hu, label)


def capsule(region: Region, a, b, radius_a: float, radius_b: float, stretch=(1.0, 1.0, 1.0)):
    """Distance to a segment with linearly changing radius, and the position 0..1 along it."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    sx, sy, sz = (np.float32(s) for s in stretch)
    px, py, pz = (region.x - a[0]) * sx, (region.y - a[1]) * sy, (region.z - a[2]) * sz
    ux, uy, uz = (b - a) * np.asarray(stretch, np.float32)
    length2 = max(float(ux * ux + uy * uy + uz * uz), 1e-6)
    t = np.clip((px * ux + py * uy + pz * uz) * np.float32(1 / length2), 0, 1)
    px = px - t * ux
    py = py - t * uy
    pz = pz - t * uz
    radius = np.float32(radius_a) + t * np.float32(radius_b - radius_a)
    return np.sqrt(px * px + py * py + pz * pz) - radius, t


def ellipsoid_local(x: np.ndarray, y: np.ndarray, z: np.ndarray, radii_mm) -> np.ndarray:
    """First-order distance to an ellipsoid at the origin of the given coordinates."""
    qx, qy, qz = (v * np.float32(1 / r) for v, r in zip((x, y, z), radii_mm))
    k0 = np.sqrt(qx * qx + qy * qy + qz * qz)
    qx, qy, qz = (q * np.float32(1 / r) for q, r in zip((qx, qy, qz), radii_mm))
    return k0 * (k0 - 1) / (np.sqrt(qx * qx + qy * qy + qz * qz) + np.float32(1e-6))


def ellipsoid(region: Region, centre_mm, radii_mm) -> np.ndarray:
    """Distance to an ellipsoid with axes along x, y, z."""
    x, y, z = (v - np.float32(c) for v, c in zip((region.x, region.y, region.z), centre_mm))
    return ellipsoid_local(x, y, z, radii_mm)


def triangle(region: Region, a, b, c, thickness_mm: float) -> np.ndarray:
    """Distance to a flat plate: a triangle swollen by half its thickness."""
    a, b, c = (np.asarray(v, np.float32) for v in (a, b, c))
    p = np.stack([region.x, region.y, region.z], axis=-1)
    normal = np.cross(b - a, c - a)
    normal = normal / np.linalg.norm(normal)
    inside = np.ones(region.x.shape, bool)
    edge = np.full(region.x.shape, FAR_MM, np.float32)
    for start, stop in ((a, b), (b, c), (c, a)):
        inside &= ((p - start) * np.cross(normal, stop - start)).sum(-1) >= 0
        edge = np.minimum(edge, capsule(region, start, stop, 0.0, 0.0)[0])
    plane = np.abs(((p - a) * normal).sum(-1))
    return np.where(inside, plane, edge) - np.float32(thickness_mm / 2)


def smooth_union(distances: Iterable[np.ndarray], blend_mm: float) -> np.ndarray:
    """Union of distances, one after the other, whose creases are rounded over about `blend_mm`."""

    def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        h = np.maximum(blend_mm - np.abs(first - second), 0) * np.float32(1 / blend_mm)
        return np.minimum(first, second) - h * h * np.float32(blend_mm / 4)

    return reduce(joined, distances)


def curve(points_and_radii, step_mm: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth centre line through knots (x, y, z, radius): points [N, 3] and radii [N], about `step_mm` apart."""
    knots = np.asarray(points_and_radii, float)
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(knots[:, :3], axis=0), axis=1))])
    count = max(2, int(round(along[-1] / step_mm)) + 1)
    samples = CubicSpline(along, knots)(np.linspace(0, along[-1], count))
    return samples[:, :3], np.maximum(samples[:, 3], 0.5)


@lru_cache(maxsize=4)
def noise_table(scale: str) -> np.ndarray:
    """A periodic unit-variance noise cube [160, 160, 160] with 1.6 mm cells; the same in every process."""
    seed = sorted(NOISE_SCALES_MM).index(scale)
    white = np.random.Generator(np.random.PCG64(9100 + seed)).standard_normal((NOISE_CELLS,) * 3, dtype=np.float32)
    smooth = gaussian_filter(white, NOISE_SCALES_MM[scale] / NOISE_CELL_MM, mode="wrap", truncate=3)
    return smooth / smooth.std()


def noise(region: Region, scale: str, shift_mm: float = 0.0) -> np.ndarray:
    """Unit-variance texture at the region's atlas coordinates, the patient's own (`Region.texture_mm`).

    Args:
        scale: "coarse" (about 30 mm from crest to crest), "middle" (10 mm) or "fine" (4 mm).
        shift_mm: another texture of the same kind for another part.
    """
    table = noise_table(scale)
    flat = None
    for values, offset in zip((region.x, region.y, region.z), region.texture_mm):
        start = np.float32(offset + shift_mm + 2560.0)
        cell = ((values + start) * np.float32(1 / NOISE_CELL_MM)).astype(np.int32) % NOISE_CELLS
        flat = cell if flat is None else flat * NOISE_CELLS + cell
    return table.ravel().take(flat)

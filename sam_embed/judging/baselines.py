"""Correspondence without learning, for comparison: the body's box, and an affine fit of the body masks.

Both know only the patient's outline. Whoever matches anatomy must beat them: they get the rough place for free in
volumes that show the same part of the body, and fail where scan ranges and habitus differ.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage, optimize

from datasets.ct.geometry import body_mask, index_to_world, mask_box, resample, spacing_of, world_to_index
from datasets.ct.nifti import Volume

MASK_SPACING_MM = (8.0, 8.0, 8.0)
MARGIN_VOX = 4  # of outside kept around the mask, so that the distance map knows both sides of the surface
FAR_MM = 40.0  # distances to the surface are cut here: what is far inside or outside says nothing about the fit
NUM_SAMPLES = 2000
UNIT_MM = 100.0  # scales the linear part of the affine, so that all 12 parameters have like size


@dataclass(frozen=True, eq=False)
class Body:
    """The outline of one patient.

    Attributes:
        mask: bool [D, H, W] at 8 mm, True inside the patient; its box touches all sides but for a margin.
        affine: float64 [4, 4], index -> world mm.
    """

    mask: np.ndarray
    affine: np.ndarray

    @cached_property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner of the mask's box, index [3] each, on the voxels' outer faces."""
        start, stop = mask_box(self.mask)
        return start - 0.5, stop - 0.5

    @cached_property
    def distance_mm(self) -> np.ndarray:
        """float32 [D, H, W]: signed distance to the surface, positive outside, cut at +-FAR_MM."""
        spacing = spacing_of(self.affine)
        outside = ndimage.distance_transform_edt(~self.mask, sampling=spacing)
        inside = ndimage.distance_transform_edt(self.mask, sampling=spacing)
        half = min(spacing) / 2  # the surface runs between voxels
        signed = np.where(self.mask, half - inside, outside - half)
        return np.clip(signed, -FAR_MM, FAR_MM).astype(np.float32)


def find_body(volume: Volume) -> Body:
    """The outline of the patient in a CT volume.

    Raises:
        ValueError: nothing in the volume is denser than air.
    """
    array, affine = resample(volume.array, volume.affine, MASK_SPACING_MM)
    mask = body_mask(array, MASK_SPACING_MM)
    if not mask.any():
        raise ValueError(f"{volume.path}: no patient found, every voxel is air")
    affine = affine.copy()
    affine[:3, 3] = index_to_world(affine, [-MARGIN_VOX] * 3)
    return Body(np.pad(mask, MARGIN_VOX), affine)


def match_by_box(query: Body, key: Body, points_mm: np.ndarray) -> np.ndarray:
    """The same relative position in the body's box: world mm [N, 3] in the key of points [N, 3] in the query."""
    (query_low, query_high), (key_low, key_high) = query.box, key.box
    relative = (world_to_index(query.affine, points_mm) - query_low) / (query_high - query_low)
    return index_to_world(key.affine, key_low + relative * (key_high - key_low))


def fit_affine(query: Body, key: Body) -> np.ndarray:
    """The affine map [4, 4], query mm -> key mm, that brings the two surfaces together.

    Least squares of the difference of both signed distance maps at points in and around the query's body, over all 12
    parameters, started from the map between the two boxes.
    """
    low, high = query.box
    samples = np.random.default_rng(0).uniform(low - 2, high + 2, (NUM_SAMPLES, 3))
    wanted = ndimage.map_coordinates(query.distance_mm, samples.T, order=1, mode="nearest")
    centre = index_to_world(query.affine, (low + high) / 2)
    basis = np.concatenate([(index_to_world(query.affine, samples) - centre) / UNIT_MM, np.ones((NUM_SAMPLES, 1))], 1)
    to_index = np.linalg.inv(key.affine)[:3, :3]
    gradient = np.stack(np.gradient(key.distance_mm))  # per voxel

    def key_index(parameters: np.ndarray) -> np.ndarray:
        return world_to_index(key.affine, basis @ parameters.reshape(4, 3))

    def residuals(parameters: np.ndarray) -> np.ndarray:
        found = ndimage.map_coordinates(key.distance_mm, key_index(parameters).T, order=1, mode="nearest")
        return found - wanted

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        index = key_index(parameters).T
        slope = np.stack([ndimage.map_coordinates(part, index, order=1, mode="nearest") for part in gradient], axis=1)
        return (basis[:, :, None] * (slope @ to_index)[:, None, :]).reshape(NUM_SAMPLES, 12)

    # The box map is itself affine; reading it off at a centre and three unit steps gives its parameters.
    corners = centre + UNIT_MM * np.concatenate([np.eye(3), np.zeros((1, 3))])
    start = match_by_box(query, key, corners)
    start[:3] -= start[3]
    best = optimize.least_squares(residuals, start.ravel(), jacobian, method="lm", ftol=1e-3, xtol=1e-3).x.reshape(4, 3)
    affine = np.eye(4)
    affine[:3, :3] = best[:3].T / UNIT_MM
    affine[:3, 3] = best[3] - affine[:3, :3] @ centre
    return affine


def match_by_affine(query: Body, key: Body, points_mm: np.ndarray) -> np.ndarray:
    """World mm [N, 3] in the key of points [N, 3] in the query, by `fit_affine`."""
    affine = fit_affine(query, key)
    return np.asarray(points_mm) @ affine[:3, :3].T + affine[:3, 3]

"""Displacement fields: ITK reads them as they are meant, and moves volumes by them."""

import numpy as np
import pytest
import SimpleITK

from datasets.ct.displacement import warp, write_displacement
from datasets.ct.geometry import index_to_world, world_to_index
from datasets.ct.nifti import Volume

# Anisotropic voxels, tilted by a few degrees: every axis and sign can go wrong.
TURN = np.array([[1, 0.1, 0], [-0.1, 1, 0.05], [0, -0.05, 1]])
TURN, _ = np.linalg.qr(TURN)


def grid(spacing, origin) -> np.ndarray:
    """Affine of a grid in the canonical orientation (S, P, L), slightly turned."""
    affine = np.eye(4)
    affine[:3, :3] = TURN @ np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]) * spacing
    affine[:3, 3] = origin
    return affine


def ramp(shape, affine, slope) -> np.ndarray:
    """HU that grow linearly in world space."""
    points = index_to_world(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    return points @ slope


@pytest.fixture
def field():
    affine = grid((8.0, 10.0, 6.0), (10.0, -20.0, 30.0))
    nodes = index_to_world(affine, np.stack(np.meshgrid(*map(np.arange, (7, 6, 8)), indexing="ij"), -1))
    shift = np.array([12.0, -7.0, 5.0])
    return nodes, shift + 0.1 * (nodes - nodes.mean(axis=(0, 1, 2))), affine


def test_itk_reads_the_field_as_a_transform_of_world_points(field, tmp_path):
    nodes, displacement, affine = field
    write_displacement(tmp_path / "field.nii.gz", displacement, affine)
    image = SimpleITK.Cast(SimpleITK.ReadImage(str(tmp_path / "field.nii.gz")), SimpleITK.sitkVectorFloat64)
    assert image.GetDimension() == 3 and image.GetNumberOfComponentsPerPixel() == 3
    transform = SimpleITK.DisplacementFieldTransform(image)
    lps = np.array([-1, -1, 1])
    for node in [(0, 0, 0), (3, 2, 5), (6, 5, 7)]:
        moved = np.array(transform.TransformPoint((nodes[node] * lps).tolist())) * lps
        np.testing.assert_allclose(moved, nodes[node] + displacement[node], atol=1e-3)


def test_a_warped_volume_shows_at_each_place_what_lies_at_its_goal(field):
    _, displacement, affine = field
    slope = np.array([3.0, -2.0, 4.0])
    moving_affine = grid((3.0, 4.0, 5.0), (-40.0, -120.0, -40.0))
    shape = (60, 50, 50)
    moving = Volume(np.rint(ramp(shape, moving_affine, slope)).astype(np.int16), moving_affine, "moving")
    fixed_affine, fixed_shape = grid((5.0, 5.0, 3.0), (12.0, -25.0, 33.0)), (8, 8, 12)
    found = warp(moving, displacement, affine, fixed_shape, fixed_affine)
    assert found.shape == fixed_shape and found.dtype == np.int16
    points = index_to_world(fixed_affine, np.stack(np.meshgrid(*map(np.arange, fixed_shape), indexing="ij"), -1))
    middle = index_to_world(affine, np.array([3.0, 2.5, 3.5]))
    goals = points + np.array([12.0, -7.0, 5.0]) + 0.1 * (points - middle)
    inside = (world_to_index(moving_affine, goals) > 1).all(-1)
    inside &= (world_to_index(moving_affine, goals) < np.array(shape) - 2).all(-1)
    place = world_to_index(affine, points)
    inside &= ((place >= 0) & (place <= np.array(displacement.shape[:3]) - 1)).all(-1)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(found[inside], (goals @ slope)[inside], atol=1.01)


def test_what_lies_beyond_the_moving_volume_is_air(field):
    _, displacement, affine = field
    moving = Volume(np.full((4, 4, 4), 50, dtype=np.int16), grid((1.0, 1.0, 1.0), (900.0, 0.0, 0.0)), "moving")
    assert (warp(moving, displacement, affine, (3, 3, 3), affine) == -1024).all()

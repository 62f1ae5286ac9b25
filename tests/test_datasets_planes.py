"""Planes of a CT: rows from the top of the picture, and their proportions; the window of intensities."""

import numpy as np
import pytest
import torch

from datasets.ct.intensity import window_hu
from datasets.ct.planes import PLANES, cut_plane, pixel_aspect
from datasets.samples.augment import window


def test_planes_show_the_head_or_the_front_on_top_and_the_left_or_the_back_on_the_right():
    volume = np.arange(4 * 5 * 6).reshape(4, 5, 6)  # grows to superior, posterior, left
    assert np.array_equal(cut_plane(volume, "axial", 1), volume[1])
    coronal, sagittal = cut_plane(volume, "coronal", 3), cut_plane(volume, "sagittal", 2)
    assert np.array_equal(coronal[0], volume[3, 3]) and np.array_equal(coronal[-1], volume[0, 3])
    assert np.array_equal(sagittal[0], volume[3, :, 2]) and np.array_equal(sagittal[-1], volume[0, :, 2])


@pytest.mark.parametrize("plane", list(PLANES))
def test_a_plane_goes_through_an_index_a_voxel_or_the_middle(plane):
    volume = np.random.default_rng(0).random((4, 5, 6, 3))
    voxel = (3, 1, 4)
    through = cut_plane(volume, plane, voxel)
    assert np.array_equal(through, cut_plane(volume, plane, voxel[PLANES[plane].cut]))
    assert np.array_equal(through, cut_plane(volume, plane, np.array(voxel)))
    assert np.array_equal(cut_plane(volume, plane), cut_plane(volume, plane, (2, 2, 3)))
    assert through.ndim == 3 and through.shape[2] == 3


def test_the_aspect_is_that_of_the_voxels_faces():
    aspects = [pixel_aspect(plane, (5.0, 2.0, 1.0)) for plane in ("axial", "coronal", "sagittal")]
    assert aspects == [2.0, 5.0, 2.5]


def test_the_window_is_the_same_for_arrays_and_tensors_to_the_last_bit():
    hu = np.random.default_rng(0).integers(-1024, 3072, (7, 8, 9)).astype(np.int16)
    kept = hu.copy()
    made = window_hu(hu, -125.0, 225.5)
    assert made.dtype == np.float32 and made.min() == 0 and made.max() == 1 and np.array_equal(hu, kept)
    assert np.array_equal(made, window_hu(torch.from_numpy(hu), -125.0, 225.5).numpy())
    assert np.array_equal(made, window(hu, -125.0, 225.5)[0].numpy())
    assert np.allclose(made, np.clip((hu + 125.0) / 350.5, 0, 1), atol=1e-6)
    values = torch.from_numpy(hu).float()
    window_hu(values, 0.0, 1.0)
    assert np.array_equal(values.numpy(), kept)

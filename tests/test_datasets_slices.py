"""Crops of depth 1: where slices lie under every pairing rule, and what is made of them."""

import numpy as np
import pytest
import torch

from datasets.ct.geometry import world_to_index
from datasets.samples.augment import gaussian_blur
from datasets.samples.crops import crop_iou, start_at
from tests.fakes import make_dataset, make_store

ROI = (1, 24, 32)


def starts_of(dataset, index: int) -> np.ndarray:
    """The first voxel of every crop of a sample [V, 3], in its own volume."""
    places = dataset.places(index)
    records = [dataset.store.record(name) for name in places.names]
    return np.array([start_at(record, mm, ROI) for record, mm in zip(records, places.points_mm)])


@pytest.mark.parametrize("iou_range", [(0.3, 0.6), (0.6, 1.0), (0.0, 1.0), (0.0001, 0.3), (0.0, 0.0)])
def test_iou_crops_lie_in_one_slice_any_slice_of_the_body(iou_range):
    dataset = make_dataset("iou", make_store(2, shape=(20, 64, 80)), roi=ROI, iou_range=iou_range)
    num, planes = 400, []
    for index in range(num):
        places, (first, second) = dataset.places(index), starts_of(dataset, index)
        assert not places.is_fallback and places.names[0] == places.names[1]
        assert first[0] == second[0]
        iou = crop_iou(first[1:], second[1:], ROI[1:])
        assert iou == pytest.approx(places.score) and iou_range[0] <= iou <= iou_range[1]
        assert (first >= 0).all() and (first + ROI <= (20, 64, 80)).all()
        planes.append(first[0])
    counts = np.bincount(planes, minlength=20)
    assert len(counts) == 20 and ((counts - num / 20) ** 2 / (num / 20)).sum() < 50  # chi-squared, 19 degrees


def test_a_small_body_lets_slices_overhang_within_their_plane_alone():
    dataset = make_dataset("iou", make_store(1, shape=(20, 26, 34)), roi=ROI, iou_range=(0.3, 0.6))
    starts = np.array([starts_of(dataset, index) for index in range(100)])
    assert not any(dataset.places(index).is_fallback for index in range(100))
    assert (starts[..., 0].min(), starts[..., 0].max()) == (0, 19)
    assert starts[..., 1].min() < 0 and starts[..., 1].min() >= -6 and starts[..., 1].max() <= 26 - 24 + 6


def test_a_fallback_stays_in_its_slice():
    """Bodies of one crop: no second crop overlaps it little enough."""
    dataset = make_dataset("iou", make_store(1, shape=(20, 24, 32)), roi=ROI, iou_range=(0.0, 0.1))
    found = [(dataset.places(index), starts_of(dataset, index)) for index in range(30)]
    assert all(places.is_fallback and first[0] == second[0] for places, (first, second) in found)
    assert len({first[0] for _, (first, _) in found}) > 5


def test_matched_slices_show_the_same_plane_of_two_cases():
    dataset, planes = make_dataset("sam", roi=ROI, jitter_mm=6.0), set()
    for index in range(60):
        places = dataset.places(index)
        one, other = (
            world_to_index(dataset.store.record(name).affine, mm) for name, mm in zip(places.names, places.points_mm)
        )
        assert not places.is_fallback and places.names[0] != places.names[1]
        assert abs(one[0] - other[0]) < 0.01 and -0.5 <= one[0] <= 39.5
        planes.add(round(one[0]))
    assert len(planes) > 20


def test_random_slices_lie_anywhere_in_two_cases():
    dataset = make_dataset("random", roi=ROI)
    starts = np.array([starts_of(dataset, index) for index in range(80)])
    assert abs(np.corrcoef(starts[:, 0, 0], starts[:, 1, 0])[0, 1]) < 0.4
    assert starts[..., 0].min() < 4 and starts[..., 0].max() > 35


def test_a_grid_of_slices_lies_in_one_plane():
    dataset = make_dataset("grid", make_store(1, shape=(9, 80, 100)), roi=ROI, views={"view": "augmented"})
    for index in range(9):
        assert len(set(starts_of(dataset, index)[:, 0])) == 1
        torch.testing.assert_close(dataset[index]["overlap"].sum(1), torch.ones(2))


def test_blur_of_a_slice_is_that_of_its_plane():
    one = torch.rand(1, 1, 24, 32, generator=torch.Generator().manual_seed(0))
    blurred, of_many = gaussian_blur(one, [0.9] * 3), gaussian_blur(one.expand(1, 9, 24, 32), [0.9] * 3)
    torch.testing.assert_close(blurred, of_many[:, 4:5])
    assert blurred.std() < 0.8 * one.std()


def test_a_sample_of_slices_is_a_volume_of_depth_1():
    sample = make_dataset("iou", roi=ROI)[0]
    assert {name: tuple(sample[name].shape) for name in ("crop", "student", "mask")} == {
        **{"crop": (2, 1, *ROI), "student": (2, 1, *ROI), "mask": (2, 1, 3, 4)}
    }
    assert sample["mask"].sum() == 2 * 9

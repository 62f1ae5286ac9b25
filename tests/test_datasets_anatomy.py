"""Points of a sample's crops: where they lie, what is read there, and their matches in the other crop."""

import numpy as np
import pytest
import torch

from datasets.ct.geometry import index_to_world, world_to_index
from datasets.samples.anatomy import CYCLE_MM, AnatomyPoints, AnatomyRequest, match_crops
from datasets.samples.augment import AugmentOptions
from datasets.samples.crops import CropOptions, start_at
from datasets.samples.loader import make_pair_loader
from tests.fakes import ROI, make_dataset, make_store

NUM_POINTS = 20


class PlaceReader:
    """The vector of a place is its world point; the patient is what lies at x above a threshold."""

    def __init__(self, x_above_mm: float = -np.inf) -> None:
        self.x_above_mm = x_above_mm

    def __getitem__(self, name: str) -> "PlaceReader":
        return self

    def inside(self, points_mm: np.ndarray) -> np.ndarray:
        return points_mm[:, 0] > self.x_above_mm

    def vectors(self, points_mm: np.ndarray) -> np.ndarray:
        return points_mm.astype(np.float32)


class DirectionReader(PlaceReader):
    """Unit vectors that change with the index in the volume: alike in all cases of `make_store`."""

    def __init__(self, store, name: str = "") -> None:
        super().__init__()
        self.store, self.name = store, name

    def __getitem__(self, name: str) -> "DirectionReader":
        return DirectionReader(self.store, name)

    def vectors(self, points_mm: np.ndarray) -> np.ndarray:
        phases = world_to_index(self.store.record(self.name).affine, points_mm) * 0.05
        return (np.concatenate([np.sin(phases), np.cos(phases)], axis=1) / np.sqrt(3)).astype(np.float32)


def with_points(reader=None, num_candidates: int = 0, **options):
    request = AnatomyRequest(NUM_POINTS, num_candidates)
    return make_dataset(anatomy=AnatomyPoints(reader or PlaceReader(), request), **options)


def interpolated(crop: torch.Tensor, points_vox: torch.Tensor) -> np.ndarray:
    """A crop's values [D, H, W] between its voxels, by an obvious loop over corners."""
    values = []
    for point in points_vox.double().numpy():
        low = np.clip(np.floor(point), 0, np.array(crop.shape) - 2).astype(int)
        share = point - low
        corners = [
            (np.prod(np.where(corner, share, 1 - share)), crop[tuple(low + corner)].item())
            for corner in np.ndindex(2, 2, 2)
        ]
        values.append(sum(weight * value for weight, value in corners))
    return np.array(values)


@pytest.mark.parametrize("pairing", ["sam", "iou", "random"])
def test_points_lie_where_the_image_says_that_they_lie(pairing):
    """Voxels spell out their place, x + 3 y + 5 z mm; so must the augmented views, which no method moves."""
    low, high = -4000, 4000
    crops = CropOptions(a_min=low, a_max=high)
    dataset = with_points(pairing=pairing, crops=crops, augment=AugmentOptions.off(), jitter_mm=0)
    checked = 0
    for index in range(6):
        sample = dataset[index]
        for crop in range(2):
            record = dataset.store.record(dataset.case_names(sample)[crop])
            start = start_at(record, sample["centre_mm"][crop].numpy(), ROI)
            points_vox, points_mm = sample["points_vox"][crop], sample["points_mm"][crop]
            assert (points_vox >= -0.5).all() and (points_vox < torch.tensor(ROI) - 0.5).all()
            np.testing.assert_allclose(index_to_world(record.affine, start + points_vox.numpy()), points_mm, atol=1e-3)
            at = start + points_vox.numpy()
            is_in_volume = ((at >= 0) & (at <= np.array(record.shape) - 1)).all(axis=1)
            # The edge of the crop has half a voxel without a neighbour on one side.
            is_between = ((points_vox >= 0) & (points_vox <= torch.tensor(ROI) - 1)).all(dim=1).numpy() & is_in_volume
            for name in ("crop", "student", "teacher"):
                hu = interpolated(sample[name][crop, 0], points_vox[is_between]) * (high - low) + low
                expected = points_mm.double().numpy()[is_between] @ [1.0, 3.0, 5.0]
                np.testing.assert_allclose(hu, expected, atol=1.0)  # HU are whole numbers
            checked += is_between.sum()
    assert checked > 100


def test_the_entries_of_a_sample():
    sample = with_points()[3]
    assert sample["points_vox"].shape == sample["points_mm"].shape == (2, NUM_POINTS, 3)
    torch.testing.assert_close(sample["anatomy"], sample["points_mm"])
    assert sample["has_anatomy"].tolist() == [True, True]
    assert all(sample[name].dtype == torch.float32 for name in ("points_vox", "points_mm", "anatomy"))
    assert not sample["points_vox"][0].equal(sample["points_vox"][1])
    assert not any(name.startswith("match") for name in sample)


def test_points_change_nothing_else_of_a_sample():
    plain, more = make_dataset()[4], with_points()[4]
    assert more.keys() - plain.keys() == {"points_vox", "points_mm", "anatomy", "has_anatomy"}
    assert all(torch.equal(plain[name], more[name]) for name in plain)


def test_points_depend_on_seed_and_index_alone():
    one, other = with_points(num_candidates=40), with_points(num_candidates=40)
    other[0], other[1]
    for name, value in one[7].items():
        assert torch.equal(value, other[7][name]), name
    assert not torch.equal(one[7]["points_vox"], one[8]["points_vox"])
    assert not torch.equal(one[7]["points_vox"], with_points(num_candidates=40, seed=1)[7]["points_vox"])


def test_workers_bring_the_same_points():
    dataset = with_points()
    for batch, expected in zip(make_pair_loader(dataset, 2, num_workers=2, num_steps=2), ((0, 1), (2, 3))):
        assert batch["points_mm"].shape == (2, 2, NUM_POINTS, 3)
        for row, index in enumerate(expected):
            assert torch.equal(batch["anatomy"][row], dataset[index]["anatomy"])


def test_points_lie_in_the_patient_and_few_places_are_taken_several_times():
    store = make_store(1)
    record = store.record("case0")
    centre = index_to_world(record.affine, (np.array(record.shape) - 1) / 2)
    crop = {"rngs": [np.random.default_rng(0)], "records": [record], "starts": [start_at(record, centre, ROI)]}

    def points(x_above_mm: float) -> dict:
        return AnatomyPoints(PlaceReader(x_above_mm), AnatomyRequest(NUM_POINTS)).sample(**crop, roi=ROI)

    half = points(centre[0])
    assert half["has_anatomy"].all() and (half["points_mm"][..., 0] > centre[0]).all()
    rim = points(centre[0] + 30.0)
    assert rim["has_anatomy"].all() and 1 <= len(rim["points_mm"][0].unique(dim=0)) < NUM_POINTS
    assert (rim["points_mm"][..., 0] > centre[0] + 30.0).all()
    nothing = points(1e6)
    assert not nothing["has_anatomy"].any() and not nothing["anatomy"].any()
    assert nothing["points_vox"].shape == (1, NUM_POINTS, 3)


def test_matches_against_an_obvious_loop():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, 30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    vox, mm = rng.normal(size=(2, 30, 3)), 20 * rng.normal(size=(2, 30, 3))
    found = match_crops(vox, mm, vectors, 8)
    cycles = []
    for own, other in ((0, 1), (1, 0)):
        for point in range(8):
            scores = [float(vectors[own, point] @ vectors[other, place]) for place in range(30)]
            best = int(np.argmax(scores))
            back = int(np.argmax([float(vectors[other, best] @ vectors[own, place]) for place in range(30)]))
            cycles.append(np.linalg.norm(mm[own, back] - mm[own, point]))
            np.testing.assert_array_equal(found["match_vox"][own, point], vox[other, best])
            np.testing.assert_array_equal(found["match_mm"][own, point], mm[other, best])
            expected = max(scores[best], 0) / (1 + (cycles[-1] / CYCLE_MM) ** 2)
            assert found["match_weight"][own, point] == pytest.approx(expected, rel=1e-5)
    assert min(cycles) == 0 and max(cycles) > CYCLE_MM


def test_matches_are_near_the_same_place_of_the_other_patient():
    store = make_store()
    dataset = with_points(DirectionReader(store), num_candidates=400, store=store, jitter_mm=0, max_outside=1)
    away = []
    for index in range(5):
        sample = dataset[index]
        records = [store.record(name) for name in dataset.case_names(sample)]
        for own, other in ((0, 1), (1, 0)):
            place = world_to_index(records[own].affine, sample["points_mm"][own].numpy())
            match = world_to_index(records[other].affine, sample["match_mm"][own].numpy())
            away.append(np.linalg.norm(place - match, axis=1))
            start = start_at(records[other], sample["centre_mm"][other].numpy(), ROI)
            np.testing.assert_allclose(start + sample["match_vox"][own].numpy(), match, atol=1e-3)
        assert (sample["match_weight"] > 0).all() and (sample["match_weight"] <= 1).all()
    assert np.median(np.concatenate(away)) < 4, "voxels; two random places of a crop are some 16 apart"


def test_slices_have_points_too():
    dataset = with_points(pairing="iou", roi=(1, 16, 16), views={"student": "augmented"})
    sample = dataset[0]
    assert (sample["points_vox"][..., 0].abs() <= 0.5).all() and sample["has_anatomy"].all()

"""Regions of base crops and random crops: where they lie, what they share, and regions of two patients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.ct.geometry import world_to_index
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.crops import start_at
from datasets.samples.grid import base_starts, draw_inner_starts, overlap_shares, region_size
from datasets.samples.pairings import GridPairing, GridSamPairing, IouPairing, PairingOptions
from tests.fakes import FakeStore, make_dataset, make_store, make_table, spl_affine, world_volume

ROI = (8, 6, 4)
VIEWS = {"view": "augmented"}
OPTIONS = PairingOptions(grid_bases=(3, 2), grid_crops=4)


def starts_of(store: FakeStore, places) -> np.ndarray:
    """First voxels of a sample's crops, int64 [V, 3]."""
    return np.stack([start_at(store.record(name), point, ROI) for name, point in zip(places.names, places.points_mm)])


def test_bases_tile_the_region_in_the_axial_plane():
    starts = base_starts((3, 2), ROI)
    assert region_size((3, 2), ROI) == (8, 12, 12)
    assert starts.tolist() == [[0, 0, 0], [0, 6, 0], [0, 0, 4], [0, 6, 4], [0, 0, 8], [0, 6, 8]]
    counted = np.zeros(region_size((3, 2), ROI), dtype=int)
    for d, h, w in starts:
        counted[d : d + 8, h : h + 6, w : w + 4] += 1
    assert (counted == 1).all()


def test_overlap_equals_counting_voxels():
    rng = np.random.default_rng(0)
    bases = base_starts((3, 2), ROI)
    starts = draw_inner_starts(rng, (3, 2), ROI, 30)
    shares = overlap_shares(starts, bases, ROI)
    owner = np.zeros(region_size((3, 2), ROI), dtype=int)
    for number, (d, h, w) in enumerate(bases):
        owner[d : d + 8, h : h + 6, w : w + 4] = number
    for (d, h, w), row in zip(starts, shares):
        counts = np.bincount(owner[d : d + 8, h : h + 6, w : w + 4].ravel(), minlength=6)
        assert row == pytest.approx(counts / np.prod(ROI), abs=1e-7)
    assert shares.dtype == np.float32 and shares.sum(1) == pytest.approx(np.ones(30))
    assert (starts.min(0) == 0).all() and (starts.max(0) == [0, 6, 8]).all()  # both ends are drawn, the depth is all


def test_shares_of_crops_that_leave_the_bases_count_what_is_left():
    assert overlap_shares(np.array([[4, 3, -2]]), np.array([[0, 0, 0]]), ROI)[0, 0] == pytest.approx(0.5**3)


@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 2.0), (5.0, 0.7, 1.3)])
def test_a_sample_holds_the_bases_then_random_crops_with_their_overlap(spacing_mm):
    affine = spl_affine(spacing_mm, (11.0, -7.0, 3.0))
    store = FakeStore({"a": world_volume((20, 30, 40), affine)}, {"a": affine})
    dataset = make_dataset("grid", store, views=VIEWS, roi=ROI, grid_bases=(3, 2), grid_crops=4)
    for index in range(10):
        sample, starts = dataset[index], starts_of(store, dataset.places(index))
        assert sample["crop"].shape == sample["view"].shape == (10, 1, *ROI)
        assert dataset.pairing.num_crops(dataset.pairing.options) == 10
        assert (starts[:6] - starts[0] == base_starts((3, 2), ROI)).all()
        assert (starts.min(0) >= 0).all() and (starts.max(0) <= np.array([20, 30, 40]) - ROI).all()
        assert torch.equal(sample["overlap"], torch.from_numpy(overlap_shares(starts[6:], starts[:6], ROI)))
        assert sample["overlap"].sum(1).numpy() == pytest.approx(np.ones(4)) and not sample["is_fallback"]
        centres = world_to_index(affine, sample["centre_mm"].numpy().astype(float))
        assert centres == pytest.approx(starts + (np.array(ROI) - 1) / 2, abs=1e-3)


@pytest.mark.parametrize("flipped", [(0,), (1,), (2,), (0, 1, 2)])
def test_labels_follow_the_voxels_whatever_way_the_axes_point(flipped):
    """The share that is read from pictures alone: how many of a crop's voxels stand in each base crop."""
    affine = spl_affine()
    for axis in flipped:
        affine[:3, axis] *= -1
    volume = np.arange(20 * 30 * 40).reshape(20, 30, 40) - 12000  # every voxel has a value of its own
    store = FakeStore({"a": volume.astype(np.int16)}, {"a": affine})
    pairing = GridPairing(store, ["a"], ROI, OPTIONS)
    for seed in range(5):
        places = pairing.draw(np.random.default_rng(seed), 0)
        crops = [store.crop("a", tuple(start), ROI).ravel() for start in starts_of(store, places)]
        counted = [[len(np.intersect1d(crop, base)) / crop.size for base in crops[:6]] for crop in crops[6:]]
        assert places.facts["overlap"] == pytest.approx(np.array(counted), abs=1e-6)


def test_a_small_body_lies_inside_the_region_and_the_rest_is_air():
    store = make_store(1, shape=(20, 8, 40))
    dataset = make_dataset("grid", store, views=VIEWS, roi=ROI, grid_bases=(3, 2))
    starts = np.stack([starts_of(store, dataset.places(index))[0] for index in range(30)])
    assert starts[:, 1].min() == -4 and starts[:, 1].max() == 0
    assert all(dataset[index]["overlap"].sum(1).numpy() == pytest.approx(np.ones(2)) for index in range(5))


def test_regions_lie_anywhere_and_their_order_stays():
    store = make_store(1)
    pairing = GridPairing(store, store.names, ROI, OPTIONS)
    starts = np.stack([starts_of(store, pairing.draw(np.random.default_rng(seed), 0)) for seed in range(200)])
    assert (starts[:, 0].min(0) == 0).all() and (starts[:, 0].max(0) == np.array([40, 44, 48]) - (8, 12, 12)).all()
    assert (starts[:, 5] - starts[:, 0] == (0, 6, 8)).all()


def test_pair_rules_still_toss_for_the_order():
    store = make_store(2)
    pairing = IouPairing(store, store.names, (16, 24, 32))
    orders = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        plain = pairing.draw_places(np.random.default_rng(seed), 0)
        drawn = pairing.draw(rng, 0)
        is_same = np.array_equal(drawn.points_mm, plain.points_mm)
        assert is_same or np.array_equal(drawn.points_mm[::-1], plain.points_mm)
        orders.add(is_same)
    assert orders == {True, False} and pairing.num_crops(pairing.options) == 2


def matched_store(spacings_mm) -> FakeStore:
    """Two cases whose worlds differ by a shift of (100, -50, 20) mm."""
    affines = {f"case{i}": spl_affine(s, (100.0 * i, -50.0 * i, 20.0 * i)) for i, s in enumerate(spacings_mm)}
    return FakeStore({name: world_volume((40, 60, 60), affine) for name, affine in affines.items()}, affines)


def matched_table(store: FakeStore, num: int = 500) -> CorrespondenceTable:
    """Points of case0 and the same ones, shifted by (100, -50, 20) mm, of case1."""
    rng = np.random.default_rng(0)
    rows = np.zeros(num, ROW_DTYPE)
    affine = store.record("case0").affine
    for row in rows:
        row["query_mm"] = affine[:3, :3] @ rng.uniform(0, 39, 3) + affine[:3, 3]
        row["key_mm"] = row["query_mm"] + (100, -50, 20)
    rows["key_case"], rows["score"], rows["cycle_mm"] = 1, 0.9, 1.0
    return CorrespondenceTable.from_rows(store.names, rows)


def test_grid_sam_shows_the_same_anatomy_crop_by_crop():
    store = matched_store([(2.0, 2.0, 2.0)] * 2)
    dataset = make_dataset(
        "grid_sam", store, matched_table(store), views=VIEWS, roi=ROI, grid_bases=(3, 2), grid_crops=4, max_cycle_mm=5.0
    )
    assert dataset.pairing.num_crops(dataset.pairing.options) == 20
    for seed in range(20):
        places = dataset.pairing.draw(np.random.default_rng(seed), 0)
        assert places.names == ("case0",) * 10 + ("case1",) * 10 and not places.is_fallback
        shift = places.points_mm[10:] - places.points_mm[:10] - (100, -50, 20)
        assert np.abs(shift).max() < 2.01 and np.ptp(shift, axis=0).max() < 1e-6  # one vector, below a voxel
        overlap = places.facts["overlap"]
        assert overlap.shape == (2, 4, 6) and np.array_equal(*overlap) and places.score == pytest.approx(0.9)
    sample = next(dataset[index] for index in range(8) if not dataset[index]["is_fallback"])
    assert sample["overlap"].shape == (2, 4, 6) and sample["view"].shape == (20, 1, *ROI)


def test_grid_sam_keeps_millimetres_where_voxels_differ_and_counts_labels_in_each_volume():
    store = matched_store([(2.0, 2.0, 2.0), (2.0, 1.6, 2.0)])
    pairing = GridSamPairing(store, store.names, ROI, replace(OPTIONS, max_cycle_mm=5.0), matched_table(store))
    for seed in range(10):
        places = pairing.draw(np.random.default_rng(seed), 0)
        offsets = [part - part[0] for part in (places.points_mm[:10], places.points_mm[10:])]
        assert np.abs(offsets[0] - offsets[1]).max() <= 2.0  # each crop lies on its own grid of voxels
        starts = starts_of(store, places)
        for first, overlap in zip((0, 10), places.facts["overlap"]):
            part = starts[first : first + 10]
            assert np.array_equal(overlap, overlap_shares(part[6:], part[:6], ROI))
        assert not np.array_equal(*places.facts["overlap"])


def test_grid_sam_without_a_match_gives_two_regions_of_one_volume_and_says_so():
    store = matched_store([(2.0, 2.0, 2.0)] * 2)
    pairing = GridSamPairing(store, store.names, ROI, replace(OPTIONS, max_cycle_mm=5.0), matched_table(store))
    places = pairing.draw(np.random.default_rng(0), 1)  # no row starts at case1
    assert places.is_fallback and set(places.names) == {"case1"} and places.facts["overlap"].shape == (2, 4, 6)
    assert not np.array_equal(places.points_mm[:10], places.points_mm[10:])
    assert pairing.draw_alone(np.random.default_rng(0), 0).is_fallback


@pytest.mark.parametrize("rule", ["grid", "grid_sam"])
def test_samples_depend_on_seed_and_index_alone(rule):
    store = make_store(3)
    table = make_table(store) if rule == "grid_sam" else None
    one, other = (make_dataset(rule, store, table, views=VIEWS, roi=ROI, grid_bases=(2, 2)) for _ in range(2))
    for index in (4, 0, 7):
        ours, theirs = one[index], other[index]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(one[0]["centre_mm"], make_dataset(rule, store, table, views=VIEWS, roi=ROI, seed=1,
                                                            grid_bases=(2, 2))[0]["centre_mm"])  # fmt: skip


def test_every_crop_has_an_augmentation_of_its_own_and_epochs_differ():
    store = FakeStore({"a": np.full((20, 40, 40), 40, dtype=np.int16)})
    dataset = make_dataset("grid", store, views=VIEWS, roi=ROI, grid_bases=(2, 2))
    views = dataset[0]["view"].flatten(1)
    assert len({tuple(view.tolist()) for view in views}) > 1
    assert not torch.equal(dataset[0]["centre_mm"], dataset[len(dataset)]["centre_mm"])


@pytest.mark.parametrize(
    ("options", "flag"), [({"grid_bases": (1, 1)}, "--grid_bases"), ({"grid_crops": 0}, "--grid_")]
)
def test_impossible_grids_name_the_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        PairingOptions(**options)

"""Where paired crops lie: matched places, thresholds, fallbacks, the IoU rule, balance over cases."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from datasets.ct.geometry import world_to_index
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.crops import centre_mm, crop_iou, cut, shared_shift_mm, start_at
from datasets.samples.dataset import summarise_places
from datasets.samples.pairings import PAIRINGS, IouPairing, PairingOptions, Places, RandomPairing, SamPairing
from tests.fakes import ROI, FakeStore, make_dataset, make_store, make_table

EXACT = {"max_outside": 0.0, "jitter_mm": 0.0}


def voxel_indices(store, places: Places) -> list[np.ndarray]:
    """The fractional voxel index of every crop's centre in its own volume."""
    return [world_to_index(store.record(name).affine, mm) for name, mm in zip(places.names, places.points_mm)]


def starts_of(store, places: Places) -> np.ndarray:
    """The first voxel of every crop [V, 3]."""
    return np.array([start_at(store.record(name), mm, ROI) for name, mm in zip(places.names, places.points_mm)])


def test_crop_is_centred_at_the_point_and_padded_with_air():
    store = make_store(1)
    record = store.record("case0")
    for start in ([3, 5, 7], [-4, 30, 40]):
        start = np.array(start)
        assert (start_at(record, centre_mm(record, start, ROI), ROI) == start).all()
    crop = cut(store, "case0", centre_mm(record, np.array([-4, 30, 40]), ROI), ROI)
    assert (crop[:4] == -1024).all() and (crop[:, 14:] == -1024).all() and (crop[:, :, 8:] == -1024).all()
    assert (crop[4:, :14, :8] == store.volumes["case0"][:12, 30:, 40:]).all()


def test_iou_equals_counting_voxels():
    counted = np.zeros((2, 40, 60, 80), dtype=bool)
    counted[0, 3:19, 5:29, 7:39] = True
    counted[1, 9:25, 1:25, 20:52] = True
    expected = (counted[0] & counted[1]).sum() / (counted[0] | counted[1]).sum()
    assert crop_iou([3, 5, 7], [9, 1, 20], ROI) == pytest.approx(expected)
    assert crop_iou([0, 0, 0], [0, 0, 0], ROI) == 1 and crop_iou([0, 0, 0], [16, 0, 0], ROI) == 0


def test_sam_crops_show_the_same_place_of_two_cases():
    """Crop centres are rows of the table, in either direction, even with an odd crop and a different spacing."""
    dataset = make_dataset(**EXACT)
    places = {}
    for row in dataset.pairing.table.rows:
        places[(int(row["query_case"]), int(row["key_case"]), *np.round(row["query_mm"]))] = row["key_mm"]
    num_inside = 0
    for index in range(40):
        drawn = dataset.places(index)
        a = tuple(dataset.store.names.index(name) for name in drawn.names)
        assert a[0] != a[1]
        one_mm, other_mm = drawn.points_mm
        for query, key, query_mm, key_mm in ((*a, one_mm, other_mm), (*a[::-1], other_mm, one_mm)):
            found = places.get((query, key, *np.round(query_mm)))
            num_inside += found is not None and np.allclose(found, key_mm, atol=0.01)
    assert num_inside > 0  # matched points well inside are not moved
    for index in range(40):  # and all others are moved by one vector: the voxel index stays the same in both cases
        one, other = voxel_indices(dataset.store, dataset.places(index))
        assert np.abs(one - other).max() < 1.5  # 5 % other spacing along one axis


def test_crops_can_stay_at_their_matched_points_as_published():
    """Without jitter and with any overhang, every crop is centred at a point of the table."""
    dataset = make_dataset(jitter_mm=0.0, max_outside=1.0)
    rows = dataset.pairing.table.rows
    matches = np.concatenate([rows["query_mm"], rows["key_mm"]], axis=1)
    matches = np.concatenate([matches, matches[:, [3, 4, 5, 0, 1, 2]]])
    for index in range(40):
        distance = np.abs(matches - dataset.places(index).points_mm.reshape(6)).max(1).min()
        assert distance < 1e-3


def one_row(store: FakeStore, start: tuple[int, int, int] = (12, 10, 8)) -> CorrespondenceTable:
    """A match between the crops of case0 and case1 that begin at one voxel."""
    rows = np.zeros(1, ROW_DTYPE)
    rows["key_case"] = 1
    rows["query_mm"] = centre_mm(store.record("case0"), np.array(start), ROI)
    rows["key_mm"] = centre_mm(store.record("case1"), np.array(start), ROI)
    rows["score"] = 0.9
    return CorrespondenceTable.from_rows(store.names, rows)


def test_both_crops_lie_off_their_points_by_one_vector_that_jitter_mm_bounds():
    store = make_store(2)
    table = one_row(store)
    dataset = make_dataset("sam", store, table, jitter_mm=6.0)
    moved = []
    for index in range(60):
        places = dataset.places(index)
        if places.is_fallback:
            continue
        if places.names[0] == "case1":
            places = places.reversed()
        offset = places.points_mm[0] - table.rows["query_mm"][0]
        assert np.allclose(offset, places.points_mm[1] - table.rows["key_mm"][0], atol=1e-4)
        moved.append(offset)
    assert 4.0 < np.abs(moved).max() <= 6.0 and np.ptp(moved, axis=0).min() > 6.0


def test_where_no_shift_serves_both_cases_both_overhang_alike():
    store = make_store(2)
    first, second = store.record("case0"), store.record("case1")
    roi = (16, 24, 32)
    middle = (np.array(first.shape) - roi) // 2
    below, above = middle.copy(), middle.copy()
    below[0], above[0] = -8, first.shape[0] - roi[0] + 4  # 8 voxels below the one body, 4 above the other
    points = centre_mm(first, below, roi), centre_mm(second, above, roi)
    shift = shared_shift_mm(first, points[0], second, points[1], roi, 0.0)
    np.testing.assert_allclose(shift, [0, 0, (8 - 4) / 2 * 2.0], atol=1e-9)  # voxels of 2 mm along z
    starts = start_at(first, points[0] + shift, roi)[0], start_at(second, points[1] + shift, roi)[0]
    assert starts == (-6, first.shape[0] - roi[0] + 6)


def test_query_crops_lie_anywhere_in_the_body_as_random_ones_do():
    """The control: with matches everywhere, the rules differ in their second crop alone."""
    store = make_store(4)
    table = make_table(store, num=4000)
    rules = {name: make_dataset(name, store, table).pairing for name in ("sam", "random")}
    draws = {
        name: [rule.draw_places(np.random.default_rng(seed), seed % 4) for seed in range(200)]
        for name, rule in rules.items()
    }
    for sam, random in zip(draws["sam"], draws["random"]):
        assert sam.names[0] == random.names[0] and not sam.is_fallback
    starts = {name: np.array([starts_of(store, places)[0] for places in drawn]) for name, drawn in draws.items()}
    for name in draws:
        assert (starts[name].min(0) >= 0).all() and (starts[name].max(0) <= np.array([40, 44, 48]) - ROI).all()
    for share in (0.1, 0.5, 0.9):
        assert np.abs(np.quantile(starts["sam"], share, 0) - np.quantile(starts["random"], share, 0)).max() <= 3
    for places in draws["sam"]:
        one, other = voxel_indices(store, places)
        assert np.abs(one - other).max() < 1.5  # the same anatomy; 5 % other spacing along one axis


def test_a_place_is_looked_up_at_its_nearest_point_with_any_of_its_partners():
    store = make_store(4)
    points = {case: [centre_mm(store.record(f"case{case}"), np.array(s), ROI) for s in ((4, 4, 4), (20, 16, 12))]
              for case in range(4)}  # fmt: skip
    rows = np.zeros(6, ROW_DTYPE)
    for number, row in enumerate(rows):
        row["query_mm"], row["key_case"] = points[0][number % 2], 1 + number // 2
        row["key_mm"], row["score"] = points[1 + number // 2][number % 2], 0.7 + 0.01 * (number % 2)
    dataset = make_dataset("sam", store, CorrespondenceTable.from_rows(store.names, rows))
    partners = set()
    for seed in range(100):
        places = dataset.pairing.draw_places(np.random.default_rng(seed), 0)
        far = [np.linalg.norm(places.points_mm[0] - point) for point in points[0]]
        if abs(far[0] - far[1]) > 20:  # the shift into the key's body moves a crop by a voxel or two
            assert places.score == pytest.approx(0.7 + 0.01 * int(far[1] < far[0]))
        partners.add(places.names[1])
    assert partners == {"case1", "case2", "case3"}


def test_max_outside_bounds_the_air_where_both_bodies_allow_it():
    store = make_store()
    body = np.array([[4, 6, 5], [36, 40, 44]])
    bare = store.record
    store.record = lambda name: replace(bare(name), body_start=body[0], body_stop=body[1])
    for max_outside in (0.0, 0.25):
        dataset = make_dataset("sam", store, max_outside=max_outside, jitter_mm=0.0)
        overhang = []
        for index in range(60):
            for start in starts_of(store, dataset.places(index)):
                overhang.append(np.maximum(body[0] - start, 0) + np.maximum(start + ROI - body[1], 0))
        slack = max_outside * np.array(ROI)
        assert (overhang <= slack + 1.5).all()  # half a voxel of rounding, and the other spacing
        assert max_outside == 0 or (np.max(overhang, axis=0) > slack - 2).all()


def test_first_cases_are_balanced_and_pairs_go_both_ways():
    store = make_store(5)
    dataset = make_dataset("random", store)
    for epoch in range(4):
        drawn = [dataset.places(epoch * 5 + i) for i in range(5)]
        assert {name for places in drawn for name in places.names} == set(store.names)
        assert all(len(set(places.names)) == 2 for places in drawn)
    dealt = [[dataset._dealt_case(epoch * 5 + i) for i in range(5)] for epoch in range(6)]
    assert all(sorted(cases) == list(range(5)) for cases in dealt) and len({tuple(cases) for cases in dealt}) > 1
    sam = make_dataset("sam", store)
    is_reversed = [sam.places(i).names[0] != store.names[sam._dealt_case(i)] for i in range(200)]
    assert 70 < sum(is_reversed) < 130  # 4 standard deviations


def test_rows_below_the_threshold_are_never_used():
    store = make_store()
    table = make_table(store)
    table.rows["score"][::2] = 0.5
    table.rows["cycle_mm"][1::4] = 40.0
    dataset = make_dataset("sam", store, table, max_cycle_mm=15.0)
    good = {round(float(row["score"]), 3) for row in table.rows[3::4]}
    assert dataset.statistics()["num_usable_rows"] == 15
    for index in range(60):
        places = dataset.places(index)
        assert places.is_fallback or round(places.score, 3) in good


def test_a_case_without_good_rows_falls_back_within_itself_and_is_counted():
    store = make_store()
    table = make_table(store)
    table.rows["score"][table.rows["query_case"] == 1] = 0.2
    dataset = make_dataset("sam", store, table)
    for index in range(30):
        sample, places = dataset[index], dataset.places(index)
        assert sample["is_fallback"] == places.is_fallback == (dataset._dealt_case(index) == 1)
        assert dataset.case_names(sample) == list(places.names)
        if places.is_fallback:
            assert places.names == ("case1", "case1")
        else:
            assert sample["score"] == pytest.approx(0.9)
    facts = summarise_places([dataset.places(index) for index in range(30)])
    assert facts["num_pairs"] == 30 and facts["num_fallback"] == 10
    assert facts["mean_score"] == pytest.approx(0.9) and facts["share_fallback"] == pytest.approx(1 / 3)
    assert dataset.statistics()["num_cases_without_rows"] == 1


def test_rows_of_cases_that_the_store_lacks_are_not_used(caplog):
    whole = make_store(4)
    table = make_table(whole)
    store = FakeStore(*({name: part[name] for name in whole.names[:3]} for part in (whole.volumes, whole.affines)))
    dataset = make_dataset("sam", store, table)
    assert "1 of its 4 cases are not in the volume store (case3)" in caplog.text
    is_usable = (table.rows["query_case"] < 3) & (table.rows["key_case"] < 3)
    assert 0 < dataset.statistics()["num_usable_rows"] == is_usable.sum() < len(table)
    assert {name for i in range(60) for name in dataset.places(i).names} == set(store.names)


def test_held_out_cases_without_rows_among_themselves_are_told(caplog):
    store = make_store(4)
    rows = make_table(store).rows
    few = CorrespondenceTable.from_rows(store.names, rows[(rows["query_case"] == 0) & (rows["key_case"] == 1)])
    make_dataset("sam", store, few)
    assert "3 of these 4 cases have no usable correspondence" in caplog.text and "--json_list" in caplog.text
    caplog.clear()
    make_dataset("sam", store, make_table(store))
    assert not caplog.text


def test_no_good_row_at_all_warns_and_still_trains(caplog):
    with caplog.at_level(logging.WARNING):
        dataset = make_dataset(min_score=0.99)
    assert "--min_score 0.99" in caplog.text and bool(dataset[0]["is_fallback"])


@pytest.mark.parametrize("iou_range", [(0.3, 0.6), (0.0001, 0.3), (0.6, 1.0)])
def test_iou_pairs_lie_in_the_range(iou_range):
    store = make_store()
    dataset = make_dataset("iou", store, iou_range=iou_range)
    seen, fallbacks = [], 0
    for index in range(60):
        places = dataset.places(index)
        iou = float(crop_iou(*starts_of(store, places), ROI))
        assert len(set(places.names)) == 1 and places.score == pytest.approx(iou)
        assert places.is_fallback or iou_range[0] <= iou <= iou_range[1]
        fallbacks += places.is_fallback
        seen.append(iou)
    assert np.ptp(seen) > 0.1 and fallbacks < 3


def test_iou_gives_up_after_120_draws_and_takes_random_crops(monkeypatch):
    counted = []
    real = IouPairing.draw_places.__globals__["draw_starts"]
    monkeypatch.setattr("datasets.samples.pairings.draw_starts", lambda *args: counted.append(args[-1]) or real(*args))
    store = make_store(1)
    pairing = IouPairing(store, store.names, ROI, PairingOptions(iou_range=(0.9999, 0.99999)))
    places = pairing.draw_places(np.random.default_rng(0), 0)
    assert places.is_fallback and len(set(places.names)) == 1
    assert counted == [1, 30] * 4 + [2]


def test_random_with_one_case_is_a_fallback():
    assert make_dataset("random", make_store(1)).places(0).is_fallback


def test_table_in_another_frame_is_refused():
    """The published code looked points up in a frame flipped on all three axes; such a table must not pass unseen."""
    store = make_store()
    table = make_table(store)
    table.rows["query_mm"] *= -1
    with pytest.raises(ValueError, match="lie outside of the volumes that they name"):
        make_dataset("sam", store, table)


def test_pairing_options_are_checked():
    with pytest.raises(ValueError, match="max_outside"):
        PairingOptions(max_outside=2.0)


@pytest.mark.parametrize("name", PAIRINGS)
def test_a_sample_has_the_crops_that_its_rule_promises(name):
    dataset = make_dataset(name)
    num_crops = dataset.pairing.num_crops(dataset.pairing.options)
    assert len(dataset.places(0).names) == len(dataset.places(0).points_mm) == num_crops
    assert dataset[0]["crop"].shape == (num_crops, 1, *ROI)


def test_random_pairs_are_of_two_patients():
    store = make_store(6)
    patient_of = dict.fromkeys(["case0", "case1", "case2"], "one") | dict.fromkeys(["case3", "case4"], "two")
    pairing = RandomPairing(store, store.names, ROI, patient_of=patient_of)
    pairs = [pairing.draw(np.random.default_rng(seed), seed % 6) for seed in range(200)]
    met = {frozenset(pair.names) for pair in pairs}
    patients = {name: patient_of.get(name, name) for name in store.names}
    assert all(len({patients[name] for name in pair}) == 2 for pair in met) and len(met) == 15 - 3 - 1
    assert not any(pair.is_fallback for pair in pairs)
    alone = RandomPairing(store, store.names[:3], ROI, patient_of=patient_of)
    assert alone.draw(np.random.default_rng(0), 1).is_fallback
    plain = RandomPairing(store, store.names, ROI)
    drawn = [plain.draw_places(np.random.default_rng(seed), 0).names[1] for seed in range(20)]
    expected = [f"case{int(np.random.default_rng(seed).integers(1, 6))}" for seed in range(20)]
    assert drawn == expected, "without groups the draws are as ever"


def test_matches_within_one_patient_are_not_used():
    """Of a table that was mined before the list knew patients."""
    store = make_store(4)
    patient_of = {"case0": "one", "case1": "one"}
    plain = SamPairing(store, store.names, ROI, PairingOptions(min_score=0.0), make_table(store, num=200))
    pairing = SamPairing(store, store.names, ROI, PairingOptions(min_score=0.0), plain.table, patient_of)

    def met(rule) -> set[frozenset]:
        rows = rule.table.rows[rule.selection.rows]
        return {frozenset(pair) for pair in zip(rows["query_case"].tolist(), rows["key_case"].tolist())}

    assert met(plain) - met(pairing) == {frozenset({0, 1})} and len(met(pairing)) == 5

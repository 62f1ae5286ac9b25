"""Paired crops: the right place, the right fallback, and a pure function of seed and index."""

import logging
import pickle
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from datasets.augment import AugmentOptions, window
from datasets.correspondences import ROW_DTYPE, CorrespondenceTable
from datasets.crops import centre_mm, crop_iou, cut, start_at
from datasets.data_list import Case
from datasets.geometry import world_to_index
from datasets.loader import make_pair_loader
from datasets.pair_sheet import draw_pair_sheet, samples_of
from datasets.pair_statistics import PairStatistics
from datasets.pairings import PAIR_KINDS, IouPairing, PairingOptions
from datasets.pairs import BrokenVolumeError, PairedCropDataset
from datasets.volume_store import VolumeStore, build_store
from tests.fakes import FakeStore, spl_affine, world_volume

ROI = (16, 24, 32)
TENSORS = {"query", "key", "query_student", "query_teacher", "key_student", "key_teacher"}
EXACT = {"max_outside": 0.0, "jitter_mm": 0.0, "augment": AugmentOptions.off(), "roi": ROI, "mask_block": 8}


def make_store(num: int = 3, broken=(), shape=(40, 44, 48)) -> FakeStore:
    """Cases whose voxels spell out their place; every case lies elsewhere in the world, with its own spacing."""
    affines = {f"case{i}": spl_affine((2.0, 2.0 + 0.1 * i, 2.0), (100 * i, -50 * i, 20 * i)) for i in range(num)}
    return FakeStore({name: world_volume(shape, affine) for name, affine in affines.items()}, affines, broken)


def make_table(store: FakeStore, num: int = 60, score: float = 0.9, seed: int = 0) -> CorrespondenceTable:
    """Matches between random cases: the same voxel index, wherever that lies in either world."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(num, ROW_DTYPE)
    for row in rows:
        query, key = rng.choice(len(store), 2, replace=False)
        index = rng.uniform(0, np.array(store.record(store.names[0]).shape) - 1)
        for side, case in (("query", query), ("key", key)):
            row[f"{side}_case"] = case
            affine = store.record(store.names[case]).affine
            row[f"{side}_mm"] = affine[:3, :3] @ index + affine[:3, 3]
    rows["score"], rows["cycle_mm"] = score, 3.0
    return CorrespondenceTable.from_rows(store.names, rows)


def make_dataset(pairing: str = "sam", store=None, table=None, **options) -> PairedCropDataset:
    store = store or make_store()
    table = table or (make_table(store) if pairing == "sam" else None)
    return PairedCropDataset(store, table, pairing, **{"roi": ROI, "mask_block": 8} | options)


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# Where crops lie


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


# Samples


@pytest.mark.parametrize("pairing", ["sam", "iou", "random"])
def test_sample_contract(pairing):
    store = make_store()
    sample = make_dataset(pairing, store)[5]
    for name in TENSORS:
        assert sample[name].dtype == torch.float32 and sample[name].shape == (1, *ROI), name
        assert sample[name].min() >= 0 and sample[name].max() <= 1
    for side in ("query", "key"):
        mask = sample[f"{side}_mask"]
        assert mask.dtype == torch.bool and tuple(mask.shape) == (2, 3, 4) and mask.sum() == 18
        assert sample[f"{side}_case"].dtype == torch.int64
        assert sample[f"{side}_mm"].dtype == torch.float32 and sample[f"{side}_mm"].shape == (3,)
        name = store.names[int(sample[f"{side}_case"])]
        again = window(cut(store, name, sample[f"{side}_mm"].numpy(), ROI), -125, 225)
        assert torch.equal(sample[side], again)  # the stated case and place are where the crop is from
    assert sample["score"].dtype == torch.float32 and sample["is_fallback"].dtype == torch.bool
    assert PAIR_KINDS[int(sample["pair_kind"])] == pairing and not sample["is_fallback"]


def test_sam_crops_show_the_same_place_of_two_cases():
    """Crop centres are rows of the table, in either direction, even with an odd crop and a different spacing."""
    dataset = make_dataset(**EXACT)
    places = {}
    for row in dataset.pairing.table.rows:
        places[(int(row["query_case"]), int(row["key_case"]), *np.round(row["query_mm"]))] = row["key_mm"]
    num_inside = 0
    for index in range(40):
        draw = dataset.draw_pair(index)
        a = (dataset.store.names.index(draw.query_name), dataset.store.names.index(draw.key_name))
        assert a[0] != a[1]
        for query, key, query_mm, key_mm in ((*a, draw.query_mm, draw.key_mm), (*a[::-1], draw.key_mm, draw.query_mm)):
            found = places.get((query, key, *np.round(query_mm)))
            num_inside += found is not None and np.allclose(found, key_mm, atol=0.01)
    assert num_inside > 0  # matched points well inside are not moved
    for index in range(40):  # and all others are moved by one vector: the voxel index stays the same in both cases
        draw = dataset.draw_pair(index)
        indices = [
            world_to_index(dataset.store.record(name).affine, point)
            for name, point in ((draw.query_name, draw.query_mm), (draw.key_name, draw.key_mm))
        ]
        assert np.abs(indices[0] - indices[1]).max() < 1.5  # 5 % other spacing along one axis


def test_jitter_moves_both_points_alike_and_changes_between_samples():
    store = make_store(2)
    rows = np.zeros(1, ROW_DTYPE)
    rows["key_case"] = 1
    rows["query_mm"] = centre_mm(store.record("case0"), np.array([12, 10, 8]), ROI)
    rows["key_mm"] = centre_mm(store.record("case1"), np.array([12, 10, 8]), ROI)
    rows["score"] = 0.9
    dataset = make_dataset("sam", store, CorrespondenceTable.from_rows(store.names, rows), jitter_mm=6.0)
    moved = []
    for index in range(60):
        draw = dataset.draw_pair(index)
        if draw.is_fallback:
            continue
        if draw.query_name == "case1":
            draw = draw.swapped()
        assert np.allclose(draw.query_mm - rows["query_mm"][0], draw.key_mm - rows["key_mm"][0], atol=1e-4)
        moved.append(draw.query_mm - rows["query_mm"][0])
    assert 4.0 < np.abs(moved).max() <= 6.0 and np.ptp(moved, axis=0).min() > 6.0


def test_max_outside_bounds_the_padding_where_both_volumes_allow_it():
    store = make_store()
    dataset = make_dataset("sam", store, max_outside=0.25, jitter_mm=20.0)
    for index in range(60):
        draw = dataset.draw_pair(index)
        for name, point in ((draw.query_name, draw.query_mm), (draw.key_name, draw.key_mm)):
            record = store.record(name)
            start = start_at(record, point, ROI)
            overhang = np.maximum(-start, 0) + np.maximum(start + ROI - record.shape, 0)
            assert (overhang <= 0.25 * np.array(ROI) + 1.5).all()  # half a voxel of rounding, and the other spacing


def test_query_cases_are_balanced_and_pairs_go_both_ways():
    store = make_store(5)
    dataset = make_dataset("random", store)
    for epoch in range(4):
        draws = [dataset.draw_pair(epoch * 5 + i) for i in range(5)]
        appearances = [draw.query_name for draw in draws] + [draw.key_name for draw in draws]
        assert set(appearances) == set(store.names)
        assert all(draw.query_name != draw.key_name for draw in draws)
    dealt = [[dataset._dealt_case(epoch * 5 + i) for i in range(5)] for epoch in range(6)]
    assert all(sorted(cases) == list(range(5)) for cases in dealt) and len({tuple(cases) for cases in dealt}) > 1
    sam = make_dataset("sam", store)
    swapped = [sam.draw_pair(i).query_name != store.names[sam._dealt_case(i)] for i in range(200)]
    assert 70 < sum(swapped) < 130  # 4 standard deviations


# Thresholds and fallbacks


def test_rows_below_the_threshold_are_never_used():
    store = make_store()
    table = make_table(store)
    table.rows["score"][::2] = 0.5
    table.rows["cycle_mm"][1::4] = 40.0
    dataset = make_dataset("sam", store, table, max_cycle_mm=15.0)
    good = {round(float(row["score"]), 3) for row in table.rows[3::4]}
    assert dataset.pairing.num_usable_rows == 15
    for index in range(60):
        draw = dataset.draw_pair(index)
        assert draw.is_fallback or round(draw.score, 3) in good


def test_a_case_without_good_rows_falls_back_within_itself_and_is_counted():
    store = make_store()
    table = make_table(store)
    table.rows["score"][table.rows["query_case"] == 1] = 0.2
    dataset = make_dataset("sam", store, table)
    statistics = PairStatistics()
    for index in range(30):
        sample = dataset[index]
        statistics.add(sample)
        if dataset._dealt_case(index) == 1:
            assert sample["is_fallback"] and sample["query_case"] == sample["key_case"] == 1
            assert PAIR_KINDS[int(sample["pair_kind"])] in ("iou", "random")
        else:
            assert not sample["is_fallback"] and sample["score"] == pytest.approx(0.9)
    facts = statistics.summary()
    assert facts["num_pairs"] == 30 and facts["num_fallback"] == 10 and facts["num_sam"] == 20
    assert facts["mean_score_sam"] == pytest.approx(0.9) and facts["share_fallback"] == pytest.approx(1 / 3)
    assert dataset.statistics()["num_cases_without_rows"] == 1


def test_no_good_row_at_all_warns_and_still_trains(caplog):
    with caplog.at_level(logging.WARNING):
        dataset = make_dataset(min_score=0.99)
    assert "--min_score 0.99" in caplog.text and bool(dataset[0]["is_fallback"])


def test_statistics_of_batches_equal_those_of_samples():
    dataset = make_dataset("iou", make_store(2))
    one, joined = PairStatistics(), PairStatistics()
    for index in range(6):
        one.add(dataset[index])
    for batch in make_pair_loader(dataset, 3, num_steps=2):
        joined.add(batch)
    assert torch.allclose(one.totals, joined.totals) and joined.summary()["num_iou"] == 6


@pytest.mark.parametrize("iou_range", [(0.3, 0.6), (0.0001, 0.3), (0.6, 1.0)])
def test_iou_pairs_lie_in_the_range(iou_range):
    store = make_store()
    dataset = make_dataset("iou", store, iou_range=iou_range)
    seen, fallbacks = [], 0
    for index in range(60):
        draw = dataset.draw_pair(index)
        starts = [start_at(store.record(draw.query_name), mm, ROI) for mm in (draw.query_mm, draw.key_mm)]
        iou = float(crop_iou(*starts, ROI))
        assert draw.query_name == draw.key_name and draw.score == pytest.approx(iou)
        assert draw.is_fallback or iou_range[0] <= iou <= iou_range[1]
        fallbacks += draw.is_fallback
        seen.append(iou)
    assert np.ptp(seen) > 0.1 and fallbacks < 3


def test_iou_gives_up_after_120_draws_and_takes_random_crops(monkeypatch):
    counted = []
    real = IouPairing.draw.__globals__["draw_starts"]
    monkeypatch.setattr("datasets.pairings.draw_starts", lambda *args: counted.append(args[-1]) or real(*args))
    store = make_store(1)
    pairing = IouPairing(store, store.names, PairingOptions(ROI, iou_range=(0.9999, 0.99999)))
    draw = pairing.draw(np.random.default_rng(0), 0)
    assert draw.is_fallback and draw.kind == "random" and draw.query_name == draw.key_name
    assert counted == [1, 30] * 4 + [2]


def test_random_with_one_case_is_a_fallback():
    assert make_dataset("random", make_store(1)).draw_pair(0).is_fallback


# Purity


def test_sample_is_a_pure_function_of_seed_and_index():
    a, b = make_dataset(seed=3), make_dataset(seed=3)
    for index in (11, 0, 7, 11, 10**12):
        assert_equal(a[index], b[index])
    assert_equal(pickle.loads(pickle.dumps(a))[4], b[4])
    other = make_dataset(seed=4)
    assert sum(torch.equal(a[i]["query"], other[i]["query"]) for i in range(12)) < 3
    assert not torch.equal(a[0]["query_mask"], a[1]["query_mask"])


def test_views_and_masks_of_one_sample_are_drawn_independently():
    strong = AugmentOptions(noise_prob=1.0)
    samples = [make_dataset(augment=strong)[i] for i in range(10)]
    for side in ("query", "key"):
        assert not any(torch.equal(s[f"{side}_student"], s[f"{side}_teacher"]) for s in samples)
    assert not all(torch.equal(s["query_mask"], s["key_mask"]) for s in samples)
    plain = make_dataset(augment=AugmentOptions.off())[0]
    assert torch.equal(plain["query_student"], plain["query"]) and torch.equal(plain["key_teacher"], plain["key"])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_workers_ranks_or_restart(num_workers):
    torch.set_num_threads(2)  # the process itself may use more threads than its workers
    dataset = make_dataset(seed=1)
    whole = list(make_pair_loader(dataset, 4, num_steps=3))
    resumed = list(make_pair_loader(dataset, 4, num_workers=num_workers, start_step=1, num_steps=3))
    for a, b in zip(whole[1:], resumed, strict=True):
        assert_equal(a, b)
    ranks = [make_pair_loader(dataset, 2, r, 2, num_workers=num_workers, num_steps=2) for r in range(2)]
    for step, (first, second) in enumerate(zip(*ranks)):
        assert_equal(whole[step], {key: torch.cat([first[key], second[key]]) for key in first})


# Broken volumes


def test_a_broken_volume_is_reported_once_and_skipped(caplog):
    store = make_store(4, broken=["case2"])
    dataset = make_dataset("random", store)
    with caplog.at_level(logging.WARNING):
        samples = [dataset[i] for i in range(24)]
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
    assert "case case2" in caplog.text and "input/output error" in caplog.text
    assert store.num_reads["case2"] == 1 and dataset.statistics()["broken"] == ["case2"]
    assert all(2 not in (int(s["query_case"]), int(s["key_case"])) for s in samples)
    fresh = make_dataset("random", make_store(4, broken=["case2"]))
    for index in (20, 3, 9):  # what replaces a broken pair does not depend on what was read before
        assert_equal(fresh[index], samples[index])


def test_workers_report_broken_volumes_to_the_main_process():
    dataset = make_dataset("random", make_store(4, broken=["case1"]))
    for _ in make_pair_loader(dataset, 2, num_workers=2, num_steps=6):
        pass
    assert dataset.broken_names() == ["case1"]


def test_nothing_but_broken_volumes_ends_with_the_reason():
    dataset = make_dataset("random", make_store(2, broken=["case0", "case1"]))
    with pytest.raises(BrokenVolumeError, match=r"sample 0: 20 pairs in a row.*--store_dir"):
        dataset[0]


# Which cases, and what is refused


def test_subset_of_cases_leaves_the_others_out():
    store = make_store(4)
    dataset = make_dataset("sam", store, make_table(store, 200), case_names=["case1", "case3"])
    assert len(dataset) == 2 and dataset.statistics()["num_cases"] == 2
    for index in range(30):
        draw = dataset.draw_pair(index)
        assert {draw.query_name, draw.key_name} == {"case1", "case3"} and not draw.is_fallback
    assert {int(dataset[i]["query_case"]) for i in range(8)} == {1, 3}  # indices into the store's names
    rows = dataset.pairing.table.rows[dataset.pairing.selection.rows]
    assert len(rows) and {1, 3} == set(rows["query_case"]) == set(rows["key_case"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "same"}, "--pairing is 'same', expected one of sam, iou, random"),
        ({"pairing": "sam"}, "--pairing sam needs a correspondence table"),
        ({"case_names": ["case0", "x"]}, r"1 of 2 cases are not in the volume store \(x\)"),
        ({"case_names": []}, "no cases"),
        ({"case_names": ["case0", "case0"]}, "twice"),
        ({"mask_block": 5}, "--mask_block"),
        ({"hu_min": 300.0}, "--a_min 300"),
        ({"seed": -1}, "--seed"),
        ({"iou_range": (0.6, 0.3)}, "--iou_range"),
        ({"jitter_mm": -1.0}, "--jitter_mm"),
    ],
)
def test_wrong_options_name_their_flag(options, message):
    with pytest.raises(ValueError, match=message):
        PairedCropDataset(make_store(), None, **({"pairing": "iou", "roi": ROI, "mask_block": 8} | options))


def test_table_in_another_frame_is_refused():
    """The published code looked points up in a frame flipped on all three axes; such a table must not pass unseen."""
    store = make_store()
    table = make_table(store)
    table.rows["query_mm"] *= -1
    with pytest.raises(ValueError, match="lie outside of the volumes that they name"):
        make_dataset("sam", store, table)


# The real store


@pytest.fixture(scope="module")
def real_store(tmp_path_factory) -> VolumeStore:
    """Two cases as NIfTI files in two orientations, stored at their native spacing."""
    folder = tmp_path_factory.mktemp("pairs")
    cases = []
    for i, codes in enumerate(("LPS", "RAS")):
        affine = spl_affine((2.0, 2.0, 2.0), (60.0 + 10 * i, 40.0, -50.0))
        volume = world_volume((40, 44, 48), affine)
        image = nib.Nifti1Image(volume, affine)
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        path = folder / f"case{i}.nii.gz"
        nib.save(image.as_reoriented(turn), path)
        cases.append(Case(f"case{i}", path, None))
    build_store(cases, folder / "store", None, progress=False)
    return VolumeStore(folder / "store")


def test_real_store_gives_the_world_place_of_the_crop(real_store):
    rows = np.zeros(30, ROW_DTYPE)
    rng = np.random.default_rng(0)
    for row in rows:
        row["query_case"], row["key_case"] = rng.permutation(2)
        for side in ("query", "key"):
            record = real_store.record(f"case{row[f'{side}_case']}")
            row[f"{side}_mm"] = centre_mm(record, rng.integers(0, np.array(record.shape) - ROI), ROI)
    rows["score"] = 1.0
    table = CorrespondenceTable.from_rows(real_store.names, rows)
    dataset = PairedCropDataset(real_store, table, "sam", **EXACT, hu_min=-500, hu_max=500)
    for batch in make_pair_loader(dataset, 2, num_workers=2, num_steps=4):
        for sample in samples_of(batch):
            for side in ("query", "key"):
                crop = (sample[side][0] * 1000 - 500).numpy()
                expected = float(sample[f"{side}_mm"].double() @ torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64))
                corners = crop[ROI[0] // 2 - 1 : ROI[0] // 2 + 1, ROI[1] // 2 - 1 : ROI[1] // 2 + 1]
                centre = corners[:, :, ROI[2] // 2 - 1 : ROI[2] // 2 + 1]
                if 8 < abs(expected) < 450:  # inside the window
                    assert centre.mean() == pytest.approx(expected, abs=1.0)


def test_damaged_file_in_the_real_store_is_skipped(real_store, tmp_path):
    folder = tmp_path / "store"
    (folder / "cases").mkdir(parents=True)
    for path in real_store.store_dir.rglob("*"):
        if path.is_file() and "locks" not in path.parts:
            (folder / path.relative_to(real_store.store_dir)).write_bytes(path.read_bytes())
    damaged = folder / "cases" / "case1.b2nd"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    dataset = PairedCropDataset(VolumeStore(folder), None, "random", ROI, mask_block=8)
    samples = [dataset[i] for i in range(6)]
    assert dataset.broken_names() == ["case1"] and {int(s["query_case"]) for s in samples} == {0}
    assert all(s["is_fallback"] for s in samples)


def test_sheet_is_drawn(real_store, tmp_path):
    dataset = PairedCropDataset(real_store, None, "iou", ROI, mask_block=8)
    batch = next(iter(make_pair_loader(dataset, 3)))
    for view in ("target", "student"):
        path = tmp_path / "sub" / f"{view}.png"
        draw_pair_sheet(samples_of(batch, 2), path, real_store, view)
        assert path.stat().st_size > 10_000
    draw_pair_sheet(samples_of(batch), tmp_path / "no_store.png")
    with pytest.raises(ValueError, match="at least one"):
        draw_pair_sheet([], tmp_path / "empty.png")


def test_pairing_options_are_checked():
    with pytest.raises(ValueError, match="--max_outside"):
        replace(PairingOptions(ROI), max_outside=2.0)

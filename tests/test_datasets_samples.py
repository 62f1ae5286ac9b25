"""Samples of V crops: their contract, a pure function of seed and index, broken volumes, the real store."""

import logging
import pickle
import zlib

import nibabel as nib
import numpy as np
import pytest
import torch

from datasets.lists.data_list import Case
from datasets.samples.augment import AugmentOptions, window
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.crops import CropOptions, centre_mm, cut
from datasets.samples.dataset import BrokenVolumeError, CutSamples, describe_batch
from datasets.samples.loader import make_pair_loader
from datasets.samples.masks import MaskOptions
from datasets.samples.pairings import PairingOptions, SamPairing
from datasets.store.volumes import VolumeStore, build_store
from engine.watch.sample_sheet import draw_sample_sheet, sample_figure, samples_of
from tests.fakes import ROI, VIEWS, make_dataset, make_store, make_table, spl_affine, world_volume


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("pairing", ["sam", "iou", "random"])
def test_sample_contract(pairing):
    store = make_store()
    sample = make_dataset(pairing, store)[5]
    for name in ("crop", "student", "teacher"):
        assert sample[name].dtype == torch.float32 and sample[name].shape == (2, 1, *ROI), name
        assert sample[name].min() >= 0 and sample[name].max() <= 1
    assert sample["mask"].dtype == torch.bool and sample["mask"].shape == (2, 2, 3, 4)
    assert sample["mask"].flatten(1).sum(1).tolist() == [18, 18]
    assert sample["case"].dtype == torch.int64 and sample["case"].shape == (2,)
    assert sample["centre_mm"].dtype == torch.float32 and sample["centre_mm"].shape == (2, 3)
    for crop, case, point in zip(sample["crop"], sample["case"], sample["centre_mm"]):
        again = window(cut(store, store.names[int(case)], point.numpy(), ROI), -125, 225)
        assert torch.equal(crop, again)  # the stated case and place are where the crop is from
    assert sample["score"].dtype == torch.float32 and sample["is_fallback"].dtype == torch.bool
    assert not sample["is_fallback"] and (sample["case"][0] == sample["case"][1]) == (pairing == "iou")


def test_a_sample_holds_the_views_that_were_asked_for():
    facts = {"crop", "case", "centre_mm", "score", "is_fallback"}
    assert make_dataset("iou", views={})[0].keys() == facts
    assert make_dataset("iou", views={"view": "augmented"})[0].keys() == facts | {"view"}
    with pytest.raises(ValueError, match="views of kind melted; expected augmented, moved, distorted, blocks"):
        make_dataset("iou", views={"view": "melted"})


def test_a_batch_describes_its_samples():
    batch = next(iter(make_pair_loader(make_dataset("iou"), 3)))
    assert describe_batch(batch).keys() == {"fallback_share", "pair_score"}
    assert 0.3 <= describe_batch(batch)["pair_score"].mean() <= 0.6


# Purity


def test_sample_is_a_pure_function_of_seed_and_index():
    a, b = make_dataset(seed=3), make_dataset(seed=3)
    for index in (11, 0, 7, 11, 10**12):
        assert_equal(a[index], b[index])
    assert_equal(pickle.loads(pickle.dumps(a))[4], b[4])
    other = make_dataset(seed=4)
    assert sum(torch.equal(a[i]["crop"], other[i]["crop"]) for i in range(12)) < 3
    assert not torch.equal(a[0]["mask"], a[1]["mask"])


# Of the code before samples had V crops (its query is crop 0, its key crop 1), for seed 5 and four cases:
# (rule, index) -> cases, CRC-32 of crops and of masks, and sums of augmented voxels, weighted from -1 to 1. The sums
# are of the code since noise is a function of key and position; views without noise are as they were.
RECORDED = {
    ("sam", 3): ([2, 1], 3432959604, 3766182288, (857.1849, 925.934, 928.5553, 864.4493)),
    ("sam", 10**12): ([2, 3], 2739836788, 1906030731, (74.4513, 21.6402, 59.4035, 15.3786)),
    ("iou", 3): ([1, 1], 1833333463, 3766182288, (871.6838, 925.934, 892.1685, 864.4493)),
    ("iou", 10**12): ([3, 3], 280362473, 1906030731, (10.3544, 251.4677, 6.408, 192.9651)),
    ("random", 3): ([1, 3], 3401766619, 3766182288, (871.632, 781.763, 886.8968, 784.4682)),
    ("random", 10**12): ([3, 2], 3016440835, 1906030731, (758.2253, 300.4075, 770.6041, 232.9617)),
}


@pytest.mark.parametrize("pairing,index", RECORDED)
def test_samples_are_those_of_recorded_runs(pairing, index):
    """A resumed run of an older version goes on with the samples that it would have had."""
    cases, crops, masks, sums = RECORDED[pairing, index]
    sample = make_dataset(pairing, make_store(4), seed=5)[index]
    assert sample["case"].tolist() == cases
    assert zlib.crc32(sample["crop"].numpy().tobytes()) == crops
    assert zlib.crc32(sample["mask"].numpy().tobytes()) == masks
    weights = torch.linspace(-1, 1, sample["crop"][0].numel(), dtype=torch.float64)
    found = [float(view.flatten().double() @ weights) for name in ("student", "teacher") for view in sample[name]]
    assert found == pytest.approx(sums, abs=0.01)


def test_views_and_masks_of_one_sample_are_drawn_independently():
    strong = AugmentOptions(noise_prob=1.0)
    samples = [make_dataset(augment=strong)[i] for i in range(10)]
    for crop in (0, 1):
        assert not any(torch.equal(s["student"][crop], s["teacher"][crop]) for s in samples)
    assert not all(torch.equal(*s["mask"]) for s in samples)
    for plain in (make_dataset(augment=AugmentOptions.off())[0], make_dataset(crops=CropOptions(augment=False))[0]):
        assert torch.equal(plain["student"], plain["crop"]) and torch.equal(plain["teacher"], plain["crop"])


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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_views_made_of_a_batch_are_those_of_its_samples(num_workers):
    views = VIEWS | {"moved": "moved", "distorted": "distorted"}
    dataset = make_dataset("iou", roi=(16, 16, 16), views=views, masks=MaskOptions(mask_block=8), seed=2)
    loader = make_pair_loader(CutSamples(dataset), 3, num_workers=num_workers, start_step=1, num_steps=3)
    for step, batch in enumerate(loader, start=1):
        assert batch["hu"].dtype == torch.int16 and not {"crop", "student", "distorted"} & batch.keys()
        largest = sorted(value.nbytes for name, value in batch.items() if name not in ("hu", "draws"))[-1]
        assert largest <= 3 * 2 * 8 * 8, "beside the crops a sample is small"
        made, samples = dataset.make_views(batch), [dataset[3 * step + row] for row in range(3)]
        assert made.keys() == samples[0].keys() >= {"crop", *views, "distorted_target"}
        assert_equal(made, {name: torch.stack([sample[name] for sample in samples]) for name in made})
        assert_equal(dataset.make_views(made), made)  # a batch that has its views is as it was


# Broken volumes


def test_a_broken_volume_is_reported_once_and_skipped(caplog):
    store = make_store(4, broken=["case2"])
    dataset = make_dataset("random", store)
    with caplog.at_level(logging.WARNING):
        samples = [dataset[i] for i in range(24)]
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
    assert "case case2" in caplog.text and "input/output error" in caplog.text
    assert store.num_reads["case2"] > 1 and dataset.statistics()["broken"] == ["case2"]
    assert all(2 not in s["case"] for s in samples)
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
    with pytest.raises(BrokenVolumeError, match=r"sample 0: 20 samples in a row.*--store_dir"):
        dataset[0]


# Which cases, and what is refused


def test_subset_of_cases_leaves_the_others_out():
    store = make_store(4)
    dataset = make_dataset("sam", store, make_table(store, 200), ["case1", "case3"])
    assert len(dataset) == 2 and dataset.statistics()["num_cases"] == 2
    for index in range(30):
        places = dataset.places(index)
        assert set(places.names) == {"case1", "case3"} and not places.is_fallback
    assert {int(dataset[i]["case"][0]) for i in range(8)} == {1, 3}  # indices into the store's names
    rows = dataset.pairing.table.rows[dataset.pairing.selection.rows]
    assert len(rows) and {1, 3} == set(rows["query_case"]) == set(rows["key_case"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["case0", "x"]}, r"1 of 2 cases are not in the volume store \(x\)"),
        ({"names": []}, "no cases"),
        ({"names": ["case0", "case0"]}, "twice"),
        ({"masks": MaskOptions(mask_block=5)}, "--mask_block"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_wrong_options_name_their_flag(options, message):
    with pytest.raises(ValueError, match=message):
        make_dataset("iou", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamPairing(make_store(), ["case0"], ROI), "--pairing sam needs a correspondence table"),
        (lambda: CropOptions(a_min=300.0), "--a_min 300"),
        (lambda: PairingOptions(iou_range=(0.6, 0.3)), "--iou_range"),
        (lambda: PairingOptions(jitter_mm=-1.0), "--jitter_mm"),
    ],
)
def test_wrong_values_name_their_flag(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
    crops = CropOptions(a_min=-500, a_max=500, augment=False)
    dataset = make_dataset("sam", real_store, table, crops=crops, max_outside=0.0, jitter_mm=0.0)
    for batch in make_pair_loader(dataset, 2, num_workers=2, num_steps=4):
        for sample in samples_of(batch):
            for crop, point in zip(sample["crop"], sample["centre_mm"]):
                crop = (crop[0] * 1000 - 500).numpy()
                expected = float(point.double() @ torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64))
                corners = crop[ROI[0] // 2 - 1 : ROI[0] // 2 + 1, ROI[1] // 2 - 1 : ROI[1] // 2 + 1]
                centre = corners[:, :, ROI[2] // 2 - 1 : ROI[2] // 2 + 1]
                if 8 < abs(expected) < 450:  # inside the window
                    assert centre.mean() == pytest.approx(expected, abs=1.0)


def test_a_table_of_volumes_whose_headers_were_corrected_is_refused(tmp_path):
    """A mirrored patient lies in the same box: only the file's identity shows that every pair joins wrong sides."""
    cases = [Case(f"case{i}", tmp_path / f"case{i}.nii.gz", None) for i in range(2)]
    affine = spl_affine((2.0, 2.0, 2.0), (43.0, 40.0, -50.0))
    for case in cases:
        nib.save(nib.Nifti1Image(world_volume((40, 44, 44), affine), affine), case.image)
    build_store(cases, tmp_path / "store", progress=False)
    build_store(cases, tmp_path / "coarse", (4.0, 4.0, 4.0), progress=False)
    store = VolumeStore(tmp_path / "store")
    rows = np.zeros(2, ROW_DTYPE)
    rows["query_case"], rows["key_case"], rows["score"] = [0, 1], [1, 0], 1.0
    rows["query_mm"] = rows["key_mm"] = centre_mm(store.record("case0"), np.array([10, 10, 10]), ROI)
    identities = {name: store.record(name).identity for name in store.names}
    table = CorrespondenceTable.write(tmp_path / "table", store.names, rows, {}, identities)
    for folder in ("store", "coarse"):  # the same files at another spacing are the same patients
        assert make_dataset("sam", VolumeStore(tmp_path / folder), table).statistics()["num_usable_rows"] == 2
    mirrored = affine.copy()
    mirrored[0] = -affine[0]
    nib.save(nib.Nifti1Image(world_volume((40, 44, 44), affine), mirrored), cases[1].image)
    build_store(cases, tmp_path / "store", progress=False)
    with pytest.raises(
        ValueError, match=r"1 of its 2 cases were mined from other files than the store's, first case1;"
    ):
        make_dataset("sam", VolumeStore(tmp_path / "store"), table)


def test_damaged_file_in_the_real_store_is_skipped(real_store, tmp_path):
    folder = tmp_path / "store"
    (folder / "cases").mkdir(parents=True)
    for path in real_store.store_dir.rglob("*"):
        if path.is_file() and "locks" not in path.parts:
            (folder / path.relative_to(real_store.store_dir)).write_bytes(path.read_bytes())
    damaged = folder / "cases" / "case1.b2nd"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    dataset = make_dataset("random", VolumeStore(folder))
    samples = [dataset[i] for i in range(6)]
    assert dataset.broken_names() == ["case1"] and {int(s["case"][0]) for s in samples} == {0}
    assert all(s["is_fallback"] for s in samples)


def test_a_damaged_chunk_costs_its_own_crops_only_whatever_was_read_before(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for name in ("case0", "case1", "case2"):  # three chunks along D
        hu = rng.integers(-100, 200, (40, 40, 130)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / f"{name}.nii.gz")
    cases = [Case(name, tmp_path / f"{name}.nii.gz", None) for name in ("case0", "case1", "case2")]
    build_store(cases, tmp_path / "store", progress=False)
    file = tmp_path / "store" / "cases" / "case1.b2nd"
    content = bytearray(file.read_bytes())
    first, last = int(0.6 * len(content)), int(0.8 * len(content))  # within the second chunk
    content[first:last] = bytes(last - first)
    file.write_bytes(content)
    dataset = make_dataset("random", VolumeStore(tmp_path / "store"), seed=5)
    with caplog.at_level(logging.WARNING):
        samples = [dataset[i] for i in range(40)]
    assert len(caplog.records) == 1 and "case case1 cannot be read" in caplog.text
    cases_seen = [int(case) for sample in samples for case in sample["case"]]
    assert 0 < cases_seen.count(1) < cases_seen.count(0)  # the sound chunks of the volume are still used
    fresh = make_dataset("random", VolumeStore(tmp_path / "store"), seed=5)
    for index in range(39, -1, -3):
        assert_equal(fresh[index], samples[index])


def test_sheet_is_drawn(real_store, tmp_path):
    batch = next(iter(make_pair_loader(make_dataset("iou", real_store), 3)))
    for view in ("crop", "student"):
        path = tmp_path / "sub" / f"{view}.png"
        draw_sample_sheet(samples_of(batch, 2), path, real_store, view)
        assert path.stat().st_size > 10_000
    draw_sample_sheet(samples_of(batch), tmp_path / "no_store.png")
    maskless = make_dataset("iou", real_store, views={"view": "augmented"})
    draw_sample_sheet([maskless[0]], tmp_path / "maskless.png", real_store, "view")
    of_slices = make_dataset("iou", real_store, roi=(1, 24, 32))
    figure = sample_figure([of_slices[0]], real_store)
    assert [axis.images[0].get_array().shape for axis in figure.axes] == [(24, 32)] * 2  # one plane a crop
    tinted = figure.axes[0].images[1].get_array()[..., 3] > 0
    assert tinted.reshape(3, 8, 4, 8).all((1, 3)).sum() == tinted.sum() // 64 == of_slices[0]["mask"][0].sum()
    with pytest.raises(ValueError, match="at least one"):
        draw_sample_sheet([], tmp_path / "empty.png")

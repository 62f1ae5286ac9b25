"""The volume store: what goes in comes out, crops touch little, builds survive everything, damage is noticed."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from datasets.ct.geometry import resample
from datasets.ct.nifti import read_ct, read_label
from datasets.lists.data_list import Case, write_data_list
from datasets.lists.search import find_cases
from datasets.store.arrays import check_file, compress, files_of, read_region
from datasets.store.files import FileWriteError, exclusive
from datasets.store.format import write_index
from datasets.store.volumes import DEFAULT_SPACING_MM, StoreError, VolumeStore, build_store, fill_store, parse_spacing
from scripts import prepare_volumes
from tests.shared import shared_file

REPOSITORY = Path(__file__).resolve().parents[1]


def put_case(folder: Path, name: str, shape=(40, 50, 60), seed=0, label=False) -> Case:
    """A random volume of (X, Y, Z) = `shape` in LAS orientation with spacing (0.8, 1, 2.5) mm."""
    rng = np.random.default_rng(seed)
    affine = np.diag([-0.8, 1, 2.5, 1.0])
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / f"{name}.nii"
    nib.save(nib.Nifti1Image(rng.integers(-1000, 1500, size=shape).astype(np.int16), affine), image)
    if not label:
        return Case(name, image)
    nib.save(nib.Nifti1Image(rng.integers(0, 14, size=shape).astype(np.uint8), affine), folder / f"{name}_label.nii")
    return Case(name, image, folder / f"{name}_label.nii")


def verify(store: VolumeStore, name: str) -> None:
    """Raise StoreError where a file of the case differs from its checksum."""
    for path, checksum in files_of(store.record(name), store.store_dir):
        check_file(path, checksum)


@pytest.fixture
def cases(tmp_path) -> list[Case]:
    return [put_case(tmp_path / "data", f"case{number}", seed=number, label=number == 0) for number in range(3)]


@pytest.fixture
def store(tmp_path, cases) -> VolumeStore:
    build_store(cases, tmp_path / "store", progress=False)
    return VolumeStore(tmp_path / "store")


PAD = 130


def crop_of_padded(padded: np.ndarray, start, size) -> np.ndarray:
    """The obvious crop: everything was padded by PAD, now cut."""
    return padded[tuple(slice(s + PAD, s + PAD + n) for s, n in zip(start, size))]


def test_volumes_labels_and_records_come_back(store, cases):
    assert store.names == ["case0", "case1", "case2"] and len(store) == 3 and store.spacing_mm is None
    for case in cases:
        truth, stored, record = read_ct(case.image), store.read(case.name), store.record(case.name)
        assert np.array_equal(stored.array, truth.array) and stored.array.dtype == np.int16
        assert np.array_equal(stored.affine, truth.affine) and np.array_equal(record.affine, truth.affine)
        assert record.shape == truth.shape == (60, 50, 40) and np.allclose(record.spacing_mm, (2.5, 1, 0.8))
        assert record.source == str(case.image) and record.has_label == (case.label is not None)
        verify(store, case.name)
    label = store.read_label("case0")
    assert np.array_equal(label.array, read_label(cases[0].label).array) and label.array.dtype == np.uint8


def test_crops_equal_the_obvious_crop_anywhere(store):
    array = np.pad(store.read("case0").array, PAD, constant_values=-77)
    labels = np.pad(store.read_label("case0").array, PAD)
    rng = np.random.default_rng(0)
    for _ in range(40):
        start, size = rng.integers(-40, 70, size=3), rng.integers(1, 80, size=3)
        crop = store.crop("case0", start, size, fill=-77)
        assert np.array_equal(crop, crop_of_padded(array, start, size))
        assert crop.dtype == np.int16 and crop.flags.c_contiguous and crop.flags.writeable
        crop = store.label_crop("case0", start, size)
        assert np.array_equal(crop, crop_of_padded(labels, start, size)) and crop.dtype == np.uint8
    assert (store.crop("case0", (-5, 0, 0), (5, 5, 5)) == -1024).all()


def test_wrong_questions_are_answered_clearly(store, tmp_path):
    with pytest.raises(StoreError, match="no case called 'nobody'"):
        store.crop("nobody", (0, 0, 0), (2, 2, 2))
    with pytest.raises(StoreError, match="case1 has no label"):
        store.label_crop("case1", (0, 0, 0), (2, 2, 2))
    with pytest.raises(ValueError, match="size above zero"):
        store.crop("case0", (0, 0, 0), (2, 0, 2))
    with pytest.raises(StoreError, match="1 of 2 cases are not in the store, first gone"):
        VolumeStore(store.store_dir, names=["case1", "gone"])
    with pytest.raises(StoreError, match="no volume store there"):
        VolumeStore(tmp_path / "nowhere")
    assert VolumeStore(store.store_dir, names=["case2", "case0"]).names == ["case2", "case0"]


def test_resampled_store(tmp_path, cases):
    build_store(cases[:1], tmp_path / "store", (2, 1.5, 1.5), progress=False)
    store = VolumeStore(tmp_path / "store", expected_spacing_mm=(2, 1.5, 1.5))
    image, label = read_ct(cases[0].image), read_label(cases[0].label)
    expected, affine = resample(image.array, image.affine, (2, 1.5, 1.5))
    stored = store.read("case0")
    assert np.array_equal(stored.array, expected) and np.allclose(stored.affine, affine)
    assert np.allclose(stored.spacing_mm, (2, 1.5, 1.5)) and store.spacing_mm == (2, 1.5, 1.5)
    assert np.array_equal(store.read_label("case0").array, resample(label.array, label.affine, (2, 1.5, 1.5), 0)[0])


def test_another_spacing_is_refused_naming_both(store, cases):
    both = r"spacing is native, but 2 x 2 x 2 mm \(D, H, W\).*--spacing_mm"
    with pytest.raises(StoreError, match=both):
        VolumeStore(store.store_dir, expected_spacing_mm=(2, 2, 2))
    with pytest.raises(StoreError, match=both):
        build_store(cases, store.store_dir, (2, 2, 2), progress=False)
    VolumeStore(store.store_dir, expected_spacing_mm="native")
    settings = json.loads((store.store_dir / "store.json").read_text())
    (store.store_dir / "store.json").write_text(json.dumps(settings | {"version": 99}))
    with pytest.raises(StoreError, match="version 99, expected .* version 1"):
        VolumeStore(store.store_dir)


@pytest.mark.parametrize(
    "words, expected",
    [(["native"], None), (None, None), (["2"], (2, 2, 2)), ([1.5, 1.5, 2], (1.5, 1.5, 2)), (2.0, (2, 2, 2))],
)
def test_parse_spacing(words, expected):
    assert parse_spacing(words) == expected


@pytest.mark.parametrize("words", [["1", "2"], ["native", "2"], ["two"], ["0"], ["-1", "1", "1"], ["nan"], ["inf"]])
def test_parse_spacing_refuses(words):
    with pytest.raises(StoreError, match="--spacing_mm"):
        parse_spacing(words)


def test_finished_cases_are_reused_and_changed_ones_made_again(store, cases, tmp_path):
    def build(cases):
        report = build_store(cases, store.store_dir, progress=False)
        assert not report.failed
        return report.built, report.reused

    assert build(cases) == ([], ["case0", "case1", "case2"])
    put_case(tmp_path / "data", "case1", shape=(30, 30, 30), seed=9)
    assert build(cases) == (["case1"], ["case0", "case2"])
    assert VolumeStore(store.store_dir).record("case1").shape == (30, 30, 30)
    with_label = put_case(tmp_path / "data", "case2", seed=2, label=True)
    assert build([*cases[:2], with_label]) == (["case2"], ["case0", "case1"])
    assert VolumeStore(store.store_dir).record("case2").has_label
    put_case(tmp_path / "data", "case2", seed=2, label=True)  # the same label, written later
    assert build([*cases[:2], with_label]) == ([], ["case0", "case1", "case2"])
    label = nib.load(with_label.label)
    nib.save(nib.Nifti1Image(1 - np.asarray(label.dataobj), label.affine), with_label.label)
    assert build([*cases[:2], with_label]) == (["case2"], ["case0", "case1"])
    with_label.label.unlink()  # a file that is gone fails its case, and costs the store nothing
    report = build_store([with_label], store.store_dir, progress=False)
    assert "No such file" in report.failed["case2"] and "case2" in VolumeStore(store.store_dir)
    cases[0].image.unlink()  # the store stands alone once its images are gone
    assert build(cases) == ([], ["case0", "case1", "case2"])
    (store.store_dir / "cases" / "case1.b2nd").unlink()
    assert build(cases) == (["case1"], ["case0", "case2"])


def test_a_list_without_labels_keeps_stored_labels(store, cases, tmp_path):
    without = [Case("case0", cases[0].image)]
    in_use = VolumeStore(store.store_dir)
    stats = [path.stat() for path in (cases[0].image, cases[0].label)]
    # A word each, as in stores from before lists without labels kept them.
    stamp = " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)
    assert store.record("case0").source_stamp == stamp

    def build(cases, **flags):
        assert not (report := build_store(cases, store.store_dir, progress=False, **flags)).failed
        return report.built

    assert build(without) == []
    flip_bytes(store.store_dir / "cases" / "case0.b2nd", 0.5)
    assert build(without, verify=True) == ["case0"]  # the image alone is made again
    label = read_label(cases[0].label).array
    assert np.array_equal(in_use.label_crop("case0", (0, 0, 0), label.shape), label)
    assert VolumeStore(store.store_dir).record("case0").source_stamp == stamp
    assert build(cases[:1], verify=True) == []
    put_case(tmp_path / "data", "case0", shape=(30, 30, 30), seed=5)  # a label of the old image fits no more
    assert build(without) == ["case0"]
    assert not VolumeStore(store.store_dir).record("case0").has_label
    assert not (store.store_dir / "cases" / "case0.label.b2nd").exists()


def test_failures_are_listed_and_tried_again(tmp_path, cases):
    good = cases[1].image.read_bytes()
    cases[1].image.write_bytes(good[:1000])
    cases.append(Case("missing", tmp_path / "missing.nii"))
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "small.nii")
    cases.append(Case("mislabelled", cases[2].image, tmp_path / "small.nii"))
    report = build_store(cases, tmp_path / "store", progress=False)
    assert report.built == ["case0", "case2"] and sorted(report.failed) == ["case1", "mislabelled", "missing"]
    assert "truncated" in report.failed["case1"] and str(cases[1].image) in report.failed["case1"]
    assert "label has shape (4, 4, 4)" in report.failed["mislabelled"]
    listed = json.loads((tmp_path / "store" / "failures.json").read_text())
    assert listed == report.failed
    assert VolumeStore(tmp_path / "store").names == ["case0", "case2"]

    cases[1].image.write_bytes(good)
    assert build_store(cases[:3], tmp_path / "store", progress=False).built == ["case1"]
    assert sorted(json.loads((tmp_path / "store" / "failures.json").read_text())) == ["mislabelled", "missing"]


def test_what_nobody_foresaw_in_one_case_leaves_the_others(tmp_path, cases, monkeypatch):
    def read(path, mr_percentiles):
        if Path(path) == cases[1].image:
            raise OverflowError("too large")
        return read_ct(path)

    monkeypatch.setattr("datasets.store.build.read_image", read)
    report = build_store(cases, tmp_path / "store", progress=False)
    assert report.built == ["case0", "case2"]
    reason = f"{cases[1].image}: unexpected OverflowError while storing it (too large)"
    assert report.failed == {"case1": reason}
    monkeypatch.setattr("datasets.store.build.read_image", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_store(cases, tmp_path / "store", progress=False)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_label_beside_its_image_is_refused(tmp_path):
    case = put_case(tmp_path / "data", "case", label=True)
    label = nib.load(case.label)
    shifted = label.affine.copy()
    shifted[0, 3] += 30
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), shifted), tmp_path / "shifted.nii")
    report = build_store([Case("case", case.image, tmp_path / "shifted.nii")], tmp_path / "store", progress=False)
    assert "30.0 mm beside" in report.failed["case"]


@pytest.mark.parametrize("names", [["a", "a"], ["a/b"], [".a"], ["a.label"], [""]])
def test_names_that_cannot_be_files(tmp_path, names):
    with pytest.raises(StoreError, match="name"):
        build_store([Case(name, tmp_path / "x.nii") for name in names], tmp_path / "store", progress=False)


def test_a_store_is_filled_with_what_it_lacks(tmp_path, cases, capsys):
    folder, broken = tmp_path / "filled", Case("broken", tmp_path / "gone.nii")
    report = fill_store([*cases[:2], Case("case0", cases[0].image), broken], folder)
    printed = capsys.readouterr().out
    assert f"{folder}: 3 cases to add at 2 x 1.5 x 1.5 mm" in printed
    assert [
        line for line in printed.splitlines() if line.startswith("left out: broken: ")
    ] and "broken" in report.failed
    filled = VolumeStore(folder)
    assert filled.names == ["case0", "case1"] and filled.record("case0").has_label
    assert filled.spacing_mm == DEFAULT_SPACING_MM
    with pytest.raises(StoreError, match="--spacing_mm"):
        fill_store(cases, folder, "native")
    fill_store(cases[:2], folder, "native")  # nothing to add, so nothing is asked of the store
    assert fill_store(cases, folder).built == ["case2"] and VolumeStore(folder).spacing_mm == DEFAULT_SPACING_MM


def test_filling_adds_new_labels_and_on_request_what_has_changed(store, cases):
    labelled = put_case(cases[0].image.parent, "case1", seed=1, label=True)
    assert fill_store([cases[0], labelled], store.store_dir).built == ["case1"]
    assert VolumeStore(store.store_dir).record("case1").has_label
    put_case(cases[2].image.parent, "case2", seed=5)
    assert not fill_store(cases, store.store_dir).built
    assert fill_store(cases, store.store_dir, renew=True).built == ["case2"]


def test_processes_give_the_same_files(store, cases, tmp_path):
    report = build_store(cases, tmp_path / "parallel", num_workers=2, progress=False)
    assert report.built == store.names
    for name in store.names:
        assert VolumeStore(tmp_path / "parallel").record(name).checksum == store.record(name).checksum


def flip_bytes(path: Path, where: float, num_bytes: int = 200) -> None:
    """Invert some bytes of a file, `where` (0 to 1) along it; its size and name stay."""
    content = bytearray(path.read_bytes())
    begin = int(where * (len(content) - num_bytes))
    content[begin : begin + num_bytes] = bytes(255 - byte for byte in content[begin : begin + num_bytes])
    path.write_bytes(content)


def test_damage_is_noticed_and_repaired(store, cases):
    for file in ("case1.b2nd", "case0.label.b2nd"):
        flip_bytes(store.store_dir / "cases" / file, 0.5)
        name = file.split(".")[0]
        with pytest.raises(StoreError, match=f"{file}: checksum"):
            verify(store, name)
        assert build_store(cases, store.store_dir, progress=False).built == []
        assert build_store(cases, store.store_dir, verify=True, progress=False).built == [name]
        store = VolumeStore(store.store_dir)
        verify(store, name)


def test_a_flipped_bit_is_never_read_as_other_voxels(store, cases):
    """Decompression alone notices one in seven."""
    rng = np.random.default_rng(0)
    for name, read in (("case1.b2nd", store.crop), ("case0.label.b2nd", store.label_crop)):
        path, whole = store.store_dir / "cases" / name, store.record(name.split(".")[0]).shape
        content, truth = path.read_bytes(), read(name.split(".")[0], (0, 0, 0), whole)
        num_noticed = 0
        for position in rng.integers(0, 8 * len(content), 100):
            flipped = bytearray(content)
            flipped[position // 8] ^= 1 << (position % 8)
            path.write_bytes(flipped)
            try:
                assert np.array_equal(read(name.split(".")[0], (0, 0, 0), whole), truth), position
            except StoreError:
                num_noticed += 1
        assert num_noticed > 90
        path.write_bytes(content)


def test_a_file_of_another_case_or_type_is_not_cropped(store, cases, tmp_path):
    case_files = store.store_dir / "cases"
    (case_files / "case1.b2nd").write_bytes((case_files / "case2.b2nd").read_bytes())  # of the same shape
    with pytest.raises(StoreError, match="case1.b2nd: a checksum differs"):
        store.crop("case1", (0, 0, 0), (8, 8, 8))
    floats = compress(np.zeros(store.record("case2").shape, np.float32))
    (case_files / "case2.b2nd").write_bytes(floats)
    with pytest.raises(StoreError, match="case2.b2nd: holds float32 of shape"):
        store.crop("case2", (0, 0, 0), (8, 8, 8))


def test_older_stores_without_checksums_of_chunks_go_on(store, cases):
    plain = store.record("case1").to_json()
    truth = store.read("case1").array
    for name in ("chunk_crc32", "label_chunk_crc32", "source_digest"):
        del plain[name]
    (store.store_dir / "cases" / "case1.json").write_text(json.dumps(plain))
    older = VolumeStore(store.store_dir)
    assert older.record("case1").identity.count(":") == 2 and np.array_equal(older.read("case1").array, truth)
    assert build_store(cases, store.store_dir, progress=False).built == []
    os.utime(cases[1].image, ns=(1, 1))
    assert build_store(cases, store.store_dir, progress=False).built == ["case1"], "nothing shows that it is the same"


def test_a_first_try_with_another_spacing_does_not_bind_an_empty_store(tmp_path, cases):
    missing = Case("missing", tmp_path / "typo" / "missing.nii")
    assert build_store([missing], tmp_path / "store", progress=False).failed
    assert VolumeStore(tmp_path / "store").spacing_mm is None
    build_store(cases[:1], tmp_path / "store", (3.0, 3.0, 3.0), progress=False)
    assert VolumeStore(tmp_path / "store").spacing_mm == (3.0, 3.0, 3.0)
    with pytest.raises(StoreError, match="--spacing_mm"):
        build_store(cases, tmp_path / "store", progress=False)


def test_copied_and_touched_files_are_not_stored_again(store, cases, tmp_path):
    identity = {name: store.record(name).identity for name in store.names}
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    copies = [
        Case(case.name, tmp_path / "copy" / case.image.name, case.label and tmp_path / "copy" / case.label.name)
        for case in cases
    ]
    for case in copies:
        os.utime(case.image)
    assert build_store(copies, store.store_dir, progress=False).reused == store.names
    moved = VolumeStore(store.store_dir)
    assert {name: moved.record(name).identity for name in moved.names} == identity, "embeddings are kept too"
    assert moved.record("case1").source == str(copies[1].image)
    stamps = {name: moved.record(name).source_stamp for name in moved.names}
    put_case(tmp_path / "copy", "case1", seed=9)
    shutil.rmtree(tmp_path / "data")
    assert build_store(copies, store.store_dir, progress=False).built == ["case1"]
    assert VolumeStore(store.store_dir).record("case2").source_stamp == stamps["case2"]


def test_two_data_sets_with_one_case_name_are_not_mixed(store, cases, tmp_path):
    other = put_case(tmp_path / "other", "case1", seed=7)
    report = build_store([other], store.store_dir, progress=False)
    assert "the store holds a case case1 of another file" in report.failed["case1"] and not report.built
    assert store.crop("case1", (0, 0, 0), (8, 8, 8)).shape == (8, 8, 8)
    other = put_case(tmp_path / "other", "case1", seed=7, shape=(20, 20, 20))
    with pytest.raises(StoreError, match=f"{other.image}: the store holds a case case1 of another file.*--store_dir"):
        fill_store([other], store.store_dir)


@pytest.mark.parametrize("damage", ["[]", '{"version": 1, "cases": []}', '{"version": 1, "cases": {"case0": 5}}', "5"])
def test_indices_and_settings_of_wrong_types(store, damage):
    (store.store_dir / "index.json").write_text(damage)
    assert VolumeStore(store.store_dir).names == ["case0", "case1", "case2"]
    plain = store.record("case1").to_json()
    for wrong in ({"shape": 5}, {"affine": "x"}, {"checksum": 5}, {"body_start": [1]}, {"source_stamp": None}):
        (store.store_dir / "cases" / "case1.json").write_text(json.dumps(plain | wrong))
        assert VolumeStore(store.store_dir).names == ["case0", "case2"]
    settings = json.loads((store.store_dir / "store.json").read_text())
    for wrong in ([], settings | {"spacing_mm": 5}, settings | {"spacing_mm": ["a", 1, 1]}, settings | {"kind": "x"}):
        (store.store_dir / "store.json").write_text(json.dumps(wrong))
        with pytest.raises(StoreError, match="store.json: (damaged|holds a list)"):
            VolumeStore(store.store_dir)


def test_a_crop_reads_only_the_chunks_it_touches(tmp_path):
    case = put_case(tmp_path, "wide", shape=(300, 70, 70))
    build_store([case], tmp_path / "store", progress=False)
    store = VolumeStore(tmp_path / "store")
    whole = store.read("wide").array
    path = store.store_dir / "cases" / "wide.b2nd"
    for where in (0.4, 0.5, 0.6):
        flip_bytes(path, where, 20_000)
    with pytest.raises(StoreError, match="wide.b2nd: a checksum differs: the file was damaged"):
        store.read("wide")
    size = (60, 60, 60)
    assert np.array_equal(store.crop("wide", (0, 0, 0), size), whole[:60, :60, :60])


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "gone", "other shape"])
def test_damaged_files_raise_store_errors(store, damage):
    path = store.store_dir / "cases" / "case0.b2nd"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "overwritten":
        path.write_bytes(b"\0" * 5000)
    elif damage == "gone":
        path.unlink()
    else:
        (store.store_dir / "cases" / "case0.json").write_text(
            json.dumps(store.record("case0").to_json() | {"shape": [60, 90, 40]})
        )
        store = VolumeStore(store.store_dir)
    with pytest.raises(StoreError, match="case0.b2nd"):
        store.crop("case0", (0, 45, 0), (50, 45, 30))
    assert store.crop("case1", (0, 0, 0), (50, 45, 30)).shape == (50, 45, 30)


class Crops:
    """A map-style data set; torch is imported by its users only, because spawned builders import this module."""

    def __init__(self, store: VolumeStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int):
        start = np.random.default_rng(index).integers(-10, 30, size=3)
        return self.store.crop(self.store.names[index % 3], start, (32, 32, 32))


def test_dataloader_workers_share_a_store(store):
    from torch.utils.data import DataLoader

    crops = Crops(store)
    crops[0]  # a fork after use must work
    loader = DataLoader(crops, batch_size=4, num_workers=2, multiprocessing_context="fork")
    batches = np.concatenate([batch.numpy() for batch in loader])
    assert np.array_equal(batches, np.stack([crops[index] for index in range(len(crops))]))
    again = pickle.loads(pickle.dumps(store))
    assert again.names == store.names and np.array_equal(again.read("case1").array, store.read("case1").array)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
def test_crops_start_no_threads_and_keep_no_files_open(store):
    code = f"""
import os
from datasets.store.volumes import VolumeStore
count = lambda: (len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))
store = VolumeStore({str(store.store_dir)!r})
before = count()
for name in store.names * 5:
    store.crop(name, (-5, 0, 0), (50, 50, 40))
assert count() == before, (before, count())
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def many_cases(store: VolumeStore, num_cases: int) -> None:
    """Fill a store with manifests of copies of case0; voxels are not needed to open it."""
    plain = store.record("case0").to_json()
    for number in range(num_cases):
        name = f"copy{number:04d}"
        (store.store_dir / "cases" / f"{name}.json").write_text(json.dumps(plain | {"name": name}))


def test_many_cases_open_faster_with_the_index(store):
    many_cases(store, 1000)

    def seconds_to_open(names=None) -> float:
        start = time.perf_counter()
        assert len(VolumeStore(store.store_dir, names)) == (1003 if names is None else len(names))
        return time.perf_counter() - start

    without = min(seconds_to_open() for _ in range(3))
    write_index(store.store_dir)
    assert min(seconds_to_open() for _ in range(3)) < without
    some = [f"copy{number:04d}" for number in range(1000)]
    assert min(seconds_to_open(some) for _ in range(3)) < without


def test_an_outdated_or_broken_index_does_no_harm(store):
    plain = store.record("case0").to_json()
    (store.store_dir / "cases" / "late.json").write_text(json.dumps(plain | {"name": "late"}))
    (store.store_dir / "cases" / "case1.json").unlink()
    (store.store_dir / "cases" / "case2.json").write_text("{ half a manif")
    assert VolumeStore(store.store_dir).names == ["case0", "late"]
    (store.store_dir / "index.json").write_text("{")
    assert VolumeStore(store.store_dir).names == ["case0", "late"]
    (store.store_dir / "index.json").unlink()
    assert VolumeStore(store.store_dir).names == ["case0", "late"]


BUILD = """
import sys
from datasets.lists.search import find_cases
from datasets.store.volumes import build_store
if __name__ == "__main__":
    print("ready", flush=True)
    report = build_store(find_cases(sys.argv[1]), sys.argv[2], (2.0, 1.0, 1.0), progress=False)
    print(*report.built)
"""


def start_build(data_dir: Path, store_dir: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(data_dir), str(store_dir)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def assert_whole(store_dir: Path, num_cases: int) -> None:
    store = VolumeStore(store_dir)
    assert len(store) == num_cases
    for name in store.names:
        verify(store, name)
        store.read(name)
    assert (
        sorted(file.suffix for file in (store_dir / "cases").iterdir()) == [".b2nd"] * num_cases + [".json"] * num_cases
    )


def test_killed_builds_lose_only_the_case_in_work(tmp_path):
    data_dir, store_dir = tmp_path / "data", tmp_path / "store"
    for number in range(12):
        put_case(data_dir, f"case{number:02d}", shape=(80, 80, 60), seed=number)
    num_done = []
    for delay_s in (0.15, 0.3, 0.45):
        process = start_build(data_dir, store_dir)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        opened = VolumeStore(store_dir) if (store_dir / "store.json").exists() else []
        for name in getattr(opened, "names", []):
            verify(opened, name)
        num_done.append(len(opened))
    assert num_done == sorted(num_done)
    # Left over from a writer that died between writing and renaming.
    (store_dir / "cases").mkdir(parents=True, exist_ok=True)
    (store_dir / "cases" / ".case11.b2nd.elsewhere-1.aside").write_bytes(b"half")
    (store_dir / "cases" / "case11.json").unlink(missing_ok=True)
    report = build_store(find_cases(data_dir), store_dir, (2.0, 1.0, 1.0), progress=False)
    assert len(report.reused) >= num_done[-1] - 1 and len(report.reused) + len(report.built) == 12
    assert_whole(store_dir, 12)


def test_several_processes_share_one_build(tmp_path):
    data_dir, store_dir = tmp_path / "data", tmp_path / "store"
    for number in range(12):
        put_case(data_dir, f"case{number:02d}", shape=(80, 80, 60), seed=number)
    processes = [start_build(data_dir, store_dir) for _ in range(3)]
    built = [process.communicate()[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(name for names in built for name in names) == [f"case{number:02d}" for number in range(12)]
    assert_whole(store_dir, 12)


def test_a_file_system_without_locks(tmp_path, cases, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    with exclusive(tmp_path / "lock") as locked:
        assert locked
    monkeypatch.setattr(fcntl, "flock", refuse)
    in_work = tmp_path / "store" / "cases" / ".case0.b2nd.elsewhere-1.aside"
    in_work.parent.mkdir(parents=True)
    in_work.write_bytes(b"half, by another builder")
    assert build_store(cases, tmp_path / "store", progress=False).built == ["case0", "case1", "case2"]
    assert in_work.exists()
    with exclusive(tmp_path / "lock") as locked:
        assert not locked


def test_a_full_disk_is_reported_and_what_is_there_stays(store, cases, tmp_path):
    resource = pytest.importorskip("resource")
    put_case(tmp_path / "data", "case1", shape=(100, 100, 100), seed=5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))  # room for case2, not for the new case1
    try:
        with pytest.raises(FileWriteError, match=r"case1\.b2nd: no room for \d\.\d MiB"):
            build_store(cases, store.store_dir, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    opened = VolumeStore(store.store_dir)
    assert opened.names == ["case0", "case2"]
    assert not [file for file in (store.store_dir / "cases").iterdir() if file.name.endswith(".aside")]
    assert build_store(cases, store.store_dir, progress=False).built == ["case1"]


def test_a_store_that_cannot_be_written_to(tmp_path, cases):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileWriteError, match="cannot be written"):
        build_store(cases, tmp_path / "file" / "store", progress=False)


def test_a_finished_store_is_left_untouched(store, cases):
    before = {file: file.stat().st_mtime_ns for file in sorted(store.store_dir.rglob("*")) if file.is_file()}
    assert build_store(cases, store.store_dir, num_workers=2, progress=False).reused == store.names
    after = {file: file.stat().st_mtime_ns for file in sorted(store.store_dir.rglob("*")) if file.is_file()}
    assert after == before


def test_a_killed_worker_is_explained(tmp_path, cases, monkeypatch):
    # A case that kills its process stands for one that runs out of memory.
    monkeypatch.setattr("datasets.store.build._store_case", _die)
    with pytest.raises(StoreError, match="lower --num_workers"):
        build_store(cases, tmp_path / "store", num_workers=2, progress=False)


def _die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_prepare_volumes_command(tmp_path, cases, capsys):
    cases[2].image.write_bytes(b"nonsense")
    write_data_list(tmp_path / "list.json", tmp_path, cases[:2], cases[2:])
    command = [
        *("--data_dir", str(tmp_path), "--json_list", str(tmp_path / "list.json"), "--num_workers", "1"),
        *("--store_dir", str(tmp_path / "store"), "--spacing_mm", "2", "1.5", "1.5"),
    ]
    prepare_volumes.main(command)
    told = capsys.readouterr()
    assert "2 cases stored, 0 were there already, 1 failed" in told.out and "failed case2" in told.err
    assert VolumeStore(tmp_path / "store").spacing_mm == (2, 1.5, 1.5)
    assert json.loads((tmp_path / "store" / "run.json").read_text())["flags"]["spacing_mm"] == ["2", "1.5", "1.5"]
    flip_bytes(tmp_path / "store" / "cases" / "case0.b2nd", 0.5)
    prepare_volumes.main([*command, "--verify"])
    assert "1 cases stored, 1 were there already" in capsys.readouterr().out
    with pytest.raises(StoreError, match="2 x 1.5 x 1.5 mm .* but native"):
        prepare_volumes.main(command[:-4])
    (tmp_path / "spacing.yaml").write_text("spacing_mm: [2, 1.5, 1.5]\n")
    prepare_volumes.main(["--config", str(tmp_path / "spacing.yaml"), *command[:-4]])
    assert "0 cases stored, 2 were there already" in capsys.readouterr().out


def test_prepare_volumes_starts_no_more_workers_than_cores_are_granted(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7}, raising=False)
    assert prepare_volumes.make_flags().get_defaults().num_workers == 2


def test_prepare_volumes_fails_when_nothing_can_be_stored(tmp_path, cases):
    cases[0].image.write_bytes(b"nonsense")
    write_data_list(tmp_path / "list.json", tmp_path, cases[:1])
    command = ["--data_dir", str(tmp_path), "--json_list", str(tmp_path / "list.json"), "--num_workers", "1"]
    with pytest.raises(StoreError, match="none of 1 cases could be stored"):
        prepare_volumes.main([*command, "--store_dir", str(tmp_path / "store")])


def test_real_ct_goes_through_the_store(tmp_path):
    case = Case("chest", shared_file("ct", "chest_2mm.nii.gz"), shared_file("ct", "chest_2mm_label.nii.gz"))
    build_store([case], tmp_path, (3, 3, 3), progress=False)
    store = VolumeStore(tmp_path)
    record = store.record("chest")
    assert record.shape == (134, 167, 167)
    assert (record.body_stop - record.body_start)[1] * 3 < 400  # mm from chest to back, without the table
    assert (store.store_dir / "cases" / "chest.b2nd").stat().st_size < case.image.stat().st_size
    labels, ct = store.read_label("chest").array, store.read("chest").array
    assert np.median(ct[labels == 2]) < -700 and np.median(ct[labels == 1]) > 0
    inside = read_region(store.store_dir / "cases" / "chest.b2nd", record, (slice(5, 9), slice(60, 70), slice(3, 99)))
    assert np.array_equal(inside, ct[5:9, 60:70, 3:99])

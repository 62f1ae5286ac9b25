"""Radiographs: PNG files of any depth become int16 volumes [1, H, W]; nothing is cut or guessed in silence."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.ct.images import CT, RADIOGRAPH
from datasets.ct.nifti import CTReadError, write_nifti
from datasets.ct.radiograph import read_mask_of, read_radiograph, write_grey
from datasets.lists.data_list import Case, DataListError, kind_of_cases
from datasets.lists.search import find_cases
from datasets.samples.augment import AugmentOptions
from datasets.samples.crops import CropOptions
from datasets.store.format import CaseRecord, read_settings
from datasets.store.volumes import StoreError, VolumeStore, build_store, fill_store
from sam_embed.case_source import CaseOptions, open_cases
from tests.fakes import make_dataset, spl_affine
from tests.small_radiographs import picture, raw_png, save

RAMP_12_BIT = np.arange(4096, dtype=np.uint16).reshape(64, 64)


# Files


@pytest.mark.parametrize("dtype, offset", [(np.uint8, 128), (np.uint16, 32768)])
def test_grey_of_n_bits_less_half_its_range(tmp_path, dtype, offset):
    grey = picture(dtype=dtype)
    image = read_radiograph(save(tmp_path / "a.png", grey))
    assert image.array.dtype == np.int16 and image.shape == (1, 40, 48) and image.bits == 8 * grey.itemsize
    assert np.array_equal(image.array[0].astype(int) + offset, grey)
    assert (image.array.min(), image.array.max()) == (-offset, offset - 1)


def test_a_12_bit_ramp_keeps_all_its_values(tmp_path):
    """The published loader cuts it at 255: 94 % white."""
    image = read_radiograph(save(tmp_path / "ramp.png", RAMP_12_BIT))
    assert np.array_equal(image.array[0].astype(int) + 32768, RAMP_12_BIT)


@pytest.mark.parametrize("mode", ["RGB", "LA", "RGBA"])
def test_equal_channels_and_an_opaque_alpha_are_grey(tmp_path, mode):
    grey = picture()
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(read_radiograph(tmp_path / "a.png").array[0].astype(int) + 128, grey)


def test_pixel_size_is_the_files_or_1_mm(tmp_path):
    write_grey(tmp_path / "sized.png", picture(), (2.0, 0.5))
    assert read_radiograph(tmp_path / "sized.png").spacing_mm == pytest.approx((1.0, 2.0, 0.5), rel=1e-3)
    assert read_radiograph(save(tmp_path / "unsized.png", picture())).spacing_mm == (1.0, 1.0, 1.0)


def coloured() -> np.ndarray:
    return np.stack([picture(seed=seed) for seed in range(3)], axis=-1)


def see_through() -> np.ndarray:
    return np.stack([picture(), np.full((40, 48), 200, np.uint8)], axis=-1)


def saved_bytes(tmp_path, pixels: np.ndarray) -> bytes:
    return save(tmp_path / "plain.png", pixels).read_bytes()


def damaged(content: bytes) -> bytes:
    return content[:300] + bytes([255 - content[300]]) + content[301:]


BROKEN = {
    "colour": (lambda tmp: saved_bytes(tmp, coloured()), "is a colour picture"),
    "transparent": (lambda tmp: saved_bytes(tmp, see_through()), "transparent pixels"),
    "16-bit colour": (lambda tmp: raw_png(4, 4, 16, 2, 24), "16-bit colour"),
    "1-bit": (lambda tmp: raw_png(8, 4, 1, 0, 1), "1-bit grey"),
    "4-bit": (lambda tmp: raw_png(8, 4, 4, 0, 4), "4-bit grey"),
    "palette": (lambda tmp: raw_png(8, 4, 8, 3, 8), "palette"),
    "constant": (lambda tmp: raw_png(8, 4, 8, 0, 8), "every pixel is 0"),
    "empty": (lambda tmp: b"", "not a PNG file"),
    "JPEG by another name": (lambda tmp: b"\xff\xd8\xff\xe0" + bytes(100), "not a PNG file"),
    "header only": (lambda tmp: saved_bytes(tmp, picture())[:20], "ends in its header"),
    "truncated": (lambda tmp: saved_bytes(tmp, picture())[:900], "truncated or damaged"),
    "damaged": (
        lambda tmp: bytes(255 - b if i == 300 else b for i, b in enumerate(saved_bytes(tmp, picture()))),
        "PNG",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_grey_picture_is_refused_with_its_reason(tmp_path, name):
    make, reason = BROKEN[name]
    (tmp_path / "broken.png").write_bytes(make(tmp_path))
    with pytest.raises(CTReadError, match=f"broken.png: .*{reason}"):
        read_radiograph(tmp_path / "broken.png")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CTReadError, match="nobody.png: no such file"):
        read_radiograph(tmp_path / "nobody.png")


def test_masks_hold_their_values_as_labels(tmp_path):
    image = read_radiograph(save(tmp_path / "a.png", picture()))
    values = np.arange(40 * 48).reshape(40, 48) % 200
    mask = read_mask_of(image, save(tmp_path / "m.png", values.astype(np.uint8)))
    assert mask.array.dtype == np.uint8 and np.array_equal(mask.array[0], values)
    assert np.array_equal(mask.affine, image.affine)
    deep = read_mask_of(image, save(tmp_path / "m16.png", (values * 100).astype(np.uint16)))
    assert deep.array.dtype == np.int16 and deep.array.max() == 19900
    with pytest.raises(CTReadError, match=r"label has shape \(1, 40, 47\), its image .* has \(1, 40, 48\)"):
        read_mask_of(image, save(tmp_path / "small.png", values[:, 1:].astype(np.uint8)))
    with pytest.raises(CTReadError, match="up to 65535, expected 0 to 32767"):
        read_mask_of(image, save(tmp_path / "large.png", picture(dtype=np.uint16)))


# Folders and lists


def folder_of_pictures(folder, num: int = 3, dtype=np.uint8):
    """`num` pictures; all but the last have a mask."""
    for number in range(num):
        save(folder / "images" / f"case{number}.png", picture(seed=number, dtype=dtype))
        if number < num - 1:
            save(folder / "labels" / f"case{number}.png", (picture(seed=9 + number) > 99).astype(np.uint8))
    return folder


def test_a_folder_of_pictures_is_found_with_its_masks(tmp_path):
    cases = find_cases(folder_of_pictures(tmp_path))
    assert [case.name for case in cases] == ["case0", "case1", "case2"]
    assert [case.label and case.label.parent.name for case in cases] == ["labels", "labels", None]
    assert kind_of_cases(cases) == RADIOGRAPH


def test_pictures_beside_ct_are_previews(tmp_path):
    write_nifti(tmp_path / "scan.nii.gz", np.zeros((3, 4, 5), np.int16), spl_affine())
    save(tmp_path / "preview.png", picture())
    cases = find_cases(tmp_path)
    assert [case.name for case in cases] == ["scan"] and kind_of_cases(cases) == CT


def test_a_list_holds_one_kind(tmp_path):
    cases = [Case("a", tmp_path / "a.nii.gz"), Case("b", tmp_path / "b.png")]
    with pytest.raises(DataListError, match="a.nii.gz is a CT and .*b.png a radiograph"):
        build_store(cases, tmp_path / "store", progress=False)


# The store


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder of pictures and their store: a 12-bit ramp in 16 bits with a black border among them."""
    folder = folder_of_pictures(tmp_path_factory.mktemp("pictures"))
    save(folder / "images" / "ramp.png", np.pad(RAMP_12_BIT, ((3, 5), (7, 0))))
    report = build_store(find_cases(folder), folder / "store", progress=False)
    assert len(report.built) == 4 and not report.failed
    return folder


def test_volumes_masks_and_records_come_back(stored):
    store = VolumeStore(stored / "store")
    assert store.kind == RADIOGRAPH == read_settings(stored / "store").kind and store.spacing_mm is None
    for case in find_cases(stored):
        record = store.record(case.name)
        assert np.array_equal(store.read(case.name).array, read_radiograph(case.image).array)
        assert (record.kind, record.shape[0]) == (RADIOGRAPH, 1) and record.has_label == (case.label is not None)
        if case.label:
            mask = np.asarray(Image.open(case.label))
            assert np.array_equal(store.read_label(case.name).array[0], mask)
            assert np.array_equal(store.label_crop(case.name, (0, 5, 6), (1, 9, 8))[0], mask[5:14, 6:14])
    assert (store.record("case0").bits, store.record("case0").value_range) == (8, (-128, 127))
    assert (store.record("ramp").bits, store.record("ramp").value_range) == (16, (-32768, 4095 - 32768))


def test_manifests_name_kind_and_range(stored):
    manifest = json.loads((stored / "store" / "cases" / "ramp.json").read_text())
    assert (manifest["kind"], manifest["bits"], manifest["value_range"]) == ("radiograph", 16, [-32768, -28673])


def test_black_borders_are_not_body_and_black_lies_outside(stored):
    store = VolumeStore(stored / "store")
    record = store.record("ramp")
    # The ramp's own first pixel is black too, but its row and column are not.
    assert (record.body_start.tolist(), record.body_stop.tolist()) == ([0, 3, 7], [1, 67, 71])
    crop = store.crop("ramp", (0, -4, 0), (1, 8, 8))
    assert (crop[0, :7] == -32768).all() and crop.shape == (1, 8, 8)


def test_building_again_keeps_what_is_there(stored):
    report = build_store(find_cases(stored), stored / "store", progress=False, verify=True)
    assert len(report.reused) == 4 and not report.built


def test_a_new_store_of_pictures_is_native_and_may_be_scaled(stored, tmp_path):
    cases = [case for case in find_cases(stored) if case.label]
    fill_store(cases, tmp_path / "native")
    assert VolumeStore(tmp_path / "native").spacing_mm is None
    build_store(cases, tmp_path / "scaled", (1.0, 2.0, 2.0), progress=False)
    scaled = VolumeStore(tmp_path / "scaled")
    image, record = scaled.read("case0").array, scaled.record("case0")
    assert image.shape == scaled.read_label("case0").shape == (1, 20, 24)
    assert record.value_range == (image.min(), image.max()) != (-128, 127)


def test_a_store_holds_one_kind(stored, tmp_path):
    ct = Case("ct", tmp_path / "ct.nii.gz")
    write_nifti(ct.image, np.arange(-600, 600, dtype=np.int16).reshape(10, 10, 12), spl_affine())
    for build in (build_store, fill_store):
        with pytest.raises(StoreError, match="the store holds radiographs, expected CT.*--store_dir"):
            build([ct], stored / "store")
    build_store([ct], tmp_path / "store", progress=False)
    with pytest.raises(StoreError, match="the store holds CT, expected radiographs"):
        build_store(find_cases(stored), tmp_path / "store", progress=False)


def test_sam_reads_no_radiographs(stored):
    with pytest.raises(StoreError, match="holds radiographs, expected CT"):
        open_cases(CaseOptions(store_dir=stored / "store"))


def test_stores_without_a_kind_hold_ct(tmp_path):
    """As all did that were made before there were radiographs."""
    ct = Case("ct", tmp_path / "ct.nii.gz")
    write_nifti(ct.image, np.arange(-600, 600, dtype=np.int16).reshape(10, 10, 12), spl_affine())
    build_store([ct], tmp_path / "store", progress=False)
    for path in (tmp_path / "store" / "store.json", tmp_path / "store" / "cases" / "ct.json"):
        content = json.loads(path.read_text())
        assert content.pop("kind") == "ct"
        path.write_text(json.dumps(content))
    store = VolumeStore(tmp_path / "store")
    assert store.kind == CT and store.record("ct").kind == CT and store.record("ct").window() == (-125.0, 225.0)
    assert build_store([ct], tmp_path / "store", progress=False).reused == ["ct"]


# Windows and samples


def record(**values) -> CaseRecord:
    plain = {"name": "x", "shape": (1, 4, 4), "spacing_mm": (1.0, 1.0, 1.0), "affine": np.eye(4)}
    plain |= {"body_start": np.zeros(3, int), "body_stop": np.ones(3, int), "source": "", "source_stamp": ""}
    return CaseRecord(**plain, checksum="", **values)


def test_the_window_is_the_range_unless_flags_say_otherwise():
    radiograph = record(kind=RADIOGRAPH, bits=16, value_range=(-32768, -28673))
    assert radiograph.window() == (-32768, -28673) and radiograph.outside == -32768
    assert radiograph.window(-32000.0) == (-32000.0, -28673)
    assert radiograph.window(-32000.0, -30000.0) == (-32000.0, -30000.0)
    with pytest.raises(StoreError, match="case x: .*--a_min -100, --a_max -28673"):
        radiograph.window(-100.0)
    assert record().window() == (-125.0, 225.0) and record().outside == -1024
    assert record().window(-200.0) == (-200.0, 225.0)


def samples_of(stored, views=None, crops=None, names=("ramp",), **options):
    store = VolumeStore(stored / "store")
    views = views or {}
    return make_dataset("iou", store, names=names, views=views, crops=crops, roi=(1, 32, 32), **options)


def test_a_12_bit_picture_is_shown_in_its_whole_range(stored):
    """In the range of its 16 bits it would be black."""
    crops = torch.cat([samples_of(stored)[index]["crop"].flatten() for index in range(8)])
    assert crops.min() < 0.1 and crops.max() > 0.9
    shown = samples_of(stored, crops=CropOptions(a_min=-32768.0, a_max=32767.0))[0]["crop"]
    assert shown.max() < 0.07
    with pytest.raises(StoreError, match="case ramp: --a_min -9000, --a_max -28673"):
        samples_of(stored, crops=CropOptions(a_min=-9000.0))
    with pytest.raises(ValueError, match="--roi_z 16: the store holds radiographs.*--roi_z 1"):
        make_dataset("iou", VolumeStore(stored / "store"), names=("ramp",), views={}, roi=(16, 32, 32))


def test_views_do_not_depend_on_the_bits_of_the_file(tmp_path):
    """Jitter of the window follows its width: 8 bits and the same picture in 16 bits give the same views."""
    grey = picture((64, 64), seed=4)
    save(tmp_path / "8" / "a.png", grey)
    save(tmp_path / "16" / "a.png", grey.astype(np.uint16) * 257)
    jitter = AugmentOptions(window_prob=1.0)
    views = {"student": "augmented", "view": "distorted"}
    found = []
    for bits in ("8", "16"):
        build_store(find_cases(tmp_path / bits), tmp_path / bits / "store", progress=False)
        dataset = samples_of(tmp_path / bits, views, names=("a",), augment=jitter)
        found.append([dataset[index] for index in range(6)])
    for shallow, deep in zip(*found):
        for name in ("crop", "student", "view", "view_target"):
            assert shallow[name].shape == (2, 1, 1, 32, 32)
            # The Bezier curve of distorted views has steps of 1/1024.
            assert (shallow[name] - deep[name]).abs().max() < (0.02 if name == "view" else 1e-5)
    jittered = [bool((one["student"] != one["crop"]).any()) for one in found[0]]
    assert all(jittered)

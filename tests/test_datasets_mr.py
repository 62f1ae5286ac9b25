"""MR: every volume is mapped by its own percentiles, and the store knows what it holds."""

import json

import nibabel as nib
import numpy as np
import pytest

from datasets.ct.images import MR
from datasets.ct.intensity import MR_RANGE
from datasets.ct.mr import MAPPED, read_mr
from datasets.ct.nifti import CTReadError, read_ct, write_nifti
from datasets.lists.data_list import Case, DataListError, load_data_list
from datasets.samples.augment import AugmentOptions
from datasets.samples.crops import CropOptions
from datasets.store.volumes import StoreError, VolumeStore, build_store, fill_store
from sam_embed.case_source import CaseOptions, open_cases
from scripts import create_json, prepare_volumes
from tests.fakes import make_dataset, spl_affine
from tests.small_mr import AFFINE, make_mr_corpus, mr_volume
from tests.small_radiographs import picture, save


def saved(path, array: np.ndarray):
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three cases and their store at 4 mm, made by the command."""
    folder = make_mr_corpus(tmp_path_factory.mktemp("mr"))
    prepare_volumes.main([*words(folder), "--modality", "mr", "--spacing_mm", "4", "--num_workers", "1"])
    return folder


def words(folder) -> list[str]:
    lists = ["--data_dir", str(folder), "--json_list", str(folder / "list.json")]
    return [*lists, "--store_dir", str(folder / "store")]


# The map


def test_percentiles_of_the_foreground_become_the_two_values(tmp_path):
    array, _ = mr_volume(0)
    volume = read_mr(saved(tmp_path / "a.nii.gz", array), (1, 99))
    (low, high), *others = volume.maps
    assert not others and volume.array.dtype == np.int16
    foreground = array[array > 0.15 * np.percentile(array, 98)]
    np.testing.assert_allclose((low, high), np.percentile(foreground, (1, 99)), rtol=0.05)
    # back to the file's intensities, to half a step, except for what was clipped
    turned = nib.as_closest_canonical(nib.Nifti1Image(array, AFFINE)).get_fdata()[::-1, ::-1].transpose(2, 1, 0)
    back = low + (volume.array - MAPPED[0]) / (MAPPED[1] - MAPPED[0]) * (high - low)
    kept = (volume.array > MR_RANGE[0]) & (volume.array < MR_RANGE[1])
    assert kept.mean() > 0.5 and not kept.all()
    np.testing.assert_allclose(back[kept], turned[kept], atol=0.51 * (high - low) / (MAPPED[1] - MAPPED[0]))


def test_scale_and_offset_of_a_file_do_not_matter(tmp_path):
    array, _ = mr_volume(0)
    one = read_mr(saved(tmp_path / "a.nii.gz", array))
    for other in (array / 50_000, 3 * array + 700, np.rint(array).astype(np.uint16)):
        other = read_mr(saved(tmp_path / "b.nii.gz", other))
        assert np.abs(one.array.astype(int) - other.array).max() <= 3


def test_one_bright_voxel_changes_nothing(tmp_path):
    array, _ = mr_volume(0)
    one = read_mr(saved(tmp_path / "a.nii.gz", array))
    array[20, 20, 20] = 1e6
    other = read_mr(saved(tmp_path / "b.nii.gz", array))
    changed = np.abs(one.array.astype(int) - other.array) > 3
    assert changed.sum() <= 1 and other.array.max() == MR_RANGE[1]


def nearly_full() -> np.ndarray:
    array = np.ones((20, 20, 20), np.uint8)
    array[0, 0] = 0
    return array


def with_nan() -> np.ndarray:
    array = mr_volume(0)[0]
    array[:4] = np.nan
    return array


@pytest.mark.parametrize(
    "array, message",
    [
        (with_nan(), r"x.nii.gz \(--modality mr\): \d+ of \d+ voxels are not finite"),
        (np.full((20, 20, 20), 5, np.int16), r"x.nii.gz: every voxel is 5; .*--modality mr"),
        ((mr_volume(0)[1] > 0).astype(np.uint8), r"x.nii.gz: the percentiles 0.5 and 99.5 \(--mr_percentiles\)"),
        (nearly_full(), r"x.nii.gz: the percentiles 0.5 and 99.5 \(--mr_percentiles\) of its foreground are 1 and 1"),
    ],
    ids=["nan", "constant", "mask", "nearly full mask"],
)
def test_what_cannot_be_mapped_names_file_and_flag(tmp_path, array, message):
    with pytest.raises(CTReadError, match=message):
        read_mr(saved(tmp_path / "x.nii.gz", array))


def test_large_values_as_ct_name_the_flag_that_takes_them(tmp_path):
    path = saved(tmp_path / "x.nii.gz", (mr_volume(0)[0] * 100).astype(np.float32))
    with pytest.raises(CTReadError, match="Store MR with --modality mr"):
        read_ct(path)
    read_mr(path)


# The store


def test_the_manifest_keeps_the_map_and_the_range(corpus):
    store = VolumeStore(corpus / "store")
    assert store.kind == MR and store.mr_percentiles == (0.5, 99.5) and len(store) == 3
    record = store.record("mr0")
    assert record.kind == MR and record.value_range == MR_RANGE and record.outside == MR_RANGE[0]
    assert record.intensity_maps == read_mr(corpus / "images" / "mr0.nii.gz").maps
    assert store.window() == record.window() == MR_RANGE and store.window(-500) == (-500, MR_RANGE[1])
    outside = store.crop("mr0", (-5, 0, 0), (4, 4, 4))
    assert (outside == MR_RANGE[0]).all()
    # an ellipse in every slice: the box leaves a margin in the slice, and none along the axis
    assert (record.body_start[1:] >= 0).all() and record.body_start[0] == 0
    assert (np.array(record.body_stop) - record.body_start <= record.shape).all()
    label = store.read_label("mr0").array
    assert np.median(store.read("mr0").array[label == 1]) > np.median(store.read("mr0").array[label == 5])


def test_the_box_around_the_patient_follows_the_background(tmp_path):
    array = np.random.default_rng(0).rayleigh(5, (60, 60, 20)).astype(np.float32)
    array[20:44, 16:40] += 400
    array[20:44, 16:30] += 200
    build_store(
        [Case("a", saved(tmp_path / "a.nii.gz", array))], tmp_path / "s", progress=False, mr_percentiles=(1, 99)
    )
    record = VolumeStore(tmp_path / "s").record("a")
    assert (record.body_stop - record.body_start).tolist() == [20, 24, 24]


def test_crops_are_shown_in_the_whole_range(corpus):
    store = VolumeStore(corpus / "store")
    dataset = make_dataset("random", store=store, roi=(16, 16, 16), augment=AugmentOptions.off())
    for index in range(3):
        sample, places = dataset[index], dataset.places(index)
        assert sample["crop"].min() >= 0.0 and sample["crop"].max() <= 1.0 and sample["crop"].std() > 0.05
        assert (sample["crop"] == sample["student"]).all() and len(places.names) == 2
    start = (10, 10, 10)
    given = make_dataset("random", store=store, roi=(16, 16, 16), crops=CropOptions(a_min=-800, a_max=800))
    assert given._own_window("mr0") == (-800, 800)
    assert store.crop("mr0", start, (8, 8, 8)).dtype == np.int16


def test_kinds_are_not_mixed(corpus, tmp_path, capsys):
    with pytest.raises(StoreError, match="the store holds MR, expected CT; a store holds one kind"):
        prepare_volumes.main([*words(corpus), "--spacing_mm", "4"])
    assert "states the modality MRI, and volumes are read as CT; MR needs --modality mr" in capsys.readouterr().err
    with pytest.raises(StoreError, match=r"by the percentiles 0.5 99.5, but 1 99 were asked for. .*--mr_percentiles"):
        prepare_volumes.main([*words(corpus), "--spacing_mm", "4", "--modality", "mr", "--mr_percentiles", "1", "99"])
    write_nifti(tmp_path / "ct.nii.gz", np.arange(-600, 600, dtype=np.int16).reshape(10, 10, 12), spl_affine())
    build_store([Case("ct", tmp_path / "ct.nii.gz")], tmp_path / "ct", progress=False)
    plain = json.loads((tmp_path / "ct" / "cases" / "ct.json").read_text())
    assert "intensity_maps" not in plain and "mr_percentiles" not in json.loads(
        (tmp_path / "ct/store.json").read_text()
    )
    cases = load_data_list(corpus / "list.json", corpus)
    with pytest.raises(StoreError, match="the store holds CT, expected MR"):
        build_store(cases, tmp_path / "ct", progress=False, mr_percentiles=(0.5, 99.5))
    with pytest.raises(DataListError, match="x.png is a radiograph, expected MR"):
        fill_store([Case("x", save(tmp_path / "x.png", picture()))], corpus / "store")
    with pytest.raises(StoreError, match="the store holds MR, expected CT"):
        open_cases(CaseOptions(str(corpus / "store")))


def test_a_store_of_mr_takes_further_cases_as_mr(corpus):
    path = saved(corpus / "images" / "later.nii.gz", mr_volume(7)[0])
    assert fill_store([Case("later", path)], corpus / "store").built == ["later"]
    assert VolumeStore(corpus / "store").record("later").intensity_maps == read_mr(path).maps


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--mr_percentiles", "1", "99"], "--mr_percentiles is of MR: add --modality mr"),
        (["--modality", "mr", "--mr_percentiles", "99", "1"], "--mr_percentiles 99 1: expected two numbers"),
    ],
)
def test_percentiles_are_checked(corpus, extra, message):
    with pytest.raises(ValueError, match=message):
        prepare_volumes.main([*words(corpus), "--spacing_mm", "4", *extra])


def test_data_lists_take_mr_that_no_ct_could_be(tmp_path, capsys):
    array, label = mr_volume(0)
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / part).mkdir()
    saved(tmp_path / "imagesTr" / "a_0000.nii.gz", array / array.max())
    saved(tmp_path / "labelsTr" / "a.nii.gz", label)
    arguments = ["--data_dir", str(tmp_path), "--output", str(tmp_path / "list.json")]
    with pytest.raises(DataListError, match="none of 1 cases can be read"):
        create_json.main(arguments)
    create_json.main([*arguments, "--modality", "mr"])
    assert json.loads((tmp_path / "list.json").read_text())["modality"] == {"0": "MRI"}
    assert len(load_data_list(tmp_path / "list.json", tmp_path)) == 1
    assert "hold nothing below" not in capsys.readouterr().err.splitlines()[-1]

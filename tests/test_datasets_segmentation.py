"""Classes, fixed splits, class-balanced crops with labels, and label maps on a file's own grid."""

import json
import pickle
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from datasets.ct.file_grid import read_file_grid, write_label_like
from datasets.ct.nifti import read_label
from datasets.lists.data_list import Case, DataListError, load_data_list
from datasets.lists.label_classes import BTCV, FLARE22, LabelClasses, read_classes
from datasets.lists.splits import choose_labelled, fold_order, split_held_out
from datasets.samples.labelled import SegmentationAugment, SegmentationCropDataset
from datasets.samples.random_contrast import change_organs
from datasets.store.volumes import VolumeStore, build_store
from tests.labelled_corpus import make_labelled_corpus

ROI = (16, 24, 20)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = make_labelled_corpus(tmp_path_factory.mktemp("corpus"))
    cases = load_data_list(folder / "list.json", folder)
    build_store(cases, folder / "store", (4.0, 4.0, 4.0), progress=False)
    return folder


def crops(corpus, **options) -> SegmentationCropDataset:
    store = VolumeStore(corpus / "store")
    classes = options.pop("classes", read_classes(corpus / "list.json"))
    return SegmentationCropDataset(store, store.names, classes, ROI, **options)


# Classes


def test_classes_of_a_list_go_to_channels_and_back(corpus):
    classes = read_classes(corpus / "list.json")
    assert classes.values == (0, 1, 2, 5) and classes.names == ("background", "liver", "spleen", "aorta")
    labels = np.array([0, 5, 3, 2, 200])
    assert classes.to_classes(labels).tolist() == [0, 3, 0, 2, 0], "unlisted values are background"
    assert classes.to_values(np.array([0, 3, 2])).tolist() == [0, 5, 2]
    assert LabelClasses.from_dict(json.loads(json.dumps(classes.as_dict()))) == classes


def test_nnunet_spelling_and_built_in_sets(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"labels": {"background": 0, "spleen": 2, "liver": 1}, "training": []}))
    assert read_classes(path).names == ("background", "liver", "spleen")
    assert read_classes(path, "flare22").names == ("background", *FLARE22) and len(FLARE22) == 13
    assert BTCV[5] == "liver" and len(read_classes(path, "btcv")) == 14
    path.write_text(json.dumps({"labels": {"0": "background"}, "training": []}))
    with pytest.raises(DataListError, match="--classes flare22"):
        read_classes(path)


# Splits


def cases_called(names) -> list[Case]:
    return [Case(name, f"{name}.nii.gz", f"{name}_label.nii.gz") for name in names]


def test_splits_are_fixed_nested_and_disjoint():
    cases = cases_called(f"FLARE22_Tr_{number:04d}" for number in range(1, 51))
    # These names are part of the protocol: a change here changes everybody's few-shot numbers.
    assert [case.name for case in choose_labelled(cases, 1, 0)] == ["FLARE22_Tr_0016"]
    chosen = [choose_labelled(cases, 10, fold) for fold in range(5)]
    assert sorted(case.name for part in chosen for case in part) == [case.name for case in cases]
    for fold in range(7):
        few, more = (set(choose_labelled(cases, k, fold)) for k in (1, 4))
        assert few < more < set(choose_labelled(cases, 15, fold))
    assert choose_labelled(list(reversed(cases)), 4, 2) == choose_labelled(cases, 4, 2)
    assert choose_labelled(cases, 0, 3) == cases
    assert fold_order(cases, 5, "labelled") != fold_order(cases, 0, "labelled")


def test_split_mistakes_name_the_flag():
    cases = cases_called("abc")
    with pytest.raises(DataListError, match="--num_labelled 4: 3 training cases"):
        choose_labelled(cases, 4, 0)
    with pytest.raises(DataListError, match="--fold -1"):
        choose_labelled(cases, 1, -1)
    with pytest.raises(DataListError, match="none of 1 training cases has a label"):
        choose_labelled([Case("a", "a.nii.gz")], 1, 0)


def test_held_out_cases_cover_all_over_five_folds():
    cases = cases_called(f"case{number}" for number in range(10))
    held_out = []
    for fold in range(5):
        training, held = split_held_out(cases, 0.2, fold)
        assert len(held) == 2 and not set(training) & set(held) and len(training) == 8
        held_out += held
    assert set(held_out) == set(cases)


def test_held_out_patients_have_no_scan_on_the_other_side():
    cases = [
        Case(f"p{patient}_{scan}", "x.nii.gz", "y.nii.gz", f"p{patient}") for patient in range(7) for scan in range(3)
    ]
    held_out = []
    for fold in range(5):
        training, held = split_held_out(cases, 0.2, fold)
        assert not {case.patient for case in training} & {case.patient for case in held}
        held_out += held
    assert sorted(case.name for case in held_out) == sorted(case.name for case in cases), "each once"
    with pytest.raises(DataListError, match="1 patients"):
        split_held_out(cases[:3], 0.3, 0)


# Crops


def test_samples_are_a_function_of_seed_and_index(corpus):
    dataset = crops(corpus, seed=3)
    again = pickle.loads(pickle.dumps(crops(corpus, seed=3)))
    for index in (5, 0, 123456):
        one, other = dataset[index], again[index]
        assert one["image"].shape == one["label"].shape == (1, *ROI)
        assert one["image"].dtype == torch.float32 and one["label"].dtype == torch.uint8
        assert one["image"].min() >= 0 and one["image"].max() <= 1
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(dataset[1]["image"], dataset[2]["image"])
    assert not torch.equal(dataset[1]["image"], crops(corpus, seed=4)[1]["image"])


def test_crops_are_balanced_over_organs_and_not_over_voxels(corpus):
    dataset = crops(corpus, foreground_share=1.0, augment=SegmentationAugment.off())
    voxels = dataset.class_voxels("case0")
    assert sorted(voxels) == [1, 2, 3]
    label = dataset.classes.to_classes(dataset.store.read_label("case0").array)
    for channel, places in voxels.items():
        assert (label[tuple(places.T)] == channel).all()
    assert len(voxels[1]) > 10 * len(voxels[3]), "the liver is much larger than the aorta"
    rng = np.random.default_rng(0)
    dataset.roi = (1, 1, 1)  # no jitter: the centre is the drawn voxel
    drawn = [label[tuple(dataset._draw_centre("case0", rng))] for _ in range(300)]
    counts = np.bincount(drawn, minlength=4)
    assert counts[0] == 0 and (counts[1:] > 70).all(), counts


def test_cases_are_drawn_as_often_as_their_weights_say(corpus):
    def draws(weights):
        dataset = crops(corpus, case_weights=weights, augment=SegmentationAugment.off())
        return np.bincount([int(dataset[index]["case"]) for index in range(200)], minlength=len(dataset))

    number = len(crops(corpus))
    alike, weighted = draws([0.5] * number), draws([4.0] + [1.0] * (number - 1))
    np.testing.assert_array_equal(alike, draws(None))  # equal weights change nothing
    wanted = 200 * 4 / (number + 3)
    assert abs(weighted[0] - wanted) < 4 * wanted**0.5 and weighted[0] > 1.5 * weighted[1:].max()


def test_voxels_of_every_class_are_counted_over_all_cases(corpus):
    dataset = crops(corpus)
    labels = [dataset.store.read_label(name).array for name in dataset.case_names]
    expected = [sum(int((label == value).sum()) for label in labels) for value in (1, 2, 5)]
    assert dataset.count_voxels()[1:].tolist() == expected and min(expected) > 0
    assert dataset.count_voxels().sum() == sum(label.size for label in labels)


def test_without_augmentation_a_crop_is_the_window_of_the_volume(corpus):
    dataset = crops(corpus, augment=SegmentationAugment.off(), hu_min=-100, hu_max=300)
    sample = dataset[7]
    name = dataset.case_names[int(sample["case"])]
    volume, label = dataset.store.read(name).array, dataset.classes.to_classes(dataset.store.read_label(name).array)
    windowed = np.clip((volume.astype(np.float32) + 100) / 400, 0, 1)
    starts = np.ndindex(*(side - crop + 1 for side, crop in zip(volume.shape, ROI)))
    found = [
        start
        for start in starts
        if np.array_equal(label[tuple(slice(s, s + n) for s, n in zip(start, ROI))], sample["label"][0].numpy())
        and np.allclose(windowed[tuple(slice(s, s + n) for s, n in zip(start, ROI))], sample["image"][0], atol=1e-6)
    ]
    assert len(found) == 1, "the crop lies in the volume, image and label at one place"


def test_turned_crops_keep_image_and_label_together(corpus):
    augment = SegmentationAugment(affine_prob=1.0, rotate_deg=20, intensity=SegmentationAugment.off().intensity)
    dataset = crops(corpus, augment=augment, foreground_share=1.0)
    turned = [dataset[index] for index in range(6)]
    assert all(set(sample["label"].unique().tolist()) <= {0, 1, 2, 3} for sample in turned)
    means = {channel: [] for channel in (1, 2)}
    for sample in turned:
        for channel, values in means.items():
            inside = sample["image"][sample["label"] == channel]
            if len(inside) > 50:
                values.append(float(inside.mean()))
    # The window maps 110 HU to 0.67 and 180 HU to 0.87; a label that moved apart from its organ would blur them.
    assert np.mean(means[1]) == pytest.approx(0.67, abs=0.06) and np.mean(means[2]) == pytest.approx(0.87, abs=0.08)


def test_crops_of_other_scanners_have_the_same_places_and_random_organs(corpus):
    """Of some crops alone, in draws of their own: place, size and label of every crop stay."""
    off = SegmentationAugment.off()
    plain = crops(corpus, augment=off, foreground_share=1.0, seed=2)
    half, always = (
        crops(corpus, augment=replace(off, random_contrast=share), foreground_share=1.0, seed=2) for share in (0.5, 1.0)
    )
    changed, shifts = 0, []
    for index in range(40):
        sample, other, third = plain[index], half[index], always[index]
        assert torch.equal(sample["label"], other["label"]) and torch.equal(sample["label"], third["label"])
        assert third["image"].min() >= 0 and third["image"].max() <= 1 and third["image"].dtype == torch.float32
        assert not torch.equal(sample["image"], third["image"])
        is_changed = not torch.equal(sample["image"], other["image"])
        assert not is_changed or torch.equal(other["image"], third["image"]), "drawn by the crop's number alone"
        changed += is_changed
        liver, spleen = (sample["label"] == 1, sample["label"] == 2)
        if min(liver.sum(), spleen.sum()) > 30:
            move = third["image"] - sample["image"]
            shifts.append(350 * float(move[liver].mean() - move[spleen].mean()))
    assert 10 <= changed <= 30
    assert len(shifts) >= 4 and np.std(shifts) > 15, "organs move apart, in HU"
    assert torch.equal(always[3]["image"], always[3]["image"])


def test_every_organ_gets_a_shift_of_its_own_and_the_background_none():
    label = torch.arange(4).repeat_interleave(50).view(2, 10, 10)
    moved = change_organs(torch.zeros(label.shape), label, 50.0, torch.Generator().manual_seed(0))
    means = [moved[label == value].unique().tolist() for value in range(4)]
    assert means[0] == [0.0] and all(len(values) == 1 for values in means) and len({values[0] for values in means}) == 4
    amounts = [change_organs(torch.zeros(1), torch.ones(1), 50.0, torch.Generator().manual_seed(i)) for i in range(400)]
    # Normal with a deviation uniform up to 50 HU: 50 / sqrt(3) in all.
    assert float(torch.cat(amounts).std()) == pytest.approx(50 / 3**0.5, rel=0.15)


# Slices


def slices(corpus, **options) -> SegmentationCropDataset:
    store = VolumeStore(corpus / "store")
    return SegmentationCropDataset(store, store.names, read_classes(corpus / "list.json"), (1, 24, 20), **options)


def test_slices_hold_the_organ_that_was_drawn_and_lie_in_one_plane(corpus):
    dataset = slices(corpus, augment=SegmentationAugment.off(), foreground_share=1.0, hu_min=-100, hu_max=300)
    shown = []
    for index in range(40):
        sample = dataset[index]
        assert sample["image"].shape == sample["label"].shape == (1, 1, 24, 20)
        name = dataset.case_names[int(sample["case"])]
        label = dataset.classes.to_classes(dataset.store.read_label(name).array)
        windows = np.lib.stride_tricks.sliding_window_view(label, (24, 20), axis=(1, 2))
        assert (windows == sample["label"][0, 0].numpy()).all(axis=(-2, -1)).any()
        shown.append(set(sample["label"].unique().tolist()) - {0})
    assert all(shown), "a crop around an organ's voxel shows an organ"
    counts = [sum(channel in organs for organs in shown) for channel in (1, 2, 3)]
    assert min(counts) >= 8, "small organs are drawn as often as large ones"


def test_turned_slices_stay_in_their_plane(corpus, monkeypatch):
    """Every plane gets its own intensity: one that is mixed with another shows."""
    dataset = slices(corpus, augment=SegmentationAugment(1.0, 45.0, 0.15, SegmentationAugment.off().intensity))

    def by_plane(name, start, size):
        return np.broadcast_to(np.arange(size[0], dtype=np.int16)[:, None, None] + start[0], size).copy()

    monkeypatch.setattr(dataset.store, "crop", by_plane)
    asked = []
    plain = dataset._crop
    monkeypatch.setattr(dataset, "_crop", lambda name, centre, size: asked.append(size) or plain(name, centre, size))
    for plane in (3, 9):
        hu, label = dataset._turned_crop("case0", np.array([plane, 20, 20]), seed=1)
        assert hu.shape == label.shape == (1, 24, 20) and (hu == plane).all()
    assert asked == [(1, 32, 26)] * 2


def test_turned_slices_rotate_and_keep_image_and_label_together(corpus):
    augment = SegmentationAugment(1.0, 30.0, 0.15, SegmentationAugment.off().intensity)
    plain = slices(corpus, augment=SegmentationAugment.off(), foreground_share=1.0)
    dataset = slices(corpus, augment=augment, foreground_share=1.0)
    assert any(not torch.equal(dataset[index]["label"], plain[index]["label"]) for index in range(5))
    inside = {1: [], 2: []}
    for index in range(30):
        sample = dataset[index]
        for channel, values in inside.items():
            values += sample["image"][sample["label"] == channel].tolist()
    assert np.mean(inside[1]) == pytest.approx(0.67, abs=0.06) and np.mean(inside[2]) == pytest.approx(0.87, abs=0.08)


def test_cases_without_label_are_refused(corpus, tmp_path):
    plain = [Case("bare", corpus / "images" / "case0_0000.nii.gz")]
    build_store(plain, tmp_path / "store", (8.0, 8.0, 8.0), progress=False)
    store = VolumeStore(tmp_path / "store")
    with pytest.raises(ValueError, match="no labels for bare"):
        SegmentationCropDataset(store, ["bare"], LabelClasses.built_in("flare22"), ROI)


# Label maps on the file's own grid


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "ASR"])
def test_label_maps_lie_on_the_files_own_voxels(codes, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (7, 9, 11), dtype=np.uint8)
    turn = nib.orientations.axcodes2ornt(tuple(codes))
    affine = nib.orientations.inv_ornt_aff(turn, labels.shape)
    affine[:3] = (np.diag([1.5, 2.0, 3.0, 1.0]) @ affine)[:3]
    affine[:3, 3] += (5, -7, 11)
    image = nib.Nifti1Image(labels, affine)
    image.set_qform(affine, 2)
    nib.save(image, tmp_path / "image.nii.gz")
    canonical = read_label(tmp_path / "image.nii.gz").array
    write_label_like(tmp_path / "out.nii.gz", canonical, read_file_grid(tmp_path / "image.nii.gz"))
    written = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), labels)
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert nib.aff2axcodes(written.affine) == tuple(nib.aff2axcodes(affine))

"""MR of several channels: 4-D files and lists of files, from the store to a label map."""

import json
import os

import nibabel as nib
import numpy as np
import pytest
import torch

import main_ddp
import scripts.evaluate_segmentation
from datasets.ct.mr import read_mr
from datasets.ct.nifti import CTReadError
from datasets.lists.data_list import Case, DataListError, load_data_list, write_data_list
from datasets.lists.label_classes import read_classes
from datasets.samples.labelled import SegmentationAugment, SegmentationCropDataset
from datasets.store.volumes import VolumeStore, build_store
from engine.checkpoint import load_checkpoint
from engine.segmentation.sliding_window import WindowOptions, probability_slices
from engine.weights import save_weights
from models.pretrained import load_pretrained
from models.segmenters import SEGMENTERS
from models.weights_file import WeightsFile
from scripts import finetune_segmentation, predict, prepare_volumes
from tests.labelled_corpus import finetune_arguments
from tests.small_mr import AFFINE, make_mr_corpus, mr_volume

MR = (0.5, 99.5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Cases of two channels, 4-D files but for the last, which has a file for each; and their store at 4 mm."""
    folder = make_mr_corpus(tmp_path_factory.mktemp("mr2"), num_channels=2)
    content = json.loads((folder / "list.json").read_text())
    content["validation"][0]["image"] = split_channels(folder / "images" / "mr2.nii.gz")
    (folder / "list.json").write_text(json.dumps(content))
    lists = ["--data_dir", str(folder), "--json_list", str(folder / "list.json"), "--store_dir", str(folder / "store")]
    prepare_volumes.main([*lists, "--modality", "mr", "--spacing_mm", "4", "--num_workers", "1"])
    return folder


def split_channels(path) -> list[str]:
    """Write the channels of a 4-D file beside it; their paths as a data list has them."""
    array, names = nib.load(path).get_fdata(dtype=np.float32), []
    for channel in range(array.shape[3]):
        names.append(f"images/{path.name.removesuffix('.nii.gz')}_{channel:04d}.nii.gz")
        nib.save(nib.Nifti1Image(array[..., channel], AFFINE), path.parent.parent / names[-1])
    return names


# Files and lists


def test_every_channel_has_its_own_map(corpus):
    both = read_mr(corpus / "images" / "mr2.nii.gz")
    parts = [corpus / "images" / f"mr2_000{channel}.nii.gz" for channel in (0, 1)]
    assert both.num_channels == 2 and both.shape == both.array.shape[1:] and both.maps[0] != both.maps[1]
    joined = read_mr(parts)
    assert np.array_equal(both.array, joined.array) and both.maps == joined.maps
    for part, channel, found in zip(parts, both.array, both.maps):
        one = read_mr(part)
        assert one.num_channels == 1 and np.array_equal(one.array, channel) and one.maps == (found,)


def test_channels_on_different_grids_are_refused(corpus, tmp_path):
    shifted = AFFINE.copy()
    shifted[0, 3] += 2
    nib.save(nib.Nifti1Image(mr_volume(2)[0], shifted), tmp_path / "b.nii.gz")
    with pytest.raises(CTReadError, match="b.nii.gz: lies on another grid than .*mr2_0000.nii.gz"):
        read_mr([corpus / "images" / "mr2_0000.nii.gz", tmp_path / "b.nii.gz"])
    with pytest.raises(CTReadError, match="mr2_0000.nii.gz: stands twice"):
        read_mr([corpus / "images" / "mr2_0000.nii.gz"] * 2)
    array, _ = mr_volume(2, num_channels=2)
    array[..., 1] = 3
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "flat.nii.gz")
    with pytest.raises(CTReadError, match="flat.nii.gz, channel 1: every voxel is 3"):
        read_mr(tmp_path / "flat.nii.gz")


def test_lists_keep_the_files_of_a_case(corpus, tmp_path):
    case = load_data_list(corpus / "list.json", corpus, "validation")[0]
    assert case.further_channels == (corpus / "images" / "mr2_0001.nii.gz",)
    write_data_list(tmp_path / "again.json", corpus, [case], is_mr=True)
    assert load_data_list(tmp_path / "again.json", corpus) == [case]
    content = {"training": [{"image": ["a.nii.gz", 5]}]}
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(DataListError, match="has no 'image' path"):
        load_data_list(tmp_path / "bad.json", corpus)


# The store


def test_the_store_holds_the_channels_on_one_grid(corpus):
    store = VolumeStore(corpus / "store")
    record, volume = store.record("mr0"), store.read("mr0")
    assert record.num_channels == 2 and volume.array.shape == (2, *record.shape) and volume.shape == record.shape
    assert record.intensity_maps == read_mr(corpus / "images" / "mr0.nii.gz").maps
    assert store.read_label("mr0").array.shape == record.shape
    padded = np.pad(volume.array, ((0, 0), (8, 8), (8, 8), (8, 8)), constant_values=record.outside)
    for start in ((-3, 4, 6), (30, 25, 20), (5, 5, 5), (-60, 0, 0)):
        size = (8, 7, 6)
        begin = np.array(start) + 8
        expected = padded[(slice(None), *(slice(b, b + s) for b, s in zip(begin, size)))]
        found = store.crop("mr0", start, size)
        assert found.shape == (2, *size) and store.label_crop("mr0", start, size).shape == size
        if start[0] > -8:
            assert np.array_equal(found, expected)
        else:
            assert (found == record.outside).all()


def test_a_change_of_a_further_file_is_noticed(corpus, tmp_path):
    case = load_data_list(corpus / "list.json", corpus, "validation")[0]
    arguments = {"spacing_mm": (8.0, 8.0, 8.0), "progress": False, "mr_percentiles": MR}
    assert build_store([case], tmp_path / "store", **arguments).built == [case.name]
    assert build_store([case], tmp_path / "store", **arguments).reused == [case.name]
    file = case.further_channels[0]
    before = file.stat()
    nib.save(nib.Nifti1Image(mr_volume(9)[0], AFFINE), file)
    assert build_store([case], tmp_path / "store", **arguments).built == [case.name]
    split_channels(corpus / "images" / "mr2.nii.gz")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_ct_has_one_channel(corpus, tmp_path):
    case = load_data_list(corpus / "list.json", corpus, "validation")[0]
    report = build_store([case, Case("4d", corpus / "images" / "mr2.nii.gz")], tmp_path / "ct", progress=False)
    assert "a case of 2 files; only MR has channels (--modality mr)" in report.failed[case.name]
    assert "is 4-D, expected one 3-D volume" in report.failed["4d"]


@pytest.mark.parametrize("roi", [(16, 24, 32), (1, 24, 32)])
def test_crops_have_all_channels(corpus, roi):
    store, classes = VolumeStore(corpus / "store"), read_classes(corpus / "list.json")
    turned = SegmentationCropDataset(store, ["mr0", "mr1"], classes, roi, -1000, 1000)
    plain = SegmentationCropDataset(store, ["mr0"], classes, roi, augment=SegmentationAugment.off())
    for sample in (*(turned[index] for index in range(4)), plain[0]):
        assert sample["image"].shape == (2, *roi) and sample["label"].shape == (1, *roi)
        assert sample["image"].min() >= 0 and sample["image"].max() <= 1
        assert not torch.equal(*sample["image"])


# The network


def network(in_channels: int, name: str = "unet"):
    torch.manual_seed(in_channels)
    return SEGMENTERS[name].build(in_channels, 3, 8).eval()


def test_equal_channels_give_what_one_channel_gives():
    one, three = network(1), network(3)
    load_pretrained(three, WeightsFile("one", one.state_dict()), part="whole")
    three.out.load_state_dict(one.out.state_dict())
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(three(x.expand(-1, 3, -1, -1, -1)), one(x))
        back = network(1)
        load_pretrained(back, WeightsFile("three", three.state_dict()), part="whole")
        back.out.load_state_dict(one.out.state_dict())
        torch.testing.assert_close(back(x), one(x))
    volume = np.random.default_rng(0).integers(-1000, 1000, (20, 40, 36)).astype(np.int16)
    windows = WindowOptions((16, 32, 32), -1000.0, 1000.0, -1000)
    inputs = (one, torch.from_numpy(volume)), (three, torch.from_numpy(np.stack([volume] * 3)))
    with torch.no_grad():
        single, triple = (list(probability_slices(*both, windows, torch.device("cpu"))) for both in inputs)
    assert len(single) == 20 and single[0].shape == (3, 40, 36)
    torch.testing.assert_close(torch.stack(single), torch.stack(triple))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """From weights of one channel, by a few steps."""
    folder = tmp_path_factory.mktemp("finetuned")
    description = {"method": "alice", "backbone": {"name": "unet", "feature_size": 8, "in_channels": 1}, "step": 1}
    weights = {name: value for name, value in network(1).state_dict().items() if not name.startswith("out.")}
    save_weights(weights, description, folder / "one.safetensors")
    finetune_segmentation.main(finetune_arguments(corpus, folder, weights=folder / "one.safetensors", steps=2))
    return folder


def test_a_run_on_two_channels_is_judged_and_predicts(finished, corpus, tmp_path):
    best = load_checkpoint(finished / "best.pth", "segmentation")
    assert best["backbone"]["in_channels"] == 2 and best["preprocessing"]["images"] == "mr"
    assert (finished / "evaluation" / "worst_and_best.png").stat().st_size > 5_000
    flags = [f"--checkpoint_file={finished / 'best.pth'}", "--device=cpu", "--overlap=0", "--window_batch=1"]
    lists = [f"--data_dir={corpus}", f"--json_list={corpus / 'list.json'}", f"--output_dir={tmp_path / 'e'}"]
    scripts.evaluate_segmentation.main([*lists, *flags, "--save_predictions"])
    assert (tmp_path / "e/cases.csv").read_text() == (finished / "evaluation/cases.csv").read_text()
    images = corpus / "images"
    predict.main([str(images / "mr2.nii.gz"), str(tmp_path / "a.nii.gz"), *flags])
    parts = [str(images / f"mr2_000{channel}.nii.gz") for channel in (0, 1)]
    predict.main([parts[0], str(tmp_path / "b.nii.gz"), *flags, "--further_channels", parts[1]])
    made = [nib.load(path) for path in (tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")]
    made.append(nib.load(tmp_path / "e" / "predictions" / "mr2.nii.gz"))
    assert all(np.array_equal(image.get_fdata(), made[0].get_fdata()) for image in made)
    assert made[0].shape == nib.load(parts[0]).shape
    with pytest.raises(ValueError, match=r"mr2_0000.nii.gz: holds 1 channels, the network .* takes 2"):
        predict.main([parts[0], str(tmp_path / "c.nii.gz"), *flags])


def test_the_number_of_channels_is_checked(finished, corpus, tmp_path):
    with pytest.raises(ValueError, match="--in_channels 3: 3 of 3 cases have another number of channels, mr0 has 2"):
        finetune_segmentation.main(finetune_arguments(corpus, tmp_path / "run", in_channels=3))
    data = [f"--data_dir={corpus}", f"--json_list={corpus / 'list.json'}", f"--store_dir={corpus / 'store'}"]
    words = "--method simsiam --pairing random --backbone unet --feature_size 8 --epochs 1 --warmup_epochs 0"
    words += " --roi_x 32 --roi_y 32 --roi_z 32"
    with pytest.raises(ValueError, match="mr0 has 2 channels, pretraining takes one"):
        main_ddp.main([*words.split(), *data, "--device=cpu", f"--output_dir={tmp_path / 'pretrained'}"])
    three = network(3).state_dict()
    save_weights({k: v for k, v in three.items() if not k.startswith("out.")}, {"step": 1}, tmp_path / "3.safetensors")
    with pytest.raises(ValueError, match="3.safetensors.*do not fit an input of 2 channels"):
        finetune_segmentation.main(
            finetune_arguments(corpus, tmp_path / "run", weights=tmp_path / "3.safetensors", min_share=0.5)
        )

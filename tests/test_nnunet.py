"""The path into nnU-Net, which need not be installed: plans changed for our weights, array order, trainer."""

import importlib.util
import json
import sys
import types

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from datasets.ct.nifti import read_ct
from engine.flags import REPOSITORY
from engine.weights import save_weights
from models.nnunet import FLIPPED, READER, SegmenterInNNUNet
from models.segmenters import SEGMENTERS
from models.weights_file import WeightsError
from scripts import make_nnunet_plans

PREPROCESSING = {
    "axcodes": "SPL",
    "spacing_mm": [4.0, 3.0, 2.0],
    "hu_min": -100.0,
    "hu_max": 300.0,
    "roi": [32, 32, 64],
}
BACKBONE = {"name": "unet", "feature_size": 6, "in_channels": 1}


@pytest.fixture
def weights(tmp_path):
    return make_weights(tmp_path)


def make_weights(folder, **preprocessing):
    torch.manual_seed(3)
    state = SEGMENTERS["unet"].build(1, 2, 6).state_dict()
    described = {"method": "alice", "step": 5, "backbone": BACKBONE, "preprocessing": PREPROCESSING | preprocessing}
    path = folder / "alice.safetensors"
    save_weights({key: value for key, value in state.items() if not key.startswith("out.")}, described, path)
    return path


def write_plans(folder, transpose=(0, 1, 2), **changed):
    """nnU-Net's plans of a CT of 2 x 0.8 x 0.7 mm in file order (Z, Y, X), as far as they matter here."""
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "batch_size": 2,
        "patch_size": [48, 160, 192],
        "median_image_size_in_voxels": [[100.0, 500.0, 600.0][axis] for axis in transpose],
        "spacing": [[2.0, 0.8, 0.7][axis] for axis in transpose],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
    } | changed
    measured = {"min": -900.0, "max": 1500.0, "mean": 90.0, "median": 88.0, "std": 70.0}
    plans = {
        "dataset_name": "Dataset017_Organs",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": [int(axis) for axis in np.argsort(transpose)],
        "original_median_spacing_after_transp": [[2.0, 0.8, 0.7][axis] for axis in transpose],
        "original_median_shape_after_transp": [[100, 500, 600][axis] for axis in transpose],
        "foreground_intensity_properties_per_channel": {
            "0": measured | {"percentile_00_5": -40.0, "percentile_99_5": 250.0}
        },
        "configurations": {"2d": {"spacing": [0.8, 0.7]}, "3d_fullres": configuration},
    }
    path = folder / "nnUNetPlans.json"
    path.write_text(json.dumps(plans))
    return path


def made_from(plans_path, weights, *words):
    make_nnunet_plans.main([f"--weights={weights}", f"--plans={plans_path}", *words])
    return json.loads((plans_path.parent / "alicePlans.json").read_text())


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_plans_give_the_weights_their_own_input(tmp_path, weights, transpose, capsys):
    path = write_plans(tmp_path, transpose)
    before = path.read_text()
    made = made_from(path, weights, "--batch_size=4")
    configuration = made["configurations"]["3d_fullres"]
    assert (made["plans_name"], made["image_reader_writer"]) == ("alicePlans", READER)
    assert made["transpose_forward"] == made["transpose_backward"] == [0, 1, 2]
    assert configuration["spacing"] == PREPROCESSING["spacing_mm"]
    assert configuration["patch_size"] == PREPROCESSING["roi"] and configuration["batch_size"] == 4
    np.testing.assert_allclose(
        configuration["median_image_size_in_voxels"], [100 * 2 / 4, 500 * 0.8 / 3, 600 * 0.7 / 2]
    )
    assert made["original_median_shape_after_transp"] == [100, 500, 600]
    assert configuration["data_identifier"] == "alicePlans_3d_fullres"
    assert configuration["alice"] == {"weights": str(weights), "part": "encoder", "backbone": "unet", "feature_size": 6}
    assert path.read_text() == before
    told = capsys.readouterr().out
    assert "nnUNetv2_train 17 3d_fullres 0 -p alicePlans -tr nnUNetTrainerAlice" in told
    assert f"nnUNet_extTrainer={REPOSITORY}/scripts/nnunet" in told


def test_nnunets_ct_normalisation_becomes_the_hu_window(tmp_path, weights):
    made = made_from(write_plans(tmp_path), weights)
    found = made["foreground_intensity_properties_per_channel"]["0"]
    hu = np.array([-1000.0, -100.0, 0.0, 300.0, 2000.0])
    normalised = (hu.clip(found["percentile_00_5"], found["percentile_99_5"]) - found["mean"]) / found["std"]
    np.testing.assert_allclose(normalised, [0, 0, 0.25, 1, 1])


def test_native_spacing_keeps_nnunets(tmp_path):
    made = made_from(write_plans(tmp_path, (2, 0, 1)), make_weights(tmp_path, spacing_mm="native"))
    assert made["configurations"]["3d_fullres"]["spacing"] == [2.0, 0.8, 0.7]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "SPL", "PIR", "ARI"])
def test_flipped_arrays_of_nnunets_reader_are_ours(tmp_path, codes):
    """The reader: nibabel's array in RAS order, axes reversed (nnU-Net 2.8, `NibabelIOWithReorient`)."""
    hu = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    image = nib.Nifti1Image(hu, np.diag([1.0, 2.0, 3.0, 1.0]))
    turned = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)))
    nib.save(turned, tmp_path / "ct.nii.gz")
    loaded = nib.load(tmp_path / "ct.nii.gz")
    theirs = loaded.as_reoriented(io_orientation(loaded.affine)).get_fdata().transpose(2, 1, 0)
    np.testing.assert_array_equal(np.flip(theirs, FLIPPED), read_ct(tmp_path / "ct.nii.gz").array)


def test_the_network_sees_our_order_and_answers_in_theirs():
    torch.manual_seed(0)
    network = SegmenterInNNUNet("unet", 1, 3, 6).eval()
    ours = torch.rand(1, 1, 32, 32, 64)
    with torch.no_grad():
        wanted, found = network.segmenter(ours), network(ours.flip(FLIPPED))
    assert found.shape == (1, 3, 32, 32, 64)
    torch.testing.assert_close(found.flip(FLIPPED), wanted)


def test_wrong_input_is_refused_by_name(tmp_path, weights):
    def told(plans_path, *words, error=ValueError, path=weights) -> str:
        with pytest.raises(error) as refused:
            made_from(plans_path, path, *words)
        return str(refused.value)

    plans = write_plans(tmp_path)
    assert "--configuration 3d_lowres" in told(plans, "--configuration=3d_lowres")
    assert "--plans_name nnUNetPlans would overwrite" in told(plans, "--plans_name=nnUNetPlans")
    assert "--roi" in told(plans, "--patch_size", "33", "32", "32")
    assert "not nnU-Net's plans" in told(tmp_path / "missing.json")
    assert "no such weights file" in told(plans, error=WeightsError, path=tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "bare.pth")
    assert "does not say its backbone and preprocessing" in told(plans, path=tmp_path / "bare.pth")
    slices = {"backbone": {"name": "resnet50_unet"}, "preprocessing": PREPROCESSING | {"roi": [1, 32, 32]}}
    save_weights({"a": torch.zeros(1)}, slices, tmp_path / "slices.pth")
    assert "2-D, trained with --roi_z 1" in told(plans, path=tmp_path / "slices.pth")
    assert "ZScoreNormalization" in told(write_plans(tmp_path, normalization_schemes=["ZScoreNormalization"]))
    of_mr = {"backbone": {"name": "unet"}, "preprocessing": PREPROCESSING | {"images": "mr"}}
    save_weights({"a": torch.zeros(1)}, of_mr, tmp_path / "mr.pth")
    assert "they know mapped MR" in told(write_plans(tmp_path), path=tmp_path / "mr.pth")
    slices = make_weights(tmp_path, roi=[1, 64, 64])
    assert "2-D, trained with --roi_z 1 (crops of 1 x 64 x 64 voxels)" in told(write_plans(tmp_path), path=slices)
    assert not (tmp_path / "alicePlans.json").exists()


class PlainTrainer:
    """What our trainer takes from nnU-Net's, in its order: build, put on the device, make the optimiser."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        self.configuration_manager = types.SimpleNamespace(configuration=plans["configurations"][configuration])
        self.device, self.is_ddp, self.num_epochs, self.log = device, False, 7, []

    def initialize(self):
        network = self.build_network_architecture(None, self.configuration_manager, 1, 3, self.enable_deep_supervision)
        self.network = network.to(self.device)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def print_to_log_file(self, text):
        self.log.append(text)


def test_the_trainer_starts_from_the_weights(tmp_path, weights, monkeypatch):
    modules = {
        "nnunetv2.training.lr_scheduler.polylr": {"PolyLRScheduler": lambda *args: args},
        "nnunetv2.training.nnUNetTrainer.nnUNetTrainer": {"nnUNetTrainer": PlainTrainer},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("nnunetv2", "nnunetv2.training", "nnunetv2.training.lr_scheduler", "nnunetv2.training.nnUNetTrainer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = importlib.util.spec_from_file_location("trainer", REPOSITORY / "scripts" / "nnunet" / "trainer.py")
    trainer_module = importlib.util.module_from_spec(found)
    found.loader.exec_module(trainer_module)
    trainer = getattr(trainer_module, make_nnunet_plans.TRAINER)(
        made_from(write_plans(tmp_path), weights), "3d_fullres", 0, {}, torch.device("cpu")
    )
    trainer.initialize()
    torch.manual_seed(3)
    source, own = SEGMENTERS["unet"].build(1, 2, 6).state_dict(), trainer.network.segmenter.state_dict()
    encoder = [key for key in own if key.startswith(SEGMENTERS["unet"].encoder_key_prefixes)]
    assert len(encoder) > 20 and all(torch.equal(own[key], source[key]) for key in encoder)
    assert not any(torch.equal(own[key], source[key]) for key in own if key.endswith("transp_conv.conv.weight"))
    assert "45 of 45 keys" in trainer.log[-1]
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trained == {id(parameter) for parameter in trainer.network.parameters()}
    assert trainer.lr_scheduler == (trainer.optimizer, trainer.initial_lr, 7)
    trainer.set_deep_supervision_enabled(False)

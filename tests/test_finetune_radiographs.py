"""Finetuning to masks on radiographs: grey PNG of 8 and of 16 bits in, a PNG mask out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.evaluate_segmentation
import scripts.finetune_segmentation as command
from datasets.ct.images import RADIOGRAPH
from datasets.ct.nifti import Volume
from datasets.ct.radiograph import picture_affine, read_radiograph, write_grey
from datasets.lists.data_list import load_data_list
from datasets.lists.label_classes import LabelClasses, read_classes
from datasets.samples.labelled import SegmentationAugment, SegmentationCropDataset
from datasets.store.volumes import VolumeStore
from engine.checkpoint import CheckpointError, load_checkpoint
from engine.segmentation.evaluation import check_pixel_sizes
from engine.segmentation.segmenter import Segmenter
from engine.segmentation.setup import Preprocessing, resolve_setup
from engine.segmentation.sliding_window import WindowOptions
from models.segmenters import SEGMENTERS
from scripts import predict
from tests.labelled_corpus import finetune_arguments
from tests.tiny_run import log_of

SHAPE, PIXEL_MM = (70, 80), (2.0, 1.0)
SMALL = {
    **{"backbone": "swin_unetr", "feature_size": 12, "roi_z": None, "roi_y": 64, "roi_x": 64, "spacing_mm": None},
    **{"batch_size": 2, "window_batch": 4, "val_freq": 4, "store_dir": None},
}


def radiograph(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey in [0, 1] and labels 0, 1, 3 [H, W]: two bright discs at slightly different places."""
    rng = np.random.default_rng(seed)
    h, w = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    mask = np.zeros(SHAPE, np.uint8)
    for value, (centre, radius) in {1: ((30, 25), 14), 3: ((40, 60), 8)}.items():
        at = np.array(centre) + rng.normal(0, 2, 2)
        mask[(h - at[0]) ** 2 + (w - at[1]) ** 2 < radius**2] = value
    return np.clip(0.2 + 0.25 * mask + rng.normal(0, 0.03, SHAPE), 0.05, 1), mask


def write_case(folder: Path, name: str, seed: int, is_deep: bool, pixel_mm=PIXEL_MM) -> dict:
    """A picture of 8 bits, or of 12 in a file of 16, and its mask; returns the list's entry."""
    grey, mask = radiograph(seed)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    stored = (grey * 4095).astype(np.uint16) if is_deep else (grey * 255).astype(np.uint8)
    write_grey(folder / f"{name}.png", stored, pixel_mm)
    write_grey(folder / "labels" / f"{name}.png", mask, pixel_mm)
    return {"image": f"{name}.png", "label": f"labels/{name}.png", "name": name}


def make_list(folder: Path, pixel_mm=PIXEL_MM) -> Path:
    entries = [write_case(folder, f"xray{seed}", seed, seed % 2 == 0, pixel_mm) for seed in range(4)]
    names = {"0": "background", "1": "heart", "3": "node"}
    content = {"labels": names, "training": entries[:2], "validation": entries[2:]}
    (folder / "list.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_list(tmp_path_factory.mktemp("xray"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finished")
    command.main(finetune_arguments(corpus, output_dir, **SMALL, lr=1e-2, steps=8))
    return output_dir


def test_a_run_on_radiographs_needs_no_flags_for_their_kind(finished):
    best = load_checkpoint(finished / "best.pth", "segmentation")
    assert best["preprocessing"] == {
        "axcodes": "SPL", "spacing_mm": "native", "hu_min": None, "hu_max": None, "roi": [1, 64, 64],
        "images": "radiograph",
    }  # fmt: skip
    losses = [line["loss"] for line in log_of(finished)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_results_are_per_picture(finished):
    summary = json.loads((finished / "evaluation" / "results.json").read_text())
    assert list(summary["organs"]) == ["heart", "node"] and summary["num_cases"] == 2
    assert summary["dice"]["num"] == summary["nsd"]["num"] == summary["slice_dice_published"]["num"] == 2
    assert (finished / "evaluation" / "worst_and_best.png").stat().st_size > 5_000


def test_a_picture_gets_a_mask_on_its_own_pixels(finished, corpus, tmp_path, capsys):
    flags = [f"--checkpoint_file={finished / 'best.pth'}", "--device=cpu", "--overlap=0", "--window_batch=4"]
    predict.main([str(corpus / "xray2.png"), str(tmp_path / "mask.png"), *flags])
    assert "heart: " in (said := capsys.readouterr().out) and "pixels" in said
    found = np.asarray(Image.open(tmp_path / "mask.png"))
    assert found.shape == SHAPE and found.dtype == np.uint8 and set(np.unique(found)) <= {0, 1, 3}
    assert Image.open(tmp_path / "mask.png").info["dpi"] == pytest.approx((25.4, 12.7), rel=1e-3)
    lists = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--output_dir", str(tmp_path / "e")]
    scripts.evaluate_segmentation.main([*lists, *flags, "--save_predictions"])
    assert (tmp_path / "e/cases.csv").read_text() == (finished / "evaluation/cases.csv").read_text()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "e" / "predictions" / "xray2.png")), found)
    for image, output, message in (
        ("xray2.png", "mask.nii.gz", "mask.nii.gz: expected a name ending in .png"),
        ("ct.nii.gz", "mask.nii.gz", r"ct.nii.gz: the network .* segments radiographs \(.png\)"),
    ):
        with pytest.raises(ValueError, match=message):
            predict.main([str(corpus / image), str(tmp_path / output), *flags])


def test_a_resumed_run_must_keep_the_window(finished, corpus):
    with pytest.raises(CheckpointError, match="--a_min unset -> -100"):
        command.main(finetune_arguments(corpus, finished, **SMALL, lr=1e-2, steps=8, a_min=-100))


def test_nsd_of_pictures_without_pixel_size_is_refused_before_training(tmp_path):
    corpus = make_list(tmp_path / "xray", pixel_mm=None)
    cases = load_data_list(corpus / "list.json", corpus, "validation")
    assert not read_radiograph(cases[0].image).is_scaled
    with pytest.raises(ValueError, match="--nsd_mm 2: .*xray2.png does not say how large its pixels are.*--nsd_mm 0"):
        command.main(finetune_arguments(corpus, tmp_path / "run", **SMALL))
    assert not (tmp_path / "run").exists()
    check_pixel_sizes(cases, 0.0)


def test_crops_are_shown_in_each_pictures_own_range(finished, corpus):
    store = VolumeStore(finished / "store")
    classes, plain = read_classes(corpus / "list.json"), SegmentationAugment.off()
    for name in ("xray0", "xray1"):  # of 12 and of 8 bits
        own = SegmentationCropDataset(store, [name], classes, (1, *SHAPE), augment=plain)[0]
        stored = store.read(name).array.astype(np.float32)
        expected = (stored - stored.min()) / (stored.max() - stored.min())
        np.testing.assert_allclose(own["image"][0].numpy(), expected, atol=1e-5)
    given = SegmentationCropDataset(store, ["xray1"], classes, (1, *SHAPE), -128, 127, augment=plain)[0]
    np.testing.assert_allclose(given["image"][0].numpy(), (store.read("xray1").array + 128) / 255, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(None, None), (-32768.0, -28673.0)])
def test_a_network_sees_a_small_picture_with_darkness_around_it(low, high):
    """A picture of 12 bits in 16 is stored far below the HU of air, which would be white."""
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.cat([1 - x, x], dim=1)

    known = Preprocessing(None, low, high, (1, 16, 16), RADIOGRAPH)
    windows = WindowOptions(known.roi, overlap=0.0)
    classes = LabelClasses((0, 1), ("background", "heart"))
    segmenter = Segmenter(Watched(), classes, known, windows, torch.device("cpu"))
    picture = np.full((1, 10, 12), -32768, np.int16)
    picture[0, 2:5, 3:9] = -28673
    volume = Volume(picture, picture_affine((1.0, 1.0)), "x.png")
    found = segmenter.segment(volume, volume)
    assert np.array_equal(found, (picture > -32768).astype(np.uint8))
    assert seen[0].shape == (1, 1, 1, 16, 16) and seen[0].sum() == 18 and seen[0].max() == 1


def test_random_contrast_is_for_ct_alone(corpus, tmp_path):
    with pytest.raises(ValueError, match="--random_contrast changes CT by HU, and these cases are radiographs"):
        command.main(finetune_arguments(corpus, tmp_path / "run", **SMALL, random_contrast=0.5))
    assert not (tmp_path / "run").exists()


# What radiographs take over from weights


def resolve(described: dict, **given):
    return resolve_setup({"preprocessing": described}, given, SEGMENTERS, images=RADIOGRAPH)


def test_radiographs_do_not_take_over_the_window_and_spacing_of_ct():
    of_ct = {"axcodes": "SPL", "spacing_mm": [2.5, 1.0, 1.0], "hu_min": -500.0, "hu_max": 500.0, "roi": [1, 64, 64]}
    setup = resolve(of_ct)
    assert setup.preprocessing == Preprocessing(None, None, None, (1, 64, 64), RADIOGRAPH)
    assert setup.notes == ["the weights were trained on ct, so only their crop is taken over"]
    assert Preprocessing.from_dict(setup.preprocessing.as_dict()) == setup.preprocessing
    of_radiographs = of_ct | {"images": RADIOGRAPH, "hu_min": -128.0, "hu_max": 127.0}
    assert resolve(of_radiographs).preprocessing.hu_max == 127.0 and not resolve(of_radiographs).notes
    back = resolve_setup({"preprocessing": of_radiographs}, {}, SEGMENTERS)
    assert back.preprocessing == Preprocessing((2.0, 1.5, 1.5), -125.0, 225.0, (1, 64, 64)) and len(back.notes) == 1


def test_thick_crops_of_radiographs_are_refused():
    assert resolve({}).preprocessing.roi == (1, 96, 96)
    with pytest.raises(ValueError, match="--roi_z 64: radiographs are one pixel deep, expected --roi_z 1"):
        resolve({"roi": [64, 64, 64]})

"""Finetuning on a real labelled CT: the organs that it learns from are found again, on the file's own grid."""

import json

import nibabel as nib
import numpy as np
import pytest

from scripts import finetune_segmentation, predict
from tests.shared import shared_file

NAME = "abdomen_pelvis_3mm"
ORGANS = {"0": "background", "1": "spleen", "2": "right kidney", "3": "left kidney", "5": "liver", "52": "aorta"}
SMALL = {
    **{"backbone": "unet", "feature_size": 8, "roi_x": 32, "roi_y": 32, "roi_z": 32, "spacing_mm": 6, "steps": 200},
    **{"batch_size": 2, "lr": 1e-2, "warmup_steps": 0, "val_freq": 0, "overlap": 0.25, "class_weights": "rare"},
    **{"num_workers": 0, "device": "cpu", "precision": "fp32"},
}


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, one_thread):
    """A small U-Net after 200 steps on one CT, and that CT's files."""
    image, label = shared_file("ct", f"{NAME}.nii.gz"), shared_file("ct", f"{NAME}_label.nii.gz")
    out = tmp_path_factory.mktemp("finetuned")
    entry = {"image": image.name, "label": label.name}
    sections = {"training": [entry | {"name": "learnt"}], "validation": [entry | {"name": "judged"}]}
    (out / "list.json").write_text(json.dumps({"labels": ORGANS, **sections}))
    places = {"data_dir": image.parent, "json_list": out / "list.json", "store_dir": out / "store", "output_dir": out}
    finetune_segmentation.main([f"--{name}={value}" for name, value in (SMALL | places).items()])
    return out, image, label


def test_organs_of_a_real_ct_are_learnt(finetuned):
    results = json.loads((finetuned[0] / "evaluation" / "results.json").read_text())
    dice = {name: scores["dice"]["mean"] for name, scores in results["organs"].items()}
    assert dice["liver"] > 0.6 and np.mean(list(dice.values())) > 0.2


def test_prediction_lies_where_the_organs_are(finetuned):
    out, image, label = finetuned
    predict.main([str(image), str(out / "found.nii.gz"), f"--checkpoint_file={out / 'best.pth'}", "--device=cpu"])
    found, truth = nib.load(out / "found.nii.gz"), nib.load(label)
    assert found.shape == truth.shape and np.allclose(found.affine, truth.affine, atol=1e-4)
    livers = [np.asarray(volume.dataobj) == 5 for volume in (found, truth)]
    assert 2 * (livers[0] & livers[1]).sum() / (livers[0].sum() + livers[1].sum()) > 0.6

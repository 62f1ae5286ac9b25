"""nnU-Net itself finetunes from our checkpoint. ALICE_NNUNET_PYTHON names its Python, in an environment of its own.

nnU-Net is newer there than the release 2.8.1: it has `nnUNetv2_preprocess_like_nnssl`. Minutes on a CPU.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from engine.flags import REPOSITORY
from tests.labelled_corpus import HU, labelled_volume
from tests.test_nnunet_checkpoint import PREPROCESSING, extract, write_checkpoint

PYTHON = os.environ.get("ALICE_NNUNET_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="ALICE_NNUNET_PYTHON names no Python that has nnU-Net")
DATASET = "Dataset901_Balls"
PLANS = "ptPlans__alice____Spacing__4.00_3.00_3.00___Norm__Z"
NUM_ENCODER = 454  # entries of 227 weights, each under two names; ResEncL has 448, its last stage does not widen


def make_dataset(folder: Path) -> None:
    """Four small phantoms in nnU-Net's layout; labels are counted through, as nnU-Net wants them."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    for number in range(4):
        hu, label = labelled_volume(number)
        nib.save(nib.Nifti1Image(hu, affine), folder / "imagesTr" / f"case{number}_0000.nii.gz")
        values = np.searchsorted(list(HU), label).astype(np.uint8)
        nib.save(nib.Nifti1Image(values, affine), folder / "labelsTr" / f"case{number}.nii.gz")
    labels = {"background": 0, "liver": 1, "spleen": 2, "aorta": 3}
    described = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described))


class NNUNet:
    """nnU-Net's commands on folders below `root`."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        folders = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        small = {"nnUNet_def_n_proc": "1", "nnUNet_compile": "f", "OMP_NUM_THREADS": "1"}
        self.environment = os.environ | folders | small | {"ALICE_CHECKPOINT": str(checkpoint)}
        self.preprocessed = root / "nnUNet_preprocessed" / DATASET
        self.raw = root / "nnUNet_raw" / DATASET
        self.results = root / "nnUNet_results" / DATASET

    def run(self, *words: str, **environment: str) -> str:
        """The output of a command in the bin folder of its Python."""
        command = [str(Path(PYTHON).parent / words[0]), *words[1:]]
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=3600, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def train(self, command: str, *words: str, num_steps: int = 0) -> dict[str, tuple[int, int]]:
        """Part of the network -> (entries equal to the checkpoint's, all), at the start of so many steps."""
        script = str(Path(__file__).with_name("nnunet_short_training.py"))
        settings = {"nnUNet_n_proc_DA": "0", "ALICE_STEPS": str(num_steps)}
        printed = self.run("python", script, command, "901", "3d_fullres", "all", *words, "-device", "cpu", **settings)
        found = re.findall(r"(\w+): (\d+) of (\d+) entries equal", printed)
        return {part: (int(equal), int(every)) for part, equal, every in found}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    extract(write_checkpoint(folder / "checkpoint.pth"), folder / "resenc_nnunet.pth")
    return folder / "resenc_nnunet.pth"


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory, checkpoint) -> NNUNet:
    """nnU-Net after planning and preprocessing for the checkpoint."""
    root = tmp_path_factory.mktemp("nnunet")
    make_dataset(root / "nnUNet_raw" / DATASET)
    nnunet = NNUNet(root, checkpoint)
    nnunet.run("nnUNetv2_extract_fingerprint", "-d", "901", "-np", "1")
    nnunet.run("nnUNetv2_plan_experiment", "-d", "901")
    nnunet.run(
        *("nnUNetv2_preprocess_like_nnssl", "-d", "901", "-n", "alice", "-pc", str(checkpoint)),
        *("-am", "like_pretrained", "-np", "1"),
    )
    return nnunet


def test_nnunet_plans_and_trains_from_the_checkpoint(nnunet) -> None:
    plans = json.loads((nnunet.preprocessed / f"{PLANS}.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == PREPROCESSING["spacing_mm"]
    assert configuration["patch_size"] == PREPROCESSING["roi"]
    counts = nnunet.train("nnUNetv2_train_pretrained", "-p", PLANS, "-tr", "PretrainedTrainer", num_steps=2)
    assert counts["encoder"] == (NUM_ENCODER, NUM_ENCODER)
    assert nnunet.train("nnUNetv2_train_pretrained", "-p", PLANS, "--from_scratch")["encoder"] == (0, NUM_ENCODER)


def test_the_release_takes_the_whole_network_from_the_same_file(nnunet, checkpoint) -> None:
    counts = nnunet.train("nnUNetv2_train", "-p", PLANS, "-pretrained_weights", str(checkpoint))
    assert counts["encoder"] == (NUM_ENCODER, NUM_ENCODER)
    num_equal, num_all = counts["decoder"]
    assert num_all - num_equal == 10  # weights and biases of the five segmentation layers


def code_of_the_documents(word: str) -> str:
    """The Python block of scripts/README.md that holds a word, for the data of these tests."""
    text = (REPOSITORY / "scripts" / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in block]
    return re.sub(r"ptPlans__\S+__Z", PLANS, code.replace("Dataset001_Organs", DATASET))


def test_the_documents_edit_of_the_plans_keeps_our_window(nnunet, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(nnunet.preprocessed.parent))
    exec(code_of_the_documents("CTNormalization"), {})
    nnunet.run("nnUNetv2_preprocess", "-d", "901", "-plans_name", "aliceWindow", "-c", "3d_fullres", "-np", "1")
    read = "import blosc2, sys; a = blosc2.open(sys.argv[1])[:]; print(a.min(), a.max())"
    volume = nnunet.preprocessed / "aliceWindow" / "case0.b2nd"
    low, high = map(float, nnunet.run("python", "-c", read, str(volume)).split())
    assert -0.3 < low < 0.05 and 0.9 < high < 1.3  # [0, 1], less what cubic resampling overshoots
    counts = nnunet.train("nnUNetv2_train_pretrained", "-p", "aliceWindow", "-tr", "PretrainedTrainer")
    assert counts["encoder"] == (NUM_ENCODER, NUM_ENCODER)


def test_the_documents_edit_of_the_finetuned_file_lets_nnunet_predict(nnunet, tmp_path, monkeypatch) -> None:
    folder = nnunet.results / f"PretrainedTrainer__{PLANS}__3d_fullres" / "fold_all"
    if not (folder / "checkpoint_final.pth").exists():
        nnunet.train("nnUNetv2_train_pretrained", "-p", PLANS, "-tr", "PretrainedTrainer", num_steps=2)
    monkeypatch.chdir(folder)
    exec(code_of_the_documents("trainer_name"), {})
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "case0_0000.nii.gz"
    image.symlink_to(nnunet.raw / "imagesTr" / image.name)
    nnunet.run(
        *("nnUNetv2_predict", "-d", "901", "-c", "3d_fullres", "-f", "all", "-tr", "PretrainedTrainer", "-p", PLANS),
        *("-i", str(image.parent), "-o", str(tmp_path), "-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1"),
    )
    assert nib.load(tmp_path / "case0.nii.gz").shape == nib.load(image).shape

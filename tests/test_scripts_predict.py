"""scripts/predict.py: the label map lies on the image's own voxels, whatever its orientation, spacing and size."""

import nibabel as nib
import numpy as np
import pytest
import torch

from engine.checkpoint import CheckpointError
from engine.segmentation import segmenter
from scripts import predict
from tests.itk_writer import write_itk, write_series
from tests.labelled_corpus import HU, SHAPE, SPACING_MM, labelled_volume


class ByIntensity(torch.nn.Module):
    """Logits that name the organ by its HU: windows [B, 1, ...] in [0, 1] -> [B, 4, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = torch.nn.Parameter(torch.tensor([(HU[value] + 125) / 350 for value in (0, 1, 2, 5)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -200 * (x - self.centres.view(1, -1, 1, 1, 1)) ** 2


class FakeKind:
    def build(
        self, in_channels: int, num_classes: int, feature_size: int, spatial_dims: int, hypercolumns: bool
    ) -> torch.nn.Module:
        assert not hypercolumns, "an old checkpoint does not name them"
        return ByIntensity()


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(segmenter.SEGMENTERS, "by_intensity", FakeKind())
    state = {
        "kind": "segmentation",
        "model": ByIntensity().state_dict(),
        "backbone": {"name": "by_intensity", "feature_size": 1, "in_channels": 1},
        "classes": {"values": [0, 1, 2, 5], "names": ["background", "liver", "spleen", "aorta"]},
        "preprocessing": {
            "axcodes": "SPL", "spacing_mm": [3.0, 2.5, 2.5], "hu_min": -125.0, "hu_max": 225.0, "roi": [32, 32, 32]
        },
    }  # fmt: skip
    torch.save(state, tmp_path / "best.pth")
    return tmp_path / "best.pth"


def save_as(path, array: np.ndarray, codes: str) -> None:
    """Write [X, Y, Z] in RAS under other axis codes."""
    affine = np.diag([*SPACING_MM, 1.0])
    image = nib.Nifti1Image(array, affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(image.as_reoriented(turn), path)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_output_lies_on_the_inputs_own_voxels(codes, checkpoint, tmp_path, capsys):
    hu, label = labelled_volume(0)
    smooth = np.vectorize(HU.get)(label).astype(np.int16)
    smooth[hu < -500] = -1000
    save_as(tmp_path / "image.nii.gz", smooth, codes)
    save_as(tmp_path / "truth.nii.gz", label, codes)
    words = ["--checkpoint_file", str(checkpoint), "--device", "cpu"]
    predict.main([str(tmp_path / "image.nii.gz"), str(tmp_path / "out.nii.gz"), *words])
    image, truth, made = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("image", "truth", "out"))
    assert made.shape == image.shape and made.get_data_dtype() == np.uint8
    np.testing.assert_allclose(made.affine, image.affine, atol=1e-5)
    found, expected = np.asarray(made.dataobj), np.asarray(truth.dataobj)
    assert set(np.unique(found)) <= {0, 1, 2, 5}
    for value, lowest in ((1, 0.9), (2, 0.75)):
        both = ((found == value) & (expected == value)).sum()
        assert 2 * both / ((found == value).sum() + (expected == value).sum()) > lowest, value
    told = capsys.readouterr().out
    assert "liver:" in told and " x ".join(map(str, reversed(SHAPE))) + " voxels (D, H, W)" in told


@pytest.mark.parametrize("name", ["image.mha", "image.nrrd", "series"])
def test_other_formats_give_the_labels_of_nifti(name, checkpoint, tmp_path):
    array, affine = labelled_volume(0)[0], np.diag([*SPACING_MM, 1.0])
    image = tmp_path / name
    write_series(image, array, affine) if name == "series" else write_itk(image, array, affine)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "image.nii.gz")
    made = []
    for path in (image, tmp_path / "image.nii.gz"):
        out = tmp_path / f"{path.name}_out.nii.gz"
        words = ["--checkpoint_file", str(checkpoint), "--device", "cpu", "--overlap", "0"]
        predict.main([str(path), str(out), *words])
        made.append(nib.load(out))
    np.testing.assert_allclose(made[0].affine, made[1].affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(made[0].dataobj), np.asarray(made[1].dataobj))
    with pytest.raises(ValueError, match="out.mha: expected a name ending in .nii"):
        predict.main([str(image), str(tmp_path / "out.mha"), *words])


def test_small_and_long_volumes(checkpoint, tmp_path):
    hu, _ = labelled_volume(1)
    for name, array in (("small", hu[:9, :11, :5]), ("long", np.concatenate([hu] * 4, axis=2))):
        save_as(tmp_path / f"{name}.nii.gz", array, "LAS")
        out = tmp_path / f"{name}_out.nii"
        predict.main([str(tmp_path / f"{name}.nii.gz"), str(out), "--checkpoint_file", str(checkpoint), "--overlap=0"])
        assert nib.load(out).shape == array.shape


@pytest.mark.parametrize("how", ["the same name", "a link"])
def test_the_ct_is_never_replaced(how, checkpoint, tmp_path):
    hu, _ = labelled_volume(0)
    save_as(tmp_path / "image.nii.gz", hu, "RAS")
    before, output = (tmp_path / "image.nii.gz").read_bytes(), tmp_path / "image.nii.gz"
    if how == "a link":
        output = tmp_path / "out.nii.gz"
        output.symlink_to(tmp_path / "image.nii.gz")
    with pytest.raises(ValueError, match="is the image itself, which its labels would replace"):
        predict.main([str(tmp_path / "image.nii.gz"), str(output), "--checkpoint_file", str(checkpoint)])
    assert (tmp_path / "image.nii.gz").read_bytes() == before


def test_what_is_no_ct_is_told(checkpoint, tmp_path, capsys):
    hu, label = labelled_volume(0)
    save_as(tmp_path / "label.nii.gz", label, "RAS")
    save_as(tmp_path / "shifted.nii.gz", (hu + 1024).clip(0), "RAS")
    words = [str(tmp_path / "out.nii.gz"), "--checkpoint_file", str(checkpoint), "--device", "cpu", "--overlap", "0"]
    with pytest.raises(ValueError, match="label.nii.gz: only 4 whole values, none below zero: a label map"):
        predict.main([str(tmp_path / "label.nii.gz"), *words])
    assert not (tmp_path / "out.nii.gz").exists()
    predict.main([str(tmp_path / "shifted.nii.gz"), *words])
    assert "shifted.nii.gz holds nothing below -200 HU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["backbone", "classes", "model", "preprocessing"])
def test_a_checkpoint_that_lacks_a_part_names_it(name, checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    del state[name]
    torch.save(state, checkpoint)
    with pytest.raises(CheckpointError, match=f"best.pth: holds no '{name}'; expected best.pth or checkpoint.pth of"):
        predict.open_segmenter(checkpoint, torch.device("cpu"))


def test_mistakes_are_named(checkpoint, tmp_path):
    words = ["--checkpoint_file", str(checkpoint), "--device", "cpu"]
    with pytest.raises(ValueError, match="out.png: expected a name ending in .nii"):
        predict.main(["image.nii.gz", "out.png", *words])
    with pytest.raises(ValueError, match="gone.nii.gz: no such file"):
        predict.main([str(tmp_path / "gone.nii.gz"), str(tmp_path / "out.nii.gz"), *words])
    torch.save({"kind": "alice"}, tmp_path / "alice.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of kind 'segmentation'"):
        predict.open_segmenter(tmp_path / "alice.pth", torch.device("cpu"))
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"backbone": {"name": "other"}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="its network is 'other'; known are"):
        predict.open_segmenter(tmp_path / "other.pth", torch.device("cpu"))

"""Labels carried by the command: on the images' own voxels, resumed, shared among ranks, mistakes by name."""

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image

from datasets.ct.nifti import write_nifti
from datasets.lists.data_list import load_data_list
from engine import references
from engine.distributed import World
from engine.segmentation.setup import Preprocessing
from models.segmenters import SEGMENTERS
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.network import AnatomicalEmbedder
from scripts import pack_references, propagate_labels
from tests.sam_fakes import AFFINE, SHAPE, atlas_labels, compact_options, patient_volume, save_embedder

pytestmark = pytest.mark.usefixtures("one_thread")

ORGANS = {2: ((-30, 10, -560), 35.0), 7: ((45, -20, -570), 30.0)}  # value: centre and radius, atlas mm


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A labelled patient; as images the same scan turned, and another; and an untrained network."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(2):
        volume = patient_volume(seed)
        write_nifti(folder / f"patient{seed}.nii.gz", volume.array, volume.affine)
        write_nifti(folder / f"patient{seed}_label.nii.gz", atlas_labels(seed, organs=ORGANS), volume.affine)
    (folder / "images").mkdir()
    nib.save(nib.as_closest_canonical(nib.load(folder / "patient0.nii.gz")), folder / "images" / "same_0000.nii.gz")
    (folder / "images" / "other_0000.nii.gz").write_bytes((folder / "patient1.nii.gz").read_bytes())
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(folder / "sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    return folder


def command(corpus, output, references=("patient0",), images=("images",), labels=None) -> list[str]:
    words = ["--checkpoint_file", str(corpus / "sam.pth"), "--device=cpu", "--output_dir", str(output)]
    files = [str(corpus / f"{name}.nii.gz") for name in references]
    labels = [str(corpus / f"{name}_label.nii.gz") for name in (references if labels is None else labels)]
    return [*words, "--reference", *files, "--labels", *labels, "--images", *(str(corpus / name) for name in images)]


def test_labels_lie_on_the_images_own_voxels_and_are_listed(corpus, tmp_path, capsys):
    data_list = tmp_path / "out" / "list.json"
    propagate_labels.main([*command(corpus, tmp_path / "out"), "--data_list", str(data_list)])
    image = nib.load(corpus / "images" / "same_0000.nii.gz")
    label, confidence = (nib.load(tmp_path / "out" / f"same_{what}.nii.gz") for what in ("label", "confidence"))
    truth = np.asarray(nib.as_closest_canonical(nib.load(corpus / "patient0_label.nii.gz")).dataobj)
    found, sure = np.asarray(label.dataobj), confidence.get_fdata()
    for made in (label, confidence):
        assert made.shape == image.shape and made.get_data_dtype() == np.uint8
        np.testing.assert_allclose(made.affine, image.affine, atol=1e-4)
    assert set(np.unique(found)) == {0, *ORGANS}
    for value in ORGANS:  # the reference's own scan
        assert 2 * ((found == value) & (truth == value)).sum() / ((found == value).sum() + (truth == value).sum()) > 0.8
    assert sure[found > 0].min() > 0.5 and 0.9 < sure.max() <= 1 and sure[0, 0, 0] == 0
    assert min(Image.open(tmp_path / "out" / "other.png").size) > 200
    cases = load_data_list(data_list, tmp_path / "out")
    assert [case.name for case in cases] == ["other", "same"]
    assert cases[1].weight == pytest.approx(sure[found > 0].mean(), abs=2e-3) and 0 < cases[0].weight <= 1
    assert cases[1].label.name == "same_label.nii.gz" and cases[1].image.name == "same_0000.nii.gz"
    assert json.loads(data_list.read_text())["labels"] == {"0": "background", "2": "label 2", "7": "label 7"}
    assert "2 labelled, 0 were finished, 0 failed" in capsys.readouterr().out


def test_references_are_listed_with_their_drawn_labels(corpus, tmp_path):
    data_list, listed = tmp_path / "out" / "list.json", ["--list_references", "true"]
    reference = corpus / "patient0.nii.gz"
    words = command(corpus, tmp_path / "out", images=("images", reference.name))
    propagate_labels.main([*words, "--data_list", str(data_list), *listed])
    first, *others = load_data_list(data_list, tmp_path / "out")
    assert (first.name, first.weight) == ("patient0", 1) and first.image.samefile(reference)
    assert first.label.samefile(corpus / "patient0_label.nii.gz")
    assert [case.name for case in others] == ["other", "same"] and max(case.weight for case in others) < 1
    with pytest.raises(ValueError, match="--list_references needs --data_list"):
        propagate_labels.main([*words, *listed])


def test_finished_images_are_skipped_and_other_references_refused(corpus, tmp_path, capsys):
    words = command(corpus, tmp_path, images=["images/same_0000.nii.gz"])
    propagate_labels.main(words)
    label = tmp_path / "same_label.nii.gz"
    first = label.stat().st_mtime_ns
    propagate_labels.main(words)
    assert label.stat().st_mtime_ns == first and "0 labelled, 1 were finished" in capsys.readouterr().out
    (tmp_path / "same_confidence.nii.gz").unlink()
    propagate_labels.main(words)
    second = label.stat().st_mtime_ns
    assert second > first
    propagate_labels.main([*words, "--overwrite"])
    assert label.stat().st_mtime_ns > second
    with pytest.raises(ValueError, match="holds labels made with --reference .*patient0.* pass --overwrite"):
        propagate_labels.main(command(corpus, tmp_path, ["patient1"], ["images/same_0000.nii.gz"]))


def test_each_rank_takes_its_share_and_broken_images_are_named(corpus, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes((corpus / "patient1.nii.gz").read_bytes()[:500])
    words = command(
        corpus, tmp_path / "out", images=["images/same_0000.nii.gz", "images/other_0000.nii.gz", str(broken)]
    )
    for rank, expected in ((1, {"other"}), (0, {"other", "same"})):
        monkeypatch.setattr(propagate_labels.distributed, "start", lambda device, rank=rank: World(rank, rank, 2))
        propagate_labels.main(words)
        assert {path.name.split("_")[0] for path in (tmp_path / "out").glob("*_label.nii.gz")} == expected
    assert "failed broken: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"references": ["patient0", "patient1"], "labels": ["patient0"]}, "--reference names 2 files and --labels 1"),
        ({"labels": ["nobody"]}, "--labels .*nobody_label.nii.gz: no such file"),
        ({"images": ["nowhere"]}, "--images .*nowhere: no such file or folder"),
        ({"images": ["sam.png"]}, "--images .*sam.png: expected CT"),
        ({"images": ["empty"]}, "--images .*empty: .*no images found"),
        ({"images": [""]}, "--output_dir .* lies in --images"),
    ],
)
def test_mistakes_are_named(changes, complaint, corpus):
    (corpus / "sam.png").touch()
    (corpus / "empty").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=complaint):
        propagate_labels.main(command(corpus, corpus / "out", **changes))
    assert not (corpus / "out").exists()


def test_labels_without_organs_are_refused(corpus, tmp_path):
    write_nifti(corpus / "none_label.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    with pytest.raises(ValueError, match="none_label.nii.gz: every voxel is 0"):
        propagate_labels.main(command(corpus, tmp_path, labels=["none"]))


@pytest.fixture
def phantoms(corpus, tmp_path, monkeypatch):
    """References as those that ship: two labelled patients, of whose two organs one may be named (2: right kidney)."""
    listed = {
        "training": [{"image": f"patient{seed}.nii.gz", "label": f"patient{seed}_label.nii.gz"} for seed in range(2)]
    }
    (corpus / "list.json").write_text(json.dumps(listed))
    output = tmp_path / "references.safetensors"
    words = ["--checkpoint_file", str(corpus / "sam.pth"), "--data_dir", str(corpus), "--num_cases", "2"]
    words += ["--json_list", str(corpus / "list.json"), "--output", str(output)]
    pack_references.main([*words, "--organs", "right kidney"])
    monkeypatch.setattr(references, "SHIPPED_REFERENCES", output)
    return words


def phantom_command(corpus, output, sam="sam.pth") -> list[str]:
    words = ["--checkpoint_file", str(corpus / sam), "--device=cpu", "--output_dir", str(output)]
    images = ["--images", str(corpus / "images" / "same_0000.nii.gz")]
    return [*words, "--organ_network", "none", "--reference", "phantoms", *images]


def test_phantoms_need_no_labels_and_name_only_what_they_find(corpus, phantoms, tmp_path):
    data_list = tmp_path / "out" / "list.json"
    propagate_labels.main([*phantom_command(corpus, tmp_path / "out"), "--data_list", str(data_list)])
    found, confidence = (
        np.asarray(nib.load(tmp_path / "out" / f"same_{what}.nii.gz").dataobj) for what in ("label", "confidence")
    )
    truth = np.asarray(nib.as_closest_canonical(nib.load(corpus / "patient0_label.nii.gz")).dataobj)
    assert set(np.unique(found)) == {0, 2}  # the other organ, 7, is left out
    assert 2 * ((found == 2) & (truth == 2)).sum() / ((found == 2).sum() + (truth == 2).sum()) > 0.6
    assert np.median(confidence[truth == 7]) == 0
    assert json.loads(data_list.read_text())["labels"] == {"0": "background", "2": "right kidney"}


def test_phantoms_of_another_network_and_phantoms_with_labels_are_refused(corpus, phantoms, tmp_path):
    torch.manual_seed(1)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(corpus / "other_sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    with pytest.raises(ValueError, match="other_sam.pth is SAM .* leave --checkpoint_file away"):
        propagate_labels.main(phantom_command(corpus, tmp_path / "out", "other_sam.pth"))
    with pytest.raises(ValueError, match="--warp and --save_displacement need references of your own"):
        propagate_labels.main([*phantom_command(corpus, tmp_path / "warped"), "--warp"])
    with pytest.raises(ValueError, match="--reference phantoms stands alone"):
        propagate_labels.main([*phantom_command(corpus, tmp_path / "out2"), "--labels", "a.nii.gz"])


def write_organ_network(path, sure_of: int, values=(0, *range(1, 14))) -> None:
    """A finetuned network that finds one class everywhere, whatever it sees."""
    network = SEGMENTERS["unet"].build(1, len(values), 8)
    for name, value in network.state_dict().items():
        if name.startswith("out."):
            value.zero_()
            value += torch.arange(len(values)).eq(sure_of) * 8.0 if name.endswith("bias") else 0
    preprocessing = Preprocessing((8.0, 8.0, 8.0), -125.0, 225.0, (32, 32, 32)).as_dict()
    backbone = {"name": "unet", "feature_size": 8, "in_channels": 1}
    classes = {"values": list(values), "names": ["background", *(f"organ {value}" for value in values[1:])]}
    state = {"kind": "segmentation", "backbone": backbone, "classes": classes, "preprocessing": preprocessing}
    torch.save(state | {"model": network.state_dict()}, path)


def test_a_network_has_its_say_where_phantoms_are_the_reference(corpus, phantoms, tmp_path):
    """One that is sure of background takes organs away, one that is sure of the organ adds to it, none leaves it."""
    write_organ_network(tmp_path / "blind.pth", 0)
    write_organ_network(tmp_path / "eager.pth", 2)
    sizes = {}
    for name in ("none", "blind.pth", "eager.pth"):
        network = name if name == "none" else str(tmp_path / name)
        out = tmp_path / f"out_{name}"
        propagate_labels.main([*phantom_command(corpus, out), "--organ_network", network])
        sizes[name] = int((np.asarray(nib.load(out / "same_label.nii.gz").dataobj) == 2).sum())
        assert json.loads((out / "run.json").read_text())["flags"]["organ_network"] == network
    assert sizes["blind.pth"] < 0.95 * sizes["none"] and sizes["none"] < sizes["eager.pth"] < 3 * sizes["none"]
    with pytest.raises(ValueError, match="holds labels made with --organ_network none"):
        words = [*phantom_command(corpus, tmp_path / "out_none"), "--organ_network", str(tmp_path / "blind.pth")]
        propagate_labels.main(words)


def test_a_network_that_cannot_help_is_refused(corpus, phantoms, tmp_path):
    words = phantom_command(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="--organ_network nowhere.pth: no such file; expected .* or the word none"):
        propagate_labels.main([*words, "--organ_network", "nowhere.pth"])
    assert not (tmp_path / "out").exists()
    write_organ_network(tmp_path / "liver.pth", 1, values=(0, 1))
    with pytest.raises(ValueError, match=r"liver.pth: knows no label \[2, 7\], which the phantoms have"):
        propagate_labels.main([*words, "--organ_network", str(tmp_path / "liver.pth")])


def test_too_few_cases_to_pack_are_told(corpus, phantoms):
    with pytest.raises(ValueError, match="section training holds 2 labelled cases, expected --num_cases 3"):
        pack_references.main([*phantoms, "--num_cases", "3"])


def test_displacement_and_warp_bring_the_reference_onto_the_image(corpus, tmp_path):
    words = [*command(corpus, tmp_path / "out", images=["images/same_0000.nii.gz"]), "--save_displacement", "--warp"]
    propagate_labels.main(words)
    field = SimpleITK.ReadImage(str(tmp_path / "out" / "same_to_patient0_displacement.nii.gz"))
    vectors = SimpleITK.GetArrayFromImage(field)
    assert vectors.shape[-1] == 3 and np.median(np.linalg.norm(vectors, axis=-1)) < 4  # the reference's own scan
    image, warped = (
        nib.load(path)
        for path in (corpus / "images" / "same_0000.nii.gz", tmp_path / "out" / "same_from_patient0.nii.gz")
    )
    assert warped.shape == image.shape and warped.get_data_dtype() == np.int16
    np.testing.assert_allclose(warped.affine, image.affine, atol=1e-4)
    one, other = (np.clip(volume.get_fdata(), -200, 300) for volume in (image, warped))
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.8
    (tmp_path / "out" / "same_from_patient0.nii.gz").unlink()
    propagate_labels.main(words)
    assert (tmp_path / "out" / "same_from_patient0.nii.gz").is_file()

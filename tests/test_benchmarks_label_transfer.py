"""Label transfer among phantoms: references, cases, organs that both show."""

import json

import numpy as np
import pytest
import torch

from benchmarks import label_transfer
from datasets.ct.nifti import write_nifti
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.network import AnatomicalEmbedder
from tests.sam_fakes import atlas_labels, compact_options, patient_volume, save_embedder

pytestmark = pytest.mark.usefixtures("one_thread")

ORGANS = {2: ((-30, 10, -560), 35.0), 7: ((45, -20, -570), 30.0)}  # value: centre and radius, atlas mm


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three labelled patients, the first of which lacks an organ, and an untrained network."""
    folder = tmp_path_factory.mktemp("corpus")
    listed = []
    for seed in range(3):
        volume, labels = patient_volume(seed), atlas_labels(seed, organs=ORGANS)
        labels[labels == (7 if seed == 0 else 0)] = 0
        write_nifti(folder / f"patient{seed}.nii.gz", volume.array, volume.affine)
        write_nifti(folder / f"patient{seed}_label.nii.gz", labels, volume.affine)
        listed.append({"image": f"patient{seed}.nii.gz", "label": f"patient{seed}_label.nii.gz"})
    (folder / "list.json").write_text(json.dumps({"training": listed[:2], "validation": listed[2:]}))
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(folder / "sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    return folder


def command(corpus, *further) -> list[str]:
    words = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json")]
    return [*words, "--checkpoint_file", str(corpus / "sam.pth"), "--num_threads", "1", *further]


def test_each_reference_labels_the_case_and_all_do_together(corpus, tmp_path, capsys):
    output = tmp_path / "found.json"
    label_transfer.main(command(corpus, "--num_references", "2", "--num_cases", "1", "--output", str(output)))
    found = json.loads(output.read_text())
    by_set = found["dice"]
    assert list(by_set) == ["patient0", "patient1", "all references"]
    assert set(by_set["patient0"][0]) == {"right kidney"}, "the first reference lacks the other organ"
    assert set(by_set["patient1"][0]) == {"right kidney", "left adrenal gland"} or len(by_set["patient1"][0]) == 2
    assert all(0 < value <= 1 for cases in by_set.values() for dice in cases for value in dice.values())
    assert found["mean"]["alone"]["mean"] == pytest.approx(
        np.mean([np.mean(list(by_set[name][0].values())) for name in ("patient0", "patient1")])
    )
    assert "| right kidney |" in capsys.readouterr().out


def test_too_few_cases_are_told(corpus):
    with pytest.raises(ValueError, match="3 labelled cases; --num_references 2 and --num_cases 5 .* need 7"):
        label_transfer.main(command(corpus, "--num_references", "2", "--num_cases", "5"))

"""The explorer's command: mistakes by file and flag before anything is read, and an end by Ctrl-C without noise."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.ct.nifti import write_nifti
from engine.explore.server import listen
from engine.explore.session import GIVEN, NONE
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.network import AnatomicalEmbedder
from scripts import explore
from tests.sam_fakes import AFFINE, SHAPE, atlas_labels, compact_options, patient_volume, save_embedder

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two patients, labels of the first, and an untrained network."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(2):
        write_nifti(folder / f"patient{seed}.nii.gz", patient_volume(seed).array, AFFINE)
    write_nifti(folder / "label.nii.gz", atlas_labels(0), AFFINE)
    write_nifti(folder / "empty.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    write_nifti(folder / "small.nii.gz", atlas_labels(0)[:20], AFFINE)
    (folder / "broken.nii.gz").write_bytes((folder / "patient1.nii.gz").read_bytes()[:500])
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(folder / "sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    return folder


def command(corpus, images=("patient0", "patient1"), labels=(), port: int = 0) -> list[str]:
    words = ["--checkpoint_file", str(corpus / "sam.pth"), "--device=cpu", f"--port={port}"]
    words += ["--images", *(str(corpus / f"{name}.nii.gz") for name in images)]
    files = [name if name == "phantoms" else str(corpus / f"{name}.nii.gz") for name in labels]
    return words + (["--labels", *files] if files else [])


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"images": ["patient0"]}, "--images .*patient0.nii.gz: expected two or more CT"),
        ({"images": ["patient0", "nobody"]}, "--images .*nobody.nii.gz: no such file"),
        ({"images": ["patient0", "broken"]}, "--images .*broken.nii.gz: "),
        ({"labels": ["nobody"]}, "--labels .*nobody.nii.gz: no such file"),
        ({"labels": ["label"] * 3}, "--labels names 3 files and --images 2"),
        ({"labels": ["empty"]}, "--labels .*empty.nii.gz: every voxel is 0"),
        ({"labels": ["small"]}, "--labels .*small.nii.gz: label has shape .*patient0"),
        ({"labels": ["phantoms", "label"]}, "--labels phantoms stands alone"),
        ({"labels": ["phantoms"]}, "sam.pth is SAM .* leave --checkpoint_file away with --labels phantoms"),
    ],
)
def test_mistakes_are_named(corpus, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        explore.main(command(corpus, **changes))


def test_a_taken_port_is_named_before_anything_is_read(corpus, monkeypatch):
    monkeypatch.setattr(explore, "read_ct", lambda path: pytest.fail("files were read"))
    with listen(0) as taken, pytest.raises(ValueError, match="--port .*: .*choose another one"):
        explore.main(command(corpus, port=taken.getsockname()[1]))


def test_it_serves_its_scans_and_ends_quietly(corpus):
    """As a user starts it; Ctrl-C comes while scans are being embedded, or after."""
    words = [sys.executable, "scripts/explore.py", *command(corpus, labels=["label"])]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:") and "Ctrl-C" in line, process.communicate(timeout=300)
        address = line.split()[1]
        with urllib.request.urlopen(f"{address}scans/1/axial/17", timeout=300) as answer:
            assert answer.read() == patient_volume(1).array[17].tobytes()
        scans = json.load(urllib.request.urlopen(f"{address}scans", timeout=300))["scans"]
        assert [scan["labels"] for scan in scans] == [GIVEN, NONE]
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in errors, errors

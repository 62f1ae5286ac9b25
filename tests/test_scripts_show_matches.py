"""The picture of matches: from files and from a store's cases, any number of points, and words about wrong ones."""

import json

import numpy as np
import pytest
import torch

from datasets.ct.nifti import write_nifti
from datasets.lists.data_list import Case
from datasets.store.volumes import build_store
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.network import AnatomicalEmbedder
from scripts import show_matches
from tests.sam_fakes import compact_options, patient_volume, save_embedder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two patients as files and in a store, and an untrained network."""
    folder = tmp_path_factory.mktemp("corpus")
    cases = []
    for seed in range(2):
        volume = patient_volume(seed)
        path = folder / "images" / f"patient{seed}.nii.gz"
        write_nifti(path, volume.array, volume.affine)
        cases.append(Case(f"patient{seed}", path, None))
    build_store(cases, folder / "store", spacing_mm=None, num_workers=0)
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(folder / "sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    return folder


def command(corpus, output, query: str = "patient0", key: str = "patient1", store: bool = True) -> list[str]:
    words = ["--checkpoint_file", str(corpus / "sam.pth"), "--query", query, "--key", key, "--device", "cpu"]
    return [*words, "--output_dir", str(output), *(["--store_dir", str(corpus / "store")] if store else [])]


def test_cases_of_a_store_and_files_give_the_same(corpus, tmp_path, capsys):
    points = ["--points", "-40,10,-550", "20,20,-480"]
    file = str(corpus / "images" / "patient1.nii.gz")
    show_matches.main([*command(corpus, tmp_path / "store"), *points])
    show_matches.main([*command(corpus, tmp_path / "mixed", key=file), *points])
    by_name, by_file = (
        json.loads((tmp_path / name / "matches.json").read_text())["matches"] for name in ("store", "mixed")
    )
    assert [row["query_mm"] for row in by_name] == [[-40, 10, -550], [20, 20, -480]]
    for one, other in zip(by_name, by_file, strict=True):
        np.testing.assert_allclose(one["key_mm"], other["key_mm"], atol=1e-3)
    for number in (1, 2):
        assert (tmp_path / "store" / f"match_{number:02d}.png").stat().st_size > 20_000
    assert capsys.readouterr().out.count("cycle error") == 4


def test_points_beside_the_patient_are_named(corpus, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"--points 0,0,9000: lies outside of the patient in patient0, who fills x -"):
        show_matches.main([*command(corpus, tmp_path), "--points", "0,0,9000"])
    assert not list(tmp_path.glob("*.png"))
    show_matches.main([*command(corpus, tmp_path), "--points", "-88,50,-650"])  # in the box's corner
    assert "point" in capsys.readouterr().out.partition("mm (")[2]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"query": "nobody"}, r"--query nobody: neither a file nor a case of the store \(its 2: patient0, patient1"),
        ({"key": "nobody.nii.gz", "query": "patient1"}, "--key nobody.nii.gz: neither a file"),
        ({"store": False}, "--query patient0: neither a file nor, without --store_dir, the name of a case"),
    ],
)
def test_unknown_volumes_are_named(changes, complaint, corpus, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        show_matches.main(command(corpus, tmp_path, **changes))

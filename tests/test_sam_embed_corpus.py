"""Which cases of a corpus are embedded: what the store or the list gives, without the few that are of no use."""

import json
from pathlib import Path

import pytest

from datasets.data_list import Case
from datasets.nifti import write_nifti
from datasets.volume_store import build_store
from sam_embed.case_source import open_cases
from tests.sam_fakes import patient_volume


def write_patient(folder: Path, seed: int) -> Path:
    volume = patient_volume(seed)
    write_nifti(folder / f"patient{seed}.nii.gz", volume.array, volume.affine)
    return folder / f"patient{seed}.nii.gz"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A store of two patients and a list that speaks of a third, which nobody could read."""
    cases = [Case(f"patient{seed}", write_patient(tmp_path / "images", seed)) for seed in (0, 1)]
    build_store(cases, tmp_path / "store", progress=False)
    listed = {"training": [{"image": f"patient{seed}.nii.gz"} for seed in (0, 1, 2)], "validation": []}
    listed["others"] = [{"image": "patient3.nii.gz"}]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    return tmp_path


def test_listed_cases_that_the_store_lacks_are_left_out_and_named(corpus, capsys):
    cases = open_cases(str(corpus / "store"), json_list=str(corpus / "list.json"))
    assert cases.names == ["patient0", "patient1"] and cases.read("patient1").shape == patient_volume(1).shape
    told = capsys.readouterr().err
    assert "1 of 3 listed cases are not in the store, first patient2" in told and "failures.json" in told
    open_cases(str(corpus / "store"), json_list=str(corpus / "list.json"), rank=1)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="1 of 1 listed cases are not in the store, first patient3.*--store_dir"):
        open_cases(str(corpus / "store"), json_list=str(corpus / "list.json"), sections=["others"])
    with pytest.raises(ValueError, match="no cases in validation"):
        open_cases(str(corpus / "store"), json_list=str(corpus / "list.json"), sections=["validation"])

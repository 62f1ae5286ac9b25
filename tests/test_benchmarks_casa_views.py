"""The benchmark of CASA's forms: what it reads of a method, and that it runs."""

import json

import pytest
import torch

from benchmarks import casa_views
from tests.small_alice import small_alice, small_batch


def test_a_casa_that_asks_nothing_is_unmoved_by_another_view():
    """Values of 0 leave the view without a say; in the released form the query still makes answers differ."""
    method = small_alice(casa_variant="published").eval()
    asking = casa_views.read_batch(method, small_batch(2))
    torch.nn.init.zeros_(method.student.casa.Cross_Att.MH_attn.w_vs.weight)
    deaf = casa_views.read_batch(method, small_batch(2))
    assert 0 <= asking["picked"] <= 1
    assert asking["unmoved"] < deaf["unmoved"] == pytest.approx(1, abs=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_the_command_trains_and_judges_forms(tmp_path):
    casa_views.main(["--quick", "--forms", "[no_casa,contrast_all]", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["forms"]
    assert found["no_casa"][0].keys() == {"loss_recon"}
    assert found["contrast_all"][0].keys() == set(casa_views.COLUMNS)

"""The cost model: FLOPs against formulas, passes against one another, and the arithmetic of corpora."""

import json
import math

import pytest
import torch

from benchmarks import cost_model
from models.layers import window_attention

SIZES = {"out_dim": 16, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "casa_heads": 2, "casa_head_dim": 8}
ROI = (64, 32, 32)
FEATURES = 12


@pytest.fixture(scope="module")
def cost():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_attention, "CHUNK_ELEMENTS", 2**40)  # nothing is computed, so nothing need fit a cache
        return cost_model.step_cost(ROI, feature_size=FEATURES, casa_hidden_dim=16, **SIZES)


def test_convolutions_are_counted_as_written_out(cost):
    per_voxel = 27 * FEATURES + 27 * FEATURES**2 + FEATURES  # two convolutions of 3 x 3 x 3 and one of 1 x 1 x 1
    name = "full-resolution encoder block (encoder1)"
    assert cost.parts[name] == 2 * 2 * math.prod(ROI) * per_voxel, "two views, a multiplication and an addition each"


def test_parts_make_up_the_forward_pass(cost):
    assert all(flops > 0 for flops in cost.parts.values())
    assert sum(cost.parts.values()) == pytest.approx(cost.student, rel=0.01)
    assert 1.7 < cost.backward / cost.student < 2.6
    assert 0 < cost.teacher < cost.student
    assert cost.num_trained > cost.num_averaged and cost.kept_bytes > 4 * math.prod(ROI)


def test_nothing_fake_is_left_behind(cost):
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    assert torch.ones(2).sum().item() == 2


def test_figures_of_a_corpus(cost):
    flags = cost_model.make_flags().parse_args(["--epochs", "10", "--bytes_per_voxel", "0.5"])
    found = cost_model.corpus(cost, flags, pairs_per_s=5.0, num_volumes=3600, num_gpus=2)
    assert found["gpu_hours"] == pytest.approx(2.0) and found["days"] == pytest.approx(1 / 24)
    voxels = 400 / 2 * (350 / 1.5) ** 2
    assert found["store_tb"] == pytest.approx(3600 * voxels * 0.5 / 1e12)
    assert found["read_gb_per_s"] == pytest.approx(2 * 5 * 2 * 4**3 * 32**3 * 0.5 / 1e9)
    assert found["gradients_gb_per_s_per_gpu"] == pytest.approx(4 * cost.num_trained * 5 / 8 / 1e9)


def test_levers_follow_the_sizes_of_tensors(cost):
    """Windows of 7 at strides 2 and 4 are padded: 5 x 3 x 3 and 3 x 2 x 2 of them; below, one window holds the map."""
    words = ["--batch_size=4", "--memory_tb_per_s=1", "--pcie_gb_per_s=2", "--network_gb_per_s=1"]
    found = cost_model.levers(cost, ROI, cost_model.make_flags().parse_args(words))
    windows = [5 * 3 * 3 * 3 * 343**2, 3 * 2 * 2 * 6 * 343**2, 2 * 12 * 196**2, 24 * 16**2]
    assert cost.bias_elements > 2 * 2 * sum(windows[:2])  # two views, two blocks a stage
    assert cost.norm_elements > 2 * 4 * FEATURES * math.prod(ROI)  # decoder1 and encoder1 alone
    names = list(found)
    assert found[names[1]]["gb"] == pytest.approx(found[names[0]]["gb"] / 3)
    assert found["views to the device, float32"]["gb"] == pytest.approx(4 * 2 * 3 * 4 * math.prod(ROI) / 1e9)
    for whole, part, ratio in ((3, 4, 6), (5, 6, 2)):
        assert found[names[whole]]["ms"] == pytest.approx(ratio * found[names[part]]["ms"])


def test_command_prints_tables_and_writes_figures(cost, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost_model, "step_cost", lambda roi, feature_size: cost)
    output = tmp_path / "cost.json"
    cost_model.main(["--pairs_per_s", "2", "--output", str(output)])
    found, text = json.loads(output.read_text()), capsys.readouterr().out
    assert found["pairs_per_s"] == 2 and len(found["corpora"]) == 4
    assert "160,000" in text and "(measured)" in text

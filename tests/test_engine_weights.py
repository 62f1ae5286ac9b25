"""What extraction takes from a checkpoint: the teacher where a run has one, else the student."""

import pytest
import torch

import extract_backbone_weights
from engine.checkpoint import CheckpointError
from engine.device import make_scaler
from engine.optim import make_optimizer
from engine.run import RunState
from engine.weights import chosen_part, start_from
from models.backbones import BACKBONES
from models.methods import METHODS

CPU = torch.device("cpu")
SIZES = {
    "simsiam": {"projector_hidden_dim": 16, "projector_dim": 16, "predictor_dim": 8},
    "dino": {"out_dim": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8},
}


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    kind = METHODS[name]
    return kind(
        kind.Options(**SIZES[name]),
        lambda decoder_stride, with_masks: BACKBONES["unet"](8, (32, 32, 32), decoder_stride, False, with_masks),
    )


def write_checkpoint(path, name: str):
    method = build(name)
    description = {
        "kind": name, "flags": {}, "commit": "abc", "versions": {}, "preprocessing": {"axcodes": "SPL"},
        "backbone": {"name": "unet", "feature_size": 8, "in_channels": 1},
    }  # fmt: skip
    optimizer = make_optimizer(method.student, 0.1, 0, CPU, constant_parts=method.constant_lr)
    torch.save(RunState(method, optimizer, make_scaler("fp32", CPU), description, 7).as_checkpoint(5), path)
    return path


@pytest.mark.parametrize(("name", "part"), [("simsiam", "student"), ("dino", "teacher")])
def test_the_teacher_is_taken_where_there_is_one(name: str, part: str, tmp_path, capsys) -> None:
    """And the extracted encoder starts another run of the same backbone."""
    checkpoint, output = write_checkpoint(tmp_path / "checkpoint.pth", name), tmp_path / "weights.pth"
    extract_backbone_weights.main([str(checkpoint), str(output)])
    assert f"of the {part} (step 7)" in capsys.readouterr().out
    source, weights = (torch.load(path, weights_only=True) for path in (checkpoint, output))
    assert weights and all(
        torch.equal(value, source[part][f"backbone.network.{key}"]) for key, value in weights.items()
    )
    other = build(name, seed=1)
    report = start_from(other, output)
    assert not report.misshapen and not report.unexpected
    for key, value in weights.items():
        assert torch.equal(other.student.backbone.network.state_dict()[key], value)
        if hasattr(other, "teacher"):
            assert torch.equal(other.teacher.backbone.network.state_dict()[key], value)


def test_a_part_that_is_asked_for_is_taken_or_missed_by_name(tmp_path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", "simsiam")
    with pytest.raises(CheckpointError, match="holds no 'teacher'"):
        extract_backbone_weights.main([str(checkpoint), str(tmp_path / "out.pth"), "--checkpoint_key", "teacher"])
    extract_backbone_weights.main([str(checkpoint), str(tmp_path / "out.pth"), "--checkpoint_key", "student"])


def test_a_teacher_without_a_backbone_is_not_taken() -> None:
    backbone, head = {"backbone.network.w": torch.zeros(1)}, {"projector.w": torch.zeros(1)}
    assert chosen_part({"student": backbone, "teacher": backbone}) == "teacher"
    assert chosen_part({"student": backbone, "teacher": head}) == "student"
    assert chosen_part({"student": backbone}) == "student"
    assert chosen_part({"student": backbone, "teacher": backbone}, "student") == "student"

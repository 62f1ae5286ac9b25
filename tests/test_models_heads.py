"""The projection head against the published numbers, and the parts that are built."""

import json

import pytest
import torch

from models.backbones.interface import flatten_tokens
from models.heads import ProjectionHead, WeightNormLinear
from tests.golden_fill import fill_by_name, golden, golden_file, known

PUBLISHED = {"in_dim": 384, "encoder_dim": 384, "decoder_dim": 192}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_matches_the_published_head(role: str) -> None:
    """A shared token layer in the teacher, an own one in the student; every 8th decoder token was kept."""
    published = golden(f"golden_head_{role}.npz")
    head = ProjectionHead(**PUBLISHED, shared_last_layer=role == "teacher")
    fill_by_name(head)
    with torch.no_grad():
        cls = head.project_cls(published["cls_token"])
        encoder = head.project_encoder_tokens(flatten_tokens(published["encoder"]))
        decoder = head.project_decoder_tokens(flatten_tokens(published["decoder"])[:, ::8])
    for ours, expected in ((cls, published["x1"]), (encoder, published["x2"]), (decoder, published["x3"])):
        torch.testing.assert_close(*known(ours, expected), rtol=1e-4, atol=1e-7)


def test_state_dict_names_are_the_published_ones() -> None:
    shapes = json.loads(golden_file("casa_head_state_dicts.json").read_text())
    head = ProjectionHead(**PUBLISHED)
    assert {name: list(tensor.shape) for name, tensor in head.state_dict().items()} == shapes["head_student"]
    # The published teacher lists its one shared last layer under both names.
    shared = {name: shape for name, shape in shapes["head_teacher"].items() if not name.startswith("last_layer2")}
    teacher = ProjectionHead(**PUBLISHED, shared_last_layer=True)
    assert {name: list(tensor.shape) for name, tensor in teacher.state_dict().items()} == shared


def test_weight_norm_equals_torch_and_stays_in_float32() -> None:
    ours = WeightNormLinear(16, 8, train_gain=True)
    fill_by_name(ours)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 8, bias=False))
    reference.parametrizations.weight.original0.data.copy_(ours.weight_g.data)
    reference.parametrizations.weight.original1.data.copy_(ours.weight_v.data)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference(x))


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({}, {"last_layer"}, {"last_layer2", "mlp3", "mlp4"}),
        ({"with_cls": False, "decoder_dim": 12}, {"last_layer2", "mlp4"}, {"last_layer", "mlp3"}),
        ({"with_cls": False, "decoder_dim": 12, "shared_last_layer": True}, {"last_layer2"}, {"last_layer"}),
        ({"decoder_dim": 12, "shared_last_layer": True}, {"last_layer", "mlp4"}, {"last_layer2"}),
    ],
)
def test_builds_only_what_is_used(options: dict, present: set, absent: set) -> None:
    head = ProjectionHead(24, out_dim=8, hidden_dim=16, bottleneck_dim=4, **options)
    parts = {name.split(".")[0] for name, _ in head.named_parameters()}
    assert present <= parts and not absent & parts


def test_gain_is_trained_only_on_request() -> None:
    assert not WeightNormLinear(4, 4).weight_g.requires_grad
    assert WeightNormLinear(4, 4, train_gain=True).weight_g.requires_grad

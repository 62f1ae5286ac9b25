"""VoCo against the released code's numbers (golden data: tests/golden_fill.py), through our own modules."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import main_ddp
from datasets.samples.grid import base_starts, overlap_shares
from engine.flags import REPOSITORY
from engine.pretrain_flags import chosen_method
from losses.overlap import match_term, miss_term, predicted_overlap, spread_term
from models.backbones.swin_unetr import SwinUNETRV2Backbone
from models.methods.voco import Projector, VoCo, VoCoOptions
from tests.golden_fill import fill_by_name, golden, golden_file, known

NAME = "golden_voco.npz"


def arrays(*names: str) -> list[Tensor]:
    """These arrays; the test is skipped where a set lacks one of them."""
    found = golden(NAME)
    if missing := [name for name in names if name not in found]:
        pytest.skip(f"{NAME} holds no {', '.join(missing)}")
    return [found[name] for name in names]


def near(ours: Tensor | float, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(*known(torch.as_tensor(ours).double(), theirs.double()), rtol=0, atol=tolerance)


def fill_module(module: nn.Module, prefix: str) -> nn.Module:
    """Weights by the names that they have in the released code."""
    return fill_by_name(module, lambda name: prefix + name, kept=("relative_position_index",))


class NoBackbone(nn.Module):
    """Stands where only heads are asked."""

    skip_channels = {1: 2}

    def encoder_twin(self) -> "NoBackbone":
        return NoBackbone()


def method_of(variant: str = "v2", heads: tuple[nn.Module, nn.Module] | None = None, **options) -> VoCo:
    """The method as released (no dropout, one-sided loss_reg) over given projections or with given heads."""
    settings = {"voco_dropout": 0.0, "voco_even_bases": False} | options
    method = VoCo(VoCoOptions(variant, voco_dim=4, **settings), lambda *args, **kwargs: NoBackbone())
    method.student.head, method.teacher.head = heads or (nn.Identity(), nn.Identity())
    method.teacher.requires_grad_(False)
    return method


def rows(bases: Tensor, crops: Tensor, num_volumes: int) -> Tensor:
    """Published rows (all of one kind, volume by volume) in our order: a volume's bases, then its crops."""
    return torch.cat([part.unflatten(0, (num_volumes, -1)) for part in (bases, crops)], dim=1).flatten(0, 1)


def next_ones(num_volumes: int) -> tuple[Tensor, Tensor]:
    """The released partner: the next volume."""
    return torch.arange(1, num_volumes + 1) % num_volumes, torch.ones(num_volumes, dtype=torch.bool)


# Projectors


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_projector(network):
    x, layer1, expected = arrays("P_in", "P_student_layer1", f"P_{network}")
    head = fill_module(Projector(x.shape[1], layer1.shape[1], expected.shape[1]), f"{network}.")
    for module in (head.train(), head.eval()):  # always the statistics of the batch
        near(module(x), expected)
    if network == "student":
        near(head.layer1(x), layer1)


def test_projector_of_the_published_size():
    x, expected = arrays("P_full_in", "P_full_student")
    head = fill_module(Projector(x.shape[1], 8 * expected.shape[1], 8 * expected.shape[1]), "student.")
    near(head(x)[:, ::8], expected)


# Labels


@pytest.mark.parametrize("ending", ["", "_4x4"])
def test_labels_are_exact(ending):
    centres, labels, starts = (array.numpy() for array in arrays(*(f"Y_{name}{ending}" for name in NAMES_OF_LABELS)))
    num_x, num_y = (len(np.unique(starts[:, axis])) for axis in (0, 1))
    side = int(np.unique(starts[:, 0])[1])
    roi = (side, side, side)
    bases = base_starts((num_x, num_y), roi)
    assert np.array_equal(bases[:, ::-1], starts)  # x, y, z there
    crops = np.concatenate([np.zeros_like(centres[:, :1]), centres[:, ::-1] - side // 2], axis=1)
    assert np.array_equal(overlap_shares(crops, bases, roi), labels.astype(np.float32))
    found = golden(NAME)
    if f"Y_random_start{ending}" in found:
        assert np.array_equal(crops[:, ::-1], found[f"Y_random_start{ending}"])


NAMES_OF_LABELS = ("centre", "label", "base_start")


# Losses


@pytest.mark.parametrize(("crops", "bases", "expected"), [
    ("S_feats", "S_bases", "S_pred"), ("S_hand_feat", "S_hand_bases", "S_hand_pred"),
])  # fmt: skip
def test_predictions(crops, bases, expected):
    crops, bases, expected = arrays(crops, bases, expected)
    near(predicted_overlap(crops, bases), expected)


def test_match_and_miss():
    overlap, predicted, both, match, miss = arrays("C_y", "C_p", "C_loss", "C_cvpr_pos", "C_cvpr_neg")
    overlap, predicted = overlap[:, None], predicted[:, None]  # one crop a volume
    near(match_term(overlap, predicted) + miss_term(overlap, predicted), both)
    near(match_term(overlap, predicted), match)
    near(miss_term(overlap, predicted, squared=True), miss)


def test_terms_and_gradients_of_version_2():
    names = ("labels", "x_teacher", "bases_teacher", "x_student", "bases_student", "intra", "inter", "reg", "total")
    overlap, x_t, b_t, x_s, b_s, *expected = arrays(*(f"L_{name}" for name in names))
    method, num_volumes = method_of(), len(overlap)
    x_s, b_s = x_s.requires_grad_(), b_s.requires_grad_()
    pooled, teacher = rows(b_s, x_s, num_volumes), rows(b_t, x_t, num_volumes)
    total, terms = method.compare(pooled, teacher, overlap, *next_ones(num_volumes))
    for name, value in zip(("intra", "inter", "reg"), expected):
        near(terms[f"loss_{name}"], value.mean())
    near(total, expected[-1])
    total.backward()
    for gradient, name in ((x_s.grad, "L_g_x"), (b_s.grad, "L_g_bases")):
        near(gradient, *arrays(name), tolerance=1e-6)


@pytest.mark.parametrize("term", ["intra", "inter", "reg"])
def test_gradient_of_each_term_of_version_2(term):
    names = ("labels", "x_teacher", "bases_teacher", "x_student", "bases_student")
    overlap, *features = arrays(*(f"L_{name}" for name in names))
    x_t, b_t, x_s, b_s = (value.unflatten(0, (len(overlap), -1)) for value in features)
    x_s, b_s = x_s.requires_grad_(), b_s.requires_grad_()
    partners = next_ones(len(overlap))[0]
    if term == "reg":
        values = spread_term(b_s, both=False)
    else:
        target = overlap if term == "intra" else predicted_overlap(x_t, b_t[partners])
        predicted = predicted_overlap(x_s, b_t if term == "intra" else b_s[partners])
        values = match_term(target, predicted) + miss_term(target, predicted)
    near(values, *arrays(f"L_{term}"))
    values.mean().backward()
    for rows_of_kind, kind in ((x_s, "x"), (b_s, "bases")):
        gradient = torch.zeros_like(rows_of_kind) if rows_of_kind.grad is None else rows_of_kind.grad
        near(gradient.flatten(0, 1), *arrays(f"L_g_{term}_{kind}"), tolerance=1e-6)


def test_terms_and_gradients_of_version_1():
    names = ("labels", "x_teacher", "bases_teacher", "x_student", "bases_student", "pos", "neg", "reg", "total")
    overlap, x_t, b_t, x_s, b_s, *expected = arrays(*(f"V_{name}" for name in names))
    method, num_volumes = method_of("v1"), len(overlap)
    x_s, b_s = x_s.requires_grad_(), b_s.requires_grad_()
    pooled, teacher = rows(b_s, x_s, num_volumes), rows(b_t, x_t, num_volumes)
    total, terms = method.compare(pooled, teacher, overlap, *next_ones(num_volumes))
    for name, value in zip(("match", "miss", "reg"), expected):
        near(terms[f"loss_{name}"], value)
    near(total, expected[-1])
    total.backward()
    for gradient, name in ((x_s.grad, "V_g_x"), (b_s.grad, "V_g_bases")):
        near(gradient, *arrays(name), tolerance=1e-6)


# A whole step


def step() -> tuple[VoCo, Tensor, Tensor]:
    """A method with the small heads, after its teacher has moved; pooled features and labels."""
    x, bases, overlap, last, first = arrays(
        "E_pooled_x", "E_pooled_bases", "L_labels", "E_g_student.layer3.0.weight", "E_g_student.layer1.0.weight"
    )
    sizes = x.shape[1], len(first), len(last)
    method = method_of(heads=tuple(fill_module(Projector(*sizes), f"{part}.") for part in ("student", "teacher")))
    method.after_step({}, was_skipped=torch.tensor(False))
    return method, rows(bases, x, len(overlap)), overlap


def test_teacher_moves_before_its_forward():
    method = step()[0]
    names = [name for name in golden(NAME) if name.startswith("E_teacher_after.")]
    assert names
    for name in names:
        near(method.teacher.head.state_dict()[name.removeprefix("E_teacher_after.")], golden(NAME)[name])


def test_whole_step():
    method, pooled, overlap = step()
    total, _ = method.compare(pooled, pooled, overlap, *next_ones(len(overlap)))
    near(total, *arrays("E_total"))
    total.backward()
    for name, parameter in method.student.head.named_parameters():
        if f"E_g_student.{name}" in golden(NAME):
            near(parameter.grad, golden(NAME)[f"E_g_student.{name}"])


def test_published_row_dropout_is_another_loss(monkeypatch):
    """Its value needs rows that are dropped whole, which ours never does."""
    method, pooled, overlap = step()
    expected, keep = arrays("E_total_rows_dropped", "E_keep")
    num_crops = overlap.shape[0] * overlap.shape[1]
    kept = rows(keep[num_crops:], keep[:num_crops], len(overlap))[:, None] / keep.float().mean().round(decimals=1)
    monkeypatch.setattr(nn.functional, "dropout", lambda values, *args, **kwargs: values * kept)
    near(method.compare(pooled, pooled, overlap, *next_ones(len(overlap)))[0], expected)


def test_published_comparison_of_a_volume_with_itself():
    """What the released code computes for one volume; `VoCo.forward` refuses it."""
    method, pooled, overlap = step()
    alone = pooled[: len(pooled) // len(overlap)]
    near(method.compare(alone, alone, overlap[:1], *next_ones(1))[0], *arrays("E_total_one_volume"))


# Backbone and schedule


@pytest.fixture(scope="module")
def backbone() -> SwinUNETRV2Backbone:
    return SwinUNETRV2Backbone(48, (64, 64, 64), None, False, False, True)


def test_pooled_features_of_the_published_encoder(backbone):
    expected = arrays("B_pooled")[0]
    seed = int(golden(NAME).get("B_seed", 107))
    crops = np.random.Generator(np.random.PCG64(seed)).random((len(expected), 1, 64, 64, 64)).astype(np.float32)
    method = VoCo(VoCoOptions("paper", voco_dim=4), lambda *args, **kwargs: fill_module_of(backbone))
    with torch.no_grad():
        near(method.student(torch.from_numpy(crops)), expected, tolerance=3e-5)


def fill_module_of(backbone: SwinUNETRV2Backbone) -> SwinUNETRV2Backbone:
    fill_module(backbone.network, "backbone.")
    return backbone


def test_names_and_shapes_are_those_of_the_published_network(backbone):
    published = json.loads(golden_file("voco_state_dicts.json").read_text())
    head = Projector(sum(backbone.skip_channels.values()), 1024, 1024)
    ours = {f"backbone.{name}": value for name, value in backbone.network.state_dict().items()}
    for part in ("student", "teacher"):
        ours |= {f"{part}.{name}": value for name, value in head.state_dict().items()}
    assert {name: list(value.shape) for name, value in ours.items()} == published["large_scale_medical"]
    first_version = Projector(sum(backbone.skip_channels.values()), 2048, 2048).state_dict()
    ours = {f"student.proj_head.{name}": list(value.shape) for name, value in first_version.items()}
    assert ours == published["cvpr_student_head"]


@pytest.mark.parametrize(("name", "epochs"), [("W_lr_2m", 400), ("W_lr_250k", 50)])
def test_the_recipe_gives_the_published_learning_rate(name, epochs):
    steps, expected = arrays("W_step", name)
    """But for the warm-up, whose last step has the peak here and whose first step after it there."""
    words = ["--config", str(REPOSITORY / "configs/voco.yaml"), f"--epochs={epochs}"]
    flags = main_ddp.make_flags(chosen_method(words)).parse_args(words)
    num_steps = flags.epochs * flags.steps_per_epoch
    schedule = main_ddp.make_schedules(flags, method_of(), num_steps, flags.steps_per_epoch, 8)["lr"]
    near(torch.tensor([schedule(int(step)) for step in steps], dtype=torch.float64), expected, tolerance=1e-4 / 4999)

"""The loss of Alice and its parts: published numbers, the slow obvious way, centres, and the monitors of collapse."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.collapse import distribution_monitors, feature_spread
from losses.distillation import Distillation, DistillationOptions, swap_views
from losses.reconstruction import reconstruction_error
from models.methods.alice import Alice, StudentOutputs, TeacherOutputs
from tests.golden_fill import golden, known
from tests.small_alice import NOW, small_alice


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_outputs(num_pairs: int = 2, width: int = 8, seed: int = 0) -> tuple[StudentOutputs, TeacherOutputs, dict]:
    """Random outputs of both networks for crops of 8 voxels under masks of 2 x 2 x 2 blocks."""
    rows = 2 * num_pairs
    student = StudentOutputs(
        cls_logits=randn(rows, width, seed=seed).requires_grad_(),
        casa_query=None,
        casa_online=randn(rows, 3, width, seed=seed + 1).requires_grad_(),
        reconstruction=randn(rows, 1, 8, 8, 8, seed=seed + 2).requires_grad_(),
        casa_entropy=torch.tensor(0.5),
    )
    teacher = TeacherOutputs(
        cls_logits=randn(rows, width, seed=seed + 3),
        cls_features=randn(rows, 5, seed=seed + 4),
        casa_target=randn(rows, 3, width, seed=seed + 5),
        casa_shuffled=randn(rows, 3, width, seed=seed + 6),
    )
    mask = randn(num_pairs, 2, 2, 2, 2, seed=seed + 9) > -0.3
    return student, teacher, batch_of(randn(num_pairs, 2, 1, 8, 8, 8, seed=seed + 7), mask)


def batch_of(crops: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"crop": crops, "student": crops, "teacher": crops, "mask": mask}


class Answers(nn.Module):
    """Stands where a network stands, and gives the outputs that it was made with."""

    casa = None

    def __init__(self, outputs: StudentOutputs | TeacherOutputs) -> None:
        super().__init__()
        self.outputs = outputs
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, *inputs):
        return self.outputs


def answering(student: StudentOutputs, teacher: TeacherOutputs, method: Alice | None = None, **options) -> Alice:
    """Alice whose networks give these outputs; everything behind them is the method's own."""
    if method is None:
        method = small_alice(**({"out_dim": student.cls_logits.shape[-1]} | options))
    method.student, method.teacher = Answers(student), Answers(teacher)
    return method


def at(teacher_temp: float) -> dict[str, float]:
    return NOW | {"teacher_temp": teacher_temp}


def side_by_side(rows: Tensor) -> Tensor:
    """Rows [Q of all pairs, then K of all pairs] -> rows Q0 K0 Q1 K1 ..., as batches have them."""
    return rows.detach().unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()


@pytest.mark.parametrize("start", ["zero", "rand"])
@pytest.mark.parametrize("epoch", [0, 40])
def test_matches_the_published_loss(start: str, epoch: int) -> None:
    """Values, centres after the update and gradients; the published `recon` is already multiplied by lambda3."""
    published = golden("golden_loss.npz")
    student = StudentOutputs(
        cls_logits=side_by_side(published["student_cls"]).requires_grad_(),
        casa_query=None,
        casa_online=side_by_side(published["feat_student"]).requires_grad_(),
        reconstruction=side_by_side(published["student_rec"]).requires_grad_(),
        casa_entropy=torch.zeros(()),
    )
    teacher = TeacherOutputs(
        cls_logits=side_by_side(published["teacher_cls"]),
        cls_features=side_by_side(published["teacher_cls"]),
        casa_target=side_by_side(published["feat_teacher"]),
        casa_shuffled=side_by_side(published["feat_teacher"]),
    )
    method = answering(student, teacher, recon_on="all", lambda1=1.0, lambda2=1.0, lambda3=10.0)
    centres = method.loss.centres
    if start == "rand":
        centres.cls.copy_(published["center_in"].flatten())
        centres.tokens.copy_(published["center2_in"].flatten())
    temperature = published["teacher_temp_first31"][min(epoch, 30)].item()
    crops = torch.stack([published["img0"], published["img1"]], dim=1)
    total, terms = method(batch_of(crops, torch.zeros(len(crops), 2, 1, 1, 1, dtype=torch.bool)), at(temperature))
    method.after_step(at(temperature), was_skipped=torch.tensor(False))
    key = f"{start}_ep{epoch}_"
    for name, value in (
        ("cls", published[key + "cls"]),
        ("tokens", published[key + "patch"]),
        ("recon", published[key + "recon"] / 10),
    ):
        torch.testing.assert_close(terms[f"loss_{name}"], value, rtol=1e-5, atol=0, msg=name)
    torch.testing.assert_close(total, published[key + "loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(centres.cls, published[key + "center_out"].flatten(), rtol=0, atol=1e-7)
    torch.testing.assert_close(centres.tokens, published[key + "center2_out"].flatten(), rtol=0, atol=1e-7)
    if key == "zero_ep0_":
        total.backward()
        for tensor, name in (
            (student.cls_logits, "g_student_cls"),
            (student.reconstruction, "g_student_rec"),
            (student.casa_online, "g_feat_student"),
        ):
            expected = side_by_side(published[name])
            torch.testing.assert_close(*known(tensor.grad, expected), rtol=1e-4, atol=1e-9, msg=name)


def cross_entropy_slowly(target: Tensor, online: Tensor, centre: Tensor, teacher_temp: float) -> float:
    """H(t, s) of one pair of logit vectors, term by term."""
    t = [math.exp((x - c) / teacher_temp) for x, c in zip(target.tolist(), centre.tolist())]
    s = [math.exp(x / 0.1) for x in online.tolist()]
    return -sum(a / sum(t) * math.log(b / sum(s)) for a, b in zip(t, s))


def test_terms_equal_the_slow_obvious_way() -> None:
    """cls is crossed between the patients, tokens are not, and the error counts masked voxels only."""
    student, teacher, batch = make_outputs()
    method = answering(student, teacher)
    centre = randn(8, seed=50)
    method.loss.centres.cls.copy_(centre)
    method.loss.centres.tokens.copy_(0.5 * centre)
    total, terms = method(batch, at(0.2))
    crossed = [(0, 1), (1, 0), (2, 3), (3, 2)]  # rows: Q and K of pair 0, Q and K of pair 1
    cls = [cross_entropy_slowly(teacher.cls_logits[t], student.cls_logits[s], centre, 0.2) for t, s in crossed]
    tokens = [
        cross_entropy_slowly(teacher.casa_target[row, i], student.casa_online[row, i], 0.5 * centre, 0.2)
        for row in range(4)
        for i in range(3)
    ]
    errors = []
    for row, drawn in enumerate(student.reconstruction):
        crop, mask = batch["crop"][row // 2, row % 2], batch["mask"][row // 2, row % 2]
        hidden = F.interpolate(mask[None, None].float(), scale_factor=4, mode="nearest")[0].bool()
        errors.append(((crop - drawn)[hidden] ** 2).mean())
    recon = torch.stack(errors).mean().item()
    for name, value in (("loss_cls", np.mean(cls)), ("loss_tokens", np.mean(tokens)), ("loss_recon", recon)):
        assert terms[name].item() == pytest.approx(value, rel=1e-5), name
    assert total.item() == pytest.approx(np.mean(cls) + np.mean(tokens) + 10 * recon, rel=1e-5)


def test_views_are_swapped_within_their_pair() -> None:
    assert swap_views(torch.arange(6)[:, None]).flatten().tolist() == [1, 0, 3, 2, 5, 4]


def test_visible_voxels_are_not_in_the_loss() -> None:
    student, teacher, batch = make_outputs()
    total, terms = answering(student, teacher, lambda1=0.0, lambda2=0.0)(batch, at(0.1))
    total.backward()
    hidden = F.interpolate(batch["mask"].flatten(0, 1)[:, None].float(), scale_factor=4, mode="nearest").bool()
    assert torch.equal(student.reconstruction.grad != 0, hidden) and list(terms) == ["loss_recon"]


def test_nothing_masked_gives_no_error_and_no_nan() -> None:
    student, teacher, batch = make_outputs()
    batch["mask"].zero_()
    total, terms = answering(student, teacher, lambda1=0.0, lambda2=0.0)(batch, at(0.1))
    assert terms["loss_recon"] == 0 and total == 0


def test_without_a_mask_every_voxel_counts() -> None:
    drawn, crop = randn(2, 1, 4, 4, 4), randn(2, 1, 4, 4, 4, seed=1)
    torch.testing.assert_close(reconstruction_error(drawn.half(), crop), ((drawn.half().float() - crop) ** 2).mean())


def test_the_update_follows_the_loss_and_spares_validation() -> None:
    student, teacher, batch = make_outputs()
    method = answering(student, teacher)
    first, _ = method(batch, at(0.1))
    assert not method.loss.centres.cls.any()
    method.after_step(at(0.1), was_skipped=torch.tensor(False))
    torch.testing.assert_close(method.loss.centres.cls, 0.1 * teacher.cls_logits.mean(0))
    torch.testing.assert_close(method.loss.centres.tokens, 0.1 * teacher.casa_target.mean((0, 1)))
    fresh = answering(student, teacher).eval()
    again, _ = fresh(batch, at(0.1))
    assert first == again  # the first call was centred with zeros
    fresh.loss.update(torch.tensor(False))
    assert not fresh.loss.centres.cls.any()


def test_accumulated_parts_move_the_centres_like_one_batch() -> None:
    whole, parts = (Distillation({"cls": 8, "tokens": 8}) for _ in range(2))
    logits = {"cls": randn(8, 8), "tokens": randn(8, 3, 8, seed=1)}
    for name, rows in logits.items():
        whole.targets(name, rows, 0.1)
        for part in rows.split([2, 6]):
            parts.targets(name, part, 0.1)
    for loss in (whole, parts):
        loss.update(torch.tensor(False))
    for name, centre in whole.centres.named_buffers():
        assert centre.any()
        torch.testing.assert_close(getattr(parts.centres, name), centre)


def watch_cls(logits: Tensor, features: Tensor, keep_centre: bool = False) -> dict[str, float]:
    """The monitors after 60 steps on the same teacher outputs; `keep_centre` holds the centre at zero."""
    student, teacher, batch = make_outputs(num_pairs=64, width=16)
    method = answering(student, teacher._replace(cls_logits=logits, cls_features=features))
    for _ in range(60):
        if keep_centre:
            method.loss.centres.cls.zero_()
        _, terms = method(batch, at(0.04))
        method.after_step(at(0.04), was_skipped=torch.tensor(False))
    return {name: value.item() for name, value in terms.items()}


def test_monitors_tell_collapse_from_health() -> None:
    healthy = watch_cls(randn(128, 16), randn(128, 24))
    assert healthy["teacher_kl_share"] < 0.3 / math.log(16) and healthy["teacher_entropy_share"] < 1 / math.log(16)
    assert healthy["feature_std"] == pytest.approx(1.0, abs=0.05)
    uniform = watch_cls(torch.zeros(128, 16), randn(1, 24).expand(128, 24))
    assert uniform["teacher_entropy_share"] == pytest.approx(1) and uniform["feature_std"] < 1e-3
    one_output = watch_cls(torch.eye(16)[0].expand(128, 16), randn(128, 24), keep_centre=True)
    assert one_output["teacher_kl_share"] == pytest.approx(1, abs=0.02)


def test_shares_by_hand_whatever_the_width() -> None:
    """Two of four outputs, alike: entropy log 2 of log 4. One output of 512: no entropy, all of the divergence."""
    half = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]])
    found = distribution_monitors(half, half.mean(0))
    assert found["teacher_entropy_share"].item() == pytest.approx(0.5)
    assert found["teacher_kl_share"].item() == pytest.approx(0.5)
    one = torch.eye(512)[:1]
    found = distribution_monitors(one, one[0])
    assert found["teacher_entropy_share"].item() == 0 and found["teacher_kl_share"].item() == 1
    spread = feature_spread(torch.eye(2).repeat(3, 1), correction=1)
    assert spread.item() == pytest.approx((6 * 0.25 / 5) ** 0.5 * 2**0.5)


def test_casa_monitors_compare_right_and_shuffled_sources() -> None:
    student, teacher, batch = make_outputs()
    teacher = teacher._replace(casa_target=student.casa_online.detach() * 3 + torch.arange(8.0))
    _, terms = answering(student, teacher)(batch, at(0.1))
    assert terms["casa_cos_right"].item() == pytest.approx(1.0, abs=1e-5)
    ours, theirs = (x - x.mean(dim=(0, 1)) for x in (student.casa_online, teacher.casa_shuffled))
    expected = F.cosine_similarity(ours, theirs, dim=-1).mean()
    assert terms["casa_cos_shuffled"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_terms_are_detached_and_half_precision_inputs_give_float32() -> None:
    student, teacher, batch = make_outputs()
    student, teacher = (
        type(outputs)(*(None if x is None else x.detach().bfloat16().requires_grad_() for x in outputs))
        for outputs in (student, teacher)
    )
    total, terms = answering(student, teacher)(batch, at(0.04))
    assert total.dtype == torch.float32 and not any(term.requires_grad for term in terms.values())
    assert all(terms[f"loss_{name}"].dtype == torch.float32 for name in ("cls", "tokens", "recon"))


def test_centres_are_saved_and_restored() -> None:
    student, teacher, batch = make_outputs()
    method, restored = answering(student, teacher), answering(student, teacher)
    method(batch, at(0.1))
    method.after_step(at(0.1), was_skipped=torch.tensor(False))
    restored.load_state_dict(method.state_dict())
    assert torch.equal(restored.loss.centres.tokens, method.loss.centres.tokens)
    assert restored.loss.centres.tokens.any()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"centring": "running"}, "--centring 'running'"),
        ({"student_temp": 0.0}, "--student_temp"),
        ({"teacher_temp": -0.1}, "--teacher_temp"),
        ({"warmup_teacher_temp_epochs": -1}, "--warmup_teacher_temp_epochs"),
        ({"centre_momentum": 1}, "--centre_momentum"),
    ],
)
def test_impossible_options_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        DistillationOptions(**options)


def test_a_teacher_temperature_of_zero_names_the_flag() -> None:
    with pytest.raises(ValueError, match="--teacher_temp"):
        Distillation({"cls": 8}).targets("cls", randn(2, 8), 0.0)

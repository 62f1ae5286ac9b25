"""Alice's loss: published numbers, the slow obvious way, centres, and the monitors of collapse."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.distillation import AliceLoss
from tests.shared import shared_file

PUBLISHED = {"lambda1": 1.0, "lambda2": 1.0, "lambda3": 10.0, "out_dim": 512, "recon_on": "all"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_outputs(num_pairs: int = 2, width: int = 8, seed: int = 0):
    """Random outputs of both networks for crops of 8 voxels under masks of 2 x 2 x 2 blocks."""
    rows = 2 * num_pairs
    student = SimpleNamespace(
        cls_logits=randn(rows, width, seed=seed).requires_grad_(),
        casa_online=randn(rows, 3, width, seed=seed + 1).requires_grad_(),
        reconstruction=randn(rows, 1, 8, 8, 8, seed=seed + 2).requires_grad_(),
    )
    teacher = SimpleNamespace(
        cls_logits=randn(rows, width, seed=seed + 3),
        cls_features=randn(rows, 5, seed=seed + 4),
        casa_target=randn(rows, 3, width, seed=seed + 5),
        casa_shuffled=randn(rows, 3, width, seed=seed + 6),
    )
    batch = {name: randn(num_pairs, 1, 8, 8, 8, seed=seed + 7 + i) for i, name in enumerate(("query", "key"))}
    for i, name in enumerate(("query_mask", "key_mask")):
        batch[name] = randn(num_pairs, 2, 2, 2, seed=seed + 9 + i) > -0.3
    return student, teacher, batch


@pytest.mark.parametrize("start", ["zero", "rand"])
@pytest.mark.parametrize("epoch", [0, 40])
def test_matches_the_published_loss(start: str, epoch: int) -> None:
    """Values, centres after the update and gradients; the published `recon` is already multiplied by lambda3."""
    golden = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(shared_file("golden", "golden_loss.npz")).items()}
    loss = AliceLoss(**PUBLISHED)
    if start == "rand":
        loss.centres.cls.copy_(golden["center_in"].flatten())
        loss.centres.tokens.copy_(golden["center2_in"].flatten())
    student = SimpleNamespace(
        cls_logits=golden["student_cls"].requires_grad_(),
        casa_online=golden["feat_student"].requires_grad_(),
        reconstruction=golden["student_rec"].requires_grad_(),
    )
    teacher = SimpleNamespace(
        cls_logits=golden["teacher_cls"],
        cls_features=golden["teacher_cls"],
        casa_target=golden["feat_teacher"],
        casa_shuffled=golden["feat_teacher"],
    )
    temperature = golden["teacher_temp_first31"][min(epoch, 30)].item()
    total, terms = loss(student, teacher, {"query": golden["img0"], "key": golden["img1"]}, temperature)
    key = f"{start}_ep{epoch}_"
    for name, value in (
        ("cls", golden[key + "cls"]),
        ("tokens", golden[key + "patch"]),
        ("recon", golden[key + "recon"] / 10),
    ):
        torch.testing.assert_close(terms[f"loss_{name}"], value, rtol=1e-5, atol=0, msg=name)
    torch.testing.assert_close(total, golden[key + "loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.centres.cls, golden[key + "center_out"].flatten(), rtol=0, atol=1e-7)
    torch.testing.assert_close(loss.centres.tokens, golden[key + "center2_out"].flatten(), rtol=0, atol=1e-7)
    if key == "zero_ep0_":
        total.backward()
        for name, tensor in (("cls", student.cls_logits), ("rec", student.reconstruction)):
            torch.testing.assert_close(tensor.grad, golden[f"g_student_{name}"], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(student.casa_online.grad, golden["g_feat_student"], rtol=1e-4, atol=1e-9)


def cross_entropy_slowly(target: Tensor, online: Tensor, centre: Tensor, teacher_temp: float) -> float:
    """H(t, s) of one pair of logit vectors, term by term."""
    t = [math.exp((x - c) / teacher_temp) for x, c in zip(target.tolist(), centre.tolist())]
    s = [math.exp(x / 0.1) for x in online.tolist()]
    return -sum(a / sum(t) * math.log(b / sum(s)) for a, b in zip(t, s))


def test_terms_equal_the_slow_obvious_way() -> None:
    """cls is crossed between the patients, tokens are not, and the error counts masked voxels only."""
    student, teacher, batch = make_outputs()
    loss = AliceLoss(out_dim=8)
    centre = randn(8, seed=50)
    loss.centres.cls.copy_(centre)
    loss.centres.tokens.copy_(0.5 * centre)
    total, terms = loss(student, teacher, batch, 0.2)
    crossed = [(0, 2), (1, 3), (2, 0), (3, 1)]  # rows: Q of pairs 0 and 1, K of pairs 0 and 1
    cls = [cross_entropy_slowly(teacher.cls_logits[t], student.cls_logits[s], centre, 0.2) for t, s in crossed]
    tokens = [
        cross_entropy_slowly(teacher.casa_target[row, i], student.casa_online[row, i], 0.5 * centre, 0.2)
        for row in range(4)
        for i in range(3)
    ]
    crops = torch.cat([batch["query"], batch["key"]])
    masks = torch.cat([batch["query_mask"], batch["key_mask"]])
    errors = []
    for crop, mask, drawn in zip(crops, masks, student.reconstruction):
        hidden = F.interpolate(mask[None, None].float(), scale_factor=4, mode="nearest")[0].bool()
        errors.append(((crop - drawn)[hidden] ** 2).mean())
    recon = torch.stack(errors).mean().item()
    for name, value in (("loss_cls", np.mean(cls)), ("loss_tokens", np.mean(tokens)), ("loss_recon", recon)):
        assert terms[name].item() == pytest.approx(value, rel=1e-5), name
    assert total.item() == pytest.approx(np.mean(cls) + np.mean(tokens) + 10 * recon, rel=1e-5)


def test_visible_voxels_are_not_in_the_loss() -> None:
    student, teacher, batch = make_outputs()
    total, _ = AliceLoss(0, 0, 1, out_dim=8)(student, teacher, batch, 0.1)
    total.backward()
    masks = torch.cat([batch["query_mask"], batch["key_mask"]])[:, None].float()
    hidden = F.interpolate(masks, scale_factor=4, mode="nearest").bool()
    assert torch.equal(student.reconstruction.grad != 0, hidden)


def test_nothing_masked_gives_no_error_and_no_nan() -> None:
    student, teacher, batch = make_outputs()
    batch["query_mask"].zero_()
    batch["key_mask"].zero_()
    total, terms = AliceLoss(0, 0, 1, out_dim=8)(student, teacher, batch, 0.1)
    assert terms["loss_recon"] == 0 and total == 0


def test_the_update_follows_the_loss_and_spares_validation() -> None:
    student, teacher, batch = make_outputs()
    loss = AliceLoss(out_dim=8)
    first, _ = loss(student, teacher, batch, 0.1)
    expected = 0.1 * teacher.cls_logits.mean(0)
    torch.testing.assert_close(loss.centres.cls, expected)
    torch.testing.assert_close(loss.centres.tokens, 0.1 * teacher.casa_target.mean((0, 1)))
    fresh = AliceLoss(out_dim=8).eval()
    again, _ = fresh(student, teacher, batch, 0.1)
    assert first == again  # the first call was centred with zeros
    assert not fresh.centres.cls.any()


def test_accumulated_parts_move_the_centres_like_one_batch() -> None:
    whole, parts = AliceLoss(out_dim=8), AliceLoss(out_dim=8)
    outputs = [make_outputs(seed=seed) for seed in (0, 20)]
    joined = SimpleNamespace(**{k: torch.cat([vars(t)[k] for _, t, _ in outputs]) for k in vars(outputs[0][1])})
    online = SimpleNamespace(**{k: torch.cat([vars(s)[k] for s, _, _ in outputs]) for k in vars(outputs[0][0])})
    batch = {k: torch.cat([b[k] for _, _, b in outputs]) for k in outputs[0][2]}
    whole(online, joined, batch, 0.1)
    for last, (student, teacher, part) in enumerate(outputs):
        parts(student, teacher, part, 0.1, update_centres=bool(last))
    for name in ("cls", "tokens"):
        torch.testing.assert_close(getattr(parts.centres, name), getattr(whole.centres, name))


def watch_cls(logits: Tensor, features: Tensor, keep_centre: bool = False) -> dict[str, float]:
    """The monitors after 60 steps on the same teacher outputs; `keep_centre` holds the centre at zero."""
    student, teacher, batch = make_outputs(num_pairs=64, width=16)
    teacher.cls_logits, teacher.cls_features = logits, features
    loss = AliceLoss(out_dim=16)
    for _ in range(60):
        if keep_centre:
            loss.centres.cls.zero_()
        _, terms = loss(student, teacher, batch, 0.04)
    return {name: value.item() for name, value in terms.items()}


def test_monitors_tell_collapse_from_health() -> None:
    healthy = watch_cls(randn(128, 16), randn(128, 24))
    assert healthy["teacher_kl_uniform"] < 0.3 and healthy["teacher_entropy"] < 1.0
    assert healthy["feature_std"] == pytest.approx(1.0, abs=0.05)
    uniform = watch_cls(torch.zeros(128, 16), randn(1, 24).expand(128, 24))
    assert uniform["teacher_entropy"] == pytest.approx(math.log(16)) and uniform["feature_std"] < 1e-3
    one_output = watch_cls(torch.eye(16)[0].expand(128, 16), randn(128, 24), keep_centre=True)
    assert one_output["teacher_kl_uniform"] == pytest.approx(math.log(16), abs=0.05)


def test_casa_monitors_compare_right_and_shuffled_sources() -> None:
    student, teacher, batch = make_outputs()
    teacher.casa_target = student.casa_online.detach() * 3 + torch.arange(8.0)
    _, terms = AliceLoss(out_dim=8)(student, teacher, batch, 0.1)
    assert terms["casa_cos_right"].item() == pytest.approx(1.0, abs=1e-5)
    ours, theirs = (x - x.mean(dim=(0, 1)) for x in (student.casa_online, teacher.casa_shuffled))
    expected = F.cosine_similarity(ours, theirs, dim=-1).mean()
    assert terms["casa_cos_shuffled"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_terms_are_detached_and_half_precision_inputs_give_float32() -> None:
    student, teacher, batch = make_outputs()
    for outputs in (student, teacher):
        for name, tensor in vars(outputs).items():
            setattr(outputs, name, tensor.detach().bfloat16().requires_grad_())
    total, terms = AliceLoss(out_dim=8)(student, teacher, batch, 0.04)
    assert total.dtype == torch.float32 and not any(term.requires_grad for term in terms.values())


def test_centres_are_saved_and_restored() -> None:
    student, teacher, batch = make_outputs()
    loss, restored = AliceLoss(out_dim=8), AliceLoss(out_dim=8)
    loss(student, teacher, batch, 0.1)
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored.centres.tokens, loss.centres.tokens) and restored.centres.tokens.any()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"recon_on": "some"}, "--recon_on"),
        ({"student_temp": 0.0}, "--student_temp"),
        ({"centre_momentum": 1}, "--centre_"),
    ],
)
def test_impossible_options_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        AliceLoss(**options)


def test_a_teacher_temperature_of_zero_names_the_flag() -> None:
    with pytest.raises(ValueError, match="--teacher_temp"):
        AliceLoss(out_dim=8)(*make_outputs(), 0.0)

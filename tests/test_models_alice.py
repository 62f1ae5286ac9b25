"""The student and teacher as a pair: gradients, moving average, and what reaches what."""

import pytest
import torch

from losses.distillation import AliceLoss
from models.backbones.interface import flatten_tokens
from models.methods.alice import build_alice
from tests.small_alice import OUT_DIM, ROI, SMALL, run_alice, small_alice, small_batch


@pytest.mark.parametrize("casa_variant", ["figure", "published"])
def test_shapes_of_all_outputs(casa_variant: str) -> None:
    student, teacher = small_alice(casa_variant=casa_variant)
    online, target = run_alice(student, teacher, small_batch(1))
    num_queries = 4 * 2 * 2
    assert online.cls_logits.shape == target.cls_logits.shape == (2, OUT_DIM)
    for tokens in (online.casa_online, target.casa_target, target.casa_shuffled):
        assert tokens.shape == (2, num_queries, OUT_DIM)
    assert online.reconstruction.shape == (2, 1, *ROI)
    assert not any(tensor.requires_grad for tensor in target)


def test_gradients_of_the_whole_are_real_and_spare_the_teacher() -> None:
    student, teacher = small_alice(backbone="swin_unetr")
    batch = small_batch(1)
    total, _ = AliceLoss(out_dim=OUT_DIM)(*run_alice(student, teacher, batch), batch, 0.04)
    total.backward()
    assert not [name for name, p in student.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("backbone", ["tiny", "swin_unetr"])
def test_teacher_starts_as_an_exact_copy_and_has_only_the_students_names(backbone: str) -> None:
    student, teacher = small_alice(backbone=backbone)
    ours = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, ours[name]) and tensor.data_ptr() != ours[name].data_ptr(), name
    prefixes = tuple(f"backbone.network.{prefix}" for prefix in student.backbone.encoder_key_prefixes)
    assert {name for name in ours if name.startswith(prefixes)} <= set(teacher.state_dict())


def perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_update_is_the_moving_average_of_every_weight() -> None:
    student, teacher = small_alice()
    perturb(student)
    before = {name: tensor.clone() for name, tensor in teacher.named_parameters()}
    teacher.update(student, 0.9)
    for name, tensor in teacher.named_parameters():
        torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * student.get_parameter(name), msg=name)


def test_published_casa_is_shared_by_both_branches() -> None:
    student, teacher = small_alice(casa_variant="published")
    perturb(student)
    teacher.update(student, 0.9)
    assert all(torch.equal(p, student.casa.get_parameter(name)) for name, p in teacher.casa.named_parameters())
    name = "head.mlp.0.weight"
    assert not torch.equal(teacher.get_parameter(name), student.get_parameter(name))


def test_teacher_stays_in_evaluation_mode() -> None:
    _, teacher = small_alice(lambda2=0, lambda3=0)
    assert not teacher.train().training and not any(part.training for part in teacher.modules())


def test_target_carries_no_gradient_to_the_query() -> None:
    """q is detached for the target: the student learns from S alone."""
    student, teacher = small_alice()
    online, target = run_alice(student, teacher, small_batch(1))
    assert online.casa_query.requires_grad and not target.casa_target.requires_grad


def test_rows_of_the_joint_forward_equal_separate_forwards() -> None:
    """Nothing mixes across the batch, so Q's rows do not depend on K."""
    student, _ = small_alice()
    batch, other = small_batch(1), small_batch(1, seed=1)
    with torch.no_grad():
        first = student(batch["query"], batch["query_mask"], batch["key"], batch["key_mask"])
        second = student(batch["query"], batch["query_mask"], other["key"], other["key_mask"])
    for name in ("cls_logits", "casa_online", "reconstruction"):
        ours, theirs = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


def test_encoder_and_decoder_tokens_share_one_order() -> None:
    """Token i of CASA's source lies at the same place whether it comes from an encoder or a decoder map."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (2, 3, 4)), indexing="ij"))[None]  # [1, 3, 2, 3, 4]
    assert flatten_tokens(places)[0, 1 * 12 + 2 * 4 + 3].tolist() == [1, 2, 3]


def test_the_seed_decides_the_weights() -> None:
    first, second, third = (small_alice(seed, backbone="swin_unetr")[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(first["backbone.mask_token"], third["backbone.mask_token"])


def test_last_layers_are_found_for_freezing() -> None:
    student, _ = small_alice(norm_last_layer=False)
    assert len(student.last_layer_parameters()) == 4
    assert len(small_alice(lambda2=0)[0].last_layer_parameters()) == 1
    assert small_alice(lambda1=0, lambda2=0)[0].last_layer_parameters() == []


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"backbone": "resnet"}, "--backbone"),
        ({"casa_variant": "none"}, "--casa_variant"),
        ({"lambda1": -1.0}, "--lambda1"),
        ({"lambda1": 0, "lambda2": 0, "lambda3": 0}, "--lambda1"),
        ({"query_stride": 12}, "--query_stride"),
        ({"key_stride": 32}, "--key_stride"),
        ({"out_dim": 0}, "--out_dim"),
    ],
)
def test_impossible_options_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        build_alice(**(SMALL | options))

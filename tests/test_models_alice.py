"""Alice as a method: gradients, moving average, what reaches what, and what a step leaves behind."""

import pytest
import torch

import main_ddp
from models.backbones.interface import flatten_tokens
from models.methods.alice import AliceOptions
from models.methods.method import average_towards, rows_of
from tests.small_alice import NOW, OUT_DIM, ROI, run_alice, small_alice, small_batch


@pytest.mark.parametrize("casa_variant", ["figure", "published"])
def test_shapes_of_all_outputs(casa_variant: str) -> None:
    online, target = run_alice(small_alice(casa_variant=casa_variant), small_batch(1))
    num_queries = 4 * 2 * 2
    assert online.cls_logits.shape == target.cls_logits.shape == (2, OUT_DIM)
    for tokens in (online.casa_online, target.casa_target, target.casa_shuffled):
        assert tokens.shape == (2, num_queries, OUT_DIM)
    assert online.reconstruction.shape == (2, 1, *ROI)
    assert not any(tensor.requires_grad for tensor in target if tensor is not None)


def test_gradients_of_the_whole_are_real_and_spare_the_teacher() -> None:
    method = small_alice(backbone="swin_unetr")
    total, _ = method(small_batch(1), NOW)
    total.backward()
    trained = [(name, p) for name, p in method.student.named_parameters() if p.requires_grad]
    assert not [name for name, p in trained if not p.grad.abs().sum() > 0]
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize("backbone", ["tiny", "swin_unetr"])
def test_teacher_starts_as_an_exact_copy_and_has_only_the_students_names(backbone: str) -> None:
    method = small_alice(backbone=backbone)
    ours = method.student.state_dict()
    for name, tensor in method.teacher.state_dict().items():
        assert torch.equal(tensor, ours[name]) and tensor.data_ptr() != ours[name].data_ptr(), name
    prefixes = tuple(f"backbone.network.{prefix}" for prefix in method.student.backbone.encoder_key_prefixes)
    assert {name for name in ours if name.startswith(prefixes)} <= set(method.teacher.state_dict())


def perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_a_step_moves_every_weight_of_the_teacher_by_the_average() -> None:
    method = small_alice()
    perturb(method.student)
    before = {name: tensor.clone() for name, tensor in method.teacher.named_parameters()}
    method.after_step(NOW, was_skipped=torch.tensor(False))
    for name, tensor in method.teacher.named_parameters():
        expected = 0.9 * before[name] + 0.1 * method.student.get_parameter(name)
        torch.testing.assert_close(tensor, expected, msg=name)


def test_published_casa_is_shared_by_both_branches() -> None:
    method = small_alice(casa_variant="published")
    student, teacher = method.student, method.teacher
    perturb(student)
    method.after_step(NOW, was_skipped=torch.tensor(False))
    assert all(torch.equal(p, student.casa.get_parameter(name)) for name, p in teacher.casa.named_parameters())
    name = "head.mlp.0.weight"
    assert not torch.equal(teacher.get_parameter(name), student.get_parameter(name))


def test_a_skipped_step_leaves_teacher_and_centres_alone_and_the_next_one_starts_afresh() -> None:
    method, fresh = small_alice(), small_alice()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(small_batch(2, seed=1), NOW)
    method.after_step(NOW, was_skipped=torch.tensor(True))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    for one in (method, fresh):
        one(small_batch(2, seed=2), NOW)
        one.after_step(NOW, was_skipped=torch.tensor(False))
    assert fresh.loss.centres.cls.any()
    for name, value in fresh.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name


def test_teacher_stays_in_evaluation_mode() -> None:
    method = small_alice(lambda2=0, lambda3=0).train()
    assert method.training and method.student.training
    assert not any(part.training for part in method.teacher.modules())


def test_averages_copy_integers_and_named_prefixes_and_take_buffers_along() -> None:
    student, teacher = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)) for _ in range(2))
    student[1].running_mean.fill_(4.0)
    student[1].num_batches_tracked.fill_(7)
    average_towards(teacher, student, 0.75, copied=("0.",))
    assert torch.equal(teacher[0].weight, student[0].weight)
    assert teacher[1].running_mean.tolist() == [1.0, 1.0] and teacher[1].num_batches_tracked == 7


def test_target_carries_no_gradient_to_the_query() -> None:
    """q is detached for the target: the student learns from S alone."""
    online, target = run_alice(small_alice(), small_batch(1))
    assert online.casa_query.requires_grad and not target.casa_target.requires_grad


def test_rows_of_the_joint_forward_equal_separate_forwards() -> None:
    """Nothing mixes across the batch, so Q's rows do not depend on K."""
    method = small_alice()
    batch, other = small_batch(1), small_batch(1, seed=1)
    masks = rows_of(batch["mask"])
    with torch.no_grad():
        first = method.student(rows_of(batch["crop"]), masks)
        second = method.student(torch.cat([batch["crop"][0, :1], other["crop"][0, 1:]]), masks)
    for name in ("cls_logits", "casa_online", "reconstruction"):
        ours, theirs = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


def test_shuffled_casa_asks_a_view_of_another_sample() -> None:
    """The partner in the same sample shows the same anatomy, so that asking it would hide that CASA ignores views."""
    method, views = small_alice(), rows_of(small_batch(3)["teacher"])
    query = run_alice(method, small_batch(3))[0].casa_query
    shuffled = method.teacher(views, query).casa_shuffled
    sample_of_row = [0, 0, 1, 1, 2, 2]
    for row in range(6):
        asked = [
            other
            for other in range(6)
            if torch.allclose(method.teacher(views[[other]], query[[row]]).casa_target[0], shuffled[row], atol=1e-5)
        ]
        assert len(asked) == 1 and sample_of_row[asked[0]] != sample_of_row[row], (row, asked)


def test_encoder_and_decoder_tokens_share_one_order() -> None:
    """Token i of CASA's source lies at the same place whether it comes from an encoder or a decoder map."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (2, 3, 4)), indexing="ij"))[None]  # [1, 3, 2, 3, 4]
    assert flatten_tokens(places)[0, 1 * 12 + 2 * 4 + 3].tolist() == [1, 2, 3]


def test_the_seed_decides_the_weights() -> None:
    first, second, third = (small_alice(seed, backbone="swin_unetr").student.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(first["backbone.mask_token"], third["backbone.mask_token"])


@pytest.mark.parametrize(
    ("options", "num_frozen"),
    [({"norm_last_layer": False}, 4), ({"lambda2": 0}, 1), ({"lambda1": 0, "lambda2": 0}, 0)],
)
def test_last_layers_stand_still_while_frozen(options: dict, num_frozen: int) -> None:
    method = small_alice(**options)
    method(small_batch(1), NOW)[0].backward()
    trained = {name for name, p in method.named_parameters() if p.grad is not None}
    method.before_step(NOW)
    assert {name for name, p in method.named_parameters() if p.grad is not None} == trained
    method.before_step(NOW | {"last_layer_frozen": 1.0})
    frozen = trained - {name for name, p in method.named_parameters() if p.grad is not None}
    assert len(frozen) == num_frozen and all("last_layer" in name for name in frozen)


def test_schedules_of_the_method() -> None:
    options = {"warmup_teacher_temp": 0.02, "teacher_temp": 0.08, "warmup_teacher_temp_epochs": 3}
    schedules = small_alice(**options, momentum_teacher=0.9, freeze_last_layer=1.5).schedules(100, 10)
    assert [schedules["teacher_temp"](step) for step in (0, 15, 30, 99)] == pytest.approx([0.02, 0.05, 0.08, 0.08])
    assert [schedules["last_layer_frozen"](step) for step in (0, 14, 15, 99)] == [1, 1, 0, 0]
    assert schedules["momentum_teacher"](0) == 0.9
    assert schedules["momentum_teacher"](50) == pytest.approx(0.95) and schedules["momentum_teacher"](100) == 1


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"lambda1": -1.0}, "--lambda1"),
        ({"lambda1": 0, "lambda2": 0, "lambda3": 0}, "--lambda1"),
        ({"query_stride": 12}, "--query_stride"),
        ({"key_stride": 32}, "--key_stride"),
        ({"out_dim": 0}, "--out_dim"),
        ({"casa_heads": 0}, "--casa_heads"),
        ({"momentum_teacher": 1.1}, "--momentum_teacher"),
        ({"mask_ratio": 0.0}, "--mask_ratio"),
        ({"freeze_last_layer": -1.0}, "--freeze_last_layer"),
        ({"casa_cosine_scale": -1.0}, "--casa_cosine_scale"),
    ],
)
def test_impossible_options_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        small_alice(**options)


@pytest.mark.parametrize("flag", ["backbone", "casa_variant", "cls_features", "recon_on", "centring"])
def test_words_that_are_no_choice_are_refused_by_the_parser(flag: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main_ddp.make_flags().parse_args([f"--{flag}=none_such"])
    assert f"--{flag}" in capsys.readouterr().err


def test_nothing_masked_is_fine_where_all_voxels_count() -> None:
    assert AliceOptions(mask_ratio=0.0, recon_on="all").lambda3 == 10.0

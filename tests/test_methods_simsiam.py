"""SimSiam against the published numbers (../shared/golden, section SimSiam and DINO), and what must not go wrong.

Of that section, `zoom` and `png_*` have no counterpart here: our crops are not zoomed and not stored as pictures. The
published optimiser lets attention's bias tables decay, ours does not.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from datasets.samples.pairings import IouPairing, PairingOptions, crop_iou
from engine.flags import options_of
from engine.optim import make_optimizer, set_schedule
from engine.pretrain_flags import chosen_method, make_pretrain_flags
from models.backbones import BACKBONES
from models.backbones.interface import Backbone
from models.methods import METHODS
from models.methods.schedules import CosineSchedule
from models.methods.simsiam import SimSiam, SimSiamOptions, similarity
from tests.golden_iou import GivenFeatures, GoldenArrays, assert_near, batch_of, fill, norms_of, published_shapes

CPU = torch.device("cpu")
GOLDEN = GoldenArrays()
NUM_SLICES = 20
SMALL = SimSiamOptions(projector_hidden_dim=24, projector_dim=16, predictor_dim=8)
NOW = {"step": 0}


def published_name(name: str) -> str:
    """Our name in the student -> the published one."""
    part, rest = name.split(".", 1)
    return {"projector": "projection_head", "predictor": "prediction_head"}[part] + ".layers." + rest


def published_method() -> SimSiam:
    """The published heads, filled by name, on given features; sizes that no array shows are the defaults."""
    width, options = GOLDEN["ss_x1"].shape[-1], SimSiamOptions(projector_dim=GOLDEN["ss_z1"].shape[-1])
    method = SimSiam(options, lambda decoder_stride, with_masks: GivenFeatures(width))
    fill(method.student, published_name)
    return method


def small_method(width: int = 12) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(SMALL, lambda decoder_stride, with_masks: GivenFeatures(width))


def by_published_name(method: SimSiam) -> dict[str, nn.Parameter]:
    return {published_name(name): parameter for name, parameter in method.student.named_parameters()}


@pytest.fixture(scope="module")
def first_step() -> SimpleNamespace:
    """The published first step through our method: outputs of both views, loss, gradients, statistics."""
    method, batch = published_method(), batch_of(GOLDEN["ss_x1"][0], GOLDEN["ss_x2"][0])
    outputs = []
    hook = method.student.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss, terms = method(batch, NOW)
    loss.backward()
    hook.remove()
    return SimpleNamespace(method=method, outputs=outputs, loss=loss, terms=terms, g=batch["view"].grad[..., 0, 0, 0])


def test_names_and_shapes_are_the_published_ones() -> None:
    shapes = published_shapes("simsiam")
    state = published_method().student.state_dict()
    assert {published_name(name): list(value.shape) for name, value in state.items()} == shapes


def test_loss_and_collapse_are_the_published_ones(first_step) -> None:
    for view, (projections, predictions) in enumerate(first_step.outputs, start=1):
        assert_near(projections, GOLDEN[f"ss_z{view}"])
        assert_near(predictions, GOLDEN[f"ss_p{view}"])
    assert_near(first_step.loss, GOLDEN["ss_loss"])
    assert_near(first_step.terms["loss_cosine"], GOLDEN["ss_loss"])
    assert_near(first_step.terms["collapse"], GOLDEN["ss_collapse"])


def test_gradients_are_the_published_ones(first_step) -> None:
    assert_near(first_step.g[:, 0], GOLDEN["ss_g_x1"])
    assert_near(first_step.g[:, 1], GOLDEN["ss_g_x2"])
    parameters = by_published_name(first_step.method)
    norms = norms_of(parameters[name].grad for name in GOLDEN["ss_param_names"])
    assert_near(norms, GOLDEN["ss_param_grad_norms"])


def test_running_statistics_and_evaluation_are_the_published_ones(first_step) -> None:
    for name, value in first_step.method.student.named_buffers():
        if not name.endswith("num_batches_tracked"):
            golden = GOLDEN[f"ss_{published_name(name)}"]
            assert_near(value[: len(golden)], golden)
    features = GOLDEN["ss_x1"][0][..., None, None, None]
    with torch.no_grad():
        projections, predictions = first_step.method.student.eval()(features)
    first_step.method.train()
    num = GOLDEN["ss_eval_z1"].shape[1]
    assert_near(projections[:, :num], GOLDEN["ss_eval_z1"])
    assert_near(predictions[:, :num], GOLDEN["ss_eval_p1"])


def sgd_steps(method: SimSiam, batches: list[dict]) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """The published loop: SGD, its rate falling over 6 steps, the predictor's fixed; mean loss, last rate, collapse."""
    peak, decay, schedule = 0.025, 0.05, CosineSchedule(0.025, 1e-6, 6)
    optimizer = make_optimizer(
        method.student, peak, decay, CPU, kind="sgd", momentum=0.9, constant_parts=method.constant_lr
    )
    losses, collapses = [], []
    for step, batch in enumerate(batches):
        set_schedule(optimizer, schedule(step), decay)
        loss, terms = method(batch, NOW)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms["loss_cosine"])
        collapses.append(terms["collapse"])
    lr = torch.tensor(optimizer.param_groups[0]["lr"])
    return optimizer, torch.stack([torch.stack(losses).mean(), lr, torch.stack(collapses).mean()])


def test_three_steps_of_sgd_are_the_published_ones() -> None:
    method = published_method()
    optimizer, log = sgd_steps(method, [batch_of(*views) for views in zip(GOLDEN["ss_x1"], GOLDEN["ss_x2"])])
    assert_near(log, GOLDEN["ss_log"])
    rates = [group["lr"] for group in optimizer.param_groups]  # ours: backbone and projector are one part
    assert_near(torch.tensor([*rates[:2], *rates[:2], *rates[2:]]), GOLDEN["ss_step_lr"])
    parameters = by_published_name(method)
    ours = [parameters[name] for name in GOLDEN["ss_param_names"]]
    num = GOLDEN["ss_step_first16"].shape[1]
    for parameter, golden in zip(ours, GOLDEN["ss_step_first16"]):
        assert_near(parameter.flatten()[:num], golden)
    assert_near(norms_of(ours), GOLDEN["ss_step_norms"])


@pytest.mark.parametrize("name", ["simsiam_lr", "dino_lr", "dino_wd", "dino_momentum", "finetune_lr", "short_warmup"])
def test_schedules_are_the_published_ones(name: str) -> None:
    start, end, epochs, steps_per_epoch, warmup = GOLDEN[f"sched_{name}_args"].tolist()
    schedule = CosineSchedule(start, end, int(epochs * steps_per_epoch), int(warmup * steps_per_epoch))
    ours = torch.tensor([schedule(step) for step in GOLDEN[f"sched_{name}_steps"].tolist()], dtype=torch.float64)
    assert_near(ours, GOLDEN[f"sched_{name}"], 1e-9)


@pytest.mark.parametrize("axes", ["2d", "3d"])
def test_iou_and_its_intervals_are_the_published_ones(axes: str) -> None:
    """Our crops are all of one size: of the published boxes, those pairs are compared."""
    first, second = (GOLDEN[f"iou_{box}{axes}"].numpy().reshape(-1, 2, int(axes[0])) for box in "ab")
    sizes = first[:, 1] - first[:, 0]
    rows = np.flatnonzero((sizes == second[:, 1] - second[:, 0]).all(axis=1))
    assert len(rows) >= 3
    for row in rows:
        iou = crop_iou(first[row, 0], second[row, 0], sizes[row])
        assert iou == pytest.approx(GOLDEN[f"iou_{axes}"][row].item(), abs=1e-12)
        accepted = [low <= iou <= high for low, high in GOLDEN["iou_intervals"].tolist()]
        assert accepted == GOLDEN[f"iou_accepted_{axes}"][row].tolist()


def drawn(shape: tuple[int, ...], interval: tuple[float, float], num: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Share of fall-backs, and of the others IoU [n] and absolute start offsets [n, axes], of crops of 96 a side.

    In 2-D they are slices of a volume, both of one pair in one slice."""
    whole = (NUM_SLICES,) * (3 - len(shape)) + shape
    affine = np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]  # index (d, h, w) -> (x, y, z) = (w, h, d), 1 mm
    record = SimpleNamespace(
        name="case", shape=whole, affine=affine, body_start=np.zeros(3, dtype=int), body_stop=np.array(whole)
    )
    store = SimpleNamespace(names=["case"], record=lambda name: record)
    roi = (1,) * (3 - len(shape)) + (96,) * len(shape)
    pairing = IouPairing(store, ["case"], roi, PairingOptions(iou_range=interval))
    rng = np.random.default_rng(0)
    places = [pairing.draw(rng, 0) for _ in range(num)]
    kept = [place for place in places if not place.is_fallback]
    offsets = np.array([np.abs(np.diff(place.points_mm, axis=0))[0, ::-1] for place in kept]).reshape(len(kept), 3)
    assert len(shape) == 3 or not offsets[:, 0].any()
    return 1 - len(kept) / num, np.array([place.score for place in kept]), offsets[:, 3 - len(shape) :]


@pytest.mark.parametrize("axes", ["2d", "3d"])
def test_drawn_pairs_are_distributed_like_the_published_ones(axes: str) -> None:
    """No more fall-backs than published, and of the accepted pairs the same overlaps and offsets.

    Volumes under two crops along every axis are left out: there our crops may overhang, so that no fall-back is needed.
    """
    num = 1000
    for shape, rows in zip(GOLDEN[f"iou_draw_shapes_{axes}"].tolist(), GOLDEN[f"iou_draw_{axes}"].numpy()):
        if max(shape) < 2 * 96:
            continue
        for interval, (fallbacks, mean, std, none, *offsets) in zip(GOLDEN["iou_intervals"].tolist(), rows):
            share, iou, found = drawn(tuple(shape), tuple(interval), num)
            assert share <= fallbacks + 5 * np.sqrt(0.25 / num) * (fallbacks > 0)
            error = 5 / np.sqrt(len(iou))
            assert abs(iou.mean() - mean) <= 0.005 + error * std
            assert abs(iou.std() - std) <= 0.005 + error * std
            assert abs((iou == 0).mean() - none) <= 0.005 + error * np.sqrt(none * (1 - none))
            assert np.all(np.abs(found.mean(0) - offsets) <= 0.5 + error * found.std(0)), (shape, interval)


def published_encoder(roi: tuple[int, int, int]) -> Backbone:
    """SwinUNETR's encoder of the published size, filled by name."""
    backbone = BACKBONES["swin_unetr"](48, roi, None, False, False)
    fill(backbone.network.swinViT, lambda name: f"backbone.model.{name}", kept=("relative_position_index",))
    return backbone


def test_our_encoder_of_slices_is_the_published_one() -> None:
    backbone = published_encoder((1, 96, 96))
    shapes = {f"backbone.model.{name}": list(v.shape) for name, v in backbone.network.swinViT.state_dict().items()}
    assert shapes == published_shapes("swin2d")
    ours = SimSiam(SimSiamOptions(), lambda decoder_stride, with_masks: backbone).student.eval()
    fill(ours.projector, lambda name: published_name(f"projector.{name}"))
    fill(ours.predictor, lambda name: published_name(f"predictor.{name}"))
    slices = GOLDEN["swin2d_image"].unsqueeze(2)
    with torch.no_grad():
        features = backbone.encode(slices)
        _, predictions = ours(slices)
    deepest = GOLDEN["swin2d_deepest_first16"]
    assert_near(features[32][:, : deepest.shape[1]], deepest)
    assert_near(features[32].mean((2, 3, 4)), GOLDEN["swin2d_pooled"])
    assert_near(torch.stack([one.abs().mean() for one in features.values()]), GOLDEN["swin2d_mean_abs"])
    golden = GOLDEN["swin2d_eval_p_first64"]
    assert_near(predictions[:, : golden.shape[1]], golden)


def test_feature_of_our_encoder_is_the_published_one() -> None:
    """The mean over the places of SwinUNETR's deepest map. Older MONAI merged patches otherwise (off by 0.4)."""
    backbone = published_encoder((64, 64, 64))
    ours = SimSiam(SMALL, lambda decoder_stride, with_masks: backbone).student.eval()
    generator = np.random.Generator(np.random.PCG64(808))
    volume = torch.from_numpy(generator.random((1, 1, 64, 64, 64)).astype(np.float32))
    pooled = []
    ours.projector.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        ours(volume)
    assert_near(pooled[0], GOLDEN["swin3d_pooled"])


# What must not go wrong, without golden numbers


def random_batch(num: int = 6, width: int = 12) -> dict:
    generator = torch.Generator().manual_seed(1)
    return batch_of(*torch.randn(2, num, width, generator=generator))


def test_each_view_is_normalised_by_itself() -> None:
    """A shift of one whole view changes nothing: batch statistics of that view take it away again."""
    method, batch = small_method(), random_batch()
    expected = method(batch, NOW)[0]
    views = batch["view"].detach().clone()
    views[:, 1] += 3.0
    torch.testing.assert_close(method({"view": views}, NOW)[0], expected, rtol=0, atol=1e-5)
    assert int(method.student.predictor[1].num_batches_tracked) == 4  # two views, twice


def test_no_gradient_goes_through_the_target() -> None:
    """The gradient is that of the loss with projections as constants."""
    method, batch = small_method(), random_batch()
    method(batch, NOW)[0].backward()
    ours = batch["view"].grad.clone()
    views = batch["view"].detach().clone().requires_grad_()
    (z1, p1), (z2, p2) = method.student(views[:, 0]), method.student(views[:, 1])
    constants = [torch.tensor(z.tolist()) for z in (z1, z2)]
    (-0.5 * similarity(p1, constants[1]) - 0.5 * similarity(p2, constants[0])).backward()
    torch.testing.assert_close(ours, views.grad)
    views.grad = None
    (z1, p1), (z2, p2) = method.student(views[:, 0]), method.student(views[:, 1])
    (-0.5 * similarity(p1, z2) - 0.5 * similarity(p2, z1)).backward()
    assert not torch.allclose(ours, views.grad, rtol=1e-2, atol=1e-4)


def test_the_predictors_rate_stays() -> None:
    method = small_method()
    optimizer, _ = sgd_steps(method, [random_batch() for _ in range(5)])
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate_of[id(parameter)] for parameter in method.student.predictor.parameters()} == {0.025}
    assert max(rate_of[id(parameter)] for parameter in method.student.projector.parameters()) < 0.01


def test_collapse_is_0_for_spread_and_1_for_equal_predictions() -> None:
    method = small_method()
    last = method.student.predictor[3]
    nn.init.zeros_(last.weight)
    assert method(random_batch(), NOW)[1]["collapse"] == pytest.approx(1.0)
    torch.nn.init.normal_(last.weight)
    nn.init.zeros_(last.bias)
    assert method(random_batch(200), NOW)[1]["collapse"] < 0.3


def test_one_sample_is_refused_by_name_in_training_and_validation() -> None:
    method = small_method()
    for is_training in (True, False):
        with pytest.raises(ValueError, match="--batch_size 1: .*2 or more"):
            method.train(is_training)(random_batch(1), NOW)


@pytest.mark.parametrize("name", ["projector_hidden_dim", "projector_dim", "predictor_dim"])
def test_impossible_sizes_name_the_flag(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} 0"):
        SimSiamOptions(**{name: 0})


def test_the_method_is_a_student_alone() -> None:
    method = small_method()
    assert [name for name, _ in method.named_children()] == ["student"]
    assert not hasattr(method, "teacher") and method.schedules(10, 5) == {} and method.sees_batch


@pytest.mark.parametrize("name", ["simsiam", "dino"])
@pytest.mark.parametrize("recipe", ["iou", "iou_2d", "small"])
def test_recipes_choose_their_method_and_hold_its_flags(name: str, recipe: str) -> None:
    argv = ["--config", f"configs/{name}_{recipe}.yaml"]
    assert chosen_method(argv) == name
    flags = make_pretrain_flags("", name).parse_args(argv)
    overlap = (0.6, 0.9) if (name, recipe) == ("dino", "small") else (0.3, 0.6)  # small: what minutes can learn from
    assert flags.pairing == "iou" and tuple(flags.iou_range) == overlap
    assert (flags.roi_z == 1) == (recipe == "iou_2d")
    if recipe != "small":  # the published settings are the defaults
        published = METHODS[name].Options(move_views=recipe == "iou_2d")
        assert options_of(flags, METHODS[name].Options) == published

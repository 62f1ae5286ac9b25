"""CAiD against the published numbers (../shared/golden, section CAiD), and the faults that must not come back.

The published code moves the keys' network before its own forward, ours after the optimiser's step. From a copy both
give the same run; the golden data start from different weights, so the tests move the teacher once before the start.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from datasets.samples.crops import CropOptions
from datasets.samples.distort import DistortOptions, ViewDistorter, random_orders, shuffle_tiles
from losses.contrast import EMPTY, KeyQueue, contrast_logits, contrast_loss, directions
from models.backbones import BACKBONES
from models.methods.caid import CAiD, CaidOptions
from models.methods.method import average_towards
from models.methods.schedules import CosineSchedule
from tests.fakes import make_dataset
from tests.golden_fill import fill, fill_by_name, golden_file
from tests.golden_iou import GoldenArrays, assert_near
from tests.launched import run_ranks

GOLDEN = GoldenArrays("golden_caid.npz")
ROI = (32, 32, 32)
ELSEWHERE = 10**6  # a case that no sample of a test shows


class VectorBackbone(nn.Module):
    """The golden steps' network: the deepest map is the input vector, the decoder one linear layer."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.channels, self.side = {1: width}, side
        self.rec = nn.Linear(width, side * side)

    def encode(self, volumes: Tensor, masked: Tensor | None = None) -> dict[int, Tensor]:
        return {1: volumes}

    def decode(self, features: dict[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor]]:
        if self.rec is None:
            return None, {}
        return self.rec(features[1].flatten(1)).reshape(-1, 1, 1, self.side, self.side), {}

    def encoder_twin(self) -> "VectorBackbone":
        twin = VectorBackbone(self.channels[1], self.side)
        twin.rec = None
        return twin


def small_method(seed: int = 0, backbone: str = "unet", roi=ROI, **options) -> CAiD:
    """CAiD on a small real network."""
    torch.manual_seed(seed)
    kind = BACKBONES[backbone]
    size = 12 if backbone != "unet" else 16
    return CAiD(
        CaidOptions(**({"queue_size": 8, "caid_dim": 8} | options)),
        lambda decoder_stride, with_masks: kind(size, roi, decoder_stride, False, with_masks),
    )


def small_batch(num: int = 3, seed: int = 0, roi=ROI, first_case: int = 0) -> dict[str, Tensor]:
    """Random views of `num` volumes, both crops of one sample from the same one."""
    generator = torch.Generator().manual_seed(seed)
    views = {name: torch.rand(num, 2, 1, *roi, generator=generator) for name in ("crop", "view", "view_target")}
    return views | {"case": (first_case + torch.arange(num))[:, None].expand(-1, 2)}


def fill_queue(queue: KeyQueue, columns: Tensor, pointer: Tensor) -> None:
    """The published queue, [C, K] columns, of volumes that no sample shows."""
    queue.keys.copy_(columns.T)
    queue.owners.fill_(ELSEWHERE)
    queue.pointer.copy_(pointer)


def own_cases(num: int) -> Tensor:
    """Every sample of a volume of its own, int64 [num, 2]."""
    return torch.arange(num)[:, None].expand(-1, 2)


def same_state(ours: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in ours.items())


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# Published numbers


def vector_method(width: int, dim: int, num_keys: int, momentum: float = 0.9, side: int = 3) -> CAiD:
    options = CaidOptions(queue_size=num_keys, caid_dim=dim, momentum_teacher=momentum)
    return CAiD(options, lambda decoder_stride, with_masks: VectorBackbone(width, side))


def test_losses_logits_gradients_and_queue_are_the_published_ones() -> None:
    columns, target = GOLDEN["nce_queue_in"], GOLDEN["nce_target"]
    queries, restored = (GOLDEN[name].clone().requires_grad_() for name in ("nce_query", "nce_rec_logits"))
    dim, num_keys = columns.shape
    method = vector_method(dim, dim, num_keys)
    fill_queue(method.queue, columns, GOLDEN["nce_ptr_in"])
    cases, keys = own_cases(len(queries)), GOLDEN["nce_key"]
    logits = contrast_logits(directions(queries), directions(keys), method.queue.keys, 0.2)
    assert_near(logits, GOLDEN["nce_logits"], 1e-6)
    total, terms = method.compare(queries, keys, restored[:, :, None], target[:, :, None], cases)
    assert_near(terms["loss_nce"], GOLDEN["nce_nce"], 1e-6)
    assert_near(terms["loss_restore"], GOLDEN["nce_mse"], 1e-6)
    assert_near(total, GOLDEN["nce_loss"], 1e-6)
    total.backward()
    assert_near(queries.grad, GOLDEN["nce_g_query"], 1e-6)
    assert_near(restored.grad, GOLDEN["nce_g_rec_logits"], 1e-6)
    method.queue.apply(torch.tensor(False))
    assert_near(method.queue.keys.T, GOLDEN["nce_queue_out"], 1e-6)
    assert method.queue.pointer == GOLDEN["nce_ptr_out"]


def published_step_names(student: nn.Module) -> dict[str, Tensor]:
    """Published name -> our parameter, of the golden steps' network."""
    ours = {"fc.": "head.", "rec.": "backbone.rec."}
    names = GOLDEN["steps_weight_names"]
    state = dict(student.named_parameters())
    found = {name: ours[name.split(".")[0] + "."] + name.split(".", 1)[1] for name in names}
    return {name: state[own] for name, own in found.items() if own in state}


def test_three_whole_steps_are_the_published_ones() -> None:
    columns, target = GOLDEN["steps_queue_in"], GOLDEN["steps_target"]
    x_query, x_key = GOLDEN["steps_x_query"], GOLDEN["steps_x_key"]
    width, (dim, num_keys) = x_query.shape[-1], columns.shape
    method = vector_method(width, dim, num_keys, side=target.shape[-1])
    for prefix, network in (("", method.student), ("key.", method.teacher)):
        for name, parameter in published_step_names(network).items():
            parameter.data.copy_(torch.from_numpy(fill(prefix + name, tuple(parameter.shape))))
    fill_queue(method.queue, columns, GOLDEN["steps_ptr_in"])
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    sizes = [parameter.numel() for parameter in published_step_names(method.student).values()]
    average_towards(method.teacher, method.student, 0.9)
    losses = set()
    for step in range(len(x_query)):
        views = torch.stack([x_query[step], x_key[step]], 1)[..., None, None, None]
        targets = target[step][:, None, :, None].expand(-1, 2, -1, -1, -1, -1)
        batch = {"view": views, "view_target": targets, "case": own_cases(len(views)) + step * len(views)}
        total, terms = method(batch, {"step": step})
        assert_near(terms["loss_nce"], GOLDEN["steps_nce"][step], 2e-6)
        assert_near(terms["loss_restore"], GOLDEN["steps_mse"][step], 2e-6)
        assert_near(total, GOLDEN["steps_loss"][step], 2e-6)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        ours = torch.cat([parameter.flatten() for parameter in published_step_names(method.student).values()])
        assert_near(ours, GOLDEN["steps_query_weights"][step], 2e-6)
        published = dict(zip(GOLDEN["steps_weight_names"], GOLDEN["steps_key_weights"][step].split(sizes)))
        for name, parameter in published_step_names(method.teacher).items():
            assert_near(parameter.flatten(), published[name], 2e-6)
        method.after_step({"step": step}, was_skipped=torch.tensor(False))
        assert method.queue.pointer == GOLDEN["steps_ptr_out"][step]
        losses.add(total.item())
    assert_near(method.queue.keys.T, GOLDEN["steps_queue_out"], 2e-6)
    assert len(losses) == len(x_query)


def test_the_learning_rate_is_the_published_cosine() -> None:
    rates = GOLDEN["lr_cosine"]
    schedule = CosineSchedule(float(rates[0]), 0.0, len(rates))
    assert_near(torch.tensor([schedule(epoch) for epoch in range(len(rates))], dtype=torch.float64), rates, 1e-12)


# The published 2-D network


def published_name(name: str) -> str:
    """Our name in the student -> the published one."""
    return name.removeprefix("backbone.network.").replace("head.", "fc.", 1).replace("out.", "segmentation_head.", 1)


def published_network(side: int, **options) -> CAiD:
    """The published networks, filled by name."""
    pytest.importorskip("segmentation_models_pytorch")
    kind = BACKBONES["resnet50_unet"]
    method = CAiD(
        CaidOptions(**options),
        lambda decoder_stride, with_masks: kind(0, (1, side, side), decoder_stride, False, with_masks),
    )
    fill_by_name(method.student, published_name)
    fill_by_name(method.teacher, lambda name: "key." + published_name(name))
    return method


@pytest.fixture(scope="module")
def unet() -> SimpleNamespace:
    """The published network's outputs on the golden picture, through our backbone, head and losses."""
    pictures = GOLDEN["unet_input"]
    method = published_network(pictures.shape[-1], queue_size=4).eval()
    network = method.student.backbone.network
    network.is_grey = False  # the golden picture has three different channels
    volumes = (pictures.float() / 255)[:, :, None]
    with torch.no_grad():
        maps = network.encode(volumes)
        logits, decoded = network.decode(maps)
        projected, restored = method.student(volumes)
    assert torch.equal(restored, logits)
    return SimpleNamespace(maps=maps, logits=logits, decoded=decoded[1], projected=projected)


def test_names_of_the_2d_network_are_the_published_ones() -> None:
    published = json.loads(golden_file("caid_state_dict.json").read_text())
    state = published_network(32).student.state_dict()
    assert {published_name(name): list(value.shape) for name, value in state.items()} == (
        published["unet"] | published["head"]
    )


def test_the_2d_network_gives_the_published_numbers(unet) -> None:
    flat = [one.flatten().double() for one in unet.maps.values()]
    assert_near(torch.stack([one.mean() for one in flat]), GOLDEN["unet_map_mean"])
    assert_near(torch.stack([one.std() for one in flat]), GOLDEN["unet_map_std"])
    assert_near(unet.maps[32].mean(dim=(2, 3, 4)), GOLDEN["unet_feature"])
    assert_near(unet.projected, GOLDEN["unet_projected"])
    assert_near(directions(unet.projected), GOLDEN["unet_query"])
    assert_near(unet.decoded[:, :, 0, ::8, ::8], GOLDEN["unet_decoded"])
    assert_near(unet.logits, GOLDEN["unet_restored_logits"], 2e-5)
    assert_near(unet.logits.sigmoid(), GOLDEN["unet_restored"], 1e-4)


def test_a_whole_step_of_the_2d_network_is_the_published_one() -> None:
    views = torch.stack([GOLDEN["train_query"], GOLDEN["train_key"]], 1)[:, :, :, None]  # [B, 2, 1, 1, H, W]
    columns = GOLDEN["train_queue_in"]
    method = published_network(
        views.shape[-1], queue_size=columns.shape[1], caid_dim=columns.shape[0], momentum_teacher=0.9
    ).double()
    fill_queue(method.queue, columns.double(), GOLDEN["train_ptr_in"])
    target = (GOLDEN["train_target"].float() / 255).double()[:, None, :, None]
    batch = {
        "view": (views.float() / 255).double(),
        "view_target": target.expand(-1, 2, -1, -1, -1, -1),
        "case": own_cases(len(views)),
    }
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    average_towards(method.teacher, method.student, 0.9, with_buffers=False)
    outputs = []
    hook = method.student.register_forward_hook(lambda module, inputs, output: outputs.append(output[1]))
    total, terms = method(batch, {"step": 0})
    hook.remove()
    total.backward()
    assert_near(outputs[0].sigmoid()[:, :, 0, ::2, ::2], GOLDEN["train_restored"], 1e-9)
    for name, value in (("nce", terms["loss_nce"]), ("mse", terms["loss_restore"]), ("loss", total)):
        assert_near(value, GOLDEN[f"train_{name}"], 1e-9)
    trained = {published_name(name): parameter for name, parameter in method.student.named_parameters()}
    norms = torch.stack([trained[name].grad.norm() for name in GOLDEN["train_grad_names"]])
    assert_near(norms, GOLDEN["train_grad_norms"], 1e-9)
    optimizer.step()
    teacher = copied(method.teacher)
    method.after_step({"step": 0}, was_skipped=torch.tensor(False))
    start, num = int(GOLDEN["train_ptr_in"]), len(views)
    slots = (start + torch.arange(num)) % columns.shape[1]
    assert_near(method.queue.keys[slots].T, GOLDEN["train_keys_out"], 1e-9)
    assert method.queue.pointer == GOLDEN["train_ptr_out"]
    states = {
        "train_g:": {name: parameter.grad for name, parameter in trained.items()},
        "train_q:": {published_name(name): value for name, value in method.student.state_dict().items()},
        "train_k:": {published_name(name): value for name, value in teacher.items()},
    }
    for name in GOLDEN.arrays:
        for prefix, state in states.items():
            if name.startswith(prefix):
                ours, golden = state[name.removeprefix(prefix)], GOLDEN[name]
                assert_near(ours[:: len(ours) // len(golden)], golden, 1e-9)


def test_norms_over_the_batch_are_said_and_only_where_they_are() -> None:
    assert published_network(32).sees_batch and not small_method().sees_batch
    with pytest.raises(ValueError, match="--roi_z"):
        BACKBONES["resnet50_unet"](48, (32, 32, 32))
    with pytest.raises(ValueError, match="--use_checkpoint"):
        BACKBONES["resnet50_unet"](48, (1, 32, 32), 1, True)


# The queue


def rows(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_writing_goes_on_at_the_first_slot_whatever_the_batch() -> None:
    """The published code refuses a size that the batch does not divide."""
    queue = KeyQueue(5, 1)
    queue.collect(rows(1, 2, 3), torch.tensor([1, 2, 3]))
    queue.apply(torch.tensor(False))
    assert queue.owners.tolist() == [1, 2, 3, EMPTY, EMPTY] and queue.share_filled == pytest.approx(0.6)
    queue.collect(rows(4, 5), torch.tensor([4, 5]))
    queue.collect(rows(6), torch.tensor([6]))  # accumulated: one batch
    queue.apply(torch.tensor(False))
    assert queue.keys[:, 0].tolist() == [6, 2, 3, 4, 5] and queue.pointer == 1 and queue.share_filled == 1
    queue.collect(torch.arange(10.0, 22)[:, None], torch.arange(10, 22))  # more than fit
    queue.apply(torch.tensor(False))
    assert sorted(queue.owners.tolist()) == [17, 18, 19, 20, 21] and queue.pointer == (1 + 12) % 5
    assert queue.keys[:, 0].tolist() == queue.owners.tolist()
    assert queue.keys[(queue.pointer - 1) % 5] == 21


def test_empty_slots_and_the_samples_own_volumes_are_no_negatives() -> None:
    queue = KeyQueue(4, 1)
    queue.collect(rows(1, 2, 3), torch.tensor([7, 8, 9]))
    queue.apply(torch.tensor(False))
    left_out = queue.no_negatives(torch.tensor([[7, 7], [9, 8], [1, 1]]))
    assert left_out.tolist() == [
        [True, False, False, True],
        [False, True, True, True],
        [False, False, False, True],
    ]


def test_the_loss_counts_the_negatives_that_there_are() -> None:
    """By hand: with n negatives orthogonal to q as k is, the loss is log(1 + n); with none it is 0."""
    q, k, others = torch.eye(4)[:1], torch.eye(4)[1:2], torch.eye(4)[2:].repeat(3, 1)
    for num_left_out in (0, 2, 6):
        left_out = (torch.arange(6) < num_left_out)[None]
        loss = contrast_loss(contrast_logits(q, k, others, 0.2, left_out))
        assert float(loss) == pytest.approx(math.log(7 - num_left_out), abs=1e-6)


def test_an_empty_queue_gives_no_contrast_and_no_nan() -> None:
    """The published queue starts with noise, which makes the first losses look best for ever."""
    method = small_method()
    total, terms = method(small_batch(), {"step": 0})
    total.backward()
    assert terms["loss_nce"] == 0 and terms["queue_filled"] == 0
    assert all(parameter.grad.isfinite().all() for parameter in method.student.parameters())
    method.after_step({"step": 0}, was_skipped=torch.tensor(False))
    _, terms = method(small_batch(first_case=10), {"step": 1})
    assert terms["loss_nce"] > 0 and terms["queue_filled"] == pytest.approx(3 / 8)
    _, terms = method(small_batch(), {"step": 1})  # each row now finds a key of its own volume among three
    others = method.queue.no_negatives(small_batch()["case"])
    assert (~others).sum(1).tolist() == [2, 2, 2]


def test_validation_changes_nothing() -> None:
    """In the published code it moves the keys' network and puts held-out keys into the queue."""
    method = small_method()
    method(small_batch(), {"step": 0})
    method.after_step({"step": 0}, was_skipped=torch.tensor(False))
    before, first = copied(method), []
    method.eval()
    for _ in range(2):
        with torch.no_grad():
            first.append(method(small_batch(1, seed=5, first_case=50), {"step": 1})[0])  # fewer samples than a batch
    method.train().after_step({"step": 1}, was_skipped=torch.tensor(True))
    assert same_state(copied(method), before) and first[0] == first[1] and first[0].isfinite()


def test_a_skipped_step_forgets_its_keys() -> None:
    method = small_method()
    before = copied(method)
    method(small_batch(), {"step": 0})
    method.after_step({"step": 0}, was_skipped=torch.tensor(True))
    method.after_step({"step": 1}, was_skipped=torch.tensor(False))
    assert same_state(copied(method), before)


def test_the_teacher_is_an_average_without_decoder() -> None:
    method = small_method(momentum_teacher=0.75)
    assert all(torch.equal(value, method.student.state_dict()[name]) for name, value in copied(method.teacher).items())
    assert not [name for name in method.teacher.state_dict() if "decoder" in name or ".out." in name]
    before = copied(method.teacher)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    method.after_step({"step": 0}, was_skipped=torch.tensor(False))
    for name, value in method.teacher.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.25)


def test_the_queue_comes_back_with_the_method() -> None:
    method, other = small_method(), small_method(seed=1)
    method(small_batch(), {"step": 0})
    method.after_step({"step": 0}, was_skipped=torch.tensor(False))
    other.load_state_dict(method.state_dict())
    batch = small_batch(seed=3, first_case=7)
    assert method(batch, {"step": 1})[0] == other(batch, {"step": 1})[0]
    assert torch.equal(method.queue.owners, other.queue.owners) and method.queue.owners[:3].tolist() == [0, 1, 2]


def run_rank(rank: int, folder: str) -> None:
    """Two accumulated parts of one sample each on this rank, out of four samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    method, batch = small_method(), small_batch(4)
    for part in range(2):
        row = 2 * part + rank
        method({name: value[row : row + 1] for name, value in batch.items()}, {"step": 0})
    method.after_step({"step": 0}, was_skipped=torch.tensor(False))
    torch.save(method.queue.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_hold_the_same_queue_in_the_order_of_the_samples(tmp_path) -> None:
    run_ranks(run_rank, (str(tmp_path),))
    queues = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert same_state(*queues)
    method = small_method()
    method(small_batch(4), {"step": 0})
    method.after_step({"step": 0}, was_skipped=torch.tensor(False))
    assert queues[0]["owners"].tolist() == [0, 1, 2, 3] + [EMPTY] * 4 and queues[0]["pointer"] == 4
    torch.testing.assert_close(queues[0]["keys"], method.queue.keys)


def run_rank_without_queue(rank: int, folder: str) -> None:
    """One of two samples, of two ranks' batch; each rank's loss and its gradients' mean over ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    method, batch = small_method(queue_size=0), small_batch(4)
    total, _ = method({name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}, {"step": 0})
    total.backward()
    gradients = [parameter.grad for parameter in method.student.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    torch.save((total.detach(), [gradient / 2 for gradient in gradients]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_without_a_queue_two_ranks_equal_one_process(tmp_path) -> None:
    run_ranks(run_rank_without_queue, (str(tmp_path),))
    losses, gradients = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)))
    method = small_method(queue_size=0)
    total, terms = method(small_batch(4), {"step": 0})
    total.backward()
    torch.testing.assert_close(sum(losses) / 2, total.detach())
    for name_and_value, gradient in zip(method.student.named_parameters(), gradients[0], strict=True):
        # A norm undoes what a convolution before it scales: such gradients are small differences of large sums.
        torch.testing.assert_close(name_and_value[1].grad, gradient, rtol=1e-4, atol=5e-6)
    assert terms["loss_nce"] > 1 and "queue_filled" not in terms


def test_without_a_queue_the_steps_other_volumes_are_the_negatives() -> None:
    """By hand: of four samples, two of one volume, a row has three or two negatives, all orthogonal to it."""
    method, cases = small_method(queue_size=0, caid_temp=1.0), torch.tensor([[0, 0], [1, 1], [2, 2], [2, 2]])
    corners = torch.eye(8)
    _, terms = method.compare(corners[:4], corners[:4], None, corners, cases)
    rows_with = {negatives: math.log(math.e + negatives) - 1 for negatives in (3, 2)}
    assert float(terms["loss_nce"]) == pytest.approx((2 * rows_with[3] + 2 * rows_with[2]) / 4, abs=1e-6)
    method.after_step({"step": 0}, was_skipped=torch.tensor(False))
    assert not len(method.queue.keys)


# Options


@pytest.mark.parametrize("backbone, roi", [("unet", ROI), ("nnformer", ROI), ("swin_unetr", (64, 32, 32))])
def test_every_volume_backbone_restores(backbone, roi) -> None:
    method = small_method(backbone=backbone, roi=roi)
    batch = small_batch(2, roi=roi)
    method(batch, {"step": 0})[0].backward()
    method.eval()
    with torch.no_grad():
        looks = method.look(batch)
    assert looks["reconstruction"].shape == looks["target"].shape == looks["seen"].shape == (4, 1, *roi)
    assert looks["reconstruction"].min() >= 0 and looks["reconstruction"].max() <= 1


def test_without_restoration_there_is_no_decoder() -> None:
    method = small_method(caid_restore=False)
    total, terms = method(small_batch(), {"step": 0})
    assert "loss_restore" not in terms and total == terms["loss_nce"] and method.look(small_batch()) == {}
    assert not [name for name, _ in method.student.named_parameters() if "decoder" in name]


def test_without_corruption_the_clean_crops_are_the_targets() -> None:
    """The published mode without restoration differs in its input as well; here these are two flags."""
    method, plain = small_method(caid_corrupt=False), small_method()
    assert method.views == {"view": "augmented"} and plain.views == CAiD.views == {"view": "distorted"}
    batch = small_batch()
    moved = batch | {"view_target": batch["crop"]}
    del batch["view_target"]
    assert method(batch, {"step": 0})[0] == plain(moved, {"step": 0})[0]


def test_one_sample_a_step_works() -> None:
    _, terms = small_method()(small_batch(1), {"step": 0})
    assert "feature_std" not in terms and terms["loss_restore"].isfinite()


@pytest.mark.parametrize(
    "name, value", [("queue_size", -1), ("caid_dim", 0), ("caid_temp", 0.0), ("lambda_restore", 0.0)]
)
def test_impossible_settings_are_refused_by_name(name, value) -> None:
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        CaidOptions(**{name: value})
    with pytest.raises(ValueError, match="--momentum_teacher"):
        CaidOptions(momentum_teacher=1.5)


# Distorted views


def distorted_dataset(views=None, augment: bool = False, **options):
    return make_dataset(
        "iou", views=views or {"view": "distorted"}, crops=CropOptions(augment=augment), iou_range=(0.1, 1.0), **options
    )


def distorter_of(dataset) -> ViewDistorter:
    return dataset.view_maker.makers["distorted"]


def test_targets_are_mirrored_with_their_views() -> None:
    """In the published code half of all targets are mirrored against their input."""
    dataset, num_mirrored = distorted_dataset(), 0
    for index in range(20):
        sample = dataset[index]
        for crop, target in zip(sample["crop"], sample["view_target"]):
            is_mirrored = torch.equal(target, crop.flip(-1))
            num_mirrored += is_mirrored
            assert is_mirrored or torch.equal(target, crop)
    assert 8 < num_mirrored < 32
    distorter = distorter_of(dataset)
    distorter.shuffle_prob = distorter.curve_prob = distorter.paint_prob = 0.0
    for index in range(5):
        assert torch.equal(dataset[index]["view"], dataset[index]["view_target"]), "nothing but the flip is left"


def test_each_corruption_changes_what_it_should() -> None:
    distorter, seed = distorter_of(distorted_dataset(roi=(24, 32, 40))), np.random.SeedSequence(1)
    hu = np.random.default_rng(0).integers(-100, 200, (24, 32, 40)).astype(np.int16)
    corruptions = ("shuffle", "curve", "paint")

    def pairs_changed_by(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        for other in corruptions:
            setattr(distorter, f"{other}_prob", float(other == name))
        pairs = [distorter(hu, one) for one in seed.spawn(48)]
        assert all(view.shape == target.shape and view.min() >= 0 and view.max() <= 1 for view, target in pairs)
        return pairs

    def shares(pairs) -> list[float]:
        return [(view != target).float().mean().item() for view, target in pairs]

    shuffled = pairs_changed_by("shuffle")
    assert all(torch.equal(view.flatten().sort()[0], target.flatten().sort()[0]) for view, target in shuffled)
    assert 0.5 < np.mean(shares(shuffled)) < 1
    assert min(shares(pairs_changed_by("curve"))) > 0.5
    painted = shares(pairs_changed_by("paint"))
    # One view in five is painted inside: at most 5 blocks of a third of each side, 5/27 of it. Of the others at least
    # one window of 3/7 of each side stays, at most 5 of 4/7.
    inside = [share for share in painted if share <= 5 / 27]
    assert 2 <= len(inside) <= 20 and min(inside) > 0
    assert max(painted) <= 1 - (3 / 7 - 1 / 24) ** 3


def test_shuffled_voxels_stay_in_their_tile() -> None:
    image = torch.arange(9 * 8 * 7.0).reshape(9, 8, 7)
    shuffled = image.clone()
    shuffle_tiles(shuffled, (4, 2, 3), (1, 0, 1), 5)
    tiles = [(slice(d, d + 4), slice(h, h + 2), slice(w, w + 3)) for d in (1, 5) for h in (0, 2, 4, 6) for w in (1, 4)]
    assert all(torch.equal(shuffled[tile].flatten().sort()[0], image[tile].flatten().sort()[0]) for tile in tiles)
    assert torch.equal(shuffled[0], image[0]) and torch.equal(shuffled[..., 0], image[..., 0])  # rests at the borders
    orders = random_orders(5, 4000, 4, torch.device("cpu"))
    counts = orders.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 110, "all orders of four are equally likely: 167 each on average"


def test_painted_places_hold_noise_or_zero() -> None:
    for fill_with, num_values in (("noise", 2), ("zero", 1)):
        distorter = distorter_of(distorted_dataset())
        distorter = ViewDistorter(distorter.augmenter, (16, 24, 32), DistortOptions(distort_fill=fill_with))
        distorter.shuffle_prob, distorter.curve_prob, distorter.paint_prob = 0.0, 0.0, 1.0
        hu = np.full((16, 24, 32), 100, np.int16)
        view, target = distorter(hu, np.random.SeedSequence(3))
        painted = view[view != target]
        assert len(painted) and (len(painted.unique()) == 1) == (num_values == 1)
        assert fill_with == "noise" or painted.unique().item() == 0


def test_a_distorted_sample_depends_on_seed_and_index_alone() -> None:
    one, other, reseeded = distorted_dataset(augment=True), distorted_dataset(augment=True), distorted_dataset(seed=1)
    other[3], other[9]
    assert same_state(one[7], other[7]) and not torch.equal(one[7]["view"], reseeded[7]["view"])
    view, key = one[7]["view"]
    assert not torch.equal(view, key) and not torch.equal(one[7]["view"], one[8]["view"])


def test_other_views_draw_what_they_drew_before() -> None:
    """Seeds of distorted views come after those of all others."""
    views = {"student": "augmented", "teacher": "augmented", "mask": "blocks"}
    alone, beside = make_dataset("iou", views=views), make_dataset("iou", views={"view": "distorted"} | views)
    for index in range(3):
        sample, more = alone[index], beside[index]
        assert set(more) - set(sample) == {"view", "view_target"}
        assert all(torch.equal(value, more[name]) for name, value in sample.items())


def test_slices_are_distorted_within_their_plane() -> None:
    distorter = distorter_of(distorted_dataset(roi=(1, 24, 32)))
    hu = np.random.default_rng(0).integers(-100, 200, (1, 24, 32)).astype(np.int16)
    for seed in np.random.SeedSequence(0).spawn(10):
        view, target = distorter(hu, seed)
        assert view.shape == target.shape == (1, 1, 24, 32) and not torch.equal(view, target)

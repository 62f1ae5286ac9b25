"""Every objective off in every combination, for every backbone and CASA variant: what is built trains, and all of it.

Each combination takes steps under DDP without `find_unused_parameters`, where a second step raises if the first has
left a parameter without gradient.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from losses.distillation import AliceLoss
from models.methods.alice import build_alice, pool_tokens

SIZES = {"swin_unetr": (64, 32, 32), "nnformer": (32, 16, 16), "unet": (32, 16, 16)}
SMALL = {
    **{"out_dim": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8},
    **{"casa_heads": 2, "casa_head_dim": 4, "casa_hidden_dim": 16},
}
COMBINATIONS = [lambdas for lambdas in itertools.product((0.0, 1.0), repeat=3) if any(lambdas)]
# Without CASA its variant decides nothing.
RUNS = [("figure", lambdas) for lambdas in COMBINATIONS] + [
    ("published", lambdas) for lambdas in COMBINATIONS if lambdas[1]
]
TERMS = ("loss_cls", "loss_tokens", "loss_recon")


def make_pair(backbone: str, **options) -> tuple:
    torch.manual_seed(0)
    width = 12 if backbone == "swin_unetr" else 6
    return build_alice(backbone=backbone, feature_size=width, roi=SIZES[backbone], **(SMALL | options))


def make_batch(backbone: str, seed: int = 0) -> dict[str, torch.Tensor]:
    size, generator = SIZES[backbone], torch.Generator().manual_seed(seed)
    batch = {name: torch.rand(1, 1, *size, generator=generator) for name in ("query", "key")}
    for name in ("query_mask", "key_mask"):
        batch[name] = torch.rand(1, *(side // 16 for side in size), generator=generator).argsort(1) == 0
    return batch


def step(network: torch.nn.Module, teacher: torch.nn.Module, loss: AliceLoss, batch: dict) -> dict[str, torch.Tensor]:
    online = network(batch["query"], batch["query_mask"], batch["key"], batch["key_mask"])
    total, terms = loss(online, teacher(batch["query"], batch["key"], online), batch, 0.04)
    total.backward()
    return terms


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("casa_variant", "lambdas"), RUNS)
@pytest.mark.parametrize("backbone", ["nnformer", "unet", "swin_unetr"])
def test_every_combination_trains_all_that_it_builds(process_group, backbone, casa_variant, lambdas):
    weights = dict(zip(("lambda1", "lambda2", "lambda3"), lambdas))
    student, teacher = make_pair(backbone, casa_variant=casa_variant, **weights)
    loss = AliceLoss(**weights, out_dim=SMALL["out_dim"])
    network = DistributedDataParallel(student)
    for seed in range(2 if backbone != "swin_unetr" else 1):
        terms = step(network, teacher, loss, make_batch(backbone, seed))
    assert [name for name in TERMS if name in terms] == [name for name, on in zip(TERMS, lambdas) if on]
    assert not [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    teacher.update(student, 0.9)
    has_head, has_cls, has_tokens = lambdas[0] or lambdas[1], lambdas[0], lambdas[1]
    assert (student.head is not None, student.casa is not None) == (bool(has_head), bool(has_tokens))
    if has_head:
        assert (student.head.last_layer is not None) == bool(has_cls)
    finest = min(student.backbone.decoder_channels, default=None)
    expected = {True: 2 if backbone == "nnformer" else 1, False: 8 if has_tokens else None}
    assert finest == expected[bool(lambdas[2])]


@pytest.mark.parametrize("backbone", ["nnformer", "unet", "swin_unetr"])
def test_multiscale_cls_joins_the_pooled_tokens_of_all_stages(process_group, backbone):
    student, teacher = make_pair(backbone, cls_features="multiscale")
    widths = student.backbone.channels
    batch = make_batch(backbone)
    online = student(batch["query"], batch["query_mask"], batch["key"], batch["key_mask"])
    features = student.backbone.encode(batch["query"], batch["query_mask"])
    slow = torch.cat([features[stride][0].flatten(1).mean(1) for stride in sorted(widths)])
    assert online.cls_features.shape == (2, sum(widths.values())) and len(widths) >= 4
    torch.testing.assert_close(online.cls_features[0], slow, rtol=1e-3, atol=1e-4)
    target = teacher(batch["query"], batch["key"], online)
    assert target.cls_features.shape == online.cls_features.shape and target.cls_logits.shape == (2, 16)
    step(DistributedDataParallel(student), teacher, AliceLoss(out_dim=16), batch)
    assert not [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]


def test_pooling_the_deepest_stage_takes_it_alone():
    features = {8: torch.zeros(1, 2, 2, 2, 2), 16: torch.arange(3.0).view(1, 3, 1, 1, 1)}
    assert pool_tokens(features, (16,)).tolist() == [[0, 1, 2]]
    assert pool_tokens(features, (8, 16)).tolist() == [[0, 0, 0, 1, 2]]
    with pytest.raises(ValueError, match="--cls_features"):
        make_pair("unet", cls_features="shallowest")


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    gradients = {}
    for backbone in ("nnformer", "unet"):
        student, teacher = make_pair(backbone, casa_variant="published", cls_features="multiscale")
        network, loss = DistributedDataParallel(student), AliceLoss(out_dim=SMALL["out_dim"])
        for seed in (0, 2):
            step(network, teacher, loss, make_batch(backbone, seed + rank))
        gradients |= {f"{backbone}.{name}": p.grad for name, p in student.named_parameters() if p.requires_grad}
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_agree_on_the_gradient_of_every_parameter(tmp_path: Path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())

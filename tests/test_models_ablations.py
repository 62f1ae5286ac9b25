"""Every objective off in every combination, for every backbone and CASA variant: what is built trains, and all of it.

Each combination takes steps under DDP without `find_unused_parameters`, where a second step raises if the first has
left a parameter without gradient.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from models.methods.alice import Alice, pool_tokens
from models.methods.method import rows_of
from tests.launched import run_ranks
from tests.small_alice import NOW, run_alice, small_alice, small_batch

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


def make_method(backbone: str, **options) -> Alice:
    width = 12 if backbone == "swin_unetr" else 6
    return small_alice(backbone=backbone, feature_size=width, roi=SIZES[backbone], **(SMALL | options))


def step(network: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    total, terms = network(batch, NOW)
    total.backward()
    return terms


def untrained(method: Alice) -> list[str]:
    return [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]


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
    method = make_method(backbone, casa_variant=casa_variant, **weights)
    student, network = method.student, DistributedDataParallel(method)
    for seed in range(2 if backbone != "swin_unetr" else 1):
        terms = step(network, small_batch(1, seed, SIZES[backbone]))
    assert [name for name in TERMS if name in terms] == [name for name, on in zip(TERMS, lambdas) if on]
    assert not untrained(method)
    method.after_step(NOW, was_skipped=torch.tensor(False))
    has_head, has_cls, has_tokens = lambdas[0] or lambdas[1], lambdas[0], lambdas[1]
    assert (student.head is not None, student.casa is not None) == (bool(has_head), bool(has_tokens))
    if has_head:
        assert (student.head.last_layer is not None) == bool(has_cls)
    finest = min(student.backbone.decoder_channels, default=None)
    expected = {True: 2 if backbone == "nnformer" else 1, False: 8 if has_tokens else None}
    assert finest == expected[bool(lambdas[2])]


@pytest.mark.parametrize("backbone", ["nnformer", "unet", "swin_unetr"])
def test_multiscale_cls_joins_the_pooled_tokens_of_all_stages(process_group, backbone):
    method = make_method(backbone, cls_features="multiscale")
    student, batch = method.student, small_batch(1, roi=SIZES[backbone])
    widths = student.backbone.channels
    online, target = run_alice(method, batch)
    features = student.backbone.encode(rows_of(batch["student"]), rows_of(batch["mask"]))
    slow = torch.cat([features[stride].flatten(2).mean(2) for stride in sorted(widths)], dim=1)
    assert slow.shape == (2, sum(widths.values())) and len(widths) >= 4
    torch.testing.assert_close(pool_tokens(features, student.pooled_strides), slow, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(online.cls_logits, student.head.project_cls(slow), rtol=1e-3, atol=1e-4)
    assert target.cls_features.shape == slow.shape and target.cls_logits.shape == (2, 16)
    step(DistributedDataParallel(method), batch)
    assert not untrained(method)


def test_pooling_the_deepest_stage_takes_it_alone():
    features = {8: torch.zeros(1, 2, 2, 2, 2), 16: torch.arange(3.0).view(1, 3, 1, 1, 1)}
    assert pool_tokens(features, (16,)).tolist() == [[0, 1, 2]]
    assert pool_tokens(features, (8, 16)).tolist() == [[0, 0, 0, 1, 2]]
    assert make_method("unet").student.pooled_strides == (16,)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    gradients = {}
    for backbone in ("nnformer", "unet"):
        method = make_method(backbone, casa_variant="published", cls_features="multiscale")
        network = DistributedDataParallel(method)
        for seed in (0, 2):
            step(network, small_batch(1, seed + rank, SIZES[backbone]))
        gradients |= {f"{backbone}.{name}": p.grad for name, p in method.named_parameters() if p.requires_grad}
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_agree_on_the_gradient_of_every_parameter(tmp_path: Path):
    run_ranks(run_rank, (str(tmp_path),))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first and all(torch.equal(gradient, second[name]) for name, gradient in first.items())

"""Batch norm over ranks: two gloo processes against torch's batch norm of one process on the joined batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.layers.batch_norm import SynchronisedBatchNorm, synchronise_batch_norms
from tests.launched import run_ranks

NUM_RANKS = 2
SHAPES = {"rows": (7, 5), "places": (7, 5, 2, 3), "volumes": (7, 5, 2, 3, 2)}
SPLIT = (3, 4)  # unequal on purpose
LAYERS = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
KINDS = {
    "plain": {},
    "bare": {"affine": False},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
}


def inputs(name: str) -> tuple[Tensor, Tensor]:
    """Rows of large mean and small spread, whose variance a mean of squares would lose, and the weights of a loss."""
    generator = torch.Generator().manual_seed(len(SHAPES[name]))
    x = 10 + 0.1 * torch.randn(SHAPES[name], generator=generator)
    return x, torch.randn(SHAPES[name], generator=generator)


def make_norm(name: str, kind: str) -> nn.Module:
    """A batch norm with weights that are not 1 and 0."""
    norm = LAYERS[len(SHAPES[name])](5, **KINDS[kind])
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2.0, 5))
            norm.bias.copy_(torch.linspace(-1.0, 1.0, 5))
    return norm


def run(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Two training passes and one of evaluation: outputs, gradients of a loss that is a sum over rows, and buffers."""
    x = x.clone().requires_grad_()
    norm(x.detach() * 0.5)
    output = norm(x)
    ((output**3) * weights).sum().backward()
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    weight_gradients = {f"g_{name}": p.grad for name, p in norm.named_parameters()}
    evaluated = norm.eval()(x.detach()) if norm.track_running_stats else output.detach()
    return {"output": output.detach(), "g_x": x.grad, "evaluated": evaluated, **weight_gradients, **state}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    found = {}
    for name in SHAPES:
        for kind in KINDS:
            norm = make_norm(name, kind)
            assert synchronise_batch_norms(norm) == 1
            found[f"{name} {kind}"] = run(norm, *(part.split(SPLIT)[rank] for part in inputs(name)))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, (str(folder),), NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_two_ranks_equal_one_process_on_the_joined_batch(ranks, name: str, kind: str) -> None:
    """Outputs and gradients of rows are joined; gradients of weights add up; running statistics agree on every rank."""
    expected = run(make_norm(name, kind), *inputs(name))
    ours = [rank[f"{name} {kind}"] for rank in ranks]
    joined = {}
    for key in expected:
        parts = [values[key] for values in ours]
        if key in ("output", "g_x", "evaluated"):
            joined[key] = torch.cat(parts)
        elif key.startswith("g_"):
            joined[key] = sum(parts)
        else:
            assert torch.equal(parts[0], parts[1]), key
            joined[key] = parts[0]
    for key, value in expected.items():
        largest = value.abs().max().item() or 1.0
        assert (joined[key] - value).abs().max().item() <= 1e-4 * largest, key
    apart = run(make_norm(name, kind), *(part.split(SPLIT)[0] for part in inputs(name)))
    assert not torch.allclose(apart["output"], ours[0]["output"], rtol=1e-2)  # the ranks did talk to each other


@pytest.mark.parametrize("name", SHAPES)
def test_one_process_is_torchs_batch_norm(name: str) -> None:
    norm = make_norm(name, "plain")
    synchronise_batch_norms(norm)
    ours, expected = run(norm, *inputs(name)), run(make_norm(name, "plain"), *inputs(name))
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


def test_conversion_keeps_weights_names_and_other_norms() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm3d(4)), nn.InstanceNorm3d(4))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert synchronise_batch_norms(network) == 2
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    kinds = [type(part) for part in (network[1], network[2][0], network[3])]
    assert kinds == [SynchronisedBatchNorm, SynchronisedBatchNorm, nn.InstanceNorm3d]
    assert synchronise_batch_norms(nn.Linear(2, 2)) == 0

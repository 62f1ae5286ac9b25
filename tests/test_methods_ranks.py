"""SimSiam and DINO on two gloo ranks under DDP against one process on the joined batch: gradients, norms, centres."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.layers.batch_norm import synchronise_batch_norms
from tests.golden_iou import batch_of
from tests.launched import run_ranks
from tests.test_methods_dino import small_method as small_dino
from tests.test_methods_simsiam import small_method as small_simsiam

NUM_RANKS, NUM_STEPS = 2, 3
METHODS = {"simsiam": small_simsiam, "dino": small_dino}
NOW = {"teacher_temp": 0.04, "momentum_teacher": 0.9}


def train(name: str, rows: slice, has_ranks: bool) -> dict:
    """Steps of plain gradient descent over these rows of fixed batches: losses, gradients, and what they leave."""
    method = METHODS[name]()
    synchronise_batch_norms(method)
    wrapped = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False) if has_ranks else method
    parameters = {name: p for name, p in method.named_parameters() if p.requires_grad}
    losses, gradients = [], []
    for step in range(NUM_STEPS):
        features = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(step))
        loss, _ = wrapped({"view": batch_of(*features)["view"].detach()[rows]}, NOW)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.05 * parameter.grad
        method.zero_grad()
        method.after_step(NOW, was_skipped=torch.tensor(False))
    return {"losses": torch.stack(losses), "gradients": gradients, "state": method.state_dict()}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    torch.save({name: train(name, slice(3 * rank, 3 * rank + 3), True) for name in METHODS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, (str(folder),), NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one_process(ranks, name: str) -> None:
    whole = train(name, slice(0, 6), False)
    losses = torch.stack([rank[name]["losses"] for rank in ranks])
    torch.testing.assert_close(losses.mean(0), whole["losses"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(losses[0], losses[1], rtol=1e-3)  # each rank saw rows of its own
    for rank in ranks:
        for ours, expected in zip(rank[name]["gradients"], whole["gradients"]):
            largest = max(value.abs().max().item() for value in expected.values())
            for key, value in expected.items():
                torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5 * largest)
        for key, value in whole["state"].items():
            torch.testing.assert_close(rank[name]["state"][key], value, rtol=1e-4, atol=1e-6)

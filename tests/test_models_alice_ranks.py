"""Two gloo ranks against one process on the joined batch: losses, centres, gradients and where training leads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.launched import run_ranks
from tests.small_alice import NOW, small_alice, small_batch

NUM_RANKS = 2
NUM_STEPS = 3
FORMS = {
    "mean": {"centring": "mean"},
    "sinkhorn": {"centring": "sinkhorn"},
    "contrast": {"casa_target": "contrast", "casa_normalise": True},
    "deviation": {"casa_target": "deviation", "casa_queries": "masked", "shared_head_teacher": False},
}


def batches_of(form: str) -> list[dict]:
    """The joined batches. Views of noise soon get one answer, and its deviations are rounding: one step of those."""
    return [small_batch(2 * NUM_RANKS, seed) for seed in range(1 if "casa_target" in FORMS[form] else NUM_STEPS)]


def train(batches: list[dict], wrap: Callable[[nn.Module], nn.Module], form: str) -> dict:
    """Steps of plain gradient descent with the moving average: loss terms, and all that it leaves behind."""
    method = small_alice(**FORMS[form])
    network, history, gradients = wrap(method), [], []
    for batch in batches:
        method.zero_grad()
        total, terms = network(batch, NOW)
        total.backward()
        history.append(torch.stack([total.detach(), *(terms[f"loss_{name}"] for name in ("cls", "tokens", "recon"))]))
        trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.01 * parameter.grad
        method.after_step(NOW, was_skipped=torch.tensor(False))
    return {
        "terms": torch.stack(history),
        "gradients": gradients,
        "centres": method.loss.state_dict(),
        "teacher": method.teacher.state_dict(),
    }


def run_rank(rank: int, folder: str, form: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    shards = [{name: rows.chunk(NUM_RANKS)[rank] for name, rows in batch.items()} for batch in batches_of(form)]
    torch.save(train(shards, nn.parallel.DistributedDataParallel, form), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def assert_close(ours: dict, expected: dict, tolerance: float) -> None:
    """Every tensor within `tolerance` of its largest value; a thousandth of the largest of all counts as rounding."""
    assert ours.keys() == expected.keys()
    largest = {name: tensor.abs().max().item() for name, tensor in expected.items()}
    floor = 1e-3 * max(largest.values())
    for name, tensor in expected.items():
        error = (ours[name] - tensor).abs().max().item()
        assert error <= tolerance * max(largest[name], floor), f"{name}: {error} against {largest[name]}"


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_equal_one_process(form: str, tmp_path: Path) -> None:
    run_ranks(run_rank, (str(tmp_path), form), NUM_RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]
    whole = train(batches_of(form), lambda method: method, form)
    torch.testing.assert_close(sum(r["terms"] for r in ranks) / NUM_RANKS, whole["terms"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ranks[0]["terms"], whole["terms"], rtol=1e-3)  # each rank did see another half
    for rank in ranks:
        for ours, expected in zip(rank["gradients"], whole["gradients"]):
            assert_close(ours, expected, tolerance=1e-3)
        assert_close(rank["centres"], whole["centres"], tolerance=1e-4)
        assert_close(rank["teacher"], whole["teacher"], tolerance=1e-4)
    for name in whole["centres"]:
        assert torch.equal(ranks[0]["centres"][name], ranks[1]["centres"][name])

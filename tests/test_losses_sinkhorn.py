"""Balanced teacher distributions: rows sum to 1, outputs are used alike, a direct computation agrees."""

import torch

from losses.distillation import Distillation, DistillationOptions
from losses.sinkhorn import NUM_ITERATIONS, balanced_probabilities
from tests.small_alice import NOW, small_alice, small_batch


def drawn(rows: int = 64, width: int = 16) -> torch.Tensor:
    """Logits of a collapsed teacher: output 3 is the largest of every row."""
    logits = 0.3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    logits[:, 3] += 2
    return logits


def test_outputs_are_used_alike_where_softmax_uses_one():
    logits = drawn()
    plain = (logits / 0.1).softmax(-1).mean(0)
    balanced = balanced_probabilities(logits, 0.1)
    assert plain[3] > 0.95
    torch.testing.assert_close(balanced.sum(-1), torch.ones(64))
    # the last step is the rows' own: outputs are balanced but for what it undoes
    torch.testing.assert_close(balanced.mean(0), torch.full((16,), 1 / 16), atol=0.02, rtol=0)


def test_agrees_with_alternate_division():
    logits = drawn(10, 7).double()
    expected = (logits / 0.5).exp()
    for _ in range(NUM_ITERATIONS):
        expected = expected / expected.sum(0)
        expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(balanced_probabilities(logits, 0.5), expected.float(), atol=1e-6, rtol=1e-5)


def test_finite_at_the_lowest_temperatures_and_tokens_count_as_rows():
    logits = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    sharp = balanced_probabilities(logits, 1e-3)
    assert sharp.shape == logits.shape and sharp.isfinite().all()
    flat = balanced_probabilities(logits.flatten(0, 1), 1e-3)
    assert torch.equal(sharp.flatten(0, 1), flat)


def test_the_order_within_a_row_is_kept_where_outputs_were_balanced_already():
    logits = torch.eye(8)
    assert torch.equal(balanced_probabilities(logits, 0.2).argmax(-1), torch.arange(8))


def test_the_method_uses_it():
    batch, found = small_batch(2, seed=0), {}
    for centring in ("mean", "sinkhorn"):
        total, terms = small_alice(centring=centring)(batch, NOW)
        assert total.requires_grad and total.isfinite()
        found[centring] = terms["loss_cls"]
    assert found["mean"] != found["sinkhorn"]


def test_all_rows_of_a_call_are_balanced_together_and_centres_play_no_part():
    loss = Distillation({"cls": 16}, DistillationOptions(centring="sinkhorn"))
    loss.centres.cls.fill_(5.0)
    assert torch.equal(loss.targets("cls", drawn(), 0.1), balanced_probabilities(drawn(), 0.1))

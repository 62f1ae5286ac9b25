"""Teacher distributions that use all outputs alike within every batch (SwAV, Caron et al., NeurIPS 2020, section 3.1).

A running mean that is taken off the logits (DINO) balances the outputs over many steps; with few views a step it comes
too late, and the teacher ends on a few outputs or on none. The Sinkhorn-Knopp iteration balances the rows at hand: in
turn every output is given the same total over all rows, and every row is made to sum to 1 again.
"""

import torch
import torch.distributed as dist
from torch import Tensor

NUM_ITERATIONS = 3  # as published


@torch.no_grad()
def balanced_probabilities(logits: Tensor, temperature: float, across_ranks: bool = False) -> Tensor:
    """Distributions whose mean over all rows is about uniform.

    Args:
        logits: [..., K]; everything before the last axis counts as rows.
        temperature: above 0; the rows are softmax(logits / temperature) before they are balanced.
        across_ranks: balance the rows of all ranks together; every rank must then call this at the same time. Without
            a process group the rows are already all.

    Returns:
        float32 of the same shape, every row summing to 1.
    """
    together = across_ranks and dist.is_available() and dist.is_initialized()
    rows = logits.detach().float().flatten(0, -2) / temperature  # [rows, K], logarithms throughout
    for _ in range(NUM_ITERATIONS):
        rows = rows - _log_sum_over_rows(rows, together)
        rows = rows.log_softmax(dim=-1)
    return rows.exp().view_as(logits)


def _log_sum_over_rows(rows: Tensor, together: bool) -> Tensor:
    """log of the sum over rows (of all ranks) of exp(rows): [rows, K] -> [K]."""
    own = rows.logsumexp(dim=0)
    if not together:
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts).logsumexp(dim=0)

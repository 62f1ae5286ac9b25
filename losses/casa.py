"""What CASA's answers are compared with, so that they need the view (`--casa_target`).

Query n of row r comes from the student. Through the student it asks its own view: S_rn. Through the teacher it asks
every view v of the step, on all ranks: T_vrn. The views of one sample are rows 2i and 2i + 1.

    plain      e_rn = H(P(T_rrn), S_rn)                              H, P: `losses.distillation`
    deviation  e_rn = H(P(D_rn), S_rn),   D_rn = direction of T_rrn - mean over v of T_vrn
    contrast   e_rn = -log( exp(cos(S_rn, T_rrn) / tau) / sum over v in N(r) of exp(cos(S_rn, T_vrn) / tau) )

Plain can be met by S that follows the query alone. D has the mean 0 over views (before it is scaled), so that the query
alone does not say it; nor does it say which of several answers is right. N(r) holds r and the views of all other
samples, not r's partner, which shows the same anatomy. A row without other samples costs 0.

Teacher's answers carry no gradient, and errors are averaged over rows. So the mean over ranks of equal batches is that
of the joined batch, in loss and gradient. Each part of an accumulated step is compared by itself.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from losses.contrast import joined
from losses.dense import directions

VIEWS_OF_A_SAMPLE = 2


@torch.no_grad()
def joined_views(own: Tensor, across_ranks: bool) -> tuple[Tensor, int]:
    """The views of all ranks, [R, ...] -> [V, ...], and the place of this rank's first view among them.

    Args:
        own: this rank's views; ranks must hold equally many.
        across_ranks: false takes this rank's alone; all ranks must agree.
    """
    views = joined(own) if across_ranks else own
    return views, dist.get_rank() * len(own) if len(views) > len(own) else 0


@torch.no_grad()
def deviation(answer: Tensor, answers: Tensor) -> Tensor:
    """Direction in which one answer to each query, [R, N, K], differs from the mean over views of [V, R, N, K]."""
    return directions(answer - answers.mean(0))


def view_contrast_errors(online: Tensor, answers: Tensor, first: int, temperature: float) -> Tensor:
    """InfoNCE of the right view's answer among those of other samples' views to the same query: [R, N].

    Args:
        online: S [R, N, K], of any length.
        answers: T [V, R, N, K], of any length.
        first: place of row 0's own view among the V.
        temperature: tau, above 0.
    """
    with torch.autocast(online.device.type, enabled=False):
        cosines = torch.einsum("rnk,vrnk->rnv", directions(online), directions(answers))
    views = torch.arange(len(answers), device=online.device)
    own = first + torch.arange(len(online), device=online.device)
    of_same_sample = views // VIEWS_OF_A_SAMPLE == own[:, None] // VIEWS_OF_A_SAMPLE  # [R, V]
    is_partner = of_same_sample & (views != own[:, None])
    shares = (cosines / temperature).masked_fill(is_partner[:, None], float("-inf")).log_softmax(-1)  # [R, N, V]
    return -shares.gather(-1, own[:, None, None].expand(*shares.shape[:2], 1)).squeeze(-1)

"""Alignment of features at single points with given targets.

A row is a crop with P points; point i has a prediction f_i, a target t_i and a weight w_i of 0 or more. A row costs the
weighted mean of its points, and the loss is the mean over rows, so that the mean over ranks of equal batches is that of
the joined batch. A row whose weights are all 0 costs 0.

    cosine       e_i = 1 - cos(f_i, t_i)
    contrast     e_i = -log( exp(cos(f_i, t_i) / tau) / sum over j of N(i) of exp(cos(f_i, t_j) / tau) )
    coordinates  e_i = mean over coordinates of (f_i - t_i)^2

N(i) holds i and every point of the row whose target lies at least `near_mm` from that of i: other places of one patient
are the hard negatives, and places too near to be told apart are none. Everything is computed in float32 or more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_errors(predicted: Tensor, targets: Tensor) -> Tensor:
    """1 - cosine of predictions and targets [R, P, C]: [R, P] in [0, 2]."""
    return 1 - (directions(predicted) * directions(targets)).sum(dim=-1)


def contrast_errors(
    predicted: Tensor, targets: Tensor, targets_mm: Tensor, temperature: float, near_mm: float
) -> Tensor:
    """InfoNCE of each point among the points of its row, [R, P].

    Args:
        predicted, targets: [R, P, C].
        targets_mm: [R, P, 3], where the targets lie, world mm of one volume in each row.
        temperature: tau, above 0.
        near_mm: nearer targets are no negatives, mm.
    """
    logits = directions(predicted) @ directions(targets).transpose(1, 2) / temperature  # [R, P, P]
    is_near = torch.cdist(targets_mm, targets_mm, compute_mode="donot_use_mm_for_euclid_dist") < near_mm
    is_self = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    return -logits.masked_fill(is_near & ~is_self, float("-inf")).log_softmax(dim=2).diagonal(dim1=1, dim2=2)


def coordinate_errors(predicted: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of coordinates [R, P, K]: [R, P]."""
    return (wide(predicted) - wide(targets)).square().mean(dim=-1)


def mean_over_points(errors: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each row's points [R, P], then the mean over rows."""
    total = weights.sum(dim=1)
    return ((errors * weights).sum(dim=1) / total.masked_fill(total <= 0, 1.0)).mean()


def nearest_share(predicted: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Share of points whose prediction is nearer to their own target than to that of any other point of the row.

    Args:
        predicted, targets: [R, P, C]; of directions, of unit length.
        weights: [R, P]; points of weight 0 do not count as points, only as others.

    Returns:
        A scalar in [0, 1]; 0 where no point counts. Guessing gives 1 / P.
    """
    nearest = torch.cdist(wide(predicted), wide(targets)).argmin(dim=2)
    is_right = nearest == torch.arange(nearest.shape[1], device=nearest.device)
    counts = weights > 0
    return (is_right & counts).sum() / counts.sum().clamp(min=1)


def directions(vectors: Tensor) -> Tensor:
    """Vectors [..., C] scaled to length 1, in float32 or more."""
    return F.normalize(wide(vectors), dim=-1)


def wide(values: Tensor) -> Tensor:
    """Values in float32 or more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

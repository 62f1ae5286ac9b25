"""Overlap prediction: which bases does a crop lie on, and how much of it (VoCo, Wu et al., CVPR 2024; TPAMI 2024).

One volume has N base crops and R random crops. `overlap` [R, N] is the share of each random crop on each base, the
labels; the prediction is the cosine of their features, negative ones counted as 0.

    match    mean over crops of the overlap-weighted mean over bases of -log(1 - |overlap - predicted|)
    miss     mean over pairs without overlap of -log(1 - predicted), or of predicted^2 (first version)
    whole    mean over all pairs of -log(1 - |overlap - predicted|), as the paper has it
    spread   mean over pairs of bases of predicted^2 (the paper: of the cosine's size): bases are told apart

All functions compute in float32 and keep predictions in [0, 1]: in half precision a cosine reaches 1.008, and the
logarithm of a negative number ends the run. Leading axes of the arguments count volumes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosines of all pairs: features [..., R, C] and [..., N, C] -> float32 [..., R, N]."""
    with torch.autocast(left.device.type, enabled=False):
        left, right = F.normalize(left.float(), dim=-1), F.normalize(right.float(), dim=-1)
        return left @ right.transpose(-1, -2)


def predicted_overlap(crops: Tensor, bases: Tensor) -> Tensor:
    """Predictions in [0, 1] for features of crops [..., R, C] and bases [..., N, C]: float32 [..., R, N]."""
    return cosines(crops, bases).clamp(0.0, 1.0)


def match_term(overlap: Tensor, predicted: Tensor) -> Tensor:
    """How well overlapping pairs are predicted: [..., R, N] twice -> [...]."""
    overlap = overlap.float()
    return (overlap * _distance(overlap, predicted)).sum((-2, -1)) / (overlap.sum((-2, -1)) + EPS)


def miss_term(overlap: Tensor, predicted: Tensor, squared: bool = False) -> Tensor:
    """How much pairs without overlap look like pairs with it: [..., R, N] twice -> [...]."""
    apart = (overlap == 0).float()
    cost = predicted.float().square() if squared else -torch.log(1.0 - predicted.float() + EPS)
    return (apart * cost).sum((-2, -1)) / (apart.sum((-2, -1)) + EPS)


def whole_term(overlap: Tensor, predicted: Tensor) -> Tensor:
    """How well all pairs are predicted: [..., R, N] twice -> [...]."""
    return _distance(overlap.float(), predicted).mean((-2, -1))


def spread_term(bases: Tensor, squared: bool = True, both: bool = True) -> Tensor:
    """How similar the bases of one volume are: features [..., N, C] -> [...].

    Args:
        squared: mean of predictions squared; else mean of the cosines' size.
        both: the gradient moves both bases of a pair. False moves the first of the two alone, as published: the value
            is the same, and the last base gets no gradient.
    """
    first, second = torch.triu_indices(bases.shape[-2], bases.shape[-2], offset=1, device=bases.device)
    pairs = cosines(bases, bases if both else bases.detach())[..., first, second]
    return pairs.clamp(0.0, 1.0).square().mean(-1) if squared else pairs.abs().mean(-1)


def _distance(overlap: Tensor, predicted: Tensor) -> Tensor:
    return -torch.log(1.0 - (overlap - predicted.float()).abs() + EPS)

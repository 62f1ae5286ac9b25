"""Monitors of collapse, and the warnings that follow from them.

A collapsed network answers every view alike: its distributions are all uniform, or all on one output, or its features
are one point. Monitors are shares, so that one threshold serves every width: an entropy over log K, a spread of which 1
means "spread over the sphere". The thresholds were found by making small networks collapse on purpose; the runs are in
benchmarks/LOG.md. `feature_std` of random weights depends much on the backbone, hence its low threshold.
"""

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

ENTROPY_SHARE = 0.998
KL_SHARE = 0.8
FEATURE_STD = 0.01
CASA_GAP = 0.02
COLLAPSE = 0.9
NUM_READINGS = 3


@torch.no_grad()
def distribution_monitors(targets: Tensor, mean_distribution: Tensor) -> dict[str, Tensor]:
    """Monitors of a teacher's distributions [..., K], as shares of log K.

    teacher_entropy_share: mean entropy of one row's distribution; 1 when it is uniform.
    teacher_kl_share: KL to uniform of the running mean distribution [K]: 0 when all outputs are used equally, 1 when
        every row falls on the same one.
    """
    largest = math.log(targets.shape[-1])
    return {
        "teacher_entropy_share": torch.special.entr(targets).sum(-1).mean() / largest,
        "teacher_kl_share": 1.0 - torch.special.entr(mean_distribution).sum() / largest,
    }


@torch.no_grad()
def feature_spread(rows: Tensor, correction: int = 0) -> Tensor:
    """Standard deviation over rows [R, C] of L2-normalised features, mean over C, times the square root of C.

    About 1 when rows spread over the sphere, 0 when all are the same. `correction` 1 divides by R - 1.
    """
    directions = F.normalize(rows.detach().float(), dim=-1)
    return directions.std(dim=0, correction=correction).mean() * directions.shape[-1] ** 0.5


@torch.no_grad()
def mean_cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine similarity of [R, N, K] and [R, N, K] after subtracting the mean over tokens and samples, then averaged.

    Without the subtraction every pair of answers is similar, since all share one direction.
    """
    left, right = (x.detach().float() for x in (left, right))
    left, right = (x - x.mean(dim=(0, 1)) for x in (left, right))
    return F.cosine_similarity(left, right, dim=-1).mean()


def collapse_warnings(values: dict[str, float]) -> list[str]:
    """What the monitors of one reading say.

    Args:
        values: means by name; monitors that are absent are not judged.

    Returns:
        One line per kind of collapse; what stands before the colon names the kind. Empty when all is well.
    """
    warnings = []
    entropy, divergence = values.get("teacher_entropy_share"), values.get("teacher_kl_share")
    if entropy is not None and entropy > ENTROPY_SHARE:
        warnings.append(
            f"collapse to uniform: teacher_entropy_share {entropy:.4f} (1 = uniform), every view looks the same; lower "
            "--teacher_temp, raise --batch_size, or take --centring sinkhorn"
        )
    if divergence is not None and divergence > KL_SHARE:
        warnings.append(
            f"collapse to one output: teacher_kl_share {divergence:.3f} (1 = one output), the teacher gives all views "
            "the same few outputs; raise --teacher_temp, lower --centre_momentum or --lr, or take --centring sinkhorn"
        )
    collapse = values.get("collapse")
    if collapse is not None and collapse > COLLAPSE:
        warnings.append(
            f"collapse of predictions: collapse {collapse:.3f} (1 = all views give one point); lower --lr or raise "
            "--batch_size"
        )
    spread = values.get("feature_std")
    if spread is not None and spread < FEATURE_STD:
        warnings.append(
            f"collapse of features: feature_std {spread:.2g} (1 = spread over the sphere), pooled features of all "
            "views are the same; lower --lr, or raise --momentum_teacher or --batch_size"
        )
    right, shuffled = values.get("casa_cos_right"), values.get("casa_cos_shuffled")
    if right is not None and right - shuffled < CASA_GAP:
        warnings.append(
            f"CASA ignores the view: its answer agrees with the right view ({right:.3f}) no better than with another "
            f"({shuffled:.3f}); with --batch_size 1 that other view shows the same anatomy, and this says little"
        )
    return warnings


class CollapseWatch:
    """Warns once per kind, after `NUM_READINGS` readings in a row; again only if it went away in between."""

    def __init__(self) -> None:
        self.num_in_a_row: Counter[str] = Counter()

    def __call__(self, values: dict[str, float]) -> list[str]:
        """The warnings that are due at this reading; `values` and result as in `collapse_warnings`."""
        found = {warning.split(":")[0]: warning for warning in collapse_warnings(values)}
        self.num_in_a_row = Counter({kind: self.num_in_a_row[kind] + 1 for kind in found})
        return [warning for kind, warning in found.items() if self.num_in_a_row[kind] == NUM_READINGS]

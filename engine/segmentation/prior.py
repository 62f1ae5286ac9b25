"""Carried labels as a prior: what a memory adds to a network's log-probabilities.

Labels of remembered cases, carried to a scan, say where an organ should lie, about as exactly as anatomy can be
matched. So they may be blurred, a share of the probability is spread over all classes, because the match may be wrong,
and a multiple of the logarithm is added to the network's log-probabilities. Places that no remembered case shows lie
beyond its ends. An organ that does not come near such an end cannot lie beyond it. All others get the same there,
which changes nothing between them.

Letters: C classes, d h w voxels on which votes are counted, D H W voxels of the network's grid.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from datasets.ct.geometry import grown_box, mask_box, spacing_of
from engine.segmentation.sliding_window import Size3, axis_map, restored_slices

SPREAD = 0.1  # share of the probability that goes to all classes alike
LEAST_PROBABILITY = torch.finfo(torch.float32).tiny  # whose logarithm is still a number
BLUR_REACH = 4  # sigmas after which the Gaussian ends


@dataclass(frozen=True, eq=False)
class Votes:
    """Labels carried to a grid, by class.

    Attributes:
        counts: float32 [K, d, h, w], 0 or more, of the classes that were voted for.
        classes: the K classes.
        reach: [d, h, w], more than 0 where a remembered case shows the place.
        affine: [4, 4], index (d, h, w) -> world mm.
        absent: class -> bool [d, h, w], where `reach` is 0 and the class cannot lie all the same.
    """

    counts: np.ndarray
    classes: Sequence[int]
    reach: np.ndarray
    affine: np.ndarray
    absent: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prior:
    """Probabilities of the classes at every place of a scan.

    Attributes:
        odds: float16 [C, d, h, w], probability times C; the same for all that may lie where nothing is known.
        affine: [4, 4], index (d, h, w) -> world mm.
        weight: of its logarithm.
        num_cases: remembered cases that it was made from.
        known_share: share of the places that one of them shows, 0 to 1.
    """

    odds: Tensor
    affine: np.ndarray
    weight: float
    num_cases: int
    known_share: float

    def slices(self, shape: Size3, affine: np.ndarray) -> Iterator[Tensor]:
        """What is added to the log-probabilities of every slice [C, H, W] of a grid over the same box."""
        mapping = axis_map(self.affine, affine)
        planes = (plane.float() for plane in self.odds.unbind(1))
        for odds in restored_slices(planes, tuple(self.odds.shape[1:]), mapping, shape):
            yield odds.log().mul_(self.weight)


def prior_of(votes: Votes, num_classes: int, weight: float, blur_mm: float, num_cases: int) -> Prior:
    """Votes as a prior.

    Args:
        num_classes: C.
        weight: of the logarithm, 0 or more.
        blur_mm: sigma of the Gaussian blur, mm; 0 = none.
    """
    odds = torch.from_numpy(class_shares(votes, num_classes, blur_mm)).mul_((1 - SPREAD) * num_classes).add_(SPREAD)
    return Prior(odds.half(), votes.affine, weight, num_cases, float((votes.reach > 0).mean()))


def class_shares(votes: Votes, num_classes: int, blur_mm: float) -> np.ndarray:
    """Blurred votes as float32 [C, d, h, w] that sum to 1; where nobody voted the same for all that may lie there."""
    sigma = blur_mm / np.array(spacing_of(votes.affine))
    total = gaussian_filter(votes.counts.sum(axis=0), sigma, mode="constant", truncate=BLUR_REACH)
    silent = (votes.reach == 0) | (total <= 0)
    total[silent] = 1
    shares = np.zeros((num_classes, *total.shape), dtype=np.float32)
    for count, channel in zip(votes.counts, votes.classes):
        if channel != 0 and count.any():
            box = tuple(map(slice, *grown_box(*mask_box(count > 0), BLUR_REACH * sigma + 1, count.shape)))
            blurred = gaussian_filter(count[box], sigma, mode="constant", truncate=BLUR_REACH)
            shares[channel][box] = blurred / total[box]
    np.subtract(1, shares[1:].sum(axis=0), out=shares[0])
    np.maximum(shares[0], 0, out=shares[0])
    possible = num_classes - sum(votes.absent.values(), np.zeros(total.shape, dtype=np.int32))
    shares[:, silent] = 1 / possible[silent]
    for channel, mask in votes.absent.items():
        shares[channel][mask] = 0
    return shares


def fuse(
    slices: Iterator[Tensor], prior: Prior, shape: Size3, affine: np.ndarray, keep_plain: bool
) -> Iterator[Tensor]:
    """Add a prior to a network's probabilities.

    Args:
        slices: of the network, D tensors [C, H, W].
        shape, affine: of the network's grid.
        keep_plain: give both versions, with the prior and without.

    Yields:
        D tensors of probabilities [C, H, W], or [2, C, H, W].
    """
    for plain, added in zip(slices, prior.slices(shape, affine)):
        fused = plain.clamp_min(LEAST_PROBABILITY).log_().add_(added.to(plain.device)).softmax(0)
        yield torch.stack([fused, plain]) if keep_plain else fused

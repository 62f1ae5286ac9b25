"""Carried votes, sharpened by the scan's own intensities.

Votes say where an organ lies to within a voxel or two of the matching; the scan's intensities show where it ends. The
voxels of a label are alike in HU, whatever that HU is in this scan, so both are joined by expectation maximisation with
the votes as prior (Van Leemput et al., IEEE TMI 18(10), 1999), and by a field that keeps neighbours together:

    p(k | x)  ~  votes_k(x) * likelihood_k(HU(x)) * exp(COUPLING * mean of p(k) around x)

The likelihood of the background, which is made of many tissues, is the histogram of its voxels. That of a label is a
normal distribution, whose middle and width are median and quartiles of the voxels that it surely has, and a small
constant. Many votes for a small organ lie beside it, in fat most often. So its voxels are taken for a mixture: most of
the histogram of its surroundings is taken out of theirs before. Nothing is learnt from other scans.

Letters: K labels, the first is the background; D H W voxels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from datasets.ct.geometry import grown_box, mask_box

BLUR_MM = 3.0  # of the votes: matches err by more
AROUND_MM = 3.0  # sigma of what counts as around a voxel
RING_MM = 8.0  # sigma of what counts as a label's surroundings
BESIDE = 0.7  # of the surroundings' histogram, taken out of the label's
MARGIN_MM = 20.0  # of background that is looked at around all votes for labels
COUPLING = 3.5
NUM_ROUNDS = 4
LEAST_WIDTH_HU = 12.0
OUTLIERS = 0.001  # the constant, where the normal distribution has its middle at 1
REACH = 3.0  # sigmas after which a blur ends
BINS_HU = np.arange(-200.0, 400.0, 10.0)
CENTRES_HU = np.append(BINS_HU, BINS_HU[-1] + 10) - 5

Box = tuple[slice, slice, slice]


def shrunk(hu: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Mean intensities float32 on a coarser grid of `shape` over the same box."""
    tensor = torch.from_numpy(np.ascontiguousarray(hu, dtype=np.float32))[None, None]
    return F.adaptive_avg_pool3d(tensor, tuple(shape))[0, 0].numpy()


def sharpened(votes: np.ndarray, hu: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Votes with labels where intensities say, too, that they lie.

    Args:
        votes: float32 [K, D, H, W], 0 or more, the first for the background.
        hu: [D, H, W], HU.
        spacing_mm: voxel size along (D, H, W).

    Returns:
        float32 [K, D, H, W]; a voxel has as many votes as before, shared out anew.
    """
    voted = [label for label in range(1, len(votes)) if (votes[label] > 0).any()]
    if not voted:
        return votes
    start, stop = mask_box((votes[voted] > 0).any(axis=0))
    looked_at = _grown(start, stop, MARGIN_MM / np.asarray(spacing_mm), votes.shape[1:])
    inside = [votes[label][looked_at] for label in (0, *voted)]
    total = sum(inside)
    # Beyond the reach of their blur there are no votes for a label: each is looked at in a box of its own.
    reach = REACH * BLUR_MM / np.asarray(spacing_mm) + 1
    boxes = [tuple(slice(0, size) for size in total.shape)]
    boxes += [_grown(*mask_box(of_label > 0), reach, total.shape) for of_label in inside[1:]]
    known = np.where(total > 0, total, 1)
    prior = [np.where(total > 0, of_label / known, 0)[box] for of_label, box in zip(inside, boxes)]
    prior[0][total == 0] = 1
    prior = [blurred(of_label, BLUR_MM, spacing_mm) for of_label in prior]
    bins = np.digitize(hu[looked_at], BINS_HU)
    shares = prior
    for _ in range(NUM_ROUNDS):
        curves = likelihoods(shares, boxes, bins, spacing_mm)
        shares = [
            of_label * np.exp(COUPLING * blurred(share, AROUND_MM, spacing_mm)) * curve[bins[box]]
            for of_label, share, curve, box in zip(prior, shares, curves, boxes)
        ]
        whole = np.zeros_like(total)
        for share, box in zip(shares, boxes):
            whole[box] += share
        for share, box in zip(shares, boxes):
            share /= whole[box]
    result = votes.copy()
    for label, share, box in zip((0, *voted), shares, boxes):
        part = result[label][looked_at]
        part[...] = 0
        part[box] = share * total[box]
    return result


def _grown(start: np.ndarray, stop: np.ndarray, margin: np.ndarray, shape: Sequence[int]) -> Box:
    """`grown_box` as slices."""
    return tuple(map(slice, *grown_box(start, stop, margin, shape)))


def likelihoods(
    shares: Sequence[np.ndarray], boxes: Sequence[Box], bins: np.ndarray, spacing_mm: Sequence[float]
) -> list[np.ndarray]:
    """How likely each bin of intensity is for each label, given the label's share of every voxel: K curves.

    Args:
        shares: of each label in its box; in a voxel they sum to 1.
        boxes: of the labels, the first is the whole.
        bins: int [D, H, W], of `BINS_HU`.
        spacing_mm: voxel size along (D, H, W).
    """
    background = gaussian_filter1d(histogram(bins, shares[0]), 1.0)
    curves = [background / background.sum()]
    margin = REACH * RING_MM / np.asarray(spacing_mm) + 1
    for share, box in zip(shares[1:], boxes[1:]):
        start, stop = (np.array([getattr(part, end) for part in box]) for end in ("start", "stop"))
        around = _grown(start, stop, margin, bins.shape)
        share = np.pad(share, [(own.start - wide.start, wide.stop - own.stop) for own, wide in zip(box, around)])
        counts = histogram(bins[around], share**2)  # sure voxels say more
        beside = histogram(bins[around], blurred(share, RING_MM, spacing_mm) * (1 - share))
        counts = np.maximum(counts / counts.sum() - BESIDE * beside / beside.sum(), np.finfo(np.float64).tiny)
        below = np.cumsum(counts) / counts.sum()
        low, middle, high = (np.interp(part, below, CENTRES_HU) for part in (0.25, 0.5, 0.75))
        width = max(LEAST_WIDTH_HU, (high - low) / 1.349)  # a normal distribution's quartiles lie 1.349 sigma apart
        curve = np.exp(-0.5 * ((CENTRES_HU - middle) / width) ** 2) + OUTLIERS
        curves.append(curve / curve.sum())
    return [curve.astype(np.float32) for curve in curves]


def histogram(bins: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weight in every bin, more than 0."""
    counts = np.bincount(bins.ravel(), weights.ravel(), minlength=len(CENTRES_HU))
    return counts + 1e-6 * counts.sum() + np.finfo(np.float64).tiny


def blurred(values: np.ndarray, sigma_mm: float, spacing_mm: Sequence[float]) -> np.ndarray:
    """[D, H, W] under a Gaussian blur."""
    return gaussian_filter(values, sigma_mm / np.asarray(spacing_mm), mode="nearest", truncate=REACH)

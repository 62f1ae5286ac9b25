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

from datasets.ct.geometry import mask_box

BLUR_MM = 3.0  # of the votes: matches err by more
AROUND_MM = 3.0  # sigma of what counts as around a voxel
RING_MM = 8.0  # sigma of what counts as a label's surroundings
BESIDE = 0.7  # of the surroundings' histogram, taken out of the label's
MARGIN_MM = 20.0  # of background that is looked at around all votes for labels
COUPLING = 3.5
NUM_ROUNDS = 4
LEAST_WIDTH_HU = 12.0
OUTLIERS = 0.001  # the constant, where the normal distribution has its middle at 1
BINS_HU = np.arange(-200.0, 400.0, 10.0)
CENTRES_HU = np.append(BINS_HU, BINS_HU[-1] + 10) - 5


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
    is_voted = (votes[1:] > 0).any(axis=0)
    if not is_voted.any():
        return votes
    start, stop = mask_box(is_voted)
    margin = np.ceil(MARGIN_MM / np.asarray(spacing_mm)).astype(int)
    box = tuple(map(slice, np.maximum(start - margin, 0), stop + margin))
    inside = (slice(None), *box)
    total = votes[inside].sum(axis=0)
    prior = np.where(total > 0, votes[inside] / np.where(total > 0, total, 1), 0)
    prior[0][total == 0] = 1
    prior = blurred(prior, BLUR_MM, spacing_mm)
    bins = np.digitize(hu[box], BINS_HU)
    shares = prior
    for _ in range(NUM_ROUNDS):
        coupled = prior * np.exp(COUPLING * blurred(shares, AROUND_MM, spacing_mm))
        shares = coupled * np.stack([curve[bins] for curve in likelihoods(shares, bins, spacing_mm)])
        shares /= shares.sum(axis=0)
    result = votes.copy()
    result[inside] = shares * total
    return result


def likelihoods(shares: np.ndarray, bins: np.ndarray, spacing_mm: Sequence[float]) -> list[np.ndarray]:
    """How likely each bin of intensity is for each label, given the label's share of every voxel: K curves.

    Args:
        shares: [K, D, H, W], summing to 1.
        bins: int [D, H, W], of `BINS_HU`.
        spacing_mm: voxel size along (D, H, W).
    """
    background = gaussian_filter1d(histogram(bins, shares[0]), 1.0)
    curves = [background / background.sum()]
    for share, ring in zip(shares[1:], blurred(shares[1:], RING_MM, spacing_mm)):
        counts = histogram(bins, share**2)  # sure voxels say more
        beside = histogram(bins, ring * (1 - share))
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


def blurred(maps: np.ndarray, sigma_mm: float, spacing_mm: Sequence[float]) -> np.ndarray:
    """Every map of [K, D, H, W] under a Gaussian blur."""
    sigma = sigma_mm / np.asarray(spacing_mm)
    return np.stack([gaussian_filter(one, sigma, mode="nearest", truncate=3.0) for one in maps])

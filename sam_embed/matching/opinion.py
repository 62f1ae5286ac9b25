"""Carried votes, joined with another opinion of the same voxels: that of a segmentation network.

Votes say where an organ lies, and a network says what it looks like. A network that was taught on phantoms alone is
often wrong on real CT, but seldom in the same way as a match. So a share of its probability is spread over all labels,
and both are multiplied, as the memory of a finetuned network multiplies them (`engine.segmentation.prior`).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

SPREAD = 0.02  # share of the network's probability that goes to all labels alike

# A grid, (D, H, W) and index -> world mm, to the probability [D, H, W] of every label that the network knows.
Opinion = Callable[[tuple[int, int, int], np.ndarray], Mapping[int, np.ndarray]]


def joined(votes: np.ndarray, values: Sequence[int], probabilities: Mapping[int, np.ndarray]) -> np.ndarray:
    """Votes with labels where the opinion agrees.

    Args:
        votes: float32 [K, D, H, W], 0 or more.
        values: the K labels.
        probabilities: label -> [D, H, W], 0 to 1.

    Returns:
        float32 [K, D, H, W]; a voxel has as many votes as before, shared out anew.

    Raises:
        ValueError: there are votes for a label that the opinion does not know.
    """
    unknown = [value for value in values if value not in probabilities]
    if unknown:
        raise ValueError(f"votes for labels {unknown}, and the second opinion knows {sorted(probabilities)}")
    weights = np.stack([(1 - SPREAD) * probabilities[value] + SPREAD / len(values) for value in values])
    shares = votes * weights
    agreed, total = shares.sum(axis=0), votes.sum(axis=0)
    return (shares * np.where(agreed > 0, total / np.where(agreed > 0, agreed, 1), 0)).astype(np.float32)

"""Coordinates of the body that SAM's vectors induce: the whitened first principal components of a corpus.

    z(p) = L^(-1/2) U^T (a(p) - m)

m is the mean vector, U holds the first principal axes of the vectors of places drawn evenly from the corpus' patients,
L their variances along these axes. Over those places, each coordinate has mean 0 and variance 1. Places of one anatomy
have near coordinates in all patients, since their vectors are near; what a coordinate means in the body is not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datasets.store.format import checksum_of
from sam_embed.embeddings.opened import MappedCase, OpenedVectors

NUM_CASES = 64  # cases that the axes are fitted to, spread over the corpus
NUM_PLACES = 256  # of each


class BodyCoordinates:
    """Coordinates where `OpenedVectors` has vectors (a `VectorReader` of `datasets.samples.anatomy`)."""

    def __init__(self, reader: OpenedVectors, names: Sequence[str], num_coordinates: int, seed: int = 0) -> None:
        """Fit the axes; they depend on the embeddings of `names`, their order and the seed alone.

        Args:
            names: cases to fit to; of many, some that are spread evenly over the list.
        """
        self.reader = reader
        rng = np.random.default_rng(seed)
        chosen = [names[number] for number in np.linspace(0, len(names) - 1, min(NUM_CASES, len(names))).astype(int)]
        cases = [reader[name] for name in chosen]
        drawn = [case.vectors(case.random_places(NUM_PLACES, rng)) for case in cases]
        vectors = np.concatenate(drawn).astype(np.float64)
        self.mean = vectors.mean(axis=0)
        variances, axes = np.linalg.eigh(np.cov(vectors.T))
        axes = axes[:, ::-1][:, :num_coordinates]
        axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(num_coordinates)])  # eigenvectors have no sign
        self.axes = axes / np.sqrt(np.maximum(variances[::-1][:num_coordinates], 1e-12))

    def __getitem__(self, name: str) -> "CaseCoordinates":
        """The coordinates of one case."""
        return CaseCoordinates(self.reader[name], self.mean, self.axes)

    def digest(self) -> str:
        """Changes with the axes; rounded, since their last digits depend on the machine."""
        return checksum_of(np.round(self.axes, 3).tobytes())


@dataclass(frozen=True, eq=False)
class CaseCoordinates:
    """Coordinates of one case, for vectors' mean [C] and scaled axes [C, num_coordinates]."""

    case: MappedCase
    mean: np.ndarray
    axes: np.ndarray

    def inside(self, points_mm: np.ndarray) -> np.ndarray:
        """Which world points [N, 3] lie in the patient: bool [N]."""
        return self.case.inside(points_mm)

    def vectors(self, points_mm: np.ndarray) -> np.ndarray:
        """Body coordinates float32 [N, num_coordinates] of world points [N, 3] in the patient."""
        return ((self.case.vectors(points_mm) - self.mean) @ self.axes).astype(np.float32)

"""Points inside a sample's crops, SAM's vectors at them, and which points of the two crops show the same anatomy.

The vectors come from a `VectorReader`, which the entry point hands over: this room knows nothing of the network that
made them. Everything is a function of the generators, the crops' places and the reader's files.

For crops Q and K, point p of Q is matched to the most similar p' of K's candidates, and p' back to p'' in Q:

    score   s = <a(p), a(p')>      cycle   c = |p'' - p| in mm      weight   w = max(s, 0) / (1 + (c / CYCLE_MM)^2)

Legend: V crops of a sample, P points of each, M >= P candidates of each, C channels of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from datasets.ct.geometry import index_to_world

CYCLE_MM = 15.0  # a match that comes back so far from its start counts half
DRAWS_PER_POINT = 3  # places drawn for each one that is wanted; those outside of the patient are dropped


class CaseVectors(Protocol):
    """Vectors at world points of one case."""

    def inside(self, points_mm: np.ndarray) -> np.ndarray:
        """Which world points [N, 3] have a vector, because they lie in the patient: bool [N]."""

    def vectors(self, points_mm: np.ndarray) -> np.ndarray:
        """The vectors at world points [N, 3] that lie in the patient: float32 [N, C]."""


class VectorReader(Protocol):
    """The vectors of all cases, by name; what a case holds in memory goes with the object that it returns."""

    def __getitem__(self, name: str) -> CaseVectors: ...


@dataclass(frozen=True)
class AnatomyRequest:
    """What a method asks for.

    Attributes:
        num_points: points of each crop.
        num_candidates: places of the other crop that a point may be matched to; 0 = no matches.
        num_coordinates: so many coordinates of the body in place of SAM's vectors; 0 = the vectors.
    """

    num_points: int
    num_candidates: int = 0
    num_coordinates: int = 0


class AnatomyPoints:
    """Draws the points of each sample and reads their vectors.

    Args:
        reader: gives the vectors.
        request: how many points, and whether they are matched.
        digest: changes with the network that made the vectors.
    """

    def __init__(self, reader: VectorReader, request: AnatomyRequest, digest: str = "") -> None:
        self.reader, self.request, self.digest = reader, request, digest

    def sample(
        self,
        rngs: Sequence[np.random.Generator],
        records: Sequence,
        starts: Sequence[np.ndarray],
        roi: Sequence[int],
    ) -> dict[str, torch.Tensor]:
        """The entries of one sample.

        Args:
            rngs: a generator for each crop.
            records: the store's record of each crop's case.
            starts: the first voxel of each crop in its volume, int64 [3].
            roi: crop size (D, H, W) in voxels.

        Returns:
            "points_vox", "points_mm": float32 [V, P, 3], the points in voxels of the crop (the centre of its first one
            is 0) and in world mm; "anatomy": float32 [V, P, C]; "has_anatomy": bool [V], false for a crop without any
            place in the patient, whose points lie anywhere and whose vectors are 0.
            With candidates also "match_vox", "match_mm": float32 [V, P, 3], the match of each point in the other crop;
            "match_weight": float32 [V, P].
        """
        num = max(self.request.num_points, self.request.num_candidates)
        drawn = [self._draw(rng, *crop, roi, num) for rng, *crop in zip(rngs, records, starts)]
        places_vox, places_mm, vectors, is_known = (np.stack(column) for column in zip(*drawn))
        points = slice(0, self.request.num_points)
        found = {
            "points_vox": places_vox[:, points],
            "points_mm": places_mm[:, points],
            "anatomy": vectors[:, points],
        }
        if self.request.num_candidates:
            found |= match_crops(places_vox, places_mm, vectors, self.request.num_points)
            found["match_weight"] *= is_known.all()
        entries = {name: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for name, value in found.items()}
        return entries | {"has_anatomy": torch.from_numpy(is_known)}

    def _draw(
        self, rng: np.random.Generator, record, start: np.ndarray, roi: Sequence[int], num: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.bool_]:
        """`num` places of one crop, uniform over its part inside of the patient: voxels, mm, vectors, if there are any.

        Where few draws lie inside, they are taken several times.
        """
        drawn = rng.random((DRAWS_PER_POINT * num, 3)) * roi - 0.5
        drawn_mm = index_to_world(record.affine, start + drawn)
        case = self.reader[record.name]
        hits = np.flatnonzero(case.inside(drawn_mm))
        chosen = hits[np.arange(num) % len(hits)] if len(hits) else np.arange(num)
        vectors = case.vectors(drawn_mm[chosen])
        return drawn[chosen], drawn_mm[chosen], vectors * np.float32(len(hits) > 0), np.bool_(len(hits) > 0)


def match_crops(
    places_vox: np.ndarray, places_mm: np.ndarray, vectors: np.ndarray, num_points: int
) -> dict[str, np.ndarray]:
    """Match the first `num_points` places of each of two crops to all places of the other.

    Args:
        places_vox, places_mm: [2, M, 3].
        vectors: unit vectors [2, M, C].

    Returns:
        "match_vox", "match_mm" [2, P, 3] and "match_weight" [2, P], see the module.
    """
    similarity = vectors[0] @ vectors[1].T  # [M, M]
    vox, mm, weights = [], [], []
    for own, other in ((0, 1), (1, 0)):
        forth = similarity if own == 0 else similarity.T
        match = forth[:num_points].argmax(axis=1)
        score = forth[np.arange(num_points), match]
        back = forth[:, match].argmax(axis=0)
        cycle_mm = np.linalg.norm(places_mm[own][back] - places_mm[own][:num_points], axis=1)
        vox.append(places_vox[other][match])
        mm.append(places_mm[other][match])
        weights.append(np.maximum(score, 0) / (1 + (cycle_mm / CYCLE_MM) ** 2))
    return {"match_vox": np.stack(vox), "match_mm": np.stack(mm), "match_weight": np.stack(weights)}

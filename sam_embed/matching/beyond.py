"""What a reference says of the places of a scan that it does not show.

Such a place lies beyond one of the reference's ends, and the map leads it there or farther. A label that does not come
near the end does not go on beyond it: kidneys that end well before the last slice are not found farther down. A label
that is cut there, as the aorta, goes on beyond the place where it is cut and not beside it. So nobody knows which label
a place beyond an end has, but of many labels that it has not this one.

Ends are the six faces of the box of the reference's body: number 2 * axis for the low one, 2 * axis + 1 for the high.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects
from scipy.spatial import cKDTree

from datasets.ct.geometry import index_to_world, mask_box, spacing_of, world_to_index
from sam_embed.matching.reference import Reference

NUM_FACES = 6
ENDS_MM = 8.0  # a label that ends nearer to an end may go on beyond it
BESIDE_MM = 24.0  # it goes on where it is cut, to within the error of a match at an end


class Beyond(NamedTuple):
    """The voxels of a scan's body that a reference does not show.

    Attributes:
        voxels: int [M], places in the flattened grid.
        places_mm: float32 [M, 3], where the map leads them to, world mm in the reference.
    """

    voxels: np.ndarray
    places_mm: np.ndarray


@dataclass(frozen=True, eq=False)
class Ends:
    """The ends of a reference, and the labels that are cut there.

    Attributes:
        first, last: the box of the reference's body in its embedding, [first, last) along each axis, voxels.
        affine: [4, 4], index in the embedding -> world mm.
        cuts: label -> the ends that it comes near -> its voxels there, world mm [N, 3]. Labels that come near none
            have none.
    """

    first: np.ndarray
    last: np.ndarray
    affine: np.ndarray
    cuts: dict[int, dict[int, np.ndarray]]

    @classmethod
    def of(cls, reference: Reference) -> "Ends":
        """The ends of a reference whose body is not empty."""
        first, last = mask_box(reference.embedding.body.numpy())
        found = cls(first, last, np.asarray(reference.embedding.fine_affine), {})
        for value, box in enumerate(find_objects(reference.labels.astype(np.int32)), start=1):
            if box is None:
                continue
            corner = np.array([part.start for part in box])
            points_mm = index_to_world(reference.affine, np.argwhere(reference.labels[box] == value) + corner)
            near = found._near(points_mm, spacing_of(reference.affine))
            found.cuts[value] = {face: points_mm[near[:, face]] for face in np.flatnonzero(near.any(axis=0)).tolist()}
        return found

    def _near(self, points_mm: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
        """Which ends each voxel of a label, world mm [N, 3] and its size, comes near; bool [N, 6]."""
        own_mm = np.array(spacing_of(self.affine))
        index = world_to_index(self.affine, points_mm) + 0.5  # 0 and n are the faces of a row of n voxels
        half, margin = np.array(spacing_mm) / (2 * own_mm), ENDS_MM / own_mm
        low, high = index - half < self.first + margin, index + half > self.last - margin
        return np.stack([low, high], axis=2).reshape(len(index), NUM_FACES)

    def nearest(self, places_mm: np.ndarray) -> np.ndarray:
        """The end, uint8 [M], that each place [M, 3], world mm in the reference, is nearest to.

        Nearness is measured from the middle, in half widths of the box.
        """
        middle, half = (self.first + self.last - 1) / 2, (self.last - self.first) / 2
        relative = (world_to_index(self.affine, places_mm) - middle) / half
        axis = np.abs(relative).argmax(axis=1)
        is_high = np.take_along_axis(relative, axis[:, None], axis=1)[:, 0] > 0
        return (2 * axis + is_high).astype(np.uint8)

    def moved_in(self, places_mm: np.ndarray) -> np.ndarray:
        """Places [M, 3], world mm in the reference, moved into the box: maps go on beyond it, more or less."""
        index = np.clip(world_to_index(self.affine, places_mm), self.first - 0.5, self.last - 0.5)
        return index_to_world(self.affine, index)


def excluded(ends: Sequence[Ends], beyond: Sequence[Beyond], reach: np.ndarray) -> dict[int, np.ndarray]:
    """Label -> bool [D, H, W], where no reference shows the place and one of them says that it has not this label.

    Args:
        ends, beyond: of each reference.
        reach: [D, H, W], more than 0 where a reference shows the place.
    """
    found: dict[int, np.ndarray] = {}
    for reference, (voxels, places_mm) in zip(ends, beyond):
        faces, at_end_mm = reference.nearest(places_mm), reference.moved_in(places_mm)
        for value, cut in reference.cuts.items():
            may_lie = np.zeros(len(voxels), dtype=bool)
            for face, points_mm in cut.items():
                asked = np.flatnonzero(faces == face)
                distance_mm, _ = cKDTree(points_mm).query(at_end_mm[asked], distance_upper_bound=BESIDE_MM)
                may_lie[asked] = np.isfinite(distance_mm)
            mask = found.setdefault(value, np.zeros(reach.size, dtype=bool))
            mask[voxels] |= ~may_lie
    return {value: mask.reshape(reach.shape) & (reach == 0) for value, mask in found.items()}

"""What a reference says of the places of a scan that it does not show.

Such a place lies beyond one of the reference's ends, and the map leads it there or farther. A label that does not come
near the end does not go on beyond it: kidneys that end well before the last slice are not found farther down. A label
that is cut there, as the aorta, goes on beyond the place where it is cut and not beside it. So nobody knows which label
a place beyond an end has, but of many labels that it has not this one.

Ends are the six faces of the box of the reference's body: number 2 * axis for the low one, 2 * axis + 1 for the high.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects
from scipy.spatial import cKDTree

from datasets.ct.geometry import index_to_world, mask_box, spacing_of, world_to_index
from sam_embed.embeddings.embedding_store import Embedding

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


def nearest_faces(reference: Embedding, places_mm: np.ndarray) -> np.ndarray:
    """The end, uint8 [M], of the reference's box that each place [M, 3], world mm in the reference, is nearest to.

    Nearness is measured from the middle, in half widths of the box.
    """
    first, last = mask_box(reference.body.numpy())
    middle, half = (first + last - 1) / 2, (last - first) / 2
    relative = (world_to_index(reference.fine_affine, places_mm) - middle) / half
    axis = np.abs(relative).argmax(axis=1)
    is_high = np.take_along_axis(relative, axis[:, None], axis=1)[:, 0] > 0
    return (2 * axis + is_high).astype(np.uint8)


def at_the_end(reference: Embedding, places_mm: np.ndarray) -> np.ndarray:
    """Places [M, 3], world mm in the reference, moved into the box of its body: maps go on beyond it, more or less."""
    first, last = mask_box(reference.body.numpy())
    index = np.clip(world_to_index(reference.fine_affine, places_mm), first - 0.5, last - 0.5)
    return index_to_world(reference.fine_affine, index)


def cuts(reference: Embedding, labels: np.ndarray, affine: np.ndarray) -> dict[int, dict[int, np.ndarray]]:
    """Label -> the ends that it comes near -> its voxels there, world mm [N, 3]. Labels that come near none have none.

    Args:
        labels: [D, H, W], whole numbers; affine: index in them -> world mm.
    """
    margin = ENDS_MM / np.array(spacing_of(reference.fine_affine))
    first, last = mask_box(reference.body.numpy())
    found: dict[int, dict[int, np.ndarray]] = {}
    for value, box in enumerate(find_objects(labels.astype(np.int32)), start=1):
        if box is None:
            continue
        corner = np.array([part.start for part in box])
        points_mm = index_to_world(affine, np.argwhere(labels[box] == value) + corner)
        index = world_to_index(reference.fine_affine, points_mm) + 0.5  # 0 and n are the faces of a row of n voxels
        half = spacing_of(affine) / (2 * np.array(spacing_of(reference.fine_affine)))  # of a label's voxel
        low, high = index - half < first + margin, index + half > last - margin
        near = np.stack([low, high], axis=2).reshape(len(index), NUM_FACES)
        found[value] = {face: points_mm[near[:, face]] for face in np.flatnonzero(near.any(axis=0)).tolist()}
    return found


def excluded(
    references: Sequence[tuple[Embedding, np.ndarray, np.ndarray]], beyond: Sequence[Beyond], reach: np.ndarray
) -> dict[int, np.ndarray]:
    """Label -> bool [D, H, W], where no reference shows the place and one of them says that it has not this label.

    Args:
        references: embedding, labels and their affine of each.
        beyond: of each reference.
        reach: [D, H, W], more than 0 where a reference shows the place.
    """
    found: dict[int, np.ndarray] = {}
    for reference, (voxels, places_mm) in zip(references, beyond):
        faces, ends_mm = nearest_faces(reference[0], places_mm), at_the_end(reference[0], places_mm)
        for value, ends in cuts(*reference).items():
            may_lie = np.zeros(len(voxels), dtype=bool)
            for face, points_mm in ends.items():
                asked = np.flatnonzero(faces == face)
                distance_mm, _ = cKDTree(points_mm).query(ends_mm[asked], distance_upper_bound=BESIDE_MM)
                may_lie[asked] = np.isfinite(distance_mm)
            mask = found.setdefault(value, np.zeros(reach.size, dtype=bool))
            mask[voxels] |= ~may_lie
    return {value: mask.reshape(reach.shape) & (reach == 0) for value, mask in found.items()}

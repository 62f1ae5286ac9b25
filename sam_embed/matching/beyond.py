"""What a reference says of the places of a scan that it does not show.

Such a place lies beyond one of the reference's ends, the one that the map leads it to. A label that does not come near
this end does not go on beyond it: kidneys that end well before the last slice are not found farther down, while an
aorta that is cut there goes on. So nobody knows which label a place beyond an end has, but for many labels that it has
not this one.

Ends are the six faces of the box of the reference's body: number 2 * axis for the low one, 2 * axis + 1 for the high.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects

from datasets.ct.geometry import mask_box, spacing_of, world_to_index
from sam_embed.embeddings.embedding_store import Embedding

NUM_FACES = 6
ENDS_MM = 8.0  # a label that ends nearer to an end may go on beyond it


class Beyond(NamedTuple):
    """The voxels of a scan's body that a reference does not show.

    Attributes:
        voxels: int [M], places in the flattened grid.
        faces: uint8 [M], the end that each lies beyond.
    """

    voxels: np.ndarray
    faces: np.ndarray


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


def faces_reached(reference: Embedding, labels: np.ndarray, affine: np.ndarray) -> dict[int, np.ndarray]:
    """Label -> bool [6], which ends of the reference's box it comes near.

    Args:
        labels: [D, H, W], whole numbers; affine: index in them -> world mm.
    """
    body = reference.body.numpy()
    margin = ENDS_MM / np.array(spacing_of(reference.fine_affine))
    first, last = mask_box(body)
    to_index = np.linalg.inv(reference.fine_affine) @ affine
    reached = {}
    for value, box in enumerate(find_objects(labels.astype(np.int32)), start=1):
        if box is not None:
            corners = np.array(list(itertools.product(*((part.start - 0.5, part.stop - 0.5) for part in box))))
            at = corners @ to_index[:3, :3].T + to_index[:3, 3] + 0.5  # 0 and n are the faces of a row of n voxels
            low, high = at.min(axis=0) < first + margin, at.max(axis=0) > last - margin
            reached[value] = np.stack([low, high], axis=1).ravel()
    return reached


def excluded(
    reached: Sequence[Mapping[int, np.ndarray]], beyond: Sequence[Beyond], reach: np.ndarray
) -> dict[int, np.ndarray]:
    """Label -> bool [D, H, W], where no reference shows the place and one of them says that it has not this label.

    Args:
        reached: of `faces_reached`, for each reference; beyond: likewise.
        reach: [D, H, W], more than 0 where a reference shows the place.
    """
    found: dict[int, np.ndarray] = {}
    for ends, (voxels, faces) in zip(reached, beyond):
        for value, is_reached in ends.items():
            mask = found.setdefault(value, np.zeros(reach.size, dtype=bool))
            mask[voxels] |= ~is_reached[faces]
    return {value: mask.reshape(reach.shape) & (reach == 0) for value, mask in found.items()}

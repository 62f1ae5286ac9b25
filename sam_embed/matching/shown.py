"""Which places of a scan another volume shows at all, and carrying labels to those alone.

Every place of the other volume is mapped to the scan (`sam_embed.matching.dense`). A place of the scan with none of
them near it is not shown there. The opposite map cannot tell: it finds a most similar place for everything, and moves
what lies beyond the other volume's ends onto those ends.
"""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from datasets.ct.geometry import index_to_world, resampled_grid
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.carry import BACKGROUND, Carried, Reference, carry_labels
from sam_embed.matching.dense import Nodes, make_nodes, map_nodes

NODE_MM = 8.0
NEAR_MM = 16.0  # two nodes: mapped places lie about a node apart, more where the scan's patient is larger


def is_shown(scan: Nodes, other: Nodes, points_mm: np.ndarray) -> np.ndarray:
    """bool [N]: whether a place of the other volume's body is mapped to within 16 mm of each point.

    Args:
        scan, other: nodes about 8 mm apart, by the same weights (`make_nodes`).
        points_mm: [N, 3], world mm in the scan.

    Raises:
        ValueError: no body in one of them.
    """
    tree = cKDTree(map_nodes(other, scan).places_mm[other.body])
    return np.isfinite(tree.query(points_mm, distance_upper_bound=NEAR_MM)[0])


def carry_shown_labels(
    scan: Embedding, references: Sequence[Reference], shape: Sequence[int], affine: np.ndarray
) -> Carried:
    """`carry_labels`, with background and no confidence where no reference shows the place.

    Args:
        scan: embedding of the scan.
        references: one or more.
        shape, affine: the grid to label, (D, H, W) and index -> world mm, parallel to `Volume`s.

    Raises:
        ValueError: as `carry_labels`.
    """
    carried = carry_labels(scan, references, shape, affine)
    wide_shape, wide_affine = resampled_grid(shape, affine, (NODE_MM,) * 3)
    index = np.stack(np.meshgrid(*map(np.arange, wide_shape), indexing="ij"), axis=-1)
    points_mm = index_to_world(wide_affine, index.reshape(-1, 3))
    nodes = make_nodes(scan, NODE_MM)
    shown = np.zeros(len(points_mm), dtype=bool)
    for reference in references:
        shown |= is_shown(nodes, make_nodes(reference.embedding, NODE_MM), points_mm)
    nearest = [np.arange(size) * few // size for size, few in zip(shape, wide_shape)]
    is_empty = ~shown.reshape(wide_shape)[np.ix_(*nearest)]
    carried.labels[is_empty] = BACKGROUND
    carried.confidence[is_empty] = 0
    return carried

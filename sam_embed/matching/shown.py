"""Which places of a scan another volume shows at all.

Every place of the other volume is mapped to the scan (`sam_embed.matching.dense`). A place of the scan with none of
them near it is not shown there. The opposite map cannot tell: it finds a most similar place for everything, and moves
what lies beyond the other volume's ends onto those ends.
"""

import numpy as np
from scipy.spatial import cKDTree

from sam_embed.matching.dense import Nodes, map_nodes

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

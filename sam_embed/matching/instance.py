"""Instance optimisation: the last, continuous step of dense matching, after the search among nodes.

As in ConvexAdam (Siebert et al., IEEE TMI 44(2), 2025; with SAM's vectors: Li et al., "SAMConvex", MICCAI 2023), a
correction u of the map p minimises by Adam, for the pair at hand and nothing else,

    mean over the body of  1 - similarity(x, p(x) + u(x))   +   SMOOTHNESS * mean |gradient of u|^2

u lies on a grid with half as many nodes along each axis and is interpolated linearly between them. Similarities are
interpolated linearly between the reference's nodes, which is the similarity to a linearly interpolated vector: they are
looked up once around each place, and the iterations touch no vector.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from datasets.ct.geometry import index_to_world, world_to_index
from sam_embed.matching.nodes import Nodes, window_cost

NUM_ITERATIONS = 20
STEP_NODES = 0.05  # Adam's learning rate
SMOOTHNESS = 0.05  # of differences between neighbours of the half grid, in squared nodes
RADIUS = 1  # nodes: what lies farther away is not seen
OFFSETS = np.array(list(itertools.product(range(-RADIUS, RADIUS + 1), repeat=3)))


def optimised(scan: Nodes, reference: Nodes, displacement: np.ndarray) -> np.ndarray:
    """Correct a map by up to a node.

    Args:
        scan, reference: with vectors of the same network.
        displacement: [d, h, w, 3], mm from each node of the scan to its place in the reference.

    Returns:
        The better displacement [d, h, w, 3], mm.
    """
    rows = np.flatnonzero(scan.body)
    places = world_to_index(reference.affine, (scan.points_mm + displacement).reshape(-1, 3))
    centre = np.rint(places[rows]).astype(np.int64)
    width = 2 * RADIUS + 1
    cost = window_cost(scan.vectors[rows], reference, centre, OFFSETS).reshape(-1, 1, width, width, width)
    start = torch.from_numpy(((places[rows] - centre) / RADIUS).astype(np.float32))  # -1 to 1: the window's nodes
    inside = torch.from_numpy(rows)
    correction = torch.zeros(1, 3, *((size + 1) // 2 for size in scan.shape), requires_grad=True)
    adam = torch.optim.Adam([correction], lr=STEP_NODES)

    def on_nodes() -> torch.Tensor:
        return F.interpolate(correction, size=scan.shape, mode="trilinear", align_corners=True)[0].flatten(1).T

    with torch.enable_grad():
        for _ in range(NUM_ITERATIONS):
            adam.zero_grad()
            grid = (start + on_nodes()[inside] / RADIUS).flip(-1).view(-1, 1, 1, 1, 3)
            miss = F.grid_sample(cost, grid, align_corners=True, padding_mode="border").mean()
            bending = sum((correction.diff(dim=axis) ** 2).mean() for axis in (2, 3, 4) if correction.shape[axis] > 1)
            (miss + SMOOTHNESS * bending).backward()
            adam.step()
    moved = places + on_nodes().detach().double().numpy()
    return index_to_world(reference.affine, moved).reshape(*scan.shape, 3) - scan.points_mm

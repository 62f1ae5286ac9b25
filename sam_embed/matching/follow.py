"""Following points into another scan: where each one lies there, and whether to believe it.

Each point is matched together with its neighbours (`sam_embed.matching.consensus`), and back. Score, cycle error and
spread decide whether the match is trusted. A point whose match is not trusted may have no right place at all: the other
scan may not show that part of the body.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from datasets.lists.points import NamedPoints
from datasets.samples.correspondences import ANY_MM, within
from datasets.samples.pairings import PairingOptions
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.carry import NODE_MM
from sam_embed.matching.consensus import match_with_neighbours
from sam_embed.matching.dense import DenseMap, is_shown, map_nodes
from sam_embed.matching.match import cycle_error_mm, describe_box, inside
from sam_embed.matching.mine import MiningOptions, lies_in_body
from sam_embed.matching.nodes import Nodes, make_nodes

TRUSTED, DOUBTFUL, OUTSIDE = "trusted", "doubtful", "outside"


@dataclass(frozen=True)
class FollowOptions:
    """Which matches are trusted; its fields are flags.

    Attributes:
        min_score: lowest score of a trusted match, -1 to 1; -1 = any
        max_cycle_mm: largest distance from a point to the place that its match is matched back to, mm; 1e6 = any
        max_spread_mm: largest disagreement of the matches of a point's neighbours about its place, mm; 1e6 = any
        consensus_mm: distance of the neighbours that are matched too and decide where a match lies, mm; 0 = off
    """

    min_score: float = PairingOptions.min_score
    max_cycle_mm: float = PairingOptions.max_cycle_mm
    max_spread_mm: float = PairingOptions.max_spread_mm
    consensus_mm: float = MiningOptions.consensus_mm

    def __post_init__(self) -> None:
        if min(self.max_cycle_mm, self.max_spread_mm, self.consensus_mm) < 0:
            raise ValueError(
                "expected --max_cycle_mm, --max_spread_mm and --consensus_mm of 0 or more, received "
                f"{self.max_cycle_mm:g}, {self.max_spread_mm:g} and {self.consensus_mm:g}"
            )
        if not self.consensus_mm and self.max_spread_mm < ANY_MM:
            raise ValueError(
                f"--max_spread_mm {self.max_spread_mm:g} needs --consensus_mm above 0: only neighbours measure a spread"
            )


class Followed(NamedTuple):
    """N points in another scan.

    Attributes:
        points_mm: float64 [N, 3], world mm; NaN where the verdict is "outside".
        score: float32 [N], similarity of the best place, -1 to 1.
        cycle_mm: float64 [N], distance from the point to the place that its match is matched back to; NaN where the
            match lies outside of the other patient.
        spread_mm: float64 [N], disagreement of the neighbours; NaN where it was not measured.
        verdict: N texts: "trusted", "doubtful" or "outside".
    """

    points_mm: np.ndarray
    score: np.ndarray
    cycle_mm: np.ndarray
    spread_mm: np.ndarray
    verdict: np.ndarray

    def describe(self, number: int) -> str:
        """One point's verdict and what it rests on."""
        spread = f", spread {self.spread_mm[number]:.1f} mm" if np.isfinite(self.spread_mm[number]) else ""
        cycle = f", cycle {self.cycle_mm[number]:.1f} mm" if np.isfinite(self.cycle_mm[number]) else ""
        return f"{self.verdict[number]}, score {self.score[number]:.2f}{cycle}{spread}"


class Follower:
    """Finds points of one scan in another; the dense map that some verdicts need is made once, for the first of them.

    Args:
        query, key: embeddings by the same weights.
        options: which matches are trusted.
    """

    def __init__(self, query: Embedding, key: Embedding, options: FollowOptions = FollowOptions()) -> None:
        self.query, self.key, self.options = query, key, options

    @cached_property
    def key_map(self) -> tuple[Nodes, DenseMap]:
        """The key's nodes, and where each of them lies in the query: shows which part of the body the key has."""
        nodes = make_nodes(self.key, NODE_MM)
        return nodes, map_nodes(nodes, make_nodes(self.query, NODE_MM))

    def follow(self, points_mm: np.ndarray) -> Followed:
        """Find points [N, 3], world mm in the query, inside of its embedded box (`check_inside`).

        Raises:
            ValueError: embeddings by different weights, or without a body.
        """
        query, key, options = self.query, self.key, self.options
        matches, spread_mm = match_with_neighbours(query, key, points_mm, options.consensus_mm)
        cycle_mm = cycle_error_mm(query, key, points_mm, matches)
        is_trusted = (matches.score >= options.min_score) & lies_in_body(key, matches.points_mm)
        is_trusted &= within(cycle_mm, options.max_cycle_mm) & within(spread_mm, options.max_spread_mm)
        is_outside = ~inside(key, matches.points_mm)
        if not is_trusted.all():
            is_outside |= ~is_trusted & ~is_shown(*self.key_map, points_mm)
        verdict = np.where(is_outside, OUTSIDE, np.where(is_trusted, TRUSTED, DOUBTFUL))
        places_mm = np.where(is_outside[:, None], np.nan, matches.points_mm)
        return Followed(places_mm, matches.score, cycle_mm, spread_mm, verdict)


def follow_points(
    query: Embedding, key: Embedding, points_mm: np.ndarray, options: FollowOptions = FollowOptions()
) -> Followed:
    """Find points of one scan in another, once; as `Follower.follow`."""
    return Follower(query, key, options).follow(points_mm)


def check_inside(query: Embedding, points: NamedPoints) -> None:
    """Check that points lie in the patient's box.

    Raises:
        ValueError: some do not; the message names them.
    """
    beyond = np.flatnonzero(~inside(query, points.points_mm))
    if len(beyond):
        place = ", ".join(f"{value:g}" for value in points.points_mm[beyond[0]])
        others = f", nor do {len(beyond) - 1} others" if len(beyond) > 1 else ""
        raise ValueError(
            f"{points.path}: the point {points.names[beyond[0]]!r} ({place}) does not lie in the patient of "
            f"{query.name}{others}. The patient fills {describe_box(query)} (RAS+). Do --points and --query belong "
            "together, and are x and y in RAS+, not in LPS?"
        )

"""Following points: places in another patient, verdicts by the thresholds, and what the other scan does not show."""

import numpy as np
import pytest

from datasets.ct.geometry import index_to_world
from datasets.lists.points import NamedPoints
from datasets.samples.correspondences import ANY_MM
from sam_embed.matching import follow
from sam_embed.matching.follow import (
    DOUBTFUL,
    OUTSIDE,
    TRUSTED,
    Follower,
    FollowOptions,
    check_inside,
    follow_points,
)
from tests.sam_fakes import AFFINE, ATLAS_LANDMARKS_MM, SHAPE, lower_part, patient_embedding, patient_landmarks

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = tuple(ATLAS_LANDMARKS_MM)


def landmarks(seed: int) -> np.ndarray:
    return np.array([patient_landmarks(seed)[name] for name in NAMES])


@pytest.mark.parametrize("consensus_mm", [20.0, 0.0])
def test_points_are_found_and_trusted(consensus_mm):
    options = FollowOptions(consensus_mm=consensus_mm)
    found = follow_points(patient_embedding(1), patient_embedding(2), landmarks(1), options)
    assert found.verdict.tolist() == [TRUSTED] * len(NAMES)
    assert np.linalg.norm(found.points_mm - landmarks(2), axis=1).max() < 4
    assert np.isfinite(found.spread_mm).all() == bool(consensus_mm)


@pytest.mark.parametrize("strict", [{"min_score": 0.9999}, {"max_cycle_mm": 0.0}, {"max_spread_mm": 0.0}])
def test_each_threshold_makes_points_doubtful(strict):
    """The place is still given."""
    few = landmarks(1)[:2]
    found = follow_points(patient_embedding(1), patient_embedding(2), few, FollowOptions(**strict))
    assert found.verdict.tolist() == [DOUBTFUL] * 2
    assert np.linalg.norm(found.points_mm - landmarks(2)[:2], axis=1).max() < 4


def test_what_the_key_does_not_show_is_outside():
    key = lower_part(2, SHAPE[0] // 2)
    top_mm = index_to_world(AFFINE, [SHAPE[0] // 2 - 0.5, 0, 0])[2]
    found = follow_points(patient_embedding(1), key, landmarks(1))
    above_mm = landmarks(2)[:, 2] - top_mm
    assert (above_mm > 24).any() and (above_mm < -16).any()
    assert set(found.verdict[above_mm > 24]) == {OUTSIDE} and np.isnan(found.points_mm[above_mm > 24]).all()
    assert set(found.verdict[above_mm < -16]) == {TRUSTED}


def test_a_follower_maps_the_key_once_and_only_for_points_that_are_not_trusted(monkeypatch):
    num_maps = []
    map_nodes = follow.map_nodes
    monkeypatch.setattr(follow, "map_nodes", lambda *nodes: num_maps.append(1) or map_nodes(*nodes))
    follower = Follower(patient_embedding(1), lower_part(2, SHAPE[0] // 2))
    lowest, highest = landmarks(1)[np.argsort(landmarks(1)[:, 2])[[0, -1]], None]
    assert follower.follow(lowest).verdict == [TRUSTED] and not num_maps
    assert [follower.follow(highest).verdict for _ in range(2)] == [[OUTSIDE]] * 2 and len(num_maps) == 1


def test_points_beside_the_patient_are_named():
    points = NamedPoints(("liver", "lost"), np.array([landmarks(1)[0], [0, 0, 9000.0]]), "lesions.csv")
    with pytest.raises(
        ValueError, match=r"lesions.csv: the point 'lost' \(0, 0, 9000\) .* patient1. The patient fills"
    ):
        check_inside(patient_embedding(1), points)


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(ValueError, match="--max_cycle_mm"):
        FollowOptions(max_cycle_mm=-1)
    with pytest.raises(ValueError, match="--max_spread_mm 5 needs --consensus_mm above 0"):
        FollowOptions(max_spread_mm=5, consensus_mm=0)
    assert FollowOptions(max_spread_mm=ANY_MM, consensus_mm=0).consensus_mm == 0

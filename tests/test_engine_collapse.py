"""Warnings of collapse: on the values of runs that were made to collapse, silent on those that were not."""

import math

import pytest

from losses.collapse import NUM_READINGS, CollapseWatch, collapse_warnings

# Means over 30 steps of the runs that the thresholds were found by, K = 128: entropy, KL (both in nats), feature_std,
# CASA's cosines.
NAMES = ("teacher_entropy_share", "teacher_kl_share", "feature_std", "casa_cos_right", "casa_cos_shuffled")
LARGEST = math.log(128)
HEALTHY = [
    (4.8078, 0.0229, 0.516, 0.133, -0.050),
    (4.7604, 0.0047, 0.605, 0.074, 0.019),
    (4.719, 0.012, 0.617, 0.223, -0.098),
]
COLLAPSED = {
    "collapse to uniform": (4.852, 0.0, 0.188, 0.10, 0.0),
    "collapse to one output": (0.0, 4.824, 0.283, 0.134, 0.003),
    "collapse of features": (2.787, 1.90, 0.0001, 0.10, 0.0),
    "CASA ignores the view": (4.7, 0.01, 0.5, -0.033, 0.006),
}


def reading(values: tuple) -> dict[str, float]:
    entropy, divergence, *others = values
    return dict(zip(NAMES, (entropy / LARGEST, divergence / LARGEST, *others)))


@pytest.mark.parametrize("values", HEALTHY)
def test_healthy_runs_are_left_alone(values):
    assert collapse_warnings(reading(values)) == []


@pytest.mark.parametrize("kind", COLLAPSED)
def test_each_collapse_is_named_with_its_value_and_a_remedy(kind):
    (warning,) = collapse_warnings(reading(COLLAPSED[kind]))
    assert warning.startswith(kind + ":") and "--" in warning


def test_thresholds_hold_for_every_width_and_absent_monitors_are_not_judged():
    assert collapse_warnings({"teacher_entropy_share": 4.852 / math.log(512)}) == []
    assert collapse_warnings({"teacher_entropy_share": 6.2380 / math.log(512)})
    assert collapse_warnings({"loss_recon": 0.1}) == []


def test_predictions_that_are_one_point_are_named():
    assert collapse_warnings({"collapse": 0.6}) == []
    (warning,) = collapse_warnings({"collapse": 0.95})
    assert warning.startswith("collapse of predictions:") and "--" in warning


def test_a_kind_is_told_once_when_it_has_stood_and_anew_when_it_returns():
    watch = CollapseWatch()
    bad, good = reading(COLLAPSED["collapse to uniform"]), reading(HEALTHY[0])
    told = [len(watch(bad)) for _ in range(NUM_READINGS + 3)]
    assert told == [0] * (NUM_READINGS - 1) + [1, 0, 0, 0]
    assert watch(good) == []
    assert [len(watch(bad)) for _ in range(NUM_READINGS)][-1] == 1

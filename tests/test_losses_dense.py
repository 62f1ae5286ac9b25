"""Losses at single points, against obvious loops and numbers found by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses.dense import (
    contrast_errors,
    coordinate_errors,
    cosine_errors,
    mean_over_points,
    nearest_share,
)


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cosine_errors_by_hand():
    predicted = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    targets = torch.tensor([[[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]]])
    torch.testing.assert_close(cosine_errors(predicted, targets), torch.tensor([[0.0, 2.0, 1 - math.sqrt(0.5)]]))


def test_coordinate_errors_by_hand():
    errors = coordinate_errors(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 5.0]]]))
    torch.testing.assert_close(errors, torch.tensor([[4.5]]))


def test_contrast_leaves_out_near_places_and_no_others():
    predicted, targets = random_rows(2, 7, 5), random_rows(2, 7, 5, seed=1)
    places_mm = 30 * random_rows(2, 7, 3, seed=2)
    errors = contrast_errors(predicted, targets, places_mm, temperature=0.2, near_mm=40.0)
    num_left_out = 0
    for row in range(2):
        for i in range(7):
            logits = {}
            for j in range(7):
                is_near = math.dist(places_mm[row, i].tolist(), places_mm[row, j].tolist()) < 40.0
                num_left_out += is_near and i != j
                if i == j or not is_near:
                    logits[j] = F.cosine_similarity(predicted[row, i], targets[row, j], dim=0).item() / 0.2
            expected = math.log(sum(math.exp(value) for value in logits.values())) - logits[i]
            assert errors[row, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < num_left_out < 2 * 7 * 6


def test_repeated_places_are_no_negatives():
    """A crop with little of the patient gives the same place several times."""
    errors = contrast_errors(random_rows(1, 4, 5), random_rows(1, 4, 5, seed=1), torch.zeros(1, 4, 3), 0.1, 20.0)
    torch.testing.assert_close(errors, torch.zeros(1, 4))


def test_mean_over_points_weighs_points_within_rows_and_rows_alike():
    errors = torch.tensor([[1.0, 3.0], [5.0, 100.0], [7.0, 7.0]])
    weights = torch.tensor([[1.0, 3.0], [2.0, 0.0], [0.0, 0.0]])
    assert mean_over_points(errors, weights).item() == pytest.approx((2.5 + 5.0 + 0.0) / 3)


def test_a_row_without_weight_gets_no_gradient():
    errors = torch.ones(2, 3, requires_grad=True)
    mean_over_points(errors, torch.tensor([[1.0, 1, 1], [0, 0, 0]])).backward()
    assert errors.grad[0].tolist() == pytest.approx([1 / 6] * 3) and not errors.grad[1].any()


def test_nearest_share_counts_points_with_weight():
    targets = torch.eye(4)[None]
    predicted = targets[:, [0, 1, 3, 2]]
    assert nearest_share(predicted, targets, torch.ones(1, 4)).item() == 0.5
    assert nearest_share(predicted, targets, torch.tensor([[1.0, 1, 0, 1]])).item() == pytest.approx(2 / 3)
    assert nearest_share(predicted, targets, torch.zeros(1, 4)).item() == 0


def test_half_precision_is_widened():
    predicted, targets = random_rows(1, 3, 4).half(), random_rows(1, 3, 4, seed=1).half()
    for errors in (cosine_errors(predicted, targets), coordinate_errors(predicted, targets)):
        assert errors.dtype == torch.float32

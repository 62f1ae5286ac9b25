"""Votes sharpened by intensities: edges follow the scan, whatever its HU, and no vote is lost or made."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from sam_embed.matching import intensity
from sam_embed.matching.carry import carry_labels
from sam_embed.matching.intensity import sharpened, shrunk
from tests.sam_fakes import AFFINE, SHAPE, atlas_labels, dice, patient_embedding
from tests.test_sam_embed_carry import reference

GRID = (24, 28, 32)
SPACING_MM = (3.0, 3.0, 3.0)


def ball(centre: tuple[int, int, int], radius: float) -> np.ndarray:
    places = np.moveaxis(np.indices(GRID), 0, -1)
    return np.linalg.norm(places - np.array(centre), axis=-1) < radius


def shifted_votes(truth: np.ndarray, voxels: int) -> np.ndarray:
    """Blurred votes for a label that lies so many voxels off, half of them trusted."""
    wrong = gaussian_filter(np.roll(truth, voxels, axis=2).astype(np.float32), 1.0)
    return 0.5 * np.stack([1 - wrong, wrong])


@pytest.mark.parametrize("organ_hu", [-40.0, 60.0, 250.0])
def test_a_label_moves_to_the_voxels_that_look_like_it(organ_hu):
    truth = ball((12, 14, 16), 7)
    rng = np.random.default_rng(0)
    hu = np.where(truth, organ_hu, 120.0) + rng.normal(0, 15, GRID)
    votes = shifted_votes(truth, 3)
    before, after = (dice(each.argmax(0) == 1, truth) for each in (votes, sharpened(votes, hu, SPACING_MM)))
    assert before < 0.75 and after > 0.93


@pytest.mark.parametrize("blur", [1.5, 2.5])
def test_a_small_organ_in_fat_is_not_taken_for_fat(blur):
    """Three quarters of the votes for it lie beside it."""
    truth = ball((12, 14, 16), 2.5)
    hu = np.where(truth | ball((12, 14, 29), 3), 30.0, -90.0) + np.random.default_rng(0).normal(0, 15, GRID)
    near = gaussian_filter(np.roll(truth, 3, axis=2).astype(np.float32), blur)
    near *= 0.9 / near.max()
    votes = np.stack([1 - near, near])
    assert dice(votes.argmax(0) == 1, truth) < 0.4
    assert dice(sharpened(votes, hu, SPACING_MM).argmax(0) == 1, truth) > 0.9


def test_votes_are_shared_out_anew_and_none_is_made():
    truth = ball((12, 14, 16), 7)
    votes = shifted_votes(truth, 2)
    votes[:, :, :, :6] = 0  # where nobody voted
    found = sharpened(votes, np.where(truth, 200.0, 0.0), SPACING_MM)
    assert found.dtype == np.float32 and found.min() >= 0
    np.testing.assert_allclose(found.sum(0), votes.sum(0), atol=1e-6)


def test_boxes_of_labels_give_what_whole_volumes_give(monkeypatch):
    """Several labels of different sizes, one that nobody voted for, one at the border, voxels without votes."""
    labels = np.zeros(GRID, dtype=int)
    for label, centre, radius in ((1, (12, 14, 20), 6), (2, (5, 6, 8), 2), (4, (12, 25, 0), 4)):
        labels[ball(centre, radius)] = label
    votes = np.stack([gaussian_filter((labels == label).astype(np.float32), 1.0) for label in range(5)])
    votes[votes < 0.01] = 0
    votes[:, :, :3] = 0
    hu = 40.0 * labels + np.random.default_rng(3).normal(0, 20, GRID)
    found = sharpened(votes, hu, (3.0, 2.5, 4.0))
    whole = tuple(slice(0, size) for size in GRID)
    monkeypatch.setattr(intensity, "_grown", lambda *box_and_margin: whole)
    np.testing.assert_allclose(found, sharpened(votes, hu, (3.0, 2.5, 4.0)), atol=1e-6)
    assert np.abs(found - votes).max() > 0.02


def test_intensities_that_say_nothing_change_little_and_no_votes_nothing():
    truth = ball((12, 14, 16), 7)
    votes = shifted_votes(truth, 0)
    noise = 40 + np.random.default_rng(1).normal(0, 20, GRID)
    assert dice(sharpened(votes, noise, SPACING_MM).argmax(0) == 1, truth) > 0.8
    nobody = np.stack([np.ones(GRID, np.float32), np.zeros(GRID, np.float32)])
    assert np.array_equal(sharpened(nobody, np.zeros(GRID), SPACING_MM), nobody)


def test_intensities_on_a_coarser_grid_are_means_over_the_same_box():
    hu = np.arange(4 * 6 * 8, dtype=np.int16).reshape(4, 6, 8)
    expected = hu.reshape(2, 2, 3, 2, 4, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(shrunk(hu, (2, 3, 4)), expected)


def test_carried_labels_follow_the_scan():
    """Intensities that show organ 1 where it is, and votes of one reference whose labels lie 16 mm off."""
    scan, good = patient_embedding(1), reference(2)
    truth = atlas_labels(1) == 1
    off = type(good)(good.embedding, np.roll(good.labels, 2, axis=1), good.affine)
    hu = np.where(truth, 150, 20).astype(np.int16)
    plain = carry_labels(scan, [off], SHAPE, AFFINE)
    found = carry_labels(scan, [off], SHAPE, AFFINE, hu=hu)
    assert dice(found.labels == 1, truth) > dice(plain.labels == 1, truth) + 0.1
    with pytest.raises(ValueError, match="do not fit the grid"):
        carry_labels(scan, [off], SHAPE, AFFINE, hu=hu[:4])

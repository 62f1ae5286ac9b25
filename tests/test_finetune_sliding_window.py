"""Sliding windows against MONAI's and the obvious way, restoring to other grids, metrics, tables and pictures."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from datasets.lists.label_classes import FLARE22
from engine.segmentation.flags import EvaluationOptions
from engine.segmentation.metrics import OrganScore, case_means, published_slice_dice, score_case
from engine.segmentation.pictures import case_view, richest_plane, save_overlay
from engine.segmentation.report import join_reports, read_scores, summarise, write_joined, write_report
from engine.segmentation.sliding_window import (
    WindowOptions,
    axis_map,
    blend_weights,
    probability_slices,
    restored_labels,
    segment_volume,
    window_starts,
)

CPU = torch.device("cpu")
NAMES = ("background", "liver", "aorta")


def shift_network(x: torch.Tensor) -> torch.Tensor:
    """Logits [B, 3, ...] that depend on the place within the window, so that blending shows."""
    ramp = torch.linspace(0, 2, x.shape[2]).view(1, 1, -1, 1, 1)
    return torch.cat([x + ramp, 2 * x - ramp, 1 - x * ramp], dim=1)


def hu_volume(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(-200, 300, shape, dtype=np.int16)


# Windows


@pytest.mark.parametrize(
    ("size", "side", "overlap"), [(10, 4, 0.5), (11, 4, 0.0), (4, 4, 0.5), (3, 4, 0.5), (97, 96, 0.25)]
)
def test_windows_cover_an_axis_and_overlap_as_asked(size, side, overlap):
    starts = window_starts(size, side, overlap)
    assert starts[0] == 0 and starts == sorted(set(starts))
    if size > side:
        assert starts[-1] == size - side
        assert max(b - a for a, b in zip(starts, starts[1:])) <= max(1, math.ceil(side * (1 - overlap)))


@pytest.mark.parametrize("shape", [(21, 17, 19), (8, 12, 10), (5, 20, 7)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_slices_equal_the_obvious_sum_over_the_whole_volume(shape, batch_size):
    roi, hu = (8, 12, 10), hu_volume(shape)
    options = WindowOptions(roi, overlap=0.5, window_batch=batch_size)
    slices = torch.stack(list(probability_slices(shift_network, torch.from_numpy(hu), options, CPU)), dim=1)
    padded = [max(size, side) for size, side in zip(shape, roi)]
    before = [(p - s) // 2 for p, s in zip(padded, shape)]
    whole = np.full(padded, -1024, dtype=np.int16)
    inner = tuple(slice(b, b + s) for b, s in zip(before, shape))
    whole[inner] = hu
    x = ((torch.from_numpy(whole).float() + 125) / 350).clamp(0, 1)
    weight = blend_weights(roi[0])[:, None, None] * blend_weights(roi[1])[:, None] * blend_weights(roi[2])
    total, norm = torch.zeros(3, *padded), torch.zeros(padded)
    for corner in np.array(np.meshgrid(*(window_starts(p, r, 0.5) for p, r in zip(padded, roi)))).reshape(3, -1).T:
        part = tuple(slice(int(c), int(c) + r) for c, r in zip(corner, roi))
        total[(slice(None), *part)] += shift_network(x[part][None, None]).softmax(1)[0] * weight
        norm[part] += weight
    torch.testing.assert_close(slices, (total / norm)[(slice(None), *inner)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slices.sum(0), torch.ones(shape), rtol=1e-4, atol=1e-5)


def test_windows_count_less_towards_their_borders():
    """A Gaussian of an eighth of the side: exp(-x^2 / 2) at 0.5, 1.5, 2.5 and 3.5 voxels from the middle of eight."""
    half = [0.01, 0.04394, 0.32465, 0.88250]  # the last, 0.0022, is raised to 0.01
    assert blend_weights(8).tolist() == pytest.approx(half + half[::-1], abs=1e-5)


@pytest.mark.parametrize("shape", [(9, 17, 19), (3, 12, 10), (1, 20, 24), (4, 7, 30)])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_windows_of_depth_1_segment_every_slice_on_its_own(shape, batch_size):
    """A loop over slices, each blended in its plane, says what the batched windows must give."""
    roi, hu = (1, 12, 10), hu_volume(shape)
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        ramp = torch.linspace(0, 2, x.shape[3]).view(1, 1, 1, -1, 1)
        return torch.cat([x + ramp, 2 * x - ramp, 1 - x * ramp], dim=1)

    options = WindowOptions(roi, overlap=0.5, window_batch=batch_size)
    found = torch.stack(list(probability_slices(network, torch.from_numpy(hu), options, CPU)), dim=1)
    num_windows = sum(seen)
    assert max(seen) <= batch_size
    for number, plane in enumerate(hu):
        before = [max(0, side - size) // 2 for side, size in zip(roi[1:], plane.shape)]
        padded = np.full([max(a, b) for a, b in zip(plane.shape, roi[1:])], -1024, dtype=np.int16)
        inner = tuple(slice(b, b + size) for b, size in zip(before, plane.shape))
        padded[inner] = plane
        x = ((torch.from_numpy(padded).float() + 125) / 350).clamp(0, 1)
        total, norm = torch.zeros(3, *padded.shape), torch.zeros(padded.shape)
        weight = blend_weights(12)[:, None] * blend_weights(10)
        for h in window_starts(padded.shape[0], 12, 0.5):
            for w in window_starts(padded.shape[1], 10, 0.5):
                part = slice(h, h + 12), slice(w, w + 10)
                total[(slice(None), *part)] += network(x[part][None, None, None]).softmax(1)[0, :, 0] * weight
                norm[part] += weight
        torch.testing.assert_close(found[:, number], (total / norm)[(slice(None), *inner)], rtol=1e-4, atol=1e-5)
    in_plane = num_windows // shape[0]
    if batch_size >= 2 * in_plane and shape[0] > 1:
        assert max(seen) > in_plane, "slices share a forward pass"


@pytest.mark.parametrize(("name", "value"), [("overlap", 1.0), ("window_batch", 0)])
def test_options_out_of_range_name_their_flag(name, value):
    with pytest.raises(ValueError, match={"overlap": "--overlap 1.0", "window_batch": "--window_batch 0"}[name]):
        WindowOptions((8, 8, 8), **{name: value})


def test_constant_blending_agrees_with_monai():
    """Where windows fit without overlap, blending cannot matter: the same network gives the same classes."""
    hu = hu_volume((16, 24, 20))
    options = WindowOptions((8, 12, 10), overlap=0.0)
    ours = segment_volume(shift_network, hu, np.eye(4), hu.shape, np.eye(4), options, CPU)
    x = ((torch.from_numpy(hu).float() + 125) / 350).clamp(0, 1)[None, None]
    theirs = sliding_window_inference(x, (8, 12, 10), 1, shift_network, overlap=0.0).argmax(1)[0].numpy()
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("roi", "batch_size", "num_slices"), [((8, 8, 8), 2, 8), ((1, 8, 8), 2, 1), ((1, 8, 8), 8, 2)])
def test_memory_is_a_slab_whatever_the_height(roi, batch_size, num_slices, monkeypatch):
    """As thick as a window; of slices, as many as one forward pass takes (here with 4 windows a slice)."""
    largest = []
    plain = torch.zeros

    def noting(*size, **options):
        made = plain(*size, **options)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(torch, "zeros", noting)
    options = WindowOptions(roi, overlap=0.5, window_batch=batch_size)
    peaks = []
    for depth in (16, 160):
        largest.clear()
        for _ in probability_slices(shift_network, torch.from_numpy(hu_volume((depth, 12, 12))), options, CPU):
            pass
        peaks.append(max(largest))
    assert peaks[0] == peaks[1] == 3 * num_slices * 12 * 12


# Other grids


def test_restoring_doubles_a_grid_at_the_right_places():
    coarse, fine = np.diag([2.0, 2.0, 2.0, 1.0]), np.eye(4)
    fine[:3, 3] = -0.5  # the fine voxels 0 and 1 share the coarse voxel 0
    scale, offset = axis_map(coarse, fine)
    np.testing.assert_allclose(scale, 0.5)
    np.testing.assert_allclose(offset, -0.25)
    probability = torch.zeros(2, 6, 6, 6)
    probability[0] = 1
    probability[:, 2:4, 1:3, 2:5] = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    restored = restored_labels(iter(probability.unbind(1)), (6, 6, 6), (scale, offset), (12, 12, 12))
    expected = np.zeros((12, 12, 12), dtype=np.uint8)
    expected[4:8, 2:6, 4:10] = 1
    expected[np.ix_([4, 7], [2, 5], [4, 9])] = 0  # 0.75 ** 3 at a corner: less than a half
    assert np.array_equal(restored, expected) and restored.dtype == np.uint8


def test_restoring_interpolates_probabilities_linearly():
    rng = np.random.default_rng(1)
    probability = torch.from_numpy(rng.random((3, 5, 6, 7), dtype=np.float32))
    affine, out_affine = np.diag([4.0, 3.0, 2.0, 1.0]), np.diag([1.7, 2.9, 0.8, 1.0])
    out_affine[:3, 3] = (0.3, 0.2, 0.1)
    out_shape = (11, 6, 14)
    mapping = axis_map(affine, out_affine)
    restored = restored_labels(iter(probability.unbind(1)), (5, 6, 7), mapping, out_shape)
    from scipy.ndimage import map_coordinates

    places = np.stack(np.meshgrid(*(np.arange(n) for n in out_shape), indexing="ij")).reshape(3, -1)
    inside = mapping[0][:, None] * places + mapping[1][:, None]
    obvious = np.stack([map_coordinates(p.numpy(), inside, order=1, mode="nearest") for p in probability])
    margin = np.sort(obvious, axis=0)[-1] - np.sort(obvious, axis=0)[-2]
    differs = restored.ravel() != obvious.argmax(0)
    assert not differs[margin > 1e-4].any()


def test_grids_that_are_not_parallel_are_refused():
    turned = np.eye(4)
    turned[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    with pytest.raises(ValueError, match="not parallel"):
        axis_map(np.eye(4), turned)


# Metrics


def cubes() -> tuple[np.ndarray, np.ndarray]:
    truth, predicted = np.zeros((20, 20, 20), dtype=np.uint8), np.zeros((20, 20, 20), dtype=np.uint8)
    truth[4:12, 4:12, 4:12] = 1
    predicted[5:13, 4:12, 4:12] = 1
    truth[0:3, 0:3, 0:3] = 2
    return predicted, truth


def test_dice_and_nsd_by_hand():
    predicted, truth = cubes()
    liver, aorta = score_case("a", predicted, truth, (3.0, 1.0, 1.0), NAMES, tolerance_mm=2.0)
    assert liver.dice == pytest.approx(7 / 8)
    # The two faces across D lie 3 mm apart; the 4 other faces touch the other cube's surface but for one row each.
    assert 0.3 < liver.nsd < 0.95
    assert score_case("a", predicted, truth, (3.0, 1.0, 1.0), NAMES, tolerance_mm=3.0)[0].nsd == 1.0
    assert liver.truth_ml == pytest.approx(512 * 3 / 1000) and liver.predicted_ml == liver.truth_ml
    assert (aorta.dice, aorta.nsd) == (0.0, 0.0), "missed altogether"
    swapped = score_case("a", truth, predicted, (3.0, 1.0, 1.0), NAMES, 2.0)
    assert swapped[0].dice == liver.dice and swapped[0].nsd == pytest.approx(liver.nsd)
    assert swapped[1].dice == 0.0, "invented where there is none"


def test_each_organ_may_have_its_own_tolerance():
    predicted, truth = cubes()
    predicted[truth == 2] = 0
    predicted[1:4, 0:3, 0:3] = 2  # both organs are moved by 3 mm across D
    scores = score_case("a", predicted, truth, (3.0, 1.0, 1.0), NAMES, {"liver": 3.0, "aorta": 2.0})
    assert scores[0].nsd == 1.0 and scores[1].nsd < 1.0
    options = EvaluationOptions(flare22_nsd=True)
    assert options.tolerance_mm(("background", "duodenum", "aorta")) == {"duodenum": 7.0, "aorta": 2.0}
    assert set(options.tolerance_mm(("background", *FLARE22))) == set(FLARE22)
    assert EvaluationOptions(nsd_mm=4.0).tolerance_mm(("background", "spine")) == 4.0
    with pytest.raises(ValueError, match="--flare22_nsd: FLARE22 has no tolerance for spine"):
        options.tolerance_mm(("background", "spine"))


def test_absent_organs_count_for_nothing_and_nsd_may_be_left_out():
    predicted, truth = cubes()
    truth[truth == 2] = 0
    scores = score_case("a", predicted, truth, (1.0, 1.0, 1.0), NAMES, 0.0)
    assert math.isnan(scores[1].dice) and math.isnan(scores[0].nsd)
    assert case_means(scores) == {"a": pytest.approx(7 / 8)}
    with pytest.raises(ValueError, match="a: prediction has shape"):
        score_case("a", predicted[1:], truth, (1.0, 1.0, 1.0), NAMES, 0.0)


def test_a_picture_has_an_outline_and_no_faces_above_and_below():
    truth = np.zeros((1, 30, 30), dtype=np.uint8)
    truth[0, 5:25, 5:25] = 1
    predicted = np.roll(truth, 3, axis=1)
    flat = score_case("a", predicted, truth, (1.0, 1.0, 1.0), NAMES, 1.0)[0]
    assert flat.dice == pytest.approx(17 / 20)
    assert flat.nsd < 0.7, "the edges across the shift lie 3 pixels apart"
    assert score_case("a", predicted, truth, (1.0, 1.0, 1.0), NAMES, 3.0)[0].nsd == 1.0
    assert score_case("a", predicted, truth, (9.0, 2.0, 1.0), NAMES, 5.9)[0].nsd < 1.0, "3 pixels are 6 mm"


def test_published_slice_dice_by_hand():
    truth, predicted = np.zeros((3, 4, 5), dtype=np.uint8), np.zeros((3, 4, 5), dtype=np.uint8)
    truth[0, :2, :2], predicted[0, :2, :3] = 1, 1  # organ 2 * 4 / 10, background 2 * 14 / 30
    truth[1, 0, :4] = 2  # missed: 0; background 2 * 16 / 36
    predicted[2, 0, 0] = 2  # invented: only background counts, 2 * 19 / 39
    expected = [(8 / 10 + 28 / 30) / 2, (0 + 32 / 36) / 2, 38 / 39]
    assert published_slice_dice(predicted, truth, 3) == pytest.approx(expected)


def test_published_slice_dice_rewards_background_where_organ_dice_does_not():
    """Nothing but background: organ Dice is 0, the published number is far from it. An invented organ costs little."""
    truth = np.zeros((4, 10, 10), dtype=np.uint8)
    truth[1, :5, :4], truth[2, :5, :4], truth[2, 8:, 8:] = 1, 1, 2
    nothing = np.zeros_like(truth)
    assert [score.dice for score in score_case("a", nothing, truth, (1.0, 1.0, 1.0), NAMES, 0.0)] == [0.0, 0.0]
    by_slice = [1.0, 160 / 180 / 2, 152 / 176 / 3, 1.0]
    assert published_slice_dice(nothing, truth, 3) == pytest.approx(by_slice)
    invented = truth.copy()
    invented[[0, 1, 3], 8:, 8:] = 2
    liver, aorta = score_case("a", invented, truth, (1.0, 1.0, 1.0), NAMES, 0.0)
    assert (liver.dice, aorta.dice) == (1.0, pytest.approx(2 * 4 / 20))
    assert np.mean(published_slice_dice(invented, truth, 3)) > 0.98


# Tables


def make_scores(offset: float) -> list[OrganScore]:
    nan = float("nan")
    return [
        OrganScore("a", "liver", 0.8 + offset, 0.7, 1500.0, 1400.0),
        OrganScore("a", "aorta", 0.6 + offset, 0.5, 80.0, 70.0),
        OrganScore("b", "liver", 0.9 + offset, 0.9, 1200.0, 1250.0),
        OrganScore("b", "aorta", nan, nan, 0.0, 0.0),
    ]


def test_report_counts_every_case_once(tmp_path):
    summary = write_report(tmp_path, make_scores(0.0), {"checkpoint": "best.pth"})
    assert summary["dice"]["mean"] == pytest.approx((0.7 + 0.9) / 2)
    assert summary["dice"]["std"] == pytest.approx(np.std([0.7, 0.9], ddof=1))
    assert summary["organs"]["aorta"]["dice"] == {"mean": 0.6, "std": pytest.approx(math.nan, nan_ok=True), "num": 1}
    rows = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert len(rows) == 4 and rows[3]["dice"] == "" and rows[0]["truth_ml"] == "1500"
    table = (tmp_path / "results.md").read_text()
    assert "| liver | 85.0 ± 7.1 | 80.0 ± 14.1 | 2 |" in table and "| **mean** | 80.0 ± 14.1 |" in table
    assert json.loads((tmp_path / "results.json").read_text())["organs"]["aorta"]["dice"]["std"] is None
    assert summarise(read_scores(tmp_path / "cases.csv"))["dice"] == pytest.approx(summary["dice"])


def test_the_published_number_stands_beside_organ_dice_under_its_own_name(tmp_path):
    summary = write_report(tmp_path / "a", make_scores(0.0), {}, slice_dice=[0.9, 0.7, 1.0, 1.0])
    assert summary["slice_dice_published"]["mean"] == pytest.approx(0.9) and summary["slice_dice_published"]["num"] == 4
    assert summary["dice"]["mean"] == pytest.approx(0.8)
    table = (tmp_path / "a" / "results.md").read_text()
    assert "slice_dice_published: 90.0 ± 14.1 %" in table and "not comparable with organ Dice" in table
    write_report(tmp_path / "b", make_scores(0.0), {}, slice_dice=[0.8])
    joined = write_joined(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    assert joined["slice_dice_published"]["mean"] == pytest.approx(0.85) and joined["slice_dice_published"]["num"] == 2
    write_report(tmp_path / "3d", make_scores(0.0), {})
    assert "slice" not in (tmp_path / "3d" / "results.md").read_text() + (tmp_path / "3d" / "results.json").read_text()
    assert "slice_dice_published" not in write_joined(tmp_path / "mixed", [tmp_path / "a", tmp_path / "3d"])


def test_joined_runs_spread_over_their_means(tmp_path):
    for seed, offset in enumerate((0.0, 0.02, 0.04)):
        write_report(tmp_path / f"seed{seed}", make_scores(offset), {})
    folders = [tmp_path / f"seed{seed}" for seed in range(3)]
    joined = write_joined(tmp_path / "all", folders)
    assert joined["dice"] == {"mean": pytest.approx(0.82), "std": pytest.approx(0.02), "num": 3}
    assert "| liver | 87.0 ± 2.0 | 80.0 ± 0.0 | 3 |" in (tmp_path / "all" / "results.md").read_text()
    with pytest.raises(ValueError, match="evaluate the run first"):
        join_reports([tmp_path / "nowhere"])


def test_overlay_shows_the_richest_planes(tmp_path):
    predicted, truth = cubes()
    assert richest_plane(truth, 0) in range(0, 3) or richest_plane(truth, 0) in range(4, 12)
    truth[6, 2, 2] = 2
    assert richest_plane(truth, 0) == 6, "two organs beat one"
    hu = hu_volume(truth.shape)
    view = case_view(hu, truth, predicted, (3.0, 1.0, 1.0))
    shown = np.clip((hu[6] + 160) / 400, 0, 1)
    np.testing.assert_allclose(view["axial"][0], shown, atol=1e-6)
    assert view["coronal"][3] == 3.0 and view["coronal"][3] == 3.0
    save_overlay(tmp_path / "pictures" / "a.png", [("worst", view), ("best", view)], NAMES)
    assert (tmp_path / "pictures" / "a.png").stat().st_size > 10_000

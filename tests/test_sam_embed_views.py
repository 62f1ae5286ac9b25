"""Two views of a volume: their points correspond exactly, and a sample depends on seed and number alone."""

import numpy as np
import pytest
import torch

from datasets.samples import random_contrast
from datasets.samples.augment import gaussian_blur
from datasets.samples.random_contrast import IntensityOptions
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.training import views
from sam_embed.training.views import TrainingVolume, ViewOptions, ViewPairDataset
from sam_embed.training.warp import Warp

SPACING_MM = (3.0, 2.0, 2.5)
SHAPE = (40, 44, 36)
OPTIONS = ViewOptions(shape=(24, 28, 20), spacing_mm=SPACING_MM, num_points=64)
UNCHANGED = {"intensity": IntensityOptions(0.0, 0.0, 0.0, 0.0), "truncate": 0.0}
INFO = EmbedderInfo(SPACING_MM)


def position_volumes() -> list[torch.Tensor]:
    """Three volumes whose value is 10 times the volume mm along D, H, W: linear, so trilinear sampling is exact."""
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in SHAPE], indexing="ij")).float()
    return [10 * plane * step for plane, step in zip(index, SPACING_MM)]


def body() -> torch.Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[4:-4, 6:-6, 5:-5] = True
    return mask


def draw_pair(seed: int, **changes):
    """The geometry of one pair: warps, scan ranges and points."""
    options = ViewOptions(**{**OPTIONS.__dict__, **changes})
    rng = torch.Generator().manual_seed(seed)
    extent = torch.tensor(SHAPE, dtype=torch.float64) * torch.tensor(SPACING_MM, dtype=torch.float64)
    warps = views.draw_warps(extent, options, rng)
    ranges = tuple(views.draw_scan_range(warp, float(extent[0]), options, rng) for warp in warps)
    return warps, ranges, views.draw_points(warps, ranges, body(), SPACING_MM, options, rng)


@pytest.mark.parametrize("seed", range(5))
def test_points_of_both_views_are_the_same_place_in_the_volume(seed):
    warps, _, (points_a, points_b) = draw_pair(seed)
    place_a, place_b = warps[0].to_volume(points_a), warps[1].to_volume(points_b)
    assert points_a.shape == (64, 3)
    assert (place_a - place_b).norm(dim=1).max() < 0.01  # mm; indices are float32
    assert (points_a - points_b).norm(dim=1).median() > 1  # the two geometries differ, or this test shows nothing


@pytest.mark.parametrize("seed", range(3))
def test_rendered_intensity_says_where_a_view_voxel_lies(seed):
    warps, _, _ = draw_pair(seed)
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in OPTIONS.shape], indexing="ij"), dim=-1)
    place = warps[0].to_volume(index.flatten(0, 2)).view(*OPTIONS.shape, 3)
    last = (torch.tensor(SHAPE) - 1) * torch.tensor(SPACING_MM)
    inside = ((place > 0) & (place < last)).all(dim=-1)
    assert inside.float().mean() > 0.3
    for axis, volume in enumerate(position_volumes()):
        seen = views.render(volume, SPACING_MM, warps[0])
        assert (seen / 10 - place[..., axis])[inside].abs().max() < 0.02
        far_outside = ((place < -4) | (place > last + 4)).any(dim=-1)
        assert (seen[far_outside] == views.AIR_HU).all()


def test_points_lie_in_both_views_in_the_body_and_in_both_scan_ranges():
    for seed in range(8):
        warps, ranges, points = draw_pair(seed, truncate=1.0)
        top = torch.tensor(OPTIONS.shape) - 1
        assert all(((view >= 0) & (view <= top)).all() for view in points)
        place = warps[0].to_volume(points[0])
        assert views.lookup(body(), place, SPACING_MM).all()
        for low, high in ranges:
            assert low > 0 and high < SHAPE[0] * SPACING_MM[0]  # truncate=1: both ends are cut
            assert ((place[:, 0] >= low - 0.01) & (place[:, 0] <= high + 0.01)).all()


def test_views_hold_air_beyond_the_scan_range():
    warps, _, _ = draw_pair(0)
    seen = views.render(torch.zeros(SHAPE), SPACING_MM, warps[0], (40.0, 70.0))
    place = warps[0].dense()
    assert (seen[(place[..., 0] < 40) | (place[..., 0] > 70)] == views.AIR_HU).all()
    assert (seen == 0).any()


def test_inverse_holds_for_violent_displacements_and_they_stay_invertible():
    rng = torch.Generator().manual_seed(1)
    control = torch.randn((3, 4, 4, 4), generator=rng) * 100  # mm on a lattice of about 20 mm
    warp = Warp((24, 28, 20), SPACING_MM, torch.tensor([50.0, 40.0, 40.0]), torch.eye(3) * 1.1, control)
    index = torch.rand((500, 3), generator=rng) * (torch.tensor(warp.shape) - 1)
    assert (warp.to_view(warp.to_volume(index)) - index).abs().max() < 1e-3
    dense = warp.dense()
    steps = [dense.diff(dim=axis)[:23, :27, :19].flatten(0, 2) for axis in range(3)]
    jacobian = torch.stack(steps, dim=1)
    assert (torch.linalg.det(jacobian) > 0).all()


def test_dense_positions_equal_those_of_single_points():
    warps, _, _ = draw_pair(3)
    index = torch.tensor([[0, 0, 0], [23, 27, 19], [5, 9, 13], [11, 2, 7]])
    dense = warps[1].dense()[index[:, 0], index[:, 1], index[:, 2]]
    assert torch.allclose(dense.double(), warps[1].to_volume(index), atol=1e-2)


def test_without_augmentation_both_views_are_plain_crops():
    still = {"max_scale": 1.0, "rotate_deg": 0.0, "shear": 0.0, "elastic_mm": 0.0}
    volume = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 100
    options = ViewOptions(**{**OPTIONS.__dict__, **still, **UNCHANGED})
    pair = views.make_pair(TrainingVolume("x", volume, body(), SPACING_MM), options, torch.Generator().manual_seed(4))
    shift = pair["points_a"] - pair["points_b"]
    assert torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-3)


def test_the_same_number_gives_the_same_sample_and_another_gives_another():
    volumes = [TrainingVolume(str(i), torch.full(SHAPE, 40 * i).short(), body(), SPACING_MM) for i in range(3)]
    first, second = (ViewPairDataset(volumes, OPTIONS, INFO, seed=7) for _ in range(2))
    _ = second[1], second[5]  # reading others in between changes nothing
    for name, value in first[4].items():
        assert torch.equal(value, second[4][name]), name
    assert not torch.equal(first[4]["view_a"], first[7]["view_a"])
    other = ViewPairDataset(volumes, OPTIONS, INFO, seed=8)
    assert not torch.equal(first[4]["view_a"], other[4]["view_a"])


def test_every_run_of_items_holds_each_volume_once():
    volumes = [TrainingVolume(str(i), torch.zeros(SHAPE).short(), body(), SPACING_MM) for i in range(4)]
    dataset = ViewPairDataset(volumes, OPTIONS, INFO, seed=0)
    cases = [int(dataset[i]["case"]) for i in range(12)]
    assert all(sorted(cases[i : i + 4]) == [0, 1, 2, 3] for i in (0, 4, 8))
    assert len({tuple(cases[i : i + 4]) for i in (0, 4, 8)}) > 1


def test_intensity_changes_leave_no_nan_and_do_change():
    rng = torch.Generator().manual_seed(0)
    view = torch.linspace(-1024, 2000, 24 * 28 * 20).view(OPTIONS.shape)
    changed = random_contrast.change_intensity(view, SPACING_MM, IntensityOptions(), rng)
    assert torch.isfinite(changed).all()
    assert (changed - view).abs().mean() > 1
    same = random_contrast.change_intensity(view, SPACING_MM, UNCHANGED["intensity"], rng)
    assert torch.equal(same, view)


def test_blur_keeps_the_mean_and_lowers_the_noise():
    noise = torch.randn((20, 20, 20), generator=torch.Generator().manual_seed(0))
    smooth = gaussian_blur(noise[None], [1.0, 1.0, 1.0])[0]
    assert smooth.std() < 0.5 * noise.std()
    assert abs(float(smooth[4:-4, 4:-4, 4:-4].mean() - noise[4:-4, 4:-4, 4:-4].mean())) < 0.05
    only_first = gaussian_blur(noise[None], [1.0, 0.0, 0.0])[0]
    assert only_first.diff(dim=0).abs().mean() < 0.7 * only_first.diff(dim=2).abs().mean()


def test_soft_tissue_changes_leave_bone_and_lung_alone():
    weight = random_contrast.soft_tissue_weight(torch.tensor([-900.0, -100.0, -45.0, 0.0, 200.0, 800.0]))
    assert np.allclose(weight, [0, 0, 0.5, 1, 1, 0])


@pytest.mark.parametrize(
    "wrong, word",
    [({"shape": (4, 20, 20)}, "shape"), ({"min_overlap": 0.0}, "min_overlap"), ({"max_scale": 0.5}, "max_scale")],
)
def test_impossible_options_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        ViewOptions(**wrong)


def test_views_without_common_places_end_with_an_error():
    tiny = torch.zeros(SHAPE, dtype=torch.bool)
    tiny[0, 0, 0] = True
    volume = TrainingVolume("fiducial", torch.zeros(SHAPE).short(), tiny, SPACING_MM)
    with pytest.raises(ValueError, match="case fiducial: 100 pairs of views had no places in common.*--json_list"):
        views.make_pair(volume, views.ViewOptions(shape=(16, 16, 16)), torch.Generator().manual_seed(0))

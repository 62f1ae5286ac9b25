"""SAM's contrastive loss against an obvious slow version, its negatives, and two ranks against one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sam_embed.network import OutputGrid
from sam_embed.training.contrastive import (
    EXCLUDED,
    Level,
    LevelOptions,
    SamLoss,
    info_nce,
    level_loss,
    pick_hard,
    sample_at,
    too_near,
    voxel_points,
)
from tests.launched import run_ranks

FINE = OutputGrid((2.0, 2.0, 2.0), (0.5, 0.0, 0.0))
COARSE = OutputGrid((4.0, 4.0, 4.0), (0.5, 0.0, 0.0))
SPACING_MM = (3.0, 4.0, 4.0)
INPUT = (8, 10, 12)


def unit_map(seed: int, batch: int, shape: tuple[int, int, int], channels: int = 6) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn((batch, channels, *shape), generator=rng), dim=1)


def make_inputs(batch: int = 2, num_points: int = 5):
    fine = tuple(unit_map(i, batch, (4, 5, 6)) for i in (0, 1))
    coarse = tuple(unit_map(i, batch, (2, 3, 3)) for i in (2, 3))
    rng = torch.Generator().manual_seed(4)
    points = tuple(torch.rand((batch, num_points, 3), generator=rng) * (torch.tensor(INPUT) - 3) + 1 for _ in range(2))
    return fine, coarse, points, torch.arange(10, 10 + batch)


def slow_level(maps, grids, points, options: LevelOptions) -> float:
    """InfoNCE over the whole partner grid, one point and one voxel at a time."""
    total, count = 0.0, 0
    for here, there in ((0, 1), (1, 0)):
        for b in range(len(points[0])):
            for n in range(points[0].shape[1]):
                query = slow_vector(maps[here], grids, b, points[here][b, n])
                positive = query @ slow_vector(maps[there], grids, b, points[there][b, n])
                terms = [math.exp(positive / options.temperature)]
                for view in (there, here) if options.both_views else (there,):
                    shape = maps[view][0].shape[2:]
                    for d in range(shape[0]):
                        for h in range(shape[1]):
                            for w in range(shape[2]):
                                place = torch.tensor(
                                    [i * s + o for i, s, o in zip((d, h, w), grids[0].stride, grids[0].offset)]
                                )
                                gap = (place - points[view][b, n]) * torch.tensor(SPACING_MM)
                                if gap.norm() >= options.ignore_mm:
                                    key = slow_vector(maps[view], grids, b, place)
                                    terms.append(math.exp(float(query @ key) / options.temperature))
                total += -math.log(terms[0] / sum(terms))
                count += 1
    return total / count


def slow_vector(maps, grids, b: int, point: torch.Tensor) -> torch.Tensor:
    """The unit vector at one input voxel index by writing trilinear interpolation out."""
    vectors = []
    for one_map, grid in zip(maps, grids):
        sizes = one_map.shape[2:]
        index = [(float(p) - o) / s for p, o, s in zip(point, grid.offset, grid.stride)]
        index = [min(max(i, 0.0), n - 1.0) for i, n in zip(index, sizes)]
        low = [min(int(i), n - 2) for i, n in zip(index, sizes)]
        vector = torch.zeros(one_map.shape[1])
        for corner in range(8):
            bits = [(corner >> axis) & 1 for axis in range(3)]
            weight = math.prod((i - lo) if bit else 1 - (i - lo) for i, lo, bit in zip(index, low, bits))
            vector += weight * one_map[b, :, low[0] + bits[0], low[1] + bits[1], low[2] + bits[2]]
        vectors.append(vector / vector.norm())
    return torch.cat(vectors) / math.sqrt(len(vectors))


@pytest.mark.parametrize("both_views", [False, True])
def test_levels_equal_the_slow_version(both_views):
    fine, coarse, points, draws = make_inputs(batch=2, num_points=1)
    options = LevelOptions(temperature=0.3, ignore_mm=9.0, both_views=both_views)
    off = LevelOptions(weight=0.0)
    for name, maps, grids in (
        ("fine", [[fine[0]], [fine[1]]], [FINE]),
        ("coarse", [[coarse[0]], [coarse[1]]], [COARSE]),
        ("joint", [[fine[0], coarse[0]], [fine[1], coarse[1]]], [FINE, COARSE]),
    ):
        levels = {"fine": off, "coarse": off, "joint": off, name: options}
        total, terms = SamLoss(levels, FINE, COARSE, SPACING_MM)(fine, coarse, points, draws)
        expected = slow_level(maps, grids, points, options)
        assert math.isclose(float(total), expected, rel_tol=1e-4), name
        assert list(terms) == [f"loss_{name}"]


def test_total_weighs_the_levels():
    fine, coarse, points, draws = make_inputs()
    levels = {"fine": LevelOptions(weight=2.0), "coarse": LevelOptions(weight=0.5), "joint": LevelOptions(weight=0.0)}
    total, terms = SamLoss(levels, FINE, COARSE, SPACING_MM)(fine, coarse, points, draws)
    assert math.isclose(float(total), float(2 * terms["loss_fine"] + 0.5 * terms["loss_coarse"]), rel_tol=1e-6)


def test_info_nce_by_hand():
    loss = info_nce(torch.tensor([0.5]), torch.tensor([[0.1, EXCLUDED, -0.3]]), temperature=0.2)
    expected = -math.log(math.exp(2.5) / (math.exp(2.5) + math.exp(0.5) + math.exp(-1.5)))
    assert math.isclose(float(loss), expected, rel_tol=1e-6)


def test_voxel_points_follow_the_grid():
    shape = (3, 4, 5)
    index = voxel_points(torch.tensor([0, 1, 5, 59]), shape, FINE)
    assert index.tolist() == [[0.5, 0, 0], [0.5, 0, 2], [0.5, 2, 0], [4.5, 6, 8]]


def test_sampling_at_a_voxel_gives_that_voxel():
    fine = unit_map(0, 2, (4, 5, 6))
    points = voxel_points(torch.tensor([[17, 100], [3, 119]]), (4, 5, 6), FINE)
    expected = torch.stack([fine[0].flatten(1)[:, [17, 100]].T, fine[1].flatten(1)[:, [3, 119]].T])
    assert torch.allclose(sample_at(fine, points, FINE), expected, atol=1e-5)


def test_hard_negatives_are_the_hardest_and_leave_near_ones_out():
    similarity = torch.rand((1, 4, 50), generator=torch.Generator().manual_seed(0))
    near = torch.zeros((1, 4, 50), dtype=torch.bool)
    near[:, :, similarity[0, 0].topk(3).indices] = True  # the hardest ones of the first point
    masked = similarity.masked_fill(near, EXCLUDED)
    picked = pick_hard(masked, masked, LevelOptions(num_hard=10), torch.tensor([3]))
    expected = similarity[0, 0][~near[0, 0]].topk(10).values
    assert torch.equal(picked[0, 0].sort(descending=True).values, expected)
    drawn = pick_hard(masked, masked, LevelOptions(num_hard=10, num_drawn=4), torch.tensor([3]))
    assert drawn.shape == (1, 4, 4)
    assert torch.isin(drawn[0, 0], expected).all()


def test_hardness_may_come_from_another_level():
    similarity = torch.arange(6.0).view(1, 1, 6)
    picked = pick_hard(similarity, -similarity, LevelOptions(num_hard=2), torch.tensor([0]))
    assert sorted(picked.flatten().tolist()) == [0.0, 1.0]


def test_too_near_measures_millimetres():
    points = torch.tensor([[[4.0, 4.0, 4.0]]])
    voxels = torch.tensor([[[4.0, 4.0, 6.9], [7.0, 4.0, 4.0], [8.0, 4.0, 4.0], [4.0, 7.0, 4.0]]])
    assert too_near(points, voxels, SPACING_MM, 11.7).tolist() == [[[True, True, False, False]]]


def test_a_near_voxel_that_looks_the_same_costs_nothing():
    """The true place's neighbours are as alike as the truth: only `ignore_mm` keeps them from being punished."""
    fine, _, points, draws = make_inputs(batch=1, num_points=1)
    same = [torch.zeros_like(fine[0]) for _ in (0, 1)]
    for view in (0, 1):
        same[view][:, 1] = 1.0
        index = ((points[view][0, 0] - torch.tensor(FINE.offset)) / 2).round().long().clamp(max=torch.tensor([3, 4, 5]))
        block = tuple(slice(max(0, int(i) - 1), int(i) + 2) for i in index)
        same[view][(0, slice(None), *block)] = torch.eye(6)[0][:, None, None, None]
    level = Level(((same[0],), (same[1],)), (FINE,))
    ignoring = level_loss(level, points, draws, SPACING_MM, LevelOptions(temperature=0.05, ignore_mm=22.0))
    punishing = level_loss(level, points, draws, SPACING_MM, LevelOptions(temperature=0.05, ignore_mm=0.1))
    assert float(ignoring) < 1e-4
    assert float(punishing) > 0.5


def test_drawn_keys_depend_on_the_sample_not_on_its_place_in_the_batch():
    fine, coarse, points, draws = make_inputs(batch=2)
    options = LevelOptions(num_keys=40, num_hard=20, num_drawn=5)
    whole = level_loss(Level(((fine[0],), (fine[1],)), (FINE,)), points, draws, SPACING_MM, options)
    single = [
        level_loss(
            Level(((fine[0][b : b + 1],), (fine[1][b : b + 1],)), (FINE,)),
            (points[0][b : b + 1], points[1][b : b + 1]),
            draws[b : b + 1],
            SPACING_MM,
            options,
        )
        for b in (1, 0)
    ]
    assert torch.allclose(whole, torch.stack(single).mean(), rtol=1e-5)


def test_negatives_from_other_volumes_count_and_own_ones_do_not():
    fine, _, points, draws = make_inputs(batch=2)
    level = Level(((fine[0],), (fine[1],)), (FINE,))
    alone = level_loss(level, points, draws, SPACING_MM, LevelOptions())
    with_others = level_loss(level, points, draws, SPACING_MM, LevelOptions(num_other=30))
    assert float(with_others) > float(alone)
    first = Level(((fine[0][:1],), (fine[1][:1],)), (FINE,))
    args = ((points[0][:1], points[1][:1]), draws[:1], SPACING_MM)
    one_volume_has_no_other = level_loss(first, *args, LevelOptions(num_other=30))
    assert torch.allclose(one_volume_has_no_other, level_loss(first, *args, LevelOptions()), rtol=1e-6)


def published_like(batch: slice) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss with hard and cross-volume negatives on part of a batch of 4, and the gradients of all its maps."""
    fine, coarse, points, draws = make_inputs(batch=4)
    leaves = [tensor[batch].clone().requires_grad_() for tensor in (*fine, *coarse)]
    levels = {
        "fine": LevelOptions(temperature=0.5, num_hard=40, num_drawn=10, both_views=True),
        "coarse": LevelOptions(temperature=0.5, num_hard=20, num_drawn=8, num_other=12),
        "joint": LevelOptions(weight=0.5, num_keys=50, num_other=7),
    }
    loss = SamLoss(levels, FINE, COARSE, SPACING_MM)
    total, _ = loss((leaves[0], leaves[1]), (leaves[2], leaves[3]), (points[0][batch], points[1][batch]), draws[batch])
    total.backward()
    return total.detach(), [leaf.grad for leaf in leaves]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    total, gradients = published_like(slice(2 * rank, 2 * rank + 2))
    torch.save([total, gradients], f"{folder}/rank{rank}.pth")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    run_ranks(run_rank, (str(tmp_path),))
    ranks = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    total, gradients = published_like(slice(0, 4))
    assert torch.allclose((ranks[0][0] + ranks[1][0]) / 2, total, atol=1e-6)
    for i, whole in enumerate(gradients):
        joined = torch.cat([ranks[0][1][i], ranks[1][1][i]]) / 2  # DDP averages over ranks
        assert whole.abs().max() > 0
        assert torch.allclose(joined, whole, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"num_hard": 5, "num_drawn": 6}], ids=["temperature", "num_drawn"]
)
def test_impossible_level_options_are_refused(options, request):
    with pytest.raises(ValueError, match=request.node.callspec.id):
        LevelOptions(**options)


def test_a_loss_without_levels_is_refused():
    off = {name: LevelOptions(weight=0.0) for name in ("fine", "coarse", "joint")}
    with pytest.raises(ValueError, match="fine_weight"):
        SamLoss(off, FINE, COARSE, SPACING_MM)

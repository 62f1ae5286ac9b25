"""SAM's contrastive loss: the same place in two views must be more alike than any other place.

Yan et al., "SAM", TMI 2022, Sec. III-A: InfoNCE over one positive and many hard negatives, for the fine and the coarse
embedding each. Added here: a third level, `joint`, on the mean of both similarities (what matching maximises); every
voxel of the partner view, or a random share of them, as negatives; both directions.

Shapes: B volumes, N corresponding points per volume, C channels, K voxels of one view that serve as negatives, M
negatives in the end. Points are input voxel indices of a view, [B, N, 3] in (d, h, w) order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor

from sam_embed.network import OutputGrid

EXCLUDED = -1e4  # similarity that weighs nothing in a softmax, and stays finite in half precision
LEVELS = ("fine", "coarse", "joint")


@dataclass(frozen=True)
class LevelOptions:
    """One level's InfoNCE.

    Attributes:
        weight: of this level in the total; 0 leaves it out.
        temperature: the similarities are divided by it.
        ignore_mm: voxels nearer to the true place than this are no negatives, mm of the view's grid.
        both_views: negatives come from the query's own view too, not only from its partner's.
        num_keys: this many voxels of a view, at random, may be negatives; 0 = all.
        num_hard: size of the pool of hardest negatives; 0 = all that may be.
        num_drawn: how many of the pool are drawn, the same ranks for all points of a volume; 0 = all.
        num_other: negatives from each OTHER volume of the joined batch (all ranks), at random places; 0 = none.
    """

    weight: float = 1.0
    temperature: float = 0.1
    ignore_mm: float = 12.0
    both_views: bool = False
    num_keys: int = 0
    num_hard: int = 0
    num_drawn: int = 0
    num_other: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.num_drawn > self.num_hard:
            raise ValueError(f"num_drawn ({self.num_drawn}) must not exceed num_hard ({self.num_hard})")


@dataclass(frozen=True)
class Level:
    """The embeddings that make one level: `parts[view]` lists maps [B, C, d, h, w] of that view, `grids` their grids.

    A level's similarity is the mean of its parts'. The first part's voxels are the keys.
    """

    parts: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    grids: tuple[OutputGrid, ...]

    def vectors_at(self, view: int, points: Tensor) -> Tensor:
        """Unit vectors [B, N, sum of C] at points [B, N, 3] of a view; their dot product is the level's similarity."""
        sampled = [sample_at(part, points, grid) for part, grid in zip(self.parts[view], self.grids)]
        return torch.cat(sampled, dim=-1) / math.sqrt(len(sampled))

    def vectors_of(self, view: int, voxels: Tensor) -> Tensor:
        """`vectors_at` the key voxels with these numbers [B, K]: faster, as the first part needs no interpolation."""
        keys = self.parts[view][0].flatten(2).transpose(1, 2)  # [B, K of all, C]
        sampled = [torch.stack([rows[chosen] for rows, chosen in zip(keys, voxels)])]
        points = voxel_points(voxels, self.key_shape(), self.grids[0])
        sampled += [sample_at(part, points, grid) for part, grid in zip(self.parts[view][1:], self.grids[1:])]
        return torch.cat(sampled, dim=-1) / math.sqrt(len(sampled))

    def key_shape(self) -> tuple[int, int, int]:
        return tuple(self.parts[0][0].shape[2:])


def sample_at(embedding: Tensor, points: Tensor, grid: OutputGrid) -> Tensor:
    """Embeddings at input voxel indices, trilinear and normalised again; beyond the grid its border continues.

    Args:
        embedding: [B, C, d, h, w], L2-normalised over C.
        points: [B, N, 3] input voxel indices.
        grid: where the embedding's voxels lie in the input.

    Returns:
        [B, N, C].
    """
    sizes = torch.tensor(embedding.shape[2:], device=points.device, dtype=points.dtype)
    index = (points - points.new_tensor(grid.offset)) / points.new_tensor(grid.stride)
    unit = (index * 2 / (sizes - 1).clamp(min=1) - 1).flip(-1)  # grid_sample wants (w, h, d)
    unit = unit.view(len(points), -1, 1, 1, 3).to(embedding.dtype)
    sampled = F.grid_sample(embedding, unit, align_corners=True, padding_mode="border")  # [B, C, N, 1, 1]
    return F.normalize(sampled.flatten(2), dim=1).transpose(1, 2)


def voxel_points(voxels: Tensor, shape: Sequence[int], grid: OutputGrid) -> Tensor:
    """Input voxel indices [..., 3] of an output's voxels, given by number (last axis fastest) [...]."""
    index = torch.stack(torch.unravel_index(voxels, tuple(shape)), dim=-1).float()
    return index * index.new_tensor(grid.stride) + index.new_tensor(grid.offset)


def info_nce(positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """-log of the positive's share in the softmax over itself and its negatives.

    Args:
        positive: [...] similarities.
        negatives: [..., M] similarities; `EXCLUDED` ones count nothing.

    Returns:
        [...] losses, float32.
    """
    positive = positive.float() / temperature
    rest = (negatives.float() / temperature).logsumexp(dim=-1)
    return torch.logaddexp(positive, rest) - positive


def too_near(points: Tensor, voxels: Tensor, spacing_mm: Sequence[float], ignore_mm: float) -> Tensor:
    """Which voxels [B, K, 3] lie within `ignore_mm` of which points [B, N, 3] (input voxel indices): bool [B, N, K]."""
    spacing = points.new_tensor(spacing_mm)
    return torch.cdist(points * spacing, voxels * spacing) < ignore_mm


def choose_keys(num_voxels: int, num_keys: int, draws: Tensor) -> Tensor:
    """Numbers of the voxels that may be negatives, [B, K]: all of them, or `num_keys` at random per volume."""
    if num_keys == 0 or num_keys >= num_voxels:
        return torch.arange(num_voxels).expand(len(draws), -1)
    return torch.stack([torch.randint(num_voxels, (num_keys,), generator=stream(d, 0)) for d in draws.tolist()])


def pick_hard(similarity: Tensor, hardness: Tensor, options: LevelOptions, draws: Tensor) -> Tensor:
    """Of each point's `num_hard` hardest negatives, `num_drawn`: similarities [B, N, M].

    Args:
        similarity: [B, N, K], `EXCLUDED` where a voxel is no negative.
        hardness: [B, N, K], what ranks them, `EXCLUDED` in the same places.
        draws: [B], decide which ranks of the pool are taken.
    """
    num_hard = min(options.num_hard, similarity.shape[-1])
    pool = hardness.topk(num_hard, dim=-1).indices  # [B, N, num_hard]
    if 0 < options.num_drawn < num_hard:
        ranks = [torch.randperm(num_hard, generator=stream(d, 1))[: options.num_drawn] for d in draws.tolist()]
        chosen = torch.stack(ranks).to(pool.device)[:, None].expand(-1, pool.shape[1], -1)
        pool = pool.gather(-1, chosen)
    return similarity.gather(-1, pool)


def level_loss(
    level: Level,
    points: tuple[Tensor, Tensor],
    draws: Tensor,
    spacing_mm: Sequence[float],
    options: LevelOptions,
    ranked_by: Level | None = None,
) -> Tensor:
    """InfoNCE of one level in both directions, mean over volumes and points: a scalar.

    With `num_other` > 0 it gathers drawn negatives of all ranks, with their gradient; as DDP averages gradients over
    ranks, W ranks with B volumes each then equal one process with W * B volumes.

    Args:
        points: corresponding points in (view a, view b), each [B, N, 3].
        draws: [B] sample numbers, unique in the joined batch; they decide each volume's random draws.
        spacing_mm: of the input voxels, (D, H, W).
        ranked_by: level on the same grid whose similarity ranks the hard negatives; None = this one.
    """
    shape = level.key_shape()
    chosen = choose_keys(math.prod(shape), options.num_keys, draws).to(points[0].device)
    voxels = voxel_points(chosen, shape, level.grids[0])
    queries = [level.vectors_at(view, points[view]) for view in (0, 1)]  # [B, N, C]
    keys = [level.vectors_of(view, chosen) for view in (0, 1)]  # [B, K, C]
    near = [too_near(points[view], voxels, spacing_mm, options.ignore_mm) for view in (0, 1)]
    if options.num_other > 0:
        others, owners = draw_others(level, draws, options.num_other)
        is_own = draws.to(owners.device)[:, None, None] == owners  # [B, 1, V * num_other]
    positive = (queries[0] * queries[1]).sum(dim=-1)  # [B, N]
    losses = []
    for here, there in ((0, 1), (1, 0)):
        sources = (there, here) if options.both_views else (there,)
        negatives = similarities(queries[here], keys, near, sources)
        if options.num_hard > 0:
            hardness = negatives.detach()
            if ranked_by is not None:
                with torch.no_grad():
                    keys_ranked = [ranked_by.vectors_of(view, chosen) for view in (0, 1)]
                    hardness = similarities(ranked_by.vectors_at(here, points[here]), keys_ranked, near, sources)
            negatives = pick_hard(negatives, hardness, options, draws)
        if options.num_other > 0:
            similarity = (queries[here] @ others.T).masked_fill(is_own, EXCLUDED)
            negatives = torch.cat([negatives, similarity], dim=-1)
        losses.append(info_nce(positive, negatives, options.temperature).mean())
    return torch.stack(losses).mean()


def similarities(queries: Tensor, keys: list[Tensor], near: list[Tensor], sources: Sequence[int]) -> Tensor:
    """Similarity of queries [B, N, C] to the keys [B, K, C] of the views `sources`, `EXCLUDED` where too near."""
    parts = [(queries @ keys[view].transpose(1, 2)).masked_fill(near[view], EXCLUDED) for view in sources]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def draw_others(level: Level, draws: Tensor, num_other: int) -> tuple[Tensor, Tensor]:
    """`num_other` vectors of view b of each of the joined batch's V volumes at random voxels, gathered from all ranks.

    Returns:
        [V * num_other, C], and the draws of the volumes they come from, int64 [V * num_other].
    """
    shape = level.key_shape()
    chosen = [torch.randint(math.prod(shape), (num_other,), generator=stream(d, 2)) for d in draws.tolist()]
    voxels = torch.stack(chosen).to(level.parts[1][0].device)
    vectors = gather_with_gradient(level.vectors_of(1, voxels)).flatten(0, 1)
    return vectors, gather_with_gradient(draws.to(vectors.device)).repeat_interleave(num_other)


def stream(draw: int, purpose: int) -> torch.Generator:
    """The random numbers of one sample for one purpose, whatever rank or batch it is in."""
    return torch.Generator().manual_seed(draw * 4 + purpose)


def gather_with_gradient(mine: Tensor) -> Tensor:
    """The tensors of all ranks (equal shapes) joined along the first axis, whose gradients are summed over ranks.

    Without a process group, `mine` itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mine
    return torch.cat(dist.nn.functional.all_gather(mine.contiguous()))


class SamLoss(torch.nn.Module):
    """The weighted sum of the levels `fine`, `coarse` and `joint`.

    The fine level's hard negatives are ranked by the joint similarity, as published.

    Args:
        levels: options of each of `LEVELS`; a weight of 0 leaves the level out.
        fine_grid, coarse_grid: of the network (`AnatomicalEmbedder.fine_grid()`, `.coarse_grid()`).
        spacing_mm: of the input voxels, (D, H, W).
    """

    def __init__(
        self,
        levels: dict[str, LevelOptions],
        fine_grid: OutputGrid,
        coarse_grid: OutputGrid,
        spacing_mm: Sequence[float],
    ) -> None:
        super().__init__()
        if not any(options.weight > 0 for options in levels.values()):
            raise ValueError("every level of SAM's loss has weight 0; raise --fine_weight and --coarse_weight")
        self.options = levels
        self.grids = {"fine": (fine_grid,), "coarse": (coarse_grid,), "joint": (fine_grid, coarse_grid)}
        self.spacing_mm = tuple(spacing_mm)

    def forward(
        self,
        fine: tuple[Tensor, Tensor],
        coarse: tuple[Tensor, Tensor],
        points: tuple[Tensor, Tensor],
        draws: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its detached terms `loss_fine`, `loss_coarse`, `loss_joint` (of the levels in use).

        Args:
            fine, coarse: embeddings of (view a, view b), each [B, C, ...].
            points: corresponding input voxel indices in (view a, view b), each [B, N, 3].
            draws: [B] sample numbers, see `level_loss`.
        """
        maps = {"fine": ((fine[0],), (fine[1],)), "coarse": ((coarse[0],), (coarse[1],))}
        maps["joint"] = tuple(zip(fine, coarse))
        levels = {name: Level(maps[name], self.grids[name]) for name in LEVELS}
        total, terms = fine[0].new_zeros((), dtype=torch.float32), {}
        for name in LEVELS:
            options = self.options[name]
            if options.weight > 0:
                ranked_by = levels["joint"] if name == "fine" else None
                loss = level_loss(levels[name], points, draws, self.spacing_mm, options, ranked_by)
                terms[f"loss_{name}"] = loss.detach()
                total = total + options.weight * loss
        return total, terms

"""The most similar voxel of a key for many queries: by looking at all of them, or only where the coarse map allows it.

Yan et al., "SAM", TMI 2022, Sec. III-B: similarity is the mean of the fine and the coarse cosine. A fine cosine is at
most 1, so that a voxel whose coarse cosine c is known can reach (1 + c) / 2 and no more: once a query has found a
better voxel, everything with a lower bound is out, and the search stays exact. A trained coarse map leaves a few per
cent of the body in question; an untrained one leaves all of it, and the search then costs what looking at all costs.

The coarse map is never interpolated to the fine grid with all its channels: interpolation is linear, so the few
similarities on the coarse grid are interpolated and divided by the length of the interpolated vector.
"""

import itertools
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from sam_embed.embeddings.embedding_store import Embedding

ROWS_PER_BLOCK = 128  # queries that are compared with a slab at a time, on a CPU
TILE_VOX = 2048  # fine voxels that are searched in one product: small enough to skip many, large enough to be fast
MIN_VOX_PER_CELL = 32
LENGTH_LIMIT = 1.02  # of stored vectors; unit length but for half precision, quantisation, or import
ROUNDING = 1e-5  # by which a bound may miss what it bounds, in float32
WORTHWHILE = 0.5  # share of queries times tiles below which skipping the others pays
MANY = 256  # queries from which on tiles pay even where none is skipped: similarities to a tile stay in the cache
PROBE_STEP = 2  # fine voxels between those at which a query's first tile is probed


class QueryVectors(NamedTuple):
    """The embeddings at N points: [N, C] each, unit length; `semantic` for networks that have it."""

    fine: Tensor
    coarse: Tensor
    semantic: Tensor | None

    def rows(self, chosen: Tensor) -> "QueryVectors":
        """Those of some points."""
        return QueryVectors(*(part if part is None else part[chosen] for part in self))


class Run(NamedTuple):
    """A run of fine voxels along one axis, and the coarse voxels between which they lie; stops are exclusive."""

    first: int
    last: int
    coarse_first: int
    coarse_last: int


class SearchGrid:
    """What a search needs of a key beyond its embedding, made once per embedding, on the embedding's device.

    Attributes:
        weights: per axis, float32 [fine size, coarse size]: linear interpolation as a matrix.
        length: float32 [d, h, w], of the interpolated coarse vector, by which its similarities are divided.
        inverse_length: 1 / length.
    """

    def __init__(self, key: Embedding) -> None:
        self._coarse = key.coarse.float()
        self._shape = tuple(key.fine.shape[1:])
        low, self.weights = [], []
        for positions, size in zip(key.coarse_positions, key.coarse.shape[1:]):
            neighbour, matrix = linear_weights(positions, size)
            low.append(neighbour)
            self.weights.append(torch.from_numpy(matrix).to(key.coarse.device))
        self.length = self._interpolated_length()
        self.inverse_length = self.length.reciprocal()
        self.runs = _runs(low, self._coarse.shape[1:])

    @property
    def has_large_cells(self) -> bool:
        """Whether so many fine voxels lie in a cell of the coarse grid that a tile has few coarse voxels around it."""
        cells = np.prod([max(size - 1, 1) for size in self._coarse.shape[1:]])
        return np.prod(self._shape) >= MIN_VOX_PER_CELL * cells

    def on_fine(self, values: Tensor, first: int, last: int) -> Tensor:
        """Interpolate values [N, d', h', w'] at the fine slices first..last (exclusive): [N, last - first, h, w].

        Three matrix products: many times faster than gathering neighbours, as the coarse grid is short. In memory the
        slices stand in front: what lies between two coarse slices is then one product with a long side, several times
        as fast as N products with short ones. Beyond the outermost coarse voxels their value continues.
        """
        along_d, along_h, along_w = self.weights
        used = along_d[first:last].any(dim=0).nonzero()  # the few coarse slices between which these fine ones lie
        low, high = int(used[0]), int(used[-1]) + 1
        in_slice = (along_h @ (values[:, low:high] @ along_w.T)).transpose(0, 1)  # [high - low, N, h, w]
        return (along_d[first:last, low:high] @ in_slice.flatten(1)).unflatten(1, in_slice.shape[1:]).transpose(0, 1)

    def _interpolated_length(self) -> Tensor:
        """Squared, it is a sum over pairs of neighbours of two weights times a scalar product on the coarse grid.

        For each of the 27 offsets between two neighbours that is a separable interpolation of one map of products,
        instead of one of every channel.
        """
        total = torch.zeros(self._shape, device=self._coarse.device)
        for offset in np.ndindex(3, 3, 3):
            shift = [step - 1 for step in offset]
            products = (self._coarse * _shifted(self._coarse, shift)).sum(dim=0)
            along_d, along_h, along_w = (
                weights * _shifted(weights, [0, step]) for weights, step in zip(self.weights, shift)
            )
            in_slice = along_h @ (products @ along_w.T)
            total += (along_d @ in_slice.flatten(1)).view(self._shape)
        return total.clamp_min(1e-12).sqrt_()

    def tile_weights(self, tile: tuple[Run, Run, Run], step: int, out: Tensor) -> None:
        """Write interpolation and division by length at once.

        Args:
            step: every so many of the tile's fine voxels along each axis.
            out: float32 [coarse voxels around the tile, fine voxels in it].
        """
        along_d, along_h, along_w = (
            weights[run.first : run.last : step, run.coarse_first : run.coarse_last].T
            for weights, run in zip(self.weights, tile)
        )
        plane = (along_h[:, None, :, None] * along_w[None, :, None, :]).flatten(0, 1).flatten(1)  # [h' * w', h * w]
        length = self.length[tuple(slice(run.first, run.last, step) for run in tile)]
        scaled = along_d[:, :, None] / length.flatten(1)  # [d', d, h * w]
        shape = (len(scaled), len(plane), *scaled.shape[1:])
        torch.mul(scaled[:, None], plane[None, :, None], out=out.view(shape))


_GRIDS: WeakKeyDictionary[Embedding, SearchGrid] = WeakKeyDictionary()


def grid_of(key: Embedding) -> SearchGrid:
    """The grid of an embedding; kept as long as the embedding lives."""
    grid = _GRIDS.get(key)
    if grid is None:
        grid = _GRIDS[key] = SearchGrid(key)
    return grid


def linear_weights(positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower neighbour int [P] of each position, and float32 [P, size] with both neighbours' weights in each row.

    Positions outside of 0..size - 1 clamp to the ends.
    """
    clamped = np.clip(positions, 0, size - 1)
    low = np.minimum(np.floor(clamped).astype(np.int64), max(size - 2, 0))
    rows = np.arange(len(positions))
    weights = np.zeros((len(positions), size), dtype=np.float32)
    np.add.at(weights, (rows, low), 1 - (clamped - low))
    np.add.at(weights, (rows, np.minimum(low + 1, size - 1)), clamped - low)
    return low, weights


def _shifted(values: Tensor, shift: list[int]) -> Tensor:
    """values[..., index + shift] over the last axes, 0 where that lies outside."""
    for axis, step in enumerate(shift, start=values.ndim - len(shift)):
        if step:
            values = values.roll(-step, dims=axis)
            values.select(axis, -1 if step > 0 else 0).zero_()
    return values


def _runs(low: list[np.ndarray], coarse_shape: tuple[int, ...]) -> list[list[Run]]:
    """Cut each axis between cells of the coarse grid, so that a tile of three runs has about TILE_VOX voxels."""
    cells = [1, 1, 1]  # per tile and axis
    vox_per_cell = [len(axis) / max(int(axis[-1]) + 1, 1) for axis in low]

    def can_grow(axis: int) -> bool:
        return cells[axis] < low[axis][-1] + 1

    while np.prod(np.multiply(cells, vox_per_cell)) < TILE_VOX and any(map(can_grow, range(3))):
        shortest = min(filter(can_grow, range(3)), key=lambda axis: cells[axis] * vox_per_cell[axis])
        cells[shortest] += 1
    runs = []
    for axis in range(3):
        number = low[axis] // cells[axis]
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
        runs.append(
            [
                Run(first, last, int(low[axis][first]), min(int(low[axis][last - 1]) + 2, coarse_shape[axis]))
                for first, last in zip(edges, edges[1:])
            ]
        )
    return runs


def _max_over_runs(values: Tensor, ranges: list[list[tuple[int, int]]]) -> Tensor:
    """The largest value [N, a, b, c] in each box of the three axes' ranges of [N, d, h, w]."""
    for axis, axis_ranges in enumerate(ranges, start=1):
        values = torch.stack([values.narrow(axis, i, j - i).amax(dim=axis) for i, j in axis_ranges], dim=axis)
    return values


def maps_of(vectors: QueryVectors, key: Embedding) -> list[tuple[Tensor, Tensor]]:
    """Each of the key's maps on its fine grid [C, d, h, w], and the query vectors [N, C] for it."""
    pairs = [(key.fine, vectors.fine), (key.semantic, vectors.semantic)]
    return pairs[: 1 if key.semantic is None else 2]


def slices_of(part: Tensor, first: int, last: int) -> Tensor:
    """The slices first..last (exclusive) of a map, float32 [last - first, C, h * w]."""
    return part[:, first:last].float().flatten(2).transpose(0, 1)


def summed_cosines(
    grid: SearchGrid, coarse_similarity: Tensor, maps: list[tuple[Tensor, Tensor]], first: int, last: int
) -> Tensor:
    """The sum of the coarse cosine and those of further maps at the slices first..last (exclusive), [slices, N, h * w].

    Args:
        coarse_similarity: [N, d', h', w'], dot products on the key's coarse grid.
        maps: for each, `slices_of` it and its query vectors [N, C].
    """
    total = grid.on_fine(coarse_similarity, first, last).transpose(0, 1).flatten(2)
    total.mul_(grid.inverse_length[first:last].flatten(1)[:, None])
    for slices, asked in maps:
        total.baddbmm_(asked.expand(last - first, -1, -1), slices)
    return total


def similarity_slab(vectors: QueryVectors, coarse_similarity: Tensor, key: Embedding, first: int, last: int) -> Tensor:
    """Mean similarity [N, last - first, h, w] of the query vectors to the key's fine slices first..last (exclusive).

    Args:
        coarse_similarity: [N, d', h', w'], dot products on the key's coarse grid.
    """
    maps = [(slices_of(part, first, last), asked) for part, asked in maps_of(vectors, key)]
    total = summed_cosines(grid_of(key), coarse_similarity, maps, first, last).div_(1 + len(maps))
    return total.unflatten(2, key.fine.shape[2:]).transpose(0, 1)


def search_all(vectors: QueryVectors, key: Embedding, memory_mb: float) -> tuple[Tensor, Tensor]:
    """The most similar fine voxel of each query, by one matrix product with all of them, slab by slab.

    Returns:
        Flat index int64 [N] and score float32 [N].
    """
    num_points, (depth, height, width) = len(vectors.fine), key.fine.shape[1:]
    grid, coarse = grid_of(key), coarse_similarities(vectors, key)
    maps = maps_of(vectors, key)
    # On a CPU a few queries at a time: their similarities are then read again while they are in its cache.
    num_rows = min(num_points, ROWS_PER_BLOCK) if coarse.device.type == "cpu" else num_points
    bytes_per_slice = 4 * height * width * (2 * num_rows + 2 * key.fine.shape[0])
    num_slices = max(1, int(memory_mb * 2**20 / bytes_per_slice))
    best = torch.full((num_points,), -torch.inf, device=coarse.device)
    where = torch.zeros(num_points, dtype=torch.int64, device=coarse.device)
    for first in range(0, depth, num_slices):
        last = min(depth, first + num_slices)
        slices = [slices_of(part, first, last) for part, _ in maps]
        for start in range(0, num_points, num_rows):
            rows = slice(start, start + num_rows)
            asked = [(part, of_all[rows]) for part, (_, of_all) in zip(slices, maps)]
            total = summed_cosines(grid, coarse[rows], asked, first, last)
            score, flat = _row_maxima(total)
            score, at = score.max(dim=0)
            flat = flat.gather(0, at[None])[0] + (first + at) * height * width
            better = score > best[rows]
            best[rows] = torch.where(better, score, best[rows])
            where[rows] = torch.where(better, flat, where[rows])
    return where, best / (1 + len(maps))


def _row_maxima(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value [...] of each row [..., M], and where it first stands."""
    if values.device.type != "cpu":
        return values.max(dim=-1)
    where = torch.from_numpy(values.numpy().argmax(axis=-1))  # three times as fast as PyTorch's
    return values.gather(-1, where[..., None])[..., 0], where


def coarse_similarities(vectors: QueryVectors, key: Embedding) -> Tensor:
    """Dot products [N, d', h', w'] on the key's coarse grid."""
    return torch.einsum("nc,cdhw->ndhw", vectors.coarse, key.coarse.float())


class _TileSearch:
    """The running result of `search_where_possible`."""

    def __init__(self, vectors: QueryVectors, key: Embedding) -> None:
        self.vectors, self.key, self.grid = vectors, key, grid_of(key)
        self.coarse = coarse_similarities(vectors, key)
        self.maps = [part for part in (key.fine, key.semantic) if part is not None]
        self.best = torch.full((len(vectors.fine),), -torch.inf)
        self.where = torch.zeros(len(vectors.fine), dtype=torch.int64)

    def coarse_bounds(self) -> Tensor:
        """float32 [N, tiles along D, H, W]: no coarse cosine in a tile is larger; may exceed 1."""
        ranges = [[(run.coarse_first, run.coarse_last) for run in axis] for axis in self.grid.runs]
        fine_ranges = [[(run.first, run.last) for run in axis] for axis in self.grid.runs]
        least_length = -_max_over_runs(-self.grid.length[None], fine_ranges)[0]
        return _max_over_runs(self.coarse, ranges).clamp_min(0) / least_length

    def visit(self, tile: tuple[Run, Run, Run], chosen: Tensor, step: int = 1) -> None:
        """Look at a tile's voxels, every `step`th along each axis, for some of the queries."""
        corners = tuple(slice(run.coarse_first, run.coarse_last) for run in tile)
        vectors = self.vectors.rows(chosen)
        ours = [vectors.fine, vectors.semantic, self.coarse[(chosen, *corners)].flatten(1)]
        ours = torch.cat([part for part in ours if part is not None], dim=1)
        score, flat = _row_maxima(ours @ self._tile_maps(tile, step, ours.shape[1]))
        score /= 1 + len(self.maps)
        _, height, width = self.key.fine.shape[1:]
        place = torch.unravel_index(flat, [len(range(run.first, run.last, step)) for run in tile])
        d, h, w = (at * step + run.first for at, run in zip(place, tile))
        flat = (d * height + h) * width + w
        # Of equally similar voxels the first one, as when all are looked at in order.
        best, where = self.best[chosen], self.where[chosen]
        better = (score > best) | ((score == best) & (flat < where))
        self.best[chosen], self.where[chosen] = torch.where(better, score, best), torch.where(better, flat, where)

    def _tile_maps(self, tile: tuple[Run, Run, Run], step: int, num_rows: int) -> Tensor:
        """float32 [num_rows, voxels]: the tile's fine (and semantic) maps, below them its interpolation weights."""
        box = tuple(slice(run.first, run.last, step) for run in tile)
        shape = self.key.fine[(0, *box)].shape
        result = torch.empty(num_rows, *shape)
        row = 0
        for part in self.maps:
            result[row : row + len(part)] = part[(slice(None), *box)]
            row += len(part)
        result = result.flatten(1)
        self.grid.tile_weights(tile, step, result[row:])
        return result


def search_where_possible(vectors: QueryVectors, key: Embedding, memory_mb: float) -> tuple[Tensor, Tensor]:
    """As `search_all`, on the CPU, looking only at tiles that may hold a better voxel than the best one found.

    Each query first probes its most promising tile; where that leaves most of the volume in question to few queries,
    all is looked at.
    The result is that of looking at all (but for rounding in the seventh digit, where two voxels are equally similar),
    provided that stored vectors are no longer than LENGTH_LIMIT.
    """
    search = _TileSearch(vectors, key)
    coarse_bounds = search.coarse_bounds()
    tiles = list(itertools.product(*search.grid.runs))
    promising = coarse_bounds.flatten(1).argmax(dim=1)
    begin = promising.unique().tolist()
    for number in begin:
        search.visit(tiles[number], (promising == number).nonzero()[:, 0], PROBE_STEP)
    num_maps = len(search.maps)
    bounds = (coarse_bounds.clamp_max(1) + LENGTH_LIMIT * num_maps) / (1 + num_maps) + ROUNDING
    bounds = bounds.flatten(1).T.contiguous()  # [tiles, N]: no similarity in a tile is larger
    in_question = bounds >= search.best
    if len(search.best) < MANY and in_question.float().mean() > WORTHWHILE:
        return search_all(vectors, key, memory_mb)
    left = in_question.any(dim=1)
    left[begin] = False
    for number in begin + left.nonzero()[:, 0].tolist():
        chosen = (bounds[number] >= search.best).nonzero()[:, 0]
        if len(chosen):
            search.visit(tiles[number], chosen)
    return search.where, search.best

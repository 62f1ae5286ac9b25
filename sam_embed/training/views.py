"""Two views of one CT volume with exactly known correspondences: the self-supervision of SAM training.

Yan et al., "SAM", TMI 2022, Sec. III-A: one volume is seen twice, under different geometry and intensity, and the same
place must get the same embedding in both. Beyond the published crops and scales a view may be rotated, sheared and
smoothly bent (patients differ by more than scale), and its scan range may end early. Nothing here knows landmarks or
labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.ct.intensity import AIR_HU
from datasets.samples.random_contrast import IntensityOptions, change_intensity, uniform
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.preprocess import scale_hu
from sam_embed.training.warp import Triple, Warp

Range = tuple[float, float]
MAX_DRAWS = 100  # pairs of views; most volumes need one or two


@dataclass(frozen=True)
class ViewOptions:
    """How two views of a volume are made; fields but the first two and the last are flags.

    Attributes:
        shape: voxels of a view (D, H, W).
        spacing_mm: of the source grid and the view, before scaling, (D, H, W).
        min_overlap: of two views along each axis, share of their extent
        max_scale: each axis is scaled by 1 / this to this, half of it in common; 1 = off
        rotate_deg: largest rotation about each axis; 0 = off
        shear: largest shear; 0 = off
        elastic_mm: largest std of the control points' displacement; 0 = off
        elastic_spacing_mm: range of the control points' distance, mm
        truncate: probability that a view's scan ends early, per end; 0 = off
        num_points: corresponding points per pair of views
        intensity: changes of the views' intensities.
    """

    shape: Triple = field(default=(64, 48, 64), metadata={"flag": False})
    spacing_mm: tuple[float, float, float] = field(default=(4.0, 4.0, 4.0), metadata={"flag": False})
    min_overlap: float = 0.6
    max_scale: float = 1.25
    rotate_deg: float = 10.0
    shear: float = 0.08
    elastic_mm: float = 14.0
    elastic_spacing_mm: Range = (50.0, 120.0)
    truncate: float = 0.3
    num_points: int = 256
    intensity: IntensityOptions = field(default_factory=IntensityOptions, metadata={"flag": False})

    def __post_init__(self) -> None:
        wrong = []
        if min(self.shape) < 8:
            wrong.append(f"shape must be at least 8 voxels per axis, got {self.shape}")
        if not 0 < self.min_overlap <= 1:
            wrong.append(f"min_overlap must be in (0, 1], got {self.min_overlap}")
        if self.max_scale < 1:
            wrong.append(f"max_scale must be at least 1, got {self.max_scale}")
        if self.num_points < 1:
            wrong.append(f"num_points must be positive, got {self.num_points}")
        if wrong:
            raise ValueError("view options: " + "; ".join(wrong))


def draw_matrix(options: ViewOptions, rng: torch.Generator) -> Tensor:
    """A random rotation, shear and scale [3, 3]; half of the scale's range is common to the axes."""
    reach = math.log(options.max_scale) / 2
    scale = torch.exp(uniform(rng, -reach, reach) + uniform(rng, -reach, reach, (3,)))
    matrix = torch.diag(scale)
    shear = uniform(rng, -options.shear, options.shear, (3, 3))
    matrix = matrix @ (torch.eye(3, dtype=torch.float64) + shear - torch.diag(shear.diag()))
    for axis in range(3):
        angle = math.radians(float(uniform(rng, -options.rotate_deg, options.rotate_deg)))
        first, second = [i for i in range(3) if i != axis]
        turn = torch.eye(3, dtype=torch.float64)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix


def draw_control(options: ViewOptions, rng: torch.Generator) -> Tensor:
    """Random displacements (mm) of a control lattice, [3, a, b, c] with at least 2 nodes per axis."""
    step = float(uniform(rng, *options.elastic_spacing_mm))
    nodes = [max(2, round((n - 1) * s / step) + 1) for n, s in zip(options.shape, options.spacing_mm)]
    amount = float(uniform(rng, 0.0, options.elastic_mm))
    return torch.randn((3, *nodes), generator=rng, dtype=torch.float64) * amount


def draw_centres(extent_mm: Tensor, options: ViewOptions, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres (volume mm) of two views that overlap by `min_overlap`; one larger than the volume sits near its middle.

    Args:
        extent_mm: [3] size of the volume, mm.
    """
    view_mm = torch.tensor(options.shape, dtype=torch.float64) * torch.tensor(options.spacing_mm, dtype=torch.float64)
    slack = (extent_mm - view_mm).abs() / 2
    low, high = extent_mm / 2 - slack, extent_mm / 2 + slack
    first = low + (high - low) * uniform(rng, 0.0, 1.0, (3,))
    reach = view_mm * (1 - options.min_overlap)
    shift = reach * uniform(rng, -1.0, 1.0, (3,))
    second = torch.minimum(torch.maximum(first + shift, low), high)
    return first, second


def draw_warps(extent_mm: Tensor, options: ViewOptions, rng: torch.Generator) -> tuple[Warp, Warp]:
    """Two random views' geometries for a volume of this size (mm, [3])."""
    warps = []
    for centre in draw_centres(extent_mm, options, rng):
        matrix, control = draw_matrix(options, rng), draw_control(options, rng)
        warps.append(Warp(options.shape, options.spacing_mm, centre, matrix, control))
    return warps[0], warps[1]


def render(hu: Tensor, spacing_mm: tuple[float, ...], warp: Warp, scan_range_mm: Range | None = None) -> Tensor:
    """The volume seen through a warp, trilinear; outside of the volume and of the scan range lies air.

    Args:
        hu: source array [D, H, W], HU.
        spacing_mm: of that array.
        scan_range_mm: first and last volume mm along D that the view shows.

    Returns:
        float32 [d, h, w], HU.
    """
    position = warp.dense()  # [d, h, w, 3] mm
    last = (torch.tensor(hu.shape, dtype=torch.float32) - 1) * torch.tensor(spacing_mm, dtype=torch.float32)
    unit = (position / last * 2 - 1).flip(-1)[None]
    raised = hu[None, None].float() - AIR_HU  # padding by zero then means air
    view = F.grid_sample(raised, unit, align_corners=True, padding_mode="zeros")[0, 0] + AIR_HU
    if scan_range_mm is not None:
        outside = (position[..., 0] < scan_range_mm[0]) | (position[..., 0] > scan_range_mm[1])
        view[outside] = AIR_HU
    return view


def draw_scan_range(warp: Warp, extent_mm: float, options: ViewOptions, rng: torch.Generator) -> Range:
    """A scan range (volume mm along D) that may cut off up to a quarter of the view's extent at either end."""
    reach = options.shape[0] * options.spacing_mm[0]
    low = max(0.0, float(warp.centre[0]) - reach / 2)
    high = min(extent_mm, float(warp.centre[0]) + reach / 2)
    cuts = uniform(rng, 0.0, 0.25, (2,)) * (uniform(rng, 0.0, 1.0, (2,)) < options.truncate)
    length = high - low
    first = low + float(cuts[0]) * length if cuts[0] > 0 else -math.inf
    stop = high - float(cuts[1]) * length if cuts[1] > 0 else math.inf
    return first, stop


def lookup(mask: Tensor, point_mm: Tensor, spacing_mm: tuple[float, ...]) -> Tensor:
    """Whether points [N, 3] (volume mm) lie in a boolean mask [D, H, W]; False outside of the array."""
    index = (point_mm / torch.tensor(spacing_mm, dtype=point_mm.dtype)).round().long()
    inside = ((index >= 0) & (index < torch.tensor(mask.shape))).all(dim=1)
    index = torch.where(inside[:, None], index, 0)
    return inside & mask[index[:, 0], index[:, 1], index[:, 2]]


def draw_points(
    warps: tuple[Warp, Warp],
    scan_ranges: tuple[Range, Range],
    body: Tensor,
    spacing_mm: tuple[float, ...],
    options: ViewOptions,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor] | None:
    """Corresponding view indices: [num_points, 3] in each view, inside both views, scan ranges and the body mask.

    Returns:
        Two float32 tensors, or None when the views have too little in common (fewer than 8 of the drawn places).
    """
    shape = torch.tensor(options.shape, dtype=torch.float64)
    first = torch.rand((16 * options.num_points, 3), generator=rng, dtype=torch.float64) * (shape - 1)
    point = warps[0].to_volume(first)
    kept = lookup(body, point, spacing_mm)
    for low, high in scan_ranges:
        kept &= (point[:, 0] >= low) & (point[:, 0] <= high)
    first, point = first[kept], point[kept]
    second = warps[1].to_view(point)
    kept = ((second >= 0) & (second <= shape - 1)).all(dim=1)
    first, second = first[kept], second[kept]
    if len(first) < 8:
        return None
    chosen = torch.arange(options.num_points) % len(first)  # repeats where the overlap is small
    return first[chosen].float(), second[chosen].float()


@dataclass(frozen=True)
class TrainingVolume:
    """One volume on SAM's grid: `hu` int16 [D, H, W], `body` bool [D, H, W] (True = inside), `spacing_mm` (D, H, W)."""

    name: str
    hu: Tensor
    body: Tensor
    spacing_mm: tuple[float, float, float]


def make_pair(volume: TrainingVolume, options: ViewOptions, rng: torch.Generator) -> dict[str, Tensor]:
    """Two views (HU, float32 [D, H, W]) of a volume and their corresponding points (view indices, [N, 3]).

    Raises:
        ValueError: views of this volume have no places in common, however often they are drawn.
    """
    extent = torch.tensor(volume.hu.shape, dtype=torch.float64) * torch.tensor(volume.spacing_mm, dtype=torch.float64)
    for _ in range(MAX_DRAWS):
        warps = draw_warps(extent, options, rng)
        ranges = tuple(draw_scan_range(warp, float(extent[0]), options, rng) for warp in warps)
        points = draw_points(warps, ranges, volume.body, volume.spacing_mm, options, rng)
        if points is not None:
            break
    else:
        raise ValueError(
            f"case {volume.name}: {MAX_DRAWS} pairs of views had no places in common; it shows too little of a patient "
            f"({int(volume.body.sum())} voxels of {volume.spacing_mm} mm). Take it out of --json_list"
        )
    views = [render(volume.hu, volume.spacing_mm, warp, span) for warp, span in zip(warps, ranges)]
    view_a, view_b = (change_intensity(view, options.spacing_mm, options.intensity, rng) for view in views)
    return {"view_a": view_a, "view_b": view_b, "points_a": points[0], "points_b": points[1]}


class ViewPairDataset(torch.utils.data.Dataset):
    """View pairs of volumes; item i is a pure function of (seed, i), whoever asks for it.

    Each run of `len(volumes)` consecutive items holds every volume once, so that the volumes of a batch differ.

    Args:
        volumes: on one grid.
        options: of the views.
        info: how HU become the network's input.
        seed: another seed gives other views.
    """

    def __init__(self, volumes: Sequence[TrainingVolume], options: ViewOptions, info: EmbedderInfo, seed: int) -> None:
        if not volumes:
            raise ValueError("no training volumes: the data list is empty or none of its volumes was read")
        self.volumes = volumes
        self.options = options
        self.info = info
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        turn, place = divmod(index, len(self.volumes))
        order = torch.randperm(len(self.volumes), generator=generator(self.seed, 0, turn))
        case = int(order[place])
        pair = make_pair(self.volumes[case], self.options, generator(self.seed, 1, index))
        for name in ("view_a", "view_b"):
            pair[name] = scale_hu(pair[name], self.info)[None]  # [1, D, H, W]
        return {**pair, "case": torch.tensor(case), "draw": torch.tensor(index)}


def generator(*words: int) -> torch.Generator:
    """A generator whose stream depends on all words (mixed by NumPy's seed sequence) and on nothing else."""
    state = np.random.SeedSequence([int(word) for word in words]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))

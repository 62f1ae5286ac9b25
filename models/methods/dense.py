"""Dense alignment: features of single points of a crop, and what they should say (Alice's fourth term).

A sample brings P points of each crop, the vectors a(p) of a frozen SAM at them, and for `across` the match p' of p in
the other crop (`datasets.samples.anatomy`). The features of a point are the network's maps interpolated there, joined:

    x_s(p) = [map_2(p), map_4(p), ...] of the student under its mask       x_t(p) likewise of the unmasked teacher
    g = MLP(norm(x)),   q = a second MLP (across only)

    distil           q not built      f = g_s(x_s(p))       target a(p)             cosine
    across           with q           f = q(g_s(x_s(p)))    target g_t(x_t(p'))     cosine, weight w(p)
    across_contrast  with q           the same              the same                contrast, weight w(p)
    coordinates      q not built      f = g_s(x_s(p))       target z(p)             coordinates

Errors: `losses.dense`. w(p): `datasets.samples.anatomy`. g_t is the moving average of g_s. z(p) are coordinates of the
body, the whitened first principal components of SAM's vectors (`sam_embed.embeddings.body_coordinates`).

Shape letters: `models.backbones.interface`; R = B * V rows, P points of a row.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.samples.anatomy import AnatomyRequest
from losses.collapse import feature_spread
from losses.dense import (
    contrast_errors,
    coordinate_errors,
    cosine_errors,
    directions,
    mean_over_points,
    nearest_share,
)
from losses.distillation import swap_views
from models.backbones.interface import Backbone, Size3
from models.methods.method import Batch, rows_of

FINEST_STRIDE = 2  # maps at stride 1 hold little but intensities, and are the largest
NUM_COORDINATES = 3
NUM_CANDIDATES = 256  # places of the other crop: the nearest to any is some 14 mm away in 192 x 144 x 144 mm


@dataclass(frozen=True)
class DenseOptions:
    """Flags of the dense term.

    Attributes:
        lambda4: weight of loss_dense, alignment with SAM's vectors at points (needs --embed_dir); 0 = off
        dense_variant: what features at a point predict: SAM's vector (distil), the teacher's features at the matched
            point of the other patient by regression (across) or contrast, or coordinates of the body
        dense_points: points of each crop
        dense_maps: maps that features are read from; across takes the encoder's, the teacher has no others
        dense_hidden_dim: width of the hidden layer of its MLPs
        dense_temp: temperature of across_contrast
        dense_near_mm: places nearer than this are no negatives of across_contrast, mm
        dense_warmup_epochs: epochs before it counts; 0 = from the start
    """

    lambda4: float = 0.0
    dense_variant: Literal["distil", "across", "across_contrast", "coordinates"] = "distil"
    dense_points: int = 96
    dense_maps: Literal["encoder", "decoder", "both"] = "encoder"
    dense_hidden_dim: int = 256
    dense_temp: float = 0.1
    dense_near_mm: float = 20.0
    dense_warmup_epochs: float = 0.0
    vector_dim: int = field(default=0, metadata={"flag": False})  # channels of SAM's vectors, which the data decide

    def __post_init__(self) -> None:
        for name in ("dense_points", "dense_hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more")
        for name in ("lambda4", "dense_near_mm", "dense_warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 0 or more")
        if self.dense_temp <= 0:
            raise ValueError(f"--dense_temp {self.dense_temp}: expected more than 0")
        if self.is_across and self.dense_maps != "encoder":
            raise ValueError(
                f"--dense_maps {self.dense_maps}: --dense_variant {self.dense_variant} compares with the teacher, "
                "which has no decoder; expected --dense_maps encoder"
            )

    @property
    def is_across(self) -> bool:
        """Whether points are compared with the teacher's of the other crop."""
        return self.dense_variant in ("across", "across_contrast")

    @property
    def anatomy_request(self) -> AnatomyRequest | None:
        """What every sample must bring; None where the term is off."""
        if not self.lambda4:
            return None
        num_candidates = NUM_CANDIDATES if self.is_across else 0
        num_coordinates = NUM_COORDINATES if self.dense_variant == "coordinates" else 0
        return AnatomyRequest(self.dense_points, num_candidates, num_coordinates)


class DenseHead(nn.Module):
    """Reads features of points from maps, and projects them."""

    def __init__(self, options: DenseOptions, backbone: Backbone) -> None:
        """Build for the maps of `backbone` that the options name.

        Raises:
            ValueError: no such map, or the size of the vectors to predict is not known.
        """
        super().__init__()
        self.with_encoder, self.with_decoder = (options.dense_maps in (name, "both") for name in ("encoder", "decoder"))
        widths = [
            width
            for is_used, channels in (
                (self.with_encoder, backbone.channels),
                (self.with_decoder, backbone.decoder_channels),
            )
            for stride, width in channels.items()
            if is_used and stride >= FINEST_STRIDE
        ]
        if not widths:
            raise ValueError(f"--dense_maps {options.dense_maps}: this --backbone has none")
        hidden_dim = options.dense_hidden_dim
        out_dim = {"distil": options.vector_dim, "coordinates": NUM_COORDINATES}.get(options.dense_variant, hidden_dim)
        if out_dim < 1:
            raise ValueError(f"--lambda4 {options.lambda4:g}: the size of SAM's vectors is not known (--embed_dir)")
        self.norm = nn.LayerNorm(sum(widths))
        self.projector = two_layers(sum(widths), hidden_dim, out_dim)
        self.predictor = two_layers(out_dim, hidden_dim, out_dim) if options.is_across else None

    def pick(self, encoded: dict[int, Tensor], decoded: dict[int, Tensor] | None = None) -> list[Tensor]:
        """The maps that features are read from."""
        used = [encoded] * self.with_encoder + [decoded] * self.with_decoder
        return [one for maps in used for stride, one in maps.items() if stride >= FINEST_STRIDE]

    def forward(self, maps: list[Tensor], points_vox: Tensor, roi: Size3) -> Tensor:
        """Project the features at points.

        Args:
            maps: of `pick`, [R, C, d, h, w].
            points_vox: [R, P, 3] in voxels of crops of `roi` voxels.

        Returns:
            [R, P, out], float32.
        """
        with torch.autocast(points_vox.device.type, enabled=False):
            joined = torch.cat([sample_map(one.float(), points_vox, roi) for one in maps], dim=2)
            return self.projector(self.norm(joined))

    def predict(self, projected: Tensor) -> Tensor:
        """What the student says of its projection, float32 [R, P, out]."""
        if self.predictor is None:
            return projected
        with torch.autocast(projected.device.type, enabled=False):
            return self.predictor(projected)

    def target_twin(self) -> "DenseHead":
        """An independent copy for the teacher, which predicts nothing."""
        twin = copy.deepcopy(self)
        twin.predictor = None
        return twin


def two_layers(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))


def sample_map(feature_map: Tensor, points_vox: Tensor, roi: Size3) -> Tensor:
    """Values of a map between its cells: trilinear, borders continue.

    Cell j along an axis covers voxels j s to (j + 1) s - 1 of the crop, s = roi / cells, so that its centre lies at
    voxel (j + 1/2) s - 1/2.

    Args:
        feature_map: [R, C, d, h, w].
        points_vox: [R, P, 3] (D, H, W); the centre of the crop's first voxel is 0.

    Returns:
        [R, P, C].
    """
    # The crop is -1 to 1 along each axis; grid_sample takes W first.
    grid = torch.stack([(2 * points_vox[..., axis] + 1) / roi[axis] - 1 for axis in (2, 1, 0)], dim=-1)
    grid = grid[:, :, None, None].to(feature_map.dtype)  # [R, P, 1, 1, 3]
    values = F.grid_sample(feature_map, grid, padding_mode="border", align_corners=False)
    return values[..., 0, 0].transpose(1, 2)


def dense_schedule(options: DenseOptions, steps_per_epoch: int) -> dict[str, Callable[[int], float]]:
    """The weight of the term per step, 0 at first; nothing where the term is off."""
    num_warmup_steps = round(options.dense_warmup_epochs * steps_per_epoch)
    schedule = {"lambda4": lambda step: options.lambda4 * (step >= num_warmup_steps)}
    return schedule if options.lambda4 else {}


def dense_loss(
    options: DenseOptions,
    heads: tuple[DenseHead, DenseHead | None],
    maps: tuple[list[Tensor], list[Tensor] | None],
    batch: Batch,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The dense term of a batch and its monitors; heads and maps are the student's and the teacher's.

    Monitors: "dense_nearest", the share of points whose prediction is nearest to their own target among the points of
    their crop; "dense_std", the spread of predictions (of directions: see `losses.collapse.feature_spread`).
    """
    (student, teacher), (student_maps, teacher_maps) = heads, maps
    roi = tuple(batch["crop"].shape[3:])
    predicted = student.predict(student(student_maps, rows_of(batch["points_vox"]), roi))  # [R, P, out]
    weights = rows_of(batch["has_anatomy"]).to(predicted.dtype)[:, None].expand(predicted.shape[:2])
    if options.is_across:
        weights = rows_of(batch["match_weight"]).to(predicted.dtype)
        with torch.no_grad():  # the matches of Q lie in K, and the reverse
            targets = teacher([swap_views(one) for one in teacher_maps], rows_of(batch["match_vox"]), roi)
    else:
        targets = rows_of(batch["anatomy"])
    if options.dense_variant == "coordinates":
        errors = coordinate_errors(predicted, targets)
    elif options.dense_variant == "across_contrast":
        places_mm = rows_of(batch["match_mm"]).float()
        errors = contrast_errors(predicted, targets, places_mm, options.dense_temp, options.dense_near_mm)
    else:
        errors = cosine_errors(predicted, targets)
    with torch.no_grad():
        shown = (
            (predicted, targets) if options.dense_variant == "coordinates" else map(directions, (predicted, targets))
        )
        monitors = {
            "dense_nearest": nearest_share(*shown, weights),
            "dense_std": feature_spread(predicted.flatten(0, 1)),
        }
    return mean_over_points(errors, weights), monitors

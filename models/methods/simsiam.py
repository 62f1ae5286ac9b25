"""SimSiam: two views predict each other, without negatives and without a teacher (Chen and He, CVPR 2021, algorithm 1).

Here the views are two crops of one volume whose overlap lies in a range (IoU-based positives, Konieczkowicz, AGH Kraków
2023): `--pairing iou --iou_range 0.3 0.6`. Sizes and settings are those of that work; its control, two crops anywhere
in one volume, is `--iou_range 0 1`.

    f = mean over the places of the deepest encoder map      z = projector(f)      p = predictor(z)
    loss_cosine = -1/2 mean cos(p1, z2) - 1/2 mean cos(p2, z1)          no gradient through z2 and z1 here

Each view runs in a forward of its own: the batch norms of the heads must compare samples, not the two views of one.
Without negatives nothing in the loss forbids that all predictions are one point. `collapse` watches that: 0 = they
spread over the sphere, 1 = they are one point. It looks at p, because z has just been normalised over the batch.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from datasets.samples.move import MoveOptions
from losses.collapse import feature_spread
from models.backbones.interface import Backbone, MakeBackbone, pool_tokens
from models.methods.method import Batch, Method, Now


@dataclass(frozen=True)
class SimSiamOptions(MoveOptions):
    """SimSiam's flags.

    Attributes:
        projector_hidden_dim: width of the projector's two hidden layers
        projector_dim: width of projections and predictions
        predictor_dim: width of the predictor's hidden layer; narrower than the projections
    """

    projector_hidden_dim: int = 2048
    projector_dim: int = 2048
    predictor_dim: int = 512

    def __post_init__(self) -> None:
        for name in ("projector_hidden_dim", "projector_dim", "predictor_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more")


class SimSiamStudent(nn.Module):
    """Encoder, projector and predictor."""

    def __init__(self, backbone: Backbone, options: SimSiamOptions) -> None:
        super().__init__()
        self.backbone, self.stride = backbone, max(backbone.channels)
        width = backbone.channels[self.stride]
        self.projector = make_projector(width, options.projector_hidden_dim, options.projector_dim)
        self.predictor = make_predictor(options.projector_dim, options.predictor_dim)

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """One view of each sample, [B, 1, D, H, W] in [0, 1] -> projections and predictions [B, projector_dim]."""
        projections = self.projector(pool_tokens(self.backbone.encode(view), (self.stride,)))
        return projections, self.predictor(projections)


class SimSiam(Method):
    """The method: a student and its loss."""

    Options = SimSiamOptions
    pairings = ("iou", "random", "sam")
    views = {"view": "augmented"}
    constant_lr = ("predictor",)
    sees_batch = True

    def __init__(self, options: SimSiamOptions, make_backbone: MakeBackbone) -> None:
        """Build the student; torch's seed decides the weights."""
        super().__init__()
        self.options = options
        if options.move_views:
            self.views = {"view": "moved"}
        self.student = SimSiamStudent(make_backbone(None, with_masks=False), options)

    def forward(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, from -1 (every prediction is right) to 1; terms are "loss_cosine" and the monitor "collapse".

        Raises:
            ValueError: a batch of one sample, which batch norms cannot normalise.
        """
        views = batch["view"]  # [B, V, 1, D, H, W]
        if len(views) < 2:
            raise ValueError(
                f"--batch_size {len(views)}: SimSiam compares the samples of a batch, expected 2 or more a process"
            )
        z1, p1 = self.student(views[:, 0])
        z2, p2 = self.student(views[:, 1])
        loss = -0.5 * (similarity(p1, z2.detach()) + similarity(p2, z1.detach()))
        collapse = (1.0 - feature_spread(p1, correction=1)).clamp(min=0.0)
        return loss, {"loss_cosine": loss.detach(), "collapse": collapse}


def similarity(left: Tensor, right: Tensor) -> Tensor:
    """Cosine similarity of rows [B, C] and [B, C] in float32, mean over rows."""
    return F.cosine_similarity(left.float(), right.float(), dim=1, eps=1e-8).mean()


def make_projector(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Three linear layers, each with a batch norm; the last norm has no weights of its own."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, out_dim, bias=False),
        nn.BatchNorm1d(out_dim, affine=False),
    )


def make_predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """Two linear layers around a bottleneck; nothing follows the last one."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, dim),
    )

"""DINO: a student learns the teacher's distribution over K outputs from the other view (Caron et al., ICCV 2021).

Here the views are two crops of one volume whose overlap lies in a range (IoU-based positives, Konieczkowicz, AGH Kraków
2023): `--pairing iou --iou_range 0.3 0.6`. There are no small local crops. Sizes and settings are those of that work.

    f = mean over the places of the deepest encoder map, logits = head(f); the teacher is the student's moving average
    loss_cls = H(teacher's logits of the other view, student's logits), mean over the 2B rows

H is the cross-entropy of `losses.distillation`. Two things differ from that work: the teacher runs in evaluation mode,
as in the original DINO, and its temperature moves with every step, not every epoch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datasets.samples.move import MoveOptions
from losses.collapse import distribution_monitors, feature_spread
from losses.distillation import Distillation, DistillationOptions, swap_views
from models.backbones.interface import Backbone, MakeBackbone, pool_tokens
from models.heads import HeadOptions, ProjectionHead
from models.layers.batch_norm import has_batch_norms
from models.methods.method import Batch, Method, Now, average_towards, rows_of
from models.methods.schedules import distillation_schedules


@dataclass(frozen=True)
class DinoOptions(HeadOptions, DistillationOptions, MoveOptions):
    """DINO's flags: those of the head, of distillation and of moved views, with the published values."""

    out_dim: int = 1024
    teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0
    momentum_teacher: float = 0.9995

    def __post_init__(self) -> None:
        HeadOptions.__post_init__(self)
        DistillationOptions.__post_init__(self)


class DinoNetwork(nn.Module):
    """Encoder and projection head: the student, and the teacher."""

    def __init__(self, backbone: Backbone, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Views [R, 1, D, H, W] in [0, 1] -> pooled features [R, C] and logits [R, K]."""
        pooled = pool_tokens(self.backbone.encode(views), (max(self.backbone.channels),))
        return pooled, self.head.project_cls(pooled)

    def teacher_twin(self) -> "DinoNetwork":
        """A copy without gradients."""
        twin = DinoNetwork(self.backbone.encoder_twin(), self.head.target_twin(shared_last_layer=True))
        return twin.requires_grad_(False)


class DINO(Method):
    """The method: student, EMA teacher, and the centre of the teacher's logits."""

    Options = DinoOptions
    pairings = ("iou", "random", "sam")
    views = {"view": "augmented"}

    def __init__(self, options: DinoOptions, make_backbone: MakeBackbone) -> None:
        """Build student and teacher, an exact copy to begin with; torch's seed decides the weights."""
        super().__init__()
        self.options = options
        if options.move_views:
            self.views = {"view": "moved"}
        backbone = make_backbone(None, with_masks=False)
        head = ProjectionHead(
            in_dim=backbone.channels[max(backbone.channels)],
            out_dim=options.out_dim,
            hidden_dim=options.head_hidden_dim,
            bottleneck_dim=options.head_bottleneck_dim,
            train_gain=not options.norm_last_layer,
        )
        self.student = DinoNetwork(backbone, head)
        self.sees_batch = has_batch_norms(self.student)
        self.teacher = self.student.teacher_twin()
        self.loss = Distillation({"cls": options.out_dim}, options)
        self.train()

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Callable[[int], float]]:
        """The teacher's momentum and temperature per step, and whether the last layer stands still."""
        return distillation_schedules(self.options, self.options.freeze_last_layer, num_steps, steps_per_epoch)

    def forward(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; terms are "loss_cls" and the monitors of collapse."""
        views = rows_of(batch["view"])  # [2B, 1, D, H, W]
        logits = self.student(views)[1]
        with torch.no_grad():
            features, teacher_logits = self.teacher(views)
        targets = self.loss.targets("cls", teacher_logits, now["teacher_temp"])
        loss = self.loss.cross_entropy(swap_views(targets), logits)
        monitors = distribution_monitors(targets, self.loss.mean_distribution)
        monitors["feature_std"] = feature_spread(features)
        return loss, {"loss_cls": loss.detach(), **monitors}

    def before_step(self, now: Now) -> None:
        """The head's last layer stands still at first: without a gradient, weight decay and moments leave it alone."""
        if now["last_layer_frozen"]:
            self.student.head.drop_last_layer_gradients()

    def after_step(self, now: Now, was_skipped: Tensor) -> None:
        """Move the teacher and the centre; after a skipped step neither moves."""
        average_towards(self.teacher, self.student, now["momentum_teacher"], was_skipped)
        self.loss.update(was_skipped)

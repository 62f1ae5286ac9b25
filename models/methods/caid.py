"""CAiD: instance discrimination whose encoder must also restore the crop (Hosseinzadeh Taher et al., MIDL 2022).

Two crops Q and K of one volume are one instance; earlier crops of other volumes are the negatives (MoCo v2, Chen et
al., 2020). From the maps of Q a decoder restores Q as it was before it was distorted. Only Q is restored.

    student   backbone.encode(Q) -> mean over the deepest map -> head -> q, length 1
              backbone.decode    -> sigmoid -> restored Q
    teacher   backbone.encode(K) -> mean over the deepest map -> head -> k, length 1; a moving average of the student
    queue     the last k of all ranks, and whose volumes they are; with --queue_size 0 the k of this step

    loss = loss_nce + lambda_restore * loss_restore
    loss_nce      InfoNCE of q.k among q.queue (losses/contrast.py), with the queue from before this step
    loss_restore  mean squared error of restored Q against its clean crop

The teacher moves after the optimiser's step, which gives the published run: there it moves before its own forward.

Where this differs from the published code, on purpose: the target is mirrored where the view is; slots that are empty
or of the sample's own volumes are no negatives; validation changes neither teacher nor queue, and sees the same samples
every time; the input is distorted and the crop restored by two flags of their own. While the queue fills, loss_nce
rises for want of negatives before: it says nothing of which checkpoint is best.

--queue_size 0 takes the step's other keys, of all ranks, as negatives (MoCo v3, Chen et al., ICCV 2021). In short runs
the teacher moves fast, and it is then enough for a network to tell the keys of this step from older ones; its features
become one point. Keys of one step have one age. Each part of an accumulated step is compared by itself.

Where the backbone has batch norms (`sees_batch`), the teacher's take the statistics of its own batches, as published.
In place of the published shuffling of keys they are synchronised over ranks (--sync_batchnorm).

Written from the equations alone: the authors state a pending patent and a licence for non-commercial research.

Shape letters: `models.backbones.interface`.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datasets.samples.distort import DistortOptions
from losses.collapse import feature_spread
from losses.contrast import KeyQueue, contrast_logits, contrast_loss, directions, joined, owned_by
from losses.reconstruction import reconstruction_error
from models.backbones.interface import Backbone, MakeBackbone, pool_tokens
from models.layers.batch_norm import has_batch_norms
from models.methods.method import Batch, Method, Now, average_towards, rows_of


@dataclass(frozen=True)
class CaidOptions(DistortOptions):
    """CAiD's flags.

    Attributes:
        caid_restore: restore the query's crop; false = instance discrimination alone, without decoder
        caid_corrupt: distort the views; false = intensity augmentation alone
        lambda_restore: weight of loss_restore
        queue_size: keys of earlier steps to compare with, best well below the number of volumes (published: 65536); 0 =
            with the other samples of the step
        caid_dim: width of the compared features
        caid_temp: temperature of the comparison
        momentum_teacher: EMA momentum of the teacher, constant
    """

    caid_restore: bool = True
    caid_corrupt: bool = True
    lambda_restore: float = 10.0
    queue_size: int = 1024
    caid_dim: int = 128
    caid_temp: float = 0.2
    momentum_teacher: float = 0.999

    def __post_init__(self) -> None:
        for name, least in (("queue_size", 0), ("caid_dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected {least} or more")
        for name in ("lambda_restore", "caid_temp"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: expected more than 0")
        if not 0 <= self.momentum_teacher <= 1:
            raise ValueError(f"--momentum_teacher {self.momentum_teacher}: expected a momentum between 0 and 1")


class CaidNetwork(nn.Module):
    """Backbone and head: the student, and the teacher, which has no decoder."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """Views [R, 1, D, H, W] in [0, 1] -> features [R, caid_dim], restored logits like the views (None without)."""
        maps = self.backbone.encode(views)
        return self.head(pool_tokens(maps, (max(self.backbone.channels),))), self.backbone.decode(maps)[0]


class CAiD(Method):
    """The method: student, EMA teacher, and the queue of its keys."""

    Options = CaidOptions
    pairings = ("iou", "random", "sam")
    views = {"view": "distorted"}

    def __init__(self, options: CaidOptions, make_backbone: MakeBackbone) -> None:
        """Build student and teacher, an exact copy to begin with; torch's seed decides the weights."""
        super().__init__()
        self.options = options
        if not options.caid_corrupt:
            self.views = {"view": "augmented"}
        backbone = make_backbone(1 if options.caid_restore else None, with_masks=False)
        width = backbone.channels[max(backbone.channels)]
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, options.caid_dim))
        self.student = CaidNetwork(backbone, head)
        self.teacher = CaidNetwork(backbone.encoder_twin(), copy.deepcopy(head)).requires_grad_(False)
        self.queue = KeyQueue(options.queue_size, options.caid_dim)
        self.sees_batch = has_batch_norms(self.student)

    def train(self, mode: bool = True) -> "CAiD":
        """As every module's, the teacher too: its batch norms, if any, take the statistics of its own batches."""
        return nn.Module.train(self, mode)

    def forward(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; terms are "loss_nce", "loss_restore", and monitors; the first crop of a sample is Q, the second K.

        Args:
            batch: also holds "case" [B, V], whose crops these are.
        """
        views = batch["view"]  # [B, 2, 1, D, H, W]
        queries, restored = self.student(views[:, 0])
        with torch.no_grad():
            keys, _ = self.teacher(views[:, 1])
        return self.compare(queries, keys, restored, targets_of(batch)[:, 0], batch["case"])

    def compare(
        self, queries: Tensor, keys: Tensor, restored: Tensor | None, target: Tensor, cases: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and detached terms; training collects the keys.

        Args:
            queries, keys: [B, caid_dim], of any length; keys without gradient.
            restored: logits [B, 1, D, H, W]; None without restoration.
            target: [B, 1, D, H, W] in [0, 1].
            cases: int64 [B, 2].
        """
        queries, keys = directions(queries), directions(keys)
        negatives, left_out = self.negatives(keys, cases)
        logits = contrast_logits(queries, keys, negatives, self.options.caid_temp, left_out)
        if self.training and self.options.queue_size:
            self.queue.collect(keys, cases[:, 1])
        total = loss_nce = contrast_loss(logits)
        terms = {"loss_nce": loss_nce.detach()}
        if restored is not None:
            loss_restore = reconstruction_error(torch.sigmoid(restored.to(queries.dtype)), target)
            total = loss_nce + self.options.lambda_restore * loss_restore
            terms["loss_restore"] = loss_restore.detach()
        terms["top1"] = (logits.argmax(1) == 0).float().mean()
        if self.options.queue_size:
            terms["queue_filled"] = self.queue.share_filled
        if len(queries) > 1:
            terms["feature_std"] = feature_spread(queries)
        return total, terms

    def negatives(self, keys: Tensor, cases: Tensor) -> tuple[Tensor, Tensor]:
        """What queries are compared with, [K, caid_dim], and which of it is no negative of a sample, bool [B, K].

        Args:
            as for `compare`; keys of length 1.
        """
        if self.options.queue_size:
            return self.queue.keys, self.queue.no_negatives(cases)
        return joined(keys), owned_by(cases, joined(cases[:, 1]))

    def after_step(self, now: Now, was_skipped: Tensor) -> None:
        """Move the teacher and put the keys into the queue; after a skipped step neither happens."""
        average_towards(self.teacher, self.student, self.options.momentum_teacher, was_skipped, with_buffers=False)
        self.queue.apply(was_skipped)

    def look(self, batch: Batch) -> dict[str, Tensor]:
        """What the student saw and restored, and the targets."""
        if not self.options.caid_restore:
            return {}
        views = rows_of(batch["view"])
        restored = self.student.forward(views)[1].sigmoid()
        return {"seen": views, "reconstruction": restored, "target": rows_of(targets_of(batch))}


def targets_of(batch: Batch) -> Tensor:
    """What is restored, [B, V, 1, D, H, W]: the clean crops, mirrored where their views are."""
    return batch["view_target"] if "view_target" in batch else batch["crop"]

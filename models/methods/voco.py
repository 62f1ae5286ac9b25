"""VoCo: volume contrast (Wu et al., CVPR 2024; "Large-Scale 3D Medical Image Pre-training", TPAMI, arXiv 2410.09890).

A sample is a region of a volume: N base crops that tile it, then R random crops inside it. From features alone, the
network says how much of each random crop lies on each base: their cosine must equal the share of overlap.

    e = means over space of the backbone's skip maps, joined     s = student.head(dropout(e)),  t = teacher.head(e)
    y = overlap [R, N],  p(a, b) = cosine in [0, 1],  C(y, p) = match + miss of `losses.overlap`

    v2     loss_intra  C(y, p(s crops, t bases))
           loss_inter  C(p(t crops, t bases of another volume), p(s crops, s bases of that volume))
           loss_reg    mean over pairs of bases of p(s base, s other base)^2
    v1     loss_match, loss_miss of y and the mean of p(s crops, t bases) and p(t crops, s bases); loss_reg
    paper  no teacher: loss_whole of y and p(s crops, s bases without gradient); loss_reg of the cosines' size

v2 runs one backbone, and its teacher is a head alone; v1's teacher is a second whole network. A teacher is the moving
average of the student, moved after each step: the published order (average first, then its forward) but for the first
step, where it is a copy here.

The other volume of `loss_inter` is the next one in the same forward pass that is of another case; with
`--pairing grid_sam` the matched patient comes first. A volume without one has no `loss_inter` (`partner_share` < 1).
Batches of one volume are refused.

`label_loss` is what predicting the labels costs without dropout. Beside it stand what it costs without knowledge:
`label_loss_at_zero`, all predictions 0, and `label_loss_at_constant`, the best single number for this batch. A network
has learnt nothing until it stays below both.

Shape letters: `models.backbones.interface`; M = volumes (B, or 2 B with grid_sam); N bases and R random crops of each.
"""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from losses.collapse import feature_spread
from losses.overlap import match_term, miss_term, predicted_overlap, spread_term, whole_term
from models.backbones.interface import Backbone, MakeBackbone, pool_tokens
from models.methods.method import Batch, Method, Now, average_towards, rows_of

DROPOUT = {"v2": 0.2, "v1": 0.0, "paper": 0.0}
DIM = {"v2": 1024, "v1": 2048, "paper": 2048}
NUM_CONSTANTS = 50  # numbers from 0 to below 1 that `label_loss_at_constant` tries


@dataclass(frozen=True)
class VoCoOptions:
    """VoCo's flags.

    Attributes:
        voco_variant: the released code's second or first version, or the paper's equations
        voco_dropout: share of the pooled features' elements that the student loses; unset = the variant's (v2 0.2, else
            0)
        voco_dim: width of the projector's layers; unset = the variant's (v2 1024, else 2048)
        voco_even_bases: loss_reg moves both bases of a pair; false = the first one alone, as released
        momentum_teacher: EMA momentum of the teacher, constant
    """

    voco_variant: Literal["v2", "v1", "paper"] = "v2"
    voco_dropout: float | None = None
    voco_dim: int | None = None
    voco_even_bases: bool = True
    momentum_teacher: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--voco_dropout {self.dropout}: expected 0 (off) to below 1")
        if self.dim < 1:
            raise ValueError(f"--voco_dim {self.dim}: expected 1 or more")
        if not 0 <= self.momentum_teacher <= 1:
            raise ValueError(f"--momentum_teacher {self.momentum_teacher}: expected a momentum between 0 and 1")

    @property
    def dropout(self) -> float:
        """The share in use."""
        return DROPOUT[self.voco_variant] if self.voco_dropout is None else self.voco_dropout

    @property
    def dim(self) -> int:
        """The width in use."""
        return DIM[self.voco_variant] if self.voco_dim is None else self.voco_dim


class Projector(nn.Module):
    """Three linear layers; a batch norm without weights and a ReLU follow the first two. State-dict names as published.

    The norms always take the statistics of the rows at hand, also in evaluation mode. All is computed in float32.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(in_dim, hidden_dim), batch_statistics(hidden_dim), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), batch_statistics(hidden_dim), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Linear(hidden_dim, out_dim))

    def forward(self, pooled: Tensor) -> Tensor:
        """Rows [R, in_dim], at least two -> [R, out_dim]."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.layer3(self.layer2(self.layer1(pooled.float())))


def batch_statistics(width: int) -> nn.BatchNorm1d:
    """A batch norm without weights and running statistics."""
    return nn.BatchNorm1d(width, eps=1e-5, affine=False, track_running_stats=False)


class VoCoNetwork(nn.Module):
    """Backbone and projector; the teacher of version 2 has no backbone."""

    def __init__(self, backbone: Backbone | None, head: Projector) -> None:
        super().__init__()
        if backbone is not None:
            self.backbone = backbone
        self.head = head

    def forward(self, crops: Tensor) -> Tensor:
        """Crops [R, 1, D, H, W] in [0, 1] -> pooled features, float32 [R, sum of skip channels]."""
        maps = self.backbone.skips(self.backbone.encode(crops))
        return pool_tokens(maps, tuple(self.backbone.skip_channels))


class Features(NamedTuple):
    """What one network says of M volumes."""

    bases: Tensor  # [M, N, C]
    crops: Tensor  # [M, R, C]


class VoCo(Method):
    """The method: student, and a teacher unless the variant is the paper's."""

    Options = VoCoOptions
    pairings = ("grid", "grid_sam")
    views = {"view": "augmented"}
    sees_batch = True

    def __init__(self, options: VoCoOptions, make_backbone: MakeBackbone) -> None:
        """Build the networks; the teacher starts as a copy. Torch's seed decides the weights."""
        super().__init__()
        self.options = options
        backbone = make_backbone(None, with_masks=False, with_skips=True)
        head = Projector(sum(backbone.skip_channels.values()), options.dim, options.dim)
        self.student = VoCoNetwork(backbone, head)
        if options.voco_variant != "paper":
            twin = backbone.encoder_twin() if options.voco_variant == "v1" else None
            self.teacher = VoCoNetwork(twin, copy.deepcopy(head)).requires_grad_(False)
        self.train()

    def forward(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the variant's terms; see the module for terms and monitors.

        Args:
            batch: also holds "overlap" [B, R, N], or [B, 2, R, N] where a sample holds two volumes.

        Raises:
            ValueError: one volume, where version 2 needs another one to compare with.
        """
        overlap = batch["overlap"].flatten(0, -3)  # [M, R, N]
        crops = rows_of(batch["view"])  # [M * (N + R), 1, D, H, W]
        cases = batch["case"].reshape(len(overlap), -1)[:, 0]
        if len(cases) < 2 and self.options.voco_variant == "v2":
            raise ValueError(
                "--batch_size 1: version 2 compares each volume with another one of its batch; expected 2 or more a "
                "process (other processes and accumulated batches do not count), or --voco_variant v1"
            )
        pooled = self.student(crops)
        with torch.no_grad():
            teacher_pooled = self.teacher(crops) if self.options.voco_variant == "v1" else pooled.detach()
        partners, has_partner = partners_of(cases, is_paired=batch["overlap"].ndim == 4)
        return self.compare(pooled, teacher_pooled, overlap, partners, has_partner)

    def compare(
        self, pooled: Tensor, teacher_pooled: Tensor, overlap: Tensor, partners: Tensor, has_partner: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and detached terms of pooled features.

        Args:
            pooled, teacher_pooled: [M * (N + R), C], the rows of a volume together, bases first; the teacher's without
                gradient.
            overlap: [M, R, N].
            partners, has_partner: [M], see `partners_of`.
        """
        variant, head = self.options.voco_variant, self.student.head
        dropped = nn.functional.dropout(pooled, self.options.dropout, training=self.training)
        student = split_rows(head(dropped), overlap)
        with torch.no_grad():
            if variant == "paper":
                teacher = Features(*(rows.detach() for rows in student))
            else:
                teacher = split_rows(self.teacher.head(teacher_pooled), overlap)
            is_dropped = self.training and self.options.dropout > 0
            plain = predict_labels(variant, split_rows(head(pooled), overlap) if is_dropped else student, teacher)
        predicted = predict_labels(variant, student, teacher)
        terms = {name: values.mean() for name, values in label_terms(variant, overlap, predicted).items()}
        monitors = {"label_loss": label_loss(variant, overlap, plain), **label_floors(variant, overlap)}
        if variant == "v2":
            values = crossed_loss(student, teacher, partners)
            terms["loss_inter"] = (values * has_partner).sum() / has_partner.sum().clamp(min=1)
            monitors["partner_share"] = has_partner.float().mean()
        terms["loss_reg"] = spread_term(student.bases, variant != "paper", self.options.voco_even_bases).mean()
        monitors["feature_std"] = feature_spread(pooled)
        total = torch.stack(list(terms.values())).sum()
        return total, {name: value.detach() for name, value in (terms | monitors).items()}

    def after_step(self, now: Now, was_skipped: Tensor) -> None:
        """Move the teacher."""
        if self.options.voco_variant != "paper":
            average_towards(self.teacher, self.student, self.options.momentum_teacher, was_skipped)


def split_rows(rows: Tensor, overlap: Tensor) -> Features:
    """Rows [M * (N + R), C], those of a volume together and its bases first."""
    num_volumes, num_crops, num_bases = overlap.shape
    return Features(*rows.unflatten(0, (num_volumes, -1)).split([num_bases, num_crops], dim=1))


def partners_of(cases: Tensor, is_paired: bool) -> tuple[Tensor, Tensor]:
    """For each volume another one that is of another case.

    Args:
        cases: int64 [M].
        is_paired: volumes 2 i and 2 i + 1 show the same anatomy; they are each other's first choice. After that, and
            otherwise, the next volumes count (for odd ones of pairs the ones before), around the end of the batch.

    Returns:
        int64 [M] and bool [M]: the partner's number, and whether there is one at all.
    """
    if len(cases) < 2:
        return torch.zeros_like(cases), torch.zeros_like(cases, dtype=torch.bool)
    own = torch.arange(len(cases), device=cases.device)
    direction = 1 - 2 * (own % 2) if is_paired else torch.ones_like(own)
    candidates = (own[:, None] + direction[:, None] * own[1:]) % len(cases)  # [M, M - 1]
    is_other = cases[candidates] != cases[:, None]
    chosen = candidates.gather(1, is_other.int().argmax(dim=1, keepdim=True))  # the first one
    return chosen[:, 0], is_other.any(dim=1)


def predict_labels(variant: str, student: Features, teacher: Features) -> Tensor:
    """Predicted shares of each crop on each base of its own volume, [M, R, N]."""
    predicted = predicted_overlap(student.crops, teacher.bases)
    return (predicted + predicted_overlap(teacher.crops, student.bases)) / 2 if variant == "v1" else predicted


def label_terms(variant: str, overlap: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """What predictions cost: {term: values [...]}; overlap [M, R, N], predictions [..., R, N]."""
    if variant == "paper":
        return {"loss_whole": whole_term(overlap, predicted)}
    match, miss = match_term(overlap, predicted), miss_term(overlap, predicted, squared=variant == "v1")
    return {"loss_intra": match + miss} if variant == "v2" else {"loss_match": match, "loss_miss": miss}


def label_loss(variant: str, overlap: Tensor, predicted: Tensor) -> Tensor:
    """The sum of `label_terms`, mean over volumes: predictions [..., M, R, N] -> [...]."""
    return torch.stack(list(label_terms(variant, overlap, predicted).values())).sum(0).mean(-1)


def label_floors(variant: str, overlap: Tensor) -> dict[str, Tensor]:
    """What predicting one number for all pairs costs: 0, and the best one for these labels [M, R, N]."""
    constants = torch.arange(NUM_CONSTANTS, device=overlap.device) / NUM_CONSTANTS
    costs = label_loss(variant, overlap, constants[:, None, None, None].expand(-1, *overlap.shape))
    return {"label_loss_at_zero": costs[0], "label_loss_at_constant": costs.min()}


def crossed_loss(student: Features, teacher: Features, partners: Tensor) -> Tensor:
    """Student against teacher on where crops lie on another volume's bases: [M]."""
    target = predicted_overlap(teacher.crops, teacher.bases[partners])
    predicted = predicted_overlap(student.crops, student.bases[partners])
    return match_term(target, predicted) + miss_term(target, predicted)

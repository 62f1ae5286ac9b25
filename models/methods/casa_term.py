"""CASA's term of Alice: its flags, and loss_tokens.

    loss_tokens = mean over rows of  sum_n w_n e_n / sum_n w_n,    e_n: `losses.casa`, by --casa_target

w_n is 1 (`--casa_queries all`), or the share of query n's place that is hidden from the student (`masked`). A query of
a visible place knows what its own view shows there; one of a hidden place has to ask.

Shape letters: `models.backbones.interface`; R = B * V rows.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from losses.casa import VIEWS_OF_A_SAMPLE, deviation, joined_views, view_contrast_errors
from losses.collapse import mean_cosine
from losses.dense import mean_over_points
from losses.distillation import Distillation
from models.backbones.interface import hidden_shares
from models.methods.casa import FigureCASA, PublishedCASA
from models.methods.method import Batch, Now, rows_of


@dataclass(frozen=True)
class CasaOptions:
    """CASA's flags.

    Attributes:
        casa_variant: CASA as drawn, or as released
        casa_heads: attention heads of CASA
        casa_head_dim: width of one head
        casa_hidden_dim: width of CASA's feed-forward block
        casa_cosine_scale: compare CASA's queries and keys by cosine, times a trained scale that starts here; 0 = off
        query_stride: stride of the encoder tokens that CASA asks with, voxels
        key_stride: stride of the tokens that CASA asks, voxels
        casa_target: what CASA's answer is compared with: the teacher's (plain), its deviation from the mean over the
            step's views, or the teacher's among those of other samples' views (contrast, needs 2 samples a step)
        casa_temp: temperature of --casa_target contrast
        casa_queries: query tokens that count in loss_tokens: all, or each by the share of its place that is masked
        casa_normalise: take each view's token mean and spread out of what CASA asks, channel by channel
    """

    casa_variant: Literal["figure", "published"] = "figure"
    casa_heads: int = 8
    casa_head_dim: int = 64
    casa_hidden_dim: int = 2048
    casa_cosine_scale: float = 0.0
    query_stride: int = 16
    key_stride: int = 8
    casa_target: Literal["plain", "contrast", "deviation"] = "plain"
    casa_temp: float = 0.1
    casa_queries: Literal["all", "masked"] = "all"
    casa_normalise: bool = False

    def __post_init__(self) -> None:
        for name in ("casa_heads", "casa_head_dim", "casa_hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more")
        if self.casa_cosine_scale < 0:
            raise ValueError(f"--casa_cosine_scale must be 0 (off) or more, got {self.casa_cosine_scale}")
        if self.casa_temp <= 0:
            raise ValueError(f"--casa_temp {self.casa_temp}: expected more than 0")


class CasaAnswers(NamedTuple):
    """What both networks say through CASA about R views."""

    query: Tensor  # the student's, see `make_query`
    online: Tensor  # S [R, N, K]
    target: Tensor  # T [R, N, K]
    shuffled: Tensor  # the teacher's answers of another sample's view [R, N, K]
    source: Tensor  # psi(Y) [R, M, K]


def casa_loss(
    options: CasaOptions,
    distillation: Distillation,
    teacher: FigureCASA | PublishedCASA,
    answers: CasaAnswers,
    batch: Batch,
    now: Now,
) -> tuple[Tensor, dict[str, Tensor]]:
    """loss_tokens of a batch and its monitors.

    Monitors: "casa_cos_right" and "casa_cos_shuffled", how well S agrees with what it is compared with and with the
    same of another sample's view; the difference is to grow.

    Raises:
        ValueError: a contrast without other samples.
    """
    target, shuffled = answers.target, answers.shuffled
    if options.casa_target != "plain":  # ranks may validate different numbers of batches: each for itself
        views, first = joined_views(answers.source, across_ranks=distillation.training)
        of_all_views = ask_every_view(teacher, answers.query, views)
        if options.casa_target == "deviation":
            target, shuffled = deviation(target, of_all_views), deviation(shuffled, of_all_views)
    if options.casa_target == "contrast":
        if distillation.training and len(views) <= VIEWS_OF_A_SAMPLE:
            raise ValueError(
                "--casa_target contrast compares with views of other samples, but this step has one sample: raise "
                "--batch_size"
            )
        errors = view_contrast_errors(answers.online, of_all_views, first, options.casa_temp)
    else:
        targets = distillation.targets("tokens", target, now["teacher_temp"])
        errors = distillation.cross_entropies(targets, answers.online)
    monitors = {
        "casa_cos_right": mean_cosine(answers.online, target),
        "casa_cos_shuffled": mean_cosine(answers.online, shuffled),
    }
    if options.casa_queries == "all":
        return errors.mean(), monitors
    grid = tuple(max(1, side // options.query_stride) for side in batch["crop"].shape[3:])
    return mean_over_points(errors, hidden_shares(rows_of(batch["mask"]), grid)), monitors


@torch.no_grad()
def ask_every_view(casa: FigureCASA | PublishedCASA, query: Tensor, sources: Tensor) -> Tensor:
    """Every row's queries asked of every view, one view at a time to save memory.

    Args:
        query: [R, N, inner] (figure) or [R, N, K] (published).
        sources: of V views, [V, M, K].

    Returns:
        [V, R, N, K], without gradient.
    """
    together = query.flatten(0, 1)[None]  # [1, R * N, inner]
    return torch.cat([casa.align(together, view[None]) for view in sources]).unflatten(1, query.shape[:2])

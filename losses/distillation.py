"""Alice's objective: method section "Losses" (Jiang et al., ICCV 2023, figure 2).

    loss = lambda1 * loss_cls + lambda2 * loss_tokens + lambda3 * loss_recon

    P(t)        = softmax((t - centre) / teacher_temp),   H(t, s) = - sum_k P(t)_k log softmax(s / student_temp)_k
    loss_cls    = 1/2 [ H(t_cls(K), s_cls(Q)) + H(t_cls(Q), s_cls(K)) ]            crossed between the two patients
    loss_tokens = 1/2 [ H(T(Q), S(Q)) + H(T(K), S(K)) ], mean over tokens          within one patient, through CASA
    loss_recon  = mean squared error against the un-augmented crop, mean over masked voxels, then over samples

Every term is a mean over samples, so the mean over ranks of equal batches equals the loss of the joined batch, and
DDP's averaged gradients equal its gradients. Only the centres (or Sinkhorn's sums) talk to other ranks; they are
constants of the loss, and the centres' update follows it.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.centre import RunningMeans
from losses.sinkhorn import balanced_probabilities

RECON_CHOICES = ("masked", "all")
CENTRING_CHOICES = ("mean", "sinkhorn")


class OnlineOutputs(Protocol):
    """What the loss reads of `models.methods.alice.StudentOutputs`: 2B rows, first Q then K."""

    cls_logits: Tensor | None  # [2B, K]
    casa_online: Tensor | None  # [2B, N, K]
    reconstruction: Tensor | None  # [2B, 1, D, H, W]


class TargetOutputs(Protocol):
    """What the loss reads of `models.methods.alice.TeacherOutputs`: 2B rows, first Q then K."""

    cls_logits: Tensor | None  # [2B, K]
    cls_features: Tensor | None  # [2B, C]
    casa_target: Tensor | None  # [2B, N, K]
    casa_shuffled: Tensor | None  # [2B, N, K]


class AliceLoss(nn.Module):
    """The weighted sum of the three terms, with the centres as its state."""

    def __init__(
        self,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        lambda3: float = 10.0,
        out_dim: int = 512,
        student_temp: float = 0.1,
        centre_momentum: float = 0.9,
        recon_on: str = "masked",
        centring: str = "mean",
    ) -> None:
        """Set the weights of cls, tokens and reconstruction (0 = off) and the temperatures.

        Args:
            out_dim: K, the width of the logits.
            recon_on: "masked", or "all" for the released code's choice: half the error over all voxels.
            centring: "mean" as in P(t) above, or "sinkhorn": P(t) balanced over the rows of one forward pass and all
                ranks instead (`losses.sinkhorn`); the centres are then only watched.

        Raises:
            ValueError: a value out of range, naming the flag.
        """
        super().__init__()
        if recon_on not in RECON_CHOICES:
            raise ValueError(f"--recon_on must be one of {RECON_CHOICES}, got {recon_on!r}")
        if centring not in CENTRING_CHOICES:
            raise ValueError(f"--centring must be one of {CENTRING_CHOICES}, got {centring!r}")
        if student_temp <= 0:
            raise ValueError(f"--student_temp must be above 0, got {student_temp}")
        self.lambda1, self.lambda2, self.lambda3 = lambda1, lambda2, lambda3
        self.student_temp, self.recon_on, self.centring = student_temp, recon_on, centring
        # The mean teacher distribution starts uniform; it is watched, not part of the loss.
        dims = {"cls": out_dim, "tokens": out_dim, "cls_distribution": out_dim}
        self.centres = RunningMeans(dims, centre_momentum, start={"cls_distribution": 1.0 / out_dim})

    def forward(
        self,
        student: OnlineOutputs,
        teacher: TargetOutputs,
        batch: dict[str, Tensor],
        teacher_temp: float,
        update_centres: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and its detached terms with the monitors of collapse.

        Args:
            student, teacher: their outputs for 2B rows, first Q then K.
            batch: "query", "key" [B, 1, D, H, W] un-augmented crops; "query_mask", "key_mask" bool [B, d, h, w], True
                = in the loss.
            teacher_temp: temperature of the teacher's softmax, above 0.
            update_centres: fold the teacher's rows into the centres afterwards (in training mode only). With gradient
                accumulation pass False for all but the last part: the parts then count as one batch.

        Returns:
            total: scalar with gradient.
            terms: "loss_cls", "loss_tokens", "loss_recon" unweighted, where switched on; monitors as in
                `collapse_monitors`.
        """
        if teacher_temp <= 0:
            raise ValueError(f"--teacher_temp must be above 0, got {teacher_temp}")
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        if self.lambda1:
            targets = self._teacher_probabilities("cls", teacher.cls_logits, teacher_temp)
            terms["loss_cls"] = self._cross_entropy(swap_views(targets), student.cls_logits)
            monitors |= self._watch_cls(targets, teacher.cls_features)
        if self.lambda2:
            targets = self._teacher_probabilities("tokens", teacher.casa_target, teacher_temp)
            terms["loss_tokens"] = self._cross_entropy(targets, student.casa_online)
            monitors["casa_cos_right"] = mean_cosine(student.casa_online, teacher.casa_target)
            monitors["casa_cos_shuffled"] = mean_cosine(student.casa_online, teacher.casa_shuffled)
        if self.lambda3:
            terms["loss_recon"] = self._reconstruction_error(student.reconstruction, batch)
        weights = {"loss_cls": self.lambda1, "loss_tokens": self.lambda2, "loss_recon": self.lambda3}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        if self.training and update_centres:
            self.centres.apply()
        return total, {name: value.detach() for name, value in (terms | monitors).items()}

    def _teacher_probabilities(self, name: str, logits: Tensor, teacher_temp: float) -> Tensor:
        logits = logits.detach().float()
        if self.training:
            self.centres.collect(name, logits)
        if self.centring == "sinkhorn":  # ranks may validate different numbers of batches: each for itself then
            return balanced_probabilities(logits, teacher_temp, across_ranks=self.training)
        return F.softmax((logits - getattr(self.centres, name)) / teacher_temp, dim=-1)

    def _cross_entropy(self, targets: Tensor, logits: Tensor) -> Tensor:
        """-sum(targets * log_softmax(logits / student_temp)) over K, mean over the rest."""
        return -(targets * F.log_softmax(logits.float() / self.student_temp, dim=-1)).sum(-1).mean()

    def _reconstruction_error(self, reconstruction: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Squared error [2B, 1, D, H, W] -> per sample over its loss voxels -> mean over samples."""
        target = torch.cat([batch["query"], batch["key"]]).float()
        squared = (reconstruction.float() - target).square()
        if self.recon_on == "all":
            return 0.5 * squared.mean()
        loss_mask = torch.cat([batch["query_mask"], batch["key_mask"]]).float()  # [2B, d, h, w]
        blocks = F.adaptive_avg_pool3d(squared, loss_mask.shape[1:])[:, 0]  # [2B, d, h, w]: mean error of each block
        per_sample = (blocks * loss_mask).sum(dim=(1, 2, 3)) / loss_mask.sum(dim=(1, 2, 3)).clamp(min=1)
        return per_sample.mean()

    @torch.no_grad()
    def _watch_cls(self, targets: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Monitors of collapse in the teacher's cls.

        teacher_entropy: mean entropy of one sample's distribution, log K when it is uniform.
        teacher_kl_uniform: KL to uniform of the running mean distribution (batch and ranks): 0 when all K outputs are
            used alike, log K when every sample falls on the same one.
        feature_std: standard deviation over the batch of L2-normalised features, times the square root of their width:
            about 1 when samples spread over the sphere, 0 when all are the same.
        """
        if self.training:
            self.centres.collect("cls_distribution", targets)
        mean_distribution = self.centres.cls_distribution
        directions = F.normalize(features.float(), dim=-1)
        return {
            "teacher_entropy": torch.special.entr(targets).sum(-1).mean(),
            "teacher_kl_uniform": math.log(targets.shape[-1]) - torch.special.entr(mean_distribution).sum(),
            "feature_std": directions.std(dim=0, correction=0).mean() * directions.shape[-1] ** 0.5,
        }


def swap_views(rows: Tensor) -> Tensor:
    """Rows of (Q, K) [2B, ...] -> rows of (K, Q)."""
    return rows.roll(rows.shape[0] // 2, dims=0)


def mean_cosine(left: Tensor, right: Tensor) -> Tensor:
    """Mean over tokens and samples of the cosine between what is particular in [2B, N, K] and [2B, N, K].

    Particular is what differs from the mean over tokens and samples. S and T point almost the same way wherever they
    look: in a training that went well, plain cosines were 0.633 for the right and another view alike, these 0.22 and
    -0.10.
    """
    left, right = (x.detach().float() for x in (left, right))
    left, right = (x - x.mean(dim=(0, 1)) for x in (left, right))
    return F.cosine_similarity(left, right, dim=-1).mean()

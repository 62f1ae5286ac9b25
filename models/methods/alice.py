"""Alice: the student, its EMA teacher, and the function that builds the pair (Jiang et al., ICCV 2023, figure 2).

Two views Q and K of the same anatomy in different patients. The student sees both under block masks, the teacher both
unmasked. Each network runs both views in one forward: rows 0..B-1 of every output belong to Q, rows B..2B-1 to K.

    student   backbone.encode -> pooled tokens        -> head -> cls_logits
                              -> tokens at stride 16 -> CASA's query
              backbone.decode -> map at stride 8 -> head (phi) -> CASA -> casa_online (S);   reconstruction
    teacher   backbone.encode -> pooled tokens        -> head -> cls_logits
                              -> map at stride 8 -> head (psi) -> CASA, same query -> casa_target (T)

Everything trainable hangs under the student: one DDP wrap, one gradient clip, one state dict. What an objective of
weight 0 would have trained is not built, so every parameter gets a gradient.

Shape letters: `models.backbones.interface`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.backbones import BACKBONES
from models.backbones.interface import Backbone, Size3, flatten_tokens
from models.heads import ProjectionHead
from models.methods.casa import CASA_VARIANTS, FigureCASA, PublishedCASA, relative_entropy

CLS_FEATURES = ("deepest", "multiscale")


class StudentOutputs(NamedTuple):
    """What the student says about 2B views; None where an objective is switched off."""

    cls_logits: Tensor | None  # [2B, K]
    cls_features: Tensor  # [2B, C]: pooled tokens (--cls_features), before the head
    casa_query: Tensor | None  # [2B, N, inner] (figure) or [2B, N, K] (published)
    casa_online: Tensor | None  # S [2B, N, K]
    reconstruction: Tensor | None  # [2B, 1, D, H, W]
    casa_entropy: Tensor | None = None  # scalar, without gradient: see `models.methods.casa.relative_entropy`


class TeacherOutputs(NamedTuple):
    """What the teacher says about the same 2B views, without gradient; None where an objective is switched off."""

    cls_logits: Tensor | None  # [2B, K]
    cls_features: Tensor | None  # [2B, C]
    casa_target: Tensor | None  # T [2B, N, K]
    casa_shuffled: (
        Tensor | None
    )  # the same queries asked of another row's view [2B, N, K], to watch for a CASA that ignores it


class AliceStudent(nn.Module):
    """The online network. Its forward is all that DDP needs to see."""

    def __init__(
        self,
        backbone: Backbone,
        head: ProjectionHead | None,
        casa: FigureCASA | PublishedCASA | None,
        query_stride: int = 16,
        key_stride: int = 8,
        pooled_strides: tuple[int, ...] | None = None,
    ) -> None:
        """Compose the parts; `head` None switches cls and CASA off, `casa` None switches CASA off.

        `pooled_strides`: the encoder maps whose pooled tokens, joined, are cls; None takes the deepest.
        """
        super().__init__()
        self.pooled_strides = pooled_strides or (max(backbone.channels),)
        self.backbone, self.head, self.casa = backbone, head, casa
        self.query_stride, self.key_stride = query_stride, key_stride

    def forward(self, view_q: Tensor, mask_q: Tensor | None, view_k: Tensor, mask_k: Tensor | None) -> StudentOutputs:
        """Run both views under their masks.

        Args:
            view_q, view_k: [B, 1, D, H, W], intensities in [0, 1].
            mask_q, mask_k: bool [B, d, h, w] block masks, True = hidden from the student; both None hides nothing.
        """
        masked = None if mask_q is None or mask_k is None else torch.cat([mask_q, mask_k])
        features = self.backbone.encode(torch.cat([view_q, view_k]), masked)
        reconstruction, decoded = self.backbone.decode(features)
        pooled = pool_tokens(features, self.pooled_strides)
        cls_logits = (
            self.head.project_cls(pooled) if self.head is not None and self.head.last_layer is not None else None
        )
        query = online = entropy = None
        if self.casa is not None:
            tokens = flatten_tokens(features[self.query_stride])  # [2B, N, C]
            if self.casa.projects_query_through_head:
                tokens = self.head.project_encoder_tokens(tokens)  # [2B, N, K]
            query = self.casa.make_query(tokens)
            source = self.head.project_decoder_tokens(flatten_tokens(decoded[self.key_stride]))  # [2B, M, K]
            online = self.casa.align(query, source)
            entropy = self._watch_attention(query, source, step=len(view_q))
        return StudentOutputs(cls_logits, pooled.detach(), query, online, reconstruction, entropy)

    @torch.no_grad()
    def _watch_attention(self, query: Tensor, source: Tensor, step: int) -> Tensor:
        """The attention's relative entropy over the first Q and the first K: a sample, as all take much memory."""
        return relative_entropy(self.casa.attention_weights(query[::step], source[::step]))

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """The head's last layers, which training freezes at first (DINO: one epoch)."""
        return [p for name, p in self.named_parameters() if name.startswith("head.last_layer") and p.requires_grad]


class AliceTeacher(nn.Module):
    """The target network: an exponential moving average of the student's encoder, head and CASA. Stays outside DDP."""

    def __init__(self, student: AliceStudent, shared_last_layer: bool = True) -> None:
        """Start as an exact copy of `student`'s encoder, head and CASA.

        Args:
            shared_last_layer: tokens use the moving average of the student's cls layer (iBOT's `shared_head_teacher`)
                instead of that of its token layer. Without a cls objective they use the token layer either way.
        """
        super().__init__()
        self.backbone = student.backbone.encoder_twin()
        self.head = student.head.target_twin(shared_last_layer) if student.head is not None else None
        self.casa = student.casa.target_twin() if student.casa is not None else None
        self.key_stride, self.pooled_strides = student.key_stride, student.pooled_strides
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "AliceTeacher":
        """Stay in evaluation mode whatever the caller asks."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, view_q: Tensor, view_k: Tensor, student: StudentOutputs) -> TeacherOutputs:
        """Run both unmasked views [B, 1, D, H, W]; CASA's queries come from the student's outputs, detached."""
        if self.head is None:
            return TeacherOutputs(None, None, None, None)
        features = self.backbone.encode(torch.cat([view_q, view_k]))
        pooled = pool_tokens(features, self.pooled_strides)
        cls_logits = self.head.project_cls(pooled) if self.head.last_layer is not None else None
        target = shuffled = None
        if self.casa is not None:
            source = self.head.project_decoder_tokens(flatten_tokens(features[self.key_stride]))  # [2B, M, K]
            query = student.casa_query.detach()
            target = self.casa.align(query, source)
            shuffled = self.casa.align(query, source.roll(1, dims=0))
        return TeacherOutputs(cls_logits, pooled, target, shuffled)

    @torch.no_grad()
    def update(self, student: AliceStudent, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, over the names that the teacher has.

        The published CASA is copied instead: there both branches share one cross-attention.
        """
        source = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        averaged: list[Tensor] = []
        towards: list[Tensor] = []
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            copied = not tensor.is_floating_point() or (name.startswith("casa.") and self.casa.target_copies_online)
            if copied:
                tensor.copy_(source[name])
            else:
                averaged.append(tensor)
                towards.append(source[name])
        torch._foreach_lerp_(averaged, towards, 1.0 - momentum)


def pool_tokens(features: dict[int, Tensor], strides: tuple[int, ...]) -> Tensor:
    """Means over the tokens of the maps at `strides`, joined: {stride: map} -> [B, sum of C] in float32."""
    return torch.cat([features[stride].float().mean(dim=(2, 3, 4)) for stride in strides], dim=1)


def build_alice(
    backbone: str = "swin_unetr",
    feature_size: int = 48,
    roi: Size3 = (96, 96, 96),
    casa_variant: str = "figure",
    cls_features: str = "deepest",
    out_dim: int = 512,
    head_hidden_dim: int = 2048,
    head_bottleneck_dim: int = 256,
    shared_head: bool = False,
    shared_head_teacher: bool = True,
    norm_last_layer: bool = True,
    casa_heads: int = 8,
    casa_head_dim: int = 64,
    casa_hidden_dim: int = 2048,
    casa_cosine_scale: float = 0.0,
    query_stride: int = 16,
    key_stride: int = 8,
    lambda1: float = 1.0,
    lambda2: float = 1.0,
    lambda3: float = 10.0,
    use_checkpoint: bool = False,
) -> tuple[AliceStudent, AliceTeacher]:
    """Build the student and its teacher, an exact copy to begin with; torch's seed decides the weights.

    Args:
        roi: crop size (D, H, W) in voxels.
        cls_features: "deepest" for the pooled tokens of the deepest stage, "multiscale" for those of all stages joined.
        out_dim: K, the width of the compared distributions and of CASA.
        shared_head, shared_head_teacher: whether tokens share cls's last layer in the student and in the teacher.
        norm_last_layer: keep the last layers' gains at 1.
        casa_cosine_scale: 0, or where the scale starts with which CASA's queries and keys are compared by cosine.
        query_stride, key_stride: strides in voxels of CASA's V, and of its H and Y.
        lambda1, lambda2, lambda3: weights of cls, CASA and reconstruction; 0 leaves the objective's modules out.

    Raises:
        ValueError: unknown names or sizes that do not fit, naming the flag.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"--backbone must be one of {sorted(BACKBONES)}, got {backbone!r}")
    if casa_variant not in CASA_VARIANTS:
        raise ValueError(f"--casa_variant must be one of {sorted(CASA_VARIANTS)}, got {casa_variant!r}")
    if cls_features not in CLS_FEATURES:
        raise ValueError(f"--cls_features must be one of {CLS_FEATURES}, got {cls_features!r}")
    if min(lambda1, lambda2, lambda3) < 0 or max(lambda1, lambda2, lambda3) == 0:
        raise ValueError(
            f"--lambda1, --lambda2, --lambda3 must be >= 0 and not all 0, got {lambda1}, {lambda2}, {lambda3}"
        )
    for flag, size in (
        ("--out_dim", out_dim),
        ("--head_hidden_dim", head_hidden_dim),
        ("--head_bottleneck_dim", head_bottleneck_dim),
        ("--casa_heads", casa_heads),
        ("--casa_head_dim", casa_head_dim),
        ("--casa_hidden_dim", casa_hidden_dim),
    ):
        if size < 1:
            raise ValueError(f"{flag} must be at least 1, got {size}")
    if casa_cosine_scale < 0:
        raise ValueError(f"--casa_cosine_scale must be 0 (off) or more, got {casa_cosine_scale}")
    decoder_stride = 1 if lambda3 else (key_stride if lambda2 else None)
    network = BACKBONES[backbone](feature_size, tuple(roi), decoder_stride, use_checkpoint)
    casa_class = CASA_VARIANTS[casa_variant]
    pooled_strides = tuple(network.channels) if cls_features == "multiscale" else (max(network.channels),)
    head = casa = None
    if lambda2:
        check_casa_strides(network, query_stride, key_stride)
        sizes = (network.channels[query_stride], out_dim, casa_heads, casa_head_dim, casa_hidden_dim)
        casa = casa_class(*sizes, cosine_scale=casa_cosine_scale)
    if lambda1 or lambda2:
        head = ProjectionHead(
            in_dim=sum(network.channels[stride] for stride in pooled_strides),
            out_dim=out_dim,
            hidden_dim=head_hidden_dim,
            bottleneck_dim=head_bottleneck_dim,
            with_cls=lambda1 > 0,
            encoder_dim=network.channels[query_stride]
            if casa is not None and casa.projects_query_through_head
            else None,
            decoder_dim=network.decoder_channels[key_stride] if casa is not None else None,
            shared_last_layer=shared_head,
            train_gain=not norm_last_layer,
        )
    student = AliceStudent(network, head, casa, query_stride, key_stride, pooled_strides)
    return student, AliceTeacher(student, shared_head_teacher)


def check_casa_strides(backbone: Backbone, query_stride: int, key_stride: int) -> None:
    """Raise ValueError where the backbone lacks CASA's maps, or H and Y would not fit one projection."""
    if query_stride not in backbone.channels:
        raise ValueError(f"--query_stride must be one of {sorted(backbone.channels)}, got {query_stride}")
    both = [s for s, width in backbone.decoder_channels.items() if backbone.channels.get(s) == width]
    if key_stride not in both:
        raise ValueError(
            f"--key_stride must be one of {sorted(both)} (encoder and decoder maps alike), got {key_stride}"
        )

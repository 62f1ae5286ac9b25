"""Alice: anatomical invariance and semantic alignment between patients (Jiang et al., ICCV 2023, figure 2).

Two views Q and K of the same anatomy in different patients are the V = 2 crops of a sample. The student sees both under
block masks, the teacher both unmasked. Each network runs all views in one forward: rows 2i and 2i + 1 of every output
belong to Q and K of sample i.

    student   backbone.encode -> pooled tokens        -> head -> cls_logits
                              -> tokens at stride 16 -> CASA's query
              backbone.decode -> map at stride 8 -> head (phi) -> CASA -> casa_online (S);   reconstruction
    teacher   backbone.encode -> pooled tokens        -> head -> cls_logits
                              -> map at stride 8 -> head (psi) -> CASA, same query -> casa_target (T)

    loss        = lambda1 * loss_cls + lambda2 * loss_tokens + lambda3 * loss_recon + lambda4 * loss_dense
    loss_cls    = 1/2 [ H(t_cls(K), s_cls(Q)) + H(t_cls(Q), s_cls(K)) ]           crossed between the two patients
    loss_tokens = 1/2 [ H(T(Q), S(Q)) + H(T(K), S(K)) ], mean over tokens         within one patient, through CASA;
                  other forms: `models.methods.casa_term`
    loss_recon  = mean squared error against the un-augmented crop, mean over masked voxels, then over samples
    loss_dense  = features of single points against a frozen SAM's vectors (off by default): `models.methods.dense`

H is the cross-entropy of `losses.distillation`. Everything trainable hangs under the student. What an objective of
weight 0 would have trained is not built, so every parameter gets a gradient. Masked image modelling alone is
`--lambda1 0 --lambda2 0`.

Shape letters: `models.backbones.interface`; R = B * V rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from datasets.samples.masks import MaskOptions
from losses.collapse import distribution_monitors, feature_spread
from losses.distillation import Distillation, DistillationOptions, swap_views
from losses.reconstruction import reconstruction_error
from models.backbones.interface import Backbone, MakeBackbone, flatten_tokens, pool_tokens, upsample_mask
from models.heads import HeadOptions, ProjectionHead
from models.layers.batch_norm import has_batch_norms
from models.methods.casa import CASA_VARIANTS, CasaAttention, FigureCASA, PublishedCASA, relative_entropy
from models.methods.casa_term import CasaAnswers, CasaOptions, casa_loss
from models.methods.dense import FINEST_STRIDE, DenseHead, DenseOptions, dense_loss, dense_schedule
from models.methods.method import Batch, Method, Now, average_towards, rows_of
from models.methods.schedules import distillation_schedules


@dataclass(frozen=True)
class AliceOptions(MaskOptions, HeadOptions, DistillationOptions, CasaOptions, DenseOptions):
    """Alice's flags.

    Attributes:
        lambda1: weight of loss_cls, between patients; 0 = off
        lambda2: weight of loss_tokens, through CASA; 0 = off
        lambda3: weight of loss_recon; 0 = off
        recon_on: voxels that are reconstructed: those of masked blocks, or all of them at half the weight (released
            code)
        cls_features: what cls is: pooled tokens of the deepest stage, or of all stages joined
        shared_head: student: tokens share the last layer of cls
        shared_head_teacher: teacher: tokens use the moving average of cls's last layer; false = of the student's token
            layer, so that the whole of psi is the moving average of phi
    """

    lambda1: float = 1.0
    lambda2: float = 1.0
    lambda3: float = 10.0
    recon_on: Literal["masked", "all"] = "masked"
    cls_features: Literal["deepest", "multiscale"] = "deepest"
    shared_head: bool = False
    shared_head_teacher: bool = True

    def __post_init__(self) -> None:
        HeadOptions.__post_init__(self)
        DistillationOptions.__post_init__(self)
        CasaOptions.__post_init__(self)
        DenseOptions.__post_init__(self)
        weights = self.lambda1, self.lambda2, self.lambda3, self.lambda4
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"--lambda1, --lambda2, --lambda3, --lambda4 must be >= 0 and not all 0, got {weights}")
        if self.lambda3 > 0 and self.recon_on == "masked" and self.mask_ratio <= 0:
            raise ValueError(
                f"--mask_ratio {self.mask_ratio}, --lambda3 {self.lambda3}: expected masked voxels to reconstruct, or "
                "--recon_on all"
            )
        if self.lambda2 > 0 and self.casa_queries == "masked" and self.mask_ratio <= 0:
            raise ValueError(
                f"--casa_queries masked, --mask_ratio {self.mask_ratio}: expected masked places to ask from, or "
                "--casa_queries all"
            )


class StudentOutputs(NamedTuple):
    """What the student says about R views; None where an objective is switched off."""

    cls_logits: Tensor | None  # [R, K]
    casa_query: Tensor | None  # [R, N, inner] (figure) or [R, N, K] (published)
    casa_online: Tensor | None  # S [R, N, K]
    reconstruction: Tensor | None  # [R, 1, D, H, W]
    casa_entropy: Tensor | None = None  # scalar, without gradient: see `models.methods.casa.relative_entropy`
    dense_maps: list[Tensor] | None = None  # [R, C, d, h, w] each, that the dense head reads


class TeacherOutputs(NamedTuple):
    """What the teacher says about the same R views, without gradient; None where an objective is switched off."""

    cls_logits: Tensor | None  # [R, K]
    cls_features: Tensor | None  # [R, C]
    casa_target: Tensor | None  # T [R, N, K]
    casa_shuffled: Tensor | None  # the same queries asked of another sample's view [R, N, K], to watch CASA ignore it
    dense_maps: list[Tensor] | None = None  # as the student's
    casa_source: Tensor | None = None  # psi(Y) [R, M, K]


class AliceStudent(nn.Module):
    """The online network."""

    def __init__(
        self,
        backbone: Backbone,
        head: ProjectionHead | None,
        casa: FigureCASA | PublishedCASA | None,
        query_stride: int = 16,
        key_stride: int = 8,
        pooled_strides: tuple[int, ...] | None = None,
        dense: DenseHead | None = None,
    ) -> None:
        """Compose the parts; `head` None switches cls and CASA off, `casa` None CASA, `dense` None the dense term.

        `pooled_strides`: the encoder maps whose pooled tokens, joined, are cls; None takes the deepest.
        """
        super().__init__()
        self.pooled_strides = pooled_strides or (max(backbone.channels),)
        self.backbone, self.head, self.casa, self.dense = backbone, head, casa, dense
        self.query_stride, self.key_stride = query_stride, key_stride

    def forward(self, views: Tensor, masks: Tensor | None = None) -> StudentOutputs:
        """Run views [R, 1, D, H, W] in [0, 1] under block masks, bool [R, d, h, w], True = hidden."""
        features = self.backbone.encode(views, masks)
        reconstruction, decoded = self.backbone.decode(features)
        cls_logits = query = online = entropy = None
        if self.head is not None and self.head.last_layer is not None:
            cls_logits = self.head.project_cls(pool_tokens(features, self.pooled_strides))
        if self.casa is not None:
            tokens = flatten_tokens(features[self.query_stride])  # [R, N, C]
            if self.casa.projects_query_through_head:
                tokens = self.head.project_encoder_tokens(tokens)  # [R, N, K]
            query = self.casa.make_query(tokens)
            source = self.head.project_decoder_tokens(flatten_tokens(decoded[self.key_stride]))  # [R, M, K]
            online = self.casa.align(query, source)
            with torch.no_grad():  # a sample: the attention of all rows would take much memory
                entropy = relative_entropy(self.casa.attention_weights(query[:2], source[:2]))
        dense_maps = self.dense.pick(features, decoded) if self.dense is not None else None
        return StudentOutputs(cls_logits, query, online, reconstruction, entropy, dense_maps)


class AliceTeacher(nn.Module):
    """The target network: an exponential moving average of the student's encoder, heads and CASA."""

    def __init__(self, student: AliceStudent, shared_last_layer: bool = True) -> None:
        """Start as an exact copy of `student`'s encoder, heads and CASA.

        Args:
            shared_last_layer: tokens use the moving average of the student's cls layer (iBOT's `shared_head_teacher`)
                instead of that of its token layer. Without a cls objective they use the token layer either way.
        """
        super().__init__()
        self.backbone = student.backbone.encoder_twin()
        self.head = student.head.target_twin(shared_last_layer) if student.head is not None else None
        self.casa = student.casa.target_twin() if student.casa is not None else None
        has_dense = student.dense is not None and student.dense.predictor is not None  # else the targets are SAM's
        self.dense = student.dense.target_twin() if has_dense else None
        self.key_stride, self.pooled_strides = student.key_stride, student.pooled_strides
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Tensor, casa_query: Tensor | None) -> TeacherOutputs:
        """Run unmasked views [R, 1, D, H, W]; CASA's queries come from the student's outputs."""
        if self.head is None and self.dense is None:
            return TeacherOutputs(None, None, None, None)
        features = self.backbone.encode(views)
        dense_maps = self.dense.pick(features) if self.dense is not None else None
        if self.head is None:
            return TeacherOutputs(None, None, None, None, dense_maps)
        pooled = pool_tokens(features, self.pooled_strides)
        cls_logits = self.head.project_cls(pooled) if self.head.last_layer is not None else None
        target = shuffled = source = None
        if self.casa is not None:
            source = self.head.project_decoder_tokens(flatten_tokens(features[self.key_stride]))  # [R, M, K]
            query = casa_query.detach()
            target = self.casa.align(query, source)
            # Rows of one sample stand together and show the same anatomy: the next sample's is another place.
            shuffled = self.casa.align(query, source.roll(2 if len(source) > 2 else 1, dims=0))
        return TeacherOutputs(cls_logits, pooled, target, shuffled, dense_maps, source)


class Alice(Method):
    """The method: student, EMA teacher, and the centres of both distributions."""

    Options = AliceOptions
    pairings = ("sam", "iou", "random")
    views = {"student": "augmented", "teacher": "augmented", "mask": "blocks"}

    def __init__(self, options: AliceOptions, make_backbone: MakeBackbone) -> None:
        """Build student and teacher, an exact copy to begin with; torch's seed decides the weights.

        Raises:
            ValueError: sizes or strides that do not fit, naming the flag.
        """
        super().__init__()
        self.options, self.anatomy = options, options.anatomy_request
        self.student = make_student(options, make_backbone)
        self.sees_batch = has_batch_norms(self.student)
        self.teacher = AliceTeacher(self.student, options.shared_head_teacher)
        self.loss = Distillation({"cls": options.out_dim, "tokens": options.out_dim}, options)
        self.train()

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Callable[[int], float]]:
        """The teacher's momentum and temperature per step, and the weight of the dense term."""
        schedules = distillation_schedules(self.options, self.options.freeze_last_layer, num_steps, steps_per_epoch)
        return schedules | dense_schedule(self.options, steps_per_epoch)

    def forward(self, batch: Batch, now: Now) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms; terms are "loss_cls", "loss_tokens", "loss_recon", "loss_dense" where on."""
        options, terms, monitors = self.options, {}, {}
        student = self.student(rows_of(batch["student"]), rows_of(batch["mask"]))
        teacher = self.teacher(rows_of(batch["teacher"]), student.casa_query)
        if options.lambda1:
            targets = self.loss.targets("cls", teacher.cls_logits, now["teacher_temp"])
            terms["loss_cls"] = self.loss.cross_entropy(swap_views(targets), student.cls_logits)
            monitors |= distribution_monitors(targets, self.loss.mean_distribution)
            monitors["feature_std"] = feature_spread(teacher.cls_features)
        if options.lambda2:
            answers = CasaAnswers(
                student.casa_query,
                student.casa_online,
                teacher.casa_target,
                teacher.casa_shuffled,
                teacher.casa_source,
            )
            terms["loss_tokens"], found = casa_loss(options, self.loss, self.teacher.casa, answers, batch, now)
            monitors |= found | {"casa_entropy": student.casa_entropy}
        if options.lambda3:
            terms["loss_recon"] = self._reconstruction_error(student.reconstruction, batch)
        if options.lambda4:
            heads, maps = (self.student.dense, self.teacher.dense), (student.dense_maps, teacher.dense_maps)
            terms["loss_dense"], found = dense_loss(options, heads, maps, batch)
            monitors |= found
        weights = {"loss_cls": options.lambda1, "loss_tokens": options.lambda2, "loss_recon": options.lambda3}
        weights["loss_dense"] = options.lambda4 and now["lambda4"]
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return total, {name: value.detach() for name, value in (terms | monitors).items()}

    def _reconstruction_error(self, reconstruction: Tensor, batch: Batch) -> Tensor:
        target = rows_of(batch["crop"])
        if self.options.recon_on == "all":  # the released code halves it
            return 0.5 * reconstruction_error(reconstruction, target)
        return reconstruction_error(reconstruction, target, rows_of(batch["mask"]))

    def before_step(self, now: Now) -> None:
        """The head's last layers stand still at first."""
        if now["last_layer_frozen"] and self.student.head is not None:
            self.student.head.drop_last_layer_gradients()

    def after_step(self, now: Now, was_skipped: Tensor) -> None:
        """Move the teacher and the centres. The published CASA is copied: there both branches share one."""
        copied = ("casa.",) if self.teacher.casa is not None and self.teacher.casa.target_copies_online else ()
        average_towards(self.teacher, self.student, now["momentum_teacher"], was_skipped, copied)
        self.loss.update(was_skipped)

    def look(self, batch: Batch) -> dict[str, Tensor]:
        """What the student saw and reconstructed, and where both networks' CASA looks."""
        views, masks = rows_of(batch["student"]), rows_of(batch["mask"])
        # Not called as modules: torch.compile, where it is on, would compile for this one batch size.
        with CasaAttention(self.student.casa) as online, CasaAttention(self.teacher.casa) as target:
            student = self.student.forward(views, masks)
            self.teacher.forward(rows_of(batch["teacher"]), student.casa_query)
        found = online.found("student") | target.found("teacher")
        if student.reconstruction is not None:
            found["seen"] = views.masked_fill(upsample_mask(masks, tuple(views.shape[2:])), float("nan"))
            found["reconstruction"] = student.reconstruction
        return found


def make_student(options: AliceOptions, make_backbone: MakeBackbone) -> AliceStudent:
    """The online network with the modules that the weights of the objectives ask for."""
    wanted = [1] * bool(options.lambda3) + [options.key_stride] * bool(options.lambda2)
    wanted += [FINEST_STRIDE] * bool(options.lambda4 and options.dense_maps != "encoder")
    network = make_backbone(min(wanted, default=None), with_masks=True)
    pooled_strides = tuple(network.channels) if options.cls_features == "multiscale" else (max(network.channels),)
    head = casa = None
    if options.lambda2:
        check_casa_strides(network, options.query_stride, options.key_stride)
        casa = CASA_VARIANTS[options.casa_variant](
            network.channels[options.query_stride],
            options.out_dim,
            options.casa_heads,
            options.casa_head_dim,
            options.casa_hidden_dim,
            cosine_scale=options.casa_cosine_scale,
            normalise=options.casa_normalise,
        )
    if options.lambda1 or options.lambda2:
        asks_through_head = casa is not None and casa.projects_query_through_head
        head = ProjectionHead(
            in_dim=sum(network.channels[stride] for stride in pooled_strides),
            out_dim=options.out_dim,
            hidden_dim=options.head_hidden_dim,
            bottleneck_dim=options.head_bottleneck_dim,
            with_cls=options.lambda1 > 0,
            encoder_dim=network.channels[options.query_stride] if asks_through_head else None,
            decoder_dim=network.decoder_channels[options.key_stride] if casa is not None else None,
            shared_last_layer=options.shared_head,
            train_gain=not options.norm_last_layer,
        )
    dense = DenseHead(options, network) if options.lambda4 else None
    return AliceStudent(network, head, casa, options.query_stride, options.key_stride, pooled_strides, dense)


def check_casa_strides(backbone: Backbone, query_stride: int, key_stride: int) -> None:
    """Raise ValueError where the backbone lacks CASA's maps, or H and Y would not fit one projection."""
    if query_stride not in backbone.channels:
        raise ValueError(f"--query_stride must be one of {sorted(backbone.channels)}, got {query_stride}")
    both = [s for s, width in backbone.decoder_channels.items() if backbone.channels.get(s) == width]
    if not both:
        raise ValueError(
            "--lambda2: CASA compares tokens of an encoder and a decoder map of one width, and this --backbone has "
            "none; expected --lambda2 0 (no CASA), or another --backbone"
        )
    if key_stride not in both:
        raise ValueError(
            f"--key_stride must be one of {sorted(both)} (encoder and decoder maps of one width), got {key_stride}"
        )

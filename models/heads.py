"""The projection head that cls and CASA share: DINO's MLP (Caron et al., 2021), iBOT's token layer (Zhou et al., 2022).

    x -> [adapter] -> Linear, GELU, Linear, GELU, Linear -> L2-normalise -> weight-normalised linear -> K logits

State-dict names are the published ones: `mlp.0/2/4`, `last_layer` (cls), `last_layer2` (tokens), `mlp3` and `mlp4`
(adapters that bring encoder and decoder tokens to the width of cls). Modules that no objective uses are not built.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadOptions:
    """Sizes of the projection head.

    Attributes:
        out_dim: width K of the compared distributions
        head_hidden_dim: width of the head's hidden layers
        head_bottleneck_dim: width before the head's last layer
        norm_last_layer: keep the gains of the last layers at 1
        freeze_last_layer: epochs that the head's last layers stand still; 0 = off
    """

    out_dim: int = 512
    head_hidden_dim: int = 2048
    head_bottleneck_dim: int = 256
    norm_last_layer: bool = True
    freeze_last_layer: float = 1.0

    def __post_init__(self) -> None:
        for name in ("out_dim", "head_hidden_dim", "head_bottleneck_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected 1 or more")
        if self.freeze_last_layer < 0:
            raise ValueError(f"--freeze_last_layer {self.freeze_last_layer}: expected 0 (off) or more")


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are `weight_g * weight_v / |weight_v|` (Salimans and Kingma, 2016).

    It always computes in float32: its cosines are divided by temperatures down to 0.008, which would blow bfloat16's
    rounding (0.004 at 1) up to half a logit.
    """

    def __init__(self, in_dim: int, out_dim: int, train_gain: bool = False) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_gain)
        self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(out_dim, in_dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim] in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight_g * F.normalize(self.weight_v, dim=1))


class ProjectionHead(nn.Module):
    """Projects pooled features and tokens into the space of K logits."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 512,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        with_cls: bool = True,
        encoder_dim: int | None = None,
        decoder_dim: int | None = None,
        shared_last_layer: bool = False,
        train_gain: bool = False,
    ) -> None:
        """Build the paths that are asked for.

        Args:
            in_dim: channels of the pooled cls features, and the width that the adapters lead to.
            with_cls: whether there is a cls output.
            encoder_dim, decoder_dim: channels of encoder and decoder tokens; None where those are not projected.
            shared_last_layer: tokens use the last layer of cls instead of their own (needs `with_cls`).
            train_gain: train the last layers' `weight_g`; off by default as in DINO (`norm_last_layer`).
        """
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        if encoder_dim is not None:
            self.mlp3 = nn.Linear(encoder_dim, in_dim)
        if decoder_dim is not None:
            self.mlp4 = nn.Linear(decoder_dim, in_dim)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        with_tokens = encoder_dim is not None or decoder_dim is not None
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_gain) if with_cls else None
        own_layer = with_tokens and not (with_cls and shared_last_layer)
        self.last_layer2 = WeightNormLinear(bottleneck_dim, out_dim, train_gain) if own_layer else None

    def _normalised_bottleneck(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x).float(), dim=-1)

    def _token_logits(self, x: Tensor) -> Tensor:
        last_layer = self.last_layer2 if self.last_layer2 is not None else self.last_layer
        return last_layer(self._normalised_bottleneck(x))

    def project_cls(self, pooled: Tensor) -> Tensor:
        """Pooled features [B, in_dim] -> logits [B, K]."""
        return self.last_layer(self._normalised_bottleneck(pooled))

    def project_encoder_tokens(self, tokens: Tensor) -> Tensor:
        """[B, N, encoder_dim] -> [B, N, K]."""
        return self._token_logits(self.mlp3(tokens))

    def project_decoder_tokens(self, tokens: Tensor) -> Tensor:
        """[B, M, decoder_dim] -> [B, M, K]: phi in the student, psi in the teacher (fed encoder tokens)."""
        return self._token_logits(self.mlp4(tokens))

    def drop_last_layer_gradients(self) -> None:
        """Let the last layers stand still in this step, as DINO's training does at first."""
        for layer in (self.last_layer, self.last_layer2):
            if layer is not None:
                layer.zero_grad(set_to_none=True)

    def target_twin(self, shared_last_layer: bool) -> "ProjectionHead":
        """An independent copy for the teacher; with `shared_last_layer` its tokens use cls's last layer."""
        twin = copy.deepcopy(self)
        if shared_last_layer and twin.last_layer is not None:
            twin.last_layer2 = None
        if hasattr(twin, "mlp3"):
            del twin.mlp3  # only the student projects query tokens
        return twin

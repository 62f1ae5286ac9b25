"""CASA, conditional anatomical semantic alignment: Jiang et al., ICCV 2023, figure 3.

A query q from the student's encoder tokens V asks two sources the same question through multi-head cross-attention:

    online   S = zeta ( softmax(q K^T  / sqrt(d)) Vals  ),   K  = Wk  phi(H),   Vals  = Wv  phi(H)
    target   T = zeta'( softmax(q K'^T / sqrt(d)) Vals' ),   K' = Wk' psi(Y),   Vals' = Wv' psi(Y)

H are the student's decoder tokens, Y the teacher's ENCODER tokens, both at stride 8.

How the figure is read here: zeta is output projection, layer norm, a feed-forward block whose residual starts at the
attention's output, and L2 normalisation; nothing leads from q to S or T but the attention itself. phi is the token path
of the projection head, psi its moving average in the teacher. The normalisation gives S and T the range of the cls
logits, which are cosines: a bare layer norm's outputs of unit variance, divided by temperatures of 0.1 and below, are
one-hot from the first step on (measured with K = 128: loss_tokens between 6 and 17, where a uniform guess costs 4.9).

`--casa_normalise` takes the mean and the spread over tokens out of every channel of phi(H) and psi(Y), view by view:
the mean of a view then answers nothing. Only with `--no-shared_head_teacher` is psi the moving average of phi to its
last layer; by default it ends with that of cls's last layer. More flags of the term: `models.methods.casa_term`.

At the start of training that attention is uniform to some 1e-5 of its entropy, and short runs leave it so: keys are
cosines of a few hundredths that share most of their value, and Wq and Wk shrink further what differs. S and T then are
means over the view. `--casa_cosine_scale` (figure only; 0 = off) compares q and K by cosine after the mean key, which
no softmax sees, is taken off. benchmarks/RESULTS.md tells what this changes, and at what price.

Variants (`--casa_variant`):
    figure      as above (default).
    published   the released code's form: V passes through the head as well, one cross-attention serves both branches
                (the target's is a copy of the online one, without gradient), and the query is added to the attention's
                output on both sides.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class MultiHeadCrossAttention(nn.Module):
    """Multi-head attention from given queries, followed by output projection, optional residual and layer norm."""

    def __init__(
        self,
        query_dim: int,
        model_dim: int,
        num_heads: int,
        head_dim: int,
        cosine_scale: float = 0.0,
        normalise: bool = False,
    ) -> None:
        """Build the projections.

        Args:
            cosine_scale: 0 for softmax(q k^T / sqrt(d)); else where the scale of the cosine form starts.
            normalise: take each source's mean and spread over tokens out of its channels.
        """
        super().__init__()
        self.normalise = normalise
        inner_dim = num_heads * head_dim
        self.num_heads = num_heads
        self.w_qs: nn.Linear | None = nn.Linear(query_dim, inner_dim, bias=False)
        self.w_ks = nn.Linear(model_dim, inner_dim, bias=False)
        self.w_vs = nn.Linear(model_dim, inner_dim, bias=False)
        self.fc = nn.Linear(inner_dim, model_dim, bias=False)
        self.layer_norm = nn.LayerNorm(model_dim, eps=NORM_EPS)
        self.by_cosine = cosine_scale > 0
        self.softmax_scale = 1.0 if self.by_cosine else head_dim**-0.5
        self.log_scale: nn.Parameter | None = None  # of the queries, one a head
        if self.by_cosine:
            self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(cosine_scale)))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, tokens, head_dim]

    def _prepare(self, source: Tensor) -> Tensor:
        """What keys and values are made of, [B, M, K]."""
        if not self.normalise:
            return source
        return F.instance_norm(source.float().transpose(1, 2)).transpose(1, 2)

    def project_query(self, tokens: Tensor) -> Tensor:
        """q = Wq V: [B, N, query_dim] -> [B, N, inner]; by cosine: of unit length in each head, times its scale."""
        query = self.w_qs(tokens)
        if not self.by_cosine:
            return query
        query = F.normalize(self._split_heads(query).float(), dim=-1) * self.log_scale.exp()[:, None, None]
        return query.transpose(1, 2).flatten(2)

    def project_keys(self, source: Tensor) -> Tensor:
        """K = Wk of a prepared source [B, M, K] -> [B, heads, M, head_dim].

        By cosine: what differs from the mean over tokens, of unit length. The mean changes no softmax over tokens, and
        at the start it is most of every key.
        """
        keys = self._split_heads(self.w_ks(source))
        if not self.by_cosine:
            return keys
        keys = keys.float()
        return F.normalize(keys - keys.mean(2, keepdim=True), dim=-1)

    def attention_weights(self, query: Tensor, source: Tensor) -> Tensor:
        """The softmax weights [B, heads, N, M] of projected queries [B, N, inner] over a source [B, M, K]."""
        q, k = self._split_heads(query), self.project_keys(self._prepare(source))
        return (q.to(k.dtype) @ k.transpose(-2, -1) * self.softmax_scale).softmax(-1)

    def forward(self, query: Tensor, source: Tensor, residual: Tensor | None = None) -> Tensor:
        """Projected queries [B, N, inner], source [B, M, K] (and residual [B, N, K]) -> [B, N, K]."""
        source = self._prepare(source)
        v = self._split_heads(self.w_vs(source))
        q, k = self._split_heads(query).to(v.dtype), self.project_keys(source).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale).transpose(1, 2).flatten(2)
        out = self.fc(attended)  # [B, N, K]
        return self.layer_norm(out if residual is None else out + residual)


class FeedForward(nn.Module):
    """Two linear layers with a residual and a layer norm behind them."""

    def __init__(self, model_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(model_dim, hidden_dim)
        self.w_2 = nn.Linear(hidden_dim, model_dim)
        self.layer_norm = nn.LayerNorm(model_dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, K] -> [B, N, K]."""
        return self.layer_norm(self.w_2(F.relu(self.w_1(x))) + x)


class CrossAttentionLayer(nn.Module):
    """Cross-attention and feed-forward under the published names."""

    def __init__(
        self,
        query_dim: int,
        model_dim: int,
        num_heads: int,
        head_dim: int,
        hidden_dim: int,
        cosine_scale: float = 0.0,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.MH_attn = MultiHeadCrossAttention(query_dim, model_dim, num_heads, head_dim, cosine_scale, normalise)
        self.pos_ffn = FeedForward(model_dim, hidden_dim)

    def forward(self, query: Tensor, source: Tensor, residual: Tensor | None = None) -> Tensor:
        """Projected queries [B, N, inner] and a source [B, M, K] -> [B, N, K]."""
        return self.pos_ffn(self.MH_attn(query, source, residual))


class FigureCASA(nn.Module):
    """CASA as the figure draws it: separate EMA projections, no way around the attention."""

    projects_query_through_head = False
    target_copies_online = False  # the target's weights are an exponential moving average

    def __init__(
        self,
        query_dim: int,
        model_dim: int,
        num_heads: int,
        head_dim: int,
        hidden_dim: int,
        cosine_scale: float = 0.0,
        normalise: bool = False,
    ) -> None:
        """Build for raw encoder tokens of `query_dim` channels and a projected space of `model_dim` = K."""
        super().__init__()
        self.Cross_Att = CrossAttentionLayer(
            query_dim, model_dim, num_heads, head_dim, hidden_dim, cosine_scale, normalise
        )

    def make_query(self, tokens: Tensor) -> Tensor:
        """q = Wq V: [B, N, query_dim] -> [B, N, inner]."""
        return self.Cross_Att.MH_attn.project_query(tokens)

    def attention_weights(self, query: Tensor, source: Tensor) -> Tensor:
        """Where `query` [B, N, inner] looks in `source` [B, M, K]: [B, heads, N, M]."""
        return self.Cross_Att.MH_attn.attention_weights(query, source)

    def align(self, query: Tensor, source: Tensor) -> Tensor:
        """S or T: what `query` [B, N, inner] finds in `source` [B, M, K], as [B, N, K] of unit length in float32."""
        return F.normalize(self.Cross_Att(query, source).float(), dim=-1)

    def target_twin(self) -> "FigureCASA":
        """An independent copy for the teacher, without the query projection that only the student has."""
        twin = copy.deepcopy(self)
        twin.Cross_Att.MH_attn.w_qs = twin.Cross_Att.MH_attn.log_scale = None
        return twin


class PublishedCASA(nn.Module):
    """CASA as released: the query reaches the output on both sides, and both sides share their weights."""

    projects_query_through_head = True
    target_copies_online = True

    def __init__(
        self,
        query_dim: int,
        model_dim: int,
        num_heads: int,
        head_dim: int,
        hidden_dim: int,
        cosine_scale: float = 0.0,
        normalise: bool = False,
    ) -> None:
        """Build for a projected space of `model_dim` = K; `query_dim` is not needed, queries are projected tokens."""
        super().__init__()
        del query_dim
        if cosine_scale:
            raise ValueError(
                f"--casa_cosine_scale {cosine_scale:g} needs --casa_variant figure: nothing like it was released"
            )
        self.Cross_Att = CrossAttentionLayer(model_dim, model_dim, num_heads, head_dim, hidden_dim, normalise=normalise)

    def make_query(self, tokens: Tensor) -> Tensor:
        """Projected tokens [B, N, K] are the query themselves: Wq belongs to the shared cross-attention."""
        return tokens

    def align(self, query: Tensor, source: Tensor) -> Tensor:
        """S or T: `query` [B, N, K] plus what it finds in `source` [B, M, K], as [B, N, K]."""
        return self.Cross_Att(self.Cross_Att.MH_attn.w_qs(query), source, residual=query)

    def attention_weights(self, query: Tensor, source: Tensor) -> Tensor:
        """Where `query` [B, N, K] looks in `source` [B, M, K]: [B, heads, N, M]."""
        attention = self.Cross_Att.MH_attn
        return attention.attention_weights(attention.w_qs(query), source)

    def target_twin(self) -> "PublishedCASA":
        """An independent copy for the teacher, which `AliceTeacher.update` keeps equal to the student's."""
        return copy.deepcopy(self)


@torch.no_grad()
def relative_entropy(weights: Tensor) -> Tensor:
    """Mean entropy of attention weights [..., M] over log M: 1 = looks everywhere alike, 0 = at one token each."""
    return torch.special.entr(weights.float()).sum(-1).mean() / math.log(weights.shape[-1])


CASA_VARIANTS: dict[str, Callable[..., FigureCASA | PublishedCASA]] = {"figure": FigureCASA, "published": PublishedCASA}


class CasaAttention:
    """Keeps the attention of the first use of a CASA inside a `with` block; None keeps nothing."""

    def __init__(self, casa: "FigureCASA | PublishedCASA | None") -> None:
        self.casa, self.kept = casa, []

    def __enter__(self) -> "CasaAttention":
        if self.casa is not None:
            self.hook = self.casa.Cross_Att.MH_attn.register_forward_hook(self._keep)
        return self

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.kept.append(module.attention_weights(*inputs[:2]))

    def __exit__(self, *error) -> None:
        if self.casa is not None:
            self.hook.remove()

    def found(self, name: str) -> dict[str, Tensor]:
        """{"attention_NAME": [R, N, M], mean over heads}, or nothing without CASA."""
        return {f"attention_{name}": self.kept[0].mean(1)} if self.kept else {}

"""CASA: the published variant against its numbers, the figure's variant against a slow reading of the equations."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from models.methods.casa import CASA_VARIANTS, FigureCASA, PublishedCASA, relative_entropy
from tests.golden_fill import fill_by_name, golden, golden_file, known

SMALL = {"query_dim": 12, "model_dim": 16, "num_heads": 2, "head_dim": 5, "hidden_dim": 24}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_published_variant_matches_the_published_numbers() -> None:
    published = golden("golden_casa.npz")
    casa = PublishedCASA(query_dim=384, model_dim=512, num_heads=8, head_dim=64, hidden_dim=2048)
    fill_by_name(casa)
    attention = casa.Cross_Att.MH_attn
    query = published["query"]
    with torch.no_grad():
        for source, out in (("kv_student", "student_out"), ("kv_teacher", "teacher_out")):
            torch.testing.assert_close(*known(casa.align(query, published[source]), published[out]), rtol=0, atol=1e-5)
        projected = attention.w_qs(query)
        weights = attention.attention_weights(projected, published["kv_student"])
        torch.testing.assert_close(*known(weights, published["attn_student"]), rtol=0, atol=1e-6)
        normed = attention(projected, published["kv_student"], residual=query)
        torch.testing.assert_close(*known(normed, published["mha_out_student"]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("variant", list(CASA_VARIANTS))
def test_state_dict_names_are_the_published_ones(variant: str) -> None:
    """The published module's other tensors (projection_*) never reached its output."""
    shapes = json.loads(golden_file("casa_head_state_dicts.json").read_text())["casa"]
    expected = {name: shape for name, shape in shapes.items() if name.startswith("Cross_Att.")}
    casa = CASA_VARIANTS[variant](query_dim=512, model_dim=512, num_heads=8, head_dim=64, hidden_dim=2048)
    assert {name: list(tensor.shape) for name, tensor in casa.state_dict().items()} == expected


def align_slowly(casa: FigureCASA, query: Tensor, source: Tensor) -> Tensor:
    """The equations token by token and head by head, for one sample: query [N, inner], source [M, K]."""
    layer, ffn = casa.Cross_Att.MH_attn, casa.Cross_Att.pos_ffn
    rows = []
    for q in query:
        heads = []
        for head in range(2):
            part = slice(5 * head, 5 * head + 5)
            scores = torch.stack([(q[part] * layer.w_ks(h)[part]).sum() / math.sqrt(5) for h in source])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(w * layer.w_vs(h)[part] for w, h in zip(weights, source)))
        attended = layer.layer_norm(layer.fc(torch.cat(heads)))  # no residual from the query
        rows.append(ffn.layer_norm(attended + ffn.w_2(ffn.w_1(attended).clamp(min=0))))
    return torch.stack(rows)


def test_figure_variant_follows_its_equations() -> None:
    casa = FigureCASA(**SMALL)
    fill_by_name(casa)
    tokens, source = randn(2, 3, 12), randn(2, 4, 16, seed=1)
    query = casa.make_query(tokens)
    expected = torch.stack([align_slowly(casa, query[i], source[i]) for i in range(2)])
    expected = expected / expected.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(casa.align(query, source), expected, rtol=1e-5, atol=1e-6)


def test_by_cosine_keys_lose_their_mean_and_lengths_and_the_scale_trains() -> None:
    """Against the equation head by head; a part that all source tokens share changes no weight."""
    casa = FigureCASA(**SMALL, cosine_scale=7.0)
    fill_by_name(casa)
    with torch.no_grad():
        casa.Cross_Att.MH_attn.log_scale.copy_(torch.tensor([7.0, 3.0]).log())
    tokens, source = randn(2, 3, 12), randn(2, 4, 16, seed=1)
    weights = casa.attention_weights(casa.make_query(tokens), source)
    layer = casa.Cross_Att.MH_attn
    q, k = layer.w_qs(tokens), layer.w_ks(source)
    for head, scale in enumerate((7.0, 3.0)):
        part = slice(5 * head, 5 * head + 5)
        for sample in range(2):
            keys = k[sample, :, part] - k[sample, :, part].mean(0)
            for token in range(3):
                cosines = torch.stack([torch.cosine_similarity(q[sample, token, part], key, dim=0) for key in keys])
                torch.testing.assert_close(weights[sample, head, token], (scale * cosines).softmax(0))
    shifted = casa.attention_weights(casa.make_query(tokens), source + randn(1, 1, 16, seed=2))
    torch.testing.assert_close(shifted, weights, rtol=1e-4, atol=1e-5)
    casa.align(casa.make_query(tokens), source)[..., 0].sum().backward()
    assert layer.log_scale.grad.abs().min() > 0
    assert casa.target_twin().Cross_Att.MH_attn.log_scale is None, "the scale is the query's, which the student gives"


def test_weights_shown_are_the_weights_used() -> None:
    """`attention_weights` is for monitors and pictures; the output comes from torch's fused attention."""
    for scale in (0.0, 7.0):
        layer = FigureCASA(**SMALL, cosine_scale=scale).Cross_Att.MH_attn
        query, source = layer.project_query(randn(2, 3, 12)), randn(2, 4, 16, seed=1)
        values = layer._split_heads(layer.w_vs(source))
        attended = layer.fc((layer.attention_weights(query, source) @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(query, source), layer.layer_norm(attended), rtol=1e-4, atol=1e-5)


def test_the_published_variant_refuses_cosines_by_the_flags_name() -> None:
    with pytest.raises(ValueError, match="--casa_cosine_scale 7 needs --casa_variant figure"):
        PublishedCASA(**SMALL, cosine_scale=7.0)


def test_relative_entropy_is_one_for_uniform_and_zero_for_one_token() -> None:
    assert float(relative_entropy(torch.full((2, 3, 5), 0.2))) == pytest.approx(1.0)
    assert float(relative_entropy(torch.eye(5))) == pytest.approx(0.0)


def test_only_the_published_variant_lets_the_query_around_the_attention() -> None:
    """With one source token the attention cannot depend on the query; the published output still does."""
    source = randn(1, 1, 16)
    queries = (randn(1, 3, 16, seed=2), randn(1, 3, 16, seed=3))
    published = PublishedCASA(**SMALL)
    assert not torch.allclose(published.align(queries[0], source), published.align(queries[1], source), atol=1e-2)
    figure = FigureCASA(**(SMALL | {"query_dim": 16}))
    outputs = [figure.align(figure.make_query(query), source) for query in queries]
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("variant", list(CASA_VARIANTS))
def test_target_twin_is_an_independent_copy(variant: str) -> None:
    casa: nn.Module = CASA_VARIANTS[variant](**SMALL)
    twin = casa.target_twin()
    names = dict(twin.named_parameters())
    assert ("Cross_Att.MH_attn.w_qs.weight" in names) == (variant == "published")
    for name, parameter in names.items():
        ours = casa.get_parameter(name)
        assert torch.equal(parameter, ours) and parameter.data_ptr() != ours.data_ptr()

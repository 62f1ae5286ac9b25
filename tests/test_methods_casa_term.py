"""The forms of CASA's term: which of them can be met without the view, and that each follows its equation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.casa import deviation, view_contrast_errors
from losses.distillation import Distillation
from models.backbones.interface import hidden_shares
from models.methods.casa import CASA_VARIANTS
from models.methods.casa_term import CasaAnswers, CasaOptions, ask_every_view, casa_loss
from tests.small_alice import NOW, small_alice, small_batch
from tests.test_models_casa import SMALL, randn

NUM_ROWS, NUM_QUERIES, WIDTH = 4, 3, 8
VISIBLE_THEN_HIDDEN = torch.tensor([False, True]).view(1, 1, 2, 1, 1).expand(2, 2, 2, 1, 1)


class KnownCASA(nn.Module):
    """Answers with two parts of the query and one of the view."""

    def align(self, query: Tensor, source: Tensor) -> Tensor:
        return F.normalize(2 * query + source.mean(1, keepdim=True), dim=-1)


def known_answers(online: Tensor) -> CasaAnswers:
    """The same queries in every row (entries 0 to 2); view v says itself in entry 4 + v."""
    query = torch.eye(WIDTH)[:NUM_QUERIES].expand(NUM_ROWS, -1, -1)
    source = torch.eye(WIDTH)[4:, None].expand(-1, 5, -1)
    target, shuffled = (KnownCASA().align(query, views) for views in (source, source.roll(2, 0)))
    return CasaAnswers(query, online, target, shuffled, source)


def loss_of(online: Tensor, mask: Tensor | None = None, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """loss_tokens and monitors of online answers [4, N, 8] in that example."""
    batch = {"crop": torch.zeros(2, 2, 1, 16 * NUM_QUERIES, 16, 16), "mask": mask}
    chosen = CasaOptions(**options)
    return casa_loss(chosen, Distillation({"tokens": WIDTH}), KnownCASA(), known_answers(online), batch, NOW)


def best_loss(needs_view: bool, target: str) -> float:
    """What the best answers reach, one per view and query, or one per query for all views."""
    torch.manual_seed(0)
    answers = nn.Parameter(torch.randn(NUM_ROWS if needs_view else 1, NUM_QUERIES, WIDTH))
    optimizer = torch.optim.Adam([answers], lr=0.1)
    for _ in range(100):
        loss, _ = loss_of(F.normalize(answers, dim=-1).expand(NUM_ROWS, -1, -1), casa_target=target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_plain_is_met_by_answers_that_ignore_the_view():
    assert best_loss(needs_view=False, target="plain") < 0.05


@pytest.mark.parametrize(("target", "floor"), [("contrast", math.log(3)), ("deviation", math.log(4))])
def test_contrast_and_deviation_fall_only_where_answers_depend_on_the_view(target: str, floor: float):
    """Without the view no answer is better than a guess among the 3 candidates, or the 4 deviations."""
    assert best_loss(needs_view=False, target=target) > floor - 0.02
    assert best_loss(needs_view=True, target=target) < 0.2 * floor


@pytest.mark.parametrize("target", ["plain", "contrast", "deviation"])
def test_the_monitors_gap_grows_with_answers_that_follow_the_view(target: str):
    query_only, right = torch.eye(WIDTH)[:3].expand(4, -1, -1), known_answers(torch.zeros(4, 3, 8)).target
    gaps = []
    for online in (query_only, right):
        _, monitors = loss_of(online, casa_target=target)
        gaps.append((monitors["casa_cos_right"] - monitors["casa_cos_shuffled"]).item())
    assert gaps[0] == pytest.approx(0, abs=1e-5) and gaps[1] > 0.2


def test_contrast_follows_its_equation():
    """Rows 2 and 3 of six views, as the second rank of three sees them; the partner is no candidate."""
    online, answers = randn(2, 3, 5), randn(6, 2, 3, 5, seed=1)
    found = view_contrast_errors(online, answers, first=2, temperature=0.3)
    for row, candidates in enumerate(([2, 0, 1, 4, 5], [3, 0, 1, 4, 5])):
        for query in range(3):
            asked = answers[candidates, row, query]
            cosines = F.cosine_similarity(online[row, query][None], asked, dim=-1)
            assert found[row, query].item() == pytest.approx(-(cosines / 0.3).log_softmax(0)[0].item(), abs=1e-5)


def test_deviation_is_the_direction_from_the_mean_over_views():
    answers = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 2.0]]).view(3, 1, 1, 2)  # mean 1, 2
    torch.testing.assert_close(deviation(answers[0], answers), torch.tensor([[[0.5, -0.5]]]) * 2**0.5)


def test_contrast_needs_a_second_sample_to_train_and_costs_nothing_without_one_in_evaluation():
    method = small_alice(casa_target="contrast")
    with pytest.raises(ValueError, match="--casa_target contrast.*--batch_size"):
        method(small_batch(1), NOW)
    assert method.eval()(small_batch(1), NOW)[1]["loss_tokens"] == 0


def test_every_view_answers_every_row_s_queries():
    for variant in CASA_VARIANTS.values():
        casa = variant(**(SMALL | {"query_dim": 16}))
        query, sources = casa.make_query(randn(2, 3, 16)), randn(4, 7, 16, seed=1)
        answers = ask_every_view(casa, query, sources)
        assert answers.shape == (4, 2, 3, 16) and not answers.requires_grad
        for view in range(4):
            expected = casa.align(query, sources[view].expand(2, -1, -1))
            torch.testing.assert_close(answers[view], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["plain", "contrast", "deviation"])
def test_only_queries_of_hidden_places_count(target: str):
    """Three places along D: the first is visible, the last hidden, half of the middle one hidden."""
    online = randn(NUM_ROWS, NUM_QUERIES, WIDTH).requires_grad_()
    loss, _ = loss_of(online, VISIBLE_THEN_HIDDEN, casa_target=target, casa_queries="masked")
    loss.backward()
    assert not online.grad[:, 0].any() and online.grad[:, 1:].abs().amin(dim=(0, 1)).max() > 0
    errors = []
    for query in (1, 2):
        only = torch.zeros(2, 2, 3, 1, 1, dtype=torch.bool)
        only[:, :, query] = True
        errors.append(loss_of(online.detach(), only, casa_target=target, casa_queries="masked")[0])
    torch.testing.assert_close(loss.detach(), (0.5 * errors[0] + errors[1]) / 1.5)


def test_hidden_shares_on_coarser_and_finer_grids_and_slices():
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool).view(1, 1, 2, 4)  # a slice
    assert hidden_shares(mask, (1, 1, 2)).tolist() == [[0.25, 1.0]]
    assert hidden_shares(mask, (1, 2, 8)).tolist() == [[1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("variant", list(CASA_VARIANTS))
def test_normalised_sources_lose_their_mean_and_spread_view_by_view(variant: str):
    casa, plain = (CASA_VARIANTS[variant](**(SMALL | {"query_dim": 16}), normalise=on) for on in (True, False))
    assert casa.state_dict().keys() == plain.state_dict().keys()
    tokens, source = randn(2, 3, 16), randn(2, 6, 16, seed=1)
    query, changed = casa.make_query(tokens), source * torch.rand(2, 1, 16).add(0.5) + randn(2, 1, 16, seed=2)
    torch.testing.assert_close(casa.align(query, changed), casa.align(query, source), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(casa.attention_weights(query, changed), casa.attention_weights(query, source))
    query = plain.make_query(tokens)
    assert not torch.allclose(plain.align(query, changed), plain.align(query, source), rtol=1e-1, atol=1e-2)
    normed = (source - source.mean(1, keepdim=True)) / (source.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    plain.load_state_dict(casa.state_dict())
    torch.testing.assert_close(casa.align(query, source), plain.align(query, normed), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_psi_is_the_average_of_phi_only_with_a_token_layer_of_its_own(shared: bool):
    method = small_alice(shared_head_teacher=shared)
    tokens = randn(2, 5, method.student.backbone.channels[8])
    phi, psi = (part.head.project_decoder_tokens(tokens) for part in (method.student, method.teacher))
    assert torch.allclose(phi, psi) is not shared


@pytest.mark.parametrize(
    "options",
    [
        {"casa_target": "contrast"},
        {"casa_target": "deviation", "casa_queries": "masked"},
        {"casa_target": "contrast", "casa_normalise": True, "casa_variant": "published"},
    ],
)
def test_every_form_trains_all_that_it_builds_and_keeps_the_layout_of_checkpoints(options: dict):
    method = small_alice(**options)
    assert (
        method.state_dict().keys()
        == small_alice(casa_variant=options.get("casa_variant", "figure")).state_dict().keys()
    )
    total, terms = method(small_batch(2), NOW)
    total.backward()
    assert not [name for name, p in method.student.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad is None for p in method.teacher.parameters())
    assert {"loss_tokens", "casa_cos_right", "casa_cos_shuffled", "casa_entropy"} <= terms.keys()
    method.after_step(NOW, was_skipped=torch.tensor(False))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"casa_temp": 0.0}, "--casa_temp"),
        ({"casa_queries": "masked", "mask_ratio": 0.0, "recon_on": "all"}, "--casa_queries masked"),
    ],
)
def test_impossible_options_name_the_flag(options: dict, flag: str):
    with pytest.raises(ValueError, match=flag):
        small_alice(**options)

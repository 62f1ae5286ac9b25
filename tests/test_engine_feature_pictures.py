"""Pictures of attention and features: what is drawn is what the networks did, at the right place."""

import numpy as np
import pytest
import torch

from engine.logging import RunLog
from engine.watch.feature_pictures import (
    MOST_TIMES_UNIFORM,
    attention_figure,
    enlarge,
    feature_figure,
    principal_colours,
    token_sides,
)
from engine.watch.pictures import draw_pictures, look, sheets
from models.backbones.interface import upsample_mask
from models.methods.method import rows_of
from tests.fakes import make_dataset
from tests.small_alice import ROI, run_alice, small_alice, small_batch

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_PAIRS = 2
QUERIES, KEYS = 4 * 2 * 2, 8 * 4 * 4  # tokens of a 64 x 32 x 32 crop at strides 16 and 8


def test_look_gives_the_attention_that_was_used_and_leaves_no_trace():
    method, batch = small_alice(), small_batch(NUM_PAIRS)
    method.student.backbone.eval()  # a module whose own mode differs from its parent's
    modes = [module.training for module in method.modules()]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    features, found = look(method, batch)
    student, teacher = found["attention_student"], found["attention_teacher"]
    assert student.shape == teacher.shape == (2 * NUM_PAIRS, QUERIES, KEYS)
    for weights in (student, teacher):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2 * NUM_PAIRS, QUERIES))
    assert not torch.equal(student, teacher)
    assert features.shape[:1] + features.shape[2:] == (2 * NUM_PAIRS, 8, 4, 4)
    assert [module.training for module in method.modules()] == modes
    assert not any(module._forward_hooks for module in method.modules())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    online, _ = run_alice(method.eval(), batch)
    entropy = torch.special.entr(student[:2]).sum(-1).mean() / np.log(KEYS)
    assert float(online.casa_entropy) == pytest.approx(float(entropy), abs=1e-3)


def test_look_shows_what_the_student_saw_and_made_of_it():
    method, batch = small_alice(), small_batch(NUM_PAIRS)
    _, found = look(method, batch)
    hidden = upsample_mask(rows_of(batch["mask"]), ROI)
    assert torch.equal(found["seen"].isnan(), hidden)
    assert torch.equal(found["seen"][~hidden], rows_of(batch["student"])[~hidden])
    torch.testing.assert_close(found["reconstruction"], run_alice(method.eval(), batch)[0].reconstruction.detach())


@pytest.mark.parametrize("stride", [2, 8, 16])
def test_the_stride_follows_from_the_number_of_tokens(stride):
    assert token_sides(ROI, (64 // stride) * (32 // stride) ** 2) == (stride, stride, stride)
    assert token_sides((1, *ROI[:2]), (64 // stride) * (32 // stride)) == (1, stride, stride)


def test_heat_lies_where_the_centre_token_looks():
    """One-hot attention of the centre's token; all others look elsewhere."""
    size, place = (64, 32, 32), (5, 3, 1)  # the planes at depth 40 and height 24 go through it
    asking = np.ravel_multi_index((2, 1, 1), (4, 2, 2))
    weights = torch.zeros(1, QUERIES, KEYS)
    weights[0, :, 0] = 1
    weights[0, asking] = 0
    weights[0, asking, np.ravel_multi_index(place, (8, 4, 4))] = 1
    networks = {"student": weights, "teacher": torch.full_like(weights, 1 / KEYS)}
    figure = attention_figure(torch.rand(1, 1, *size), networks, ["query"], (2.0, 1.0, 1.0))
    student_axial, teacher_axial, student_coronal = (figure.axes[i].images[1].get_array() for i in (1, 2, 4))
    expected = np.zeros((32, 32))
    expected[24:32, 8:16] = 1
    np.testing.assert_array_equal(student_axial, expected)
    np.testing.assert_allclose(teacher_axial, 0, atol=1e-6)  # uniform attention shows nothing
    rows, columns = np.nonzero(np.asarray(student_coronal))
    assert (rows.min(), rows.max()) == (64 - 48, 63 - 40) and (columns.min(), columns.max()) == (8, 15)
    assert f"{KEYS:.2f}x uniform" in figure.axes[1].get_title() and MOST_TIMES_UNIFORM < KEYS


def test_colours_are_the_main_components_and_one_scale_for_all_views():
    torch.manual_seed(0)
    signal = torch.rand(2, 3, 4, 4, 4) * torch.tensor([3.0, 2.0, 1.0])[:, None, None, None]
    basis = torch.linalg.qr(torch.randn(8, 3))[0]
    features = torch.einsum("cj,vjdhw->vcdhw", basis, signal) + 7.0
    colours = principal_colours(features)
    assert colours.shape == (2, 4, 4, 4, 3) and colours.min() == 0 and colours.max() == 1
    for component in range(3):
        planted, found = signal[:, component].numpy().ravel(), colours[..., component].ravel()
        assert abs(np.corrcoef(planted, found)[0, 1]) > 0.9
    same = principal_colours(features[:1].expand(2, -1, -1, -1, -1))
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(principal_colours(torch.ones(1, 4, 2, 2, 2)), 0)


def test_tokens_cover_their_voxels():
    np.testing.assert_array_equal(enlarge(np.arange(4).reshape(1, 2, 2), (2, 4, 4))[1, :, 0], [0, 0, 2, 2])
    figure = feature_figure(torch.rand(1, 1, *ROI), torch.rand(1, 5, 8, 4, 4), ["key"], (1.0, 1.0, 1.0))
    assert [axis.images[0].get_array().shape for axis in figure.axes] == [(32, 32), (32, 32, 3), (64, 32), (64, 32, 3)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"features", "attention", "reconstruction"}),
        ({"casa_variant": "published"}, {"features", "attention", "reconstruction"}),
        ({"casa_cosine_scale": 10.0}, {"features", "attention", "reconstruction"}),
        ({"lambda2": 0.0}, {"features", "reconstruction"}),
        ({"lambda1": 0.0, "lambda2": 0.0}, {"features", "reconstruction"}),
        ({"lambda3": 0.0}, {"features", "attention"}),
    ],
)
def test_switched_off_objectives_leave_out_their_sheets(options, expected):
    assert set(sheets(small_alice(**options), make_dataset(), small_batch(NUM_PAIRS))) == expected


def test_of_slices_the_axial_plane_alone_is_drawn():
    roi = (1, 64, 32)
    method, batch = small_alice(roi=roi), small_batch(NUM_PAIRS, roi=roi)
    found = sheets(method, make_dataset(), batch)
    columns = {"features": 2, "attention": 3, "reconstruction": 4}
    assert {name: len(figure.axes) // (2 * NUM_PAIRS) for name, figure in found.items()} == columns
    for figure in found.values():
        assert {axis.images[0].get_array().shape[:2] for axis in figure.axes} == {roi[1:]}
        assert "coronal" not in "".join(axis.get_title() for axis in figure.axes)
    asked = found["attention"].axes[1].images[1].get_array()  # tokens of 8 pixels: 8 x 4 of them
    assert all((asked[8 * i : 8 * i + 8, 8 * j : 8 * j + 8] == asked[8 * i, 8 * j]).all() for i, j in np.ndindex(8, 4))


def test_a_full_disk_costs_the_pictures_and_is_told_once(tmp_path):
    (tmp_path / "reconstruction.png").symlink_to("/dev/full")
    (tmp_path / "features.png").symlink_to("/dev/full")
    log = RunLog(tmp_path, num_steps=2, tensorboard=False)
    with pytest.warns(UserWarning, match="pictures cannot be written.*No space left on device.*goes on") as warned:
        for step in (1, 2):
            draw_pictures(small_alice(), make_dataset(), small_batch(NUM_PAIRS), step, "fp32", tmp_path, log)
    assert len(warned) == 1 and (tmp_path / "attention.png").stat().st_size > 10_000

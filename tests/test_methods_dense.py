"""The dense term: maps read at points, what each variant compares, what gets gradients, ranks, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from losses.dense import contrast_errors, mean_over_points
from models.methods.dense import DenseOptions, sample_map
from models.methods.method import rows_of
from tests.launched import run_ranks
from tests.small_alice import NOW, ROI, run_alice, small_alice, small_batch
from tests.small_dense import NUM_POINTS, VARIANTS, VECTOR_DIM, WITH_DENSE, dense_alice, dense_batch
from tests.test_models_alice_ranks import assert_close

NUM_RANKS = 2


# Maps at points


def obvious_sample(feature_map: torch.Tensor, points: torch.Tensor, roi: tuple) -> torch.Tensor:
    """[R, P, C] by a loop: the centre of cell j lies at voxel (j + 1/2) s - 1/2."""
    rows, channels, *cells = feature_map.shape
    found = torch.zeros(rows, points.shape[1], channels)
    for row in range(rows):
        for number, point in enumerate(points[row].tolist()):
            index = [(p + 0.5) / (side / num) - 0.5 for p, side, num in zip(point, roi, cells)]
            index = [min(max(value, 0.0), num - 1.0) for value, num in zip(index, cells)]
            for corner in np.ndindex(2, 2, 2):
                low = [int(value) for value in index]
                weight = np.prod([(v - i) if c else 1 - (v - i) for v, i, c in zip(index, low, corner)])
                at = [min(i + c, num - 1) for i, c, num in zip(low, corner, cells)]
                found[row, number] += float(weight) * feature_map[row, :, at[0], at[1], at[2]]
    return found


@pytest.mark.parametrize(
    ("roi", "cells"), [((16, 24, 32), (4, 6, 8)), ((16, 8, 8), (16, 8, 8)), ((1, 16, 8), (1, 4, 2))]
)
def test_maps_are_read_as_an_obvious_loop_reads_them(roi, cells):
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(2, 5, *cells, generator=generator)
    points = torch.rand(2, 30, 3, generator=generator) * torch.tensor(roi) - 0.5
    expected = obvious_sample(feature_map, points, roi)
    torch.testing.assert_close(sample_map(feature_map, points, roi), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_a_map_of_its_own_coordinates_gives_the_points(stride):
    """A picture whose values are voxel coordinates, averaged to a map, is read off where it was asked."""
    roi = (16, 24, 32)
    axes = torch.meshgrid(*(torch.arange(float(side)) for side in roi), indexing="ij")
    feature_map = F.avg_pool3d(torch.stack(axes)[None], stride)
    points = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0)) * (torch.tensor(roi) - stride)
    points = points + (stride - 1) / 2  # where cells lie on both sides
    torch.testing.assert_close(sample_map(feature_map, points, roi), points, rtol=1e-4, atol=1e-4)


# What the term is


def test_distil_is_one_minus_the_cosine_of_masked_features_and_vectors():
    method, batch = dense_alice(), dense_batch(3)
    total, terms = method(batch, WITH_DENSE)
    student = method.student
    maps = student.backbone.encode(rows_of(batch["student"]), rows_of(batch["mask"]))
    errors = []
    for row in range(5):  # the sixth has no place in the patient
        points = rows_of(batch["points_vox"])[row : row + 1]
        joined = torch.cat([sample_map(one[row : row + 1], points, ROI) for one in maps.values()], dim=2)
        predicted = student.dense.projector(student.dense.norm(joined))[0]
        errors.append((1 - F.cosine_similarity(predicted, rows_of(batch["anatomy"])[row], dim=1)).mean())
    torch.testing.assert_close(terms["loss_dense"], torch.stack(errors).sum().detach() / 6, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, 10 * terms["loss_recon"] + 2 * terms["loss_dense"])


def test_across_compares_with_the_teacher_in_the_other_crop():
    """Move the teacher away from the student: the target of Q's points is read in K, unmasked, at the matches."""
    method, batch = dense_alice("across"), dense_batch(2, "across")
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.mul_(1.3)
    _, terms = method(batch, WITH_DENSE)
    maps = method.teacher.backbone.encode(rows_of(batch["teacher"]))
    online, _ = run_alice(method, batch)
    projected = method.student.dense(online.dense_maps, rows_of(batch["points_vox"]), ROI)
    predicted = method.student.dense.predictor(projected)
    errors = torch.zeros(4, NUM_POINTS)
    for row in range(4):
        other = row ^ 1  # rows 2 i and 2 i + 1 are Q and K
        match = rows_of(batch["match_vox"])[row : row + 1]
        joined = torch.cat([sample_map(one[other : other + 1], match, ROI) for one in maps.values()], dim=2)
        target = method.teacher.dense.projector(method.teacher.dense.norm(joined))[0]
        errors[row] = 1 - F.cosine_similarity(predicted[row], target, dim=1)
    expected = mean_over_points(errors, rows_of(batch["match_weight"])).detach()
    torch.testing.assert_close(terms["loss_dense"], expected, rtol=1e-4, atol=1e-5)


def test_contrast_takes_the_same_features_and_the_places_of_the_matches():
    method, batch = dense_alice("across_contrast"), dense_batch(2, "across_contrast")
    _, terms = method(batch, WITH_DENSE)
    online, target = run_alice(method, batch)
    predicted = method.student.dense(online.dense_maps, rows_of(batch["points_vox"]), ROI)
    predicted = method.student.dense.predict(predicted)
    swapped = [one[[1, 0, 3, 2]] for one in target.dense_maps]
    targets = method.teacher.dense(swapped, rows_of(batch["match_vox"]), ROI)
    errors = contrast_errors(predicted, targets, rows_of(batch["match_mm"]), 0.1, 20.0)
    expected = mean_over_points(errors, rows_of(batch["match_weight"])).detach()
    torch.testing.assert_close(terms["loss_dense"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_on_one_batch_finds_its_points(variant):
    method, batch = dense_alice(variant, dense_near_mm=0.0), dense_batch(2, variant)
    optimizer = torch.optim.Adam(method.student.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        total, terms = method(batch, WITH_DENSE)
        total.backward()
        optimizer.step()
        history.append(terms)
    assert history[-1]["loss_dense"] < 0.7 * history[0]["loss_dense"]
    assert 0 <= history[0]["dense_nearest"] <= 1 and history[0]["dense_std"] > 0
    if variant != "across":  # a regression alone need not tell points apart
        assert history[-1]["dense_nearest"] > 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_built_trains_and_the_teacher_does_not(variant):
    method = dense_alice(variant)
    method(dense_batch(2, variant), WITH_DENSE)[0].backward()
    trained = [name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert trained == [name for name, _ in method.student.named_parameters(prefix="student")]
    with_teacher = variant.startswith("across")
    assert (method.teacher.dense is not None) == with_teacher
    assert any(name.startswith("student.dense.predictor") for name in trained) == with_teacher
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter += 0.1
    method.after_step(NOW, was_skipped=torch.tensor(False))
    assert all(not torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())


@pytest.mark.parametrize("maps", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("lambda3", [0.0, 10.0])
@pytest.mark.parametrize(("backbone", "roi"), [("unet", (32, 16, 16)), ("swin_unetr", (1, 64, 64))])
def test_every_choice_of_maps_trains_all_that_it_builds(backbone, roi, lambda3, maps):
    width = 12 if backbone == "swin_unetr" else 6
    method = dense_alice(backbone=backbone, feature_size=width, roi=roi, dense_maps=maps, lambda3=lambda3)
    method(dense_batch(1, roi=roi), WITH_DENSE)[0].backward()
    assert not [name for name, p in method.student.named_parameters() if p.grad is None]
    assert min(method.student.backbone.decoder_channels, default=None) == (
        1 if lambda3 else None if maps == "encoder" else 2
    )


def test_half_precision_maps_are_read_in_float32():
    method = dense_alice()
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = method(dense_batch(1), WITH_DENSE)
    assert terms["loss_dense"].dtype == torch.float32 and torch.isfinite(total)


# Off, and at first


def test_without_its_weight_nothing_is_built_or_asked_for():
    plain = small_alice()
    assert plain.anatomy is None and not [name for name in plain.state_dict() if "dense" in name]
    assert "lambda4" not in plain.schedules(10, 5)
    _, terms = plain(small_batch(1), NOW)
    assert not [name for name in terms if "dense" in name]
    ours = dense_alice(lambda1=1.0, lambda2=1.0).student.state_dict()
    theirs = plain.student.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items()), "it is drawn after all others"


def test_warm_up_restores_alone_and_every_parameter_still_gets_a_gradient():
    method = dense_alice(dense_warmup_epochs=1.5)
    schedule = method.schedules(100, 10)["lambda4"]
    assert [schedule(step) for step in (0, 14, 15, 99)] == [0, 0, 2, 2]
    total, terms = method(dense_batch(1), NOW | {"lambda4": schedule(0)})
    torch.testing.assert_close(total, 10 * terms["loss_recon"])
    total.backward()
    assert not [name for name, p in method.student.named_parameters() if p.grad is None]


def test_a_batch_without_any_place_in_the_patient_costs_nothing():
    method, batch = dense_alice(), dense_batch(1)
    batch["has_anatomy"][:], batch["anatomy"][:] = False, 0
    total, terms = method(batch, WITH_DENSE)
    total.backward()
    assert terms["loss_dense"] == 0 and all(torch.isfinite(p.grad).all() for p in method.student.parameters())


def test_what_samples_must_bring():
    assert (dense_alice().anatomy.num_candidates, dense_alice().anatomy.num_coordinates) == (0, 0)
    assert dense_alice("across").anatomy.num_candidates >= NUM_POINTS
    assert dense_alice("coordinates").anatomy.num_coordinates == 3
    assert dense_alice("coordinates", vector_dim=0).student.dense.projector[-1].out_features == 3
    assert dense_alice().student.dense.projector[-1].out_features == VECTOR_DIM


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"lambda4": -1.0}, "--lambda4"),
        ({"dense_points": 0}, "--dense_points"),
        ({"dense_hidden_dim": 0}, "--dense_hidden_dim"),
        ({"dense_temp": 0.0}, "--dense_temp"),
        ({"dense_near_mm": -1.0}, "--dense_near_mm"),
        ({"dense_warmup_epochs": -1.0}, "--dense_warmup_epochs"),
        ({"dense_variant": "across", "dense_maps": "both"}, "--dense_maps both"),
        ({"vector_dim": 0}, "--embed_dir"),
    ],
)
def test_impossible_options_name_the_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        dense_alice(options.pop("dense_variant", "distil"), **options)


def test_lambda4_alone_is_enough():
    method = dense_alice(lambda3=0.0)
    assert method.student.backbone.decoder_channels == {}
    assert DenseOptions().anatomy_request is None
    total, terms = method(dense_batch(1), WITH_DENSE)
    assert set(terms) == {"loss_dense", "dense_nearest", "dense_std"} and total == 2 * terms["loss_dense"]


# Ranks and parts


def step(batches: list[dict], variant: str, wrap=lambda method: method) -> dict:
    """The mean loss and the gradients of some batches, as accumulated in one step."""
    method = dense_alice(variant)
    network, losses = wrap(method), []
    for batch in batches:
        total, terms = network(batch, WITH_DENSE)
        (total / len(batches)).backward()
        losses.append(terms["loss_dense"])
    return {"loss": torch.stack(losses).mean(), **{n: p.grad for n, p in method.student.named_parameters()}}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", NUM_RANKS), rank=rank, world_size=NUM_RANKS)
    for variant in VARIANTS:
        shard = {name: rows.chunk(NUM_RANKS)[rank] for name, rows in dense_batch(4, variant).items()}
        found = step([shard], variant, nn.parallel.DistributedDataParallel)
        torch.save({name: value.clone() for name, value in found.items()}, f"{folder}/{variant}{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path):
    run_ranks(run_rank, (str(tmp_path),), NUM_RANKS)
    for variant in VARIANTS:
        whole = step([dense_batch(4, variant)], variant)
        ranks = [torch.load(tmp_path / f"{variant}{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]
        losses = torch.stack([rank.pop("loss") for rank in ranks])
        torch.testing.assert_close(losses.mean(), whole.pop("loss"), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(losses[0], losses[1], rtol=1e-3)
        for rank in ranks:
            assert_close(rank, whole, tolerance=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulated_parts_equal_one_batch(variant):
    whole = dense_batch(4, variant)
    parts = [{name: rows.chunk(2)[number] for name, rows in whole.items()} for number in range(2)]
    ours, expected = step(parts, variant), step([whole], variant)
    torch.testing.assert_close(ours.pop("loss"), expected.pop("loss"), rtol=1e-4, atol=1e-6)
    assert_close(ours, expected, tolerance=1e-3)

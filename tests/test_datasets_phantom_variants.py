"""The phantom's variants of anatomy and artefacts: flags, labels and landmarks that agree, noise, truth under steps."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.ndimage import label as components

from datasets.phantom import cases
from datasets.phantom.atlas import rib
from datasets.phantom.cases import PhantomCase, atlas_coordinates, case_files, render, write_case
from datasets.phantom.landmarks import atlas_landmarks
from datasets.phantom.organs import _liver_trees
from datasets.phantom.scanner import scan_volume
from datasets.phantom.shapes import Canvas, Region, noise
from datasets.phantom.skeleton import paint_skeleton
from datasets.phantom.trunk import lung_vessels
from datasets.phantom.truth import load_truth
from datasets.phantom.variants import LIVER_SHAPES, Anatomy, Shares, absent_landmarks, sample_variants
from scripts.make_phantom_dataset import main

SEED = 7
SPLEEN, GALLBLADDER, RIGHT_KIDNEY, LEFT_KIDNEY = 3, 9, 2, 13


def case_with(index: int = 1, range_name: str = "abdomen", coarsen: float = 3.0, **shares: float) -> PhantomCase:
    """A phantom with usual anatomy and no artefact but for the given shares."""
    chosen = dataclasses.replace(Shares.none(), **shares)
    return PhantomCase(f"FLARE22_Tr_{index:04d}", SEED, index, True, False, range_name, coarsen, chosen)


def test_usual_phantom_is_the_same_with_and_without_an_absent_organ():
    """A share decides about its own variant: everything away from the gallbladder stays."""
    usual, without = render(case_with()), render(case_with(no_gallbladder=1.0))
    assert (usual.label == GALLBLADDER).any() and not (without.label == GALLBLADDER).any()
    assert "gallbladder_centre" in usual.landmarks_mm and "gallbladder_centre" not in without.landmarks_mm
    assert set(usual.landmarks_mm) - set(without.landmarks_mm) == {"gallbladder_centre"}
    assert (usual.label == without.label)[usual.label != GALLBLADDER].mean() > 0.999


def test_single_kidney_has_neither_label_nor_landmarks_of_the_other():
    done = render(case_with(one_kidney=1.0))
    (side,) = done.patient.anatomy.kidney_sides
    here, gone = ("right", "left") if side == 1 else ("left", "right")
    present = {"right": RIGHT_KIDNEY, "left": LEFT_KIDNEY}
    assert (done.label == present[here]).any() and not (done.label == present[gone]).any()
    names = set(done.landmarks_mm)
    assert f"{here}_kidney_upper_pole" in names
    assert not names & {f"{gone}_kidney_upper_pole", f"{gone}_kidney_lower_pole", f"{gone}_renal_artery_origin"}


def test_horseshoe_joins_the_kidneys():
    usual, joined = render(case_with()), render(case_with(horseshoe_kidney=1.0))
    for done, is_joined in ((usual, False), (joined, True)):
        pieces, _ = components(np.isin(done.label, (RIGHT_KIDNEY, LEFT_KIDNEY)), np.ones((3, 3, 3)))
        sides = [set(pieces[done.label == value].tolist()) for value in (RIGHT_KIDNEY, LEFT_KIDNEY)]
        assert bool(sides[0] & sides[1]) == is_joined
    assert "right_kidney_lower_pole" not in joined.landmarks_mm and "right_kidney_upper_pole" in joined.landmarks_mm


def test_accessory_spleen_adds_to_the_label():
    usual, more = (render(case_with(accessory_spleen=share, coarsen=2.0)) for share in (0.0, 1.0))
    added = (more.label == SPLEEN) & (usual.label != SPLEEN)
    centre, radius = more.patient.anatomy.accessory_spleen
    where = more.scan.to_atlas(more.patient, np.argwhere(added) * more.scan.spacing_mm + more.scan.origin_mm)
    assert added.any() and np.linalg.norm(where - centre, axis=1).max() < radius + 6


@pytest.mark.parametrize("shape", LIVER_SHAPES[1:])
def test_liver_shapes_differ_from_the_usual_one(shape, monkeypatch):
    usual = render(case_with(coarsen=4.0))
    odd = dataclasses.replace(usual.patient, anatomy=Anatomy(liver=shape))
    monkeypatch.setattr(PhantomCase, "sample", lambda case: (odd, usual.scan, np.random.default_rng(0)))
    changed = render(case_with(coarsen=4.0))
    before, after = usual.label == 1, changed.label == 1
    assert (before ^ after).sum() > 0.02 * before.sum()
    for name in {"liver_right_lobe", "liver_left_lobe", "liver_dome"} & set(changed.landmarks_mm):
        index = np.round((changed.landmarks_mm[name] - usual.scan.origin_mm) / usual.scan.spacing_mm).astype(int)
        assert after[tuple(index)], name


@pytest.mark.parametrize(
    "anatomy, gone",
    [
        (Anatomy(rib_pairs=11), {"left_rib_12_front_end", "right_rib_12_front_end"}),
        (Anatomy(rib_pairs=13), set()),
        (Anatomy(num_lumbar=4), {"L5_body", "L5_spinous_tip", "sacral_promontory"}),
        (Anatomy(num_lumbar=6), {"sacral_promontory"}),
        (Anatomy(metal="left_hip"), {"left_femoral_head"}),
        (Anatomy(), set()),
    ],
)
def test_landmarks_of_absent_bones_are_absent(anatomy, gone):
    assert gone <= absent_landmarks(anatomy) and bool(gone) == bool(absent_landmarks(anatomy))
    assert set(atlas_landmarks()) - set(atlas_landmarks(anatomy)) == absent_landmarks(anatomy)


def skeleton_hu(anatomy: Anatomy, low: tuple, high: tuple) -> np.ndarray:
    """HU of the skeleton alone in a box of the atlas, 1 mm voxels."""
    axes = [np.arange(start, stop, dtype=np.float32) for start, stop in zip(low, high)]
    canvas = Canvas(tuple(map(np.ascontiguousarray, np.meshgrid(*axes, indexing="ij"))), axes[1], 1.0)
    paint_skeleton(canvas, dataclasses.replace(case_with().sample()[0], anatomy=anatomy))
    return canvas.hu


def test_ribs_and_lumbar_vertebrae_are_drawn_as_the_anatomy_says():
    def least_dense_level(number: int, low: tuple, high: tuple) -> float:
        return float(skeleton_hu(Anatomy(num_lumbar=number), low, high).mean(axis=(0, 1)).min())

    disc = ((-6, 4, -24), (6, 14, -8))  # between the fifth lumbar vertebra and the sacrum
    below = ((-6, -6, -50), (6, 4, -36))  # between what is a sixth lumbar vertebra in some, and the rest of the sacrum
    assert least_dense_level(4, *disc) > 120
    assert least_dense_level(5, *disc) < 110 and least_dense_level(6, *disc) < 110
    assert least_dense_level(6, *below) < 110 < least_dense_level(5, *below)
    for number, first in ((12, 11), (13, 12)):
        end = rib(number, 1)[0][-1]
        box = (tuple(end.round() - 4), tuple(end.round() + 4))
        assert skeleton_hu(Anatomy(rib_pairs=number), *box).max() > 300
        assert skeleton_hu(Anatomy(rib_pairs=first), *box).max() < 100


def test_arms_ascites_and_colon_contrast_show():
    usual = render(case_with(range_name="abdomen_pelvis"))
    body = (usual.hu > -500).sum()

    def change(**shares: float) -> np.ndarray:
        return render(case_with(range_name="abdomen_pelvis", **shares)).hu - usual.hu

    assert (change(arms_down=1.0) > 700).sum() > 0.02 * body
    assert (change(ascites=1.0) > 60).sum() > 0.01 * body
    assert (change(colon_contrast=1.0) > 150).sum() > 0.005 * body


def test_one_share_leaves_all_other_draws_as_they_are():
    drawn = [sample_variants(np.random.default_rng(3), shares) for shares in (Shares(), Shares(ascites=1.0))]
    (usual, usual_scan), (wet, wet_scan) = drawn
    assert wet.ascites > 0 and usual_scan == wet_scan
    assert dataclasses.replace(wet, ascites=usual.ascites) == usual
    many = [sample_variants(np.random.default_rng(k), Shares())[0] for k in range(600)]
    for name, share, has in (
        ("gallbladder", Shares.no_gallbladder, lambda a: not a.has_gallbladder),
        ("arms", Shares.arms_down, lambda a: a.arms_down),
        ("ribs", Shares.unusual_ribs, lambda a: a.rib_pairs != 12),
    ):
        assert np.mean([has(a) for a in many]) == pytest.approx(share, abs=0.05), name
    with pytest.raises(ValueError, match="--ascites 2"):
        Shares(ascites=2.0)


def test_textures_and_trees_are_the_patients_own():
    x, y, z = np.random.default_rng(0).uniform(-90, 90, (3, 4000)).astype(np.float32)
    first, second = (case_with(index).sample()[0] for index in (1, 2))
    for scale in ("coarse", "middle", "fine"):
        one, other = (noise(Region((), x, y, z, patient.texture_mm), scale) for patient in (first, second))
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.25, scale
    for tree in (
        lambda p: lung_vessels(p.seed, p.texture_mm),
        lambda p: _liver_trees(p.seed, "usual", p.texture_mm)[0],
    ):
        ends = [np.array([segment[1] for segment in tree(patient)[:40]]) for patient in (first, second)]
        assert np.abs(ends[0] - ends[1]).mean() > 5


def flat_scan(spacing_mm: float, half_width_mm: float, **changed) -> np.ndarray:
    """Noise [X, Y, Z] in the middle of a round water phantom, HU."""
    _, scan, _ = case_with().sample()
    size = 96
    scan = dataclasses.replace(
        scan,
        shape=(size, size, 6),
        spacing_mm=(spacing_mm, spacing_mm, 3.0),
        origin_mm=(-spacing_mm * size / 2,) * 2 + (0.0,),
        table_mm=None,
        circle=False,
        **{"noise_mm": 0.55, "noise_hu": 15.0, **changed},
    )
    xs, ys, _ = scan.axes_mm
    disc = np.hypot(xs[:, None], ys[None]) < half_width_mm
    hu = np.repeat(np.where(disc, 0.0, -1000.0)[..., None], 6, axis=2).astype(np.float32)
    done = scan_volume(hu, scan, np.random.default_rng(1))
    inner = np.hypot(xs[:, None], ys[None]) < 0.6 * half_width_mm
    return np.where(inner[..., None], done, np.nan)


def lag_one(values: np.ndarray) -> float:
    """Autocorrelation of neighbours along x."""
    a, b = values[:-1].ravel(), values[1:].ravel()
    known = np.isfinite(a) & np.isfinite(b)
    return float(np.corrcoef(a[known], b[known])[0, 1])


def test_noise_has_a_length_in_mm_and_grows_with_attenuation():
    assert abs(lag_one(flat_scan(3.0, 130))) < 0.1
    assert lag_one(flat_scan(0.8, 36)) > 0.4
    thin, thick = (float(np.nanstd(flat_scan(3.0, radius))) for radius in (70, 135))
    assert thick > 1.5 * thin


def test_shoulders_streak_along_the_sideways_rays():
    _, scan, _ = case_with().sample()
    streaks = dataclasses.replace(scan.artefacts, shoulder_streaks=True)
    plain, streaked = (flat_scan(5.0, 220, artefacts=artefacts) for artefacts in (scan.artefacts, streaks))
    assert lag_one(streaked) > lag_one(plain) + 0.08
    assert lag_one(streaked) > lag_one(streaked.swapaxes(0, 1)) + 0.08


def test_breathing_steps_keep_the_truth():
    case = case_with(index=4, breathing=1.0)
    done = render(case)
    steps = done.scan.breathing
    assert len(steps.heights_mm) >= 1 and np.abs(steps.forwards_mm).max() > 0.5
    points = np.array([done.landmarks_mm[name] for name in sorted(done.landmarks_mm)])
    there = done.scan.to_atlas(done.patient, points)
    assert np.abs(done.scan.from_atlas(done.patient, there) - points).max() < 1e-3
    truth = atlas_landmarks()
    assert np.abs(there - [truth[name] for name in sorted(done.landmarks_mm)]).max() < 1e-3
    atlas_mm, _ = atlas_coordinates(case)
    voxels = np.argwhere(np.random.default_rng(0).uniform(size=done.hu.shape) < 2e-4)
    world = voxels * done.scan.spacing_mm + done.scan.origin_mm
    assert np.abs(atlas_mm[(slice(None), *voxels.T)].T - done.scan.to_atlas(done.patient, world)).max() < 1e-2


def test_metal_streaks_and_truncation_show():
    plain, metal = (render(case_with(3, "chest_abdomen_pelvis", 2.0, metal=share)) for share in (0.0, 1.0))
    assert metal.hu.max() == 3071 and metal.patient.anatomy.metal
    levels = np.flatnonzero((metal.hu > 2500).any(axis=(0, 1)))
    far = np.setdiff1d(np.arange(metal.hu.shape[2]), np.arange(levels[0] - 3, levels[-1] + 4))
    soft = (plain.hu > -200) & (plain.hu < 200) & (metal.hu < 1000)
    spread = [np.std((metal.hu - plain.hu)[:, :, part][soft[:, :, part]]) for part in (levels, far)]
    assert spread[0] > 10 and spread[0] > 5 * spread[1]
    cut = render(case_with(index=4, truncation=1.0))
    edge = cut.scan.outside_circle
    assert (cut.hu[edge] == -3024).all()
    ring = ~edge & (np.roll(edge, 2, 0) | np.roll(edge, -2, 0))
    assert (cut.hu[ring] > -300).mean() > 0.1, "the body reaches the field's edge"


def test_files_say_what_made_them_and_others_are_refused(tmp_path, monkeypatch):
    case = case_with(coarsen=5.0, no_gallbladder=1.0)
    write_case(tmp_path, case)
    path = case_files(tmp_path, case)["landmarks"]
    record = json.loads(path.read_text())
    assert record["generator"] == cases.GENERATOR == 2
    assert record["anatomy"]["has_gallbladder"] is False and record["shares"]["no_gallbladder"] == 1.0
    assert load_truth(tmp_path / "landmarks", [case.name])[case.name].patient.anatomy == case.sample()[0].anatomy
    with pytest.raises(ValueError, match="other shares"):
        write_case(tmp_path, dataclasses.replace(case, shares=Shares()))
    path.write_text(json.dumps({**record, "generator": 1}))
    with pytest.raises(ValueError, match="generator 1"):
        write_case(tmp_path, case)
    with pytest.raises(ValueError, match="generator 1"):
        load_truth(tmp_path / "landmarks", [case.name])


def test_shares_are_flags(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("scripts.make_phantom_dataset.write_dataset", lambda folder, made, *_: seen.extend(made) or 0)
    command = ["--out_dir", str(tmp_path), "--num_unlabelled", "1", "--num_labelled", "1"]
    main([*command, "--no_gallbladder", "1", "--arms_down", "0"])
    assert {case.shares for case in seen} == {Shares(no_gallbladder=1.0, arms_down=0.0)}
    with pytest.raises(ValueError, match="--metal 1.5"):
        main([*command, "--metal", "1.5"])

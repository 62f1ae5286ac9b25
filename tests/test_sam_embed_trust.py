"""Trust in matches: the truth about phantoms, judged pairs, error curves and thresholds."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from datasets.phantom.cases import PhantomCase, render, write_case
from datasets.phantom.landmarks import atlas_landmarks
from datasets.phantom.structures import (
    OTHER,
    REGIONS,
    region_of_landmark,
    regions_at,
    structure_of_landmark,
    structures_at,
)
from datasets.phantom.truth import load_truth, states_seeds
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import ANY_MM, CorrespondenceTable
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.judging.judge import Judged, judge_rows
from sam_embed.judging.trust import (
    CYCLE_GRID_MM,
    MIN_KEPT_SHARE,
    SCORE_GRID,
    SPREAD_GRID_MM,
    check_on_other_cases,
    choose_thresholds,
    error_curve,
    trust_report,
    try_thresholds,
)
from sam_embed.judging.trust_figure import save_trust_figure
from sam_embed.judging.trust_text import mined_lines
from sam_embed.network import AnatomicalEmbedder
from scripts import evaluate_matching, evaluate_pairs
from tests.phantom_facts import ORGAN_LANDMARKS
from tests.sam_fakes import compact_options, save_embedder

CASES = [PhantomCase(f"Case_{k:05d}", 3, k, False, range_name="abdomen", coarsen=4.0) for k in (1, 2, 3)]
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Three tiny phantoms on disk, and the truth drawn again from their landmark files."""
    folder = tmp_path_factory.mktemp("phantom")
    for case in CASES:
        write_case(folder, case)
    return folder, load_truth(folder / "landmarks", NAMES)


def perfect_rows(truth, num_points: int = 40, offset_mm: float = 0.0) -> np.ndarray:
    """Rows whose matches lie `offset_mm` above the truth, all cases against all others."""
    rng = np.random.default_rng(0)
    parts = []
    for query, key in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]:
        atlas = rng.uniform((-90, -40, 60), (90, 90, 220), (num_points, 3))
        rows = np.zeros(num_points, ROW_DTYPE)
        rows["query_case"], rows["key_case"] = query, key
        rows["query_mm"] = truth[NAMES[query]].from_atlas(atlas)
        rows["key_mm"] = truth[NAMES[key]].from_atlas(atlas) + [0, 0, offset_mm]
        rows["score"], rows["cycle_mm"] = rng.uniform(0.4, 1.0, num_points), rng.uniform(0, 30, num_points)
        rows["spread_mm"] = rng.uniform(0, 30, num_points)
        parts.append(rows)
    return np.concatenate(parts)


def judged_at(score, cycle_mm, error_mm, query=None, spread_mm=None) -> Judged:
    """Matches with given scores and errors, without groups; spreads are not measured unless given."""
    text = np.full(len(error_mm), "x")
    query = text if query is None else np.asarray(query)
    spread_mm = np.full(len(error_mm), np.nan) if spread_mm is None else spread_mm
    numbers = (np.asarray(values, dtype=float) for values in (score, cycle_mm, spread_mm, error_mm))
    return Judged(query, text, *numbers, text, text, np.ones(len(error_mm), dtype=bool))


def test_truth_agrees_with_landmarks_and_dense_map(phantom):
    folder, truth = phantom
    first, second = (json.loads((folder / "landmarks" / f"{name}.json").read_text()) for name in NAMES[:2])
    shared = sorted(set(first["landmarks_mm"]) & set(second["landmarks_mm"]))
    start, wanted = (np.array([part["landmarks_mm"][name] for name in shared]) for part in (first, second))
    found = truth[NAMES[1]].from_atlas(truth[NAMES[0]].to_atlas(start))
    assert len(shared) > 20 and np.abs(found - wanted).max() < 0.02
    assert np.linalg.norm(start - wanted, axis=1).mean() > 20, "the test would not notice an identity map"
    assert truth[NAMES[1]].is_scanned(found).all()
    assert not truth[NAMES[1]].is_scanned(found + [0, 0, 1000]).any()


def test_truth_refuses_what_is_no_phantom_or_another_one(phantom, tmp_path):
    folder, _ = phantom
    record = json.loads((folder / "landmarks" / f"{NAMES[0]}.json").read_text())
    path = tmp_path / f"{NAMES[0]}.json"
    path.write_text(json.dumps({**record, "seed": [99, 0, 1]}))
    with pytest.raises(ValueError, match=r"Case_00001\.json: its landmarks lie up to .* of another version"):
        load_truth(tmp_path, NAMES[:1])
    path.write_text(json.dumps({"landmarks_mm": record["landmarks_mm"]}))
    assert not states_seeds(tmp_path, NAMES[:1]) and states_seeds(folder / "landmarks", NAMES)
    with pytest.raises(ValueError, match="states no seed"):
        load_truth(tmp_path, NAMES[:1])
    with pytest.raises(ValueError, match="Case_00002"):
        load_truth(tmp_path, NAMES[1:2])


def test_every_landmark_has_structure_and_region():
    names = list(atlas_landmarks())
    assert OTHER not in {structure_of_landmark(name) for name in names}
    assert {region_of_landmark(name) for name in names} == set(REGIONS)
    wanted = {
        "right_adrenal_body": ("adrenals", "abdomen"),
        "L3_body": ("vertebrae, bodies", "abdomen"),
        "T4_spinous_tip": ("vertebrae, processes", "chest"),
        "left_rib_7_middle": ("ribs", "chest"),
        "aorta_at_T8": ("aorta", "chest"),
        "right_renal_artery_origin": ("arteries", "abdomen"),
        "liver_dome": ("liver", "abdomen"),
        "heart_apex": ("heart and pulmonary artery", "chest"),
        "left_femoral_head": ("pelvis and femora", "pelvis"),
        "gastroesophageal_junction": ("esophagus", "abdomen"),
    }
    assert {name: (structure_of_landmark(name), region_of_landmark(name)) for name in wanted} == wanted
    assert structure_of_landmark("tumour") == region_of_landmark("tumour") == OTHER


def test_structures_of_points_are_those_of_the_drawn_phantom(phantom):
    _, truth = phantom
    patient = truth[NAMES[0]].patient
    atlas = atlas_landmarks()
    named = {"liver_right_lobe": "liver", "spleen_centre": "spleen", "T9_body": "bones", "aorta_at_T12": "aorta"}
    named |= {"stomach_body": "stomach", "left_kidney_lateral_cortex": "kidneys"}
    named |= {"heart_apex": "heart, mediastinum, lung vessels"}
    assert set(named) - {"T9_body", "heart_apex"} <= set(ORGAN_LANDMARKS)
    points = np.array([atlas[name] for name in named] + [[100, 10, 300], [-150, 0, 120], [4000, 0, 100]])
    wanted = [*named.values(), "lungs and airways", "wall: muscle, fat, skin", "wall: muscle, fat, skin"]
    assert structures_at(patient, points).tolist() == wanted
    assert regions_at(np.array([[100, 10, 300], [0, 50, 100], [0, 0, -50]])).tolist() == list(REGIONS)
    case = CASES[0]
    drawn = render(case)
    index = np.argwhere(drawn.label == 1)[::7]  # the liver's voxels on the phantom's own grid
    world = index * drawn.scan.spacing_mm + drawn.scan.origin_mm
    assert (structures_at(patient, truth[case.name].to_atlas(world)) == "liver").mean() > 0.97


def test_pairs_are_judged_by_their_distance_to_the_truth(phantom):
    _, truth = phantom
    for offset_mm in (0.0, 12.0):
        judged = judge_rows(perfect_rows(truth, 10, offset_mm), NAMES, truth, show_progress=False)
        np.testing.assert_allclose(judged.error_mm, offset_mm, atol=0.01)
    assert set(judged.region) <= set(REGIONS) and len(set(judged.structure)) > 3
    assert judged.is_possible.mean() > 0.5
    shuffled = np.random.default_rng(0).permutation(60)
    again = judge_rows(perfect_rows(truth, 10, 12.0)[shuffled], NAMES, truth, show_progress=False)
    np.testing.assert_array_equal(again.structure, judged.structure[shuffled])
    np.testing.assert_array_equal(again.query, judged.query[shuffled])


def test_thresholds_are_the_best_of_the_grid():
    """Against trying every triple of thresholds one by one."""
    rng = np.random.default_rng(1)
    score, cycle_mm = rng.uniform(0.3, 1, 3000), rng.exponential(9, 3000)
    spread_mm = rng.exponential(9, 3000)
    cycle_mm[::20] = spread_mm[::30] = np.nan
    error_mm = rng.exponential(1 + 12 * (1 - score) + 0.2 * np.nan_to_num(cycle_mm) + 0.6 * np.nan_to_num(spread_mm))
    judged = judged_at(score, cycle_mm, error_mm, spread_mm=spread_mm)
    chosen = choose_thresholds(judged, 0.9)
    kept = chosen.keeps(judged)
    assert chosen.is_reached and chosen.correct >= 0.9
    assert chosen.kept == pytest.approx(kept.mean()) and chosen.correct == pytest.approx((error_mm[kept] <= 15).mean())
    assert chosen.found == pytest.approx(kept[error_mm <= 15].mean())
    tried = try_thresholds(judged, chosen.min_score, chosen.max_cycle_mm, chosen.max_spread_mm, 0.9)
    assert dataclasses.astuple(tried) == pytest.approx(dataclasses.astuple(chosen))
    most = 0.0
    for min_score in SCORE_GRID:
        for max_cycle_mm, max_spread_mm in itertools.product(CYCLE_GRID_MM, SPREAD_GRID_MM):
            mask = score >= min_score
            if max_cycle_mm < ANY_MM:
                mask &= cycle_mm <= max_cycle_mm
            if max_spread_mm < ANY_MM:
                mask &= spread_mm <= max_spread_mm
            if mask.mean() >= MIN_KEPT_SHARE and (error_mm[mask] <= 15).mean() >= 0.9:
                most = max(most, mask.mean())
    assert chosen.kept == pytest.approx(most) and chosen.max_spread_mm < 30, "the spread is what tells most here"
    assert f" --max_spread_mm {chosen.max_spread_mm:g}: " in chosen.describe()
    assert "within 15 mm, keeps" in chosen.describe() and f"--min_score {chosen.min_score:g} " in chosen.describe()


def test_unreachable_shares_and_unmeasured_cycles_are_told():
    judged = judged_at(np.linspace(0.5, 0.9, 200), np.full(200, 3.0), [5.0, 50.0] * 100)
    chosen = choose_thresholds(judged, 0.95)
    assert not chosen.is_reached and chosen.kept >= MIN_KEPT_SHARE and "cannot be reached" in chosen.describe()
    easy = choose_thresholds(judged_at([0.9] * 20, [2.0] * 20, [1.0] * 20))
    assert easy.kept == easy.correct == 1.0 and (easy.min_score, easy.max_cycle_mm) == (-1.0, 2.0)
    unmeasured = choose_thresholds(judged_at([0.9] * 20, [np.nan] * 5 + [2.0] * 15, [1.0] * 20))
    assert unmeasured.kept == 1.0 and unmeasured.max_cycle_mm == ANY_MM, "any includes what was not measured"
    assert "--max_cycle_mm 1e6 --max_spread_mm 1e6" in unmeasured.describe()
    assert try_thresholds(judged_at([0.9] * 20, [np.nan] * 5 + [2.0] * 15, [1.0] * 20), -1, 40.0, ANY_MM).kept == 0.75
    with pytest.raises(ValueError, match="no matches"):
        choose_thresholds(judged_at([], [], []))


def test_other_cases_tell_when_a_choice_does_not_carry_over():
    """Case c has confident wrong matches: thresholds chosen on a and b alone let them through."""
    query = np.repeat(["a", "b", "c"], 100)
    score = np.full(300, 0.9)
    error_mm = np.where(query == "c", 40.0, 1.0)
    found = check_on_other_cases(judged_at(score, np.ones(300), error_mm, query))
    assert found["kept"] == 1.0 and found["correct"] == pytest.approx(2 / 3)
    assert check_on_other_cases(judged_at(score[:100], np.ones(100), error_mm[:100])) == {}


def test_curves_hold_every_match_once_and_follow_the_error():
    values = np.array([0.9, 0.1, np.nan, 0.5, 0.7, 0.3])
    bins = error_curve(values, np.array([1.0, 90, 7, 40, 10, 60]), num_bins=2)
    assert [part["num_matches"] for part in bins] == [3, 2]
    assert [part["median_mm"] for part in bins] == [60, 5.5] and bins[0]["to"] == 0.5 and bins[1]["from"] == 0.7
    assert [part["share_within_15mm"] for part in bins] == [0, 1]


def test_report_is_told_and_drawn(phantom, tmp_path):
    _, truth = phantom
    report = trust_report(judge_rows(perfect_rows(truth), NAMES, truth, show_progress=False))
    json.dumps(report)
    assert len(report["by_spread_mm"]) == 12 and report["num_cases"] == 3
    assert report["thresholds"]["correct"] == 1.0 and len(report["by_score"]) == 12
    assert sum(group["num_matches"] for group in report["by_structure"].values()) == 240
    text = "\n".join(mined_lines(report))
    assert "keeps 100%" in text and "liver" in text and "chosen without a case" in text
    assert "chosen on 240 matches between 3 cases: they hold for data like these, not for others" in text
    save_trust_figure(report, "240 mined pairs", tmp_path / "new" / "trust.png")
    assert (tmp_path / "new" / "trust.png").stat().st_size > 20_000


def test_command_judges_a_table(phantom, tmp_path, capsys):
    folder, truth = phantom
    rows = perfect_rows(truth)
    rows["key_mm"][rows["score"] < 0.7] += [0, 0, 60]
    CorrespondenceTable.write(tmp_path, NAMES, rows, {"weights": "abc123"})
    command = ["--embed_dir", str(tmp_path), "--landmark_dir", str(folder / "landmarks")]
    output = tmp_path / "pairs.json"
    evaluate_pairs.main([*command, "--output", str(output), "--figure", str(tmp_path / "trust.png")])
    report = json.loads(output.read_text())
    assert 0.66 <= report["thresholds"]["min_score"] <= 0.7 and report["thresholds"]["correct"] >= 0.95
    printed = capsys.readouterr().out
    assert report["summary"] in printed and "data like these and the network abc123" in printed
    assert (tmp_path / "trust.png").exists()
    evaluate_pairs.main([*command, "--max_pairs", "50", "--output", str(output)])
    assert json.loads(output.read_text())["all"]["num_matches"] == 50
    with pytest.raises(ValueError, match="--wanted"):
        evaluate_pairs.main([*command, "--wanted", "95"])


def test_evaluation_mines_and_judges_phantoms(phantom, tmp_path, capsys):
    folder, _ = phantom
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(tmp_path / "sam.pth", network, EmbedderInfo(spacing_mm=(10.0, 10.0, 10.0)))
    command = ["--checkpoint_file", str(tmp_path / "sam.pth"), "--data_dir", str(folder / "FLARE22Unlabeled")]
    command += ["--landmark_dir", str(folder / "landmarks"), "--no_baselines", "--device", "cpu"]
    command += ["--embed_dir", str(tmp_path / "embeddings")]
    output = tmp_path / "matching.json"
    evaluate_matching.main([*command, "--num_points", "12", "--output", str(output)])
    report = json.loads(output.read_text())
    assert 0 < report["mined"]["all"]["num_matches"] <= 3 * 12 * 2  # matches in air are not mined
    assert report["landmarks"]["all"]["num_matches"] == report["num_matches"] - report["num_unmatched"]
    assert set(report["mined"]["by_region"]) <= set(REGIONS)
    assert "Mined pairs (mm):" in capsys.readouterr().out
    evaluate_matching.main([*command, "--num_points", "0", "--output", str(output)])
    assert json.loads(output.read_text())["mined"] is None

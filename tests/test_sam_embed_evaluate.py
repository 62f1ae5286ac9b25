"""Landmark evaluation and its baselines on patients with known anatomy; commands on files; pictures."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from datasets.ct.geometry import index_to_world
from datasets.ct.nifti import write_nifti
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.judging.baselines import find_body, fit_affine, match_by_affine, match_by_box
from sam_embed.judging.evaluate import errors_by_landmark, evaluate_pairs, load_landmarks, summarise
from sam_embed.judging.match_figure import draw_landmark_matches, for_display, place_on, show_plane
from sam_embed.network import AnatomicalEmbedder
from scripts import evaluate_matching, generate_sam_embeddings, show_matches
from tests.sam_fakes import (
    ATLAS_LANDMARKS_MM,
    compact_options,
    patient_embedding,
    patient_landmarks,
    patient_map,
    patient_volume,
    save_embedder,
)

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def results():
    landmarks = {f"patient{seed}": patient_landmarks(seed) for seed in SEEDS}
    bodies = {f"patient{seed}": find_body(patient_volume(seed)) for seed in SEEDS}
    embeddings = {f"patient{seed}": patient_embedding(seed) for seed in SEEDS}
    return evaluate_pairs(embeddings.__getitem__, landmarks, bodies, show_progress=False)


def test_known_anatomy_is_found(results):
    report = summarise(results)
    assert report["num_pairs"] == 6 and report["num_matches"] == 6 * len(ATLAS_LANDMARKS_MM)
    assert report["sam"]["median_mm"] < 3 and report["sam"]["share_within_10mm"] == 1.0
    # These patients are scaled and moved copies of one outline, so both baselines find them too, but for voxel size.
    assert report["body_box"]["median_mm"] < 8 and report["body_affine"]["median_mm"] < 6
    assert report["num_unmatched"] == 0 and report["cycle"]["below_20mm"]["share"] == 1.0
    json.dumps(report)
    by_landmark = errors_by_landmark(results)
    assert set(by_landmark) == set(ATLAS_LANDMARKS_MM) and by_landmark["liver"]["num_matches"] == 6


def test_landmarks_outside_are_counted_not_averaged():
    landmarks = {f"patient{seed}": {**patient_landmarks(seed), "far": np.array([0.0, 0, 5000])} for seed in (0, 1)}
    report = summarise(evaluate_pairs(lambda name: patient_embedding(int(name[-1])), landmarks, show_progress=False))
    assert report["num_unmatched"] == 2 and report["sam"]["median_mm"] < 3 and "body_box" not in report


def test_affine_fit_recovers_scale_and_shift():
    query, key = find_body(patient_volume(0)), find_body(patient_volume(1))
    affine = fit_affine(query, key)
    wanted = patient_map(1)[0] / patient_map(0)[0]
    np.testing.assert_allclose(np.diag(affine)[:3], wanted, atol=0.04)
    truth = np.array(list(patient_landmarks(1).values()))
    start = np.array(list(patient_landmarks(0).values()))
    box_error = np.linalg.norm(match_by_box(query, key, start) - truth, axis=1).mean()
    affine_error = np.linalg.norm(match_by_affine(query, key, start) - truth, axis=1).mean()
    assert affine_error < box_error < np.linalg.norm(start - truth, axis=1).mean()


def test_landmark_files_are_checked(tmp_path):
    for seed in (0, 1):
        places = {name: place.tolist() for name, place in patient_landmarks(seed).items()}
        (tmp_path / f"patient{seed}.json").write_text(json.dumps({"landmarks_mm": places}))
    loaded = load_landmarks(tmp_path, ["patient0", "patient1", "without"])
    np.testing.assert_allclose(loaded["patient1"]["spine"], patient_landmarks(1)["spine"])
    with pytest.raises(ValueError, match="1 of 1 cases"):
        load_landmarks(tmp_path, ["patient0"])
    (tmp_path / "patient0.json").write_text(json.dumps({"landmarks_mm": {"a": [1, 2]}}))
    with pytest.raises(ValueError, match=r"patient0\.json"):
        load_landmarks(tmp_path, ["patient0", "patient1"])


def test_views_show_points_where_they_are():
    """The brightest voxel is drawn at the place that `place_on` gives, patient's right on the left, head up."""
    volume = patient_volume(0)
    volume.array[12, 9, 8] = 240
    point = index_to_world(volume.affine, [12, 9, 8])
    shown = for_display(volume)
    for plane in ("axial", "coronal"):
        axes = Figure().subplots()
        show_plane(axes, shown, plane, point)
        image = axes.images[0]
        array, (left, right, bottom, top) = image.get_array(), image.get_extent()
        row, column = np.unravel_index(np.argmax(array), array.shape)
        across = left + (column + 0.5) / array.shape[1] * (right - left)
        share = (row + 0.5) / array.shape[0]
        down = bottom + share * (top - bottom) if image.origin == "lower" else top + share * (bottom - top)
        expected = place_on(shown, plane, point)
        assert abs(across - expected[0]) < 4 and abs(down - expected[1]) < 4
        assert axes.get_xlim()[0] < axes.get_xlim()[1]  # W grows to the patient's left, so right is on the left
    assert axes.get_ylim()[0] < axes.get_ylim()[1]  # coronal: D grows to the head, drawn upwards


def test_landmark_picture_is_written(results, tmp_path):
    draw_landmark_matches(patient_volume(0), patient_volume(1), results[0], tmp_path / "new" / "picture.png", 4)
    assert (tmp_path / "new" / "picture.png").stat().st_size > 20_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three patients as files, their landmarks, and an untrained network."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "landmarks").mkdir()
    for seed in SEEDS:
        volume = patient_volume(seed)
        write_nifti(folder / "images" / f"patient{seed}.nii.gz", volume.array, volume.affine)
        places = {name: place.tolist() for name, place in patient_landmarks(seed).items()}
        (folder / "landmarks" / f"patient{seed}.json").write_text(json.dumps({"landmarks_mm": places}))
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(folder / "sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    return folder


def test_commands_embed_and_evaluate(corpus, tmp_path, capsys, monkeypatch):
    common = ["--checkpoint_file", str(corpus / "sam.pth"), "--data_dir", str(corpus / "images")]
    common += ["--embed_dir", str(tmp_path / "embeddings"), "--device", "cpu"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    generate_sam_embeddings.main(common)
    assert "embedded 1 cases, 0 were there" in capsys.readouterr().out
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    generate_sam_embeddings.main(common)
    assert "embedded 2 cases, 1 were there" in capsys.readouterr().out
    output, figure = tmp_path / "matching.json", tmp_path / "trust.png"
    files = ["--landmark_dir", str(corpus / "landmarks"), "--output", str(output), "--figure", str(figure)]
    evaluate_matching.main([*common, *files])
    told, written = capsys.readouterr().out, json.loads(output.read_text())
    assert written["num_cases"] == 3 and figure.stat().st_size > 20_000
    assert written["landmarks"]["summary"] in told and "affine fit of the body: median" in told
    assert written["mined"] is None and "No mined pairs were judged" in told  # these patients are no phantoms
    for method in ("sam", "body_box", "body_affine"):
        assert set(written[method]) >= {"median_mm", "mean_mm", "p90_mm", "share_within_10mm"}


def test_command_draws_a_match(corpus, tmp_path):
    images = corpus / "images"
    command = ["--checkpoint_file", str(corpus / "sam.pth"), "--query", str(images / "patient0.nii.gz")]
    command += ["--key", str(images / "patient1.nii.gz"), "--output_dir", str(tmp_path), "--device", "cpu"]
    show_matches.main([*command, "--points", "-40,10,-550"])
    written = json.loads((tmp_path / "matches.json").read_text())["matches"]
    assert len(written) == 1 and written[0]["query_mm"] == [-40, 10, -550] and np.isfinite(written[0]["cycle_mm"])
    assert (tmp_path / "match_01.png").stat().st_size > 20_000
    for points, complaint in (("1,2", "x,y,z"), ("1,2,nan", "x,y,z"), ("0,0,9000", "outside of the patient")):
        with pytest.raises(ValueError, match=complaint):
            show_matches.main([*command, f"--points={points}"])

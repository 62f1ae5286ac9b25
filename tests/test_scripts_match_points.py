"""Points followed by the command: files of both kinds, a row for every key and point, pictures, mistakes by name."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.ct.nifti import write_nifti
from datasets.lists.points import write_markups
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.network import AnatomicalEmbedder
from scripts import match_points
from tests.sam_fakes import compact_options, patient_volume, save_embedder

pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = {"liver": [-40.0, 10.0, -550.0], "heart": [20.0, 20.0, -480.0]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two patients, points of the first in both formats, and an untrained network: it finds a scan in itself."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(2):
        volume = patient_volume(seed)
        write_nifti(folder / f"patient{seed}.nii.gz", volume.array, volume.affine)
    rows = [f"{name},{x},{y},{z}" for name, (x, y, z) in POINTS.items()]
    (folder / "points.csv").write_text("\n".join(["name,x_mm,y_mm,z_mm", *rows]) + "\n")
    write_markups(folder / "points.mrk.json", list(POINTS), np.array(list(POINTS.values())), ["", ""])
    torch.manual_seed(0)
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16)).eval()
    save_embedder(folder / "sam.pth", network, EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0)))
    return folder


def command(corpus, output, points: str = "points.csv", keys=("patient0.nii.gz", "patient1.nii.gz")) -> list[str]:
    words = ["--checkpoint_file", str(corpus / "sam.pth"), "--query", str(corpus / "patient0.nii.gz"), "--device=cpu"]
    keys = [str(corpus / key) for key in keys]
    return [*words, "--points", str(corpus / points), "--key", *keys, "--output", str(output)]


def test_a_row_for_every_key_and_point(corpus, tmp_path, capsys):
    match_points.main([*command(corpus, tmp_path / "out.csv"), "--figure", str(tmp_path / "out.png")])
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["key"], row["name"]) for row in rows] == [
        (key, name) for key in ("patient0", "patient1") for name in POINTS
    ]
    assert list(rows[0]) == list(match_points.COLUMNS)
    for row in rows[:2]:  # the query itself
        place = [float(row[column]) for column in ("x_mm", "y_mm", "z_mm")]
        np.testing.assert_allclose(place, POINTS[row["name"]], atol=4)
        assert row["verdict"] == "trusted" and float(row["score"]) > 0.95 and float(row["cycle_mm"]) < 4
    for key in ("patient0", "patient1"):
        assert min(Image.open(tmp_path / f"out_{key}.png").size) > 600
    assert json.loads((tmp_path / "out_run.json").read_text())["flags"]["min_score"] == 0.65
    assert "patient0: 2 points, 2 trusted" in capsys.readouterr().out


def test_slicers_points_in_and_out(corpus, tmp_path):
    """The same points in LPS give the same places, in LPS."""
    match_points.main(command(corpus, tmp_path / "out.csv", keys=["patient1.nii.gz"]))
    match_points.main(command(corpus, tmp_path / "one.mrk.json", "points.mrk.json", ["patient1.nii.gz"]))
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = json.loads((tmp_path / "one.mrk.json").read_text())["markups"][0]["controlPoints"]
    for row, point in zip(rows, points, strict=True):
        assert point["label"] == row["name"] and point["description"].startswith(f"{row['verdict']}, score")
        assert (point["positionStatus"] == "undefined") == (row["verdict"] == "outside")
        if row["verdict"] != "outside":
            lps = [-float(row["x_mm"]), -float(row["y_mm"]), float(row["z_mm"])]
            np.testing.assert_allclose(point["position"], lps, atol=2e-3)
    match_points.main(command(corpus, tmp_path / "many.mrk.json"))
    assert {path.name for path in tmp_path.glob("many_*.mrk.json")} == {
        "many_patient0.mrk.json",
        "many_patient1.mrk.json",
    }


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"keys": ["nobody.nii.gz"]}, "--key .*nobody.nii.gz: no such file"),
        ({"output": "out.json"}, "out.json: expected a name ending in .csv or .mrk.json"),
        (
            {"points": "beyond.csv"},
            r"beyond.csv: the point 'far' \(0, 0, 900\) does not lie in the patient of .*patient0",
        ),
        ({"output": "points.csv"}, "--output .*points.csv is the file of --points, which it would replace"),
        ({"figure": "out.jpg"}, "--figure out.jpg: expected a name ending in .png"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(changes, complaint, corpus, tmp_path):
    (corpus / "beyond.csv").write_text("name,x_mm,y_mm,z_mm\nfar,0,0,900\n")
    before = (corpus / "points.csv").read_text()
    figure = ["--figure", changes.pop("figure")] if "figure" in changes else []
    output = corpus / changes.pop("output") if changes.get("output") == "points.csv" else tmp_path / "out.csv"
    output = tmp_path / changes.pop("output", output)
    with pytest.raises(ValueError, match=complaint):
        match_points.main([*command(corpus, output, **changes), *figure])
    assert not list(tmp_path.iterdir()) and (corpus / "points.csv").read_text() == before

"""scripts/pack_sam.py: a small file of a trained SAM, and a card that says what it is."""

import json

import pytest

from sam_embed.checkpoint import EmbedderInfo, load_embedder
from sam_embed.network import AnatomicalEmbedder
from scripts.pack_sam import main
from tests.sam_fakes import compact_options, save_embedder


@pytest.fixture
def trained(tmp_path):
    """A folder as scripts/train_sam.py leaves it, and the judge's report: the command line that packs them."""
    checkpoint, listed, matching = tmp_path / "checkpoint_best.pth", tmp_path / "data.json", tmp_path / "matching.json"
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16))
    save_embedder(checkpoint, network, EmbedderInfo(spacing_mm=(4.0, 4.0, 5.0)), step=1234)
    listed.write_text(json.dumps({"training": [{}, {}, {}]}))
    run = {"flags": {"json_list": str(listed), "batch_size": 2}, "commit": "abc1234", "started": "2026-01-02"}
    run["command"] = f"scripts/train_sam.py --data_dir {tmp_path}/data --steps 1234"
    (tmp_path / "run.json").write_text(json.dumps(run))
    errors = {"num_matches": 4321, "median_mm": 3.21, "p90_mm": 12.6, "share_within_10mm": 0.874}
    matching.write_text(json.dumps({"checkpoint_file": str(checkpoint), "num_cases": 20, "sam": errors}))
    output = tmp_path / "weights" / "sam_small.safetensors"
    return ["--checkpoint_file", str(checkpoint), "--matching", str(matching), "--output", str(output)]


def test_the_card_states_data_training_errors_and_limits(trained, tmp_path, capsys):
    main([*trained, "--data_text", "scans of one hospital"])
    fingerprint = load_embedder(tmp_path / "weights" / "sam_small.safetensors")[1].fingerprint
    card = (tmp_path / "weights" / "sam_small.md").read_text()
    for fact in (
        *("# sam_small", "3 scans of one hospital", "1234 steps of 2 pair(s)", "`abc1234`", "4 x 4 x 5 mm"),
        fingerprint,
        *("20 held-out cases, 4,321 matched landmarks", "median 3.2 mm", "percentile\n  12.6 mm", "87% within 10 mm"),
        "not for clinical use",
    ):
        assert fact in card, fact
    assert str(tmp_path) not in card and "--data_dir data --steps 1234" in card
    assert fingerprint in capsys.readouterr().out


def test_a_report_about_other_weights_is_refused(trained, tmp_path):
    (tmp_path / "matching.json").write_text(json.dumps({"checkpoint_file": "other.pth", "num_cases": 2, "sam": {}}))
    with pytest.raises(ValueError, match="judges other.pth, not .*--matching"):
        main(trained)


def test_missing_records_are_named(trained, tmp_path):
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="run.json: not readable as JSON .*--checkpoint_file"):
        main(trained)
    assert not (tmp_path / "weights").exists()

"""The whole walk, small: phantom CT, list, store, SAM, embeddings, table, Alice, weights for MONAI, report."""

import importlib
import json
import re

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR

from engine.flags import REPOSITORY

SMALL_SAM = "--steps 2 --view_shape 32 32 32 --spacing_mm 8 8 8 --width 16 --embed_dim 16 --num_points 32 --val_cases 0"
SMALL_ALICE = "--config configs/smoke.yaml --pairing sam --min_score -1 --max_cycle_mm 1e6 --batch_size 1 --device cpu"


def run(module_name: str, words: str) -> None:
    importlib.import_module(module_name).main(words.split())


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder of a small quickstart, every stage run once through its entry point."""
    out = tmp_path_factory.mktemp("walk")
    lists = f"--data_dir {out}/data --json_list {out}/data.json"
    made = "--num_unlabelled 4 --num_labelled 1 --seed 3 --num_workers 1"
    run("scripts.make_phantom_dataset", f"--out_dir {out}/data {made}")
    run("scripts.create_json", f"--data_dir {out}/data --output {out}/data.json --num_validation 2")
    run("scripts.prepare_volumes", f"{lists} --store_dir {out}/store --spacing_mm 6 6 6 --num_workers 1")
    run("scripts.train_sam", f"{lists} --store_dir {out}/store --output_dir {out}/sam {SMALL_SAM}")
    sam = f"--checkpoint_file {out}/sam/checkpoint_best.pth --store_dir {out}/store"
    run("scripts.generate_sam_embeddings", f"{sam} --embed_dir {out}/embeddings")
    judged = f"--json_list {out}/data.json --sections validation --landmark_dir {out}/data/landmarks"
    run("scripts.evaluate_matching", f"{sam} {judged} --embed_dir {out}/embeddings --output {out}/matching.json")
    run("scripts.mine_pairs", f"--embed_dir {out}/embeddings --num_points 16 --num_partners 4")
    trained = f"--store_dir {out}/store --spacing_mm 6 6 6 --embed_dir {out}/embeddings --output_dir {out}/alice"
    run("main_ddp", f"{SMALL_ALICE} {lists} {trained}")
    for key in ("teacher", "student"):
        run("extract_backbone_weights", f"{out}/alice/checkpoint.pth {out}/alice_{key}.pth --checkpoint_key {key}")
    (out / "stages").mkdir()
    (out / "stages" / "all.json").write_text(json.dumps({"name": "all", "key": "0", "started": 0.0, "seconds": 1.0}))
    run("scripts.quickstart_report", f"--quickstart_dir {out}")
    return out


def test_summary_holds_every_part(walked):
    summary = json.loads((walked / "summary.json").read_text())
    assert summary["matching"]["num_cases"] == 2
    assert {"sam", "body_box", "body_affine"} <= summary["matching"].keys()
    assert all(np.isfinite(summary["losses"][when]["loss"]) for when in ("start", "end"))
    assert summary["pairs"]["num_cases"] == 3 and summary["pairs"]["num_usable_rows"] > 0
    assert summary["seconds"] == {"all": 1.0}


@pytest.mark.parametrize("name", ["matched_landmarks", "paired_crops", "reconstruction"])
def test_pictures_show_something(walked, name):
    from matplotlib.image import imread

    picture = imread(walked / f"{name}.png")
    assert picture.shape[0] > 200 and picture[..., :3].std() > 0.05


def test_report_names_methods_and_stages(walked, capsys):
    text = (walked / "report.txt").read_text()
    assert all(word in text for word in ("SAM", "body box", "affine fit", "loss_recon", "num_usable_rows"))


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_weights_load_into_monai(walked, key):
    network = SwinUNETR(in_channels=1, out_channels=14, feature_size=12)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weights = torch.load(walked / f"alice_{key}.pth", weights_only=True)
    result = network.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    wanted = ("swinViT.", "encoder") if key == "teacher" else ("swinViT.", "encoder", "decoder")
    assert not [name for name in result.missing_keys if name.startswith(wanted)]
    assert not torch.equal(before["swinViT.patch_embed.proj.weight"], network.swinViT.patch_embed.proj.weight)
    assert network(torch.zeros(1, 1, 32, 32, 64)).shape == (1, 14, 32, 32, 64)


def test_the_readme_snippet_loads_the_teacher(walked, monkeypatch):
    snippet = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL).group(1)
    monkeypatch.chdir(walked)
    names = {}
    exec(snippet, names)
    weights = torch.load("alice_teacher.pth", weights_only=True)
    loaded = names["model"].state_dict()
    assert len(weights) > 100
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())

"""The whole walk, small: phantom CT, list, store, SAM, embeddings, table, Alice, weights, finetuning, report."""

import dataclasses
import importlib
import json
import re
import subprocess
import time

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR

from datasets.phantom.cases import PhantomCase, list_cases
from engine.checkpoint import load_checkpoint
from engine.flags import REPOSITORY
from scripts.quickstart_report import PICTURES, read_stages

SMALL_SAM = "--steps 2 --view_shape 32 32 32 --spacing_mm 8 8 8 --width 16 --embed_dim 16 --num_points 32 --val_cases 0"
SMALL_ALICE = "--config configs/smoke.yaml --pairing sam --min_score -1 --max_cycle_mm 1e6 --batch_size 1 --device cpu"
SMALL_UNET = (
    "--config configs/quickstart_unet.yaml --feature_size 8 --epochs 1 --steps_per_epoch 2 --batch_size 2 "
    "--picture_freq 2"
)
SMALL_FINETUNING = (
    "--config configs/finetune_quickstart.yaml --backbone unet --feature_size 8 --roi_x 32 --roi_y 32 --roi_z 32 "
    "--spacing_mm 6 --steps 2 --warmup_steps 0 --overlap 0 --num_labelled 1 --device cpu"
)


def run(module_name: str, words: str) -> None:
    importlib.import_module(module_name).main(words.split())


def coarse_cases(*asked) -> list[PhantomCase]:
    return [dataclasses.replace(case, coarsen=2.0) for case in list_cases(*asked)]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder of a small quickstart, every stage run once through its entry point; phantoms of large voxels."""
    out = tmp_path_factory.mktemp("walk")
    lists = f"--data_dir {out}/data --json_list {out}/data.json"
    made = "--num_unlabelled 5 --num_labelled 3 --seed 3 --num_workers 1"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("scripts.make_phantom_dataset.list_cases", coarse_cases)
        run("scripts.make_phantom_dataset", f"--out_dir {out}/data {made}")
    for name, cases, number in (("data", "unlabelled", 2), ("labelled", "labelled", 1)):
        made = f"--output {out}/{name}.json --cases {cases} --num_validation {number}"
        run("scripts.create_json", f"--data_dir {out}/data {made}")
    run("scripts.prepare_volumes", f"{lists} --store_dir {out}/store --spacing_mm 6 6 6 --num_workers 1")
    run("scripts.train_sam", f"{lists} --store_dir {out}/store --output_dir {out}/sam {SMALL_SAM}")
    sam = f"--checkpoint_file {out}/sam/checkpoint_best.pth --store_dir {out}/store"
    run("scripts.generate_sam_embeddings", f"{sam} --embed_dir {out}/embeddings")
    judged = f"--json_list {out}/data.json --sections validation --landmark_dir {out}/data/landmarks"
    run("scripts.evaluate_matching", f"{sam} {judged} --embed_dir {out}/embeddings --output {out}/matching.json")
    run(
        "scripts.mine_pairs",
        f"--embed_dir {out}/embeddings --json_list {out}/data.json --num_points 16 --num_partners 4",
    )
    trained = f"--store_dir {out}/store --spacing_mm 6 6 6 --embed_dir {out}/embeddings --output_dir {out}/alice"
    run("main_ddp", f"{SMALL_ALICE} {lists} {trained}")
    for key in ("teacher", "student"):
        run("extract_backbone_weights", f"{out}/alice/checkpoint.pth {out}/alice_{key}.pth --checkpoint_key {key}")
    trained = f"--store_dir {out}/store --spacing_mm 6 --embed_dir {out}/embeddings --output_dir {out}/alice_unet"
    run("main_ddp", f"{SMALL_UNET} --device cpu --min_score -1 --max_cycle_mm 1e6 {lists} {trained}")
    extracted = f"{out}/alice_unet/checkpoint.pth {out}/alice_unet.safetensors"
    run("extract_backbone_weights", f"{extracted} --checkpoint_key student")
    finetuned = f"--data_dir {out}/data --json_list {out}/labelled.json --store_dir {out}/store {SMALL_FINETUNING}"
    remembering = f"--memory true --sam_checkpoint {out}/sam/checkpoint_best.pth"
    for fold in (0, 1):
        for name, start in (("scratch", "none"), ("alice", f"{out}/alice_unet.safetensors {remembering}")):
            to = f"--fold {fold} --output_dir {out}/finetune_{name}/{fold}"
            run("scripts.finetune_segmentation", f"{finetuned} --weights {start} {to}")
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
    assert summary["seconds"] == {"all": 1.0} and summary["total_seconds"] == 1.0
    share = summary["matching"]["mined"]["defaults"]
    said = f"--max_spread_mm 1e6: {share['correct']:.1%} of matches within 15 mm, keeps {share['kept']:.0%}"
    assert said in (walked / "report.txt").read_text()
    for run_of in summary["finetuning"].values():
        assert (run_of["steps"], run_of["num_labelled"], run_of["num_cases"]) == (2, 1, 1)
        for figure in ("dice", "nsd"):
            each = run_of["by_labelled_patient"][figure]
            assert len(each) == 2 and 0 <= min(each) <= run_of[figure] <= max(each) <= 1
            assert run_of[figure] == pytest.approx(np.mean(each))
    states = [load_checkpoint(walked / "finetune_alice" / fold / "best.pth") for fold in ("0", "1")]
    assert len({case for state in states for case in state["training_cases"]}) == 2, "each has its own labelled patient"


def test_quickstart_finetunes_twice_alike():
    """Scratch and pretrained differ in weights, memory, folder, and that loaded weights stand still at first."""
    script = (REPOSITORY / "scripts" / "quickstart.sh").read_text().replace("\\\n", " ")
    lines = [line for line in script.splitlines() if "finetune_segmentation.py" in line]
    assert len(lines) == 2
    words = [line.split("finetune_segmentation.py")[1].partition("#")[0].split() for line in lines]
    assert all(one[0] == '"${budget[@]}"' for one in words)
    assert words[0][1::2] == ["--weights", "--fold", "--output_dir"] and words[0][2] == "none"
    assert words[1][1::2] == ["--weights", "--freeze_encoder_steps", "--memory", "--fold", "--output_dir"]
    budget = re.search(r"budget=\((.*?)\)", script, flags=re.DOTALL).group(1).replace('"$out', '"OUT').replace('"', "")
    flags = importlib.import_module("scripts.finetune_segmentation").make_flags().parse_args(budget.split())
    assert flags.num_labelled == 1 and flags.val_freq == 0 and flags.class_weights == "rare"


def test_stages_side_by_side_count_once(tmp_path):
    (tmp_path / "stages").mkdir()
    for name, started, seconds in (("a", 0.0, 10.0), ("b", 2.0, 3.0), ("c", 8.0, 6.0), ("d", 100.0, 1.0)):
        record = {"name": name, "key": "0", "started": started, "seconds": seconds}
        (tmp_path / "stages" / f"{name}.json").write_text(json.dumps(record))
    seconds, total_s = read_stages(tmp_path)
    assert list(seconds) == ["a", "b", "c", "d"] and total_s == pytest.approx(14 + 1)


SIDE_BY_SIDE = """set -euo pipefail
source scripts/stage.sh
out="$1" OMP_NUM_THREADS=4
part() {
    stage "part $1" bash -c 'echo "$1 has $OMP_NUM_THREADS threads"; sleep "$2"; echo "$1 is done"; exit "$3"' - "$@"
}
side_by_side "part one $2" "part two $3"
echo "both, $OMP_NUM_THREADS threads"
"""


@pytest.mark.parametrize(
    ("one", "two", "records"),
    [("0.5 0", "0.1 0", {"part_one", "part_two"}), ("0.1 3", "30 0", set()), ("0.1 0", "0.3 3", {"part_one"})],
)
def test_stages_run_side_by_side_and_end_together(tmp_path, one, two, records):
    words = ["bash", "-c", SIDE_BY_SIDE, "stages", str(tmp_path), one, two]
    began = time.monotonic()
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert time.monotonic() - began < 25, "the other part is ended"
    assert {path.stem for path in (tmp_path / "stages").glob("*.json")} == records
    assert "one has 2 threads" in done.stdout
    if len(records) == 2:
        told = [line for line in done.stdout.splitlines() if not line.startswith("==")]
        assert done.returncode == 0, done.stderr
        assert told[-3:] == ["two has 2 threads", "two is done", "both, 4 threads"]
    else:
        assert done.returncode != 0 and "both" not in done.stdout
        assert ("two is done" in done.stderr) == two.endswith("3"), "what the other part said of its failure"


STAGES = """set -euo pipefail
source scripts/stage.sh
out="$1"
stage "train" --own "$out/run" bash -c 'ls "$1/run" > "$1/found"; touch "$1/run/checkpoint.pth"; exit "$2"' \\
    command "$out" "$2" "$out/recipe.yaml"
"""


def test_a_changed_stage_begins_anew_and_a_killed_one_goes_on(tmp_path):
    """What its command finds in its folder: nothing at first and after a change, its checkpoint after a failure."""

    def found(recipe: str, status: int = 0) -> str:
        (tmp_path / "recipe.yaml").write_text(recipe)
        (tmp_path / "found").unlink(missing_ok=True)
        words = ["bash", "-c", STAGES, "stages", str(tmp_path)]
        done = subprocess.run([*words, str(status)], cwd=REPOSITORY, capture_output=True, text=True)
        assert (done.returncode == 0) == (status == 0), done.stderr
        return (tmp_path / "found").read_text() if (tmp_path / "found").exists() else done.stdout

    assert found("steps: 1") == ""
    assert "train: reused" in found("steps: 1")
    (tmp_path / "run" / "tensorboard").mkdir()
    (tmp_path / "run" / "tensorboard" / "events").touch()
    assert found("steps: 2", status=9) == "", "emptied"
    assert found("steps: 2", status=9) == "checkpoint.pth\n", "goes on"
    assert found("steps: 1") == "", "what was done once has been emptied since"


def test_a_stage_empties_no_folder_that_it_did_not_begin(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 1")
    for begun in (None, "another stage\n1\n"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "mine.txt").touch()
        if begun:
            (tmp_path / "run" / ".stage_begun").write_text(begun)
        words = ["bash", "-c", STAGES, "stages", str(tmp_path), "0"]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
        assert (
            done.returncode != 0 and f"{tmp_path}/run holds files that the stage 'train' did not begin" in done.stderr
        )
        assert (tmp_path / "run" / "mine.txt").exists() and not (tmp_path / "stages" / "train.json").exists()


def test_quickstart_stages_that_resume_own_their_folders():
    script = (REPOSITORY / "scripts" / "quickstart.sh").read_text().replace("\\\n", " ")
    lines = [line for line in script.splitlines() if re.search(r"^\s*stage .*(train_sam|main_ddp)\.py", line)]
    owned = [re.search(r'--own ("\S+") python .*--output_dir ("\S+")', line).groups() for line in lines]
    assert len(owned) == 2 and all(own == written for own, written in owned)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_something(walked, name):
    from matplotlib.image import imread

    picture = imread(walked / f"{name}.png")
    assert picture.shape[0] > 200 and picture[..., :3].std() > 0.05


def test_report_names_methods_and_stages(walked, capsys):
    text = (walked / "report.txt").read_text()
    assert all(
        word in text
        for word in ("from scratch", "pretrained", "SAM", "body box", "affine fit", "loss_recon", "num_usable_rows")
    )


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

"""The comparison of pretrainings: a tiny one from data to figure, its jobs, its table of true pairs, its statistics."""

import dataclasses
import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from scipy.stats import ttest_1samp

from benchmarks import compare_pretraining
from benchmarks.compare_pretraining import make_flags, make_plan
from benchmarks.comparison import figure, jobs, report, results, settings, true_pairs
from benchmarks.comparison.arms import ARMS, SCRATCH, SCRATCH_OWN
from benchmarks.comparison.results import Scores, compare, verdicts
from benchmarks.comparison.stages import Plan, voxels_seen
from datasets.phantom.cases import list_cases, write_dataset
from datasets.phantom.truth import load_truth
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.pairings import PAIRINGS
from datasets.store.volumes import VolumeStore

pytestmark = pytest.mark.usefixtures("one_thread", "without_collecting")
TINY = [
    *("--preset", "smoke", "--arms", "scratch,sam,true", "--shots", "1", "--seeds", "0", "1", "--num_parallel", "0"),
    *("--num_cpus", "1", "--device", "cpu", "--pretrain_steps", "2", "--finetune_steps", "2"),
    *("--pretrain_seeds", "3", "4"),
]


def plan_of(output_dir, *more: str) -> Plan:
    return compare_pretraining.make_plan(
        compare_pretraining.make_flags().parse_args([*TINY, "--output_dir", str(output_dir), *more])
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The plan of a comparison that has been run, on phantoms of coarse voxels."""
    out = tmp_path_factory.mktemp("comparison")
    plan = plan_of(out)
    s = plan.settings
    cases = list_cases(s.num_unlabelled, s.num_labelled + s.num_test, s.data_seed)
    write_dataset(plan.phantoms, [dataclasses.replace(case, coarsen=3.0) for case in cases], 1)
    compare_pretraining.main([*TINY, "--output_dir", str(out)])
    return plan


def test_report_holds_every_arm(compared):
    folder = compared.root / "report"
    found = json.loads((folder / "comparison.json").read_text())
    assert list(found["dice"]) == ["scratch", "sam", "true"]
    for by_shots in found["dice"].values():
        dice = np.array(by_shots["1"]["by_seed_and_case"], dtype=float)
        assert dice.shape == (2, 2) and ((dice >= 0) & (dice <= 1)).all()
        assert by_shots["1"]["mean"] == pytest.approx(dice.mean())
    assert {(c["better"], c["worse"]) for c in found["comparisons"]} == {
        ("sam", "scratch"), ("true", "scratch"), ("true", "sam")
    }  # fmt: skip
    assert set(found["pretraining"]["sam"]["values"]) >= {
        "loss_tokens",
        "teacher_entropy_share",
        "held_out_loss_cls",
        "steps",
    }
    assert found["pretraining"]["true"]["values"]["pair_score"] == 1.0
    for arm in ("sam", "true"):
        assert found["pretraining"][arm]["values"]["voxels_seen"] == 2 * 2 * 2 * 32**3, "steps x pairs x crops x crop"
    assert set(found["seconds"]) == {"data", "sam", "pretrain", "probe", "finetune"}
    assert list(found["probes"]) == ["untrained", "sam", "true"]
    for by_probe in found["probes"].values():
        values = np.array([list(by_seed.values()) for by_seed in by_probe.values()])
        assert values.shape == (2, 2, 2) and ((values >= 0) & (values <= 1)).all(), "probes, pretrainings, splits"
        assert set(by_probe) == {"knn", "linear"}
    assert set(found["probes"]["sam"]["knn"]) == {"3", "4"} and found["unfinished"] == []
    text = (folder / "comparison.md").read_text()
    assert "2 pretrainings an arm;" in text
    assert all(ARMS[arm].title in text for arm in ("scratch", "sam", "true")) and "by 5 Dice points" in text
    assert (folder / "dice_over_labels.png").stat().st_size > 10_000


def test_only_the_weights_differ_between_finetunings(compared):
    differing = set()
    for seed in (0, 1):
        runs = {}
        for arm in compared.arms:
            record = json.loads((compared.evaluation(arm, 1, compared.runs[seed]).parent / "run.json").read_text())
            runs[arm] = record["flags"]
        for arm in ("sam", "true"):
            differing |= {name for name, value in runs[arm].items() if value != runs[SCRATCH][name]}
    assert differing == {"output_dir", "weights", "weights_part"}


def test_each_seed_finetunes_a_pretraining_of_its_own(compared):
    loaded, seeds = [], []
    for seed in (0, 1):
        flags = json.loads((compared.evaluation("sam", 1, compared.runs[seed]).parent / "run.json").read_text())[
            "flags"
        ]
        loaded.append(load_file(flags["weights"]))
        pretraining = json.loads((Path(flags["weights"]).parent / "run.json").read_text())["flags"]
        seeds.append(pretraining["seed"])
    assert seeds == [3, 4]
    assert any(not torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])


def test_fewer_pretrainings_than_seeds_go_round(tmp_path):
    plan = plan_of(tmp_path, "--seeds", "0", "5", "7", "--pretrain_seeds", "1", "2")
    assert plan.runs == [(1, 0, 0), (2, 5, 5), (1, 7, 7)] and plan.units == [[run] for run in plan.runs]
    assert list(plan.pretrain) == [("sam", 1), ("true", 1), ("sam", 2), ("true", 2)]
    job = plan.finetune["true", 1, plan.runs[2]]
    assert job.name == "finetune/true_1shot_seed7"
    assert job.after[-1] is plan.pretrain["true", 1] and str(plan.weights("true", 1)) in job.calls[0].words


def test_pretrainings_of_an_arm_are_told_as_their_mean():
    ends = {seed: results.PretrainingEnd({"loss": loss}, 8, ["low"] * seed) for seed, loss in ((0, 1.0), (1, 2.0))}
    assert results.mean_end(ends) == results.PretrainingEnd({"loss": 1.5}, 8, ["seed 1: low"])
    assert results.mean_end({1: ends[1]}) == ends[1]


def test_weights_of_the_whole_network_arrive(compared):
    for arm in ("sam", "true"):
        log = (compared.root / "jobs" / "finetune" / f"{arm}_1shot_seed0.log").read_text()
        assert "73 of 73 keys of the whole network loaded" in log


def test_a_second_run_does_nothing_again(compared):
    before = {path: path.read_text() for path in (compared.root / "jobs").glob("*/*.json")}
    assert len(before) == 6 + 4 + 4 + 10 + 6
    compare_pretraining.main([*TINY, "--output_dir", str(compared.root)])
    assert {path: path.read_text() for path in (compared.root / "jobs").glob("*/*.json")} == before


def test_changed_flags_change_what_depends_on_them(compared):
    records = jobs.Records(compared.root / "jobs")

    def undone(*more: str) -> set[str]:
        plan = plan_of(compared.root, *more)
        stages = ("data", "sam", "pretrain", "probe", "finetune")
        return {
            job.stage for stage in stages for batch in plan.batches(stage) for job in batch if not records.is_done(job)
        }

    assert undone() == set()
    assert undone("--finetune_workers", "3", "--pretrain_workers", "1") == set()
    assert undone("--finetune_lr", "1e-4") == {"finetune"}
    assert undone("--pretrain_flags=--teacher_temp 0.05") == {"pretrain", "probe", "finetune"}
    assert undone("--num_points", "13") == {"sam", "pretrain", "probe", "finetune"}
    assert undone("--data_seed", "8") == {"data", "sam", "pretrain", "probe", "finetune"}


def test_true_pairs_are_true(compared):
    table = CorrespondenceTable.load(compared.tables("true"))
    truths = load_truth(compared.phantoms / "landmarks", table.case_names)
    store = VolumeStore(compared.store, table.case_names)
    assert len(table) > 20
    assert (table.rows["score"] == 1).all() and (table.rows["cycle_mm"] == 0).all()
    for row in table.rows[::5]:
        query, key = (table.case_names[row[side]] for side in ("query_case", "key_case"))
        wanted = truths[key].from_atlas(truths[query].to_atlas(row["query_mm"][None].astype(float)))[0]
        assert np.linalg.norm(wanted - row["key_mm"]) < 0.01
        volume = store.read(query)
        index = np.rint(np.linalg.solve(volume.affine, [*row["query_mm"], 1.0])[:3]).astype(int)
        assert ((index >= 0) & (index < volume.shape)).all()


def test_true_pairs_send_landmarks_to_landmarks(compared):
    truths = list(load_truth(compared.phantoms / "landmarks", ["Case_00001", "Case_00002"]).values())
    records = [json.loads((compared.phantoms / "landmarks" / f"{t.name}.json").read_text()) for t in truths]
    marks = [record["landmarks_mm"] for record in records]
    shared = [name for name in marks[0] if name in marks[1]]
    rows = true_pairs.rows_of(0, truths, np.array([marks[0][name] for name in shared]), 1, seed=0, group=(0, 1))
    assert len(rows) == len(shared) > 20
    assert np.abs(rows["key_mm"] - np.array([marks[1][name] for name in shared])).max() < 0.05


# Budgets


def pretraining_flags(plan: Plan, arm: str) -> dict[str, str]:
    """The flags of an arm's pretraining as they stand on its command line; later ones win."""
    words = " ".join(plan.pretrain[arm, 0].calls[0].words)
    return dict(re.split("[ =]", flag, maxsplit=1) for flag in words.removeprefix("--").split(" --"))


def voxels_of(flags: dict[str, str]) -> int:
    numbers = {name: int(flags[name]) for name in ("roi_z", "roi_y", "roi_x", "batch_size")}
    numbers |= {"grid_bases": flags.get("grid_bases", "3 3").split(), "grid_crops": int(flags.get("grid_crops", 2))}
    numbers["grid_bases"] = [int(number) for number in numbers["grid_bases"]]
    num_steps = int(flags["epochs"]) * int(flags["steps_per_epoch"])
    return voxels_seen(numbers | {"accumulate_steps": 1, "pairing": flags["pairing"]}, num_steps)


@pytest.fixture
def whole_plan(tmp_path) -> Plan:
    return make_plan(make_flags().parse_args(["--preset", "cpu", "--output_dir", str(tmp_path)]))


def test_every_arm_sees_as_many_voxels(whole_plan):
    seen = {arm: voxels_of(pretraining_flags(whole_plan, arm)) for arm in whole_plan.pretrained_arms}
    grids = {arm: seen.pop(arm) for arm in ("voco", "voco_sam")}
    assert {"mim", "sam", "true", "simsiam_iou", "dino_iou", "caid"} <= seen.keys()
    assert set(seen.values()) == {1200 * 8 * 2 * 32**3}
    for num_voxels in grids.values():  # whole epochs of whole steps, 13 or 26 crops a sample
        assert num_voxels / (1200 * 8 * 2 * 32**3) == pytest.approx(1, abs=0.03)


def test_samples_of_more_crops_take_fewer_steps(whole_plan, monkeypatch):
    before = pretraining_flags(whole_plan, "iou")
    monkeypatch.setattr(PAIRINGS["iou"], "num_crops", lambda options: 8)
    plan = dataclasses.replace(whole_plan)
    after = pretraining_flags(plan, "iou")
    assert int(after["epochs"]) == int(before["epochs"]) / 4 and voxels_of(after) == 1200 * 8 * 2 * 32**3


def test_peers_differ_from_alice_with_iou_pairs_in_the_method_and_its_recipe(whole_plan):
    """Backbone, data, voxels and pairs are the same; flags that only Alice has are left out."""
    alice, only_alice = (
        pretraining_flags(whole_plan, "iou"),
        {"lambda1", "lambda2", "mask_block", "mask_ratio"},
    )
    for arm, method, own in (
        ("simsiam_iou", "simsiam", ("lr", "min_lr")), ("dino_iou", "dino", ()), ("caid", "caid", ("lr", "min_lr")),
    ):  # fmt: skip
        peer = pretraining_flags(whole_plan, arm)
        assert alice.keys() - peer.keys() == only_alice and not peer.keys() - alice.keys()
        assert {name for name in peer if peer[name] != alice[name]} == {"method", "output_dir", "config", *own}
        assert peer["method"] == method and peer["pairing"] == "iou" and peer["channels_last"] == "true"


def test_voco_takes_smaller_crops_of_the_same_data_and_the_arms_finetune_alike(whole_plan):
    alice, grid = pretraining_flags(whole_plan, "iou"), pretraining_flags(whole_plan, "voco")
    assert [grid[side] for side in ("roi_z", "roi_y", "roi_x")] == ["32", "16", "16"]
    assert all(grid[name] == alice[name] for name in ("store_dir", "json_list", "backbone", "feature_size"))
    assert (grid["a_min"], grid["a_max"]) == ("-125", "225"), "the window of all other arms"
    assert "correspondences.npy" in pretraining_flags(whole_plan, "voco_sam")["table_file"]
    tuned = {
        arm: job.calls[0].words
        for job in whole_plan.finetune.values()
        for arm in [job.name.split("/")[1].split("_1shot")[0]]
    }
    sides = {arm: words[words.index("--roi_x") + 1] for arm, words in tuned.items() if arm in ("iou", "voco")}
    assert sides == {"iou": "32", "voco": "32"}


# Jobs


def small_job(folder, told: str, name: str = "stage/job", **more) -> jobs.Job:
    call = jobs.Call("tests.small_entry_point", (str(folder / "out" / "file.txt"), told))
    return jobs.Job(name, (call,), folder=folder / "out", **more)


@pytest.mark.parametrize("num_parallel", [0, 2])
def test_jobs_are_done_once_and_anew_when_they_change(tmp_path, num_parallel):
    records, output = jobs.Records(tmp_path / "jobs"), tmp_path / "out" / "file.txt"
    with jobs.make_pool(num_parallel) as pool:
        jobs.run_jobs([small_job(tmp_path, "one", environment={"COLOUR": "red"})], records, 1, pool)
        first = output.read_text()
        jobs.run_jobs([small_job(tmp_path, "one")], records, 1, pool)
        assert output.read_text() == first, "done once"
        told, colour, process, start_method = first.split()
        assert start_method == multiprocessing.get_start_method(), "loading processes start as a user's do"
        assert (told, colour) == ("one", "red") and (int(process) == os.getpid()) == (num_parallel == 0)
        jobs.run_jobs([small_job(tmp_path, "two")], records, 1, pool)
        assert output.read_text().split()[:2] == ["two", "none"], "the folder was emptied, the variable is gone"
        with pytest.raises(jobs.JobError, match=r"stage/bad failed.*it was told to fail(.|\n)*told fail"):
            jobs.run_jobs([small_job(tmp_path / "bad", "fail", "stage/bad")], records, 1, pool)
    assert not records.is_done(small_job(tmp_path / "bad", "fail", "stage/bad"))
    assert "told two" in records.log(small_job(tmp_path, "two")).read_text()


def test_a_job_is_done_again_after_what_it_reads(tmp_path):
    first, second = small_job(tmp_path, "one"), small_job(tmp_path, "two")
    assert small_job(tmp_path, "x", after=(first,)).key != small_job(tmp_path, "x", after=(second,)).key


def test_a_job_is_done_again_when_a_recipe_that_it_names_changes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    keys = []
    for text in ("lr: 1", "lr: 2"):
        recipe.write_text(text)
        keys.append(jobs.Job("stage/job", (jobs.Call("main_ddp", ("--config", str(recipe))),)).key)
    assert keys[0] != keys[1]


# Statistics and flags


def scores_of(**dice) -> Scores:
    arrays = {(arm, 1): np.asarray(values, float) for arm, values in dice.items()}
    return Scores(arrays, [f"case{n}" for n in range(next(iter(arrays.values())).shape[1])], (1,), tuple(dice))


def test_comparison_is_paired_over_seeds():
    rng = np.random.default_rng(0)
    scratch = rng.uniform(0.2, 0.6, (3, 12))
    gain = 0.06 + rng.normal(0, 0.003, (3, 1)) + rng.normal(0, 0.01, (3, 12))
    found = compare(scores_of(scratch=scratch, sam=scratch + gain), "sam", "scratch", 1)
    assert found.gain == pytest.approx(gain.mean()) and found.num_won == found.num_cases == 12
    assert found.by_seed == pytest.approx(gain.mean(axis=1))
    expected = ttest_1samp(gain.mean(axis=1), 0)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p == pytest.approx(expected.pvalue) and found.p < 0.01


def test_a_luck_that_all_cases_share_is_no_gain():
    """Every case moves alike within a seed, and seeds differ: over 24 test cases a test would be sure of a gain."""
    gains = np.array([[0.2], [0.02], [-0.04]]) * np.ones((3, 24))
    found = compare(scores_of(scratch=np.full((3, 24), 0.3), sam=0.3 + gains), "sam", "scratch", 1)
    assert found.num_won == 24 and found.low < 0 < found.high and found.p > 0.3


def test_a_single_seed_is_judged_over_cases():
    gains = np.array([[0.1, 0.12, 0.08]])
    found = compare(scores_of(scratch=[[0.3] * 3], sam=0.3 + gains), "sam", "scratch", 1)
    assert 0 < found.low < 0.1 < found.high and found.p == pytest.approx(ttest_1samp(gains[0], 0).pvalue)


def test_a_job_leaves_alone_what_no_job_has_made(tmp_path):
    """An --output_dir that already holds, say, a trained SAM under the same name."""
    foreign = tmp_path / "out" / "checkpoint_best.pth"
    foreign.parent.mkdir()
    foreign.write_text("weeks of work")
    records = jobs.Records(tmp_path / "jobs")
    with pytest.raises(jobs.JobError, match="choose another --output_dir"):
        jobs.do_job(small_job(tmp_path, "one"), records, 1)
    assert foreign.read_text() == "weeks of work"


def test_numbers_of_other_flags_are_not_reported(compared):
    records, other = jobs.Records(compared.root / "jobs"), plan_of(compared.root, "--finetune_steps", "3")
    assert not results.read_dice(other, records).dice and results.read_dice(compared, records).dice
    assert report.unfinished(other, records) == ["6 of 6 finetunings"]
    nothing = plan_of(compared.root, "--finetune_steps", "3", "--data_seed", "8")
    with pytest.raises(ValueError, match="nothing has been probed or finetuned with these flags"):
        report.write_report(nothing, records, "command")


def test_scratch_has_a_second_finetuning_with_settings_of_its_own(tmp_path):
    words = ("--arms", "scratch,scratch_own,sam", "--finetune_flags=--layer_decay=0.5")
    assert plan_of(tmp_path, *words).arms == ("scratch", "sam")
    plan = plan_of(tmp_path, *words, "--scratch_flags=--layer_decay=1 --lr=0.5")
    assert plan.arms == ("scratch", SCRATCH_OWN, "sam")
    ends = {job.name.split("/")[1]: job.calls[0].words[-3:] for job in plan.finetune.values()}
    assert ends["scratch_own_1shot_seed0"] == ("--layer_decay=0.5", "--layer_decay=1", "--lr=0.5")
    assert ends["sam_1shot_seed0"][-1] == ends["scratch_1shot_seed0"][-1] == "--layer_decay=0.5"


def test_flags_of_pretrained_weights_do_not_reach_scratch(tmp_path):
    words = (
        "--arms",
        "scratch,scratch_own,mim",
        "--scratch_flags=--lr=0.5",
        "--weights_flags=--freeze_encoder_steps=7",
    )
    frozen = {
        j.name.split("/")[1]: "--freeze_encoder_steps=7" in j.calls[0].words
        for j in plan_of(tmp_path, *words).finetune.values()
    }
    assert {name.rsplit("_", 2)[0]: value for name, value in frozen.items()} == {
        **{"scratch": False, "scratch_own": False, "mim": True}
    }


def test_a_case_without_organs_counts_for_nothing():
    found = compare(scores_of(scratch=[[0.1, np.nan, 0.3]], sam=[[0.2, np.nan, 0.5]]), "sam", "scratch", 1)
    assert found.num_cases == 2 and found.gain == pytest.approx(0.15)


def test_equal_arms_have_no_p():
    found = compare(scores_of(scratch=[[0.1, 0.3]], sam=[[0.1, 0.3]]), "sam", "scratch", 1)
    assert found.gain == 0 and np.isnan(found.p) and "p –" in results.points(found)


@pytest.mark.parametrize(("gain", "word"), [(0.06, "yes"), (0.04, "NO")])
def test_verdict_on_scratch(gain, word):
    scores = scores_of(scratch=[[0.1, 0.3]], sam=[[0.1 + gain, 0.3 + gain]])
    assert f"with 1 labelled: {word}" in verdicts([compare(scores, "sam", "scratch", 1)])[0]


def test_the_figure_has_a_dotted_line_for_an_arm_with_memory():
    axes = Figure().add_subplot()
    arms = {"scratch": np.array([[0.4, 0.5]]), "mim": np.array([[0.5, 0.7]])}
    for with_memory in (False, True):
        figure.draw_arms(axes, scores_of(**arms), with_memory)
    lines = [container.lines[0] for container in axes.containers]
    assert [line.get_linestyle() for line in lines] == ["--", "-", ":", ":"]
    assert [line.get_ydata().tolist() for line in lines] == 2 * [[pytest.approx(45)], [pytest.approx(60)]]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == [ARMS[arm].title + memory for memory in ("", ", memory") for arm in arms]
    assert [line.get_color() for line in lines[:2]] == [line.get_color() for line in lines[2:]]


def test_verdict_is_on_the_better_scratch():
    scores = scores_of(scratch=[[0.1, 0.3]], scratch_own=[[0.2, 0.4]], sam=[[0.22, 0.42]])
    told = verdicts([compare(scores, "sam", scratch, 1) for scratch in ("scratch", "scratch_own")])[0]
    assert "from scratch, --scratch_flags" in told and "NO (+2.0" in told


@pytest.mark.parametrize(
    ("gains", "word"), [([0.1, 0.2], "yes"), ([-0.19, -0.2], "NO"), ([-0.3, 0.2], "within chance")]
)
def test_verdict_on_random(gains, word):
    scores = scores_of(random=[[0.4, 0.4]], sam=[[0.4 + gains[0], 0.4 + gains[1]]])
    assert f"with 1 labelled: {word}" in verdicts([compare(scores, "sam", "random", 1)])[0]


@pytest.mark.parametrize("preset", settings.PRESETS)
def test_presets_can_be_changed(preset):
    flags = compare_pretraining.make_flags().parse_args(["--output_dir", "x", "--preset", preset, "--shots", "1", "2"])
    resolved = settings.resolve(flags)
    assert resolved.shots == (1, 2) and resolved.num_test >= 2
    assert resolved.backbone == ("swin_unetr" if preset in ("gpu", "eva") else "unet")


def test_eva_trains_decoders_on_frozen_encoders_five_times(tmp_path):
    plan = make_plan(make_flags().parse_args(["--preset", "eva", "--output_dir", str(tmp_path)]))
    assert {arm for arm, _, _ in plan.finetune} == {"scratch", "scratch_own", "mim", "sam", "voco", "dense", "alice"}
    for (arm, shots, _), job in plan.finetune.items():
        assert ("--freeze_encoder_steps=-1" in job.calls[0].words) == (arm != "scratch") and shots == 15
        assert ("none" in " ".join(job.calls[0].words)) == arm.startswith("scratch")
    assert len(plan.finetune) == 7 * 5 and len({run.seed for _, _, run in plan.finetune}) == 5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shots", "99"], "expected no more than there are"),
        (["--pretrain_seeds", "0", "1", "2", "3"], "at most as many as --seeds"),
        (["--seeds", "0", "1", "0"], r"--seeds \(0, 1, 0\): expected different numbers"),
        (["--arms", "sam,nonsense"], "--arms names nonsense: expected some of scratch"),
        (["--stages", ""], "expected some of data"),
        (["--sam_checkpoint", "nowhere.pth"], "no such file"),
        (["--weights_from", "both"], "expected student or teacher"),
        (["--weights_part", "decoder"], "expected encoder or whole"),
        (["--weights_from", "teacher", "--weights_part", "whole"], "the teacher has no decoder"),
        (["--num_held_out", "64"], "two or more that are not held out"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        compare_pretraining.main(["--output_dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()

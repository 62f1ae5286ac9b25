"""The comparison's preset anatomy: its plan, intervals over pretrainings, slabs of a real CT, a tiny run of a part."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks import compare_pretraining
from benchmarks.comparison import claims, real_ct, report, settings
from benchmarks.comparison.arms import ANATOMY_ARMS, SCRATCH
from benchmarks.comparison.claims import MEMORY, REAL, Claim, dice_of, differences
from benchmarks.comparison.stages import Plan, Run
from benchmarks.labels_from_phantoms import OTHER_NAMES
from benchmarks.real_ct_matching import ABDOMEN
from datasets.ct.nifti import write_nifti
from datasets.lists.label_classes import FLARE22, LabelClasses
from datasets.phantom.cases import PhantomCase, list_cases, render, write_dataset
from engine.watch import frozen_mlp
from engine.weights import save_weights
from models.backbones import BACKBONES
from sam_embed.checkpoint import SHIPPED

pytestmark = pytest.mark.usefixtures("one_thread", "without_collecting")


def plan_of(output_dir, *more: str) -> Plan:
    words = ["--preset", "anatomy", "--output_dir", str(output_dir), "--num_cpus", "1", "--device", "cpu", *more]
    return compare_pretraining.make_plan(compare_pretraining.make_flags().parse_args(words))


def value_of(words: tuple[str, ...], flag: str) -> str | None:
    """The last value of a flag on a command line; None where it is not given."""
    places = [place for place, word in enumerate(words) if word == f"--{flag}"]
    return words[places[-1] + 1] if places else None


# The plan


def test_every_pretraining_meets_every_labelled_case(tmp_path):
    plan = plan_of(tmp_path)
    assert plan.arms == tuple(arm for arm in plan.arms if arm in ANATOMY_ARMS) and len(plan.arms) == 8
    assert [[run.fold for run in unit] for unit in plan.units] == [[0, 1, 2, 3, 4]] * 3
    assert len({run.seed for run in plan.runs}) == 15
    assert plan.runs[7] == Run(pretrain_seed=1, fold=2, seed=1002)
    probed = {(seed, fold) for arm, seed, fold in plan.probe if arm == "alice"}
    assert probed == {(seed, fold) for seed in range(5) for fold in range(5)}
    assert all("--mlp" in job.calls[0].words for job in plan.probe.values())


def test_scratch_is_finetuned_as_often_with_the_same_seeds(tmp_path):
    plan = plan_of(tmp_path)
    for run in plan.runs:
        scratch, alice = (plan.finetune[arm, 1, run] for arm in (SCRATCH, "alice"))
        for flag in ("seed", "fold", "num_labelled", "memory", "sam_checkpoint", "steps", "lr"):
            assert value_of(scratch.calls[0].words, flag) == value_of(alice.calls[0].words, flag) is not None
        assert value_of(scratch.calls[0].words, "weights") == "none"
        assert f"alice/seed{run.pretrain_seed}/" in value_of(alice.calls[0].words, "weights")


def test_sam_is_the_shipped_one_and_the_phantoms_are_fresh(tmp_path):
    plan = plan_of(tmp_path)
    assert plan.sam_file == SHIPPED and plan.train_sam == []
    assert plan.settings.data_seed == settings.TEST_SEED and settings.TEST_SEED not in settings.TUNING_SEEDS
    assert f"seed{settings.TEST_SEED}_" in plan.data.name
    assert "kept for judging" in report.about_data(settings.TEST_SEED)
    assert "recipes were chosen" in report.about_data(settings.TUNING_SEEDS[0])


def test_less_is_hidden_where_sams_vectors_are_predicted(tmp_path):
    plan = plan_of(tmp_path)
    for arm in ANATOMY_ARMS[1:]:
        given = [word for word in plan.pretrain[arm, 0].calls[0].words if word.startswith("--mask_ratio=")]
        assert given[-1] == ("--mask_ratio=0.15" if arm in ("dense", "alice", "alice_random") else "--mask_ratio=0.6")


def test_dense_reads_embeddings_but_waits_for_no_pairs(tmp_path):
    plan = plan_of(tmp_path)
    flags = {arm: plan.pretrain[arm, 0].calls[0].words for arm in ("mim", "sam", "dense", "alice", "alice_random")}
    after = {arm: [job.name for job in plan.pretrain[arm, 0].after] for arm in flags}
    assert after["dense"] == after["alice_random"] == ["data/unlabelled_store", "sam/embed0"]
    assert after["alice"] == ["data/unlabelled_store", "sam/mine0", "sam/embed0"]
    assert after["mim"] == ["data/unlabelled_store"]
    assert {arm for arm, words in flags.items() if value_of(words, "embed_dir")} == {"dense", "alice", "alice_random"}
    assert {arm for arm, words in flags.items() if value_of(words, "table_file")} == {"sam", "alice"}
    weights = {arm: [value_of(words, f"lambda{n}") for n in (1, 2, 4)] for arm, words in flags.items()}
    assert weights == {
        **{"mim": ["0", "0", None], "sam": ["0.1", "0.1", None], "dense": ["0", "0", "30"]},
        **dict.fromkeys(("alice", "alice_random"), ["0.1", "0.1", "30"]),
    }


def test_the_sam_stage_does_what_the_arms_need(tmp_path):
    def names(arms: str) -> list[list[str]]:
        return [[job.name for job in batch] for batch in plan_of(tmp_path, "--arms", arms).batches("sam")]

    assert names("scratch,mim") == [[], [], []]
    assert names("mim,dense") == [[], ["sam/embed0"], []]
    assert names("alice") == [[], ["sam/embed0"], ["sam/mine0"]]
    assert names("true") == [[], ["sam/true_pairs"], []]


def test_presets_name_their_arms_and_the_flag_overrides(tmp_path):
    assert "dense" not in plan_of(tmp_path, "--preset", "cpu").arms
    assert plan_of(tmp_path, "--arms", "alice,mim").arms == ("mim", "alice")
    with pytest.raises(ValueError, match="expected a folder with abdomen"):
        plan_of(tmp_path, "--real_ct", str(tmp_path))


# Intervals over pretrainings


def test_intervals_are_over_pretrainings_not_over_cases():
    """Labelled cases differ by 40 points, pretrainings hardly: the interval is narrow, and the reverse."""
    cases = np.array([0.1, 0.3, 0.5])
    gains = {0: 0.30, 1: 0.32, 2: 0.28}
    measured = {
        ("alice", "linear"): {seed: list(cases + gain) for seed, gain in gains.items()},
        ("mim", "linear"): {seed: list(cases) for seed in (*gains, 7)},
    }
    (found,) = differences(measured, [Claim(("alice", "linear"), ("mim", "linear"), 0.25)])
    expected = ttest_1samp(list(gains.values()), 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.30) and (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.by_pretraining == pytest.approx(gains) and found.reaches
    assert differences(measured, [Claim(("alice", "linear"), ("mim", "linear"), 0.31)])[0].reaches is False
    measured["alice", "linear"] = {seed: list(cases + 0.3 + luck) for seed, luck in zip(gains, (0.5, -0.6, 0.1))}
    assert differences(measured, [Claim(("alice", "linear"), ("mim", "linear"))])[0].low < 0


def test_a_single_pretraining_has_no_interval_and_says_so():
    measured = {("alice", "mlp"): {0: [0.5, 0.7]}, ("mim", "mlp"): {0: [0.2, 0.2]}}
    found = differences(measured)
    assert [one.mean for one in found] == pytest.approx([0.4]) and np.isnan(found[0].low)
    text = claims.claims_table(found)
    assert (
        "none: one pretraining" in text and "frozen-MLP Dice: alice − mim | +40.0" in text and "| >= 30 | yes |" in text
    )


def test_sides_of_different_measures_are_named():
    measured = {("alice", dice_of(1, True)): {0: [0.6], 1: [0.8]}, ("alice", dice_of(15)): {0: [0.7], 1: [0.8]}}
    (found,) = differences(measured)
    assert found.mean == pytest.approx(-0.05) and found.reaches is False
    assert claims.describe(found) == f"alice, 1-shot Dice{MEMORY} − alice, 15-shot Dice"
    assert "**no**" in claims.claims_table([found])


# Real CT


@pytest.mark.parametrize("num_planes", [56, 64, 40])
def test_slabs_that_teach_and_judge_are_a_patch_apart_and_take_turns(num_planes):
    found, judged = [], np.zeros(num_planes, dtype=int)
    for fold in range(real_ct.NUM_FOLDS):
        teaches, judges = real_ct.slab_parts(num_planes, fold)
        both = np.abs(np.flatnonzero(teaches)[:, None] - np.flatnonzero(judges))
        assert both.min() > real_ct.PATCH and teaches.any() and judges.any()
        parts = teaches.astype(int) - judges
        slabs = parts[np.flatnonzero(np.diff(parts, prepend=0) * parts)]  # the first plane of each
        assert (slabs[1:] == -slabs[:-1]).all()
        judged += judges
        found.append((teaches, judges))
    assert judged.max() == 1
    for (teaches, judges), (later_teaches, later_judges) in zip(found, found[2:]):  # half a period on: swapped
        assert np.array_equal(teaches, later_judges) and np.array_equal(judges, later_teaches)


def test_organs_of_one_part_alone_are_background():
    labels = np.zeros((32, 12, 12), dtype=np.uint8)
    labels[:, 2:5, 2:5], labels[0:3, 8:, 8:], labels[12, 0, 0] = 1, 2, 3
    hu = np.full(labels.shape, 40, dtype=np.int16)
    hu[:, :2] = -1000
    known = LabelClasses((0, 1, 2, 3), ("background", "liver", "spleen", "aorta"))
    fold = real_ct.make_fold(hu, labels, known, 0)
    assert fold.classes.names == ("background", "liver") and set(np.unique(fold.channels)) == {0, 1}
    for (chosen,), planes in ((fold.taught, fold.teaches), (fold.judged, fold.judges)):
        assert planes[chosen.voxels[:, 0]].all() and set(chosen.channels) == {0, 1}
        assert (hu[tuple(chosen.voxels.T)] == 40).all()
        assert (fold.channels[tuple(chosen.voxels.T)] == chosen.channels).all()


@pytest.fixture(scope="module")
def ct_dir(tmp_path_factory):
    """A phantom with the real abdomen's file names and label names."""
    folder = tmp_path_factory.mktemp("ct")
    done = render(PhantomCase("real", 5, 1, True, range_name="abdomen", coarsen=4.0))
    affine = done.affine @ np.eye(4)[:, [2, 1, 0, 3]]
    write_nifti(folder / f"{ABDOMEN}.nii.gz", done.hu.transpose(2, 1, 0).round().astype(np.int16), affine)
    write_nifti(folder / f"{ABDOMEN}_label.nii.gz", done.label.transpose(2, 1, 0), affine)
    names = {value: OTHER_NAMES.get(name, name) for value, name in enumerate(FLARE22, start=1)}
    (folder / f"{ABDOMEN}_label_names.json").write_text(json.dumps(names))
    return folder


def test_real_ct_is_probed_in_four_folds(ct_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_mlp, "STEPS", 5)
    network = BACKBONES["unet"](4, (32, 32, 32), None, False).network
    described = {
        "backbone": {"name": "unet", "feature_size": 4, "in_channels": 1},
        "preprocessing": {
            "axcodes": "SPL", "spacing_mm": [6.0] * 3, "hu_min": -125.0, "hu_max": 225.0, "roi": [32] * 3
        },
    }  # fmt: skip
    save_weights(network.state_dict(), described, tmp_path / "weights.safetensors")
    flags = [f"--weights={tmp_path}/weights.safetensors", f"--ct_dir={ct_dir}", f"--output={tmp_path}/real.json"]
    real_ct.main([*flags, "--device=cpu"])
    folds = json.loads((tmp_path / "real.json").read_text())["folds"]
    assert len(folds) == real_ct.NUM_FOLDS
    for fold in folds:
        assert all(0 <= fold[probe] <= 1 for probe in ("knn", "linear", "mlp"))
        assert set(fold["organs"]) <= set(FLARE22)
    assert any("liver" in fold["organs"] for fold in folds)


# A tiny run of a part

TINY = [
    *("--preset", "smoke", "--arms", "scratch,mim,dense", "--shots", "1", "--seeds", "0", "--num_parallel", "0"),
    *("--pretrain_steps", "2", "--finetune_steps", "2", "--crossed_pretrainings", "1", "--num_test", "1"),
    *("--memory", "true", "--probe_mlp", "true", "--num_cpus", "1", "--device", "cpu", "--num_labelled", "1"),
]


def test_a_part_is_reported_as_far_as_it_is_done(ct_dir, tmp_path, monkeypatch):
    """Probes of two arms and the finetuning of another: no number is missing, and what is missing is said."""
    monkeypatch.setattr(frozen_mlp, "STEPS", 5)
    words = [*TINY, "--output_dir", str(tmp_path), "--real_ct", str(ct_dir)]
    plan = compare_pretraining.make_plan(compare_pretraining.make_flags().parse_args(words))
    s = plan.settings
    cases = list_cases(s.num_unlabelled, s.num_labelled + s.num_test, s.data_seed)
    write_dataset(plan.phantoms, [dataclasses.replace(case, coarsen=3.0) for case in cases], 1)
    before = "data,sam,pretrain,probe,report"
    compare_pretraining.main([*words, "--arms", "mim,dense", "--stages", before])
    compare_pretraining.main([*words, "--arms", "scratch", "--stages", "finetune"])
    compare_pretraining.main([*words, "--stages", "report"])
    found = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert found["unfinished"] == ["2 of 3 finetunings"]
    assert list(found["dice"]) == list(found["dice_with_memory"]) == [SCRATCH]
    assert found["dice"] != found["dice_with_memory"], "a network of two steps finds less than carried labels"
    assert set(found["probes"]) == {"mim", "dense", "untrained"} and set(found["probes_real_ct"]) == {"mim", "dense"}
    measures = {(tuple(one["better"]), tuple(one["worse"])) for one in found["claims"]}
    wanted = {(("dense", m), ("mim", m)) for probe in ("linear", "knn", "mlp") for m in (probe, probe + REAL)}
    assert measures == wanted and all(one["low"] is None for one in found["claims"])
    text = (tmp_path / "report" / "comparison.md").read_text()
    assert "none: one pretraining" in text and "The same with the labelled cases remembered" in text

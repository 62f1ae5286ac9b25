"""The comparison's preset anatomy: its plan, intervals over pretrainings, slabs of a real CT, a tiny run of a part."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks import compare_pretraining
from benchmarks.comparison import claims, real_ct, report, settings
from benchmarks.comparison.arms import ANATOMY_ARMS, SCRATCH
from benchmarks.comparison.claims import MEMORY, Claim, dice_of, differences
from benchmarks.comparison.stages import Plan, Run
from datasets.lists.label_classes import LabelClasses
from sam_embed.checkpoint import SHIPPED

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("num_planes", [61, 64, 40])
def test_slabs_that_teach_and_judge_are_a_patch_apart_and_take_turns(num_planes):
    judged = np.zeros(num_planes, dtype=int)
    for fold in range(real_ct.NUM_FOLDS):
        teaches, judges = real_ct.slab_parts(num_planes, fold)
        both = np.abs(np.flatnonzero(teaches)[:, None] - np.flatnonzero(judges))
        assert both.min() > real_ct.PATCH and teaches.any() and judges.any()
        judged += judges
    assert (judged == 1).all()


def test_organs_of_one_part_alone_are_background():
    labels = np.zeros((32, 12, 12), dtype=np.uint8)
    labels[:, 2:5, 2:5], labels[0:8, 8:, 8:], labels[17, 0, 0] = 1, 2, 3
    hu = np.full(labels.shape, 40, dtype=np.int16)
    hu[:, :2] = -1000
    known = LabelClasses((0, 1, 2, 3), ("background", "liver", "spleen", "aorta"))
    fold = real_ct.make_fold(hu, labels, known, 0)
    assert fold.classes.names == ("background", "liver") and set(np.unique(fold.channels)) == {0, 1}
    for (chosen,), planes in ((fold.taught, fold.teaches), (fold.judged, fold.judges)):
        assert planes[chosen.voxels[:, 0]].all() and set(chosen.channels) == {0, 1}
        assert (hu[tuple(chosen.voxels.T)] == 40).all()
        assert (fold.channels[tuple(chosen.voxels.T)] == chosen.channels).all()

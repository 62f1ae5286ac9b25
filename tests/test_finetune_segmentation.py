"""scripts/finetune_segmentation.py on tiny phantoms: files, resume, weights, early stop, ranks, evaluation."""

import json
import os
import shutil
import signal
import socket

import nibabel as nib
import numpy as np
import pytest
import torch

import engine.checkpoint
import engine.segmentation.loop
import scripts.evaluate_segmentation
import scripts.finetune_segmentation as command
from datasets.ct.nifti import CTReadError
from engine.checkpoint import LATEST, PREVIOUS, CheckpointError, load_checkpoint
from engine.checks import NonFiniteLossError
from engine.distributed import World
from engine.flags import options_of
from engine.run_folder import LOCK
from engine.segmentation.evaluation import Evaluation
from engine.segmentation.flags import FinetuneOptions
from engine.segmentation.metrics import OrganScore
from engine.segmentation.segmenter import open_segmenter
from engine.signals import EXIT_INTERRUPTED
from engine.weights import save_weights
from models.segmenters import SEGMENTERS
from models.weights_file import read_weights_file
from tests.labelled_corpus import finetune_arguments, make_labelled_corpus
from tests.launched import run_ranks
from tests.tiny_run import log_of

EXPECTED_FILES = {"checkpoint.pth", "checkpoint_previous.pth", "best.pth", "log.txt", "run.json", "tensorboard", LOCK}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_labelled_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """An uninterrupted run of four steps with its evaluation."""
    output_dir = tmp_path_factory.mktemp("finished")
    command.main(finetune_arguments(corpus, output_dir))
    return output_dir


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Pretrained weights of the tiny network that describe themselves."""
    torch.manual_seed(9)
    state = SEGMENTERS["unet"].build(1, 1, 8).state_dict()
    path = tmp_path_factory.mktemp("weights") / "alice.safetensors"
    preprocessing = {"axcodes": "SPL", "spacing_mm": [4.0] * 3, "hu_min": -100.0, "hu_max": 300.0, "roi": [32] * 3}
    backbone = {"name": "unet", "feature_size": 8, "in_channels": 1}
    described = {"method": "alice", "step": 5, "backbone": backbone, "preprocessing": preprocessing}
    save_weights({k: v for k, v in state.items() if not k.startswith("out.")}, described, path)
    return path


def same(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def judged(dice: float) -> Evaluation:
    """What `evaluate` finds where one organ of one case has this Dice."""
    return Evaluation([OrganScore("case3", "liver", dice, 0.0, 1.0, 0.0)], {})


def test_a_run_leaves_what_it_should(finished, corpus):
    assert {path.name for path in finished.iterdir()} == EXPECTED_FILES | {"evaluation"}
    best = load_checkpoint(finished / "best.pth", "segmentation")
    assert best["classes"] == {"values": [0, 1, 2, 5], "names": ["background", "liver", "spleen", "aorta"]}
    assert best["preprocessing"]["spacing_mm"] == [4.0, 4.0, 4.0] and "optimizer" not in best
    assert best["training_cases"] == ["case0", "case1", "case2"] and best["validation_cases"] == ["case3", "case4"]
    assert [line["step"] for line in log_of(finished)] == [1, 2, 3, 4]
    validations = log_of(finished, "validation")
    assert [line["step"] for line in validations] == [2, 4]
    assert best["best_dice"] == max(line["dice"] for line in validations)
    assert json.loads((finished / "run.json").read_text())["flags"]["steps"] == 4


def test_evaluation_names_organs_cases_and_the_run(finished):
    folder = finished / "evaluation"
    summary = json.loads((folder / "results.json").read_text())
    assert list(summary["organs"]) == ["liver", "spleen", "aorta"] and summary["num_cases"] == 2
    assert summary["description"]["labelled training cases"] == 3 and summary["description"]["weights"] == "none"
    assert "| liver |" in (folder / "results.md").read_text()
    assert (folder / "worst_and_best.png").stat().st_size > 10_000


def test_interrupted_and_resumed_equals_uninterrupted(finished, corpus, tmp_path, monkeypatch, capfd):
    plain = engine.segmentation.loop.seed_step

    def signal_at_second_step(seed: int, step: int, rank: int) -> None:
        plain(seed, step, rank)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.segmentation.loop, "seed_step", signal_at_second_step)
    with pytest.raises(SystemExit) as ended:
        command.main(finetune_arguments(corpus, tmp_path, evaluate="false"))
    assert ended.value.code == EXIT_INTERRUPTED and load_checkpoint(tmp_path / LATEST)["step"] == 3
    monkeypatch.setattr(engine.segmentation.loop, "seed_step", plain)
    command.main(finetune_arguments(corpus, tmp_path, evaluate="false"))
    assert "resumed at step 3" in capfd.readouterr().out
    for name in (LATEST, "best.pth"):
        ours, theirs = (load_checkpoint(folder / name) for folder in (tmp_path, finished))
        for part in theirs.keys() - {"flags", "commit"}:
            assert same(ours[part], theirs[part]), (name, part)
    assert [line["loss"] for line in log_of(tmp_path)] == [line["loss"] for line in log_of(finished)]


def test_stopped_while_validating_saves_before_and_validates_again(finished, corpus, tmp_path, monkeypatch, capfd):
    """A validation may take longer than a launcher waits after its signal."""
    plain = command.stored_cases

    def signal_at_case(*given):
        assert load_checkpoint(tmp_path / LATEST)["step"] == 2, "saved before the validation"
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*given)

    monkeypatch.setattr(command, "stored_cases", signal_at_case)
    with pytest.raises(SystemExit) as ended:
        command.main(finetune_arguments(corpus, tmp_path, save_freq=100, evaluate="false"))
    assert ended.value.code == EXIT_INTERRUPTED
    assert "asked to stop: step 2 is saved" in capfd.readouterr().out
    assert log_of(tmp_path, "validation") == [] and not (tmp_path / "best.pth").exists()
    monkeypatch.setattr(command, "stored_cases", plain)
    command.main(finetune_arguments(corpus, tmp_path, save_freq=100, evaluate="false"))
    for name in (LATEST, "best.pth"):
        ours, theirs = (load_checkpoint(folder / name) for folder in (tmp_path, finished))
        for part in theirs.keys() - {"flags", "commit"}:
            assert same(ours[part], theirs[part]), (name, part)
    assert log_of(tmp_path, "validation") == log_of(finished, "validation")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_while_evaluating_is_an_interruption_and_evaluates_again(corpus, tmp_path, monkeypatch, number):
    plain, flags = command.file_cases, {"steps": 1, "val_freq": 0}

    def signalled(*given):
        os.kill(os.getpid(), number)
        return plain(*given)

    monkeypatch.setattr(command, "file_cases", signalled)
    with pytest.raises(SystemExit) as ended:
        command.main(finetune_arguments(corpus, tmp_path, **flags))
    assert ended.value.code == EXIT_INTERRUPTED and not (tmp_path / "evaluation").exists()
    monkeypatch.setattr(command, "file_cases", plain)
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    assert (tmp_path / "evaluation" / "results.md").exists()


def overflowing_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """A loss that is finite, with gradients that are not."""
    logits.register_hook(lambda gradient: gradient * float("inf"))
    return logits.mean()


def test_overflows_of_fp16_end_the_run_when_they_do_not_end(corpus, tmp_path, monkeypatch):
    """The scaler leaves such steps out: a run of them would end as complete, with the weights that it began with."""
    monkeypatch.setattr(command, "make_scaler", lambda *_: torch.amp.GradScaler("cpu"))
    monkeypatch.setattr(engine.segmentation.loop, "MAX_SKIPPED_IN_A_ROW", 3)
    monkeypatch.setattr(command, "make_dice_ce", lambda weights: overflowing_loss)
    flags = {"val_freq": 0, "evaluate": "false", "save_freq": 100}
    command.main(finetune_arguments(corpus, tmp_path / "few", steps=2, **flags))  # so many are the scaler's business
    assert all(line.keys() & {"loss", "grad_norm"} == set() for line in log_of(tmp_path / "few"))
    with pytest.raises(NonFiniteLossError, match="3 steps in a row had to be skipped.*--lr"):
        command.main(finetune_arguments(corpus, tmp_path / "many", steps=100, **flags))


def test_gradients_that_are_not_finite_stop_a_run_without_scaling(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "make_dice_ce", lambda weights: overflowing_loss)
    with pytest.raises(NonFiniteLossError, match="step 0: .*gradient norm"):
        command.main(finetune_arguments(corpus, tmp_path))


def test_layer_decay_slows_the_first_layers_down(weights, corpus, tmp_path):
    """Adam moves a weight by about its rate in the first step."""
    flags = {"weights": weights, "layer_decay": 0.1, "steps": 1, "val_freq": 0, "evaluate": "false", "weight_decay": 0}
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    given, now = read_weights_file(weights).tensors, load_checkpoint(tmp_path / "best.pth")["model"]
    rates = {group["lr"] for group in load_checkpoint(tmp_path / LATEST)["optimizer"]["param_groups"]}
    assert max(rates) == pytest.approx(5e-3) and min(rates) == pytest.approx(5e-3 * 0.1**5)
    moved = {
        name: float((now[name] - given[name]).abs().max())
        for name in ("encoder.2.conv1.conv.weight", "encoder.16.conv1.conv.weight")
    }
    assert moved["encoder.16.conv1.conv.weight"] == pytest.approx(5e-4, rel=0.05)
    assert moved["encoder.2.conv1.conv.weight"] == pytest.approx(5e-7, rel=0.2)


def test_a_last_checkpoint_that_cannot_be_written_is_no_success(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.segmentation.loop, "save_checkpoint", lambda *_: False)
    with pytest.raises(CheckpointError, match="could not be saved, and the run ends here"):
        command.main(finetune_arguments(corpus, tmp_path, steps=1))


def test_a_finished_run_is_left_as_it_is(finished, corpus, capfd):
    before = load_checkpoint(finished / LATEST)
    command.main(finetune_arguments(corpus, finished, evaluate="false"))
    assert same(before["model"], load_checkpoint(finished / LATEST)["model"])
    assert "nothing left to train: 4 of 4 steps are done" in capfd.readouterr().out


CHANGES = {
    "num_labelled": (1, "--num_labelled 0 -> 1"),
    "fold": (1, "--fold 0 -> 1"),
    "seed": (1, "--seed 0 -> 1"),
    "lr": (1e-3, "--lr 0.005 -> 0.001"),
    "layer_decay": (0.5, "--layer_decay 1.0 -> 0.5"),
    "weight_decay": (0.1, "--weight_decay 0.01 -> 0.1"),
    "class_weights": ("rare", "--class_weights none -> rare"),
    "a_max": (250, "--a_max 225 -> 250"),
    "feature_size": (16, "--feature_size 8 -> 16"),
    "steps": (3, "--steps 3, of which 4 are done"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_does_not_go_on_in_the_same_folder(name, finished, corpus):
    value, expected = CHANGES[name]
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file() and path.name != LOCK}
    with pytest.raises(CheckpointError, match="--resume none") as refused:
        command.main(finetune_arguments(corpus, finished, **{name: value}))
    assert expected in str(refused.value)
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing is written"


def test_other_weights_and_other_lists_are_refused_and_moved_ones_go_on(weights, finished, corpus, tmp_path, capfd):
    with pytest.raises(CheckpointError, match=f"--freeze_encoder_steps 0 -> 1, --weights none -> {weights}"):
        command.main(finetune_arguments(corpus, finished, weights=weights, freeze_encoder_steps=1, spacing_mm=4))
    flags = {"weights": weights, "val_freq": 1, "num_labelled": 1, "steps": 1}
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    lists = json.loads((corpus / "list.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps(lists | {"test": lists["validation"]}))
    command.main(
        finetune_arguments(corpus, tmp_path, **flags | {"weights": moved, "json_list": tmp_path / "list.json"})
    )
    assert "resumed at step 1" in capfd.readouterr().out
    summary = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert summary["description"]["weights"] == str(weights), "what best.pth was trained from"
    save_weights({"embed.conv1.conv.weight": torch.zeros(2)}, {}, moved)
    with pytest.raises(CheckpointError, match="--weights .* -> .*moved"):
        command.main(finetune_arguments(corpus, tmp_path, **flags | {"weights": moved}, backbone="unet"))
    (tmp_path / "list.json").write_text(json.dumps(lists | {"validation": lists["validation"][:1]}))
    with pytest.raises(CheckpointError, match="--json_list .* -> .*list.json"):
        command.main(finetune_arguments(corpus, tmp_path, **flags | {"json_list": tmp_path / "list.json"}))


def test_a_checkpoint_without_digests_is_compared_by_paths(finished, corpus, tmp_path):
    state = load_checkpoint(finished / LATEST)
    del state["contents"]
    torch.save(state, tmp_path / LATEST)
    command.main(finetune_arguments(corpus, tmp_path, evaluate="false"))
    elsewhere = shutil.copy(corpus / "list.json", tmp_path / "list.json")
    with pytest.raises(CheckpointError, match="--json_list"):
        command.main(finetune_arguments(corpus, tmp_path, evaluate="false", json_list=elsewhere))


def test_every_rank_goes_on_from_what_rank_0_chose(finished, monkeypatch):
    monkeypatch.setattr(engine.checkpoint, "main_decides", lambda world, decide: str(finished / PREVIOUS))
    state, path = engine.checkpoint.find_wanted("auto", finished, "segmentation", World(rank=1, size=2))
    assert path == finished / PREVIOUS and state["progress"]["judged_step"] < 4


def test_how_to_compute_does_not_come_from_the_file():
    network = torch.nn.Linear(2, 2)
    run = engine.segmentation.loop.FinetuneRun(
        network, torch.optim.AdamW(network.parameters()), torch.amp.GradScaler("cpu")
    )
    state = run.as_checkpoint()
    state["optimizer"]["param_groups"][0] |= {"fused": True, "foreach": False}
    run.restore(state, "elsewhere.pth")
    assert run.optimizer.param_groups[0]["fused"] is None and run.optimizer.param_groups[0]["foreach"] is None


def test_more_steps_go_on_with_a_warning(finished, corpus, tmp_path):
    for name in (LATEST, "best.pth"):
        shutil.copy(finished / name, tmp_path / name)
    with pytest.warns(UserWarning, match=r"goes on with: --steps 4 -> 5"):
        command.main(finetune_arguments(corpus, tmp_path, steps=5, evaluate="false", num_workers=1, save_freq=7))
    assert load_checkpoint(tmp_path / LATEST)["step"] == 5


def test_a_checkpoint_of_another_folder_leaves_a_best_one_here(finished, corpus, tmp_path, monkeypatch, capfd):
    """The best Dice so far belongs to weights that lie in the other folder, and may never be reached again."""
    command.main(finetune_arguments(corpus, tmp_path / "done", resume=finished / LATEST))
    assert load_checkpoint(tmp_path / "done" / "best.pth")["step"] == 4, "nothing left to train: the last weights"
    assert (tmp_path / "done" / "evaluation" / "results.md").exists()

    monkeypatch.setattr(command, "evaluate", lambda *_, **__: judged(0.0))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "best.pth").write_text("of another run")
    flags = {"steps": 6, "evaluate": "false", "resume": finished / LATEST}
    command.main(finetune_arguments(corpus, tmp_path / "more", **flags))
    assert load_checkpoint(tmp_path / "more" / "best.pth")["step"] == 6
    assert "the best weights are those from here on" in capfd.readouterr().out


def test_a_requeued_job_goes_on_whatever_its_first_words_were(finished, corpus, tmp_path, monkeypatch, capfd):
    """Slurm repeats the words of the first start: the file, or none, must not throw the work since away."""
    flags = {"steps": 4, "evaluate": "false"}
    for words, told in ((finished / LATEST, "which is further than --resume"), ("none", "held for its first start")):
        folder = tmp_path / str(words).replace("/", "_")
        folder.mkdir()
        if words == "none":
            shutil.copy(finished / LATEST, folder / LATEST)  # of an older run, which is not this one's start
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(command, "train", lambda *_: False)  # killed before its first checkpoint
                with pytest.raises(SystemExit):
                    command.main(finetune_arguments(corpus, folder, resume=words, **flags))
            assert not (folder / LATEST).exists() and (folder / (LATEST + ".before")).exists()
            command.main(finetune_arguments(corpus, folder, resume=words, **flags))
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            command.main(finetune_arguments(corpus, folder, resume=words, **flags))
        else:
            with pytest.warns(UserWarning, match="--steps 4 -> 5"):
                command.main(finetune_arguments(corpus, folder, resume=words, **(flags | {"steps": 5})))
            capfd.readouterr()
            command.main(finetune_arguments(corpus, folder, resume=words, **(flags | {"steps": 5})))
        assert told in capfd.readouterr().out


def test_training_learns_the_organs(corpus, tmp_path):
    flags = {"steps": 24, "val_freq": 24, "evaluate": "false", "augment": "false", "lr": 5e-2, "save_freq": 24}
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses
    assert log_of(tmp_path, "validation")[-1]["dice"] > 0.25


def test_weights_bring_their_preprocessing_and_their_encoder(weights, corpus, tmp_path, capfd):
    own = dict.fromkeys(("backbone", "feature_size", "spacing_mm", "roi_x", "roi_y", "roi_z"))
    flags = own | {"weights": weights, "steps": 1, "freeze_encoder_steps": -1, "val_freq": 0, "evaluate": "false"}
    flags |= {"num_labelled": 1, "fold": 1, "a_max": 250, "layer_decay": 0.5}
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    told = capfd.readouterr().out
    state = load_checkpoint(tmp_path / "best.pth")
    assert "warning: --a_max 250 differs from the 300 that the weights were trained with" in told
    assert "keys of the encoder loaded" in told
    assert state["preprocessing"] | {"hu_max": 300.0} == {
        "axcodes": "SPL", "spacing_mm": [4.0] * 3, "hu_min": -100.0, "hu_max": 300.0, "roi": [32] * 3
    }  # fmt: skip
    assert state["pretrained"]["method"] == "alice" and len(state["training_cases"]) == 1
    given = read_weights_file(weights).tensors
    for key, value in state["model"].items():
        if key.startswith(("embed.", "encoder.")):
            assert torch.equal(value, given[key]), f"{key} was frozen"
    torch.manual_seed(0)
    fresh = SEGMENTERS["unet"].build(1, 4, 8).state_dict()
    assert not torch.equal(state["model"]["out.conv.conv.weight"], fresh["out.conv.conv.weight"]), "the output learnt"
    assert not torch.equal(
        state["model"]["decoder.8.conv_block.conv1.conv.weight"], given["decoder.8.conv_block.conv1.conv.weight"]
    )


def test_which_network_of_the_weights_can_be_chosen(weights, corpus, tmp_path):
    given = read_weights_file(weights).tensors
    both = {f"student.{key}": value for key, value in given.items()}
    both |= {f"teacher.{key}": value + 1 for key, value in given.items()}
    torch.save(both, tmp_path / "both.pth")
    flags = finetune_arguments(corpus, tmp_path / "run", weights=tmp_path / "both.pth", checkpoint_key="teacher")
    plan = command.make_plan(options_of(command.make_flags().parse_args(flags), FinetuneOptions))
    assert plan.weights.tensors.keys() == {f"teacher.{key}" for key in given}


def test_encoder_waits_for_its_steps_and_then_moves(weights, corpus, tmp_path):
    given = read_weights_file(weights).tensors["encoder.4.conv1.conv.weight"]
    flags = {"weights": weights, "freeze_encoder_steps": 2, "val_freq": 0, "evaluate": "false"}
    for steps, is_still in ((2, True), (3, False)):
        command.main(finetune_arguments(corpus, tmp_path / str(steps), steps=steps, **flags))
        now = load_checkpoint(tmp_path / str(steps) / "best.pth")["model"]["encoder.4.conv1.conv.weight"]
        assert torch.equal(now, given) == is_still


@pytest.mark.parametrize(("freeze_encoder_steps", "is_still"), [(-1, True), (2, True), (1, False), (0, False)])
def test_a_random_encoder_may_stand_still_as_a_control(corpus, tmp_path, capfd, freeze_encoder_steps, is_still):
    flags = {"steps": 2, "val_freq": 0, "evaluate": "false", "freeze_encoder_steps": freeze_encoder_steps}
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    torch.manual_seed(0)
    fresh = SEGMENTERS["unet"].build(1, 4, 8).state_dict()
    now = load_checkpoint(tmp_path / "best.pth")["model"]
    encoder = [key for key in fresh if key.startswith(("embed.", "encoder."))]
    assert all(torch.equal(now[key], fresh[key]) for key in encoder) == is_still
    assert not torch.equal(now["out.conv.conv.weight"], fresh["out.conv.conv.weight"])
    assert ("what freezing alone does" in capfd.readouterr().out) == (freeze_encoder_steps != 0)


def test_rare_classes_weigh_more_where_asked(corpus, tmp_path, monkeypatch):
    given, flags = [], {"steps": 1, "val_freq": 0, "evaluate": "false"}
    plain = command.make_dice_ce
    monkeypatch.setattr(command, "make_dice_ce", lambda weights: given.append(weights) or plain(weights))
    command.main(finetune_arguments(corpus, tmp_path / "none", **flags))
    command.main(finetune_arguments(corpus, tmp_path / "rare", class_weights="rare", **flags))
    none, rare = given
    assert none is None
    assert rare[0] < rare[1] < rare[3], "background is most of a volume, the aorta its least"
    losses = [log_of(tmp_path / name)[0]["loss"] for name in ("none", "rare")]
    assert losses[0] != losses[1]


def test_early_stop_after_patience(corpus, tmp_path, monkeypatch, capfd):
    dice = iter([0.5, 0.4, float("nan"), 0.6])

    monkeypatch.setattr(command, "evaluate", lambda *_, **__: judged(next(dice)))
    flags = {"steps": 8, "val_freq": 1, "patience": 2, "evaluate": "false"}
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    assert "stopped early at step 3: no better Dice than 0.5000 of step 1" in capfd.readouterr().out
    assert load_checkpoint(tmp_path / "best.pth")["step"] == 1
    assert load_checkpoint(tmp_path / LATEST)["progress"]["is_stopped"]
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    assert load_checkpoint(tmp_path / LATEST)["step"] == 3, "a stopped run stays stopped"
    with pytest.warns(UserWarning, match="--patience 2 -> 3"):
        command.main(finetune_arguments(corpus, tmp_path, **flags | {"patience": 3, "steps": 4}))
    assert load_checkpoint(tmp_path / "best.pth")["step"] == 4, "more patience goes on"


def test_best_exists_even_where_no_organ_counts(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: judged(float("nan")))
    command.main(finetune_arguments(corpus, tmp_path, steps=2, val_freq=1, evaluate="false"))
    assert load_checkpoint(tmp_path / "best.pth")["step"] == 1


def test_mistakes_are_named(weights, corpus, tmp_path):
    with pytest.raises(ValueError, match="--feature_size"):
        command.main(finetune_arguments(corpus, tmp_path / "a", weights=weights, feature_size=16))
    with pytest.raises(ValueError, match="--num_labelled 9: 3 training cases"):
        command.main(finetune_arguments(corpus, tmp_path / "b", num_labelled=9))
    with pytest.raises(ValueError, match="spacing"):
        command.main(finetune_arguments(corpus, tmp_path / "c", spacing_mm=5))
    with pytest.raises(CheckpointError, match="not a checkpoint of kind 'segmentation'"):
        torch.save({"kind": "alice", "student": {}}, tmp_path / "other.pth")
        command.main(finetune_arguments(corpus, tmp_path / "d", resume=tmp_path / "other.pth"))


def one_of_two_ranks(rank: int, port: int, argv: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    command.main(argv)


@pytest.mark.slow
def test_two_ranks_train_and_judge_together(finished, corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"steps": 3, "num_val_cases": 0, "freeze_encoder_steps": 2, "clip_grad": 0, "log_freq": 1, "val_freq": 3}
    run_ranks(one_of_two_ranks, (port, finetune_arguments(corpus, tmp_path, batch_size=1, **flags)))
    assert [line["step"] for line in log_of(tmp_path, "validation")] == [3]
    summary = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert summary["num_cases"] == 2 and (tmp_path / "evaluation" / "worst_and_best.png").exists()
    # One process on the joined batch, with the encoder still for two steps and moving in the third
    command.main(finetune_arguments(corpus, tmp_path / "one", batch_size=2, evaluate="false", **flags))
    for ours, theirs in zip(log_of(tmp_path), log_of(tmp_path / "one"), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_evaluation_command_equals_the_runs_own(finished, corpus, tmp_path):
    paths = ["--data_dir", str(corpus), "--json_list", str(corpus / "list.json"), "--device", "cpu"]
    flags = ["--checkpoint_file", str(finished / "best.pth"), "--output_dir", str(tmp_path), "--overlap", "0"]
    scripts.evaluate_segmentation.main([*paths, *flags, "--save_predictions"])
    ours, theirs = ((folder / "cases.csv").read_text() for folder in (tmp_path, finished / "evaluation"))
    assert ours == theirs, "volumes from files and from the store give the same"
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["case3.nii.gz", "case4.nii.gz"]
    joined = ["--join", str(tmp_path), str(finished / "evaluation"), "--output_dir", str(tmp_path / "joined")]
    scripts.evaluate_segmentation.main(joined)
    assert json.loads((tmp_path / "joined" / "results.json").read_text())["num_runs"] == 2
    with pytest.raises(ValueError, match="--checkpoint_file"):
        scripts.evaluate_segmentation.main(["--output_dir", str(tmp_path)])


def test_a_label_beside_its_image_is_no_wrong_prediction(finished, corpus, tmp_path):
    """Its origin lost, a label would be judged elsewhere; one with other axes at the same place is fine."""
    content = json.loads((corpus / "list.json").read_text())
    first = content["validation"][0]
    label = nib.load(corpus / first["label"])
    turned = label.as_reoriented(nib.orientations.axcodes2ornt(("L", "P", "S")))
    lost = nib.Nifti1Image(np.asarray(label.dataobj), np.diag([3.0, 3.0, 4.0, 1.0]))
    paths = ["--data_dir", str(corpus), "--checkpoint_file", str(finished / "best.pth"), "--device", "cpu"]
    paths += ["--overlap", "0", "--nsd_mm", "0", "--no_pictures", "--store_dir", str(corpus / "store")]
    for name, image in (("turned", turned), ("lost", lost)):
        nib.save(image, tmp_path / f"{name}.nii.gz")
        entry = first | {"label": str(tmp_path / f"{name}.nii.gz")}
        (tmp_path / f"{name}.json").write_text(json.dumps({"training": [], "validation": [entry]}))
    flags = ["--output_dir", str(tmp_path / "out"), "--json_list"]
    scripts.evaluate_segmentation.main([*paths, *flags, str(tmp_path / "turned.json")])
    with pytest.raises(CTReadError, match=f"lost.nii.gz: label lies 100.0 mm beside its image .*{first['image']}"):
        scripts.evaluate_segmentation.main([*paths, *flags, str(tmp_path / "lost.json")])


def test_a_head_on_hypercolumns_is_kept_told_and_not_changed(weights, corpus, tmp_path, capfd):
    flags = {"weights": weights, "hypercolumns": "true", "freeze_encoder_steps": -1, "evaluate": "false", "steps": 2}
    command.main(finetune_arguments(corpus, tmp_path, **flags))
    assert "with a head on hypercolumns" in capfd.readouterr().out
    best = load_checkpoint(tmp_path / "best.pth", "segmentation")
    assert best["backbone"]["hypercolumns"] is True
    segmenter = open_segmenter(tmp_path / "best.pth", torch.device("cpu"))
    assert torch.equal(segmenter.network.hypercolumns.classes.weight, best["model"]["hypercolumns.classes.weight"])
    with pytest.raises(CheckpointError, match="--hypercolumns True -> False"):
        command.main(finetune_arguments(corpus, tmp_path, **(flags | {"hypercolumns": "false"})))
    old = load_checkpoint(tmp_path / LATEST)
    assert old["step"] == 2
    command.main(finetune_arguments(corpus, tmp_path, **(flags | {"steps": 3})))
    assert load_checkpoint(tmp_path / LATEST)["step"] == 3


def test_checkpoints_from_before_hypercolumns_have_none(finished, corpus, tmp_path):
    """Also to resume, and to go on without the flag."""
    for name in ("best.pth", LATEST):
        old = load_checkpoint(finished / name)
        del old["backbone"]["hypercolumns"], old["flags"]["hypercolumns"]
        torch.save(old, tmp_path / name)
    assert not hasattr(open_segmenter(tmp_path / "best.pth", torch.device("cpu")).network, "hypercolumns")
    command.main(finetune_arguments(corpus, tmp_path, steps=5, evaluate="false"))
    assert load_checkpoint(tmp_path / LATEST)["step"] == 5

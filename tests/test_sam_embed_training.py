"""SAM's training command: it lowers the matching error, resumes exactly, joins ranks, and says what is wrong."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from datasets.store.volumes import VolumeStore
from engine.checkpoint import load_checkpoint
from engine.distributed import World
from engine.signals import EXIT_INTERRUPTED
from models.layers.convolution import SteadyConv3d
from sam_embed.checkpoint import EmbedderInfo, load_embedder
from sam_embed.judging.evaluate import load_landmarks
from sam_embed.network import AnatomicalEmbedder
from sam_embed.training import run as training
from sam_embed.training.run import Validator, WeightAverage, share_done
from scripts import train_sam
from tests.small_torsos import write_torsos

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = {
    **{"width": 8, "embed_dim": 8, "stem_kernel": (3, 3, 3), "stem_stride": (1, 1, 1), "norm": "group"},
    **{"spacing_mm": (8, 8, 8), "view_shape": (28, 16, 24), "num_points": 64, "steps": 4, "log_freq": 1},
    **{"val_cases": 0, "fine_num_keys": 600, "joint_num_keys": 600, "device": "cpu", "precision": "fp32"},
    **{"fine_ignore_mm": 16, "joint_ignore_mm": 16, "ema_momentum": 0.9, "elastic_mm": 5},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_torsos(tmp_path_factory.mktemp("torsos"), num_training=6, num_validation=3)


def arguments(corpus: Path, output_dir: Path, **changed) -> list[str]:
    flags = {"data_dir": corpus, "json_list": corpus / "list.json", "store_dir": corpus / "store"}
    flags |= {"output_dir": output_dir, **TINY, **changed}
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def logged(output_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights(output_dir: Path, name: str = "checkpoint.pth") -> dict:
    return load_checkpoint(output_dir / name, "sam_embed")


def validated(output_dir: Path, name: str = "checkpoint.pth") -> tuple:
    state = weights(output_dir, name)
    return state["step"], state["best"], state["is_judged"]


def test_training_lowers_the_matching_error_of_held_out_cases(corpus, tmp_path):
    flags = arguments(
        corpus, tmp_path, steps=60, width=8, lr=5e-3, val_cases=3, landmark_dir=corpus / "landmarks", log_freq=10
    )
    train_sam.main(flags)
    lines = logged(tmp_path, "train")
    assert lines[-1]["loss"] < lines[0]["loss"] - 2
    trained = logged(tmp_path, "validation")[-1]
    network, info = load_embedder(tmp_path / "checkpoint_best.pth")
    assert info.spacing_mm == (8.0, 8.0, 8.0)
    assert network.options.norm == "group"
    store = VolumeStore(corpus / "store", [f"torso{i}" for i in (6, 7, 8)])
    volumes = {name: store.read(name) for name in store.names}
    validator = Validator(volumes, load_landmarks(corpus / "landmarks", store.names))
    torch.manual_seed(0)
    untrained = validator(AnatomicalEmbedder(**dataclasses.asdict(network.options)).eval(), info)
    assert trained["error_median_mm"] < 0.5 * untrained["error_median_mm"]
    assert trained["error_median_mm"] < 24  # three voxels
    again = validator(network, info)
    assert math.isclose(again["error_median_mm"], trained["error_median_mm"], rel_tol=1e-3)
    without_landmarks = Validator(volumes, None)(network, info)
    assert 0 <= without_landmarks["cycle_median_mm"] < 60
    assert json.loads((tmp_path / "run.json").read_text())["flags"]["steps"] == 60


def test_a_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path):
    train_sam.main(arguments(corpus, tmp_path / "whole", steps=4, save_freq=1))
    whole = weights(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after_second(state, output_dir, keep_as=None):
        written = original(state, output_dir, keep_as)
        if state["step"] == 2:
            raise Stop
        return written

    original = train_sam.save_checkpoint
    train_sam.save_checkpoint = stop_after_second
    try:
        with pytest.raises(Stop):
            train_sam.main(arguments(corpus, tmp_path / "parts", steps=4, save_freq=1))
    finally:
        train_sam.save_checkpoint = original
    assert weights(tmp_path / "parts")["step"] == 2
    train_sam.main(arguments(corpus, tmp_path / "parts", steps=4, save_freq=1))
    parts = weights(tmp_path / "parts")
    for key in ("state_dict", "raw_state_dict"):
        assert all(torch.equal(parts[key][name], value) for name, value in whole[key].items()), key
    losses = [[line["loss"] for line in logged(tmp_path / name, "train")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_two_processes_equal_one_with_the_joined_batch(corpus, tmp_path):
    others = {"coarse_num_other": 8, "batch_size": 1, "steps": 2, "lr": 1e-3, "clip_grad": 0}
    train_sam.main(arguments(corpus, tmp_path / "one", **{**others, "batch_size": 2}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "scripts/train_sam.py", *arguments(corpus, tmp_path / "two", **others)]
    ranks = [
        subprocess.Popen(
            command, cwd=REPOSITORY, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"}
        )
        for r in (0, 1)
    ]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    one, two = (logged(tmp_path / name, "train") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-3)


def test_training_has_no_convolution_that_is_wrong_in_half_precision_on_a_cpu():
    flags = train_sam.make_flags().parse_args(arguments(Path(), Path()))
    info = EmbedderInfo(tuple(flags.spacing_mm), flags.hu_min, flags.hu_max, flags.scale_to, flags.offset)
    run = train_sam.build_run(flags, World(), info, {})
    for network in (run.network, run.average.network):
        assert {type(part) for part in network.modules() if isinstance(part, nn.Conv3d)} == {SteadyConv3d}


def test_the_average_starts_as_a_mean_and_then_forgets():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    average = WeightAverage(network, momentum=0.5)
    torch.nn.init.ones_(network.weight)
    average.update(network, step=1)  # momentum 1 / 11
    assert math.isclose(float(average.network.weight), 10 / 11, rel_tol=1e-6)
    torch.nn.init.zeros_(network.weight)
    average.update(network, step=1000)  # momentum 0.5
    assert math.isclose(float(average.network.weight), 5 / 11, rel_tol=1e-6)
    with pytest.raises(ValueError, match="--ema_momentum"):
        WeightAverage(network, momentum=1.0)


def test_share_done_follows_steps_unless_time_runs_faster():
    assert share_done(50, 200, 1e6, 0) == 0.25
    assert share_done(50, 200, 30, 100) == 0.3
    assert share_done(50, 200, 10, 100) == 0.25
    assert share_done(250, 200, 0, 0) == 1.0


def test_a_time_limit_ends_the_run_with_a_low_learning_rate(corpus, tmp_path):
    train_sam.main(arguments(corpus, tmp_path, steps=100_000, time_limit_min=0.02, save_freq=0))
    lines = logged(tmp_path, "train")
    assert 1 <= len(lines) < 1000
    assert lines[-1]["lr"] < 1e-4 < max(line["lr"] for line in lines)
    assert weights(tmp_path)["step"] == lines[-1]["step"]


def test_a_signal_to_the_whole_group_saves_although_loading_processes_hear_it_too(corpus, tmp_path):
    """What a terminal's Ctrl-C, a job manager and `torchrun` do."""
    words = arguments(corpus, tmp_path, steps=100_000, num_workers=2, save_freq=0)
    with subprocess.Popen(
        [sys.executable, REPOSITORY / "scripts" / "train_sam.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        seen = [next(line for line in process.stdout if "step 3/" in line)]
        os.killpg(process.pid, signal.SIGTERM)
        seen += process.stdout.readlines()
    assert process.returncode == EXIT_INTERRUPTED, "".join(seen)
    assert weights(tmp_path)["step"] >= 3
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no loading process is left


def test_a_finished_store_needs_no_files(corpus, tmp_path, capsys):
    """Nor does a missing file of a held-out case switch validation off."""
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy, ignore=shutil.ignore_patterns("store"))
    (copy / "torso7.nii.gz").unlink()
    flags = {"steps": 1, "val_cases": 3, "landmark_dir": copy / "landmarks"}
    train_sam.main(arguments(copy, tmp_path / "one", **flags))
    printed = capsys.readouterr()
    assert "2 cases to validate with, by landmarks" in printed.out
    assert "left out: torso7" in printed.out and "No such file" in printed.out
    for path in copy.glob("*.nii.gz"):
        path.unlink()
    train_sam.main(arguments(copy, tmp_path / "two", **flags))
    assert logged(tmp_path / "one", "validation") == logged(tmp_path / "two", "validation") != []
    train_sam.main(arguments(copy, tmp_path / "three", **flags | {"val_cases": 2}))
    told = "no validation: it matches pairs of cases, and 1 can be used of the first 2 .* 3 validation cases"
    assert re.search(told, capsys.readouterr().out)
    (copy / "list.json").write_text(json.dumps({"training": [{"image": "gone.nii.gz"}]}))
    with pytest.raises(ValueError, match="none of its 1 training cases could be read.*--data_dir"):
        train_sam.main(arguments(copy, tmp_path / "four", **flags))


def test_a_failed_validation_loses_nothing_and_is_done_when_resuming(corpus, tmp_path):
    flags = {"steps": 2, "val_cases": 2, "val_freq": 1, "save_freq": 0}
    with pytest.raises(ValueError, match="--memory_mb"):
        train_sam.main(arguments(corpus, tmp_path / "parts", memory_mb=0.01, **flags))
    assert weights(tmp_path / "parts")["step"] == 1 and not (tmp_path / "parts" / train_sam.BEST).exists()
    with pytest.raises(ValueError, match="--memory_mb"):
        train_sam.main(arguments(corpus, tmp_path / "parts", memory_mb=0.01, **flags))
    train_sam.main(arguments(corpus, tmp_path / "parts", **flags))
    train_sam.main(arguments(corpus, tmp_path / "whole", **flags))
    judged = [logged(tmp_path / name, "validation") for name in ("parts", "whole")]
    assert [line["step"] for line in judged[0]] == [1, 2] and judged[0] == judged[1]
    for name in ("checkpoint.pth", train_sam.BEST):
        assert validated(tmp_path / "parts", name) == validated(tmp_path / "whole", name)
    train_sam.main(arguments(corpus, tmp_path / "parts", **flags))  # complete: nothing is left to judge
    assert logged(tmp_path / "parts", "validation") == judged[0]


def test_a_validation_that_failed_at_the_end_does_not_forget_the_best(corpus, tmp_path, monkeypatch):
    """Errors of steps 1, 2 and 3 are 5, 9 and (after a failure) 7: the first weights stay the best ones."""
    errors = iter([5.0, 9.0, MemoryError(), 7.0])

    def measure(validator, network, info):
        error = next(errors)
        if isinstance(error, MemoryError):
            raise error
        return {"cycle_median_mm": error, "cycle_p90_mm": 0.0}

    monkeypatch.setattr(training.Validator, "__call__", measure)
    flags = {"steps": 3, "val_cases": 2, "val_freq": 1, "save_freq": 0}
    with pytest.raises(MemoryError):
        train_sam.main(arguments(corpus, tmp_path, **flags))
    assert validated(tmp_path) == (3, 5.0, False)
    train_sam.main(arguments(corpus, tmp_path, **flags))
    assert validated(tmp_path) == (3, 5.0, True)
    assert validated(tmp_path, train_sam.BEST) == (1, 5.0, True)


@pytest.mark.parametrize(
    "changed, word",
    [
        ({"fine_weight": 0, "joint_weight": 0, "coarse_weight": 0}, "weight 0"),
        ({"view_shape": (4, 4, 4)}, "shape"),
        ({"landmark_dir": "nowhere", "val_cases": 3}, "nowhere"),
        ({"resume": "missing.pth"}, "no such checkpoint"),
        ({"json_list": "missing.json"}, "missing.json"),
    ],
)
def test_mistakes_are_named(corpus, tmp_path, changed, word):
    with pytest.raises(ValueError, match=word):
        train_sam.main(arguments(corpus, tmp_path, **changed))


def test_a_requeued_job_goes_on_whatever_its_first_words_were(corpus, tmp_path, monkeypatch, capsys):
    train_sam.main(arguments(corpus, tmp_path / "first", steps=1))
    given = tmp_path / "first" / "checkpoint.pth"
    for steps in (2, 3):
        train_sam.main(arguments(corpus, tmp_path / "run", steps=steps, resume=given))
    assert f"resumed at step 2 from {tmp_path / 'run' / 'checkpoint.pth'}, which is further" in capsys.readouterr().out
    train_sam.main(arguments(corpus, tmp_path / "run", steps=1, resume="none"))
    assert weights(tmp_path / "run")["step"] == 1 and (tmp_path / "run" / "checkpoint.pth.before").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train_sam.main(arguments(corpus, tmp_path / "run", steps=2, resume="none"))
    assert "resumed at step 1" in capsys.readouterr().out


def test_a_run_of_another_network_is_not_resumed(corpus, tmp_path):
    train_sam.main(arguments(corpus, tmp_path, steps=1))
    with pytest.raises(ValueError, match="--resume none"):
        train_sam.main(arguments(corpus, tmp_path, steps=2, width=16))


def test_published_configuration_describes_the_published_network():
    config = REPOSITORY / "configs" / "sam_published.yaml"
    flags = train_sam.make_flags().parse_args(
        [f"--config={config}", "--data_dir=d", "--json_list=j", "--store_dir=s", "--output_dir=o"]
    )
    names = ("width", "embed_dim", "stem_kernel", "stem_stride", "pool_stride", "stage_strides", "stage_kernel_depths")
    assert AnatomicalEmbedder(**{name: getattr(flags, name) for name in names}, norm=flags.norm).options == (
        AnatomicalEmbedder().options
    )
    assert train_sam.view_options(flags).shape == (32, 96, 96)
    info = EmbedderInfo(tuple(flags.spacing_mm), flags.hu_min, flags.hu_max, flags.scale_to, flags.offset)
    assert info == EmbedderInfo()


@pytest.mark.parametrize("weights", [{"fine_weight": 0, "joint_weight": 0}, {"coarse_weight": -1}])
def test_weights_that_leave_an_output_untrained_are_refused(corpus, tmp_path, weights):
    with pytest.raises(ValueError, match="--joint_weight"):
        train_sam.main(arguments(corpus, tmp_path / "out", **weights))

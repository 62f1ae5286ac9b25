"""Every command that computes, on a device that is not the CPU: nothing stays behind on the CPU on the way.

The device is `tests.other_device`. In fp32 its runs must equal the CPU's up to rounding; in bf16 and fp16 the casts are
those of CUDA's autocast, which CPUs do not make.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datasets.samples.correspondences import CorrespondenceTable
from engine.checkpoint import LATEST, load_checkpoint
from engine.flags import REPOSITORY
from tests.labelled_corpus import finetune_arguments, make_stored_corpus
from tests.launched import WEIGHTS, flat, smallest
from tests.other_device import SET_UP, autocast_lists
from tests.small_torsos import write_torsos
from tests.test_sam_embed_training import arguments as sam_arguments
from tests.tiny_run import add_store_and_table, log_of, make_corpus

pytestmark = pytest.mark.skipif(SET_UP is None, reason="this PyTorch knows no devices written in Python (2.9 does)")
DEVICES = ("cpu", "cuda")  # `tests.other_device` takes its own for cuda
EVERYTHING = {"epochs": 2, "val_freq": 1, "num_val_pairs": 2, "picture_freq": 4, "keep_freq": 1, "accumulate_steps": 2}
WITHOUT_PICTURES = EVERYTHING | {"picture_freq": 0}


def run_all(runs: list[tuple[str, list]], folder: Path) -> None:
    """Runs of entry points, in a process of its own with one thread."""
    (folder / "runs.json").write_text(json.dumps([(module, [str(word) for word in words]) for module, words in runs]))
    words = [sys.executable, "-m", "tests.other_device", str(folder / "runs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """Every command, on both devices; the folder of their folders. One process, as most of the time goes to imports."""
    out = tmp_path_factory.mktemp("ran")
    make_stored_corpus(out / "labelled")
    write_torsos(out / "torsos", num_training=3, num_validation=2)
    run_all([*pretraining(out), *finetuning(out), *matching(out), *in_half_precision(out)], out)
    return out


def pretraining(out: Path) -> list[tuple[str, list]]:
    """Alice on both devices, with all that a run may do; once going on elsewhere; its student's weights."""
    corpus, labelled = add_store_and_table(make_corpus(out)), out / "labelled"
    probed = {"data_dir": labelled, "json_list": labelled / "list.json", "store_dir": labelled / "store"}
    probed |= {"pairing": "random", "roi_x": 32, "probe_freq": 2, "probe_voxels": 5, "epochs": 2}
    runs = []
    for device in DEVICES:
        for centring in ("mean", "sinkhorn"):
            pictures = EVERYTHING if centring == "mean" else WITHOUT_PICTURES
            words = smallest(corpus, out / f"{centring}_{device}", device=device, centring=centring, **pictures)
            runs.append(("main_ddp", words))
        runs.append(("main_ddp", smallest(labelled, out / f"probed_{device}", device=device, **probed)))
    resumed = {"device": "cuda", "resume": out / "mean_cpu" / "checkpoint0001.pth"}
    runs.append(("main_ddp", smallest(corpus, out / "resumed", **WITHOUT_PICTURES, **resumed)))
    extracted = [out / "probed_cpu" / LATEST, out / "student.safetensors", "--checkpoint_key=student"]
    return [*runs, ("extract_backbone_weights", extracted)]


def finetuning(out: Path) -> list[tuple[str, list]]:
    """Probes, features, finetuning with its evaluation, and a prediction."""
    labelled, weights = out / "labelled", out / "student.safetensors"
    listed = [f"--data_dir={labelled}", f"--json_list={labelled / 'list.json'}", f"--store_dir={labelled / 'store'}"]
    changed = {"weights": weights, "feature_size": None, "spacing_mm": None, "freeze_encoder_steps": 2}
    changed |= {"layer_decay": 0.8, "roi_x": None, "roi_y": None, "roi_z": None, "backbone": None}
    runs = []
    for device in DEVICES:
        on, finetuned = f"--device={device}", out / f"finetuned_{device}"
        probe = [f"--weights={weights}", *listed, f"--output={out}/probe_{device}.json", "--num_voxels=5", on]
        runs.append(("scripts.probe_features", probe))
        features = [f"--weights={weights}", *listed, f"--output_dir={out}/features_{device}", "--overlap=0", on]
        runs.append(("scripts.extract_features", features))
        words = finetune_arguments(labelled, finetuned, **(changed | {"device": device}))
        runs.append(("scripts.finetune_segmentation", words))
        found = [labelled / "images" / "case3_0000.nii.gz", out / f"{device}.nii.gz", on]
        runs.append(("scripts.predict", [*found, f"--checkpoint_file={finetuned / LATEST}"]))
    return runs


def matching(out: Path) -> list[tuple[str, list]]:
    """SAM: training with validation, embeddings, pairs."""
    corpus, runs = out / "torsos", []
    for device in DEVICES:
        on, embeddings = f"--device={device}", f"--embed_dir={out}/embeddings_{device}"
        changed = {"device": device, "val_cases": 2, "val_freq": 4, "landmark_dir": corpus / "landmarks"}
        runs.append(("scripts.train_sam", sam_arguments(corpus, out / f"sam_{device}", **changed)))
        sam = [f"--checkpoint_file={out}/sam_cpu/{LATEST}", f"--store_dir={corpus}/store", on]
        runs.append(("scripts.generate_sam_embeddings", [*sam, embeddings]))
        mined = ["--num_points=16", "--num_partners=2", f"--json_list={corpus}/list.json", embeddings, on]
        runs.append(("scripts.mine_pairs", mined))
    return runs


def in_half_precision(out: Path) -> list[tuple[str, list]]:
    """All three trainings in bf16 and fp16, and a SwinUNETR."""
    swin = {"backbone": "swin_unetr", "feature_size": 12, "roi_z": 64, "roi_x": 32}
    swin |= {"batch_size": 1, "steps_per_epoch": 1, "epochs": 1}
    runs = [("main_ddp", smallest(out, out / "swin_bf16", precision="bf16", device="cuda", **swin))]
    for precision in ("bf16", "fp16"):
        half = {"device": "cuda", "precision": precision}
        runs.append(("main_ddp", smallest(out, out / f"alice_{precision}", **WITHOUT_PICTURES, **half)))
        words = finetune_arguments(out / "labelled", out / f"finetuned_{precision}", **half)
        runs.append(("scripts.finetune_segmentation", words))
        runs.append(("scripts.train_sam", sam_arguments(out / "torsos", out / f"sam_{precision}", **half)))
    return runs


def assert_close(one: Path, other: Path, parts: tuple[str, ...], atol: float = 2e-5) -> None:
    """The parts of two runs' latest checkpoints differ by rounding at most.

    AdamW turns the rounding of gradients near 0 into steps of up to the learning rate: `atol` allows for that.
    """
    ours, theirs = (load_checkpoint(folder / LATEST) for folder in (one, other))
    assert ours["step"] == theirs["step"]
    for part in parts:
        flat_ours, flat_theirs = flat(ours[part]), flat(theirs[part])
        assert flat_ours.keys() == flat_theirs.keys()
        for name, value in flat_ours.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(value, flat_theirs[name], rtol=1e-3, atol=atol, msg=f"{part}{name}")


def losses(folder: Path, kind: str = "train") -> list[float]:
    return [line["loss"] for line in log_of(folder, kind)]


@pytest.mark.parametrize(("name", "atol"), [("mean", 2e-5), ("sinkhorn", 2e-5), ("probed", 5e-4)])
def test_pretraining_equals_the_cpus(ran, name, atol):
    """The labelled cases have more gradients near 0: weights by 2e-4 apart at a rate of 1e-3, teachers by 4e-8."""
    one, other = (ran / f"{name}_{device}" for device in DEVICES)
    assert_close(one, other, ("student",), atol)
    assert_close(one, other, tuple(part for part in WEIGHTS if part != "student"))
    assert losses(other) == pytest.approx(losses(one), rel=1e-5) and len(losses(one)) == 4
    assert losses(other, "validation") == pytest.approx(losses(one, "validation"), rel=1e-5)


def test_a_checkpoint_of_the_cpu_goes_on_elsewhere(ran):
    assert_close(ran / "mean_cpu", ran / "resumed", WEIGHTS)


def test_probes_while_pretraining_equal_the_cpus(ran):
    told = [log_of(ran / f"probed_{device}", "probe") for device in DEVICES]
    assert [line["step"] for line in told[0]] == [0, 4]
    for ours, theirs in zip(*told):
        names = [name for name in ours if name.startswith("probe_")]
        assert len(names) == 4 and all(theirs[name] == pytest.approx(ours[name], abs=0.05) for name in names)


def test_probes_of_weights_equal_the_cpus(ran):
    ours, theirs = (json.loads((ran / f"probe_{device}.json").read_text())["results"] for device in DEVICES)
    for network, scores in ours.items():
        for probe in ("knn", "linear"):
            found, wanted = (of[probe]["balanced_accuracy"] for of in (theirs[network], scores))
            assert found == pytest.approx(wanted, abs=0.05), network


def test_features_equal_the_cpus(ran):
    files = sorted(path.name for path in (ran / "features_cpu").glob("*.safetensors"))
    ours, theirs = ([load_file(ran / f"features_{device}" / name)["pooled"] for name in files] for device in DEVICES)
    assert len(files) == 5
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=2e-4)


def test_finetuning_equals_the_cpus(ran):
    assert_close(ran / "finetuned_cpu", ran / "finetuned_cuda", ("model", "optimizer"), atol=3e-4)
    assert losses(ran / "finetuned_cuda") == pytest.approx(losses(ran / "finetuned_cpu"), rel=1e-5)


def test_a_predicted_label_map_equals_the_cpus(ran):
    ours, theirs = (np.asarray(nib.load(ran / f"{device}.nii.gz").dataobj) for device in DEVICES)
    assert (ours == theirs).mean() > 0.999 and len(np.unique(ours)) > 1


def test_sam_equals_the_cpus(ran):
    """Its first steps turn rounding into percents of a gradient (norms of 243, batch norms over two tiny views)."""
    one, other = (ran / f"sam_{device}" for device in DEVICES)
    in_one, in_other = losses(one), losses(other)
    assert in_one[0] == pytest.approx(in_other[0], rel=1e-5) and in_one == pytest.approx(in_other, rel=5e-3)
    ours, theirs = (load_checkpoint(folder / LATEST) for folder in (one, other))
    for part in ("state_dict", "raw_state_dict"):
        flat_ours, flat_theirs = (
            {name: value for name, value in flat(saved[part]).items() if torch.is_tensor(value)}
            for saved in (ours, theirs)
        )
        assert flat_ours.keys() == flat_theirs.keys()
        weights, others = (
            torch.cat([value.flatten().double() for name, value in sorted(values.items()) if "running" not in name])
            for values in (flat_ours, flat_theirs)
        )
        assert (weights - others).norm() < 0.005 * weights.norm()
    tables = [CorrespondenceTable.load(ran / f"embeddings_{device}").rows for device in DEVICES]
    assert len(tables[0]) == len(tables[1]) > 20
    np.testing.assert_allclose(tables[0]["query_mm"], tables[1]["query_mm"])
    assert np.isclose(tables[0]["score"], tables[1]["score"], atol=1e-3).mean() > 0.95


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_with_the_casts_of_a_gpu(ran, precision):
    """fp16 with its loss scaling; the losses stay beside those of fp32."""
    in_half, in_full = losses(ran / f"alice_{precision}"), losses(ran / "mean_cpu")
    assert in_half[0] == pytest.approx(in_full[0], rel=0.01) and in_half[0] != in_full[0]
    names = [f"{name}_{precision}" for name in ("alice", "finetuned", "sam")] + ["swin_bf16"]
    assert all(math.isfinite(loss) for name in names for loss in losses(ran / name))
    scale = load_checkpoint(ran / f"alice_{precision}" / LATEST)["scaler"].get("scale", 0)
    assert (scale > 0) == (precision == "fp16")


REFUSED = """
import torch
from tests.other_device import NAME, Factories, register
register()
with Factories():
    here, there = torch.ones(3), torch.ones(3, device=NAME)
    for attempt in ATTEMPTS:
        try:
            eval(attempt)
        except (RuntimeError, TypeError):
            print("refused", attempt)
    linear = torch.nn.Linear(3, 3).to(NAME)
    with torch.autocast(NAME, dtype=torch.bfloat16):
        print(linear(there).dtype, linear(there).softmax(0).dtype)
"""


def test_the_device_refuses_what_cuda_refuses():
    wrong = ["here + there", "torch.cat([here, there])", "there.numpy()", "torch.nn.functional.linear(there, here)"]
    right = ["there + torch.tensor(1.0)", "there[torch.tensor([0, 2])]", "there.copy_(here)", "there.cpu().numpy()"]
    code = REFUSED.replace("ATTEMPTS", repr(wrong + right))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert told[:-1] == [f"refused {attempt}" for attempt in wrong]
    assert told[-1] == "torch.bfloat16 torch.float32", "a CPU's autocast would keep bfloat16"


def test_the_lists_of_autocast_are_read():
    lists = autocast_lists()
    assert ("conv3d",) in lists["LOWER_PRECISION_FP"] and ("layer_norm",) in lists["FP32"]
    assert sum(map(len, lists.values())) > 80

"""Pretraining data at the size of a corpus: start-up, memory of the loading processes, waits, balance, broken volumes.

    python -m benchmarks.corpus_scale --quick --output results/benchmarks/corpus_scale.json

Makes a store of many small phantoms and a table of matches between them, and then measures main_ddp.py's own way to
its first step, and its loader over several epochs: resident and proportional memory of each worker at the beginning and
at the end, the wait for each batch near an epoch's end and elsewhere, how often each case is drawn, and what becomes of
two volumes that are broken. Nothing is compared with other code. Rendering takes half a second of CPU a phantom, so
that only --num_phantoms are rendered, and each case is one of them with noise of its own; --num_phantoms equal to
--num_cases renders all. --work_dir keeps the corpus for the next run.
"""

import logging
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jsonargparse
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.corpus import corpus_flags, make_corpus, open_training, write_phantoms
from benchmarks.results import Rows, benchmark_parser, command, table, words
from datasets.ct.nifti import read_ct, write_nifti
from datasets.lists.data_list import Case
from datasets.samples.dataset import CropDataset, CutSamples
from datasets.samples.loader import make_pair_loader
from datasets.store.volumes import VolumeStore
from engine.flags import REPOSITORY

NOISE_HU = 5.0
WANTED_START_S = 10.0
# The smallest network that main_ddp.py builds: what is measured is everything around it.
SMALL_NETWORK = {
    **{"backbone": "unet", "feature_size": 6, "out_dim": 16, "casa_heads": 2, "casa_head_dim": 8},
    **{"casa_hidden_dim": 16, "head_hidden_dim": 32, "head_bottleneck_dim": 8, "device": "cpu", "precision": "fp32"},
    **{"epochs": 1, "warmup_epochs": 0, "log_freq": 1, "picture_freq": 0, "val_freq": 0},
}
DRIVER = """
import sys, time
started = time.perf_counter()
import main_ddp
print("imports", time.perf_counter() - started, flush=True)
main_ddp.main(sys.argv[1:])
"""


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "80 cases of 2 phantoms, smaller")
    parser.add_argument("--num_cases", type=int, default=2000, help="volumes of the store")
    parser.add_argument("--num_phantoms", type=int, default=100, help="phantoms rendered; cases share their anatomy")
    parser.add_argument("--coarsen", type=float, default=3.0, help="factor on the phantoms' voxel sizes")
    parser.add_argument("--rows_per_case", type=int, default=64, help="matches of each case in the table")
    parser.add_argument("--roi", type=int, default=32, help="side of the crops in voxels")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs of a batch")
    parser.add_argument("--num_workers", type=int, default=2, help="loading processes")
    parser.add_argument("--num_epochs", type=int, default=3, help="epochs that are loaded")
    parser.add_argument(
        "--work_dir", type=str, default="", help="folder for the corpus, reused; empty = a temporary one"
    )
    return parser


def make_volumes(folder: Path, flags: jsonargparse.Namespace) -> list[Case]:
    """`num_cases` files in canonical orientation; case i shows phantom i modulo `num_phantoms`."""
    num_phantoms = min(flags.num_phantoms, flags.num_cases)
    written = write_phantoms(folder / "phantoms", num_phantoms, "abdomen", flags.coarsen)
    phantoms = [read_ct(case.image) for case in written]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    cases = []
    for number in tqdm(range(flags.num_cases), desc="cases"):
        volume = phantoms[number % len(phantoms)]
        noise = np.random.default_rng(number).normal(0.0, NOISE_HU, volume.shape)
        case = Case(f"case{number:05d}", folder / "images" / f"case{number:05d}.nii.gz")
        write_nifti(case.image, np.rint(np.clip(volume.array + noise, -1024, 3071)).astype(np.int16), volume.affine)
        cases.append(case)
    return cases


def run_words(folder: Path, flags: jsonargparse.Namespace) -> tuple[str, ...]:
    """main_ddp.py's command line on this corpus, for one step."""
    given = {name: getattr(flags, name) for name in ("batch_size", "num_workers")}
    return words(**SMALL_NETWORK, **corpus_flags(folder, flags.roi), **given, resume="none", steps_per_epoch=1)


# What is measured


def measure_start(folder: Path, flags: jsonargparse.Namespace) -> dict:
    """Seconds of main_ddp.py in a process of its own: its imports, and from there to its first step's end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", DRIVER, *run_words(folder, flags)]
    run = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    imported = found = None
    for line in run.stdout:
        if line.startswith("imports"):
            imported, imports_s = time.perf_counter(), float(line.split()[1])
        elif line.startswith("[train] step 1/"):
            found = time.perf_counter() - imported
    if run.wait() != 0 or found is None:
        raise RuntimeError("main_ddp.py did not reach its first step; its message stands above")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"imports_wall_s": imports_s, "first_step_wall_s": found, "whole_run_cpu_s": cpu_s}


def memory_mb(process_id: int) -> dict[str, float]:
    """Resident, proportional and private memory of a process, MB (10^6 bytes)."""
    sizes = Counter()
    for line in Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        sizes[name.rstrip(":")] = int(size) * 1024 / 1e6
    return {"rss": sizes["Rss"], "pss": sizes["Pss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def measure_loading(dataset: CropDataset, flags: jsonargparse.Namespace) -> dict:
    """Waits for batches and memory of the workers over some epochs, without any training in between."""
    steps_per_epoch = len(dataset) // flags.batch_size
    num_steps = steps_per_epoch * flags.num_epochs
    before = set(multiprocessing.active_children())
    samples = CutSamples(dataset)
    batches = iter(make_pair_loader(samples, flags.batch_size, num_workers=flags.num_workers, num_steps=num_steps))
    workers = [process.pid for process in set(multiprocessing.active_children()) - before]
    waits, memory = [], []
    for step in tqdm(range(num_steps), desc="batches"):
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        if step + 1 in (max(num_steps // 20, 1), num_steps - 4 * flags.num_workers):
            memory.append([memory_mb(worker) for worker in workers])
    return {
        "num_samples": num_steps * flags.batch_size,
        "samples_per_s": num_steps * flags.batch_size / sum(waits),
        **waits_by_place(np.array(waits), steps_per_epoch, flags.num_workers + 1),
        "worker_memory_mb": {"at_5_percent": memory[0], "at_the_end": memory[-1]},
        "worker_growth_mb": max(end["private"] - start["private"] for start, end in zip(memory[0], memory[-1])),
    }


def waits_by_place(waits: np.ndarray, steps_per_epoch: int, reach: int) -> dict[str, float]:
    """The median wait, and the longest within `reach` steps of an epoch's end and elsewhere (the start left out)."""
    step = np.arange(len(waits))
    is_start = step < reach
    into_epoch = step % steps_per_epoch
    is_near = ~is_start & (np.minimum(into_epoch, steps_per_epoch - into_epoch) <= reach)
    return {
        "wait_median_ms": float(np.median(waits)) * 1e3,
        "wait_longest_near_epoch_end_ms": float(waits[is_near].max(initial=0.0)) * 1e3,
        "wait_longest_elsewhere_ms": float(waits[~is_near & ~is_start].max(initial=0.0)) * 1e3,
        "wait_99th_percentile_ms": float(np.percentile(waits[~is_start], 99)) * 1e3,
    }


def measure_balance(dataset: CropDataset, num_epochs: int) -> dict:
    """How often each case is in a pair, over the draws of some epochs."""
    seen = Counter()
    for index in range(num_epochs * len(dataset)):
        seen.update(dataset.places(index).names)
    counts = [seen[name] / num_epochs for name in dataset.names]
    return {
        "pairs_per_case_and_epoch_min": min(counts),
        "pairs_per_case_and_epoch_median": statistics.median(counts),
        "pairs_per_case_and_epoch_max": max(counts),
    }


def measure_broken(folder: Path, flags: jsonargparse.Namespace) -> dict:
    """An epoch with one truncated and one missing volume: what is logged, and whether workers change what stands in."""
    broken = ["case00001", f"case{flags.num_cases // 2:05d}"]
    files = [folder / "store" / "cases" / f"{name}.b2nd" for name in broken]
    contents = [file.read_bytes() for file in files]
    handler = logging.FileHandler(folder / "warnings.txt", mode="w")
    logging.getLogger("datasets.samples.dataset").addHandler(handler)  # the forked workers write there too
    try:
        files[0].write_bytes(contents[0][: len(contents[0]) // 2])
        files[1].unlink()
        dataset, alone = (open_training(run_words(folder, flags)) for _ in range(2))
        num_steps = len(dataset) // flags.batch_size
        loader = make_pair_loader(dataset, flags.batch_size, num_workers=flags.num_workers, num_steps=num_steps)
        points_mm = torch.cat([batch["centre_mm"] for batch in loader])
        touched = [i for i in range(len(points_mm)) if set(dataset.places(i).names) & set(broken)]
        lines = Path(handler.baseFilename).read_text().splitlines()
        same = all(torch.equal(alone[i]["centre_mm"], points_mm[i]) for i in touched[:20])
    finally:
        logging.getLogger("datasets.samples.dataset").removeHandler(handler)
        for file, content in zip(files, contents):
            file.write_bytes(content)
    return {
        "broken_named": dataset.broken_names(),
        "broken_lines": [sum(name in line for line in lines) for name in broken],
        "broken_samples_replaced": len(touched),
        "broken_agree": same and sorted(dataset.broken_names()) == sorted(broken),
    }


def measure(folder: Path, flags: jsonargparse.Namespace) -> dict:
    """All figures of one corpus."""
    started = time.perf_counter()
    if not (folder / "embeddings" / "correspondences.npy").exists():
        make_corpus(make_volumes(folder, flags), folder, flags.rows_per_case, num_workers=flags.num_workers)
    corpus_s = time.perf_counter() - started
    files = [file.stat().st_size for file in (folder / "store" / "cases").glob("*.b2nd")]
    found = {"num_cases": len(files), "store_mb": sum(files) / 1e6, "corpus_wall_s": corpus_s}
    found["shape_of_first"] = list(VolumeStore(folder / "store").record("case00000").shape)
    found |= measure_start(folder, flags)
    started = time.perf_counter()
    dataset = open_training(run_words(folder, flags))
    found["open_data_wall_s"] = time.perf_counter() - started
    found |= measure_balance(dataset, flags.num_epochs)
    found |= measure_loading(dataset, flags)
    return found | measure_broken(folder, flags)


def run(flags: jsonargparse.Namespace) -> dict:
    """Measure everything; returns the figures, times in seconds of wall or CPU."""
    if flags.quick:
        flags.num_cases, flags.num_phantoms, flags.coarsen, flags.num_epochs = 80, 2, 4.0, 2
    if flags.num_workers < 1:
        raise ValueError(f"--num_workers is {flags.num_workers}, expected 1 or more: their memory is measured")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(flags.work_dir or folder), flags)
    if not found["broken_agree"] or found["pairs_per_case_and_epoch_min"] < 1:
        raise RuntimeError(f"cases are left out, or what stands in for a broken one depends on the workers: {found}")
    return found | {"roi": flags.roi, "num_workers": flags.num_workers}


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted: a line for each figure."""
    memory, what = found["worker_memory_mb"], f"corpus of {found['num_cases']}"
    start, end = (max(worker["pss"] for worker in memory[when]) for when in ("at_5_percent", "at_the_end"))
    near, elsewhere = found["wait_longest_near_epoch_end_ms"], found["wait_longest_elsewhere_ms"]
    balance = "/".join(f"{found[f'pairs_per_case_and_epoch_{name}']:.2f}" for name in ("min", "median", "max"))
    lines = [
        ("to the first step", f"{found['first_step_wall_s']:.1f} s", f"imports {found['imports_wall_s']:.1f} s",
         "", f"<= {WANTED_START_S:.0f} s"),
        ("a worker's PSS", f"{end:.0f} MB", f"{start:.0f} MB at 5 % of {found['num_samples']} samples",
         f"{end / start:.2f}x", "1x"),
        ("longest wait at an epoch's end", f"{near:.0f} ms", f"elsewhere {elsewhere:.0f} ms",
         f"median {found['wait_median_ms']:.0f} ms", ""),
        ("pairs of a case in an epoch", balance, "min/median/max", "", ""),
        ("lines about two broken volumes", str(found["broken_lines"]),
         f"{found['broken_samples_replaced']} samples replaced", "", "[1, 1]"),
    ]  # fmt: skip
    return [(f"{what}: {line[0]}", *line[1:]) for line in lines]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

"""How long a step of the real pretraining waits for data: main_ddp.py, its loaders and its log, on phantom CT.

    python -m benchmarks.data_wait --output results/benchmarks/data_wait.json          # on a GPU
    python -m benchmarks.data_wait --quick --device cpu

The run is the default recipe's (SwinUNETR-48, pairs by a table of matches, all augmentation): samples come from a
volume store on this machine's disk through `--num_workers` processes. The first of the logged periods, in which the
processes start and kernels are chosen, does not count. Beside it: what one process alone can load, which says how many
a faster GPU would need. On a CPU, whose step takes seconds, the run is shorter.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import numpy as np

from benchmarks.matching import timed
from benchmarks.results import measure_and_show
from datasets.ct.geometry import index_to_world
from datasets.lists.data_list import find_cases, split_cases, write_data_list
from datasets.phantom.cases import PhantomCase, write_case
from datasets.samples.correspondences import ROW_DTYPE, CorrespondenceTable
from datasets.samples.crops import CropOptions
from datasets.samples.dataset import CropDataset
from datasets.samples.pairings import SamPairing
from datasets.store.volumes import VolumeStore, build_store
from engine.device import pick_device
from engine.flags import REPOSITORY, add_switch, git_commit, make_parser, run_main
from models.methods import Alice

SPACING_MM = (2.0, 1.5, 1.5)
ROWS_A_CASE = 200
PERIODS = 6
SIZES = {  # of the flags that are not given
    "cuda": {"batch_size": 8, "num_workers": 12, "num_steps": 120},
    "cpu": {"batch_size": 1, "num_workers": 1, "num_steps": 2 * PERIODS},
}
QUICK = {"roi": 32, "feature_size": 8, "num_cases": 2, "flags": "--backbone=unet --head_hidden_dim=32"}


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--device", type=str, choices=["auto", "cpu", "cuda"], default="auto", help="auto = CUDA if any")
    add("--batch_size", type=int | None, default=None, help="pairs a step; default: 8, on a CPU 1")
    add("--num_workers", type=int | None, default=None, help="processes that load; default: 12, on a CPU 1")
    add("--roi", type=int, default=96, help="side of a crop, voxels")
    add("--feature_size", type=int, default=48, help="channels of SwinUNETR at stride 2")
    add("--num_steps", type=int | None, default=None, help=f"of the run, {PERIODS} periods; default: 120, on a CPU 12")
    add("--num_cases", type=int, default=8, help="phantoms in the store")
    add("--flags", type=str, default="", help='further flags of main_ddp.py, as one text: "--compile=true"')
    add_switch(parser, "--quick", False, "a tiny network on small crops of two phantoms")
    add("--output", type=str, default=None, help="JSON file for the results")
    return parser


def make_corpus(folder: Path, flags: jsonargparse.Namespace) -> VolumeStore:
    """Phantoms, their list, their store, and a table of matches anywhere in the bodies: which ones does not matter."""
    for number in range(flags.num_cases):
        case = PhantomCase(f"Case_{number:05d}", 0, number, False, range_name="chest_abdomen_pelvis")
        write_case(folder, case)
    cases = find_cases(folder)
    write_data_list(folder / "list.json", folder, *split_cases(cases, 0, 0.0, 0), {"0": "background"}, {})
    report = build_store(cases, folder / "store", SPACING_MM, progress=False)
    if report.failed:
        raise RuntimeError(f"the store of phantoms is incomplete: {report.failed}")
    store, rng = VolumeStore(folder / "store"), np.random.default_rng(0)
    rows = np.zeros(ROWS_A_CASE * len(store), ROW_DTYPE)
    rows["query_case"] = np.repeat(np.arange(len(store)), ROWS_A_CASE)
    rows["key_case"] = (rows["query_case"] + rng.integers(1, len(store), len(rows))) % len(store)
    rows["score"], rows["cycle_mm"] = 1.0, 0.0
    for side in ("query", "key"):
        for index, name in enumerate(store.names):
            record, chosen = store.record(name), rows[f"{side}_case"] == index
            places = rng.uniform(record.body_start, record.body_stop, (int(chosen.sum()), 3))
            rows[f"{side}_mm"][chosen] = index_to_world(record.affine, places)
    CorrespondenceTable.write(folder / "embeddings", store.names, rows, {"made": "at random, for timing"})
    return store


def run(flags: jsonargparse.Namespace) -> dict:
    """Train for a while in a temporary folder; read what the run wrote of itself.

    Raises:
        ValueError: fewer than 2 cases, or too few steps.
        RuntimeError: the run failed; the message ends with what it said.
    """
    device = pick_device(flags.device, 0).type
    for name, value in SIZES[device].items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    if flags.quick:
        for name, value in QUICK.items():
            setattr(flags, name, value)
    if flags.num_cases < 2 or flags.num_steps < 2 * PERIODS:
        raise ValueError(f"expected --num_cases of 2 or more and --num_steps of {2 * PERIODS} or more")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = make_corpus(folder, flags)
        lines = train(folder, flags)
        one_process_s = loading_time(folder, store, flags)
    counted = [line for line in lines if line["kind"] == "train"][1:]
    return {
        "data_wait_share": statistics.mean(line["data_wait_share"] for line in counted),
        "data_wait_most": max(line["data_wait_share"] for line in counted),
        "pairs_per_s": statistics.mean(line["samples_per_s"] for line in counted),
        "one_process_pairs_per_s": 1 / one_process_s,
        "num_periods": len(counted),
        **{name: getattr(flags, name) for name in ("batch_size", "num_workers", "roi", "feature_size", "num_steps")},
        "device": device,
        "flags": flags.flags,
        "commit": git_commit(),
    }


def train(folder: Path, flags: jsonargparse.Namespace) -> list[dict]:
    """The lines of log.txt of a run of main_ddp.py."""
    given = {
        **{"data_dir": folder, "json_list": folder / "list.json", "store_dir": folder / "store"},
        **{"embed_dir": folder / "embeddings", "output_dir": folder / "run", "device": flags.device},
        **{"batch_size": flags.batch_size, "num_workers": flags.num_workers, "feature_size": flags.feature_size},
        **{f"roi_{axis}": flags.roi for axis in "xyz"},
        **{"epochs": 1, "steps_per_epoch": flags.num_steps, "warmup_epochs": 0, "log_freq": flags.num_steps // PERIODS},
        **{"val_freq": 0, "picture_freq": 0},
    }
    words = [sys.executable, "main_ddp.py", "--config", "configs/alice_swinunetr.yaml", *flags.flags.split()]
    words += [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the run failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return [json.loads(line) for line in (folder / "run" / "log.txt").read_text().splitlines()]


def loading_time(folder: Path, store: VolumeStore, flags: jsonargparse.Namespace) -> float:
    """Seconds that one process takes for one sample, median of 20."""
    table = CorrespondenceTable.load(folder / "embeddings")
    pairing = SamPairing(store, store.names, (flags.roi,) * 3, table=table)
    dataset = CropDataset(store, pairing, Alice.views, CropOptions())
    return timed(dataset.__getitem__, range(20)).wall_s


def rows(found: dict) -> list[tuple[str, str, str, str, str]]:
    """What, ours, beside, ratio, wanted."""
    what = f"waiting for data, {found['batch_size']} pairs of {found['roi']}³ a step, {found['num_workers']} processes"
    beside = f"{found['one_process_pairs_per_s']:.1f} pairs/s, what one process loads"
    ours = f"{100 * found['data_wait_share']:.2f} % of {found['pairs_per_s']:.2f} pairs/s"
    return [(what, ours, beside, f"{found['pairs_per_s'] / found['one_process_pairs_per_s']:.2f}", "< 1 %")]


def main(argv: list[str] | None = None) -> None:
    measure_and_show(sys.modules[__name__], argv)


if __name__ == "__main__":
    run_main(main)

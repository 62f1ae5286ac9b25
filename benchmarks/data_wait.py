"""How long a step of the real pretraining waits for data: main_ddp.py, its loaders and its log, on phantom CT.

    python -m benchmarks.data_wait --output results/benchmarks/data_wait.json          # on a GPU

The run is the default recipe's (SwinUNETR-48, pairs by a table of matches, SAM's vectors at points of each crop, all
augmentation): samples come from a volume store on this machine's disk through `--num_workers` processes. The first of
the logged periods, in which the processes start and kernels are chosen, does not count. Beside it: what one process
alone can load, which says how many a faster GPU would need. On a CPU, whose step takes seconds, the run is shorter.
"""

import statistics
import tempfile
from pathlib import Path

import jsonargparse

from benchmarks.corpus import corpus_flags, make_corpus, open_training, write_phantoms
from benchmarks.results import Rows, benchmark_parser, command, run_command, table, timed, words
from engine.device import pick_device
from engine.flags import REPOSITORY
from engine.logging import whole_lines

SPACING_MM = (2.0, 1.5, 1.5)
ROWS_A_CASE = 200
EMBEDDING_PATHS = ("data_dir", "json_list", "store_dir", "embed_dir")
PERIODS = 6
SIZES = {  # of the flags that are not given
    "cuda": {"batch_size": 8, "num_workers": 12, "num_steps": 120},
    "cpu": {"batch_size": 1, "num_workers": 1, "num_steps": 2 * PERIODS},
}
QUICK = {"roi": 32, "feature_size": 8, "num_cases": 2, "flags": "--backbone=unet --head_hidden_dim=32"}


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "a tiny network on small crops of two phantoms", device=True)
    add = parser.add_argument
    add("--batch_size", type=int | None, default=None, help="pairs a step; default: 8, on a CPU 1")
    add("--num_workers", type=int | None, default=None, help="processes that load; default: 12, on a CPU 1")
    add("--roi", type=int, default=96, help="side of a crop, voxels")
    add("--feature_size", type=int, default=48, help="channels of SwinUNETR at stride 2")
    add("--num_steps", type=int | None, default=None, help=f"of the run, {PERIODS} periods; default: 120, on a CPU 12")
    add("--num_cases", type=int, default=8, help="phantoms in the store")
    add("--flags", type=str, default="", help='further flags of main_ddp.py, as one text: "--compile=true"')
    return parser


def run(flags: jsonargparse.Namespace) -> dict:
    """Train for a while in a temporary folder; read what the run wrote of itself.

    Raises:
        ValueError: fewer than 2 cases, or too few steps.
        RuntimeError: the run failed; the message ends with what it said.
    """
    resolve(flags)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_phantom_corpus(folder, flags.num_cases)
        run_command("main_ddp", run_words(folder, flags))
        return figures(folder, flags)


def resolve(flags: jsonargparse.Namespace) -> None:
    """Give the flags that are not given the values of the device, or those of --quick.

    Raises:
        ValueError: fewer than 2 cases, or too few steps.
    """
    for name, value in SIZES[pick_device(flags.device, 0).type].items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    if flags.quick:
        for name, value in QUICK.items():
            setattr(flags, name, value)
    if flags.num_cases < 2 or flags.num_steps < 2 * PERIODS:
        raise ValueError(f"expected --num_cases of 2 or more and --num_steps of {2 * PERIODS} or more")


def make_phantom_corpus(folder: Path, num_cases: int, coarsen: float = 1.0) -> None:
    """Phantoms, their store, SAM's embeddings and a table of matches in a folder; `coarsen` is `PhantomCase`'s.

    Raises:
        RuntimeError: they could not be embedded.
    """
    cases = write_phantoms(folder, num_cases, "chest_abdomen_pelvis", coarsen)
    make_corpus(cases, folder, ROWS_A_CASE, spacing_mm=SPACING_MM)
    paths = {name: path for name, path in corpus_flags(folder, 0).items() if name in EMBEDDING_PATHS}
    run_command("scripts.generate_sam_embeddings", words(**paths))


def figures(folder: Path, flags: jsonargparse.Namespace) -> dict:
    """What the run that ended in this folder says of itself, and what one process can load."""
    counted = read_log(folder / "run", "train")[1:]
    one_process_s = timed(open_training(run_words(folder, flags)).cut, range(20)).wall_s
    return {
        "data_wait_share": statistics.mean(line["data_wait_share"] for line in counted),
        "data_wait_most": max(line["data_wait_share"] for line in counted),
        "pairs_per_s": statistics.mean(line["samples_per_s"] for line in counted),
        "one_process_pairs_per_s": 1 / one_process_s,
        "num_periods": len(counted),
        **{name: getattr(flags, name) for name in ("batch_size", "num_workers", "roi", "feature_size", "num_steps")},
        "device": pick_device(flags.device, 0).type,
        "flags": flags.flags,
    }


def run_words(folder: Path, flags: jsonargparse.Namespace) -> tuple[str, ...]:
    """main_ddp.py's command line."""
    given = corpus_flags(folder, flags.roi) | {
        **{name: getattr(flags, name) for name in ("device", "batch_size", "num_workers", "feature_size")},
        **{"epochs": 1, "steps_per_epoch": flags.num_steps, "warmup_epochs": 0, "log_freq": flags.num_steps // PERIODS},
        **{"val_freq": 0, "picture_freq": 0},
    }
    recipe = REPOSITORY / "configs" / "alice_swinunetr.yaml"
    return (*words(config=recipe), *flags.flags.split(), *words(**given))


def read_log(run_dir: Path, kind: str) -> list[dict]:
    """The lines of one kind in a run's log.txt."""
    return [line for _, line in whole_lines(run_dir / "log.txt") if line["kind"] == kind]


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted."""
    what = f"waiting for data, {found['batch_size']} pairs of {found['roi']}³ a step, {found['num_workers']} processes"
    beside = f"{found['one_process_pairs_per_s']:.1f} pairs/s, what one process loads"
    ours = f"{100 * found['data_wait_share']:.2f} % of {found['pairs_per_s']:.2f} pairs/s"
    return [(what, ours, beside, f"{found['pairs_per_s'] / found['one_process_pairs_per_s']:.2f}", "< 1 %")]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

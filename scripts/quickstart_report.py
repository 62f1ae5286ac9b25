"""The results of the quickstart: a table, results/quickstart/summary.json, and four pictures.

    python scripts/quickstart_report.py --quickstart_dir results/quickstart

Reads what the stages left behind; computes nothing anew but the pictures: matched landmarks of two held-out patients,
a sheet of paired crops, what the student makes of masked crops, and organs that the finetuned network found.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse

from datasets.lists.data_list import load_data_list
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.dataset import CropDataset
from datasets.store.files import write_text
from datasets.store.volumes import VolumeStore
from engine.flags import RunInfo, git_commit, make_parser, run_main
from engine.pretrain_data import make_dataset
from engine.segmentation.evaluation import EVALUATION, OVERLAY
from engine.segmentation.report import MEASURES, PLAIN, SUMMARY
from engine.watch.sample_sheet import draw_sample_sheet
from models.methods import METHODS
from sam_embed.embeddings.embedding_store import load_embedding
from sam_embed.judging.evaluate import evaluate_pairs, load_landmarks
from sam_embed.judging.match_figure import draw_landmark_matches
from sam_embed.judging.trust import Thresholds

MATCHERS = {"sam": "SAM", "body_box": "body box", "body_affine": "affine fit"}
LOSSES = ("loss", "loss_cls", "loss_tokens", "loss_recon")
NUM_SHEET_PAIRS = 5
WITH_ALL = {measure: measure for measure in MEASURES}
# Title, folder of the finetuning runs (one for each labelled patient), and what their summaries call Dice and NSD.
FINETUNED = {
    "scratch": ("from scratch", "finetune_scratch", WITH_ALL),
    "alice": ("pretrained", "finetune_alice", PLAIN),
    "alice_memory": ("and with memory", "finetune_alice", WITH_ALL),
}
PICTURES = ("matched_landmarks", "paired_crops", "reconstruction", "segmentation")


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    parser.add_argument("--quickstart_dir", type=str, default="results/quickstart", help="what quickstart.sh filled")
    return parser


def read_stages(folder: Path) -> tuple[dict[str, float], float]:
    """Seconds of each stage, in the order in which they began, and of all; stages may run side by side."""
    records = [json.loads(path.read_text()) for path in sorted((folder / "stages").glob("*.json"))]
    seconds, total_s, until = {}, 0.0, -math.inf
    for record in sorted(records, key=lambda record: record["started"]):
        seconds[record["name"]], started = record["seconds"], record["started"]
        ended = started + record["seconds"]
        total_s += max(0.0, ended - max(started, until))
        until = max(until, ended)
    return seconds, total_s


def read_losses(log: Path) -> dict[str, dict[str, float]]:
    """Loss terms of the first and the last training record of a log, and of the last validation."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    train, validation = ([one for one in records if one["kind"] == kind] for kind in ("train", "validation"))
    if not train:
        raise ValueError(f"{log}: no training record; did pretraining run?")
    chosen = {"start": train[0], "end": train[-1]} | ({"validation": validation[-1]} if validation else {})
    return {
        when: {name: record[name] for name in ("step", *LOSSES) if name in record} for when, record in chosen.items()
    }


def open_pairs(folder: Path, run: dict) -> CropDataset:
    """The samples as the pretraining run `run` (its run.json) drew them."""
    flags = SimpleNamespace(**run["flags"])
    names = [case.name for case in load_data_list(folder / "data.json", folder / "data", "training")]
    store, table = VolumeStore(folder / "store"), CorrespondenceTable.load(folder / "embeddings")
    return make_dataset(flags, METHODS[flags.method].views, store, table, names, flags.seed)


def summarise(folder: Path, pairs: CropDataset) -> dict:
    """All figures of the report as plain values."""
    seconds, total_s = read_stages(folder)
    return {
        "commit": git_commit(),
        "seconds": seconds,
        "total_seconds": total_s,
        "matching": json.loads((folder / "matching.json").read_text()),
        "pairs": pairs.statistics(),
        "losses": read_losses(folder / "alice" / "log.txt"),
        "finetuning": {name: read_finetunings(folder / runs, names) for name, (_, runs, names) in FINETUNED.items()},
    }


def read_finetunings(folder: Path, names: dict[str, str]) -> dict:
    """Budget of finetuning runs that differ in the labelled patient, and what each of them reached.

    Dice and NSD (0 to 1) are means over held-out patients and organs: one for each run, and their mean.

    Args:
        names: of "dice" and "nsd" in the runs' summaries.
    """
    runs = sorted(path.parent for path in folder.glob("*/run.json"))
    flags = json.loads((runs[0] / "run.json").read_text())["flags"]
    results = [json.loads((run / EVALUATION / SUMMARY).read_text()) for run in runs]
    figures = {measure: [result[name]["mean"] for result in results] for measure, name in names.items()}
    return {
        "num_labelled": flags["num_labelled"],
        "steps": flags["steps"],
        "num_cases": results[0]["num_cases"],
        **{name: sum(values) / len(values) for name, values in figures.items()},
        "by_labelled_patient": figures,
    }


def describe(summary: dict) -> str:
    """The report as text for a terminal."""
    lines = ["stage                 seconds"]
    lines += [f"{name:<20} {seconds:>8.1f}" for name, seconds in summary["seconds"].items()]
    lines += [f"{'total':<20} {summary['total_seconds']:>8.1f}", ""]
    matching = summary["matching"]
    lines += [f"landmark error on {matching['num_cases']} held-out patients, {matching['num_matches']} matches (mm)"]
    lines += [f"{'':<12} {'median':>8} {'mean':>8} {'90th':>8} {'<= 10 mm':>9}"]
    for key, name in MATCHERS.items():
        row = matching[key]
        figures = f"{row['median_mm']:>8.1f} {row['mean_mm']:>8.1f} {row['p90_mm']:>8.1f}"
        lines.append(f"{name:<12} {figures} {row['share_within_10mm']:>9.0%}")
    lines += ["", describe_mined(matching)]
    moments = ("start", "end", "validation")
    lines += ["", "pretraining", f"{'':<12} " + " ".join(f"{name:>12}" for name in moments)]
    for name in LOSSES:
        values = [summary["losses"].get(when, {}).get(name) for when in moments]
        lines.append(f"{name:<12} " + " ".join(f"{'-' if value is None else f'{value:.4f}':>12}" for value in values))
    lines += ["", *describe_finetuning(summary["finetuning"])]
    shown = {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in summary["pairs"].items()}
    lines += ["", "pairs", *(f"{name}: {value}" for name, value in shown.items())]
    return "\n".join(lines) + "\n"


def describe_mined(matching: dict) -> str:
    """How many of the pairs that training would keep are right, of this run's own SAM."""
    mined = matching["mined"]
    if mined is None:
        return "no pairs were mined between the held-out patients"
    found = f"{mined['all']['num_matches']:,} mined pairs of the held-out patients, with the thresholds of training"
    return f"{found}: {Thresholds(**mined['defaults']).line()}"


def describe_finetuning(runs: dict[str, dict]) -> list[str]:
    """Dice of pretrained beside scratch; one seed and a few patients prove nothing."""
    run = runs["alice"]
    number = len(run["by_labelled_patient"]["dice"])
    lines = [
        f"{run['num_labelled']}-shot segmentation, {run['steps']} steps, {run['num_cases']} held-out patients, mean of "
        f"{number} labelled ones,",
        "one seed (benchmarks/compare_pretraining.py compares properly)",
        f"{'':<16} {'Dice (%)':>8} {'NSD (%)':>8}   Dice by labelled patient",
    ]
    for name, (title, *_) in FINETUNED.items():
        each = ", ".join(f"{100 * dice:.1f}" for dice in runs[name]["by_labelled_patient"]["dice"])
        lines.append(f"{title:<16} {100 * runs[name]['dice']:>8.1f} {100 * runs[name]['nsd']:>8.1f}   {each}")
    return lines


def draw_matches(folder: Path, path: Path) -> None:
    """Landmarks matched between the two held-out patients that share the most."""
    names = [case.name for case in load_data_list(folder / "data.json", folder / "data", "validation")]
    landmarks = load_landmarks(folder / "data" / "landmarks", names)
    both = [(one, other) for one in landmarks for other in landmarks if one < other]
    query, key = max(both, key=lambda pair: len(landmarks[pair[0]].keys() & landmarks[pair[1]].keys()))
    chosen = {name: landmarks[name] for name in (query, key)}
    errors = evaluate_pairs(lambda name: load_embedding(folder / "embeddings", name), chosen, show_progress=False)
    store = VolumeStore(folder / "store")
    draw_landmark_matches(store.read(query), store.read(key), errors[0], path)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    folder = Path(flags.quickstart_dir)
    run = json.loads((folder / "alice" / "run.json").read_text())
    pairs = open_pairs(folder, run)
    summary = summarise(folder, pairs)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    draw_matches(folder, folder / "matched_landmarks.png")
    draw_sample_sheet([pairs[index] for index in range(NUM_SHEET_PAIRS)], folder / "paired_crops.png", pairs.store)
    shutil.copyfile(folder / "alice_unet" / "reconstruction.png", folder / "reconstruction.png")
    shutil.copyfile(folder / "finetune_alice" / "0" / EVALUATION / OVERLAY, folder / "segmentation.png")
    RunInfo.collect(flags).write(folder, "report_run.json")
    pictures = ", ".join(str(folder / f"{name}.png") for name in PICTURES)
    text = describe(summary) + f"\npictures: {pictures}\n"
    write_text(folder / "report.txt", text)
    print(text)


if __name__ == "__main__":
    run_main(main)

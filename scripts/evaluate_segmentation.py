"""Judge a finetuned network: Dice and NSD per organ on the files' own voxels, as CSV, Markdown and JSON, with pictures.

    python scripts/evaluate_segmentation.py --checkpoint_file results/finetune/best.pth --data_dir FLARE22 \\
        --json_list flare_labelled.json --output_dir results/finetune/evaluation
    torchrun --nproc_per_node=4 scripts/evaluate_segmentation.py --checkpoint_file best.pth --data_dir FLARE22 \\
        --json_list flare_labelled.json --store_dir store --section test --output_dir results/test
    python scripts/evaluate_segmentation.py --join results/seed0/evaluation results/seed1/evaluation \\
        --output_dir results/seeds

The last form joins evaluations of several seeds or folds: mean and spread over runs. cases.csv holds one row per case
and organ. An organ that neither truth nor prediction has counts for nothing, one that only one of them has counts 0.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from datasets.data_list import Case, DataListError, load_data_list
from datasets.file_grid import check_label_grid, read_file_grid, write_label_like
from datasets.label_classes import LabelClasses
from datasets.nifti import read_ct, read_label
from datasets.volume_store import VolumeStore
from engine import distributed
from engine.distributed import World
from engine.flags import RunInfo, add_switch, make_parser, run_main
from engine.precision import pick_precision
from engine.segmentation_eval import Evaluation, EvaluationCase, evaluate
from engine.segmentation_pictures import save_overlay
from engine.segmentation_report import TABLE, write_joined, write_report
from engine.sliding_window import WindowOptions
from scripts.predict import Segmenter, on_network_grid, open_segmenter

OVERLAY = "worst_and_best.png"


@dataclass(frozen=True)
class StoreGridCases:
    """Cases judged on the volume store's grid: quick, for validation during training."""

    store: VolumeStore
    classes: LabelClasses

    def __call__(self, name: str) -> EvaluationCase:
        volume, label = self.store.read(name), self.store.read_label(name)
        truth = self.classes.to_classes(label.array)
        return EvaluationCase(name, volume.array, volume.affine, truth, label.affine, label.spacing_mm)


@dataclass(frozen=True)
class FileGridCases:
    """Cases judged on the voxels of their label files; volumes come from the store where it has them.

    Attributes:
        cases: name -> files.
        store: at the network's spacing, or None.
        with_pictures: whether to read the images for pictures.
    """

    cases: dict[str, Case]
    classes: LabelClasses
    spacing_mm: tuple[float, float, float] | None
    store: VolumeStore | None = None
    with_pictures: bool = True

    def __call__(self, name: str) -> EvaluationCase:
        case = self.cases[name]
        label = read_label(case.label)
        in_store = self.store is not None and name in self.store
        image = read_ct(case.image) if self.with_pictures or not in_store else None
        if case.image.exists():  # else the store stands alone
            check_label_grid(label, case.image)
        if in_store:
            stored = self.store.read(name)
            hu, affine = stored.array, stored.affine
        else:
            hu, affine = on_network_grid(image, self.spacing_mm)
        truth = self.classes.to_classes(label.array)
        shown = image.array if self.with_pictures else None
        return EvaluationCase(name, hu, affine, truth, label.affine, label.spacing_mm, shown)


def labelled_cases(json_list: str, data_dir: str, section: str) -> list[Case]:
    """The cases of a section that have labels.

    Raises:
        DataListError: there are none.
    """
    cases = [case for case in load_data_list(json_list, data_dir, section) if case.label is not None]
    if not cases:
        raise DataListError(f"{json_list}: no case of {section!r} has a label (--section)")
    return cases


def usable_store(store_dir: str, spacing_mm: tuple[float, float, float] | None) -> VolumeStore | None:
    """The store of `store_dir` at the network's spacing; None where no folder is named."""
    return VolumeStore(store_dir, expected_spacing_mm=spacing_mm or "native") if store_dir else None


def prediction_writer(folder: Path, cases: dict[str, Case], classes: LabelClasses) -> Callable[[str, np.ndarray], None]:
    """Writes label maps `folder/<case>.nii.gz` on the labels' own grids."""

    def write(name: str, predicted: np.ndarray) -> None:
        write_label_like(folder / f"{name}.nii.gz", classes.to_values(predicted), read_file_grid(cases[name].label))

    return write


def judge_on_files(
    segmenter: Segmenter,
    cases: list[Case],
    store: VolumeStore | None,
    options: WindowOptions,
    world: World,
    nsd_mm: float,
    output_dir: str | Path,
    description: dict,
    with_pictures: bool = True,
    save_predictions: bool = False,
) -> Evaluation:
    """Evaluate on the files' own grids; rank 0 writes cases.csv, results.md, results.json and the overlay picture."""
    output_dir, by_name = Path(output_dir), {case.name: case for case in cases}
    load = FileGridCases(by_name, segmenter.classes, segmenter.preprocessing.spacing_mm, store, with_pictures)
    writer = prediction_writer(output_dir / "predictions", by_name, segmenter.classes) if save_predictions else None
    names = segmenter.classes.names
    judged = evaluate(
        segmenter.network, load, list(by_name), names, options, world, nsd_mm, writer, progress=len(cases) > 1
    )
    if world.is_main:
        write_report(output_dir, judged.scores, description | {"NSD tolerance in mm": nsd_mm})
        views = judged.worst_and_best()
        if views:
            save_overlay(output_dir / OVERLAY, views, names)
    return judged


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint_file", type=str, default="", help="best.pth of a finetuning run")
    add("--data_dir", type=str, default="", help="folder that the data list's paths start from")
    add("--json_list", type=str, default="", help="Decathlon data list with labels")
    add("--section", type=str, default="validation", help="section of the data list")
    add("--store_dir", type=str, default="", help="volume store at the network's spacing, saves time; empty = none")
    add("--output_dir", type=str, required=True, help="cases.csv, results.md, results.json, pictures, run.json")
    add("--join", type=str, nargs="+", default=[], help="evaluation folders to join into one table, instead of judging")
    add("--nsd_mm", type=float, default=2.0, help="tolerance of the normalised surface distance, mm; 0 = leave it out")
    add("--overlap", type=float, default=0.5, help="overlap of windows, 0 to below 1")
    add("--window_batch", type=int, default=2, help="windows per forward pass")
    add_switch(parser, "--pictures", True, "draw the worst and the best case")
    add_switch(parser, "--save_predictions", False, "write every label map to OUTPUT_DIR/predictions")
    add("--device", type=str, choices=["auto", "cpu", "cuda"], default="auto", help="auto = CUDA where there is one")
    add("--precision", type=str, choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto = bf16 on CUDA")
    add("--dist_timeout_min", type=float, default=60.0, help="minutes that a rank waits for the others")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    if flags.join:
        write_joined(flags.output_dir, flags.join)
        RunInfo.collect(flags).write(flags.output_dir)
        print((Path(flags.output_dir) / TABLE).read_text())
        return
    missing = [f"--{name}" for name in ("checkpoint_file", "data_dir", "json_list") if not getattr(flags, name)]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not given (or --join for existing evaluations)")
    world = distributed.start(flags.device, flags.dist_timeout_min)
    segmenter = open_segmenter(flags.checkpoint_file, world.device)
    options = segmenter.window_options(flags.overlap, flags.window_batch, pick_precision(flags.precision, world.device))
    cases = labelled_cases(flags.json_list, flags.data_dir, flags.section)
    store = usable_store(flags.store_dir, segmenter.preprocessing.spacing_mm)
    if world.is_main:
        RunInfo.collect(flags).write(flags.output_dir)
    description = {"checkpoint": flags.checkpoint_file, "section": flags.section}
    judge_on_files(
        segmenter, cases, store, options, world, flags.nsd_mm, flags.output_dir, description, flags.pictures,
        flags.save_predictions,
    )  # fmt: skip
    if world.is_main:
        print((Path(flags.output_dir) / TABLE).read_text())
    distributed.stop()


if __name__ == "__main__":
    run_main(main)

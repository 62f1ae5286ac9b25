"""Judge a finetuned network: Dice and NSD per organ on the files' own voxels, as CSV, Markdown and JSON, with pictures.

    python scripts/evaluate_segmentation.py --checkpoint_file results/finetune/best.pth --data_dir FLARE22 \\
        --json_list flare_labelled.json --output_dir results/finetune/evaluation
    torchrun --nproc_per_node=4 scripts/evaluate_segmentation.py --checkpoint_file best.pth --data_dir FLARE22 \\
        --json_list flare_labelled.json --store_dir store --section test --output_dir results/test
    python scripts/evaluate_segmentation.py --join results/seed0/evaluation results/seed1/evaluation \\
        --output_dir results/seeds

The last form joins evaluations of several seeds or folds: mean and spread over runs. cases.csv holds one row per case
and organ. An organ that neither truth nor prediction has counts for nothing, one that only one of them has counts 0.
A network that remembers labelled cases is judged with its memory, and without it (cases_without_memory.csv). 2-D
networks also get slice_dice_published, the slice-wise number of publications; compare it with nothing else.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.store.volumes import VolumeStore
from engine import distributed
from engine.device import explained_out_of_memory
from engine.flags import DeviceOptions, RunInfo, add_options, add_switch, make_parser, options_of, run_main
from engine.segmentation.evaluation import check_pixel_sizes, evaluate, file_cases, labelled_cases
from engine.segmentation.flags import EvaluationOptions
from engine.segmentation.memory import RecallOptions
from engine.segmentation.report import TABLE, write_joined
from engine.segmentation.segmenter import open_segmenter


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint_file", type=str, default="", help="best.pth of a finetuning run, or hf://owner/name")
    add("--data_dir", type=str, default="", help="folder that the data list's paths start from")
    add("--json_list", type=str, default="", help="Decathlon data list with labels")
    add("--store_dir", type=str, default="", help="volume store at the network's spacing, saves time; empty = none")
    add("--output_dir", type=str, required=True, help="cases.csv, results.md, results.json, pictures, run.json")
    add("--join", type=str, nargs="+", default=[], help="evaluation folders to join into one table, instead of judging")
    add_options(parser, EvaluationOptions)
    add_options(parser, RecallOptions)
    add_switch(parser, "--pictures", True, "draw the worst and the best case")
    add_switch(parser, "--save_predictions", False, "write every label map to OUTPUT_DIR/predictions")
    add_options(parser, DeviceOptions)
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
    segmenter = open_segmenter(
        flags.checkpoint_file,
        world.device,
        flags.overlap,
        flags.window_batch,
        flags.precision,
        options_of(flags, RecallOptions),
    )
    cases = labelled_cases(flags.json_list, flags.data_dir, flags.section)
    options = options_of(flags, EvaluationOptions)
    tolerance_mm = options.tolerance_mm(segmenter.classes.names)
    check_pixel_sizes(cases, tolerance_mm)
    spacing_mm, output_dir = segmenter.spacing_mm or "native", Path(flags.output_dir)
    store = VolumeStore(flags.store_dir, expected_spacing_mm=spacing_mm) if flags.store_dir else None
    if world.is_main:
        RunInfo.collect(flags).write(output_dir)
        if segmenter.recall is not None:
            print(segmenter.recall.memory.describe())
    predictions_dir = output_dir / "predictions" if flags.save_predictions else None
    load, names = file_cases(cases, segmenter, store, flags.pictures), [case.name for case in cases]
    with (
        explained_out_of_memory(flags, "window_batch precision", "lower --window_batch, or use --device cpu"),
        distributed.explained_lost_rank(world, flags.dist_timeout_min),
    ):
        judged = evaluate(segmenter, load, names, world, tolerance_mm, predictions_dir, progress=len(names) > 1)
    if world.is_main:
        description = {"checkpoint": flags.checkpoint_file, "section": flags.section}
        description |= {} if segmenter.recall is None else {"memory": segmenter.recall.memory.describe()}
        description |= {"NSD tolerance in mm": options.described_tolerance()}
        judged.write(output_dir, segmenter.classes.names, description)
        print((output_dir / TABLE).read_text())
    distributed.stop()


if __name__ == "__main__":
    run_main(main)

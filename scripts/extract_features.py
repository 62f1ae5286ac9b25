"""Features of many CT or MR by a frozen encoder: one vector a case, or maps on their grid with their place in mm.

    python scripts/extract_features.py --weights alice_teacher.pth --data_dir FLARE22 --output_dir features
    python scripts/extract_features.py --weights alice_teacher.pth --data_dir FLARE22 --json_list flare.json \\
        --output_dir features_dense --dense --maps 8 16 --dtype float16 --form npy
    torchrun --nproc_per_node=8 scripts/extract_features.py --weights alice/checkpoint.pth --checkpoint_key teacher \\
        --store_dir store --output_dir features --precision bf16
    python scripts/extract_features.py --weights VoComni_B.pt --backbone swin_unetr_v2 --spacing_mm 1.5 --a_min -175 \\
        --a_max 250 --axcodes RAS --data_dir FLARE22 --output_dir features_voco

Voxel size, HU window, window size and backbone come from the weights' own description; published weights without one
need the flags. An encoder of MR reads files as MR. A case's CASE.json holds the strides, channels, voxel size and
affine (index -> world mm) of its maps. A vector is the mean over the cells of each map, joined in order of rising
strides. The command may be stopped and run again: finished cases are kept while weights, settings and volumes are the
same. In Python: `engine.features.load_features`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.device import pick_device
from engine.features.extractor import EncoderOptions, open_extractor
from engine.features.files import FileOptions, extract_cases
from engine.flags import DeviceOptions, RunInfo, add_options, make_parser, options_of, run_main
from engine.segmentation.sliding_window import WindowOptions
from sam_embed.case_source import CaseOptions, open_cases


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_options(parser.add_argument_group("Encoder"), EncoderOptions)
    add_options(parser.add_argument_group("Volumes"), CaseOptions)
    features = parser.add_argument_group("Features")
    features.add_argument("--output_dir", type=str, required=True, help="folder of the features; made if missing")
    add_options(features, FileOptions)
    running = parser.add_argument_group("Running")
    add_options(running, WindowOptions)
    add_options(running, DeviceOptions)
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    options = options_of(flags, FileOptions)
    device = pick_device(flags.device, int(os.environ.get("LOCAL_RANK", 0)))
    extractor = open_extractor(
        options_of(flags, EncoderOptions), device, flags.precision, flags.overlap, flags.window_batch
    )
    known = extractor.preprocessing
    cases = open_cases(options_of(flags, CaseOptions), rank, known.mr_percentiles)
    if rank == 0:
        for line in (*(f"warning: {note}" for note in extractor.notes), extractor.report.describe()):
            print(line, flush=True)
        RunInfo.collect(flags).write(flags.output_dir, "features_run.json")
    report = extract_cases(extractor, cases, flags.output_dir, options, rank, world_size)
    for name, reason in report.failed.items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    print(
        f"{flags.output_dir}: rank {rank} of {world_size} wrote the features of {len(report.written)} cases, "
        f"{len(report.reused)} were there already, {len(report.failed)} failed"
    )
    if report.failed and not (report.written or report.reused):
        raise ValueError(f"{flags.output_dir}: no case could be read; the reasons are above")


if __name__ == "__main__":
    run_main(main)

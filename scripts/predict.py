"""Segment one CT, MR or radiograph with a finetuned network; the label map lies on the image's own voxels.

    python scripts/predict.py IMAGE.nii.gz LABELS.nii.gz --checkpoint_file results/finetune/best.pth
    python scripts/predict.py IMAGE.nii.gz LABELS.nii.gz --checkpoint_file best.pth --device cpu --overlap 0.25
    python scripts/predict.py IMAGE.png MASK.png --checkpoint_file results/radiographs/best.pth
    python scripts/predict.py T1.nii.gz LABELS.nii.gz --further_channels T2.nii.gz --checkpoint_file results/mr/best.pth

Where the network remembers labelled cases (--memory of scripts/finetune_segmentation.py), their labels are carried to
the image and help. This needs the SAM that embedded them (--sam_checkpoint); --memory false leaves it out.

An MR's intensities are mapped as those of the training volumes were (scripts/prepare_volumes.py --modality mr).
The image may have any size, spacing and orientation. Memory stays bounded: the volume itself (4 bytes a voxel) and a
slab as thick as a window; nothing grows with the number of organs times the volume.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from datasets.ct.formats import EXPECTED, NIFTI_SUFFIXES
from datasets.ct.images import CT, RADIOGRAPH, kind_of, write_labels_like
from datasets.ct.intensity import NO_AIR_HU, few_whole_values
from datasets.ct.nifti import Volume
from datasets.ct.radiograph import SUFFIX
from datasets.lists.data_list import unique_names
from engine.device import explained_out_of_memory, keep_freed_memory, pick_device
from engine.flags import DeviceOptions, add_options, make_parser, options_of, run_main
from engine.segmentation.memory import Recall, RecallOptions
from engine.segmentation.prior import Prior
from engine.segmentation.segmenter import open_segmenter
from engine.segmentation.sliding_window import WindowOptions


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    parser.add_argument("image", type=str, help=f"CT or MR to segment ({EXPECTED}), or radiograph, .png")
    parser.add_argument(
        "--further_channels", type=str, nargs="+", default=[], help="of an MR in several files, those after the first"
    )
    parser.add_argument(
        "output", type=str, help="label map to write: .nii or .nii.gz of CT and MR, .png of a radiograph"
    )
    parser.add_argument(
        "--checkpoint_file", type=str, required=True, help="best.pth of a finetuning run, or hf://owner/name"
    )
    add_options(parser, WindowOptions)
    add_options(parser, RecallOptions)
    add_options(parser, DeviceOptions)
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    is_picture = kind_of(flags.image) == RADIOGRAPH
    suffixes = (SUFFIX,) if is_picture else NIFTI_SUFFIXES
    if not flags.output.endswith(suffixes):
        raise ValueError(f"{flags.output}: expected a name ending in {' or '.join(suffixes)}")
    if Path(flags.output).exists() and Path(flags.image).exists() and Path(flags.output).samefile(flags.image):
        raise ValueError(f"{flags.output} is the image itself, which its labels would replace; give another name")
    device = pick_device(flags.device, 0)
    if device.type == "cpu":
        keep_freed_memory()
    segmenter = open_segmenter(
        flags.checkpoint_file,
        device,
        flags.overlap,
        flags.window_batch,
        flags.precision,
        options_of(flags, RecallOptions),
    )
    segmenter.check_image(flags.image)
    volume = segmenter.preprocessing.read(
        [flags.image, *flags.further_channels] if flags.further_channels else flags.image
    )
    if segmenter.preprocessing.images == CT:
        check_is_ct(volume)
    with explained_out_of_memory(flags, "window_batch precision", "lower --window_batch, or use --device cpu"):
        resampled, prior = segmenter.on_own_grid(volume), None
        if segmenter.recall is not None:
            prior = recalled(segmenter.recall, volume)
        found = segmenter.segment(resampled, volume, prior)
    write_labels_like(flags.output, segmenter.classes.to_values(found), flags.image)
    size, unit = (1.0, "pixels") if is_picture else (float(np.prod(volume.spacing_mm)) / 1000, "ml")
    counts = sum(np.bincount(plane.ravel(), minlength=len(segmenter.classes)) for plane in found)
    for name, value, count in zip(segmenter.classes.names[1:], segmenter.classes.values[1:], counts[1:]):
        print(f"{value:4d} {name}: {count * size:.1f} {unit}")
    print(f"wrote {flags.output}: {' x '.join(map(str, found.shape))} voxels (D, H, W), as {flags.image}")


def recalled(recall: Recall, volume: Volume) -> Prior | None:
    """What the remembered cases say of a volume; prints how it is used."""
    prior = recall.prior(recall.scan(volume, *unique_names([volume.path])))
    print(recall.memory.describe())
    if prior is None:
        print("the memory is not used: it holds nothing but this very case, or the scan shows no patient")
    else:
        print(f"carried the labels of {prior.num_cases} of them, to {prior.known_share:.0%} of the scan")
    return prior


def check_is_ct(volume: Volume) -> None:
    """Refuse a label map, and warn of a volume without air.

    Raises:
        ValueError: the values are few, whole and none below zero.
    """
    if num_values := few_whole_values(volume.array):
        raise ValueError(f"{volume.path}: only {num_values} whole values, none below zero: a label map? Expected a CT")
    if volume.array.min() > NO_AIR_HU:
        print(
            f"warning: {volume.path} holds nothing below {NO_AIR_HU} HU, where air lies: MR, or scanner values 1024 "
            "above HU? The network expects HU",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_main(main)

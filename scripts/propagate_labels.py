"""Carry the labels of one or more labelled CT to any number of unlabelled ones, without training a segmenter.

    python scripts/propagate_labels.py --reference a.nii.gz b.nii.gz --labels a_label.nii.gz b_label.nii.gz \\
        --images folder_of_ct --output_dir carried
    python scripts/propagate_labels.py --reference phantoms --images ct.nii.gz --output_dir organs
    torchrun --nproc_per_node=8 scripts/propagate_labels.py --checkpoint_file SAM.pth --reference a.nii.gz \\
        --labels a_label.nii.gz --images c.nii.gz d.nii.gz --output_dir carried --data_list carried/list.json

For every image, on its own voxels:

    NAME_label.nii.gz        the references' label values; 0 is background, and what no reference shows
    NAME_confidence.nii.gz   0 to 1, the trusted share of the references that vote for this label; 0 = not shown
    NAME.png                 an axial and a coronal plane: the image, its labels, their confidence

With --save_displacement and --warp also, for every reference REF:

    NAME_to_REF_displacement.nii.gz   where the image's places lie in the reference, mm, as ITK and 3D Slicer read it
    NAME_from_REF.nii.gz              the reference, moved onto the image's voxels

Several references vote. The word `phantoms` stands for labelled phantoms that come with the repository, so that nobody
must have drawn a label (FLARE22's values; organs that phantoms do not find on real CT stay empty). A network that was
taught with phantoms has its say there (--organ_network). For research, not for clinical use. May be stopped and run
again: finished images are skipped, unless --overwrite is given. The files of an image are written aside and then
renamed, the labels last.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from datasets.ct.displacement import warp, write_displacement
from datasets.ct.file_grid import FileGrid, read_file_grid, write_confidence_like, write_ct_like, write_label_like
from datasets.ct.formats import EXPECTED
from datasets.ct.images import CT, kind_of
from datasets.ct.nifti import Volume, read_ct, read_label, read_label_of
from datasets.lists.data_list import Case, DataListError, unique_names, write_data_list
from datasets.lists.label_classes import LabelClasses
from datasets.lists.search import find_cases
from engine import distributed
from engine.embedding_flags import add_embedding_flags
from engine.flags import RunInfo, add_options, add_switch, flags_as_dict, make_parser, run_main
from engine.references import (
    PHANTOMS,
    add_organ_network,
    check_embedded_by,
    check_organ_network,
    classes_of,
    open_organ_network,
    open_phantoms,
    opinion_of,
)
from engine.segmentation.pictures import save_carried
from sam_embed.checkpoint import EmbedderOptions, load_embedder
from sam_embed.embeddings.embed import embed_volume, for_inference
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.carry import carry_labels
from sam_embed.matching.dense import dense_map
from sam_embed.matching.reference import Reference

DECIDING = ("checkpoint_file", "reference", "labels")  # flags that labels in one folder must share
RUN_FILE = "run.json"


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_options(parser, EmbedderOptions)
    data = parser.add_argument_group("data")
    reference_help = f"labelled CT, one or more files; or the word {PHANTOMS}"
    data.add_argument("--reference", type=str, nargs="+", required=True, help=reference_help)
    labels_help = f"their label maps, in the same order; none with {PHANTOMS}"
    data.add_argument("--labels", type=str, nargs="+", default=[], help=labels_help)
    add_organ_network(data)
    data.add_argument("--images", type=str, nargs="+", required=True, help="CT to label: files, or folders of them")
    data.add_argument("--output_dir", type=str, required=True, help="folder of the results; made if missing")
    list_help = "data list (JSON) of the labelled images, for finetuning with --data_dir OUTPUT_DIR"
    data.add_argument("--data_list", type=str | None, default=None, help=list_help)
    references_help = "list the references too, with weight 1; a finetuning with --memory then remembers them alone"
    add_switch(data, "--list_references", False, references_help)
    add_switch(data, "--overwrite", False, "label images again that are finished")
    add_switch(data, "--save_displacement", False, "write the displacement field to each reference")
    add_switch(data, "--warp", False, "write each reference moved onto the image's voxels")
    add_embedding_flags(parser, memory_mb=1024.0)
    return parser


def check_references(flags: jsonargparse.Namespace) -> None:
    """Check that references and labels exist, as many of one as of the other, or that the phantoms stand alone and the
    network that helps them exists.

    Raises:
        ValueError: they are not.
    """
    if PHANTOMS in flags.reference:
        if len(flags.reference) > 1 or flags.labels:
            raise ValueError(f"--reference {PHANTOMS} stands alone and without --labels: phantoms bring their own")
        if flags.warp or flags.save_displacement:
            raise ValueError(
                f"--warp and --save_displacement need references of your own: of the {PHANTOMS} only embeddings and "
                "labels come along"
            )
        if flags.list_references:
            raise ValueError(f"--list_references lists files of your own, and the {PHANTOMS} have none")
        check_organ_network(flags.organ_network)
        return
    if flags.list_references and not flags.data_list:
        raise ValueError("--list_references needs --data_list, the file to list them in")
    if len(flags.reference) != len(flags.labels):
        raise ValueError(
            f"--reference names {len(flags.reference)} files and --labels {len(flags.labels)}; expected one label map "
            "for each reference, in the same order"
        )
    for flag, paths in (("--reference", flags.reference), ("--labels", flags.labels)):
        for path in paths:
            if not Path(path).exists():
                raise ValueError(f"{flag} {path}: no such file or folder")


def find_images(words: list[str], output_dir: str) -> dict[str, Path]:
    """Name -> file of each image: the files themselves, and every CT below the folders.

    Raises:
        ValueError: neither file nor folder, a folder without CT or with the output in it, a radiograph, or two images
            of one name.
    """
    files = []
    for word in words:
        path = Path(word)
        if not path.exists():
            raise ValueError(f"--images {word}: no such file or folder")
        if Path(output_dir).resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--output_dir {output_dir} lies in --images {word}, where results would be taken for images later; "
                "choose another folder"
            )
        try:
            files += [case.image for case in find_cases(path)] if path.is_dir() else [path]
        except DataListError as error:
            raise ValueError(f"--images {word}: {error}") from error
    for file in files:
        if kind_of(file) != CT:
            raise ValueError(f"--images {file}: expected CT, {EXPECTED}")
    return dict(zip(unique_names([file.as_posix() for file in files]), files))


def claim_folder(flags: jsonargparse.Namespace) -> None:
    """Write run.json, unless the folder holds labels that were carried from other references.

    Raises:
        ValueError: it does.
    """
    record = Path(flags.output_dir) / RUN_FILE
    if record.is_file() and not flags.overwrite:
        before, now = json.loads(record.read_text())["flags"], flags_as_dict(flags)
        deciding = (*DECIDING, "organ_network") if PHANTOMS in flags.reference else DECIDING
        differing = [f"--{name} {before.get(name)}" for name in deciding if before.get(name) != now[name]]
        if differing:
            raise ValueError(
                f"{flags.output_dir}: holds labels made with {', '.join(differing)}. Choose another --output_dir, or "
                "pass --overwrite to replace them"
            )
    RunInfo.collect(flags).write(flags.output_dir, RUN_FILE)


class Registered(NamedTuple):
    """The files of one image and one reference; None where the flags do not ask for it."""

    displacement: Path | None
    warped: Path | None


class Results(NamedTuple):
    """The files of one image; `registered` has one entry for each reference, or none at all."""

    registered: list[Registered]
    picture: Path
    confidence: Path
    label: Path

    def are_there(self) -> bool:
        """Whether all of them exist."""
        further = [file for files in self.registered for file in files if file is not None]
        return all(file.is_file() for file in (*further, self.picture, self.confidence, self.label))


def results_of(flags: jsonargparse.Namespace, name: str) -> Results:
    """What is written of an image."""
    folder, registered = Path(flags.output_dir), []
    if flags.save_displacement or flags.warp:
        for reference in unique_names([Path(file).as_posix() for file in flags.reference]):
            displacement = folder / f"{name}_to_{reference}_displacement.nii.gz" if flags.save_displacement else None
            registered.append(
                Registered(displacement, folder / f"{name}_from_{reference}.nii.gz" if flags.warp else None)
            )
    own = (folder / f"{name}{ending}" for ending in (".png", "_confidence.nii.gz", "_label.nii.gz"))
    return Results(registered, *own)


class Propagator:
    """Carries labels from fixed references to one scan at a time.

    Args:
        flags: of this command.
        classes: of the references; other labels of theirs are left out.
        device: where scans are embedded.
        references: the phantoms; None = the files that the flags name.

    Raises:
        ValueError: phantoms of another SAM, or a network that does not know their organs.
    """

    def __init__(
        self,
        flags: jsonargparse.Namespace,
        classes: LabelClasses,
        device: torch.device,
        references: list[Reference] | None = None,
    ) -> None:
        self.classes = classes
        network, self.info = load_embedder(flags.checkpoint_file)
        self.network = for_inference(network, flags.precision).to(device)
        self.memory_mb = flags.memory_mb
        self.organ_network = None
        if references is None:
            references = [self._reference(*paths) for paths in zip(flags.reference, flags.labels)]
        else:
            check_embedded_by(references, self.info, flags.checkpoint_file, "--reference")
            self.organ_network = open_organ_network(flags.organ_network, references, device)
        self.references, self.files = references, flags.reference

    def _reference(self, image: str, label: str) -> Reference:
        volume = read_ct(image)
        labels = read_label_of(volume, label)
        return Reference(
            embed_volume(self.network, volume, self.info, self.memory_mb, image), labels.array, labels.affine
        )

    def label(self, name: str, image: Path, results: Results) -> None:
        """Write the results of one image; its labels come last, so that they say that it is finished."""
        results.label.unlink(missing_ok=True)
        volume, grid = read_ct(image), read_file_grid(image)
        scan = embed_volume(self.network, volume, self.info, self.memory_mb, name)
        for reference, file, files in zip(self.references, self.files, results.registered):
            self._register(scan, volume, grid, reference, file, files)
        opinion = opinion_of(self.organ_network, volume)
        labels, confidence = carry_labels(
            scan, self.references, volume.shape, volume.affine, hu=volume.array, opinion=opinion
        )
        channels = self.classes.to_classes(labels)
        confidence[(labels != 0) & (channels == 0)] = 0  # an organ that is left out
        save_carried(results.picture, volume, channels, confidence, self.classes.names)
        write_confidence_like(results.confidence, confidence, grid)
        write_label_like(results.label, self.classes.to_values(channels), grid)

    def _register(
        self, scan: Embedding, volume: Volume, grid: FileGrid, reference: Reference, file: str, files: Registered
    ) -> None:
        """Write where a scan's places lie in a reference, and the reference moved onto the scan's voxels."""
        found = dense_map(scan, reference.embedding)
        if files.displacement:
            write_displacement(files.displacement, found.displacement_mm, found.affine)
        if files.warped:
            hu = warp(read_ct(file), found.displacement_mm, found.affine, volume.shape, volume.affine)
            write_ct_like(files.warped, hu, grid)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    check_references(flags)
    images = find_images(flags.images, flags.output_dir)
    if PHANTOMS in flags.reference:
        references, classes = open_phantoms()
    else:
        references, classes = None, classes_of(map(read_label, flags.labels))
    world = distributed.start(flags.device)
    distributed.main_decides(world, lambda: claim_folder(flags))
    results = {name: results_of(flags, name) for name in images}
    share = list(images)[world.rank :: world.size]
    finished = [name for name in share if results[name].are_there()]
    todo = [name for name in share if flags.overwrite or name not in finished]
    failed = {}
    if todo:
        propagator = Propagator(flags, classes, world.device, references)
        bar = tqdm(todo, desc="labelling", unit="scan", disable=not world.is_main)
        for name in bar:
            bar.set_postfix_str(name)
            try:
                propagator.label(name, images[name], results[name])
            except (ValueError, RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
                failed[name] = str(error) or type(error).__name__
    distributed.wait_for_all(world)
    parts = distributed.gather_objects((len(share) - len(todo), failed))
    if world.is_main:
        failed = {name: reason for _, part in parts for name, reason in part.items()}
        report(flags, classes, images, results, sum(num_skipped for num_skipped, _ in parts), failed)
    distributed.stop()


def report(
    flags: jsonargparse.Namespace,
    classes: LabelClasses,
    images: dict[str, Path],
    results: dict[str, Results],
    num_skipped: int,
    failed: dict[str, str],
) -> None:
    """Print what was done, and write the data list.

    Raises:
        ValueError: no image could be labelled.
    """
    for name, reason in failed.items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    labelled = [name for name in images if name not in failed]
    num_new = len(labelled) - num_skipped
    print(f"{flags.output_dir}: {num_new} labelled, {num_skipped} were finished, {len(failed)} failed")
    if not labelled:
        raise ValueError(f"{flags.output_dir}: no image could be labelled; the reasons are above")
    if flags.data_list:
        cases = list_cases(images, results, labelled)
        left_out = f"; {len(labelled) - len(cases)} images without any label left out" * (len(cases) < len(labelled))
        if flags.list_references:
            cases = with_references(flags, cases)
        labels = {str(value): name for value, name in zip(classes.values, classes.names)}
        write_data_list(flags.data_list, flags.output_dir, cases, labels=labels)
        print(f"wrote {flags.data_list}{left_out}")


def list_cases(images: dict[str, Path], results: dict[str, Results], labelled: list[str]) -> list[Case]:
    """Cases to finetune with, each weighed by the mean confidence of its labelled voxels; those without any are left
    out.
    """
    cases = []
    for name in labelled:
        confidence = np.asarray(nib.load(results[name].confidence).dataobj)
        sure = confidence[np.asarray(nib.load(results[name].label).dataobj) > 0]
        if len(sure) and (weight := round(float(sure.mean()), 3)):
            cases.append(Case(name, images[name].resolve(), results[name].label, weight=weight))
    return cases


def with_references(flags: jsonargparse.Namespace, cases: list[Case]) -> list[Case]:
    """The references, whose labels were drawn, before the cases; an image that is a reference is listed once, as it."""
    files = [Path(path).resolve() for path in flags.reference]
    others = [case for case in cases if case.image not in files]
    taken, references = {case.name for case in others}, []
    for name, image, label in zip(unique_names([file.as_posix() for file in files]), files, flags.labels):
        references.append(Case(f"reference_{name}" if name in taken else name, image, Path(label).resolve()))
    return references + others


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)

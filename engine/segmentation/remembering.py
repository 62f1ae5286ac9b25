"""What a finetuning run does for its memory: it embeds labelled cases, and learns how strongly they should speak.

Weight and blur of the carried labels are learnt by leaving one remembered case out after the other. The labels of the
others are carried to it and added to the network's log-probabilities, with every weight and blur in turn; the pair with
the best mean Dice is kept. The network was trained on that case and is surer of it than of a new one, so that small
weights look better than they are: none below 2 is tried. Between 2 and 5 results on new cases hardly differ.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from datasets.ct.nifti import Volume
from datasets.lists.data_list import Case
from datasets.lists.label_classes import LabelClasses
from datasets.store.volumes import VolumeStore
from engine.checkpoint import load_checkpoint
from engine.loop import evaluating
from engine.segmentation.evaluation import ct_reader, label_of
from engine.segmentation.flags import FinetuneOptions
from engine.segmentation.loop import BEST, replace_best
from engine.segmentation.memory import Memory, MemoryOptions, RecallOptions, Sam, Scan, make_memory
from engine.segmentation.prior import LEAST_PROBABILITY, prior_of
from engine.segmentation.segmenter import Segmenter, open_segmenter
from engine.segmentation.setup import KIND

WEIGHTS = (2.0, 3.0, 4.0, 5.0)
BLURS_MM = (0.0, 1.5, 3.0, 6.0)
MOST_LEFT_OUT = 4  # the first so many cases are left out in turn: each takes as long as a prediction from all others


def remember_cases(
    cases: list[Case], store: VolumeStore, classes: LabelClasses, sam: Sam, options: MemoryOptions
) -> Memory:
    """The memory of the first labelled cases, from their files, or from the store where there are none any more.

    Cases of a weight below 1 have carried labels: they are remembered where no others are listed.
    """
    drawn = [case for case in cases if case.weight >= 1]
    kept = (drawn or cases)[: options.memory_cases or None]
    read = ct_reader(kept, store)
    scans = ((sam.embed(read(case.name), case.name), label_of(case, store, classes)) for case in kept)
    return make_memory(scans, sam, len(classes), options)


def learn_memory(store: VolumeStore, options: FinetuneOptions, device: torch.device) -> None:
    """Learn what flags leave open of the memory of best.pth, where it holds two cases, and write it there.

    Args:
        store: holds the remembered cases and their labels on the network's grid.
    """
    best = Path(options.output_dir) / BEST
    state = load_checkpoint(best, KIND)
    memory = Memory(**state["memory"])
    is_open = None in (options.memory_weight, options.memory_blur_mm)
    if memory.is_learnt or not is_open or len(memory.names) < 2:
        return
    recall = RecallOptions(True, options.sam_checkpoint)
    segmenter = open_segmenter(best, device, options.val_overlap, options.window_batch, options.precision, recall)

    def read(name: str) -> tuple[Volume, np.ndarray]:
        return store.read(name), segmenter.classes.to_classes(store.read_label(name).array)

    weight, blur_mm = learn_strength(segmenter, read, options)
    memory = dataclasses.replace(memory, weight=weight, blur_mm=blur_mm, is_learnt=True)
    replace_best(state | {"memory": memory.as_dict()}, options.output_dir)
    print(memory.describe(), flush=True)


def learn_strength(
    segmenter: Segmenter, read: Callable[[str], tuple[Volume, np.ndarray]], options: MemoryOptions
) -> tuple[float, float]:
    """The weight and the blur (mm) with which remembered cases help best with one another.

    Args:
        segmenter: with its memory of two cases or more.
        read: name of a remembered case -> its volume and its channels [D, H, W], both on the network's grid.
        options: what is set in them is not changed.
    """
    weights = WEIGHTS if options.memory_weight is None else (options.memory_weight,)
    blurs_mm = BLURS_MM if options.memory_blur_mm is None else (options.memory_blur_mm,)
    pairs = list(itertools.product(weights, blurs_mm))
    with evaluating(segmenter.network):
        dice = [left_out_dice(segmenter, *read(name), name, pairs) for name in segmenter.recall.names[:MOST_LEFT_OUT]]
    return pairs[int(np.mean(dice, axis=0).argmax())]


@torch.no_grad()
def left_out_dice(
    segmenter: Segmenter, volume: Volume, truth: np.ndarray, name: str, pairs: list[tuple[float, float]]
) -> np.ndarray:
    """Mean Dice [P] over the organs of a case with each pair of weight and blur, from the other cases' labels."""
    num_classes, recall = len(segmenter.classes), segmenter.recall
    votes, num_cases = recall.votes(Scan.of(volume, recall.reference_of(name).embedding))
    blurs_mm = sorted({blur_mm for _, blur_mm in pairs})
    priors = [prior_of(votes, num_classes, 1.0, blur_mm, num_cases) for blur_mm in blurs_mm]
    added = zip(*(prior.slices(volume.shape, volume.affine) for prior in priors))
    counts = np.zeros((len(pairs), 3, num_classes), dtype=np.int64)  # found, both, true
    for plain, true, logs in zip(segmenter.slices(volume), truth, added):
        plain = plain.clamp_min(LEAST_PROBABILITY).log_().cpu()
        for number, (weight, blur_mm) in enumerate(pairs):
            found = (plain + weight * logs[blurs_mm.index(blur_mm)]).argmax(0).numpy()
            both = np.where(found == true, found, 0)
            counts[number] += [np.bincount(part.ravel(), minlength=num_classes) for part in (found, both, true)]
    found, both, true = counts[:, :, 1:].transpose(1, 0, 2)
    present = true[0] > 0
    return (2 * both / np.maximum(found + true, 1))[:, present].mean(axis=1)

"""How good carried labels are among phantoms: each of a few labelled ones labels all others alone, then all together.

    python -m benchmarks.label_transfer --data_dir phantom --json_list phantom_labelled.json --output transfer.json

The first cases of the list are the references, the next ones are labelled from them (`sam_embed.matching.carry`) and
compared with their true labels. Dice counts where both scans show the organ: a reference without a gallbladder is not
asked for one. Means are over organs, then cases, then references.
"""

from collections import defaultdict

import jsonargparse
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.results import benchmark_parser, command, table
from datasets.ct.nifti import read_ct, read_label_of
from datasets.lists.data_list import Case, load_sections
from datasets.lists.label_classes import FLARE22
from datasets.phantom.cases import GENERATOR
from engine.segmentation.metrics import score_case
from sam_embed.checkpoint import SHIPPED, load_embedder
from sam_embed.embeddings.embed import embed_volume, for_inference
from sam_embed.matching.carry import NODE_MM, carry_labels
from sam_embed.matching.nodes import thinned
from sam_embed.matching.reference import Reference

NAMES = ("background", *FLARE22)
TOGETHER = "all references"


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, num_threads=2)
    add = parser.add_argument
    add("--data_dir", type=str, required=True, help="folder of the phantoms")
    add("--json_list", type=str, required=True, help="data list with their labels; all of its sections count")
    add("--checkpoint_file", type=str, default=str(SHIPPED), help="SAM's weights")
    add("--num_references", type=int, default=3, help="labelled cases")
    add("--num_cases", type=int, default=12, help="cases to label")
    return parser


@torch.no_grad()
def run(flags: jsonargparse.Namespace) -> dict:
    """Carry and judge.

    Raises:
        ValueError: the list holds fewer labelled cases than the flags ask for.
    """
    cases = [case for case in load_sections(flags.json_list, flags.data_dir, ("training", "validation")) if case.label]
    wanted = flags.num_references + flags.num_cases
    if min(flags.num_references, flags.num_cases) < 1 or len(cases) < wanted:
        raise ValueError(
            f"{flags.json_list}: {len(cases)} labelled cases; --num_references {flags.num_references} and --num_cases "
            f"{flags.num_cases} (each 1 or more) need {wanted}"
        )
    torch.set_num_threads(flags.num_threads)
    network, info = load_embedder(flags.checkpoint_file)
    network = for_inference(network)

    def opened(case: Case) -> tuple:
        volume = read_ct(case.image)
        return volume, read_label_of(volume, case.label), embed_volume(network, volume, info, name=case.name)

    references = []
    for case in cases[: flags.num_references]:
        _, label, embedding = opened(case)
        references.append(Reference(thinned(embedding, NODE_MM), label.array, label.affine))
    sets = {reference.embedding.name: [reference] for reference in references}
    sets |= {TOGETHER: references} if len(references) > 1 else {}
    dice = {name: [] for name in sets}
    for case in tqdm(cases[flags.num_references : wanted], desc="labelling", unit="scan"):
        volume, truth, embedding = opened(case)
        for name, asked in sets.items():
            found = carry_labels(embedding, asked, truth.shape, truth.affine, hu=volume.array).labels
            shown = set.union(*(set(np.unique(reference.labels).tolist()) for reference in asked))
            scores = score_case(case.name, found.astype(np.uint8), truth.array, truth.spacing_mm, NAMES, 0.0)
            covered = {NAMES[value] for value in shown}
            dice[name].append({s.organ: s.dice for s in scores if s.truth_ml > 0 and s.organ in covered})
    return {"generator": GENERATOR, "checkpoint_file": flags.checkpoint_file, "dice": dice, "mean": summary(dice)}


def summary(dice: dict[str, list[dict[str, float]]]) -> dict:
    """Mean Dice over cases: of every organ alone and together, and of their mean over organs.

    Args:
        dice: for each set of references, Dice of each organ for every case.
    """
    means = {}
    for kind in ("alone", "together"):
        chosen = [
            found for name, cases in dice.items() if (name == TOGETHER) == (kind == "together") for found in cases
        ]
        if chosen:
            organs = defaultdict(list)
            for found in chosen:
                for organ, value in found.items():
                    organs[organ].append(value)
            means[kind] = {organ: float(np.mean(organs[organ])) for organ in FLARE22 if organs[organ]}
            means[kind]["mean"] = float(np.mean([np.mean(list(found.values())) for found in chosen]))
    return means


def markdown(found: dict) -> str:
    """A line for each organ: one reference, all of them."""
    means = found["mean"]
    organs = list(means["alone"])
    lines = [(organ, *(f"{column[organ]:.2f}" for column in means.values())) for organ in organs]
    return table(lines, (f"Dice, generator {found['generator']}", *means))


main = command(__name__, make_flags, run, markdown)

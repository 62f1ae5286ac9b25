"""What phantoms teach about real CT: their labels, carried to a real abdomen by a SAM that saw only phantoms.

    python -m benchmarks.labels_from_phantoms --output results/benchmarks/labels_from_phantoms.json

A SAM is trained on labelled phantoms, without their labels. Phantoms then vote with their labels on every voxel of the
tests' real abdomen (`sam_embed.matching.carry`), and the result is compared with that scan's reference labels (a
model's, see ATTRIBUTION.md in --ct_dir). Nothing real and no label of a real scan is used before that. The figures
judge the phantom generator, whose version they name: a phantom is as good as what it teaches about real CT.

Stages are kept in --work_dir and skipped when they are done; the phantoms are made by the generator of this commit.
An hour for three trainings on 2 CPU cores. With --shipped nothing is trained: SAM, phantoms and network that come with
the repository are judged, as `propagate_labels.py --reference phantoms` uses them, in five minutes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import numpy as np
import torch

from benchmarks.comparison.jobs import Call, Job, Records, run_jobs
from benchmarks.real_ct_matching import ABDOMEN
from benchmarks.results import benchmark_parser, command, real_ct_dir, table
from datasets.ct.nifti import Volume, read_ct, read_label
from datasets.lists.data_list import Case, load_data_list
from datasets.lists.label_classes import FLARE22
from datasets.phantom.cases import GENERATOR
from engine.flags import add_switch, available_cpus
from engine.references import SHIPPED_NETWORK, open_organ_network, open_phantoms, opinion_of
from engine.segmentation.metrics import score_case
from sam_embed.checkpoint import SHIPPED, load_embedder
from sam_embed.embeddings.embed import embed_volume, for_inference
from sam_embed.embeddings.embedding_store import Embedding, load_embedding
from sam_embed.matching.carry import carry_labels
from sam_embed.matching.opinion import Opinion
from sam_embed.matching.reference import Reference

# What the abdomen's label calls by another name than FLARE22.
OTHER_NAMES = {
    "right kidney": "kidney_right",
    "left kidney": "kidney_left",
    "inferior vena cava": "inferior_vena_cava",
    "right adrenal gland": "adrenal_gland_right",
    "left adrenal gland": "adrenal_gland_left",
}
QUICK = {
    "num_phantoms": 4,
    "seeds": [0],
    "sam_flags": "--steps=2 --width=8 --embed_dim=8 --view_shape 32 32 32 --num_points=32",
}


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "four phantoms and two steps: to see that it runs", num_threads=2)
    add = parser.add_argument
    add("--work_dir", type=str, default="results/labels_from_phantoms", help="phantoms, weights, embeddings")
    add("--ct_dir", type=str, default=str(real_ct_dir()), help="folder of the real abdomen and its labels")
    add("--num_phantoms", type=int, default=32, help="labelled phantoms; all of them train SAM and vote")
    add("--data_seed", type=int, default=0, help="of the phantoms")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of SAM's trainings, one each")
    add("--sam_config", type=str, default="configs/sam_quickstart.yaml", help="recipe of SAM's training")
    add("--sam_flags", type=str, default="--steps=600 --time_limit_min=0", help="its further flags, in quotes")
    add_switch(parser, "--shipped", False, "judge what comes with the repository instead of training")
    return parser


def make_jobs(root: Path, flags: jsonargparse.Namespace) -> list[Job]:
    """Phantoms, their list and store; then weights and embeddings for each seed."""
    data, listed, store = root / "data", root / "data.json", root / "store"
    phantoms = Call.of(
        "scripts.make_phantom_dataset",
        out_dir=data,
        num_unlabelled=0,
        num_labelled=flags.num_phantoms,
        seed=flags.data_seed,
        num_workers=available_cpus(),
    )
    listing = Call.of("scripts.create_json", data_dir=data, output=listed, cases="labelled", num_validation=0)
    where = {"data_dir": data, "json_list": listed, "store_dir": store}
    storing = Call.of("scripts.prepare_volumes", **where, spacing_mm=4)
    jobs = [Job("data/phantoms", (phantoms, listing, storing))]
    for seed in flags.seeds:
        weights = weights_dir(root, seed)
        training = Call.of(
            "scripts.train_sam",
            *flags.sam_flags.split(),
            config=flags.sam_config,
            **where,
            output_dir=weights,
            seed=seed,
        )
        embedding = Call.of(
            "scripts.generate_sam_embeddings",
            checkpoint_file=weights / "checkpoint_best.pth",
            store_dir=store,
            embed_dir=weights / "embeddings",
        )
        jobs.append(Job(f"sam/seed{seed}", (training, embedding), weights, after=(jobs[0],)))
    return jobs


def weights_dir(root: Path, seed: int) -> Path:
    """Where one training's weights and embeddings lie."""
    return root / f"sam_seed{seed}"


class Phantoms(Sequence):
    """The labelled phantoms as references, each read when it is asked for."""

    def __init__(self, cases: Sequence[Case], embed_dir: Path) -> None:
        self._cases, self._embed_dir = cases, embed_dir

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, number: int) -> Reference:
        case = self._cases[number]
        label = read_label(case.label)
        return Reference(load_embedding(self._embed_dir, case.name), label.array, label.affine)


def read_truth(ct_dir: Path) -> Volume:
    """The abdomen's reference labels with FLARE22's values."""
    label = read_label(ct_dir / f"{ABDOMEN}_label.nii.gz")
    stated = json.loads((ct_dir / f"{ABDOMEN}_label_names.json").read_text())
    value_of = {name: int(value) for value, name in stated.items()}
    truth = np.zeros(label.shape, np.uint8)
    for value, name in enumerate(FLARE22, start=1):
        truth[label.array == value_of.get(OTHER_NAMES.get(name, name), -1)] = value
    return Volume(truth, label.affine, label.path)


def embed(weights: Path, scan: Volume) -> Embedding:
    """The real scan's embedding."""
    network, info = load_embedder(weights)
    return embed_volume(for_inference(network), scan, info, name=ABDOMEN)


def judge(
    embedding: Embedding, references: Sequence[Reference], scan: Volume, truth: Volume, opinion: Opinion | None = None
) -> dict[str, float]:
    """Dice of each organ that the real scan shows, and their mean."""
    carried = carry_labels(embedding, references, truth.shape, truth.affine, hu=scan.array, opinion=opinion)
    return dice_of(carried.labels, truth)


def dice_of(labels: np.ndarray, truth: Volume) -> dict[str, float]:
    """Dice of each organ that the truth holds, and their mean."""
    names = ("background", *FLARE22)
    scores = score_case(ABDOMEN, labels.astype(np.uint8), truth.array, truth.spacing_mm, names, 0.0)
    found = {score.organ: score.dice for score in scores if score.truth_ml > 0}
    return {**found, "mean": float(np.mean(list(found.values())))}


def judge_shipped(scan: Volume, truth: Volume) -> dict[str, dict[str, float]]:
    """Dice of the phantoms' labels alone, of the network alone, and of both."""
    references, _ = open_phantoms()
    network = open_organ_network(str(SHIPPED_NETWORK), references, torch.device("cpu"))
    embedding = embed(SHIPPED, scan)
    alone = network.classes.to_values(network.segment(network.on_own_grid(scan), truth))
    return {
        "phantoms' labels": judge(embedding, references, scan, truth),
        "network": dice_of(alone, truth),
        "both": judge(embedding, references, scan, truth, opinion_of(network, scan)),
    }


def run(flags: jsonargparse.Namespace) -> dict:
    """Make what is missing, carry labels, judge; empty where there is no real CT."""
    if flags.quick:
        for name, value in QUICK.items():
            setattr(flags, name, value)
    ct_dir, root = Path(flags.ct_dir), Path(flags.work_dir).resolve() / f"generator{GENERATOR}"
    wanted = [f"{ABDOMEN}.nii.gz", f"{ABDOMEN}_label.nii.gz", f"{ABDOMEN}_label_names.json"]
    missing = [name for name in wanted if not (ct_dir / name).is_file()]
    if missing:
        print(f"skipped: no real CT in {ct_dir} (lacks {', '.join(missing)}); see --ct_dir and ALICE_SHARED")
        return {}
    scan, truth = read_ct(ct_dir / f"{ABDOMEN}.nii.gz"), read_truth(ct_dir)
    if flags.shipped:
        return {"generator": GENERATOR, "dice": judge_shipped(scan, truth)}
    records = Records(root / "jobs")
    run_jobs(make_jobs(root, flags), records, flags.num_threads, pool=None)
    cases = load_data_list(root / "data.json", root / "data")
    dice = {}
    for seed in flags.seeds:
        weights = weights_dir(root, seed)
        phantoms = Phantoms(cases, weights / "embeddings")
        dice[f"seed{seed}"] = judge(embed(weights / "checkpoint_best.pth", scan), phantoms, scan, truth)
    organs = list(next(iter(dice.values())))
    mean = {organ: float(np.mean([found[organ] for found in dice.values()])) for organ in organs}
    return {
        "generator": GENERATOR,
        "num_phantoms": flags.num_phantoms,
        "sam": f"{flags.sam_config} {flags.sam_flags}",
        "dice": {**dice, "mean": mean},
    }


def markdown(found: dict) -> str:
    """Dice of every organ: a column for each training and their mean, or for each way."""
    columns = found["dice"]
    organs = next(iter(columns.values()))
    lines = [(organ, *(f"{dice[organ]:.2f}" for dice in columns.values())) for organ in organs]
    return table(lines, (f"Dice, generator {found['generator']}", *columns))


main = command(__name__, make_flags, run, markdown)

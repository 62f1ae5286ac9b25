"""Matching real CT: cycle errors between four scans, and how often a point of an organ lands in the same organ.

    python -m benchmarks.real_ct_matching --checkpoint_files phantom=sam/checkpoint_best.pth
    python -m benchmarks.real_ct_matching --output results/benchmarks/real_ct.json --checkpoint_files \\
        phantom=sam/checkpoint_best.pth phantom_and_real=sam_real/checkpoint_best.pth

The scans are the tests' reference CT (--ct_dir): a chest, two upper abdomens and an abdomen with pelvis, of four
patients and three sources. The chest and the abdomen have labels, and share the lungs' lower ends and the spinal cord:
points of these are matched, at the levels that both scans show, and where they land is looked up ("across"). The other
organs have labels in the abdomen only: their points go to an unlabelled upper abdomen and back, or through both of
these ("around"), which finds matches that disagree but not those that agree on a wrong place. No label ever trains.

Weights that have seen real scans: this writes a list of phantoms and the four scans, and says how to train on it.

    python -m benchmarks.real_ct_matching --write_list real_and_phantom.json --data_dir phantom --json_list phantom.json
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import jsonargparse
import numpy as np
from scipy.spatial import cKDTree

from benchmarks.results import benchmark_parser, command, real_ct_dir, table
from datasets.ct.geometry import index_to_world, world_to_index
from datasets.ct.nifti import Volume, read_ct, read_label
from datasets.lists.data_list import Case, load_data_list, write_data_list
from datasets.samples.pairings import PairingOptions
from engine.device import pick_device
from sam_embed.case_source import CaseSource
from sam_embed.checkpoint import load_embedder
from sam_embed.embeddings.corpus import embed_corpus
from sam_embed.embeddings.embed import for_inference
from sam_embed.embeddings.embedding_store import Embedding, load_embedding
from sam_embed.matching.match import Matches, cycle_error_mm, match_points
from sam_embed.matching.mine import MiningOptions, draw_points

CHEST, ABDOMEN = "chest_2mm", "abdomen_pelvis_3mm"
UPPER_ABDOMENS = ("upper_abdomen_5mm_a", "upper_abdomen_5mm_b")
SCANS = (CHEST, *UPPER_ABDOMENS, ABDOMEN)
CHEST_NAMES = {1: "spinal cord", 2: "left lung", 3: "right lung", 4: "tumour"}
# What the chest's label calls by another name; everything else keeps its own.
COMMON_NAMES = {
    "lung_upper_lobe_left": "left lung",
    "lung_lower_lobe_left": "left lung",
    "lung_lower_lobe_right": "right lung",
    "spinal_cord": "spinal cord",
}
LUNGS = ("left lung", "right lung")
# From, to, and what both labels name there. The chest's cord was contoured for radiotherapy and ends above the lungs'
# lower end, so that the abdomen's cord has no place to land in.
ACROSS = ((ABDOMEN, CHEST, LUNGS), (CHEST, ABDOMEN, (*LUNGS, "spinal cord")))
UPPER_ORGANS = (
    ("liver", "spleen", "stomach", "kidney_right", "kidney_left", "gallbladder", "pancreas", "duodenum", "aorta")
    + ("inferior_vena_cava", "adrenal_gland_right", "adrenal_gland_left", "vertebrae_L1", "vertebrae_T12", *LUNGS)
)  # fmt: skip
LEVEL_MARGIN_MM = 5.0
NEAR_MM = 10.0
INSIDE_MM = 1e-3  # of a voxel of the organ, but for rounding
SEED = 0


@dataclass(frozen=True, eq=False)
class Labelled:
    """A label map [D, H, W] (0 is nothing named), its affine, and what its values are called."""

    array: np.ndarray
    affine: np.ndarray
    names: dict[int, str]

    @cache  # noqa: B019 (a few label maps, which live as long as the benchmark)
    def voxels_mm(self, structure: str) -> np.ndarray:
        """World mm [N, 3] of a structure's voxels."""
        values = [value for value, name in self.names.items() if name == structure]
        return index_to_world(self.affine, np.argwhere(np.isin(self.array, values)))

    @cached_property
    def lowest_lung_mm(self) -> float:
        """World z of the lungs' lowest end: levels of two patients are compared from there."""
        return min(self.voxels_mm(name)[:, 2].min() for name in LUNGS if len(self.voxels_mm(name)))

    def distance_mm(self, structure: str, points_mm: np.ndarray) -> np.ndarray:
        """mm [N] from the voxels of world points [N, 3] to a structure's; inf outside of the scan and for NaN."""
        index = np.rint(np.nan_to_num(world_to_index(self.affine, points_mm), nan=-1.0))
        is_scanned = ((index >= 0) & (index <= np.array(self.array.shape) - 1)).all(axis=1)
        nearest, _ = cKDTree(self.voxels_mm(structure)).query(index_to_world(self.affine, index))
        return np.where(is_scanned, nearest, np.inf)


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "40 points a scan, 10 an organ", device=True)
    add = parser.add_argument
    add("--checkpoint_files", type=str, nargs="*", default=[], help="weights, each FILE or NAME=FILE")
    add("--ct_dir", type=str, default=str(real_ct_dir()), help="folder of the four scans")
    add("--num_points", type=int, default=200, help="points per scan, spread over the body, for the cycle error")
    add("--num_organ_points", type=int, default=60, help="points per organ, at most")
    add("--min_score", type=float, default=PairingOptions.min_score, help="lowest score of a match to trust")
    add("--max_cycle_mm", type=float, default=PairingOptions.max_cycle_mm, help="largest cycle error likewise, mm")
    add("--memory_mb", type=float, default=2048.0, help="working memory of the embedding, MB")
    add("--write_list", type=str, default=None, help="write a data list of phantoms and these scans here, and end")
    add("--data_dir", type=str, default="phantom", help="for --write_list: the phantoms' folder")
    add("--json_list", type=str, default="phantom.json", help="for --write_list: their data list")
    return parser


def read_labels(ct_dir: Path) -> dict[str, Labelled]:
    """The two label maps, with the names of structures made common."""
    stated = json.loads((ct_dir / f"{ABDOMEN}_label_names.json").read_text())
    named = {int(value): COMMON_NAMES.get(name, name) for value, name in stated.items()}
    maps = {name: read_label(ct_dir / f"{name}_label.nii.gz") for name in (CHEST, ABDOMEN)}
    return {
        name: Labelled(volume.array, volume.affine, CHEST_NAMES if name == CHEST else named)
        for name, volume in maps.items()
    }


def shared_levels(labels: dict[str, Labelled]) -> tuple[float, float]:
    """Heights above the lungs' lowest end, mm, that both labelled scans show."""
    ends = []
    for label in labels.values():
        corners = index_to_world(label.affine, np.array([[0, 0, 0], np.array(label.array.shape) - 1]))[:, 2]
        ends.append((corners.min() - label.lowest_lung_mm, corners.max() - label.lowest_lung_mm))
    low, high = max(end[0] for end in ends), min(end[1] for end in ends)
    return low + LEVEL_MARGIN_MM, high - LEVEL_MARGIN_MM


def organ_points(label: Labelled, structure: str, levels_mm: tuple[float, float], num_points: int) -> np.ndarray:
    """World mm [N, 3] of up to so many voxels of a structure at the given levels above the lungs' lowest end."""
    points_mm = label.voxels_mm(structure)
    height = points_mm[:, 2] - label.lowest_lung_mm
    points_mm = points_mm[(height >= levels_mm[0]) & (height <= levels_mm[1])]
    chosen = np.random.default_rng(SEED).permutation(len(points_mm))[:num_points]
    return points_mm[chosen]


def trusted_matches(
    query: Embedding, key: Embedding, points_mm: np.ndarray, flags: jsonargparse.Namespace
) -> tuple[Matches, np.ndarray, np.ndarray]:
    """Matches of points [N, 3], their cycle errors in mm [N], and which of them the thresholds keep, bool [N]."""
    matches = match_points(query, key, points_mm)
    cycle_mm = cycle_error_mm(query, key, points_mm, matches)
    return matches, cycle_mm, (matches.score >= flags.min_score) & (cycle_mm <= flags.max_cycle_mm)


def landing(distance_mm: np.ndarray, cycle_mm: np.ndarray) -> dict:
    """Shares that land in and near the same organ; `distance_mm` [N] to it, `cycle_mm` [N] of the same points."""
    return {
        "num_points": len(distance_mm),
        "in_organ": float((distance_mm < INSIDE_MM).mean()),
        "near_organ": float((distance_mm <= NEAR_MM).mean()),
        "median_cycle_mm": float(np.nanmedian(cycle_mm)),
    }


def cycle_errors(embeddings: dict[str, Embedding], flags: jsonargparse.Namespace) -> dict[str, dict]:
    """Points spread over each body, matched to every other scan and back."""
    found = {}
    options = MiningOptions(num_points=flags.num_points, seed=SEED)
    for query, embedding in embeddings.items():
        points_mm = draw_points(embedding, options)
        for key in [name for name in embeddings if name != query]:
            matches, cycle_mm, kept = trusted_matches(embedding, embeddings[key], points_mm, flags)
            found[f"{query} to {key}"] = {
                "num_points": len(points_mm),
                "median_score": float(np.nanmedian(matches.score)),
                "median_cycle_mm": float(np.nanmedian(cycle_mm)),
                "share_within_10mm": float((cycle_mm <= NEAR_MM).mean()),
                "kept": float(kept.mean()),
            }
    return found


def organs_across(
    embeddings: dict[str, Embedding], labels: dict[str, Labelled], flags: jsonargparse.Namespace
) -> dict[str, dict]:
    """Points of the structures that both labels name, matched from one scan to the other.

    Beside the shares of all points, `kept` (that the thresholds keep), and `in_organ_of_kept` and `near_organ_of_kept`.
    """
    levels, found = shared_levels(labels), {}
    for query, key, structures in ACROSS:
        for structure in structures:
            points_mm = organ_points(labels[query], structure, levels, flags.num_organ_points)
            matches, cycle_mm, kept = trusted_matches(embeddings[query], embeddings[key], points_mm, flags)
            distance_mm = labels[key].distance_mm(structure, matches.points_mm)
            found[f"{structure}, {query} to {key}"] = {
                **landing(distance_mm, cycle_mm),
                "kept": float(kept.mean()),
                "in_organ_of_kept": float((distance_mm[kept] < INSIDE_MM).mean()) if kept.any() else None,
                "near_organ_of_kept": float((distance_mm[kept] <= NEAR_MM).mean()) if kept.any() else None,
            }
    return found


def organs_around(
    embeddings: dict[str, Embedding], labels: dict[str, Labelled], flags: jsonargparse.Namespace
) -> dict[str, dict]:
    """Points of the abdomen's organs, sent through one or both unlabelled scans and back: way -> organ -> figures."""
    (first, second), label, levels = UPPER_ABDOMENS, labels[ABDOMEN], shared_levels(labels)
    found = {way: {} for way in ((first,), (second,), (first, second))}
    for structure in UPPER_ORGANS:
        start_mm = organ_points(label, structure, levels, flags.num_organ_points)
        for way, organs in found.items():
            points_mm = start_mm
            for query, key in zip((ABDOMEN, *way), (*way, ABDOMEN)):
                points_mm = match_points(embeddings[query], embeddings[key], points_mm).points_mm
            cycle_mm = np.linalg.norm(points_mm - start_mm, axis=1)
            organs[structure] = landing(label.distance_mm(structure, points_mm), cycle_mm)
    return {" and ".join(way): organs for way, organs in found.items()}


def measure(
    checkpoint_file: str, volumes: dict[str, Volume], labels: dict[str, Labelled], flags: jsonargparse.Namespace
) -> dict:
    """All figures of one set of weights."""
    network, info = load_embedder(checkpoint_file)
    fast = for_inference(network).to(pick_device(flags.device, 0))
    with tempfile.TemporaryDirectory(prefix="embeddings_") as folder:
        embed_corpus(fast, info, CaseSource(list(volumes), volumes.__getitem__), folder, flags.memory_mb)
        embeddings = {name: load_embedding(folder, name) for name in volumes}
    around = organs_around(embeddings, labels, flags)
    across = organs_across(embeddings, labels, flags)
    return {
        "checkpoint_file": checkpoint_file,
        "cycle": cycle_errors(embeddings, flags),
        "across": {"mean": mean_of(across.values()), **across},
        "around": {way: {"mean": mean_of(organs.values()), **organs} for way, organs in around.items()},
    }


def mean_of(found: Sequence[dict]) -> dict:
    """Mean over organs of each figure (counts are added), so that large organs weigh no more than small ones."""
    found, mean = list(found), {}
    for name in found[0]:
        values = [organ[name] for organ in found if organ[name] is not None]
        mean[name] = (sum(values) if name == "num_points" else float(np.mean(values))) if values else None
    return mean


def run(flags: jsonargparse.Namespace) -> dict:
    """Every set of weights on the four scans; empty where there is none, or with --write_list."""
    if flags.write_list:
        print(write_training_list(flags))
        return {}
    if flags.quick:
        flags.num_points, flags.num_organ_points = min(40, flags.num_points), min(10, flags.num_organ_points)
    missing = missing_files(Path(flags.ct_dir))
    if missing:
        print(f"skipped: no real CT in {flags.ct_dir} (lacks {', '.join(missing[:3])}); see --ct_dir and ALICE_SHARED")
        return {}
    if not flags.checkpoint_files:
        raise ValueError("--checkpoint_files names no weights; train some (scripts/train_sam.py)")
    volumes = {name: read_ct(Path(flags.ct_dir) / f"{name}.nii.gz") for name in SCANS}
    labels = read_labels(Path(flags.ct_dir))
    named = [name_of(given) for given in flags.checkpoint_files]
    found = {name: measure(file, volumes, labels, flags) for name, file in named}
    return {
        "weights": found,
        "min_score": flags.min_score,
        "max_cycle_mm": flags.max_cycle_mm,
        "levels_mm": shared_levels(labels),
    }


def missing_files(ct_dir: Path) -> list[str]:
    """Names of the reference files that are not there."""
    wanted = [f"{name}.nii.gz" for name in SCANS] + [f"{name}_label.nii.gz" for name in (CHEST, ABDOMEN)]
    return [name for name in (*wanted, f"{ABDOMEN}_label_names.json") if not (ct_dir / name).is_file()]


def name_of(given: str) -> tuple[str, str]:
    """Name and file of one --checkpoint_files entry; without a name, that of the file's folder."""
    name, separator, file = given.partition("=")
    return (name, file) if separator else (Path(given).resolve().parent.name, given)


def markdown(found: dict) -> str:
    """The tables for RESULTS.md: a column for each set of weights."""
    weights = found["weights"]
    first = next(iter(weights.values()))
    cells = {"cycle": ("median cycle mm, <= 10 mm, kept", _cycle_cell), "across": ("in it, within 10 mm", _organ_cell)}
    tables = []
    for part, (what, cell) in cells.items():
        lines = [(row, *(cell(result[part][row]) for result in weights.values())) for row in first[part]]
        tables.append(table(lines, ("", *(f"{name}: {what}" for name in weights))))
    columns = [(name, way) for name in weights for way in first["around"]]
    organs = next(iter(first["around"].values()))
    lines = [(o, *(_organ_cell(weights[name]["around"][way][o]) for name, way in columns)) for o in organs]
    tables.append(table(lines, ("around", *(f"{name}, through {way}" for name, way in columns))))
    return "\n\n".join(tables)


def _cycle_cell(row: dict) -> str:
    return f"{row['median_cycle_mm']:.1f}, {row['share_within_10mm']:.0%}, {row['kept']:.0%}"


def _organ_cell(row: dict) -> str:
    """Shares in and near the organ; in brackets, where there are thresholds, those of the matches they keep."""
    cell = f"{row['in_organ']:.0%}, {row['near_organ']:.0%}"
    if row.get("in_organ_of_kept") is None:
        return cell
    return f"{cell} ({row['in_organ_of_kept']:.0%}, {row['near_organ_of_kept']:.0%} of the {row['kept']:.0%} kept)"


def write_training_list(flags: jsonargparse.Namespace) -> str:
    """Write the list of phantoms and real scans; returns the command that trains on it."""
    ct_dir = Path(flags.ct_dir).resolve()
    missing = [name for name in SCANS if not (ct_dir / f"{name}.nii.gz").is_file()]
    if missing:
        raise ValueError(f"{ct_dir}: no {', '.join(missing)}; point --ct_dir at the reference CT")
    phantoms, held_out = (load_data_list(flags.json_list, flags.data_dir, part) for part in ("training", "validation"))
    real = [Case(name, ct_dir / f"{name}.nii.gz") for name in SCANS]
    write_data_list(flags.write_list, flags.data_dir, [*phantoms, *real], held_out, name="real_and_phantom")
    return (
        f"python scripts/train_sam.py --config configs/sam_phantom.yaml --data_dir {flags.data_dir} "
        f"--json_list {flags.write_list} --store_dir store_real --landmark_dir {flags.data_dir}/landmarks "
        "--output_dir sam_real"
    )


main = command(__name__, make_flags, run, markdown)

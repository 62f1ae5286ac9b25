"""The true table of pairs of phantoms: what mining would give with a perfect SAM, the upper bound of the comparison.

    python -m benchmarks.comparison.true_pairs --landmark_dir phantom/landmarks --store_dir store \\
        --json_list phantom.json --output_dir pairs_true

Points spread over the body of every case, away from its surface, as in mining; partners are other cases of the same
section of the list at random. The key's place comes from the two patients' deformations (`datasets.phantom.truth`);
points that the key's scan does not show are left out. Every row has score 1 and cycle error 0.
"""

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import ndimage

from datasets.ct.geometry import body_mask, index_to_world
from datasets.lists.data_list import load_data_list
from datasets.phantom.truth import PhantomTruth, load_truth
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.store.volumes import VolumeStore
from engine.flags import RunInfo, git_commit, make_parser, run_main

COARSE = 2  # the body's depth is measured on every second voxel


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--landmark_dir", type=str, required=True, help="the phantoms' landmarks/, which state their seeds")
    add("--store_dir", type=str, required=True, help="volume store of the phantoms")
    add("--json_list", type=str, required=True, help="data list; all its sections are used")
    add("--output_dir", type=str, required=True, help="folder of the table")
    add("--num_points", type=int, default=200, help="query points per case")
    add("--num_partners", type=int, default=8, help="key cases per query case")
    add("--border_mm", type=float, default=12.0, help="points keep so far from the skin and the scan's ends, mm")
    add("--seed", type=int, default=0, help="of points and partners")
    add("--num_workers", type=int, default=1, help="threads that prepare cases")
    return parser


def draw_points(store: VolumeStore, name: str, num_points: int, border_mm: float, seed: int) -> np.ndarray:
    """Places deep in the body of a case, world mm [num_points, 3]."""
    volume = store.read(name)
    spacing = np.array(volume.spacing_mm)
    body = np.pad(body_mask(volume.array, volume.spacing_mm)[::COARSE, ::COARSE, ::COARSE], 1)
    depth_mm = ndimage.distance_transform_edt(body, sampling=spacing * COARSE)[1:-1, 1:-1, 1:-1]
    voxels = np.argwhere(depth_mm >= min(border_mm, 0.5 * depth_mm.max()))
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    chosen = voxels[rng.integers(len(voxels), size=num_points)] * COARSE + rng.uniform(0, COARSE, (num_points, 3))
    return index_to_world(volume.affine, np.minimum(chosen, np.array(volume.shape) - 1))


def rows_of(
    query: int, truths: list[PhantomTruth], points_mm: np.ndarray, num_partners: int, seed: int, group: Sequence[int]
) -> np.ndarray:
    """The rows (`ROW_DTYPE`) of one query case; its partners are of `group`, numbers in `truths`."""
    rng = np.random.default_rng([seed + 1, zlib.crc32(truths[query].name.encode())])
    others = [number for number in group if number != query]
    atlas_mm, parts = truths[query].to_atlas(points_mm), []
    for key in sorted(rng.permutation(others)[:num_partners].tolist()):
        key_mm = truths[key].from_atlas(atlas_mm)
        is_seen = truths[key].is_scanned(key_mm)
        rows = np.zeros(int(is_seen.sum()), dtype=ROW_DTYPE)
        rows["query_case"], rows["key_case"], rows["score"] = query, key, 1.0
        rows["query_mm"], rows["key_mm"] = points_mm[is_seen], key_mm[is_seen]
        parts.append(rows)
    return np.concatenate(parts)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    sections = [
        {case.name for case in load_data_list(flags.json_list, ".", part, must_exist=False)}
        for part in ("training", "validation")
    ]
    names = sorted(set().union(*sections))
    if len(names) < 2 or min(flags.num_points, flags.num_partners) < 1:
        raise ValueError(f"{flags.json_list}: true pairs need two cases, --num_points and --num_partners of 1 or more")
    store = VolumeStore(flags.store_dir, names)

    def prepare(name: str) -> tuple[PhantomTruth, np.ndarray]:
        """A case's truth and its query points, world mm."""
        points_mm = draw_points(store, name, flags.num_points, flags.border_mm, flags.seed)
        return load_truth(flags.landmark_dir, [name])[name], points_mm

    with ThreadPoolExecutor(max(1, flags.num_workers)) as pool:
        prepared = list(pool.map(prepare, names))
    truths = [truth for truth, _ in prepared]
    parts = []
    for number, (truth, points) in enumerate(prepared):
        group = [n for section in sections if truth.name in section for n, name in enumerate(names) if name in section]
        group = group if len(group) > 1 else range(len(names))  # alone in its section
        parts.append(rows_of(number, truths, points, flags.num_partners, flags.seed, group))
    rows = np.concatenate(parts)
    RunInfo.collect(flags).write(flags.output_dir, "true_pairs_run.json")
    provenance = {"commit": git_commit(), "embedder": "none: the phantoms' own deformations", "seed": flags.seed}
    sources = {name: store.record(name).identity for name in names}
    table = CorrespondenceTable.write(flags.output_dir, names, rows, provenance, sources)
    print(f"{flags.output_dir}: {len(table)} true pairs of {len(names)} cases")


if __name__ == "__main__":
    run_main(main)

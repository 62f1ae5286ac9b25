"""Show where SAM finds points of one CT in another: three planes of both, the similarity map, score and cycle error.

    python scripts/show_matches.py --checkpoint_file SAM.pth --query A.nii.gz --key B.nii.gz --output_dir pictures
    python scripts/show_matches.py --checkpoint_file SAM.pth --query A.nii.gz --key B.nii.gz --output_dir pictures \\
        --points 12.5,-80,240 -30,-60,180
    python scripts/show_matches.py --checkpoint_file SAM.pth --store_dir store --query FLARE22_Tr_0001 \\
        --key Case_00001 --output_dir pictures

--query and --key are CT files or DICOM folders, or, with --store_dir, names of its cases. Points are world mm (RAS+: x
to the right, y to the front, z to the head, as nibabel gives them); without any, a few are spread over the body. One
PNG a point, and matches.json with all numbers.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import numpy as np
import torch

from datasets.ct.nifti import Volume, read_ct
from datasets.store.files import write_text
from datasets.store.volumes import VolumeStore
from engine.device import pick_device
from engine.flags import RunInfo, add_options, make_parser, run_main
from sam_embed.checkpoint import EmbedderOptions, load_embedder
from sam_embed.embeddings.embed import embed_volume, for_inference
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.judging.match_figure import draw_match, save_figure
from sam_embed.matching.match import cycle_error_mm, describe_box, inside, match_points, similarity_map
from sam_embed.matching.mine import MiningOptions, draw_points, lies_in_body


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_options(parser, EmbedderOptions)
    parser.add_argument("--query", type=str, required=True, help="CT with the points: file or case name")
    parser.add_argument("--key", type=str, required=True, help="CT to find them in: likewise")
    parser.add_argument("--store_dir", type=str | None, default=None, help="volume store that case names belong to")
    parser.add_argument("--points", type=str, nargs="+", default=[], help="world mm as x,y,z; default: spread points")
    parser.add_argument("--num_points", type=int, default=4, help="how many to spread when --points is not given")
    parser.add_argument("--seed", type=int, default=0, help="of the spread points")
    parser.add_argument("--output_dir", type=str, required=True, help="folder of the pictures")
    parser.add_argument("--memory_mb", type=float, default=2048.0, help="working memory of the embedding, MB")
    parser.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda"], help="where to embed")
    return parser


def parse_points(texts: list[str]) -> np.ndarray:
    """World mm [N, 3] of texts like "12.5,-80,240".

    Raises:
        ValueError: a text that is not three finite numbers.
    """
    points = []
    for text in texts:
        try:
            point = [float(part) for part in text.split(",")]
        except ValueError:
            point = []
        if len(point) != 3 or not np.isfinite(point).all():
            raise ValueError(f"--points takes x,y,z in mm, received {text!r}")
        points.append(point)
    return np.array(points, dtype=np.float64)


def open_volume(text: str, store: VolumeStore | None, flag: str) -> Volume:
    """The CT that a flag means: a case of the store, where there is one of that name, else a file.

    Raises:
        ValueError: neither.
    """
    if store is not None and text in store.names:
        return store.read(text)
    if Path(text).exists():
        return read_ct(text)
    first = ", ".join(store.names[:3]) if store is not None else ""
    cases = f"nor a case of the store (its {len(store.names)}: {first}, ...)" if store is not None else ""
    hint = cases or "nor, without --store_dir, the name of a case"
    raise ValueError(f"{flag} {text}: neither a file {hint}")


def check_inside(query: Embedding, points_mm: np.ndarray) -> None:
    """Raise for points [N, 3] beyond the patient's bounding box."""
    outside = points_mm[~inside(query, points_mm)]
    if len(outside):
        raise ValueError(
            f"--points {','.join(f'{value:g}' for value in outside[0])}: lies outside of the patient in {query.name}, "
            f"who fills {describe_box(query)}"
        )


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    # A leading space, so that argparse does not take "-30,-60,180" for a flag.
    flags = make_flags().parse_args([f" {text}" if re.fullmatch(r"-[\d.]+,.*", text) else text for text in words])
    wanted_mm = parse_points(flags.points)
    store = VolumeStore(flags.store_dir) if flags.store_dir else None
    volumes = [open_volume(flags.query, store, "--query"), open_volume(flags.key, store, "--key")]
    network, info = load_embedder(flags.checkpoint_file)
    fast = for_inference(network).to(pick_device(flags.device, 0))
    query, key = (
        embed_volume(fast, volume, info, flags.memory_mb, name)
        for volume, name in zip(volumes, (flags.query, flags.key))
    )
    points_mm = wanted_mm if len(wanted_mm) else draw_points(query, MiningOptions(flags.num_points, seed=flags.seed))
    check_inside(query, points_mm)
    matches = match_points(query, key, points_mm)
    cycle = cycle_error_mm(query, key, points_mm, matches)
    is_tissue, finds_tissue = lies_in_body(query, points_mm), lies_in_body(key, matches.points_mm)
    folder = Path(flags.output_dir)
    RunInfo.collect(flags).write(folder)
    rows = []
    for number, point_mm in enumerate(points_mm):
        match_mm, score = matches.points_mm[number], float(matches.score[number])
        similarity = similarity_map(query, key, point_mm).numpy()
        figure = draw_match(*volumes, point_mm, match_mm, score, cycle[number], similarity, key.fine_affine)
        picture = folder / f"match_{number + 1:02d}.png"
        save_figure(figure, picture)
        row = {"query_mm": point_mm.tolist(), "key_mm": match_mm.tolist(), "score": score}
        rows.append(row | {"cycle_mm": float(cycle[number]), "picture": picture.name})
        in_air = [name for name, is_in in (("point", is_tissue[number]), ("match", finds_tissue[number])) if not is_in]
        warning = f" ({' and '.join(in_air)} outside of the body)" if in_air else ""
        print(f"{picture}: score {score:.2f}, cycle error {cycle[number]:.1f} mm{warning}")
    write_text(folder / "matches.json", json.dumps({"query": flags.query, "key": flags.key, "matches": rows}, indent=1))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)

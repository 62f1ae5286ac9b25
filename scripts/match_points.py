"""Follow points of one CT, as lesions or landmarks, into other scans of the same patient or of others.

    python scripts/match_points.py --checkpoint_file SAM.pth --query before.nii.gz --points lesions.csv \\
        --key after.nii.gz --output matches.csv --figure matches.png
    python scripts/match_points.py --checkpoint_file SAM.pth --query atlas.nii.gz --points landmarks.mrk.json \\
        --key a.nii.gz b.nii.gz --output found.mrk.json

--points is a CSV file with the columns name,x_mm,y_mm,z_mm, world mm in RAS+ (x to the right, y to the front, z to the
head, as nibabel gives them), or a point list of 3D Slicer (.mrk.json), in the coordinate system that it states.

--output is a CSV file with a row for every key and point: key,name,x_mm,y_mm,z_mm,score,cycle_mm,spread_mm,verdict, in
RAS+ again. Or it is a .mrk.json that Slicer shows over the key, in LPS. Several keys then get a file each, and so they
do for --figure: found_a.mrk.json, found_b.mrk.json. The verdicts:

    trusted    score, cycle error and spread pass --min_score, --max_cycle_mm and --max_spread_mm, in the body
    doubtful   one of them does not: look at the place before you use it
    outside    the key does not seem to show this part of the body; no coordinates are given

The thresholds hold for one network and one kind of data: scripts/evaluate_matching.py chooses them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import torch
from tqdm import tqdm

from datasets.ct.formats import EXPECTED
from datasets.ct.nifti import read_ct
from datasets.lists.data_list import unique_names
from datasets.lists.points import CSV_SUFFIX, NamedPoints, read_points, suffix_of, write_markups, write_table
from engine.device import pick_device
from engine.embedding_flags import add_embedding_flags
from engine.flags import RunInfo, add_options, make_parser, options_of, run_main
from sam_embed.checkpoint import EmbedderOptions, load_embedder
from sam_embed.embeddings.embed import embed_volume, for_inference
from sam_embed.judging.follow_figure import MOST_ROWS, draw_followed
from sam_embed.matching.follow import Followed, FollowOptions, check_inside, follow_points

COLUMNS = ("key", "name", "x_mm", "y_mm", "z_mm", "score", "cycle_mm", "spread_mm", "verdict")
PICTURE_SUFFIX = ".png"


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_options(parser, EmbedderOptions)
    parser.add_argument("--query", type=str, required=True, help=f"CT of the points, {EXPECTED}")
    parser.add_argument("--points", type=str, required=True, help="points in it: .csv or .mrk.json")
    parser.add_argument("--key", type=str, nargs="+", required=True, help="CT to find them in, one or more files")
    parser.add_argument("--output", type=str, required=True, help="where they are: .csv or .mrk.json")
    parser.add_argument("--figure", type=str | None, default=None, help="PNG: slices of query and key at each point")
    add_options(parser.add_argument_group("trust"), FollowOptions)
    add_embedding_flags(parser)
    return parser


def check_files(flags: jsonargparse.Namespace) -> None:
    """Check the names of all files before the slow part.

    Raises:
        ValueError: a CT is missing, an output has another suffix, or it would replace the points.
    """
    for flag, paths in (("--query", [flags.query]), ("--key", flags.key)):
        for path in paths:
            if not Path(path).exists():
                raise ValueError(f"{flag} {path}: no such file or folder")
    suffix_of(flags.output)
    if flags.figure and not flags.figure.endswith(PICTURE_SUFFIX):
        raise ValueError(f"--figure {flags.figure}: expected a name ending in {PICTURE_SUFFIX}")
    if Path(flags.output).resolve() == Path(flags.points).resolve():
        raise ValueError(f"--output {flags.output} is the file of --points, which it would replace; give another name")


def path_for(path: str, suffix: str, key: str, num_keys: int) -> str:
    """The file of one key: the path as it is, or, with several keys, with the key's name in front of the suffix."""
    return path if num_keys == 1 else f"{path[: -len(suffix)]}_{key}{path[-len(suffix) :]}"


def rows_of(key: str, points: NamedPoints, followed: Followed) -> list[dict]:
    """The rows of one key in the table."""
    return [
        dict(zip(COLUMNS, (key, name, *place, *measured)))
        for name, place, *measured in zip(points.names, followed.points_mm, *followed[1:])
    ]


def write_outputs(flags: jsonargparse.Namespace, points: NamedPoints, found: dict[str, Followed]) -> None:
    """Write the table of all keys, or a point list of Slicer for each."""
    if (suffix := suffix_of(flags.output)) == CSV_SUFFIX:
        rows = [row for key, followed in found.items() for row in rows_of(key, points, followed)]
        write_table(flags.output, COLUMNS, rows)
        return
    for key, followed in found.items():
        texts = [followed.describe(number) for number in range(len(points.names))]
        write_markups(path_for(flags.output, suffix, key, len(found)), points.names, followed.points_mm, texts)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    options = options_of(flags, FollowOptions)
    check_files(flags)
    points = read_points(flags.points)
    key_files = dict(zip(unique_names([Path(path).as_posix() for path in flags.key]), flags.key))
    network, info = load_embedder(flags.checkpoint_file)
    network = for_inference(network, flags.precision).to(pick_device(flags.device, 0))
    query_volume = read_ct(flags.query)
    query = embed_volume(network, query_volume, info, flags.memory_mb, flags.query)
    check_inside(query, points)
    RunInfo.collect(flags).write_beside(flags.output)
    found = {}
    for key, path in tqdm(key_files.items(), desc="keys", unit="scan"):
        volume = read_ct(path)
        embedding = embed_volume(network, volume, info, flags.memory_mb, path)
        found[key] = follow_points(query, embedding, points.points_mm, options)
        if flags.figure:
            picture = path_for(flags.figure, PICTURE_SUFFIX, key, len(key_files))
            draw_followed(query_volume, volume, points.names, points.points_mm, found[key], picture)
    write_outputs(flags, points, found)
    for key, followed in found.items():
        verdicts = followed.verdict.tolist()
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
        print(f"{key}: {len(points.names)} points, {counts}")
    shown = f"; pictures show the first {MOST_ROWS} points" if flags.figure and len(points.names) > MOST_ROWS else ""
    print(f"wrote {flags.output}{shown}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)

"""Mine the table of matched points from embeddings: correspondences.npy and .json, which pretraining crops around.

    python scripts/mine_pairs.py --embed_dir embeddings
    torchrun --nproc_per_node=8 scripts/mine_pairs.py --embed_dir embeddings --num_points 400 --num_partners 16

Every row is a point of one case and its match in another, in world mm, with score, cycle error and spread. Each
embedding is read about once. May be stopped, even killed, and run again: what has not changed is not mined anew. With
--json_list the partners of a case are of its own section: held-out cases are paired with held-out ones, which the
validation of pretraining needs. Scans of one patient (`"group"` in the list) are not paired with each other.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse

from datasets.lists.data_list import load_data_list
from engine.device import pick_device
from engine.flags import RunInfo, add_options, git_commit, make_parser, options_of, run_main
from sam_embed.case_source import SECTIONS
from sam_embed.embeddings.embedding_store import embedded_cases, load_embedding
from sam_embed.matching.mine import MiningOptions
from sam_embed.matching.mine_corpus import mine_corpus


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--embed_dir", type=str, required=True, help="folder by scripts/generate_sam_embeddings.py")
    data.add_argument("--output_dir", type=str | None, default=None, help="folder of the table; default: --embed_dir")
    data.add_argument("--json_list", type=str | None, default=None, help="mine only this list's cases; default: all")
    data.add_argument("--sections", type=str, nargs="+", default=list(SECTIONS), help="sections of the list")
    mining = parser.add_argument_group("mining")
    add_options(mining, MiningOptions)
    cache_help = "embeddings kept in memory, MB; room for --num_partners + 1 of them reads each about once"
    mining.add_argument("--cache_mb", type=float, default=2048.0, help=cache_help)
    mining.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda"], help="where to match")
    return parser


def choose_cases(flags: jsonargparse.Namespace, rank: int = 0) -> tuple[list[list[str]], dict[str, str]]:
    """Cases to pair among themselves, and case -> patient: the list's sections as far as embedded, or all embedded.

    Rank 0 prints what is left out.
    """
    embedded = embedded_cases(flags.embed_dir)
    if flags.json_list is None:
        return [embedded], {}
    listed_cases = [load_data_list(flags.json_list, ".", section, must_exist=False) for section in flags.sections]
    sections = [{case.name for case in cases} for cases in listed_cases]
    patient_of = {case.name: case.patient for cases in listed_cases for case in cases}
    listed = set(patient_of)
    absent = sorted(listed - set(embedded))
    if absent and rank == 0:
        print(
            f"left out: {len(absent)} of {len(listed)} listed cases have no embedding in {flags.embed_dir}, first "
            f"{', '.join(absent[:5])}; scripts/generate_sam_embeddings.py makes them or says why it cannot",
            file=sys.stderr,
        )
    return [[name for name in embedded if name in section] for section in sections], patient_of


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    options = options_of(flags, MiningOptions)
    sections, patient_of = choose_cases(flags, rank)
    names = sorted(set().union(*sections))
    output_dir = flags.output_dir or flags.embed_dir
    provenance = {"commit": git_commit()}
    if names:
        provenance["spacing_mm"] = list(load_embedding(flags.embed_dir, names[0]).fine_spacing_mm)
    if rank == 0:
        RunInfo.collect(flags).write(output_dir, "mine_run.json")
    device = pick_device(flags.device, int(os.environ.get("LOCAL_RANK", 0)))
    shared = rank, world_size, device, sections, patient_of
    table = mine_corpus(flags.embed_dir, names, output_dir, options, provenance, flags.cache_mb, *shared)
    if table is not None:
        print(json.dumps({"table": str(output_dir), **table.summary()}, indent=1))


if __name__ == "__main__":
    run_main(main)

"""Embed every volume with SAM: `<embed_dir>/<case>.safetensors`, from which scripts/mine_pairs.py takes matched points.

    python scripts/generate_sam_embeddings.py --checkpoint_file SAM.pth --data_dir FLARE22 --json_list flare.json \\
        --embed_dir embeddings
    torchrun --nproc_per_node=8 scripts/generate_sam_embeddings.py --checkpoint_file SAM.pth --store_dir store \\
        --embed_dir embeddings --precision bf16

The checkpoint is the authors' SAM.pth or one by scripts/train_sam.py; it says how volumes are prepared. May be stopped
and run again: finished cases are kept as long as the weights and the CT are the same, in whatever form they are stored
(forms mix freely, as files are decoded when they are loaded; --overwrite makes them anew in the form of --storage).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import torch

from engine.device import pick_device
from engine.flags import RunInfo, add_options, add_switch, make_parser, options_of, run_main
from sam_embed.case_source import CaseOptions, open_cases
from sam_embed.checkpoint import EmbedderOptions, load_embedder
from sam_embed.embeddings.compact import FORMS, Storage
from sam_embed.embeddings.corpus import embed_corpus
from sam_embed.embeddings.embed import PRECISIONS, for_inference
from sam_embed.embeddings.embedding_store import stored_form


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_options(parser, EmbedderOptions)
    data = parser.add_argument_group("data")
    add_options(data, CaseOptions)
    data.add_argument("--embed_dir", type=str, required=True, help="folder of the embeddings; made if missing")
    add_switch(data, "--overwrite", False, "embed cases again that have an embedding by these weights")
    form = parser.add_argument_group("form on disk")
    form.add_argument("--storage", type=str, default=Storage.form, choices=FORMS, help="form of files; may be mixed")
    add_options(form, Storage)
    run = parser.add_argument_group("run")
    run.add_argument("--memory_mb", type=float, default=2048.0, help="working memory of a volume's first layers, MB")
    run.add_argument("--precision", type=str, default="fp32", choices=list(PRECISIONS), help="bf16 suits GPUs")
    run.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda"], help="where to compute")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    storage = options_of(flags, Storage, form=flags.storage)
    cases = open_cases(options_of(flags, CaseOptions), rank)
    network, info = load_embedder(flags.checkpoint_file)
    network = for_inference(network, flags.precision).to(
        pick_device(flags.device, int(os.environ.get("LOCAL_RANK", 0)))
    )
    if rank == 0:
        RunInfo.collect(flags).write(flags.embed_dir, "embed_run.json")
    report = embed_corpus(
        network, info, cases, flags.embed_dir, flags.memory_mb, rank, world_size, flags.overwrite, storage
    )
    for name, reason in report["failed"].items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    others = [name for name in report["reused"] if stored_form(flags.embed_dir, name) != flags.storage]
    hint = f"; {len(others)} are not stored as {flags.storage}, --overwrite would change that" if others else ""
    print(
        f"{flags.embed_dir}: rank {rank} of {world_size} embedded {len(report['written'])} cases, "
        f"{len(report['reused'])} were there already, {len(report['failed'])} failed{hint}"
    )
    if report["failed"] and not (report["written"] or report["reused"]):
        raise ValueError(f"{flags.embed_dir}: no case could be embedded; the reasons are above")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)

"""How far SAM's matches lie from known landmarks, beside two baselines that only know the body's outline. Prints JSON.

    python scripts/evaluate_matching.py --checkpoint_file SAM.pth --data_dir phantom --landmark_dir phantom/landmarks
    python scripts/evaluate_matching.py --checkpoint_file SAM.pth --data_dir phantom --json_list phantom.json \\
        --sections validation --landmark_dir phantom/landmarks --embed_dir embeddings --output matching.json

A landmark file is `<landmark_dir>/<case>.json` with {"landmarks_mm": {name: [x, y, z]}} in world mm (RAS+). Every
ordered pair of cases that share a landmark counts. Embeddings found in --embed_dir are used, missing ones made there.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import torch
from tqdm import tqdm

from datasets.files import write_text
from engine.distributed import pick_device
from engine.flags import RunInfo, add_switch, make_parser, run_main
from sam_embed.baselines import Body, find_body
from sam_embed.case_source import SECTIONS, CaseSource, open_cases
from sam_embed.checkpoint import load_embedder
from sam_embed.corpus import embed_corpus
from sam_embed.embed import for_inference
from sam_embed.embedding_store import EmbeddingCache
from sam_embed.evaluate import PairErrors, errors_by_landmark, evaluate_pairs, load_landmarks, summarise


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint_file", type=str, required=True, help="weights of the embedding network")
    data = parser.add_argument_group("data")
    data.add_argument("--store_dir", type=str | None, default=None, help="volume store; else the files are read")
    data.add_argument("--data_dir", type=str | None, default=None, help="folder of the CT files")
    data.add_argument("--json_list", type=str | None, default=None, help="data list; default: every CT of --data_dir")
    data.add_argument("--sections", type=str, nargs="+", default=list(SECTIONS), help="sections of the list")
    data.add_argument("--landmark_dir", type=str, required=True, help="folder of <case>.json landmark files")
    data.add_argument(
        "--embed_dir", type=str | None, default=None, help="folder of embeddings; default: a temporary one"
    )
    data.add_argument("--output", type=str | None, default=None, help="also write the JSON to this file")
    run = parser.add_argument_group("run")
    add_switch(run, "--baselines", True, "also match by body box and by affine fit (0.2 s a pair)")
    add_switch(run, "--by_landmark", False, "list the errors of every landmark")
    run.add_argument("--max_cases", type=int | None, default=None, help="use the first so many cases; default: all")
    run.add_argument("--memory_mb", type=float, default=2048.0, help="working memory of the embedding, MB")
    run.add_argument("--cache_mb", type=float, default=2048.0, help="embeddings kept in memory, MB")
    run.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda"], help="where to embed")
    return parser


def evaluate(flags: jsonargparse.Namespace, cases: CaseSource, embed_dir: str) -> list[PairErrors]:
    """Embed what is missing, outline the bodies, match."""
    landmarks = load_landmarks(flags.landmark_dir, cases.names)
    names = sorted(landmarks)[: flags.max_cases]
    network, info = load_embedder(flags.checkpoint_file)
    fast = for_inference(network).to(pick_device(flags.device, 0))
    report = embed_corpus(fast, info, names, cases.read, embed_dir, flags.memory_mb)
    if report["failed"]:
        raise ValueError("; ".join(report["failed"].values()))
    bodies: dict[str, Body] | None = None
    if flags.baselines:
        bodies = {name: find_body(cases.read(name)) for name in tqdm(names, desc="body outlines", unit="case")}
    cache = EmbeddingCache(embed_dir, flags.cache_mb)
    return evaluate_pairs(cache.__getitem__, {name: landmarks[name] for name in names}, bodies)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    cases = open_cases(flags.store_dir, flags.data_dir, flags.json_list, flags.sections)
    with tempfile.TemporaryDirectory(prefix="embeddings_") as scratch:
        results = evaluate(flags, cases, flags.embed_dir or scratch)
    report = {"checkpoint_file": flags.checkpoint_file, **summarise(results)}
    if flags.by_landmark:
        report["by_landmark"] = errors_by_landmark(results)
    text = json.dumps(report, indent=1)
    if flags.output:
        write_text(flags.output, text + "\n")
        RunInfo.collect(flags).write(Path(flags.output).parent, f"{Path(flags.output).stem}_run.json")
    print(text)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)

"""How far SAM's matches lie from the truth, by organ and region, and which thresholds make most of them right.

    python scripts/evaluate_matching.py --checkpoint_file SAM.pth --data_dir phantom --landmark_dir phantom/landmarks
    python scripts/evaluate_matching.py --checkpoint_file SAM.pth --data_dir phantom --json_list phantom.json \\
        --sections validation --landmark_dir phantom/landmarks --embed_dir embeddings --output matching.json \\
        --figure trust.png

A landmark file is `<landmark_dir>/<case>.json` with {"landmarks_mm": {name: [x, y, z]}} in world mm (RAS+). Every
ordered pair of cases that share a landmark counts. Phantoms also state the seed of their patient, so that points mined
as for pretraining, anywhere in the body, are judged too: thresholds for main_ddp.py come from these. Embeddings found
in --embed_dir are used, missing ones made there.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import numpy as np
import torch
from tqdm import tqdm

from datasets.phantom.truth import load_truth, states_seeds
from datasets.store.files import write_text
from engine.device import pick_device
from engine.flags import RunInfo, add_options, add_switch, make_parser, options_of, run_main
from sam_embed.case_source import CaseOptions, CaseSource, open_cases
from sam_embed.checkpoint import EmbedderOptions, load_embedder
from sam_embed.embeddings.corpus import embed_corpus
from sam_embed.embeddings.embed import for_inference
from sam_embed.embeddings.embedding_store import EmbeddingCache
from sam_embed.judging.baselines import Body, find_body
from sam_embed.judging.evaluate import PairErrors, errors_by_landmark, evaluate_pairs, load_landmarks, summarise
from sam_embed.judging.judge import Judged, judge_landmarks, judge_rows
from sam_embed.judging.trust import WANTED_SHARE, trust_report
from sam_embed.judging.trust_figure import save_trust_figure
from sam_embed.judging.trust_text import trust_lines
from sam_embed.matching.match import on_device
from sam_embed.matching.mine import MiningOptions, mine_case


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_options(parser, EmbedderOptions)
    data = parser.add_argument_group("data")
    add_options(data, CaseOptions)
    data.add_argument("--landmark_dir", type=str, required=True, help="folder of <case>.json landmark files")
    data.add_argument(
        "--embed_dir", type=str | None, default=None, help="folder of embeddings; default: a temporary one"
    )
    data.add_argument("--output", type=str | None, default=None, help="write every figure to this JSON file")
    data.add_argument(
        "--figure", type=str | None, default=None, help="draw error against score, cycle error and spread here"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--num_points", type=int, default=200, help="points mined per case and judged; 0 = landmarks only")
    run.add_argument("--wanted", type=float, default=WANTED_SHARE, help="share of kept pairs within 15 mm, 0 to 1")
    add_switch(run, "--baselines", True, "also match by body box and by affine fit (0.2 s a pair)")
    add_switch(run, "--by_landmark", False, "list the errors of every landmark")
    run.add_argument("--max_cases", type=int | None, default=None, help="use the first so many cases; default: all")
    run.add_argument("--memory_mb", type=float, default=2048.0, help="working memory of the embedding, MB")
    run.add_argument("--cache_mb", type=float, default=2048.0, help="embeddings kept in memory, MB")
    run.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda"], help="where to compute")
    return parser


def evaluate(
    flags: jsonargparse.Namespace, cases: CaseSource, embed_dir: str
) -> tuple[list[PairErrors], Judged | None, str]:
    """Embed what is missing, outline the bodies, match landmarks, mine points where they can be judged.

    Returns:
        Matched landmarks, judged mined pairs, and the fingerprint of the network.
    """
    landmarks = load_landmarks(flags.landmark_dir, cases.names)
    names = sorted(landmarks)[: flags.max_cases]
    network, info = load_embedder(flags.checkpoint_file)
    device = pick_device(flags.device, 0)
    fast = for_inference(network).to(device)
    report = embed_corpus(fast, info, dataclasses.replace(cases, names=names), embed_dir, flags.memory_mb)
    if report["failed"]:
        raise ValueError("; ".join(report["failed"].values()))
    bodies: dict[str, Body] | None = None
    if flags.baselines:
        bodies = {name: find_body(cases.read(name)) for name in tqdm(names, desc="body outlines", unit="case")}
    cache = EmbeddingCache(embed_dir, flags.cache_mb)
    chosen = {name: landmarks[name] for name in names}
    results = evaluate_pairs(lambda name: on_device(cache[name], device), chosen, bodies)
    if flags.num_points == 0 or not states_seeds(flags.landmark_dir, names):
        return results, None, info.fingerprint
    truth = load_truth(flags.landmark_dir, names)
    # As scripts/mine_pairs.py mines, but every case against all others.
    options = MiningOptions(num_points=flags.num_points, num_partners=len(names))
    others_of = {name: [other for other in names if other != name] for name in names}
    rows = [
        mine_case(cache, names, name, others, options, device)
        for name, others in tqdm(others_of.items(), desc="mining", unit="case")
    ]
    return results, judge_rows(np.concatenate(rows), names, truth), info.fingerprint


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    if not 0 < flags.wanted < 1 or flags.num_points < 0:
        raise ValueError(
            f"--wanted must lie between 0 and 1 and --num_points not be negative, received {flags.wanted:g} and "
            f"{flags.num_points}"
        )
    cases = open_cases(options_of(flags, CaseOptions))
    with tempfile.TemporaryDirectory(prefix="embeddings_") as scratch:
        results, mined, network = evaluate(flags, cases, flags.embed_dir or scratch)
    report = {"checkpoint_file": flags.checkpoint_file, **summarise(results)}
    report["landmarks"] = trust_report(judge_landmarks(results), flags.wanted, network)
    report["mined"] = None if mined is None or not len(mined) else trust_report(mined, flags.wanted, network)
    if flags.by_landmark:
        report["by_landmark"] = errors_by_landmark(results)
    if flags.output:
        write_text(flags.output, json.dumps(report, indent=1) + "\n")
        RunInfo.collect(flags).write_beside(flags.output)
    if flags.figure:
        drawn, what = (report["mined"], "mined pairs") if report["mined"] else (report["landmarks"], "landmarks")
        save_trust_figure(drawn, f"{drawn['all']['num_matches']:,} {what} of {report['num_cases']} cases", flags.figure)
    print("\n".join(trust_lines(report)))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)

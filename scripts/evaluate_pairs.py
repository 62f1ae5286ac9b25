"""How many pairs of a mined table are right, and which thresholds keep the right ones: for tables of phantoms.

    python scripts/evaluate_pairs.py --embed_dir embeddings --landmark_dir phantom/landmarks
    python scripts/evaluate_pairs.py --embed_dir embeddings --landmark_dir phantom/landmarks --wanted 0.9 \\
        --output pairs.json --figure trust.png

Each query point's true place in the key patient follows from the seeds in the phantoms' landmark files. A pair is right
within 15 mm of it. The thresholds printed are those of main_ddp.py.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import numpy as np

from datasets.phantom.truth import load_truth
from datasets.samples.correspondences import CorrespondenceTable
from datasets.store.files import write_text
from engine.flags import RunInfo, make_parser, run_main
from sam_embed.judging.judge import judge_rows
from sam_embed.judging.trust import WANTED_SHARE, trust_report
from sam_embed.judging.trust_figure import save_trust_figure
from sam_embed.judging.trust_text import mined_lines


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--embed_dir", type=str, required=True, help="folder of the table by scripts/mine_pairs.py")
    add("--landmark_dir", type=str, required=True, help="the phantoms' folder of <case>.json landmark files")
    add("--max_pairs", type=int, default=50_000, help="judge a random sample of so many pairs; 0 = all")
    add("--wanted", type=float, default=WANTED_SHARE, help="share of kept pairs within 15 mm, 0 to 1")
    add("--seed", type=int, default=0, help="of the sample")
    add("--output", type=str | None, default=None, help="write every figure to this JSON file")
    add("--figure", type=str | None, default=None, help="draw error against score, cycle error and spread here")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    if not 0 < flags.wanted < 1 or flags.max_pairs < 0:
        raise ValueError(
            f"--wanted must lie between 0 and 1 and --max_pairs not be negative, received {flags.wanted:g} and "
            f"{flags.max_pairs}"
        )
    table = CorrespondenceTable.load(flags.embed_dir)
    rows = table.rows
    if 0 < flags.max_pairs < len(rows):
        rows = rows[np.sort(np.random.default_rng(flags.seed).choice(len(rows), flags.max_pairs, replace=False))]
    if not len(rows):
        raise ValueError(f"{flags.embed_dir}: the table has no pairs; mine again with a lower --min_score")
    used = np.union1d(rows["query_case"], rows["key_case"])
    truth = load_truth(flags.landmark_dir, [table.case_names[number] for number in used])
    report = trust_report(judge_rows(rows, table.case_names, truth), flags.wanted, table.provenance.get("weights", ""))
    report = {"table": flags.embed_dir, "num_rows": len(table), **report}
    if flags.output:
        write_text(flags.output, json.dumps(report, indent=1) + "\n")
        RunInfo.collect(flags).write_beside(flags.output)
    if flags.figure:
        save_trust_figure(report, f"{len(rows):,} mined pairs of {len(used)} cases", flags.figure)
    print("\n".join(mined_lines(report)))


if __name__ == "__main__":
    run_main(main)

"""Make one file of labelled CT, kept small, from which labels are carried to scans of people who have no labels.

    python scripts/pack_references.py --data_dir phantom --json_list phantom.json --output references.safetensors

Each case is its embedding by --checkpoint_file at the nodes of dense matching and its labels at 3 mm, some 400 KB. The
file that comes with the repository (`propagate_labels.py --reference phantoms`) is made by scripts/make_weights.sh.
"""

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import torch
from tqdm import tqdm

from datasets.ct.nifti import Volume, read_ct, read_label_of
from datasets.lists.data_list import load_data_list
from datasets.lists.label_classes import FLARE22
from engine.flags import RunInfo, add_options, make_parser, run_main
from sam_embed.checkpoint import EmbedderOptions, load_embedder
from sam_embed.embeddings.embed import embed_volume, for_inference
from sam_embed.matching.carry import NODE_MM
from sam_embed.matching.kept import SHIPPED_REFERENCES, kept, save_references
from sam_embed.matching.nodes import thinned

# With the network that joins in, these reach a Dice of 0.5 on real CT (benchmarks/RESULTS.md).
FOUND = (
    *("liver", "right kidney", "spleen", "aorta", "inferior vena cava", "gallbladder", "stomach", "duodenum"),
    "left kidney",
)


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_options(parser, EmbedderOptions)
    add = parser.add_argument
    add("--data_dir", type=str, required=True, help="folder that the list's paths are relative to")
    add("--json_list", type=str, required=True, help="data list of labelled CT with FLARE22's values")
    add("--section", type=str, default="training", help="of the list")
    add("--num_cases", type=int, default=16, help="take the first so many")
    add("--organs", type=str, nargs="+", default=list(FOUND), choices=FLARE22, help="that carrying may name")
    add("--output", type=str, default=str(SHIPPED_REFERENCES), help="file to write, .safetensors")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    cases = load_data_list(flags.json_list, flags.data_dir, flags.section)
    labelled = list(islice((case for case in cases if case.label), flags.num_cases))
    if len(labelled) < flags.num_cases:
        raise ValueError(
            f"{flags.json_list}: section {flags.section} holds {len(labelled)} labelled cases, expected --num_cases "
            f"{flags.num_cases}"
        )
    network, info = load_embedder(flags.checkpoint_file)
    network = for_inference(network)
    packed = []
    for case in tqdm(labelled, desc="packing", unit="case"):
        ct = read_ct(case.image)
        label: Volume = read_label_of(ct, case.label)
        packed.append(kept(thinned(embed_volume(network, ct, info, name=case.name), NODE_MM), label))
    run = RunInfo.collect(flags)
    save_references(flags.output, packed, {"organs": flags.organs, "commit": run.commit, "started": run.started})
    print(
        f"{flags.output}: {len(packed)} cases, {Path(flags.output).stat().st_size / 1e6:.1f} MB, SAM {info.fingerprint}"
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)

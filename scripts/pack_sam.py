"""Make a small file of a trained SAM that others can use: weights in half precision, and a card of what they are.

    python scripts/pack_sam.py --checkpoint_file sam/checkpoint_best.pth --matching matching.json \\
        --output weights/sam_phantom.safetensors

Writes the .safetensors, which every command takes as --checkpoint_file, and a card beside it (sam_phantom.md): data,
training, errors, limits. The facts come from run.json beside the checkpoint and from the report of
scripts/evaluate_matching.py about the same weights. `bash scripts/make_weights.sh` makes the weights that come with the
repository, from phantoms to card.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import torch

from datasets.lists.data_list import read_json_list
from datasets.store.files import write_text
from engine.flags import make_parser, run_main
from sam_embed.checkpoint import EmbedderInfo, load_embedder, write_small

CARD = """# {title}

Weights of SAM, an anatomical embedding network (Yan et al., IEEE TMI 2022): every place of a CT gets a vector, and the
same place of another patient gets nearly the same one. [Half precision]({file}), {megabytes:.1f} MB. Identity of the
weights: `{fingerprint}`.

- **Data:** {num_cases} {data}. No label and no landmark was used in training.
- **Training:** {steps} steps of {pairs} pair(s) of views, commit `{commit}`, {started}:
  `{command}`
- **Input:** CT in HU, brought to {spacing} mm; the commands do it.
- **Errors** on {judged} held-out cases, {num_matches:,} matched landmarks: median {median_mm:.1f} mm, 90th percentile
  {p90_mm:.1f} mm, {within:.0%} within 10 mm.
- **Limits:** {limits}
"""
LIMITS = (
    "trained on the data above and on nothing else. Errors on other scans are larger; small and soft organs (pancreas, "
    "adrenal glands, bowel) are matched worst. For research, not for clinical use."
)


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint_file", type=str, required=True, help="by scripts/train_sam.py; its run.json lies beside it")
    add("--matching", type=str, required=True, help="JSON report of scripts/evaluate_matching.py about these weights")
    add("--output", type=str, required=True, help="file to write, .safetensors; the card is written beside it")
    add("--data_text", type=str, default="volumes", help="what was trained on, after the number of cases")
    add("--limits", type=str, default=LIMITS, help="the card's last line")
    return parser


def read_json(path: Path, flag: str) -> dict:
    """A JSON object of a file.

    Raises:
        ValueError: missing or no such thing, naming the flag.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}) ({flag})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected named values ({flag})")
    return content


def facts_of(flags: jsonargparse.Namespace, step: int) -> dict:
    """What the card says, out of the run's and the judge's records."""
    run_file, matching_file = Path(flags.checkpoint_file).with_name("run.json"), Path(flags.matching)
    run, matching = read_json(run_file, "--checkpoint_file"), read_json(matching_file, "--matching")
    if Path(matching.get("checkpoint_file", "")).resolve() != Path(flags.checkpoint_file).resolve():
        raise ValueError(
            f"{matching_file}: judges {matching.get('checkpoint_file')}, not {flags.checkpoint_file} (--matching)"
        )
    try:
        listed = read_json_list(run["flags"]["json_list"])
        errors = matching["sam"]
        return {
            "data": flags.data_text,
            "num_cases": len(listed["training"]),
            "steps": step,
            "pairs": run["flags"]["batch_size"],
            "commit": run["commit"],
            "started": run["started"],
            "command": without_folders(run["command"]),
            "judged": matching["num_cases"],
            "num_matches": errors["num_matches"],
            "median_mm": errors["median_mm"],
            "p90_mm": errors["p90_mm"],
            "within": errors["share_within_10mm"],
            "limits": flags.limits,
        }
    except KeyError as error:
        raise ValueError(f"{run_file} or {matching_file} lacks {error} (--checkpoint_file, --matching)") from error


def without_folders(command: str) -> str:
    """A command line with the last part of every absolute path alone: others have other folders."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in command.split())


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    output = Path(flags.output)
    network, info = load_embedder(flags.checkpoint_file)
    step = torch.load(flags.checkpoint_file, map_location="cpu", weights_only=True).get("step", 0)
    facts = facts_of(flags, step)
    write_small(output, network, info, facts)
    small: EmbedderInfo = load_embedder(output)[1]
    shown = {
        "title": output.stem,
        "file": output.name,
        "megabytes": output.stat().st_size / 1e6,
        "fingerprint": small.fingerprint,
        "spacing": " x ".join(f"{length:g}" for length in info.spacing_mm),
    }
    card = output.with_suffix(".md")
    write_text(card, CARD.format(**facts, **shown))
    print(f"{output}: {shown['megabytes']:.1f} MB, identity {small.fingerprint}; {card}")


if __name__ == "__main__":
    run_main(main)

"""Publish a run's weights on the Hugging Face hub: safetensors, their description, and a model card of the run's facts.

    python scripts/push_to_hub.py --weights alice/checkpoint.pth --output_dir published
    python scripts/push_to_hub.py --weights alice/checkpoint.pth --repo_id me/alice-ct --private \\
        --data "2000 abdominal CT of FLARE22, unlabelled" --license cc-by-4.0
    python scripts/push_to_hub.py --weights finetune/best.pth --repo_id me/organs --dry_run --output_dir published

Whoever has access then says `hf://me/alice-ct` where a command asks for `--weights` or `--checkpoint_file`. Without
--repo_id, or with --dry_run, the folder is written and nothing leaves this machine: read the card before you publish.
Folders of this machine, names of cases and remembered cases are left out. Log in before: `hf auth login`, or HF_TOKEN.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError

from engine.flags import add_switch, make_parser, run_main
from engine.publishing.card import model_card
from engine.publishing.publication import FILES, collect, write_folder
from engine.weights import CHECKPOINT_KEYS, halved
from models.hub import HUB


def make_flags():
    """The flags of this command."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--weights", type=str, required=True, help="checkpoint of pretraining or finetuning, or extracted weights")
    add("--checkpoint_key", type=str, choices=CHECKPOINT_KEYS, default="auto", help="of a checkpoint of pretraining")
    add("--repo_id", type=str, default="", help="owner/name on the hub; empty = write the folder only")
    add_switch(parser, "--private", False, "make the repository private, if it is new")
    add("--output_dir", type=str, default="", help="keep the folder here; empty = a temporary one")
    add_switch(parser, "--half", False, "half precision: half as large a file, which loads into float32 networks")
    add_switch(parser, "--dry_run", False, "write the folder only")
    add("--data", type=str, default="", help="what the training data are, for the card")
    add("--license", type=str, default="", help="of the weights, by the hub's name, e.g. cc-by-4.0; empty = none named")
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    is_upload = bool(flags.repo_id) and not flags.dry_run
    if not is_upload and not flags.output_dir:
        raise ValueError("nothing to do: give --repo_id to upload, or --output_dir to write the folder")
    publication = collect(flags.weights, flags.checkpoint_key)
    if flags.half:
        publication = replace(publication, weights=halved(publication.weights, flags.weights))
    card = model_card(publication, flags.repo_id or Path(flags.output_dir).name, flags.data, flags.license)
    with folder_of(flags.output_dir) as folder:
        write_folder(publication, card, folder)
        print(f"wrote {len(publication.weights)} tensors, their description and a card to {folder}")
        if is_upload:
            print(f"uploaded to {upload(folder, flags.repo_id, flags.private)}; use it as {HUB}{flags.repo_id}")


@contextlib.contextmanager
def folder_of(output_dir: str) -> Iterator[Path]:
    """The folder that is asked for, or a temporary one."""
    if output_dir:
        yield Path(output_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Make the repository where there is none, and upload the files of a publication; returns its address.

    Raises:
        ValueError: the hub refuses (no login, no rights, a wrong name) or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES))
    except (OSError, HTTPError, HFValidationError) as error:
        raise ValueError(
            f"--repo_id {repo_id}: the hub refused ({str(error).strip().splitlines()[0]}). Are you logged in "
            "(hf auth login), and may you write there?"
        ) from error
    return str(address)


if __name__ == "__main__":
    run_main(main)

"""Turn the authors' embedding pickles into ours: `<embed_dir>/<case>.safetensors`, for scripts/mine_pairs.py.

    python scripts/import_embeddings.py --pickle_dir their_embeddings --data_dir FLARE22 --json_list flare.json \\
        --embed_dir embeddings

A pickle belongs to the case of its file name, else of the name stored in it. The CT gives the geometry: the pickle must
have been made from the whole volume at 2 mm, axes (z, y, x). Nothing in a pickle is executed; one that holds more than
tensors, arrays and plain values is refused. May be stopped and run again: finished cases are kept. Stored in a small
form (--storage), in which matches differ a little; `--storage fp16` keeps the pickles' own precision.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
from tqdm import tqdm

from datasets.ct.nifti import CTReadError
from datasets.lists.data_list import unique_names
from datasets.store.format import StoreError
from engine.flags import RunInfo, add_options, add_switch, make_parser, options_of, run_main
from sam_embed.case_source import CaseOptions, CaseSource, open_cases
from sam_embed.checkpoint import load_embedder
from sam_embed.embeddings.compact import FORMS, FP16, Storage
from sam_embed.embeddings.embedding_store import is_embedded, save_embedding
from sam_embed.embeddings.published_pickle import PublishedPickleError, read_published, to_embedding

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pk", ".p", ".pth", ".pt")
UNKNOWN_WEIGHTS = "imported"  # pickles do not say which weights made them


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    parser.add_argument("--pickle_dir", type=str, required=True, help=f"folder of {', '.join(PICKLE_SUFFIXES)} files")
    parser.add_argument("--embed_dir", type=str, required=True, help="folder of the embeddings; made if missing")
    parser.add_argument(
        "--checkpoint_file",
        type=str | None,
        default=None,
        help="the weights that made the pickles; only so may the result be matched with embeddings made here",
    )
    data = parser.add_argument_group("data")
    add_options(data, CaseOptions)
    add_switch(data, "--overwrite", False, "import cases again that have an imported embedding")
    form = parser.add_argument_group("form on disk")
    form.add_argument("--storage", type=str, default=Storage.form, choices=FORMS, help="form of files; may be mixed")
    add_options(form, Storage)
    return parser


def import_all(
    pickles: Sequence[Path],
    cases: CaseSource,
    embed_dir: str | Path,
    fingerprint: str,
    overwrite: bool = False,
    storage: Storage = FP16,
) -> dict:
    """Import every pickle.

    Returns:
        `written` and `reused` (lists of case names) and `failed` (pickle -> reason).
    """
    report, owner = {"written": [], "reused": [], "failed": {}}, {}

    def import_one(path: Path) -> tuple[str, str]:
        """The case's name, and whether it was "written" or "reused"."""
        name, published = _case_called(path.name.removesuffix(path.suffix), cases), None
        if name is None:
            published = read_published(path)
            name = _case_called(published.name or "", cases)
        if name is None:
            raise PublishedPickleError(
                f"{path}: no case is called so ({len(cases.names)} cases, first {cases.names[0]}); rename the file to "
                "<case>.pkl or check --data_dir and --json_list"
            )
        if owner.setdefault(name, path) != path:
            raise PublishedPickleError(f"{path}: case {name} was already taken from {owner[name]}")
        source = cases.identity(name)
        if not overwrite and is_embedded(embed_dir, name, fingerprint, source):
            return name, "reused"
        published = published or read_published(path)
        if _case_called(published.name or "", cases) not in (None, name):
            raise PublishedPickleError(f"{path}: its file name says {name}, its content says {published.name}")
        embedding = to_embedding(published, cases.read(name), name, fingerprint, path)
        save_embedding(embed_dir, dataclasses.replace(embedding, source=source), storage)
        return name, "written"

    for path in tqdm(pickles, desc="importing", unit="case"):
        try:
            name, kind = import_one(path)
            report[kind].append(name)
        except (PublishedPickleError, CTReadError, StoreError) as error:
            report["failed"][str(path)] = str(error)
        except (RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
            report["failed"][str(path)] = f"{path}: {str(error) or type(error).__name__}"
    return report


def _case_called(text: str, cases: CaseSource) -> str | None:
    """The case that a file's stem or a stored name (perhaps a path) means."""
    file_name = Path(text).name
    candidates = (file_name, *unique_names([file_name if ".nii" in file_name else f"{file_name}.nii.gz"]))
    return next((name for name in candidates if name in cases.names), None)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    storage = options_of(flags, Storage, form=flags.storage)
    files = sorted(Path(flags.pickle_dir).rglob("*"))
    pickles = [path for path in files if path.suffix.lower() in PICKLE_SUFFIXES and path.is_file()]
    if not pickles:
        raise ValueError(f"{flags.pickle_dir}: no {', '.join(PICKLE_SUFFIXES)} files below it (--pickle_dir)")
    cases = open_cases(options_of(flags, CaseOptions))
    fingerprint = load_embedder(flags.checkpoint_file)[1].fingerprint if flags.checkpoint_file else UNKNOWN_WEIGHTS
    RunInfo.collect(flags).write(flags.embed_dir, "import_run.json")
    report = import_all(pickles, cases, flags.embed_dir, fingerprint, flags.overwrite, storage)
    for reason in report["failed"].values():
        print(f"failed {reason}", file=sys.stderr)
    print(
        f"{flags.embed_dir}: imported {len(report['written'])} of {len(pickles)} pickles, {len(report['reused'])} were "
        f"there already, {len(report['failed'])} failed"
    )
    if report["failed"] and not (report["written"] or report["reused"]):
        raise PublishedPickleError(f"{flags.pickle_dir}: no pickle could be imported; the reasons are above")


if __name__ == "__main__":
    run_main(main)

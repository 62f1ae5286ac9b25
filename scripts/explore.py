"""Look at two or more CT side by side in a browser: click a place in one, and see it in the others.

    python scripts/explore.py --images before.nii.gz after.nii.gz
    python scripts/explore.py --images a.nii.gz b.nii.gz --labels a_label.nii.gz
    python scripts/explore.py --images a.nii.gz b.nii.gz --labels phantoms

Open the address that is printed. The page shows three planes of each scan. A click marks a place. The other scans move
to the same place, with score, cycle error, verdict (as of scripts/match_points.py) and a map of similarities. Key H
lists what mouse and keys do.

--labels names label maps of the first images, in the same order. A button carries them to the images without labels.
The word `phantoms` stands for labelled phantoms that come with the repository. For research, not for clinical use.

The server answers to this machine only (127.0.0.1) and reads no other files than those named here. Everyone who can
log in to this machine can open the address while the command runs; Ctrl-C ends it. From another machine:
ssh -L 8000:127.0.0.1:8000 HOST.
"""

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonargparse
import torch
from tqdm import tqdm

from datasets.ct.formats import EXPECTED
from datasets.ct.nifti import Volume, read_ct, read_label_of
from datasets.lists.data_list import unique_names
from engine.device import pick_device
from engine.embedding_flags import add_embedding_flags
from engine.explore.server import HOST, ExploreApp, listen, make_server
from engine.explore.session import FAILED, Scan, Session
from engine.flags import add_options, make_parser, options_of, run_main
from engine.references import (
    PHANTOMS,
    add_organ_network,
    check_embedded_by,
    check_organ_network,
    classes_of,
    open_organ_network,
    open_phantoms,
    opinion_of,
)
from sam_embed.checkpoint import EmbedderOptions, load_embedder
from sam_embed.embeddings.embed import embed_volume, for_inference
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.matching.follow import FollowOptions


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = make_parser(__doc__)
    add_options(parser, EmbedderOptions)
    parser.add_argument("--images", type=str, nargs="+", required=True, help=f"two or more CT, {EXPECTED}")
    label_help = f"label maps of the first images, in the same order; or the word {PHANTOMS}"
    parser.add_argument("--labels", type=str, nargs="+", default=[], help=label_help)
    add_organ_network(parser)
    parser.add_argument("--port", type=int, default=8000, help="of the page's address; 0 = any that is free")
    add_options(parser.add_argument_group("trust"), FollowOptions)
    add_embedding_flags(parser)
    return parser


def check_files(flags: jsonargparse.Namespace) -> None:
    """Check numbers and names of the files before the slow part.

    Raises:
        ValueError: one image only, more label maps than images, a file that does not exist, or phantoms among files.
    """
    if len(flags.images) < 2:
        raise ValueError(f"--images {flags.images[0]}: expected two or more CT")
    if PHANTOMS in flags.labels and len(flags.labels) > 1:
        raise ValueError(f"--labels {PHANTOMS} stands alone, received {' '.join(flags.labels)}")
    if len(flags.labels) > len(flags.images):
        raise ValueError(f"--labels names {len(flags.labels)} files and --images {len(flags.images)}; expected no more")
    if PHANTOMS in flags.labels:
        check_organ_network(flags.organ_network)
    labels = [] if PHANTOMS in flags.labels else flags.labels
    for flag, paths in (("--images", flags.images), ("--labels", labels)):
        for path in paths:
            if not Path(path).exists():
                raise ValueError(f"{flag} {path}: no such file or folder")


def read_for(flag: str, read: Callable[..., Volume], *arguments) -> Volume:
    """Read a file; errors name the flag beside the file."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def make_session(flags: jsonargparse.Namespace, options: FollowOptions) -> Session:
    """Read all files and the network."""
    network, info = load_embedder(flags.checkpoint_file)
    device = pick_device(flags.device, 0)
    network = for_inference(network, flags.precision).to(device)
    references, classes, labels, organ_network = [], None, [], None
    if PHANTOMS in flags.labels:
        references, classes = open_phantoms()
        check_embedded_by(references, info, flags.checkpoint_file, "--labels")
        organ_network = open_organ_network(flags.organ_network, references, device)
    names = unique_names([Path(path).as_posix() for path in flags.images])
    volumes = [read_for("--images", read_ct, path) for path in tqdm(flags.images, desc="reading", unit="scan")]
    if flags.labels and not references:
        labels = [read_for("--labels", read_label_of, *pair) for pair in zip(volumes, flags.labels)]
        classes = classes_of(labels)
    channels = [classes.to_classes(label.array) for label in labels]
    scans = [Scan(*facts) for facts in itertools.zip_longest(names, volumes, channels)]

    def embed(scan: Scan) -> Embedding:
        return embed_volume(network, scan.volume, info, flags.memory_mb, scan.name)

    return Session(scans, embed, options, classes, references, partial(opinion_of, organ_network))


def embed_all(session: Session) -> None:
    """Embed one scan after the other, with a progress bar; failures are printed."""
    bar = tqdm(session.scans, desc="embedding", unit="scan")
    for scan in bar:
        bar.set_postfix_str(scan.name)
        session.embed_scan(scan)
        if scan.state == FAILED:
            tqdm.write(f"failed {scan.name}: {scan.error}", file=sys.stderr)


def leave(*_: object) -> None:
    """End the process at once, without Python's clean-up: the handler of Ctrl-C.

    A thread may still be embedding or carrying inside torch, and none can be stopped there. Python's clean-up would
    unwind it through C++ code, which aborts the process. Nothing is lost: this command writes no files. An exception
    in place of the handler could be raised where Python ignores it, in the callback of a finished thread.
    """
    with contextlib.suppress(RuntimeError):  # the signal came while something was being printed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    options = options_of(flags, FollowOptions)
    check_files(flags)
    with listen(flags.port) as listening:
        session = make_session(flags, options)
        server = make_server(ExploreApp(session), listening)
    signal.signal(signal.SIGINT, leave)
    print(f"open http://{HOST}:{server.port}/ in a browser; Ctrl-C ends", flush=True)
    Thread(target=embed_all, args=(session,), daemon=True).start()
    server.serve_forever()  # until Ctrl-C


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)

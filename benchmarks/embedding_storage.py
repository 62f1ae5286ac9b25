"""Embeddings on disk: bytes per case of every form, beside what it costs in landmark error and in decoding time.

    python -m benchmarks.embedding_storage --checkpoint_file SAM.pth --store_dir store --json_list flare.json \\
        --data_dir phantom --landmark_dir phantom/landmarks --output results/benchmarks/embedding_storage.json

"Times smaller" compares with the published pickle of the same volume: half-precision maps of 128 channels at strides
(2, 2, 2) and (4, 16, 16) of the whole volume on a 2 mm grid. Errors are those of `scripts/evaluate_matching.py` on the
cases of --sections, all matched from decoded files. Without --checkpoint_file there is nothing to match: one torso of
the published size holds random vectors, alike along all of 128 axes, which no form can make small, in an elliptic body;
sizes are then the worst there are.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jsonargparse
import numpy as np
import torch

from benchmarks.matching import (
    COARSE_STRIDE,
    FINE_STRIDE,
    GRID_MM,
    NUM_CHANNELS,
    QUICK_VOX,
    TORSO_VOX,
    random_embedding,
)
from benchmarks.results import Rows, benchmark_parser, chosen, command, table
from datasets.ct.nifti import Volume
from engine.device import pick_device
from engine.flags import add_options, options_of
from sam_embed.case_source import CaseOptions, CaseSource, open_cases
from sam_embed.checkpoint import load_embedder
from sam_embed.embeddings.compact import FP16, Storage
from sam_embed.embeddings.corpus import embed_corpus
from sam_embed.embeddings.embed import for_inference
from sam_embed.embeddings.embedding_store import (
    Embedding,
    EmbeddingCache,
    embedding_path,
    load_embedding,
    save_embedding,
)
from sam_embed.judging.evaluate import evaluate_pairs, load_landmarks, summarise

WANTED_SMALLER = 20
WANTED_CHANGE_MM = 0.5
NO_LIMIT = 1e9
FORMS = {
    "fp16": FP16,
    **{f"pca, step {step:g}": Storage("pca", step, NO_LIMIT) for step in (0.05, 0.1, 0.15, 0.2, 0.25)},
    "default": Storage(),
}
QUICK_FORMS = ("fp16", "default")
BODY_RADII = (0.75, 0.98)  # of the ellipse along (H, W), in half widths of the made-up torso's box


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    quick = "fp16 and the default only; without a checkpoint a volume of an eighth"
    parser = benchmark_parser(__doc__, quick, device=True, num_threads=1)
    add = parser.add_argument
    add("--checkpoint_file", type=str | None, default=None, help="embedding network; none: random vectors, sizes only")
    add_options(parser, CaseOptions, {"sections": ["validation"]})
    add("--landmark_dir", type=str | None, default=None, help="<case>.json landmark files; needed with a checkpoint")
    add("--embed_dir", type=str | None, default=None, help="keep the fp16 embeddings here; default: a temporary folder")
    add("--forms", type=list[str], default=list(FORMS), help="names of the forms to measure, beside fp16")
    add("--memory_mb", type=float, default=2048.0, help="working memory of the embedding, MB")
    add("--cache_mb", type=float, default=2048.0, help="decoded embeddings kept in memory, MB")
    return parser


def published_bytes(volume: Volume) -> int:
    """Of the published pickle's two maps for this volume."""
    grid = np.rint(np.array(volume.shape) * volume.spacing_mm / GRID_MM)
    voxels = sum(int(np.prod(np.ceil(grid / stride))) for stride in (FINE_STRIDE, COARSE_STRIDE))
    return 2 * NUM_CHANNELS * voxels


def made_up_embedding(grid: Sequence[int]) -> Embedding:
    """Random unit vectors in the published layout, in an elliptic body."""
    made = random_embedding("torso", grid, np.diag([GRID_MM] * 3 + [1.0]), NUM_CHANNELS, seed=0)
    depth, height, width = made.fine.shape[1:]
    along_h, along_w = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    ellipse = torch.from_numpy((along_h / BODY_RADII[0]) ** 2 + (along_w / BODY_RADII[1]) ** 2 < 1)
    return dataclasses.replace(made, body=ellipse.expand(depth, height, width).contiguous())


def embed_held_out(flags: jsonargparse.Namespace, cases: CaseSource, embed_dir: str) -> dict[str, dict]:
    """Make the fp16 embeddings of all cases with landmarks (in `embed_dir`); their landmarks by case."""
    landmarks = load_landmarks(flags.landmark_dir, cases.names)
    network, info = load_embedder(flags.checkpoint_file)
    fast = for_inference(network).to(pick_device(flags.device, 0))
    report = embed_corpus(fast, info, dataclasses.replace(cases, names=sorted(landmarks)), embed_dir, flags.memory_mb)
    if report["failed"]:
        raise ValueError("; ".join(report["failed"].values()))
    return landmarks


def measure_form(
    storage: Storage,
    names: Sequence[str],
    embedding_of: Callable[[str], Embedding],
    evaluate: Callable[[Path], dict] | None,
) -> dict:
    """Store every case in one form: bytes, milliseconds, and where there is something to match, the errors."""
    num_bytes, encode_s, decode_s = [], [], []
    with tempfile.TemporaryDirectory(prefix="storage_") as folder:
        for name in names:
            embedding = embedding_of(name)
            begin = time.process_time()
            save_embedding(folder, embedding, storage)
            encode_s.append(time.process_time() - begin)
            begin = time.process_time()
            load_embedding(folder, name)
            decode_s.append(time.process_time() - begin)
            num_bytes.append(embedding_path(folder, name).stat().st_size)
        errors = evaluate(Path(folder)) if evaluate else {}
    return {
        "bytes_per_case": float(np.mean(num_bytes)),
        "encode_cpu_ms": 1e3 * float(np.mean(encode_s)),
        "decode_cpu_ms": 1e3 * float(np.mean(decode_s)),
        **errors,
    }


def measure_forms(
    forms: Sequence[str],
    names: Sequence[str],
    embedding_of: Callable[[str], Embedding],
    published: float,
    evaluate: Callable[[Path], dict] | None = None,
) -> dict:
    """Every form beside the published pickle (bytes per case) and beside fp16: sizes, and changes of the errors."""
    figures = {}
    for form in forms:
        print(f"{form} ...", file=sys.stderr, flush=True)
        own = figures[form] = measure_form(FORMS[form], names, embedding_of, evaluate)
        own["times_smaller"] = published / own["bytes_per_case"]
        own["times_smaller_than_fp16"] = figures["fp16"]["bytes_per_case"] / own["bytes_per_case"]
        for error in ("median_mm", "p90_mm", "cycle_mm"):
            if error in own:
                own[f"{error}_change"] = own[error] - figures["fp16"][error]
    return {"num_cases": len(names), "published_bytes": published, "forms": figures}


def run(flags: jsonargparse.Namespace) -> dict:
    """Measure all forms; the errors too where a checkpoint is given."""
    if flags.checkpoint_file and not flags.landmark_dir:
        raise ValueError("--checkpoint_file needs --landmark_dir, by which errors are measured")
    torch.set_num_threads(flags.num_threads)
    forms = QUICK_FORMS if flags.quick else chosen(["fp16", *flags.forms], list(FORMS), "--forms")
    measure = run_on_cases if flags.checkpoint_file else run_on_random
    return measure(flags, forms) | {"default": dataclasses.asdict(Storage())}


def run_on_random(flags: jsonargparse.Namespace, forms: Sequence[str]) -> dict:
    """Sizes and times of one torso of random vectors."""
    grid = QUICK_VOX if flags.quick else TORSO_VOX
    embedding = made_up_embedding(grid)
    published = published_bytes(Volume(np.empty(grid, dtype=np.int8), np.diag([GRID_MM] * 3 + [1.0]), "torso"))
    found = measure_forms(forms, ["torso"], lambda _: embedding, published)
    return found | {"num_channels": NUM_CHANNELS, "body_share": float(embedding.body.float().mean())}


def run_on_cases(flags: jsonargparse.Namespace, forms: Sequence[str]) -> dict:
    """Sizes, times and errors of the held-out cases."""
    cases = open_cases(options_of(flags, CaseOptions))
    with tempfile.TemporaryDirectory(prefix="embeddings_") as scratch:
        load = partial(load_embedding, flags.embed_dir or scratch)
        landmarks = embed_held_out(flags, cases, flags.embed_dir or scratch)

        def evaluate(folder: Path) -> dict:
            cache = EmbeddingCache(folder, flags.cache_mb)
            found = summarise(evaluate_pairs(cache.__getitem__, landmarks, show_progress=False))
            errors = {name: found["sam"][name] for name in ("median_mm", "p90_mm")}
            return errors | {"cycle_mm": found["median_cycle_mm"], "num_matches": found["num_matches"]}

        names = sorted(landmarks)
        published = float(np.mean([published_bytes(cases.read(name)) for name in names]))
        found = measure_forms(forms, names, load, published, evaluate)
        first = load(names[0])
    return found | {"num_channels": first.fine.shape[0], "fine_spacing_mm": first.fine_spacing_mm}


def markdown(found: dict) -> str:
    """The sizes of what was measured, and the table."""
    header = ["form", "MB per case", "times smaller than published", "than fp16", "encode ms", "decode ms"]
    errors = [error for error in ("median_mm", "p90_mm", "cycle_mm") if error in found["forms"]["fp16"]]
    header += [f"{error.replace('_', ' ')} (change)" for error in errors]
    lines = []
    for name, own in found["forms"].items():
        line = [name, f"{own['bytes_per_case'] / 1e6:.3f}", f"{own['times_smaller']:.1f}"]
        line += [f"{own[key]:.1f}" for key in ("times_smaller_than_fp16", "encode_cpu_ms", "decode_cpu_ms")]
        lines.append(line + [f"{own[error]:.2f} ({own[f'{error}_change']:+.2f})" for error in errors])
    sizes = f"{found['num_cases']} case(s), {found['num_channels']} channels"
    published = f"published: {found['published_bytes'] / 1e6:.1f} MB per case; CPU time"
    return f"{sizes}; {published}\n\n{table(lines, header)}"


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted: sizes, and with a checkpoint the error."""
    own, base = found["forms"]["default"], found["forms"]["fp16"]
    smaller = (f"{own['times_smaller']:.0f}x", f">= {WANTED_SMALLER}x")
    sizes = (f"{own['bytes_per_case'] / 1e6:.2f} MB", f"{found['published_bytes'] / 1e6:.1f} MB, published pickle")
    lines = [(f"embedding on disk, {found['num_channels']} channels", *sizes, *smaller)]
    if "median_mm" in own:
        change = (f"{own['median_mm_change']:+.2f} mm", f"< +{WANTED_CHANGE_MM} mm")
        lines.append(("its median error", f"{own['median_mm']:.2f} mm", f"{base['median_mm']:.2f} mm, fp16", *change))
    return lines


main = command(__name__, make_flags, run, markdown)

"""Does CASA need the view? Each of its forms trained for a few dozen steps, and asked about another view.

    python -m benchmarks.casa_views --output results/benchmarks/casa_views.json

Trains a small U-Net by main_ddp.py on coarse phantoms, with pairs at the same relative place of two bodies, once per
form, with the same seed and samples. Measured on held-out samples at the end, means over query tokens:

    gap        casa_cos_right - casa_cos_shuffled: S agrees with what it learns from its own view rather than another's.
               For `deviation` these are deviations from the mean over views, so that their gap is larger by itself.
    picked     share of queries whose S is nearer to the teacher's answer from the own view than to that from another;
               0.5 = by chance. Comparable between forms.
    unmoved    cosine of S with the student's own answer to the same query from another view: 1 = the query alone
               decides, the view nothing.
    entropy    casa_entropy, 1 = attention looks everywhere alike
    loss_recon of the masked voxels; the form without CASA is the one to beat
"""

import json
import tempfile
from pathlib import Path

import jsonargparse
import torch
from torch import nn

import main_ddp
from benchmarks.corpus import corpus_flags, make_corpus, write_phantoms
from benchmarks.results import benchmark_parser, chosen, command, table, words
from datasets.lists.data_list import write_data_list
from datasets.samples.loader import make_pair_loader
from engine.distributed import World
from engine.pretrain_data import open_data
from engine.run import load_pretraining
from losses.collapse import mean_cosine
from models.methods import Alice
from models.methods.method import Batch, rows_of

RANGE = "chest_abdomen_pelvis"
COMMON = {
    **{"backbone": "unet", "feature_size": 8, "mask_block": 8, "mask_ratio": 0.6, "query_stride": 8, "key_stride": 4},
    **{"out_dim": 64, "head_hidden_dim": 64, "head_bottleneck_dim": 32},
    **{"casa_heads": 4, "casa_head_dim": 16, "casa_hidden_dim": 128},
    **{"centring": "sinkhorn", "teacher_temp": 0.012, "warmup_teacher_temp": 0.012, "warmup_teacher_temp_epochs": 0},
    **{"momentum_teacher": 0.99, "freeze_last_layer": 0, "lambda1": 0.1, "lambda2": 0.1, "lambda3": 100},
    **{"epochs": 1, "warmup_epochs": 0.1, "lr": 2e-3, "min_lr": 2e-5, "min_score": 0, "batch_size": 4},
    **{"num_workers": 0, "device": "cpu", "precision": "fp32", "log_freq": 10, "picture_freq": 0, "val_freq": 1},
    **{"num_val_pairs": 16},
}
AWAKE = {"casa_cosine_scale": 10}
PSI, NORMALISE, MASKED = {"shared_head_teacher": False}, {"casa_normalise": True}, {"casa_queries": "masked"}
CONTRAST, DEVIATION = {"casa_target": "contrast"}, {"casa_target": "deviation"}
FORMS = {
    "no_casa": {"lambda2": 0},
    "figure": {},
    "published": {"casa_variant": "published"},
    "cosine": AWAKE,
    "cosine_psi": AWAKE | PSI,
    "cosine_normalise": AWAKE | NORMALISE,
    "cosine_masked": AWAKE | MASKED,
    "cosine_deviation": AWAKE | DEVIATION,
    "cosine_contrast": AWAKE | CONTRAST,
    "contrast": CONTRAST,
    "deviation_all": AWAKE | PSI | NORMALISE | MASKED | DEVIATION,
    "contrast_all": AWAKE | PSI | NORMALISE | MASKED | CONTRAST,
}
COLUMNS = ("gap", "picked", "unmoved", "entropy", "loss_recon")


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "two phantoms to train with and two steps")
    parser.add_argument("--forms", type=list[str], default=list(FORMS), help="which forms to train")
    parser.add_argument("--num_phantoms", type=int, default=8, help="phantoms; a quarter, 2 at least, is held out")
    parser.add_argument("--num_steps", type=int, default=40, help="optimiser steps of each form")
    parser.add_argument("--seeds", type=list[int], default=[0], help="each form is trained once with each")
    parser.add_argument("--coarsen", type=float, default=2.0, help="factor on the phantoms' voxel sizes")
    parser.add_argument("--roi", type=int, default=32, help="side of the crops, voxels of 6 mm")
    return parser


def run(flags: jsonargparse.Namespace) -> dict:
    """The figures of every form and seed."""
    if flags.quick:
        flags.num_phantoms, flags.num_steps = 4, 2
    forms = chosen(flags.forms, list(FORMS), "--forms")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        make_phantoms(corpus, flags.num_phantoms, flags.coarsen)
        found = {}
        for form in forms:
            found[form] = [measure(corpus, form, flags.num_steps, flags.roi, seed) for seed in flags.seeds]
            print(form, found[form], flush=True)
    return {"forms": found, "num_steps": flags.num_steps, "seeds": flags.seeds}


def make_phantoms(folder: Path, num_phantoms: int, coarsen: float) -> None:
    """Phantoms, some held out, their store of 6 mm voxels, and pairs."""
    cases = write_phantoms(folder / "phantoms", num_phantoms, RANGE, coarsen)
    make_corpus(cases, folder, rows_per_case=64, spacing_mm=(6.0, 6.0, 6.0))
    num_held_out = max(2, num_phantoms // 4)
    write_data_list(folder / "list.json", folder, cases[:-num_held_out], cases[-num_held_out:])


def measure(corpus: Path, form: str, num_steps: int, roi: int, seed: int) -> dict[str, float]:
    """Train one form, and judge it on the held-out samples."""
    paths = corpus_flags(corpus, roi) | {"output_dir": corpus / f"{form}-{seed}"}
    argv = words(**(COMMON | FORMS[form]), **paths, steps_per_epoch=num_steps, seed=seed)
    main_ddp.main(list(argv))
    lines = [json.loads(line) for line in (paths["output_dir"] / "log.txt").read_text().splitlines()]
    held_out = next(line for line in lines if line["kind"] == "validation")
    found = {"loss_recon": held_out["loss_recon"]}
    if "casa_cos_right" not in held_out:
        return found
    found |= {"gap": held_out["casa_cos_right"] - held_out["casa_cos_shuffled"], "entropy": held_out["casa_entropy"]}
    return found | ask_another_view(argv, paths["output_dir"] / "checkpoint.pth")


@torch.no_grad()
def ask_another_view(argv: tuple[str, ...], checkpoint: Path) -> dict[str, float]:
    """`picked` and `unmoved` of a trained method, over the held-out samples."""
    flags = main_ddp.make_flags().parse_args(list(argv))
    method, state = main_ddp.build_method(flags).eval(), load_pretraining(checkpoint)
    for name, part in method.networks().items():
        part.load_state_dict(state[name])
    data = open_data(flags, method, World()).validation
    num_batches = flags.num_val_pairs // flags.batch_size
    batches = make_pair_loader(data, flags.batch_size, 0, 1, num_workers=0, num_steps=num_batches)
    readings = [read_batch(method, batch) for batch in batches]
    return {name: sum(reading[name] for reading in readings) / len(readings) for name in readings[0]}


def read_batch(method: Alice, batch: Batch) -> dict[str, float]:
    """`picked` and `unmoved` of one batch."""
    with AskedAgain(method.student.casa.Cross_Att) as again:
        student = method.student(rows_of(batch["student"]), rows_of(batch["mask"]))
    teacher, online = method.teacher(rows_of(batch["teacher"]), student.casa_query), student.casa_online
    nearness = [
        nn.functional.cosine_similarity(online, x, dim=-1) for x in (teacher.casa_target, teacher.casa_shuffled)
    ]
    return {
        "picked": (nearness[0] > nearness[1]).float().mean().item(),
        "unmoved": mean_cosine(online, again.answer).item(),
    }


class AskedAgain:
    """Asks the first call's queries of the next sample's views as well, inside a `with` block."""

    def __init__(self, cross_attention: nn.Module) -> None:
        self.module, self.answer = cross_attention, None

    def __enter__(self) -> "AskedAgain":
        self.hook = self.module.register_forward_hook(self._ask, with_kwargs=True)
        return self

    def _ask(self, module: nn.Module, inputs: tuple, named: dict, output: torch.Tensor) -> None:
        query, source = inputs
        self.answer = module.forward(query, source.roll(2, dims=0), **named)

    def __exit__(self, *error) -> None:
        self.hook.remove()


def describe(found: dict) -> str:
    """One line a form: means over seeds."""
    lines = []
    for form, readings in found["forms"].items():
        values = [sum(r[name] for r in readings) / len(readings) if name in readings[0] else None for name in COLUMNS]
        lines.append((form, *("" if value is None else f"{value:.3f}" for value in values)))
    return table(lines, ("form", *COLUMNS))


main = command(__name__, make_flags, run, describe)

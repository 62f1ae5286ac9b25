"""What a training step of every method costs for each voxel that it sees: FLOPs, counted, on one backbone.

    python -m benchmarks.method_costs --output results/benchmarks/method_costs.json

A step is one forward and backward pass of all crops through student and teacher, walked through without computing it
(see `benchmarks.cost_model`). FLOPs are those of convolutions and matrix products, two per multiply-add. A voxel that
two crops show counts twice, as in the comparison of pretrainings. Augmentation, optimiser and averages are left out.

A second table says what corpora cost: GPU hours at an assumed share of the GPU's peak, every method seeing the same
number of voxels of each volume.
"""

import dataclasses
import math

import jsonargparse
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model import CPU, add_assumptions, fake
from benchmarks.method_steps import HEAD_QUICK, NUM_BASES, NUM_RANDOM, Case, make_batch
from benchmarks.pretrain_step import NOW
from benchmarks.results import benchmark_parser, command, table
from engine.device import autocast
from models.backbones import BACKBONES
from models.layers.window_attention import use_fast_window_attention
from models.methods.alice import Alice
from models.methods.method import Method

ALONE = {"lambda1": 0.0, "lambda2": 0.0}
SMALL = {name: HEAD_QUICK[name] for name in ("head_hidden_dim", "head_bottleneck_dim", "out_dim")}
CASES = {
    "masked image modelling": Case("alice", "swin_unetr", options=ALONE),
    "alice": Case("alice", "swin_unetr", quick=SMALL),
    "simsiam": Case("simsiam", "swin_unetr", quick={"projector_dim": 32, "projector_hidden_dim": 32}),
    "dino": Case("dino", "swin_unetr", quick=SMALL),
    "voco": Case("voco", "swin_unetr", NUM_BASES + NUM_RANDOM, quick={"voco_dim": 16}),
    "caid": Case("caid", "swin_unetr"),
}


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = benchmark_parser(__doc__, "a tiny U-Net with small heads: to see that it counts")
    add = parser.add_argument
    add("--backbone", type=str, default="swin_unetr", choices=[name for name in BACKBONES if name != "resnet50_unet"])
    add("--roi", type=int, nargs=3, default=[64, 64, 64], help="crop D H W, voxels")
    add("--feature_size", type=int, default=48, help="the backbone's channels at stride 2")
    add("--crops_per_volume", type=float, default=2000.0, help="crops of 96 voxels a side that each volume is seen in")
    add_assumptions(parser, 0.2, "share of that rate which a step is assumed to reach")
    return parser


def gpu_hours(gflop_per_million_voxels: float, num_volumes: int, flags: jsonargparse.Namespace) -> float:
    """Hours of one GPU for a corpus."""
    million_voxels = num_volumes * flags.crops_per_volume * 96**3 / 1e6
    return million_voxels * gflop_per_million_voxels / (1000 * flags.peak_tflops * flags.utilisation) / 3600


def step_flops(method: Method, case: Case, roi: tuple[int, int, int]) -> int:
    """FLOPs of the forward and backward pass of a batch."""
    if isinstance(method, Alice) and method.student.casa is not None:
        # CASA's monitor looks at two rows of the batch and trains nothing.
        method.student.casa.attention_weights = lambda query, source: torch.full((1, 1, 2), 0.5)
    with fake(method):
        batch = make_batch(case, roi, CPU)
        with FlopCounterMode(display=False) as counting:
            with autocast("bf16", CPU):
                total, _ = method(batch, NOW)
            total.backward()
    return counting.get_total_flops()


def run(flags: jsonargparse.Namespace) -> dict:
    """Parameters and GFLOP a million voxels of every method, as plain values."""
    if flags.quick:
        flags.backbone, flags.feature_size, flags.roi = "unet", 4, [32, 32, 32]
    roi, feature_size, found = tuple(flags.roi), flags.feature_size, {}
    for name, case in CASES.items():
        case = dataclasses.replace(case, backbone=flags.backbone)
        method = case.make(roi, feature_size, use_checkpoint=False, is_quick=flags.quick)
        use_fast_window_attention(method, "monai")  # in one piece: thousands of small ones take long to walk through
        voxels = case.num_samples * case.num_crops * math.prod(roi)
        found[name] = {
            "num_crops": case.num_crops,
            "num_trained": sum(p.numel() for p in method.student.parameters() if p.requires_grad),
            "gflop_per_million_voxels": step_flops(method, case, roi) / voxels * 1e6 / 1e9,
        }
        cost = found[name]["gflop_per_million_voxels"]
        found[name]["gpu_hours"] = {str(number): gpu_hours(cost, number, flags) for number in flags.num_volumes}
    assumed = {name: getattr(flags, name) for name in ("crops_per_volume", "peak_tflops", "utilisation")}
    return {"backbone": flags.backbone, "roi": list(roi), "feature_size": feature_size, "methods": found} | assumed


def markdown(found: dict) -> str:
    """Two tables with a line a method; the last column of the first is relative to the first method."""
    least = next(iter(found["methods"].values()))["gflop_per_million_voxels"]
    lines = [
        (
            name,
            str(cost["num_crops"]),
            f"{cost['num_trained'] / 1e6:.1f} M",
            f"{cost['gflop_per_million_voxels']:,.0f}",
            f"{cost['gflop_per_million_voxels'] / least:.2f}",
        )
        for name, cost in found["methods"].items()
    ]
    counted = table(lines, ("method", "crops a sample", "trained parameters", "GFLOP a million voxels", "ratio"))
    hours = {name: cost["gpu_hours"] for name, cost in found["methods"].items()}
    reached = f"{found['utilisation']:.0%} of {found['peak_tflops']:g} TFLOP/s"
    seen = f"{found['crops_per_volume']:g} crops of 96 voxels a side"
    assumed = f"GPU hours where a step reaches {reached} and each volume is seen in {seen}:"
    volumes = list(next(iter(hours.values())))
    costs = table(
        [(name, *(f"{corpora[number]:,.0f}" for number in volumes)) for name, corpora in hours.items()],
        ("method", *(f"{int(number):,} volumes" for number in volumes)),
    )
    return "\n\n".join([counted, assumed, costs])


main = command(__name__, make_flags, run, markdown)

"""Layouts of a network's maps: torch's usual one; channels last with torch's norms; channels last with ours.

    python -m benchmarks.layouts --device cpu
    python -m benchmarks.layouts --device cuda --backbone swin_unetr --feature_size 48 --side 96 --precision bf16

Torch's instance norm makes a channels-last map contiguous again, ours (`models.layers.instance_norm`) keeps it. Timed
is the forward and backward pass of encoder and decoder over masked crops, the ways turn about, in one process.
"""

import contextlib
import copy
import statistics
from unittest import mock

import jsonargparse
import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from benchmarks.pretrain_step import clock
from benchmarks.results import benchmark_parser, command, table
from engine.device import autocast, keep_freed_memory, pick_device, pick_precision, use_channels_last
from models.backbones import BACKBONES
from models.layers import instance_norm

WAYS = ("contiguous", "channels last, torch's norms", "channels last, our norms")


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = benchmark_parser(__doc__, "one round of a tiny network", device=True, num_threads=2)
    add = parser.add_argument
    of_volumes = sorted(name for name, kind in BACKBONES.items() if 3 in kind.spatial_dims)
    add("--backbone", type=str, choices=of_volumes, default="unet", help="network")
    add("--feature_size", type=int, default=16, help="its channels at stride 2")
    add("--side", type=int, default=32, help="of a crop, voxels")
    add("--num_crops", type=int, default=16, help="crops a step")
    add("--num_rounds", type=int, default=10, help="timed steps of each way, after one that is not")
    add("--precision", type=str, choices=["auto", "fp32", "bf16"], default="auto", help="number format")
    return parser


def torch_norms() -> contextlib.AbstractContextManager:
    """Inside, our norms do what torch's would: they make every map contiguous."""
    return mock.patch.object(instance_norm, "is_channels_last", lambda x: False)


def run(flags: jsonargparse.Namespace) -> dict:
    """Median and least milliseconds of each way; how far their outputs are apart; how many norms there are."""
    if flags.quick:
        flags.feature_size, flags.num_crops, flags.num_rounds = 12, 2, 1
    device = pick_device(flags.device, 0)
    precision = pick_precision(flags.precision, device)
    torch.set_num_threads(flags.num_threads)
    torch.manual_seed(0)
    if device.type == "cpu":
        keep_freed_memory()
    plain = BACKBONES[flags.backbone](flags.feature_size, (flags.side,) * 3)
    networks = [plain, *(copy.deepcopy(plain) for _ in WAYS[1:])]
    use_channels_last(*networks[1:])
    networks = [network.to(device) for network in networks]
    crops = torch.rand(flags.num_crops, 1, *(flags.side,) * 3, device=device)
    masked = torch.rand(flags.num_crops, *(flags.side // 8,) * 3, device=device) < 0.6
    seconds, outputs = {way: [] for way in WAYS}, {}
    for _ in range(flags.num_rounds + 1):
        for way, network in zip(WAYS, networks):
            with torch_norms() if way == WAYS[1] else contextlib.nullcontext():
                outputs[way], spent = step(network, crops, masked, precision, device)
            seconds[way].append(spent)
    reference = outputs[WAYS[0]]
    return {
        "ms": {way: 1000 * statistics.median(spent[1:]) for way, spent in seconds.items()},
        "least_ms": {way: 1000 * min(spent[1:]) for way, spent in seconds.items()},
        "largest_difference": max((one - reference).abs().max().item() for one in outputs.values()),
        "num_norms": sum(isinstance(part, _InstanceNorm) for part in plain.modules()),
        "device": str(device),
        "precision": precision,
    }


def step(
    network: nn.Module, crops: torch.Tensor, masked: torch.Tensor, precision: str, device: torch.device
) -> tuple[torch.Tensor, float]:
    """The restored crops in float32, and the seconds of a forward and backward pass."""
    network.zero_grad(set_to_none=True)
    begun = clock(device)
    with autocast(precision, device):
        restored = network.decode(network.encode(crops, masked))[0]
    restored.float().square().mean().backward()
    return restored.detach().float(), clock(device) - begun


def describe(found: dict) -> str:
    """A table of the ways."""
    first = found["ms"][WAYS[0]]
    lines = [
        (way, f"{found['ms'][way]:.0f}", f"{found['least_ms'][way]:.0f}", f"{first / found['ms'][way]:.2f}")
        for way in WAYS
    ]
    facts = f"{found['num_norms']} instance norms, {found['precision']} on {found['device']}"
    apart = f"outputs are at most {found['largest_difference']:.1e} apart"
    return table(lines, ("maps", "ms, median", "ms, least", "speed-up")) + f"\n\n{facts}; {apart}"


main = command(__name__, make_flags, run, describe)

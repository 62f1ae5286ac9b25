"""What Alice adds to a step beside its networks: moving average, masks and losses, as shares of the step.

    python -m benchmarks.step_overheads --quick --device cpu

The step is that of `benchmarks.pretrain_step` at the default flags. Timed by themselves, medians: the teacher's moving
average; drawing the block masks of a batch (in training the loading processes do it, beside the step); hiding masked
patches and voxels; the three losses, forward and backward to the networks' outputs.
"""

from collections.abc import Callable

import jsonargparse
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.pretrain_step import (
    MASK_BLOCK,
    MASKED_SHARE,
    NOW,
    QUICK,
    Bench,
    Setting,
    make_bench,
    rungs,
    step_parser,
    synthetic_batch,
)
from benchmarks.results import Rows, command, table, timed
from datasets.samples.masks import draw_mask, mask_grid, num_masked_blocks
from engine.device import autocast, pick_precision
from models.backbones.interface import upsample_mask
from models.methods.method import average_towards, rows_of


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = step_parser(__doc__, "a tiny network and fewer repeats")
    parser.add_argument("--roi", type=int, default=96, help="side of a crop, voxels; --quick: 64")
    parser.add_argument("--num_pairs", type=int, default=1, help="pairs a step")
    parser.add_argument("--num_repeats", type=int, default=10, help="of each part; the step is timed over two")
    return parser


def run(flags: jsonargparse.Namespace) -> dict:
    """Times of the step and of its parts, seconds."""
    bench = make_bench(flags)
    precision = pick_precision("auto", bench.device)
    side = min(64, flags.roi) if flags.quick else flags.roi
    roi = (side, side, side)
    setting = rungs(roi, flags.num_pairs, precision, bench.device.type == "cpu")[-1]
    measured = bench.measure(setting, num_steps=2)
    if "error" in measured:
        raise RuntimeError(f"the step did not run: {measured['error']}")

    def until_done(part: Callable[[], object]) -> None:
        part()
        bench.clock()

    num_repeats = 3 if flags.quick else flags.num_repeats
    seconds = {}
    for name, part in make_parts(bench, setting, precision).items():
        until_done(part)  # the first time is longer
        seconds[name] = timed(until_done, [part] * num_repeats).wall_s
    return {
        "step_wall_s": measured["step_ms"] / 1000,
        "parts_wall_s": seconds,
        "roi": list(roi),
        "num_pairs": flags.num_pairs,
        "feature_size": QUICK["feature_size"] if flags.quick else flags.feature_size,
        "device": str(bench.device),
    }


class Answer(nn.Module):
    """Stands in for a network whose outputs are known; the loss asks its CASA nothing by default."""

    casa = None

    def __init__(self, outputs: tuple) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: object) -> tuple:
        return self.outputs


def make_parts(bench: Bench, setting: Setting, precision: str) -> dict[str, Callable[[], object]]:
    """What is timed, each as a function without arguments."""
    device, roi, num_pairs = bench.device, setting.roi, setting.num_pairs
    method = bench.methods[False].to(device)
    student, teacher = method.student, method.teacher
    batch = synthetic_batch(num_pairs, roi, device)
    masked, volumes = rows_of(batch["mask"]), rows_of(batch["student"])
    with torch.no_grad(), autocast(precision, device):
        online = student(volumes, masked)
        target = teacher(rows_of(batch["teacher"]), online.casa_query)
    names = ("cls_logits", "casa_online", "reconstruction")
    online = online._replace(**{name: getattr(online, name).detach().requires_grad_() for name in names})
    method.student, method.teacher = Answer(online), Answer(target)  # the losses alone are left
    rng, grid = np.random.default_rng(0), mask_grid(roi, MASK_BLOCK)
    num_masked = num_masked_blocks(grid, MASKED_SHARE)
    backbone = student.backbone
    was_skipped = torch.tensor(False, device=device)
    tokens = torch.rand(2 * num_pairs, backbone.channels[2], *(side // 2 for side in roi), device=device)

    def hide() -> tuple[Tensor, Tensor]:
        patches = torch.where(upsample_mask(masked, tuple(tokens.shape[2:])), backbone.mask_token, tokens)
        return patches, torch.where(upsample_mask(masked, roi), backbone.mask_voxel, volumes)

    return {
        "moving average": lambda: average_towards(teacher, student, NOW["momentum_teacher"], was_skipped),
        "drawing masks": lambda: [draw_mask(rng, grid, num_masked) for _ in range(2 * num_pairs)],
        "hiding what is masked": hide,
        "losses": lambda: method(batch, NOW)[0].backward(),
    }


def rows(found: dict) -> Rows:
    """What, ours, beside, ratio, wanted: one line for all parts together."""
    step_s, parts = found["step_wall_s"], found["parts_wall_s"]
    times = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in parts.items())
    share = sum(parts.values()) / step_s
    return [("moving average, masks, losses", times, f"{step_s:.2f} s, the step", f"{100 * share:.2f} %", "< 2 %")]


main = command(__name__, make_flags, run, lambda found: table(rows(found)))

"""What a step of Alice must cost, and a corpus: FLOPs and bytes, the floor on a GPU, disk, GPU hours and network.

    python -m benchmarks.cost_model --pairs_per_s 20 --output results/cost.json

The step is walked through without computing it (fake tensors), so that no GPU is needed and nothing is timed. FLOPs are
those of convolutions and matrix products, two per multiply-add. Bytes are the activations kept for the backward pass in
bf16, written once and read once, and weights, gradients, moments and moving average, each touched as AdamW needs: less
than any real step moves, since normalisations and activations in between are left out. The floor is the larger of the
two times at the GPU's peak rates; nobody reaches it. The levers are what a step moves beyond that, and what would save
it: estimates from the sizes of tensors, at the rates of the GPU's memory and of its connections.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jsonargparse
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pretrain_step import NOW, make_alice, synthetic_batch
from benchmarks.results import benchmark_parser, command, table
from benchmarks.step_overheads import Answer
from engine.device import autocast
from models.layers.window_attention import FastWindowAttention
from models.methods.alice import AliceStudent
from models.methods.method import rows_of

CPU = torch.device("cpu")
TFLOP, GB = 1e12, 1e9
PASSES = ("student", "teacher", "backward")
BLOCK = 32  # side of the blocks that the store decompresses, voxels
PARTS = {  # of SwinUNETR, by the names of its modules
    "full-resolution decoder (decoder1)": ("backbone.network.decoder1",),
    "full-resolution encoder block (encoder1)": ("backbone.network.encoder1",),
    "other convolutions": tuple(
        f"backbone.network.{name}" for name in ("encoder2", "encoder3", "encoder4", "encoder10")
    )
    + tuple(f"backbone.network.decoder{number}" for number in (2, 3, 4, 5)),
    "Swin transformer": ("backbone.network.swinViT",),
    "head and CASA": ("head", "casa"),
}


@dataclass(frozen=True)
class StepCost:
    """One pair's share of a step.

    Attributes:
        parts: name -> FLOPs of the student's forward pass.
        student, teacher, backward: FLOPs of the three passes.
        kept_bytes: activations kept for the backward pass.
        num_trained, num_averaged: parameters of student and teacher.
        norm_elements: values that the student's instance norms give.
        bias_elements: of window attention's added term, a matrix for each window and head of the student.
    """

    parts: dict[str, float]
    student: float
    teacher: float
    backward: float
    kept_bytes: float
    num_trained: int
    num_averaged: int
    norm_elements: float
    bias_elements: float

    @property
    def flops(self) -> float:
        return self.student + self.teacher + self.backward

    def step_bytes(self, num_pairs: int) -> float:
        """What a step of so many pairs must move at least.

        AdamW reads gradient, weight and two moments and writes three of them in float32; the average reads and writes.
        """
        return 2 * self.kept_bytes * num_pairs + 4 * (7 * self.num_trained + 3 * self.num_averaged)


@contextmanager
def fake(*modules: nn.Module) -> Iterator[None]:
    """Within: the modules' tensors, and all made from them, have shapes and types but no values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        for module in modules:
            module._apply(mode.from_tensor)
        with mode:
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def step_cost(roi: tuple[int, int, int], num_pairs: int = 2, **options) -> StepCost:
    """Walk through a step in bf16 of `benchmarks.pretrain_step.make_alice(roi, **options)`; all figures per pair."""
    method = make_alice(roi, **options)
    student, teacher = method.student, method.teacher
    # Its monitor looks at two rows of the batch and trains nothing.
    student.casa.attention_weights = lambda query, source: torch.full((1, 1, 2), 0.5)
    num_trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    num_averaged = sum(p.numel() for p in teacher.parameters())
    kept: dict[int, torch.UntypedStorage] = {}  # by address, and held, so that no two share one

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    counts_of_elements = {"norm": 0, "bias": 0}

    def count_norm(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        counts_of_elements["norm"] += output.numel()

    def count_bias(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        windows, tokens, _ = inputs[0].shape
        counts_of_elements["bias"] += windows * module.num_heads * tokens**2

    for part in student.modules():
        if isinstance(part, nn.modules.instancenorm._InstanceNorm):
            part.register_forward_hook(count_norm)
        elif isinstance(part, FastWindowAttention):
            part.register_forward_hook(count_bias)
    with fake(method):
        batch = synthetic_batch(num_pairs, roi, CPU)
        counting, keeping = FlopCounterMode(display=False), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with counting as forward, keeping, autocast("bf16", CPU):
            online = student(rows_of(batch["student"]), rows_of(batch["mask"]))
        with FlopCounterMode(display=False) as target_pass, autocast("bf16", CPU):
            target = teacher(rows_of(batch["teacher"]), online.casa_query)
        method.student, method.teacher = Answer(online), Answer(target)
        total, _ = method(batch, NOW)
        with FlopCounterMode(display=False) as backward:
            total.backward()
    counts = {name: sum(by_op.values()) for name, by_op in forward.get_flop_counts().items()}
    parts = {part: sum(flops_of(name, counts) for name in names) / num_pairs for part, names in PARTS.items()}
    passes = [counter.get_total_flops() / num_pairs for counter in (forward, target_pass, backward)]
    kept_bytes = sum(storage.nbytes() for storage in kept.values()) / num_pairs
    elements = [count / num_pairs for count in counts_of_elements.values()]
    return StepCost(parts, *passes, kept_bytes, num_trained, num_averaged, *elements)


def levers(cost: StepCost, roi: tuple[int, int, int], flags) -> dict[str, dict[str, float]]:
    """What a step moves beyond the floor, and the time that this takes: {lever: {"gb": ..., "ms": ...}}.

    Norms in torch's own form: the convolution's output is converted to contiguous and back (4 passes over it), is read
    twice and written (3), and the activation reads and writes (2); as much again backward. One fused kernel that keeps
    the layout reads twice and writes once, and as much again backward. Window attention writes and reads the gradient
    of its added term. Views of a pair: float32 student's, teacher's and clean crops of both, or int16 crops.
    """
    memory, pairs = flags.memory_tb_per_s * 1e12, flags.batch_size
    norms = 2 * 2 * cost.norm_elements * pairs  # bf16, forward and backward
    voxels = 2 * math.prod(roi) * pairs
    gradients = 4 * cost.num_trained
    moved = {
        "norms and layout, torch's": (9 * norms, memory),
        "norms and layout, fused and channels last": (3 * norms, memory),
        "gradient of the position bias, written and read": (2 * 2 * cost.bias_elements * pairs, memory),
        "views to the device, float32": (3 * 4 * voxels, flags.pcie_gb_per_s * GB),
        "views to the device, int16 crops": (2 * voxels, flags.pcie_gb_per_s * GB),
        "gradients between ranks, float32": (2 * gradients, flags.network_gb_per_s * GB),
        "gradients between ranks, --allreduce_bf16": (gradients, flags.network_gb_per_s * GB),
    }
    return {name: {"gb": size / GB, "ms": 1000 * size / rate} for name, (size, rate) in moved.items()}


def flops_of(name: str, counts: dict[str, float]) -> float:
    """What was counted below a module of the student, also where the module itself was never called."""
    path = f"{AliceStudent.__name__}.{name}"
    called = [key for key in counts if key == path or key.startswith(f"{path}.")]
    return sum(counts[key] for key in called if not any(key.startswith(f"{other}.") for other in called))


def add_assumptions(parser: jsonargparse.ArgumentParser, utilisation: float, meaning: str) -> None:
    """Flags of what is assumed of a GPU, and for which corpora hours are told."""
    add = parser.add_argument
    add("--peak_tflops", type=float, default=790.0, help="the GPU's bf16 rate, TFLOP/s (H200: 790 reached)")
    add("--utilisation", type=float, default=utilisation, help=f"{meaning}, 0 to 1")
    add("--num_volumes", type=int, nargs="+", default=[2000, 160000], help="corpora")


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this command."""
    parser = benchmark_parser(__doc__)
    add = parser.add_argument
    add("--roi", type=int, nargs=3, default=[96, 96, 96], help="crop D H W, voxels")
    add("--feature_size", type=int, default=48, help="channels of SwinUNETR at stride 2")
    add("--batch_size", type=int, default=8, help="pairs per GPU and step")
    add("--memory_tb_per_s", type=float, default=4.8, help="the GPU's memory rate, TB/s (H200: 4.8)")
    add("--pcie_gb_per_s", type=float, default=50.0, help="host to GPU, GB/s (PCIe 5: 50)")
    add("--network_gb_per_s", type=float, default=50.0, help="between GPUs, GB/s each (400 Gbit/s: 50)")
    add("--pairs_per_s", type=float, default=0.0, help="measured pairs per second and GPU; 0 = --utilisation instead")
    add_assumptions(parser, 0.25, "share of the floor's speed that is assumed")
    add("--num_gpus", type=int, nargs="+", default=[8, 64], help="GPUs that train")
    add("--epochs", type=int, default=1000, help="pairs per volume, as query")
    add("--volume_mm", type=float, nargs=3, default=[400.0, 350.0, 350.0], help="extent of a scan D H W, mm")
    add("--spacing_mm", type=float, nargs=3, default=[2.0, 1.5, 1.5], help="voxel size of the store D H W, mm")
    add("--bytes_per_voxel", type=float, default=0.72, help="of the compressed store (four real CT: 0.72)")
    return parser


def run(flags) -> dict:
    """All figures as plain values."""
    cost = step_cost(tuple(flags.roi), feature_size=flags.feature_size)
    compute_s = cost.flops * flags.batch_size / (flags.peak_tflops * TFLOP)
    memory_s = cost.step_bytes(flags.batch_size) / (flags.memory_tb_per_s * 1e12)
    floor_s = max(compute_s, memory_s)
    speed = flags.pairs_per_s or flags.utilisation * flags.batch_size / floor_s
    return {
        "step": dataclasses.asdict(cost) | {"flops": cost.flops},
        "floor": {
            "compute_ms": 1000 * compute_s,
            "memory_ms": 1000 * memory_s,
            "pairs_per_s": flags.batch_size / floor_s,
        },
        "levers": levers(cost, tuple(flags.roi), flags),
        "pairs_per_s": speed,
        "speed_is_measured": bool(flags.pairs_per_s),
        "share_of_floor": speed * floor_s / flags.batch_size,
        "batch_size": flags.batch_size,
        "epochs": flags.epochs,
        "corpora": [
            corpus(cost, flags, speed, volumes, gpus) for volumes in flags.num_volumes for gpus in flags.num_gpus
        ],
    }


def corpus(cost: StepCost, flags, pairs_per_s: float, num_volumes: int, num_gpus: int) -> dict:
    """What a corpus costs on so many GPUs at a given speed of each."""
    voxels = math.prod(extent / spacing for extent, spacing in zip(flags.volume_mm, flags.spacing_mm))
    blocks = math.prod(side / BLOCK + 1 for side in flags.roi)  # that a crop at a random place touches on average
    pair_bytes = 2 * blocks * BLOCK**3 * flags.bytes_per_voxel
    gpu_hours = num_volumes * flags.epochs / pairs_per_s / 3600
    steps_per_s = pairs_per_s / flags.batch_size
    gradient_bytes = 4 * cost.num_trained * 2 * (num_gpus - 1) / num_gpus  # ring all-reduce, sent by each GPU
    return {
        "num_volumes": num_volumes,
        "num_gpus": num_gpus,
        "store_tb": num_volumes * voxels * flags.bytes_per_voxel / 1e12,
        "gpu_hours": gpu_hours,
        "days": gpu_hours / num_gpus / 24,
        "read_gb_per_s": num_gpus * pairs_per_s * pair_bytes / GB,
        "gradients_gb_per_s_per_gpu": gradient_bytes * steps_per_s / GB,
    }


def markdown(found: dict) -> str:
    """The figures as two tables and a few lines."""
    step, floor = found["step"], found["floor"]
    lines = [(name, f"{v / TFLOP:.3f}", f"{v / step['student']:.0%}") for name, v in step["parts"].items()]
    passes = [(name, f"{step[name] / TFLOP:.2f}", f"{step[name] / step['flops']:.0%}") for name in PASSES]
    lines += [("**pass**", "", "of the step"), *passes, ("step", f"{step['flops'] / TFLOP:.2f}", "")]
    columns = {  # key of a corpus -> heading, format
        "num_volumes": ("volumes", ","),
        "num_gpus": ("GPUs", ""),
        "store_tb": ("store TB", ".2f"),
        "gpu_hours": ("GPU hours", ",.0f"),
        "days": ("days", ",.1f"),
        "read_gb_per_s": ("reading GB/s", ".2f"),
        "gradients_gb_per_s_per_gpu": ("gradients GB/s a GPU", ".2f"),
    }
    costs = [[format(corpus[key], form) for key, (_, form) in columns.items()] for corpus in found["corpora"]]
    text = (
        f"{step['num_trained'] / 1e6:.1f} M trained parameters, {step['num_averaged'] / 1e6:.1f} M averaged; "
        f"{step['kept_bytes'] / GB:.2f} GB of activations a pair. {found['batch_size']} pairs: at least "
        f"{floor['compute_ms']:.0f} ms of arithmetic and {floor['memory_ms']:.0f} ms of memory traffic, "
        f"{floor['pairs_per_s']:.0f} pairs/s at most. Below: {found['pairs_per_s']:.1f} pairs/s a GPU, "
        f"{found['share_of_floor']:.0%} of that ({'measured' if found['speed_is_measured'] else 'assumed'}); "
        f"{found['epochs']} pairs a volume."
    )
    parts = table(lines, ("part of the student's forward pass", "TFLOP a pair", "share"))
    moved = table(
        [(name, f"{lever['gb']:.1f}", f"{lever['ms']:.1f}") for name, lever in found["levers"].items()],
        (f"beyond the floor, {found['batch_size']} pairs", "GB a step", "ms"),
    )
    return "\n\n".join([parts, text, moved, table(costs, [heading for heading, _ in columns.values()])])


main = command(__name__, make_flags, run, markdown)

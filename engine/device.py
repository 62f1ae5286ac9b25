"""Number formats and layouts: which one a run computes in, and what follows from it.

Nothing here changes what is computed beyond rounding; what each choice brings is measured by
`python -m benchmarks.pretrain_step`.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(wanted: str, device: torch.device) -> str:
    """`auto` becomes bf16 on CUDA devices that compute it (not those that emulate it), and fp32 elsewhere.

    Raises:
        ValueError: an unknown name, or fp16 on a CPU (which computes it slowly and in few operations).
    """
    if wanted not in ("auto", *DTYPES):
        raise ValueError(f"--precision is {wanted}; expected auto, fp32, bf16 or fp16")
    if wanted == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 (or --use_fp16) needs a GPU; use --precision fp32 or auto on a CPU")
    return wanted


def fast_precision(device: torch.device) -> str:
    """The device's half precision, which benchmarks end with; fp32 where it only emulates one."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every PyTorch
    if device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asked):
        return "bf16"
    return pick_precision("auto", device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context that networks run in; does nothing for fp32. Losses run outside it, in fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; a scaler that does nothing for the others."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def on_gpus(flag: bool | None, device: torch.device) -> bool:
    """A flag that is on for GPUs unless it says otherwise (None = it does not)."""
    return device.type == "cuda" if flag is None else flag


def use_channels_last(*modules: nn.Module) -> None:
    """Store the weights of 3-D convolutions channels last; convolutions then compute in that layout. Values stay.

    Only tensors with five axes can have this layout; all others are left as they are. With one input channel both
    layouts are the same memory. The strides must say which one it is, else the convolution gives torch's usual one.
    """
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim == 5:
                laid_out = torch.empty_like(tensor, memory_format=torch.channels_last_3d)
                tensor.data = laid_out.copy_(tensor.data)


def compile_networks(*modules: nn.Module) -> None:
    """torch.compile in place: names in state dicts, the moving average and DDP see the modules that they saw before."""
    for module in modules:
        module.compile()


# Memory that a CPU step frees stays with the process, instead of going back to the kernel page by page.
#
# glibc maps every large block anew and unmaps it when it is freed, so that each step of training faults all pages of
# its activations in again. Where blocks come from the heap and its end is never given back, they are reused. Measured
# by `python -m benchmarks.pretrain_step`.


MMAP_THRESHOLD_BYTES = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
NEVER_TRIM = -1  # a step of SwinUNETR-48 on a pair of 96³ frees more than any threshold that fits an int: 8 GB
SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc map only blocks of 1 GiB and more, and never trim this process's heap; it cannot be undone.

    Nothing happens with other C libraries, or where the user has set the allocator by `SET_BY_USER`.

    Returns:
        Whether both were set.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in SET_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` (CUDA where there is one), `cpu` or `cuda`; the CUDA device is the one of this local rank.

    Raises:
        ValueError: CUDA is asked for and absent, or this machine has fewer devices than processes.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {wanted}; expected auto, cpu or cuda")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no CUDA device here; use --device cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}; "
            "start at most that many processes (--nproc_per_node)"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def explained_out_of_memory(flags: object, names: str, advice: str) -> Iterator[None]:
    """Inside the block, a GPU that has no memory left is a mistake in flags, and told as one.

    Args:
        flags: has the flags as attributes.
        names: those that decide how much is needed, separated by spaces; the message shows their values.
        advice: what to change.

    Raises:
        ValueError: in place of PyTorch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        facts = ". ".join(str(error).split(". ")[:3]).removesuffix(".")  # the rest is about allocators
        values = ", ".join(f"--{name} {getattr(flags, name)}" for name in names.split())
        raise ValueError(f"{facts}. This run has {values}: {advice}") from error


def make_cpu_repeatable() -> None:
    """Same flags, seed and number of threads give the same numbers on a CPU.

    Gradients of indexing (relative position biases, gathered points) are otherwise added by several threads in the
    order in which they happen to arrive.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # writes NaN into every new tensor, for debugging

"""Number formats and layouts: which one a run computes in, and what follows from it.

Nothing here changes what is computed beyond rounding; what each choice brings is measured by
`python -m benchmarks.pretrain_step`.
"""

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


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context that networks run in; does nothing for fp32. Losses run outside it, in fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; a scaler that does nothing for the others."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def use_channels_last(*modules: nn.Module) -> None:
    """Store the weights of 3-D convolutions channels last; convolutions then compute in that layout. Values stay.

    Only tensors with five axes can have this layout; all others are left as they are.
    """
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim == 5:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last_3d)


def compile_networks(*modules: nn.Module) -> None:
    """torch.compile in place: names in state dicts, the moving average and DDP see the modules that they saw before."""
    for module in modules:
        module.compile()

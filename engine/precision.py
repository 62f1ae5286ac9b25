"""Number formats: which one a run computes in, and the two objects that follow from it."""

from contextlib import AbstractContextManager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(wanted: str, device: torch.device) -> str:
    """`auto` becomes bf16 on CUDA devices that have it, and fp32 elsewhere; other names stay.

    Raises:
        ValueError: an unknown name, or fp16 on a CPU (which computes it slowly and in few operations).
    """
    if wanted not in ("auto", *DTYPES):
        raise ValueError(f"--precision is {wanted}; expected auto, fp32, bf16 or fp16")
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 (or --use_fp16) needs a GPU; use --precision fp32 or auto on a CPU")
    return wanted


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context that networks run in; does nothing for fp32. Losses run outside it, in fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; a scaler that does nothing for the others."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")

"""The optimiser: AdamW whose parameter groups keep weight decay off what must not decay, and gradient clipping.

Published recipe (DINO's): weight decay rises along a cosine, and gradients are clipped over all trained modules.
"""

import torch
from torch import nn

# Biases of window attention and the learnt mask token are offsets although they have more than one axis.
NEVER_DECAYED = ("bias", "bias_table", "mask_token")


def make_optimizer(module: nn.Module, lr: float, weight_decay: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of `module`, fused on CUDA.

    Group 0 decays; group 1 (biases, norms and other 1-D parameters, attention bias tables, the mask token) does not.

    Raises:
        ValueError: nothing is trainable.
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing to train: all loss weights (--lambda1, --lambda2, --lambda3) are 0")
    decayed = [parameter for name, parameter in trained if decays(name, parameter)]
    kept = [parameter for name, parameter in trained if not decays(name, parameter)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True if device.type == "cuda" else None)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to this parameter."""
    return parameter.ndim > 1 and not name.rsplit(".", 1)[-1].endswith(NEVER_DECAYED)


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give both groups this step's learning rate, and group 0 its weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients together so that their joint norm is at most `max_norm`; 0 = measure only.

    Returns:
        The joint norm before clipping, a scalar on the parameters' device.
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))

"""The optimiser: AdamW whose parameter groups keep weight decay off what must not decay, and gradient clipping.

Published recipe (DINO's): weight decay rises along a cosine, and gradients are clipped over all trained modules.
"""

import torch
from torch import nn

# Biases of window attention and the learnt mask token are offsets although they have more than one axis.
NEVER_DECAYED = ("bias", "bias_table", "mask_token")


def make_optimizer(
    module: nn.Module, lr: float, weight_decay: float, device: torch.device, fused: bool | None = None
) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of `module`; one kernel does a step where `fused` (None = not on a CPU).

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
    is_fused = device.type != "cpu" if fused is None else fused
    return torch.optim.AdamW(groups, lr=lr, fused=True if is_fused else None)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to this parameter."""
    return parameter.ndim > 1 and not name.rsplit(".", 1)[-1].endswith(NEVER_DECAYED)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Go on from a stored state, on this device and in this layout, whatever those were when it was stored.

    PyTorch would take over from the file how to compute (`fused`, `foreach`) and keep its tensors' strides, and the
    fused kernel refuses running means whose strides differ from their parameter's.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    ways = [{name: group.get(name) for name in ("fused", "foreach")} for group in optimizer.param_groups]
    if len(state["param_groups"]) != len(ways):
        raise ValueError(f"{len(state['param_groups'])} parameter groups where this run has {len(ways)}")
    groups = [group | way for group, way in zip(state["param_groups"], ways)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter).copy_(value)


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

"""The optimiser: parameter groups that keep weight decay off what must not decay, schedules, and gradient clipping."""

from typing import Literal

import torch
from torch import nn

# Biases of window attention and the learnt mask token are offsets although they have more than one axis.
NEVER_DECAYED = ("bias", "bias_table", "mask_token")
NUM_SCHEDULED = 2  # groups whose learning rate follows the schedule; two more keep theirs where a method asks for it


def make_optimizer(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    device: torch.device,
    fused: bool = True,
    kind: Literal["adamw", "sgd"] = "adamw",
    momentum: float = 0.9,
    constant_parts: tuple[str, ...] = (),
) -> torch.optim.Optimizer:
    """AdamW or SGD over all trainable parameters of `module`.

    Groups: 0 decays, 1 (biases, norms and other 1-D parameters, attention bias tables, the mask token) does not; with
    `constant_parts` 2 and 3 likewise hold the parameters of these submodules, whose learning rate stays.

    Args:
        lr: the peak; groups 2 and 3 keep it.
        fused: one kernel does a step, which can be called off on the device (`step_unless`).
        momentum: of SGD.
        constant_parts: names of submodules.

    Raises:
        ValueError: nothing is trainable.
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing to train: no parameter of the method takes a gradient")
    prefixes = tuple(f"{part}." for part in constant_parts)
    groups = []
    for is_constant in (False, True) if prefixes else (False,):
        for is_decayed in (True, False):
            chosen = [
                parameter
                for name, parameter in trained
                if name.startswith(prefixes) == is_constant and decays(name, parameter) == is_decayed
            ]
            groups.append({"params": chosen, "weight_decay": weight_decay if is_decayed else 0.0})
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused or None)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused or None)
    if momentum:  # a first fused step that is called off would leave them as the memory was
        for _, parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def step_unless(was_skipped: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step; where `was_skipped`, weights, moments and counts stay. With a fused optimiser the host does not wait.

    Args:
        was_skipped: bool scalar on the parameters' device.
    """
    if not optimizer.defaults.get("fused"):
        if not was_skipped:
            optimizer.step()
        return
    optimizer.found_inf = was_skipped.float()  # what a GradScaler tells fused optimisers
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to this parameter."""
    return parameter.ndim > 1 and not name.rsplit(".", 1)[-1].endswith(NEVER_DECAYED)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Go on from a stored state, on this device and in this layout, whatever those were when it was stored.

    PyTorch would take over from the file how to compute (`fused`, `foreach`) and keep its tensors' strides, and the
    fused kernel refuses running means whose strides differ from their parameter's.

    Raises:
        ValueError: the state belongs to other parameters, or values are not finite.
        TypeError, LookupError, AttributeError: it is no optimiser's state.
    """
    broken = [
        name
        for values in state["state"].values()
        for name, value in values.items()
        if torch.is_tensor(value) and not torch.isfinite(value).all()
    ]
    if broken:
        raise ValueError(f"{broken[0]} holds values that are not finite")
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
    """Give the scheduled groups this step's learning rate, and the decaying groups its weight decay."""
    for group in optimizer.param_groups[:NUM_SCHEDULED]:
        group["lr"] = lr
    for group in optimizer.param_groups[::2]:
        group["weight_decay"] = weight_decay


def clip_gradients(parameters: list[nn.Parameter], max_norm: float, each: bool = False) -> torch.Tensor:
    """Scale gradients down so that their joint norm, or with `each` every tensor's own norm, is at most `max_norm`.

    Args:
        max_norm: 0 = measure only.

    Returns:
        The joint norm before clipping, a scalar on the parameters' device.
    """
    if not each or max_norm <= 0:
        return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, max_norm)
    return norm

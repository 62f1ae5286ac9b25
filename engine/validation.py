"""The objective on held-out pairs, without leaving a trace in the run.

Modules go to evaluation mode, where centres stand still, and come back as they were (the published code never
came back). Every rank takes its share of the pairs.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from engine.distributed import World
from engine.logging import Meters
from engine.pretrain import Objective, pair_statistics


@contextlib.contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode again outside, whatever happens."""
    modes = {module: module.training for root in roots for module in root.modules()}
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def validate(
    objective: Objective, modules: list[nn.Module], batches: Iterable[dict], teacher_temp: float, world: World
) -> dict[str, float]:
    """Means of the total, its terms and the pair statistics over `batches` and all ranks.

    Args:
        objective: one batch -> (total, terms); must call the modules themselves, not a DDP wrapper.
        modules: all modules that the objective uses.
        batches: this rank's share; every rank must have as many.
        teacher_temp: the teacher temperature to judge with.
    """
    meters = Meters()
    with evaluating(*modules):
        for batch in batches:
            total, terms = objective(batch, teacher_temp, False)
            meters.add({"loss": total, **terms, **pair_statistics(batch)})
    return meters.read(world.device)

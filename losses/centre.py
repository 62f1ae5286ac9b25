"""Running means over batch and ranks: the centres of DINO (Caron et al., ICCV 2021, equation 4).

A mean is updated from sums and counts that every rank adds up, so that ranks with other numbers of rows still give the
mean of the joined batch, and all ranks hold the same centre. Without a process group the sums are already complete.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningMeans(nn.Module):
    """Named running means of rows, updated together by one all-reduce.

    Rows are collected by `collect`; `apply` folds what was collected into the means: mean <- m * mean + (1 - m) * mean
    of the rows. Several `collect` calls before one `apply` (gradient accumulation) count as one batch.
    """

    def __init__(self, dims: dict[str, int], momentum: float, start: dict[str, float] | None = None) -> None:
        """Start every mean `name` of width `dims[name]` at `start.get(name, 0)`; momentum in [0, 1)."""
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"--centre_momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self.names = tuple(dims)
        for name, width in dims.items():
            self.register_buffer(name, torch.full((width,), float((start or {}).get(name, 0.0))))
        self._pending: dict[str, Tensor] = {}

    @torch.no_grad()
    def collect(self, name: str, rows: Tensor) -> None:
        """Add rows [..., width] to what the next `apply` will fold in."""
        rows = rows.detach().float().flatten(0, -2)  # [rows, width]
        count = rows.new_full((1,), rows.shape[0])
        total = torch.cat([rows.sum(0), count])  # [width + 1]
        self._pending[name] = self._pending[name] + total if name in self._pending else total

    @torch.no_grad()
    def apply(self, was_skipped: Tensor) -> None:
        """Reduce over ranks and update; every rank must call it after the same `collect` names.

        Args:
            was_skipped: bool scalar on the means' device; where it is true they stay, and what was collected is lost.
        """
        if not self._pending:
            return
        names = [name for name in self.names if name in self._pending]
        joined = torch.cat([self._pending[name] for name in names])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(joined)
        for name, total in zip(names, joined.split([self._pending[name].numel() for name in names])):
            mean = getattr(self, name)
            mean.copy_(torch.where(was_skipped, mean, mean.lerp(total[:-1] / total[-1], 1.0 - self.momentum)))
        self._pending = {}

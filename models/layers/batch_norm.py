"""Batch norm over the samples of all ranks, on every device.

`torch.nn.SyncBatchNorm` runs on accelerators only. This one needs nothing but an all-reduce, so that the same run gives
the same numbers on CPUs. Two ranks give the outputs, gradients and running statistics of one process on the joined
batch (Ioffe and Szegedy, ICML 2015, algorithm 1, with the batch spread over ranks), also where ranks hold other numbers
of rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks. Every rank's loss depends on it, so its gradient is a sum over ranks too."""

    @staticmethod
    def forward(context, values: Tensor) -> Tensor:
        """Any shape, the same on every rank."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        """The gradient of the sum of all ranks' losses, which DDP divides by the number of ranks."""
        return SumOverRanks.forward(context, gradient.contiguous())


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm for [B, C, ...] whose statistics are those of all ranks' rows; state-dict names are torch's.

    With one process, and in evaluation mode, it is torch's batch norm. Every rank must call it equally often.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm got an input of shape {tuple(input.shape)}, expected [B, C, ...]")

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape and type; statistics of half-precision input are float32."""
        uses_batch = self.training or self.running_mean is None
        if not uses_batch or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        wide = input if input.dtype == torch.float64 else input.float()
        rows = wide.transpose(0, 1).flatten(1)  # [C, places of all samples]
        sums = SumOverRanks.apply(torch.cat([rows.sum(1), rows.new_full((1,), rows.shape[1])]))  # [C + 1]
        num = sums[-1].detach()
        mean = sums[:-1] / num
        # A second sum instead of the mean of squares, which would lose the digits of a small variance.
        variance = SumOverRanks.apply((rows - mean[:, None]).square().sum(1)) / num
        self._follow(mean.detach(), variance.detach() * num / (num - 1))
        shape = (1, -1, *[1] * (input.ndim - 2))
        output = (wide - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards the mean and the unbiased variance [C] of the joined batch."""
        if not self.training or self.running_mean is None:
            return
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def has_batch_norms(module: nn.Module) -> bool:
    """Whether `module` normalises over the samples of a batch somewhere."""
    return any(isinstance(part, BATCH_NORMS) for part in module.modules())


def synchronise_batch_norms(module: nn.Module) -> int:
    """Let every batch norm of `module` see the samples of all ranks; weights and state-dict names stay.

    Returns:
        How many there are.
    """
    norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS)]
    for norm in norms:
        norm.__class__ = SynchronisedBatchNorm
    return len(norms)

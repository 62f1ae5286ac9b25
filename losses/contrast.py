"""Instance discrimination with a queue of keys: InfoNCE of MoCo (He et al., CVPR 2020, equation 1 and algorithm 1).

    logits = [q.k, q.Q] / temperature        loss = cross-entropy with the first column as the right answer

Two kinds of queue slots never count as negatives: slots that no step has filled yet (random stand-ins would make the
loss look far too low for as long as the queue takes to fill), and slots that hold a crop of one of the sample's own
volumes (they are no other instance). A row without any negative costs 0.

Every loss is a mean over rows, so the mean over ranks of equal batches is that of the joined batch. Only the queue
talks to other ranks: all hold the same one, in the order of the samples.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

EMPTY = -1  # the owner of a slot that no step has filled


class KeyQueue(nn.Module):
    """The last `size` keys and whose they are. Keys are collected by `collect`; `apply` puts them in.

    Several `collect` calls before one `apply` (gradient accumulation) count as one batch. `size` need not be a multiple
    of the batch: writing goes on at the first slot after the last.
    """

    def __init__(self, size: int, dim: int) -> None:
        """An empty queue of `size` slots for keys of width `dim`."""
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("owners", torch.full((size,), EMPTY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the slot that is written next
        self._pending: list[tuple[Tensor, Tensor]] = []

    @property
    def share_filled(self) -> Tensor:
        """Share of slots that hold a key."""
        return (self.owners != EMPTY).float().mean()

    def no_negatives(self, cases: Tensor) -> Tensor:
        """Which slots are no negatives of a sample: bool [B, size] for the samples' own cases, int64 [B, V]."""
        return owned_by(cases, self.owners) | (self.owners == EMPTY)

    @torch.no_grad()
    def collect(self, keys: Tensor, owners: Tensor) -> None:
        """Keep keys [B, dim] of the cases `owners`, int64 [B], for the next `apply`."""
        self._pending.append((keys.detach(), owners))

    @torch.no_grad()
    def apply(self, was_skipped: Tensor) -> None:
        """Put in what was collected on all ranks; every rank must call it after equally many rows of `collect`.

        Args:
            was_skipped: bool scalar on the queue's device; where it is true the queue stays, and what was collected is
                lost.
        """
        if not self._pending:
            return
        keys, owners = (torch.cat([joined(values) for values in column]) for column in zip(*self._pending))
        self._pending = []
        size, num = len(self.owners), len(owners)
        slots = (self.pointer + torch.arange(num, device=owners.device)) % size
        slots, keys, owners = slots[-size:], keys[-size:], owners[-size:]  # of a batch beyond the size, the last rows
        self.keys[slots] = torch.where(was_skipped, self.keys[slots], keys.to(self.keys.dtype))
        self.owners[slots] = torch.where(was_skipped, self.owners[slots], owners)
        self.pointer.copy_(torch.where(was_skipped, self.pointer, (self.pointer + num) % size))


def owned_by(cases: Tensor, owners: Tensor) -> Tensor:
    """Which keys, of the cases `owners` int64 [K], show one of a sample's own cases, int64 [B, V]: bool [B, K]."""
    return (owners[:, None] == cases[:, None, :]).any(-1)


def joined(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order, [R, ...] -> [ranks * R, ...]; ranks must hold equally many."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def directions(rows: Tensor) -> Tensor:
    """Rows [R, C] scaled to length 1, in float32 or more."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


def contrast_logits(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, left_out: Tensor | None = None
) -> Tensor:
    """Logits [B, 1 + K], float32 or more: the positive first, then the negatives; -inf where one is left out.

    Args:
        queries, keys: [B, C] of length 1, row by row the two views of a sample.
        negatives: [K, C] of length 1.
        temperature: above 0.
        left_out: bool [B, K].
    """
    with torch.autocast(queries.device.type, enabled=False):
        positive = (queries * keys).sum(1, keepdim=True)
        others = queries @ negatives.to(queries.dtype).T  # [B, K]
        if left_out is not None:
            others = others.masked_fill(left_out, float("-inf"))
        return torch.cat([positive, others], dim=1) / temperature


def contrast_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of logits [B, 1 + K] whose first column is the right answer; mean over rows."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))

"""An Alice small enough for tests, on crops with unequal sides, and batches for it."""

import torch
from torch import Tensor

from models.alice import AliceStudent, AliceTeacher, build_alice

ROI = (64, 32, 32)
OUT_DIM = 32
SMALL = {
    "feature_size": 12,
    "roi": ROI,
    "out_dim": OUT_DIM,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "casa_heads": 2,
    "casa_head_dim": 8,
    "casa_hidden_dim": 32,
}


def small_alice(seed: int = 0, **options) -> tuple[AliceStudent, AliceTeacher]:
    """A student and its teacher with weights drawn from `seed`."""
    torch.manual_seed(seed)
    return build_alice(**(SMALL | options))


def small_batch(num_pairs: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random views; every mask hides a different set of 12 of the 16 blocks."""
    generator = torch.Generator().manual_seed(seed)
    names = ("query", "key", "query_student", "query_teacher", "key_student", "key_teacher")
    batch = {name: torch.rand(num_pairs, 1, *ROI, generator=generator) for name in names}
    for name in ("query_mask", "key_mask"):
        order = torch.rand(num_pairs, 16, generator=generator).argsort(dim=1)
        batch[name] = (order < 12).reshape(num_pairs, 4, 2, 2)
    return batch


def run_alice(student: torch.nn.Module, teacher: AliceTeacher, batch: dict[str, Tensor]):
    """Both networks' outputs for a batch."""
    online = student(batch["query_student"], batch["query_mask"], batch["key_student"], batch["key_mask"])
    return online, teacher(batch["query_teacher"], batch["key_teacher"], online)

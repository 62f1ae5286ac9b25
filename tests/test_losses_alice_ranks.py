"""Two gloo ranks against one process on the joined batch: losses, centres and gradients."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from losses.alice import AliceLoss
from tests.small_alice import OUT_DIM, run_alice, small_alice, small_batch

NUM_RANKS = 2
WATCHED = (
    "backbone.mask_token",
    "backbone.network.swinViT.patch_embed.proj.weight",
    "backbone.network.out.conv.conv.weight",
    "head.mlp.0.weight",
    "head.last_layer.weight_v",
    "head.last_layer2.weight_v",
    "casa.Cross_Att.MH_attn.w_qs.weight",
    "casa.Cross_Att.pos_ffn.w_2.weight",
)


def two_steps(batches: list[dict], wrap) -> dict:
    """Two forward and backward passes (the second under moved centres); loss terms, centres and watched gradients."""
    student, teacher = small_alice(norm_last_layer=True)
    network = wrap(student)
    loss = AliceLoss(out_dim=OUT_DIM)
    history = []
    for batch in batches:
        total, terms = loss(*run_alice(network, teacher, batch), batch, 0.04)
        total.backward()
        history.append(
            torch.stack([total.detach(), *(terms[name] for name in ("loss_cls", "loss_tokens", "loss_recon"))])
        )
    gradients = {name: student.get_parameter(name).grad for name in WATCHED}
    return {"terms": torch.stack(history), "gradients": gradients, "centres": loss.state_dict()}


def shard(batch: dict, rank: int) -> dict:
    """One rank's share of the joined batch."""
    return {name: rows.chunk(NUM_RANKS)[rank] for name, rows in batch.items()}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    batches = [shard(small_batch(NUM_RANKS, seed), rank) for seed in (0, 1)]
    result = two_steps(batches, torch.nn.parallel.DistributedDataParallel)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=NUM_RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]
    whole = two_steps([small_batch(NUM_RANKS, seed) for seed in (0, 1)], lambda student: student)
    torch.testing.assert_close(sum(r["terms"] for r in ranks) / NUM_RANKS, whole["terms"], rtol=1e-5, atol=1e-6)
    for rank in ranks:
        for name, centre in whole["centres"].items():
            torch.testing.assert_close(rank["centres"][name], centre, rtol=1e-5, atol=1e-7, msg=name)
        for name, gradient in whole["gradients"].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert torch.equal(ranks[0]["gradients"][WATCHED[0]], ranks[1]["gradients"][WATCHED[0]])

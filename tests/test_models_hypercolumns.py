"""The head on hypercolumns: equal to its equation, on every backbone, and nothing to the weights of the rest."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from models.layers.batch_norm import synchronise_batch_norms
from models.layers.hypercolumns import HypercolumnHead, enlarged
from models.pretrained import load_pretrained
from models.segmenters import SEGMENTERS, layer_groups
from models.weights_file import WeightsFile
from tests.launched import run_ranks

NETWORKS = {  # feature size, crop, dimensions
    "unet": (16, (32, 32, 32), 3),
    "resenc": (4, (64, 32, 32), 3),
    "nnformer": (24, (32, 32, 32), 3),
    "swin_unetr": (12, (64, 32, 32), 3),
    "swin_unetr_v2": (12, (1, 64, 64), 2),
    "resnet50_unet": (16, (1, 64, 64), 2),
}
NUM_CLASSES = 3
NUM_RANKS = 2


def build(name: str, hypercolumns: bool = True) -> tuple[torch.nn.Module, torch.Tensor]:
    feature_size, roi, spatial_dims = NETWORKS[name]
    torch.manual_seed(0)
    network = SEGMENTERS[name].build(1, NUM_CLASSES, feature_size, False, spatial_dims, hypercolumns)
    return network, torch.rand(2, 1, *roi, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("cells", "shape"), [((3, 4, 6), (6, 4, 24)), ((1, 5, 2), (1, 7, 3)), ((2, 1, 1), (32, 1, 9))])
def test_enlarging_equals_torchs_interpolation_in_values_and_gradients(cells, shape):
    ours = torch.randn(2, 5, *cells, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    weights = torch.randn(2, 5, *shape, dtype=torch.float64)
    made = enlarged(ours, shape), F.interpolate(theirs, size=shape, mode="trilinear", align_corners=False)
    torch.testing.assert_close(*made)
    for one in made:
        (one * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_logits_are_the_equation():
    """One voxel, written out."""
    torch.manual_seed(0)
    head = HypercolumnHead({2: 4, 4: 6}, NUM_CLASSES).double()
    fine, coarse = torch.randn(2, 4, 4, 4, 4, dtype=torch.float64), torch.randn(2, 6, 2, 2, 2, dtype=torch.float64)
    logits = head([fine, coarse], (8, 8, 8))

    def normed(one):
        mean, variance = one.mean((0, 2, 3, 4), keepdim=True), one.var((0, 2, 3, 4), unbiased=False, keepdim=True)
        return (one - mean) / (variance + 1e-5).sqrt()

    fine_weights, coarse_weights = (project.weight.flatten(1) for project in head.projections)
    assert head.projections[1].bias is None, "one shift is enough"
    corner = fine_weights @ normed(fine)[0, :, 0, 0, 0] + head.projections[0].bias
    corner = corner + coarse_weights @ normed(coarse)[0, :, 0, 0, 0]  # beyond the outer centres they continue
    expected = head.classes.weight.flatten(1) @ F.gelu(corner) + head.classes.bias
    torch.testing.assert_close(logits[0, :, 0, 0, 0], expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_adds_the_heads_logits_to_its_own(name):
    network, volumes = build(name)
    plain, _ = build(name, hypercolumns=False)
    own = {key: value for key, value in network.state_dict().items() if not key.startswith("hypercolumns.")}
    assert own.keys() == plain.state_dict().keys(), "names of the network stay"
    plain.load_state_dict(own)
    network.eval(), plain.eval()
    seen = []
    network.hypercolumns.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    with torch.no_grad():
        torch.testing.assert_close(network(volumes), plain(volumes) + seen[0][1])
        maps, shape = seen[0][0]
        assert shape == tuple(volumes.shape[2:])
        sides = [one.shape[-1] for one in maps]
        assert sides == [shape[-1] // 2 ** (number + 1) for number in range(len(sides))] and len(sides) >= 4
        network(volumes[:1])
        assert len(seen[1][0][0]) == len(maps), "no map of the call before is left"
    network.train()
    network(volumes).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_maps_of_a_finer_call_do_not_stay_when_activations_are_recomputed():
    torch.manual_seed(0)
    with_checkpoint = SEGMENTERS["unet"].build(1, NUM_CLASSES, 16, True, 3, True)
    plain, volumes = build("unet")
    with_checkpoint.load_state_dict(plain.state_dict())
    for _ in range(2):
        found = []
        for network in (plain, with_checkpoint):
            network.zero_grad()
            logits = network(volumes)
            logits.square().mean().backward()
            found.append((logits.detach(), [parameter.grad for parameter in network.parameters()]))
        torch.testing.assert_close(found[1], found[0])


def test_pretrained_weights_do_not_need_the_head():
    network, _ = build("unet")
    plain, _ = build("unet", hypercolumns=False)
    own = {key: value for key, value in plain.state_dict().items() if not key.startswith("out.")}
    for part in ("encoder", "whole"):
        report = load_pretrained(network, WeightsFile("file", own), 1.0, part)
        assert not report.missing and not any(key.startswith("hypercolumns.") for key in report.loaded)
    last = layer_groups(network, SEGMENTERS["unet"], 0.5, lambda name, parameter: True)[-1]
    assert last["lr_scale"] == 1
    assert all(any(p is one for one in last["params"]) for p in network.hypercolumns.parameters())


def passed(network: torch.nn.Module, volumes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, gradients of a loss that is a sum over samples, and the norms' running statistics; float64."""
    logits = network.double()(volumes.double())
    logits.square().sum().backward()
    gradients = {f"g_{name}": parameter.grad for name, parameter in network.named_parameters()}
    return {"logits": logits.detach(), **gradients, **dict(network.named_buffers())}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    network, volumes = build("unet")
    synchronise_batch_norms(network)
    torch.save(passed(network, volumes[rank : rank + 1]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path, one_thread):
    run_ranks(run_rank, (str(tmp_path),), NUM_RANKS)
    ours = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]
    for name, value in passed(*build("unet")).items():
        parts = [found[name] for found in ours]
        if name == "logits":
            joined = torch.cat(parts)
        else:
            joined = sum(parts) if name.startswith("g_") else parts[1]
        assert (joined - value).abs().max() <= 1e-6 * value.abs().max(), name
    network, volumes = build("unet")
    apart = network.double()(volumes[:1].double())
    assert not torch.allclose(apart, ours[0]["logits"], rtol=1e-2), "the ranks did talk to each other"

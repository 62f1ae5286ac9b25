"""Steps beside their public forms: both give one loss and one gradient; figures are figures, speed is not tested."""

import json
from dataclasses import replace

import pytest
import torch
from monai.networks.nets.swin_unetr import WindowAttention

from benchmarks import method_steps
from benchmarks.method_steps import CASES, NOW, fill_queue, kept_bytes, make_batch, step_bytes
from benchmarks.public_forms import public_form
from benchmarks.results import HEADER
from models.backbones.swin_unetr import SwinUNETRBackbone
from models.methods.caid import CAiD

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def make(name: str):
    """A tiny method of a case, and a batch for it."""
    if name == "caid":
        pytest.importorskip("segmentation_models_pytorch")
    case, roi = CASES[name], (1, 64, 64) if name == "caid" else (64, 32, 32)
    case = replace(case, num_crops=min(4, case.num_crops), num_samples=min(2, case.num_samples))
    torch.manual_seed(0)
    method = case.make(roi, 12, False, True)
    if isinstance(method, CAiD):
        fill_queue(method)
    return method, make_batch(case, roi, CPU)


@pytest.mark.parametrize("name", ["alice", "caid", "dino", "voco"])  # the others add nothing; every run compares losses
def test_both_sides_give_the_same_loss_and_gradients(name: str) -> None:
    ours, batch = make(name)
    found = []
    for method in (ours, public_form(ours)):
        total, _ = method(batch, NOW)
        total.backward()
        gradients = {key: p.grad for key, p in method.student.named_parameters() if p.grad is not None}
        found.append((total.detach(), gradients))
    (loss, own), (public_loss, public) = found
    torch.testing.assert_close(loss, public_loss, rtol=1e-4, atol=1e-6)
    assert own.keys() == public.keys()
    difference = torch.stack([(own[key] - public[key]).norm() for key in own]).norm()
    assert difference < 1e-2 * torch.stack([value.norm() for value in public.values()]).norm()


def test_public_forms_are_made_of_monais_own_modules() -> None:
    ours, _ = make("voco_v1")
    public = public_form(ours)
    for network in public.networks().values():
        assert isinstance(network.backbone, SwinUNETRBackbone)
        blocks = [part for part in network.backbone.modules() if isinstance(part, WindowAttention)]
        assert blocks and all(type(part) is WindowAttention for part in blocks)
        assert {type(part) for part in network.backbone.modules() if isinstance(part, torch.nn.Conv3d)} == {
            torch.nn.Conv3d
        }
    assert not any(parameter.requires_grad for parameter in public.teacher.parameters())
    caid = public_form(make("caid")[0])
    assert caid.teacher.backbone.network.decoder is not None
    assert not any(parameter.requires_grad for parameter in caid.teacher.parameters())


def test_memory_of_a_step_is_what_its_tensors_take_at_one_time() -> None:
    def step(num_steps: int) -> None:
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        second + 1

    assert 8e6 <= step_bytes(step, CPU) < 8.1e6
    layer = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    assert kept_bytes(layer, optimizer) == 400
    layer(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert kept_bytes(layer, optimizer) == 800


def test_ratios_are_those_of_each_round_and_rounds_change_their_order() -> None:
    assert method_steps.median_ratio({"ours": [1.0, 2.0, 1.0], "public": [3.0, 2.0, 2.0]}) == 2
    order = []
    steps = {name: lambda num_steps, name=name: order.append(name) for name in ("ours", "public")}
    seconds, cpu_seconds = method_steps.alternate(steps, 2, CPU)
    assert order == ["ours", "public", "public", "ours"]
    assert all(len(values) == 2 for found in (seconds, cpu_seconds) for values in found.values())


def test_figures_of_a_quick_run(tmp_path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    output = tmp_path / "found.json"
    method_steps.main(["--quick", "--device", "cpu", "--methods", "[caid]", "--output", str(output)])
    found = json.loads(output.read_text())
    figures = found["methods"]["caid"]
    assert figures["speedup"] > 0 and figures["cpu_speedup"] > 0 and figures["crop"] == [1, 32, 32]
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in figures["seconds"].values())
    assert figures["memory_ratio"] < 1, "the public form's teacher has a decoder"
    lines = method_steps.rows(found)
    assert len(lines) == 2 and all(len(line) == len(HEADER) for line in lines)
    with pytest.raises(ValueError, match="--methods names byol"):
        method_steps.main(["--quick", "--methods", "[byol]"])


def test_sides_that_differ_are_not_compared(monkeypatch) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    right = public_form

    def wrong(ours):
        method = right(ours)
        torch.nn.init.zeros_(method.student.head[2].weight)
        return method

    monkeypatch.setattr(method_steps, "public_form", wrong)
    with pytest.raises(RuntimeError, match="caid: our loss is"):
        method_steps.main(["--quick", "--device", "cpu", "--methods", "[caid]"])

"""What every pretraining method must do, whatever it learns: each test runs over `METHODS`."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from monai.networks.nets import SwinUNETR
from torch import nn

import extract_backbone_weights
import main_ddp
from engine import distributed
from engine.checkpoint import LATEST, load_checkpoint
from engine.device import make_scaler
from engine.distributed import World
from engine.flags import flag_names, options_of
from engine.logging import SilentLog
from engine.loop import Hooks, LoopOptions, pretrain, values_at
from engine.optim import make_optimizer
from engine.run import RunState
from models.methods import METHODS, Method
from tests.launched import SMALLEST, assert_same_weights, die_at_save, run_ranks, start
from tests.small_alice import TinyBackbone
from tests.tiny_run import TINY, add_store_and_table, arguments, log_of, make_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# Sizes that a method may have, small enough for tests; those that it lacks are left out.
SMALL_SIZES = {
    **{"head_hidden_dim": 32, "head_bottleneck_dim": 8, "out_dim": 16},
    **{"projector_hidden_dim": 32, "projector_dim": 16, "predictor_dim": 8, "voco_dim": 16},
}
# What a method needs beside.
SMALL_OPTIONS: dict[str, dict] = {"caid": {"queue_size": 6, "caid_dim": 8}}
# The form of a method in which ranks equal one process: VoCo's version 2 pairs the volumes of one rank.
EQUAL_RANKS = {"voco": ["--voco_variant=v1"]}
NUM_SAMPLES = 4


@functools.cache  # a parser takes 60 ms to build
def shared_flags() -> set[str]:
    every = {action.dest for action in main_ddp.make_flags()._actions}
    return every - set(flag_names(METHODS["alice"].Options))


def small(name: str, corpus: Path, output_dir: Path, **changed) -> list[str]:
    """The command line of a method's smallest run: 4 epochs of 2 steps."""
    own = set(flag_names(METHODS[name].Options))
    wanted = TINY | SMALLEST | {"roi_x": 32} | SMALL_SIZES | SMALL_OPTIONS.get(name, {}) | changed | {"method": name}
    known = {flag: value for flag, value in wanted.items() if flag in own | shared_flags()}
    words = [f"--{flag}={value}" for flag, value in known.items()]
    paths = arguments(corpus, output_dir)[len(TINY) :]
    return words + paths


def build(argv: list[str]) -> Method:
    flags = main_ddp.make_flags(main_ddp.chosen_method(argv)).parse_args(argv)
    torch.manual_seed(0)
    return main_ddp.build_method(flags)


def build_smooth(argv: list[str]) -> Method:
    """The method on a backbone without norms, whose gradients are not lost in rounding."""
    flags = main_ddp.make_flags(main_ddp.chosen_method(argv)).parse_args(argv)
    roi = flags.roi_z, flags.roi_y, flags.roi_x
    kind = METHODS[flags.method]
    torch.manual_seed(0)
    return kind(
        options_of(flags, kind.Options),
        lambda decoder_stride, with_masks, with_skips=False: TinyBackbone(12, roi, decoder_stride, False, with_masks),
    )


def moment(method: Method) -> dict[str, float]:
    """What a step in the middle of a run is given."""
    own = {"lr": lambda step: 0.01, "weight_decay": lambda step: 0.1}
    return values_at(own | method.schedules(20, 10), 12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus"), 3, 0))


@pytest.fixture(params=list(METHODS))
def argv(request, corpus, tmp_path) -> list[str]:
    return small(request.param, corpus, tmp_path / "run")


def dataset_of(argv: list[str]):
    """The method's own samples: its pairing, its views."""
    flags = main_ddp.make_flags(main_ddp.chosen_method(argv)).parse_args(argv)
    return main_ddp.open_data(flags, build(argv), World()).training


def batch_of(dataset, first: int = 0) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([dataset[first + index] for index in range(NUM_SAMPLES)])


def gradients(method: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.requires_grad}


def assert_close(ours: dict, expected: dict, tolerance: float = 1e-3) -> None:
    """Every tensor within `tolerance` of its largest value, or of a fiftieth of the largest of all.

    Biases in front of a batch norm have gradients of rounding alone.
    """
    assert ours.keys() == expected.keys()
    floor = 0.02 * max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        error, largest = (ours[name] - tensor).abs().max().item(), tensor.abs().max().item()
        assert error <= tolerance * max(largest, floor), f"{name}: {error} against {largest}"


# The interface


def test_total_and_terms_are_what_the_loop_expects(argv):
    method, batch = build(argv), batch_of(dataset_of(argv))
    assert set(method.views) <= batch.keys() and set(method.views) == set(dataset_of(argv).views)
    total, terms = method(batch, moment(method))
    assert total.ndim == 0 and total.dtype == torch.float32 and total.isfinite() and total.requires_grad
    assert terms and not any(term.requires_grad for term in terms.values())
    assert all(torch.as_tensor(term).isfinite() for term in terms.values())
    assert any(name.startswith("loss_") for name in terms)


def test_every_trained_weight_gets_a_gradient(argv):
    method, dataset = build(argv), dataset_of(argv)
    method(batch_of(dataset), moment(method))
    method.after_step(moment(method), was_skipped=torch.tensor(False))  # a queue is empty before the first step
    method(batch_of(dataset, NUM_SAMPLES), moment(method))[0].backward()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert all(name.startswith("student.") for name in trained), "what has gradients hangs under the student"
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name, p in trained.items() if p.ndim > 1 and not p.grad.any()]


def test_the_forward_pass_changes_nothing_but_batch_norms_and_validation_nothing_at_all(argv):
    method, batch = build(argv), batch_of(dataset_of(argv))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(batch, moment(method))
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed)
    assert not changed or method.sees_batch
    method = build(argv).eval()
    with torch.no_grad():
        method(batch, moment(method))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


# Ranks and parts


def run_rank(rank: int, folder: str, argv: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    method = build_smooth(argv)
    if method.sees_batch:
        from models.layers.batch_norm import synchronise_batch_norms

        synchronise_batch_norms(method)
    batch = torch.load(f"{folder}/batch.pt", weights_only=True)
    share = {name: value.chunk(2)[rank] for name, value in batch.items()}
    wrapped = distributed.wrap(method, World())  # kept until after the backward pass: DDP's hooks die with it
    total, _ = wrapped(share, moment(method))
    total.backward()
    method.after_step(moment(method), was_skipped=torch.tensor(False))
    beside = {name: value for name, value in method.state_dict().items() if not name.startswith("student.")}
    torch.save({"total": total.detach(), "gradients": gradients(method), "beside": beside}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def joined(argv: list[str], batch: dict, num_parts: int = 1) -> dict:
    """One process on the whole batch, or on its parts one after the other."""
    method, totals = build_smooth(argv), []
    for part in range(num_parts):
        total, _ = method({name: value.chunk(num_parts)[part] for name, value in batch.items()}, moment(method))
        (total / num_parts).backward()
        totals.append(total.detach())
    method.after_step(moment(method), was_skipped=torch.tensor(False))
    beside = {name: value for name, value in method.state_dict().items() if not name.startswith("student.")}
    return {"total": torch.stack(totals).mean(), "gradients": gradients(method), "beside": beside}


def assert_same_step(ours: dict, expected: dict) -> None:
    assert_close(ours["gradients"], expected["gradients"])
    for name, value in expected["beside"].items():  # teacher, centres, queue
        torch.testing.assert_close(ours["beside"][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_two_ranks_equal_one_process_on_the_joined_batch(argv, tmp_path):
    argv = argv + EQUAL_RANKS.get(main_ddp.chosen_method(argv), [])
    batch, method = batch_of(dataset_of(argv)), build_smooth(argv)
    if method.sees_batch:
        pytest.importorskip("models.layers.batch_norm")
    torch.save(batch, tmp_path / "batch.pt")
    run_ranks(run_rank, (str(tmp_path), argv))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = joined(argv, batch)
    torch.testing.assert_close((ranks[0]["total"] + ranks[1]["total"]) / 2, whole["total"], rtol=1e-4, atol=1e-5)
    assert ranks[0]["total"] != ranks[1]["total"]  # each rank did see another half
    for rank in ranks:
        assert_same_step(rank, whole)


def test_two_parts_equal_the_whole_batch(argv):
    if build_smooth(argv).sees_batch:
        pytest.skip("a batch norm sees one part at a time; the method says so")
    batch = batch_of(dataset_of(argv))
    whole, parts = joined(argv, batch), joined(argv, batch, num_parts=2)
    torch.testing.assert_close(parts["total"], whole["total"], rtol=1e-4, atol=1e-5)
    assert_same_step(parts, whole)


# Steps that break


class Poisoned(nn.Module):
    """The method, with a loss that is not finite at one step."""

    def __init__(self, method: Method, step: int) -> None:
        super().__init__()
        self.method, self.step = method, step

    def forward(self, batch: dict, now: dict):
        total, terms = self.method(batch, now)
        return total * (float("nan") if now["step"] == self.step else 1.0), terms


def run_loop(argv: list[str], run: RunState, num_steps: int, poisoned: int = -1) -> None:
    """Steps of the real loop, until `num_steps` are done; step i takes the samples from 4 i on."""
    dataset, method = dataset_of(argv), run.method
    batches = (batch_of(dataset, NUM_SAMPLES * step) for step in range(run.step, num_steps))
    schedules = {"lr": lambda step: 0.01, "weight_decay": lambda step: 0.1} | method.schedules(20, 10)
    options = LoopOptions(num_steps=num_steps, steps_per_epoch=10, nan_policy="skip", clip_grad=3.0)
    hooks = Hooks(validate=dict, draw=lambda batch, step: None, save=lambda epoch: None, saved=lambda: True)
    wrapped = Poisoned(method, poisoned)
    assert pretrain(run, wrapped, dataset, batches, schedules, options, hooks, World(), SilentLog())


def start_run(argv: list[str], step: int = 0) -> RunState:
    method = build(argv)
    optimizer = make_optimizer(method.student, 0.01, 0.1, CPU, constant_parts=method.constant_lr)
    return RunState(method, optimizer, make_scaler("fp32", CPU), step=step)


def test_a_skipped_step_leaves_no_trace(argv):
    """Neither in what is saved nor in what the next step does."""
    broken, fresh = start_run(argv), start_run(argv, step=1)
    before = {name: value.clone() for name, value in broken.method.state_dict().items()}
    run_loop(argv, broken, 1, poisoned=0)
    moments = [value for state in broken.optimizer.state.values() for value in state.values()]
    assert broken.step == 1 and not any(moment.any() for moment in moments)
    assert all(torch.equal(value, before[name]) for name, value in broken.method.state_dict().items())
    for run in (broken, fresh):
        run_loop(argv, run, 2)
    after = fresh.method.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    for name, value in broken.method.state_dict().items():
        assert torch.equal(value, after[name]), name


# Runs


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(argv, corpus, tmp_path):
    name = main_ddp.chosen_method(argv)
    main_ddp.main(small(name, corpus, tmp_path / "whole", epochs=2))
    killed = small(name, corpus, tmp_path / "killed", epochs=2)
    process = start(killed, tmp_path / "output.txt", functools.partial(die_at_save, 1, "renamed"))
    process.join(300)
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == -9, output
    assert load_checkpoint(tmp_path / "killed" / LATEST, name)["step"] == 2
    main_ddp.main(killed)
    assert [line["step"] for line in log_of(tmp_path / "whole")] == [1, 2, 3, 4]
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_extracted_weights_fill_monais_network(argv, corpus, tmp_path):
    """All of the backbone that was trained arrives, in the encoder that MONAI's network has."""
    name = main_ddp.chosen_method(argv)
    size = {"backbone": "swin_unetr", "feature_size": 12, "roi_z": 64, "roi_y": 32, "roi_x": 32}
    method = build(small(name, corpus, tmp_path / "run", **size))
    part = "teacher" if hasattr(getattr(method, "teacher", None), "backbone") else "student"
    trained = getattr(method, part).backbone
    described = {"kind": name, "commit": "abc", "versions": {}, "preprocessing": {"roi": [64, 32, 32]}, "flags": {}}
    described["backbone"] = {"name": "swin_unetr", "feature_size": 12, "in_channels": 1}
    run = RunState(method, make_optimizer(method.student, 0.1, 0, CPU), make_scaler("fp32", CPU), described, 3)
    torch.save(run.as_checkpoint(1), tmp_path / LATEST)
    extract_backbone_weights.main([str(tmp_path / LATEST), str(tmp_path / "w.pth"), "--checkpoint_key", part])
    weights = torch.load(tmp_path / "w.pth", weights_only=True)
    own = {key: value for key, value in trained.network.state_dict().items() if not key.startswith("out.")}
    assert weights.keys() == own.keys() and all(torch.equal(weights[key], value) for key, value in own.items())
    network = SwinUNETR(in_channels=1, out_channels=14, feature_size=12)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    prefixes = (
        trained.encoder_key_prefixes if getattr(method.student.backbone, "decoder_channels", {}) else ("swinViT",)
    )
    assert unexpected == [] and not [key for key in missing if key.startswith(prefixes)]


# Flags


@pytest.mark.parametrize("name", list(METHODS))
def test_help_names_the_methods_own_flags_and_no_others(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main_ddp.main(["--method", name, "--help"])
    printed = capsys.readouterr().out
    own = set(flag_names(METHODS[name].Options))
    assert ended.value.code == 0 and own and all(f"--{flag} " in printed.replace("/", " ") for flag in own)
    others = {flag for other in METHODS.values() for flag in flag_names(other.Options)} - own - shared_flags()
    assert not [flag for flag in others if f"--{flag} " in printed]


@dataclass(frozen=True)
class OtherOptions:
    """Another method's flags.

    Attributes:
        warp_strength: a flag that no other method has
    """

    warp_strength: float = 1.0


class OtherMethod(Method):
    Options: ClassVar[type] = OtherOptions
    pairings = ("iou",)
    views: ClassVar[dict] = {"view": "augmented"}


@pytest.mark.parametrize("given", ["word", "joined word", "config"])
@pytest.mark.parametrize("name", list(METHODS))
def test_another_methods_flag_is_refused_by_name(name, given, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "other", OtherMethod)
    (tmp_path / "run.yaml").write_text(f"method: {name}\nwarp_strength: 2\n")
    words = {
        "word": ["--method", name, "--warp_strength", "2"],
        "joined word": [f"--method={name}", "--warp_strength=2"],
        "config": ["--config", str(tmp_path / "run.yaml")],
    }
    with pytest.raises(ValueError, match=f"--warp_strength is a flag of --method other; this run has --method {name}"):
        main_ddp.main(words[given])


@pytest.mark.parametrize("name", list(METHODS))
def test_no_flag_of_a_method_is_a_shared_one(name):
    assert not set(flag_names(METHODS[name].Options)) & shared_flags()
    flags = main_ddp.make_flags(name).parse_args([])
    assert options_of(flags, METHODS[name].Options) == METHODS[name].Options(), "the defaults hold no mistake"


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="--method moco: expected one of alice"):
        main_ddp.main(["--method", "moco"])

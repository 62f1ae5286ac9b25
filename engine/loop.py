"""The training loop, in execution order.

    schedules -> forward, backward -> clip -> finite check over ranks -> step -> averages -> log -> save -> look

Pictures, validation and probes come after the checkpoint, so that a run which is ended meanwhile loses nothing: the
next one begins with the validation and the probe that its log lacks.

The loop knows no method: it calls one (`models.methods.method.Method`), and the method's networks hide behind it. One
step is one optimiser step over `num_parts` batches per rank.

A step that is not finite changes nothing. The device sees to that; the host hears of it later (`engine.checks`), and
never waits for the device between two steps that are logged.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from datasets.samples.dataset import CropDataset, describe_batch
from engine.checkpoint import CheckpointError
from engine.checks import MAX_SKIPPED_IN_A_ROW, CheckedStep, NonFiniteLossError, StepChecks
from engine.device import autocast
from engine.distributed import World, all_max, gather_objects, leave_together, main_decides, seed_step
from engine.logging import Clock, Meters, RunLog, SilentLog
from engine.optim import clip_gradients, set_schedule, step_unless
from engine.run import RunState
from engine.signals import StopRequest

Schedules = dict[str, Callable[[int], float]]  # "lr", "weight_decay", and the method's own


@dataclass(frozen=True)
class LoopOptions:
    """Lengths in steps, and the switches of the loop."""

    num_steps: int
    steps_per_epoch: int
    num_parts: int = 1
    precision: str = "fp32"
    clip_grad: float = 3.0
    clip_each: bool = False
    nan_policy: str = "stop"
    log_freq: int = 10
    val_freq: int = 0
    probe_freq: int = 0
    picture_freq: int = 0
    save_freq: int = 1
    keep_freq: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Hooks:
    """What the loop calls of others: at its rarer moments, and to make a batch's views.

    validate() -> means over held-out samples (all ranks take part); draw(batch, step) adds pictures (rank 0 only);
    save(epoch or None) begins to write a checkpoint, None = no numbered copy (rank 0 only); saved() waits until nothing
    is being written -> whether the last checkpoint was; watch(means of an epoch) -> warnings for the user;
    probe() -> what frozen features say of organs (rank 0 works, the others wait and get nothing);
    prepare(batch, device) -> the batch on the device, with its views (`CropDataset.make_views`).
    """

    validate: Callable[[], dict[str, float]]
    draw: Callable[[dict, int], None]
    save: Callable[[int | None], None]
    saved: Callable[[], bool]
    watch: Callable[[dict[str, float]], list[str]] = lambda means: []
    probe: Callable[[], dict[str, float]] = dict
    prepare: Callable[[dict, torch.device], dict] = lambda batch, device: on_device(batch, device)


def pretrain(
    run: RunState,
    wrapped: nn.Module,
    dataset: CropDataset,
    batches: Iterator[dict],
    schedules: Schedules,
    options: LoopOptions,
    hooks: Hooks,
    world: World,
    log: RunLog | SilentLog,
) -> bool:
    """Train from `run.step` to `options.num_steps`.

    Args:
        run: method and optimiser; `run.step` counts the steps done.
        wrapped: the method as the loop calls it: DDP around it, or the method itself.
        dataset: where the batches come from; it names their cases.
        batches: endless; `num_parts` of them make one step. Tensors on the CPU.

    Returns:
        True when the run is complete, False when a signal ended it after a checkpoint.

    Raises:
        NonFiniteLossError: on all ranks together, when the loss or a gradient is not finite (`nan_policy` stop), or
            when `MAX_SKIPPED_IN_A_ROW` steps had to be skipped.
        CheckpointError: the last checkpoint of this process could not be written.
    """
    method, parameters = run.method, [p for p in run.method.parameters() if p.requires_grad]
    norms = norm_buffers(method)
    meters, epoch_meters, clock = Meters(), Meters(), Clock()
    checks = StepChecks(world.device, run.scaler.is_enabled())
    with StopRequest() as stop:
        look_again(run.step, options, hooks, stop, world, log)
        while run.step < options.num_steps:
            # Schedules
            now = values_at(schedules, run.step)
            set_schedule(run.optimizer, now["lr"], now["weight_decay"])
            seed_step(options.seed, run.step, world.rank)

            # Forward and backward; ranks exchange gradients with the last part only
            norms_before, cases, losses, values_of_parts = [buffer.clone() for buffer in norms], [], [], []
            for part in range(options.num_parts):
                clock.wait()
                batch = next(batches)
                clock.data_arrived(len(batch["score"]) * world.size)
                cases += dataset.case_names(batch)
                made = hooks.prepare(batch, world.device)
                with delayed_sync(wrapped, part + 1 < options.num_parts):
                    with autocast(options.precision, world.device):
                        total, terms = wrapped(made, now)
                    run.scaler.scale(total / options.num_parts).backward()
                losses.append(total.detach())
                values_of_parts.append({"loss": total.detach(), **terms, **describe_batch(made)})

            # Clip over all trained modules
            run.scaler.unscale_(run.optimizer)
            method.before_step(now)
            grad_norm = clip_gradients(parameters, options.clip_grad, options.clip_each)

            # Finite check over ranks
            checked = checks.check(run.step, losses, grad_norm, cases, stop.requested)
            for broken in checks.read(must_know=is_reported(run.step + 1, options)):
                report_broken(*broken, options.nan_policy, log)

            # Step, averages
            for buffer, value in zip(norms, norms_before):
                buffer.copy_(torch.where(checked.was_skipped, value, buffer))
            step_unless(checked.was_skipped, run.optimizer)
            for values in values_of_parts:
                meters.add(values, checked.is_counted)
                epoch_meters.add(values, checked.is_counted)
            run.scaler.update()  # scales less after an overflow
            method.after_step(now, checked.was_skipped)
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            epoch, num_into_epoch = divmod(run.step, options.steps_per_epoch)
            is_epoch_end, is_last = num_into_epoch == 0, run.step == options.num_steps

            # Log
            log.advance()
            if run.step % options.log_freq == 0 or is_last:
                values = meters.read() | {name: value for name, value in now.items() if name != "step"}
                log.record("train", run.step, epoch, values | {"grad_norm": float(grad_norm)} | clock.read())
            if is_epoch_end or is_last:
                means = epoch_meters.read()
                log.record("epoch", run.step, epoch, means)
                for warning in hooks.watch(means):
                    log.say(f"warning: {warning}")

            # Save
            is_validated, is_probed = (is_looked_at(run.step, options, freq) for freq in looking(options).values())
            is_due = (is_epoch_end and epoch % options.save_freq == 0) or is_validated or is_probed
            if world.is_main and (is_due or is_last or checks.is_asked_to_stop):
                is_kept = is_epoch_end and options.keep_freq and epoch % options.keep_freq == 0
                hooks.save(epoch if is_kept else None)
                if (is_last or checks.is_asked_to_stop) and not hooks.saved():
                    raise CheckpointError(
                        f"step {run.step} could not be saved, and the run ends here (see the warning)"
                    )
            if checks.is_asked_to_stop and not is_last:
                leave_together(world)  # be rank 0 saving or not
                log.say(f"asked to stop: step {run.step} is saved")
                return False

            # Look: pictures, validation, probes
            with clock.paused():
                if options.picture_freq and (run.step % options.picture_freq == 0 or is_last) and world.is_main:
                    hooks.draw(made, run.step)
                if is_validated:
                    hooks.saved()  # validation may start processes, which must not happen while a thread writes
                    log.record("validation", run.step, epoch, hooks.validate())
                if is_probed and not asked_on_any_rank(stop, world):
                    log.record("probe", run.step, epoch, hooks.probe())
            if is_last:
                leave_together(world)  # rank 0 may be drawing
    return True


def looking(options: LoopOptions) -> dict[str, int]:
    """Epochs between validations and between probes, by the kind of their log lines."""
    return {"validation": options.val_freq, "probe": options.probe_freq}


def is_looked_at(step: int, options: LoopOptions, freq: int) -> bool:
    """Whether a look that comes every `freq` epochs (0 = never), and at the end, comes after so many steps."""
    epoch, num_into_epoch = divmod(step, options.steps_per_epoch)
    return freq > 0 and (step == options.num_steps or (num_into_epoch == 0 and epoch % freq == 0))


def is_reported(step: int, options: LoopOptions) -> bool:
    """Whether anything follows after so many steps that reads from the device: a log line, a checkpoint, a picture."""
    every = (options.log_freq, options.steps_per_epoch, options.picture_freq)
    return step == options.num_steps or any(freq and step % freq == 0 for freq in every)


def look_again(
    step: int, options: LoopOptions, hooks: Hooks, stop: StopRequest, world: World, log: RunLog | SilentLog
) -> None:
    """Validate and probe where the process before this one was ended between its checkpoint and that."""
    due = [kind for kind, freq in looking(options).items() if step > 0 and is_looked_at(step, options, freq)]
    missing = main_decides(world, lambda: [kind for kind in due if not log.has(kind, step)])
    for kind in missing:
        if not asked_on_any_rank(stop, world):
            look = hooks.validate if kind == "validation" else hooks.probe
            log.record(kind, step, step // options.steps_per_epoch, look())


def asked_on_any_rank(stop: StopRequest, world: World) -> bool:
    """Whether a stop signal has reached one of the ranks; the same answer on all of them."""
    return bool(all_max(torch.tensor(float(stop.requested), device=world.device)))


def values_at(schedules: Schedules, step: int) -> dict[str, float]:
    """What a step is: its number, and the value of every schedule."""
    return {"step": step} | {name: schedule(step) for name, schedule in schedules.items()}


def on_device(batch: dict, device: torch.device) -> dict:
    """A batch's tensors on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def norm_buffers(module: nn.Module) -> list[torch.Tensor]:
    """The running statistics of batch norms: the only state that a forward pass changes."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def delayed_sync(wrapped: nn.Module, is_delayed: bool) -> contextlib.AbstractContextManager:
    """DDP's `no_sync` for all parts of a step but the last."""
    if is_delayed and isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.no_sync()
    return contextlib.nullcontext()


def report_broken(
    checked: CheckedStep, is_overflow: bool, num_skipped: int, nan_policy: str, log: RunLog | SilentLog
) -> None:
    """Say on which ranks and cases a step broke; raise on all ranks unless the policy is to skip it.

    Gradients are averaged over ranks, so one rank's NaN is every rank's. Where losses show who began, only those ranks
    are named. An overflow of fp16 is skipped without a word, since the loss scale falls; many in a row are an error.

    Args:
        checked, is_overflow, num_skipped: of `StepChecks.read`.
    """
    if is_overflow and num_skipped < MAX_SKIPPED_IN_A_ROW:
        return
    losses = [float(loss) for loss in checked.losses]
    reports = gather_objects((losses, float(checked.grad_norm), sorted(set(checked.cases))))
    begun = [rank for rank, (values, _, _) in enumerate(reports) if not all(map(math.isfinite, values))]
    lines = []
    for rank in begun or range(len(reports)):
        values, norm, cases = reports[rank]
        lines.append(f"rank {rank}: loss {values}, gradient norm {norm:.3g}, cases {', '.join(cases)}")
    message = f"step {checked.step}: loss or gradient is not finite ({'; '.join(lines)})"
    if nan_policy == "stop" and not is_overflow:
        raise NonFiniteLossError(f"{message}. --nan_policy skip leaves such steps out; --precision fp32 may cure it")
    log.say(f"skipped {message}")
    if num_skipped >= MAX_SKIPPED_IN_A_ROW:
        raise NonFiniteLossError(f"{message}; {num_skipped} steps in a row had to be skipped (--precision, --lr)")


@contextlib.contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's mode is restored on exit, also after an error."""
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
    method: nn.Module, batches: Iterable[dict], now: dict[str, float], precision: str, world: World
) -> dict[str, float]:
    """Means of the method's total and terms over held-out batches and all ranks; leaves no trace in the run.

    Args:
        method: the method itself, not a DDP wrapper; in evaluation mode its centres stand still.
        batches: this rank's share; every rank must have as many.
        now: schedule values to judge with.
    """
    meters = Meters()
    with evaluating(method):
        for batch in batches:
            moved = on_device(batch, world.device)
            with autocast(precision, world.device):
                total, terms = method(moved, now)
            meters.add({"loss": total, **terms, **describe_batch(moved)})
    return meters.read()

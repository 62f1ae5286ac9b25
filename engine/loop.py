"""The training loop, in execution order.

    schedules -> forward, backward -> clip -> finite check over ranks -> step -> EMA -> log -> save

The loop knows no method: an `objective` returns a total and a dict of detached terms, and the method's networks hide
behind it. One step is one optimiser step over `num_parts` batches per rank.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from engine.checkpoint import CheckpointError
from engine.distributed import World, all_max, gather_objects, seed_step, wait_for_all
from engine.logging import Clock, Meters, RunLog, SilentLog
from engine.optim import clip_gradients, set_schedule
from engine.run import RunState
from engine.signals import StopRequest

Objective = Callable[[dict, float, bool], tuple[torch.Tensor, dict[str, torch.Tensor]]]
MAX_SKIPPED_IN_A_ROW = 20


class NonFiniteLossError(ValueError):
    """The loss or a gradient became infinite or NaN; the message names the cases of the ranks where it did."""


@dataclass(frozen=True)
class LoopOptions:
    """Lengths in steps, and the switches of the loop."""

    num_steps: int
    steps_per_epoch: int
    num_parts: int = 1
    clip_grad: float = 3.0
    num_freeze_steps: int = 0
    nan_policy: str = "stop"
    log_freq: int = 10
    val_freq: int = 0
    probe_freq: int = 0
    picture_freq: int = 0
    save_freq: int = 1
    keep_freq: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Schedules:
    """Functions of the step."""

    lr: Callable[[int], float]
    weight_decay: Callable[[int], float]
    momentum_teacher: Callable[[int], float]
    teacher_temp: Callable[[int], float]

    def at(self, step: int) -> dict[str, float]:
        """The values of this step, by name."""
        return {name: getattr(self, name)(step) for name in ("lr", "weight_decay", "momentum_teacher", "teacher_temp")}


@dataclass(frozen=True)
class Hooks:
    """What the loop calls at its rarer moments.

    validate() -> means over held-out pairs (all ranks take part); draw(batch, step) adds pictures (rank 0 only);
    save(epoch or None) begins to write a checkpoint, None = no numbered copy (rank 0 only); saved() waits until nothing
    is being written -> whether the last checkpoint was;
    case_names(batch) -> the names of its cases, for error messages; watch(means of an epoch) -> warnings for the user;
    probe() -> what frozen features tell of organs (rank 0 works, the others wait and get nothing).
    """

    validate: Callable[[], dict[str, float]]
    draw: Callable[[dict, int], None]
    save: Callable[[int | None], None]
    saved: Callable[[], bool]
    case_names: Callable[[dict], list[str]]
    watch: Callable[[dict[str, float]], list[str]] = lambda means: []
    probe: Callable[[], dict[str, float]] = dict


def pretrain(
    run: RunState,
    wrapped: nn.Module,
    objective: Objective,
    batches: Iterator[dict],
    schedules: Schedules,
    options: LoopOptions,
    hooks: Hooks,
    world: World,
    log: RunLog | SilentLog,
) -> bool:
    """Train from `run.step` to `options.num_steps`.

    Args:
        run: modules and optimiser; `run.step` counts the steps done.
        wrapped: the student as the objective calls it (DDP, or the student itself).
        objective: (one part of a batch, teacher temperature, whether it is the step's last part) -> (total loss,
            detached terms). With the last part the loss may update its running means, over all parts together.
        batches: endless; `num_parts` of them make one step. Tensors on the CPU.

    Returns:
        True when the run is complete, False when a signal ended it after a checkpoint.

    Raises:
        NonFiniteLossError: on all ranks together, when the loss or a gradient is not finite (`nan_policy` stop), or
            when `MAX_SKIPPED_IN_A_ROW` steps had to be skipped.
        CheckpointError: the last checkpoint of this process could not be written.
    """
    parameters = [parameter for parameter in run.student.parameters() if parameter.requires_grad]
    last_layers = run.student.last_layer_parameters()
    meters, epoch_meters, clock, num_skipped = Meters(), Meters(), Clock(), 0
    with StopRequest() as stop:
        while run.step < options.num_steps:
            # Schedules
            now = schedules.at(run.step)
            set_schedule(run.optimizer, now["lr"], now["weight_decay"])
            seed_step(options.seed, run.step, world.rank)

            # Forward and backward; ranks exchange gradients with the last part only
            centres_before, parts, losses, told_by_parts = copy_buffers(run.loss), [], [], []
            for part in range(options.num_parts):
                clock.wait()
                batch, is_last_part = next(batches), part + 1 == options.num_parts
                parts.append(batch)
                clock.data_arrived(len(batch["query"]) * world.size)
                with delayed_sync(wrapped, not is_last_part):
                    total, terms = objective(batch, now["teacher_temp"], is_last_part)
                    run.scaler.scale(total / options.num_parts).backward()
                losses.append(total.detach())
                told_by_parts.append({"loss": total.detach(), **terms, **pair_statistics(batch)})

            # Clip over all trained modules
            run.scaler.unscale_(run.optimizer)
            if run.step < options.num_freeze_steps:
                for parameter in last_layers:
                    parameter.grad = None
            grad_norm = clip_gradients(parameters, options.clip_grad)

            # Finite check over ranks; the one value read from the device in every step
            broken = ~torch.isfinite(torch.stack(losses)).all()
            if not run.scaler.is_enabled():  # with fp16 an overflow is the scaler's business
                broken = broken | ~torch.isfinite(grad_norm)
            flags = torch.stack([broken.float(), broken.new_tensor(stop.requested).float()])
            is_broken, is_asked_to_stop = all_max(flags).tolist()

            # Step and EMA
            if is_broken:
                num_skipped += 1
                report_broken(losses, grad_norm, parts, options, num_skipped, run.step, hooks, log)
                put_buffers(run.loss, centres_before)
                run.scaler.update()  # closes what unscale_ opened, and lowers the scale
            else:
                num_skipped = 0
                run.scaler.step(run.optimizer)
                run.scaler.update()
                run.teacher.update(run.student, now["momentum_teacher"])
                for told_by_part in told_by_parts:
                    meters.add(told_by_part)
                    epoch_meters.add(told_by_part)
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            epoch, num_into_epoch = divmod(run.step, options.steps_per_epoch)
            is_epoch_end, is_last = num_into_epoch == 0, run.step == options.num_steps

            # Log
            log.advance()
            if run.step % options.log_freq == 0 or is_last:
                told = meters.read(world.device)
                told |= now | {"grad_norm": float(grad_norm)} | clock.read()
                log.record("train", run.step, epoch, told)
            if options.picture_freq and (run.step % options.picture_freq == 0 or is_last) and world.is_main:
                hooks.draw(batch, run.step)
            if is_epoch_end or is_last:
                means = epoch_meters.read(world.device)
                log.record("epoch", run.step, epoch, means)
                for warning in hooks.watch(means):
                    log.say(f"warning: {warning}")
            if options.val_freq and (is_last or (is_epoch_end and epoch % options.val_freq == 0)):
                hooks.saved()  # validation may start processes, which must not happen while a thread writes
                log.record("validation", run.step, epoch, hooks.validate())
            if options.probe_freq and (is_last or (is_epoch_end and epoch % options.probe_freq == 0)):
                log.record("probe", run.step, epoch, hooks.probe())

            # Save
            is_due = is_epoch_end and epoch % options.save_freq == 0
            if world.is_main and (is_due or is_last or is_asked_to_stop):
                is_kept = is_epoch_end and options.keep_freq and epoch % options.keep_freq == 0
                hooks.save(epoch if is_kept else None)
                if (is_last or is_asked_to_stop) and not hooks.saved():
                    raise CheckpointError(
                        f"step {run.step} could not be saved, and the run ends here (see the warning)"
                    )
            if is_asked_to_stop or is_last:
                wait_for_all(world)  # launchers end the others when the first one leaves, be rank 0 saving or not
            if is_asked_to_stop and not is_last:
                log.say(f"asked to stop: step {run.step} is saved")
                return False
    return True


def copy_buffers(module: nn.Module) -> list[torch.Tensor]:
    """The values of all buffers, to be put back by `put_buffers`."""
    return [buffer.clone() for buffer in module.buffers()]


def put_buffers(module: nn.Module, values: list[torch.Tensor]) -> None:
    """Undo what happened to a module's buffers since `copy_buffers`."""
    for buffer, value in zip(module.buffers(), values):
        buffer.copy_(value)


def delayed_sync(wrapped: nn.Module, is_delayed: bool) -> contextlib.AbstractContextManager:
    """DDP's `no_sync` for all parts of a step but the last."""
    if is_delayed and isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.no_sync()
    return contextlib.nullcontext()


def pair_statistics(batch: dict) -> dict[str, torch.Tensor]:
    """Share of pairs that fell back to one volume, and the mean matching score of the batch."""
    return {"fallback_share": batch["is_fallback"], "pair_score": batch["score"]}


def report_broken(
    losses: list[torch.Tensor],
    grad_norm: torch.Tensor,
    parts: list[dict],
    options: LoopOptions,
    num_skipped: int,
    step: int,
    hooks: Hooks,
    log: RunLog | SilentLog,
) -> None:
    """Say on which ranks and cases a step broke; raise on all ranks unless the policy is to skip it.

    Gradients are averaged over ranks, so that one rank's NaN is every rank's: where losses tell who began, only those
    ranks are named.
    """
    cases = sorted({name for batch in parts for name in hooks.case_names(batch)})
    reports = gather_objects(([float(loss) for loss in losses], float(grad_norm), cases))
    begun = [rank for rank, (values, _, _) in enumerate(reports) if not all(map(math.isfinite, values))]
    told = []
    for rank in begun or range(len(reports)):
        values, norm, cases = reports[rank]
        told.append(f"rank {rank}: loss {values}, gradient norm {norm:.3g}, cases {', '.join(cases)}")
    message = f"step {step}: loss or gradient is not finite ({'; '.join(told)})"
    if options.nan_policy == "stop":
        raise NonFiniteLossError(f"{message}. --nan_policy skip leaves such steps out; --precision fp32 may cure it")
    log.say(f"skipped {message}")
    if num_skipped >= MAX_SKIPPED_IN_A_ROW:
        raise NonFiniteLossError(f"{message}; {num_skipped} steps in a row had to be skipped")


# The objective on held-out pairs, without leaving a trace in the run.
#
# Modules go to evaluation mode, where centres stand still, and come back as they were (the published code never
# came back). Every rank takes its share of the pairs.


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

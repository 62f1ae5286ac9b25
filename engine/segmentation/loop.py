"""The finetuning loop, in execution order.

    freeze -> schedule -> forward, backward -> clip -> finite check over ranks -> step -> log -> save -> validate

A validation decides which weights are the best so far, and whether to stop early. It may take long, so the step is
saved before it; a run that was ended in the middle of a validation begins again with it. A run's folder holds
`checkpoint.pth` and the one before it (everything, for an exact resume) and `best.pth` (network and description, for
use).
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from engine.checkpoint import CheckpointError, load_strictly, save_checkpoint, sync_folder, write_synced
from engine.checks import MAX_SKIPPED_IN_A_ROW, CheckedStep, NonFiniteLossError, StepChecks
from engine.device import autocast, pick_precision
from engine.distributed import World, leave_together, seed_step, wrap
from engine.logging import Clock, Meters, RunLog, SilentLog
from engine.optim import clip_gradients, load_optimizer, step_unless
from engine.schedules import CosineSchedule
from engine.segmentation.flags import FinetuneOptions
from engine.segmentation.setup import KIND
from engine.signals import StopRequest
from models.segmenters import freeze

BEST = "best.pth"


@dataclass
class FinetuneRun:
    """Everything that changes while finetuning, and a description in plain values.

    Attributes:
        network: not wrapped by DDP.
        optimizer: its groups carry "lr_scale" (layer-wise decay).
        frozen_keys: parameters that are frozen for the first `freeze_encoder_steps` steps.
        judged_step: the step of the last validation.
        best_dice: of the validations so far, -1 before the first.
        num_without_gain: validations since the best one.
        is_stopped: whether the run ended early.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    description: dict = field(default_factory=dict)
    frozen_keys: list[str] = field(default_factory=list)
    step: int = 0
    judged_step: int = 0
    best_dice: float = -1.0
    best_step: int = 0
    num_without_gain: int = 0
    is_stopped: bool = False

    def as_checkpoint(self) -> dict:
        """The checkpoint of this moment: tensors and plain values only."""
        progress = {name: getattr(self, name) for name in PROGRESS}
        return {
            **self.usable(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": progress,
            "frozen_keys": list(self.frozen_keys),
        }

    def usable(self) -> dict:
        """What a user of the network needs: its weights and what describes them."""
        return {"kind": KIND, "model": self.network.state_dict(), "step": self.step, **self.description}

    def restore(self, state: dict, path: str | Path) -> None:
        """Go on where `state` was written.

        Raises:
            CheckpointError: it belongs to another network or another run.
        """
        if "progress" not in state:
            raise CheckpointError(
                f"{path}: holds a finished network and no state to go on from; expected checkpoint.pth"
            )
        load_strictly(self.network, state["model"], "network", path)
        try:
            load_optimizer(self.optimizer, state["optimizer"])
        except ValueError as error:
            raise CheckpointError(
                f"{path}: its optimiser state does not fit ({error}); keep --layer_decay and "
                "--freeze_encoder_steps, or start over with --resume none"
            ) from error
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        progress = {"judged_step": state["step"]} | state["progress"]  # older checkpoints were written after it
        for name in PROGRESS:
            setattr(self, name, progress[name])
        self.frozen_keys = list(state["frozen_keys"])

    def forget_best(self) -> None:
        """Look for the best weights from here on: those of before are not in this run's folder."""
        self.best_dice, self.best_step, self.num_without_gain = -1.0, 0, 0


PROGRESS = ("step", "judged_step", "best_dice", "best_step", "num_without_gain", "is_stopped")


def finetune(
    run: FinetuneRun,
    loss: nn.Module,
    batches: Iterator[dict],
    validate: Callable[[StopRequest], dict[str, float] | None],
    options: FinetuneOptions,
    world: World,
    log: RunLog | SilentLog,
) -> bool:
    """Train from `run.step` to the end or to an early stop.

    Args:
        loss: (logits [B, C, D, H, W], channels [B, 1, D, H, W]) -> scalar.
        batches: of `SegmentationCropDataset`, on the CPU.
        validate: -> {"dice": mean, ...}, the same on all ranks, NaN where no case counts; None on all ranks when a stop
            was requested of one of them before the end.

    Returns:
        True when the run is complete, False when a signal ended it after a checkpoint.

    Raises:
        NonFiniteLossError: on all ranks together, when the loss or a gradient is not finite, or when
            `MAX_SKIPPED_IN_A_ROW` steps of an fp16 run overflowed.
    """
    lr = CosineSchedule(options.lr, options.min_lr, options.steps, options.warmup_steps)
    precision = pick_precision(options.precision, world.device)
    trained = [parameter for parameter in run.network.parameters() if parameter.requires_grad]
    meters, clock, wrapped = Meters(), Clock(), None
    checks, is_saved = StepChecks(world.device, run.scaler.is_enabled()), True
    with StopRequest() as stop:
        while not checks.is_asked_to_stop:
            # Validate the step before; a run that was ended in the middle of this begins with it
            if is_validation_due(run, options):
                with clock.paused():
                    values = validate(stop)
                if values is None:
                    checks.is_asked_to_stop = True
                    break
                log.record("validation", run.step, 0, values)
                judge(run, values["dice"], options, world, log)
                if run.step == options.steps or run.is_stopped:
                    is_saved = save(run, options, world)
            if run.step >= options.steps or run.is_stopped:
                break

            # Freeze or unfreeze the encoder, then rebuild DDP: it reads requires_grad only once
            if wrapped is None or run.step == options.freeze_encoder_steps:
                if run.frozen_keys:
                    freeze(run.network, run.frozen_keys, run.step < options.freeze_encoder_steps)
                if wrapped is not None:
                    wrapped = None
                    gc.collect()  # the hooks of the DDP before
                wrapped = wrap(run.network, world)

            # Schedule
            rate = lr(run.step)
            for group in run.optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            seed_step(options.seed, run.step, world.rank)

            # Forward and backward
            clock.wait()
            batch = next(batches)
            clock.data_arrived(len(batch["image"]) * world.size)
            image = batch["image"].to(world.device, non_blocking=True)
            label = batch["label"].to(world.device, non_blocking=True)
            with autocast(precision, world.device):
                logits = wrapped(image)
            total = loss(logits.float(), label)
            run.scaler.scale(total).backward()

            # Clip
            run.scaler.unscale_(run.optimizer)
            grad_norm = clip_gradients(trained, options.clip_grad)

            # Finite check over ranks
            checked = checks.check(run.step, [total.detach()], grad_norm, [], stop.requested)
            for broken in checks.read(must_know=is_reported(run.step + 1, options)):
                refuse_broken(*broken)

            # Step
            step_unless(checked.was_skipped, run.optimizer)
            meters.add({"loss": total.detach(), "grad_norm": grad_norm}, ~checked.was_skipped)
            run.scaler.update()  # scales less after an overflow
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            is_last = run.step == options.steps

            # Log
            log.advance()
            if run.step % options.log_freq == 0 or is_last:
                log.record("train", run.step, 0, meters.read() | {"lr": rate} | clock.read())

            # Save, before a validation, which may take long
            is_due = run.step % options.save_freq == 0 or is_validation_due(run, options)
            if is_due or is_last or checks.is_asked_to_stop:
                is_saved = save(run, options, world)
    if not is_saved:
        raise CheckpointError(f"step {run.step} could not be saved, and the run ends here (see the warning)")
    if checks.is_asked_to_stop:
        log.say(f"asked to stop: step {run.step} is saved")
    elif world.is_main and (not options.val_freq or run.best_step == 0):
        write_best(run, options.output_dir)  # no validation chose one
    leave_together(world)  # be rank 0 writing or not
    return not checks.is_asked_to_stop


def is_reported(step: int, options: FinetuneOptions) -> bool:
    """Whether anything follows after so many steps that reads from the device: a log line, a checkpoint, validation."""
    every = (options.log_freq, options.save_freq, options.val_freq)
    return step == options.steps or any(freq and step % freq == 0 for freq in every)


def refuse_broken(checked: CheckedStep, is_overflow: bool, num_skipped: int) -> None:
    """Raise NonFiniteLossError, unless it is one of few overflows of fp16 in a row; arguments of `StepChecks.read`."""
    if is_overflow and num_skipped < MAX_SKIPPED_IN_A_ROW:
        return
    overflows = f" ({num_skipped} steps in a row had to be skipped)" if is_overflow else ""
    raise NonFiniteLossError(
        f"step {checked.step}: loss {checked.losses[0].item():g} or gradient norm {checked.grad_norm.item():g} is not "
        f"finite{overflows}; lower --lr, or use --precision fp32"
    )


def is_validation_due(run: FinetuneRun, options: FinetuneOptions) -> bool:
    """Whether the steps done so far end with one that must be validated, and has not been."""
    is_chosen = options.val_freq > 0 and (run.step % options.val_freq == 0 or run.step == options.steps)
    return is_chosen and run.judged_step < run.step


def save(run: FinetuneRun, options: FinetuneOptions, world: World) -> bool:
    """Write the checkpoint on rank 0; False there where the disk refused it."""
    return not world.is_main or save_checkpoint(run.as_checkpoint(), options.output_dir)


def judge(run: FinetuneRun, dice: float, options: FinetuneOptions, world: World, log: RunLog | SilentLog) -> None:
    """Keep the best weights, and end the run where patience is over. All ranks decide the same."""
    run.judged_step = run.step
    is_first = run.best_step == 0  # then there must be something to use, even if no organ counted (NaN)
    if dice > run.best_dice or is_first:
        run.best_dice, run.best_step, run.num_without_gain = max(run.best_dice, dice), run.step, 0
        if world.is_main:
            write_best(run, options.output_dir)
        return
    run.num_without_gain += 1
    if 0 < options.patience <= run.num_without_gain:
        run.is_stopped = True
        log.say(f"stopped early at step {run.step}: no better Dice than {run.best_dice:.4f} of step {run.best_step}")


def holds_best(output_dir: str | Path, checkpoint_file: str | Path) -> bool:
    """Whether a folder's `best.pth` is that of the run whose checkpoint this is: of the same folder. Rank 0 only."""
    folder = Path(output_dir).resolve()
    return Path(checkpoint_file).resolve().parent == folder and (folder / BEST).exists()


def write_best(run: FinetuneRun, output_dir: str | Path) -> None:
    """Write `best.pth` of this moment."""
    replace_best(run.usable() | {"best_dice": run.best_dice}, output_dir)


def replace_best(state: dict, output_dir: str | Path) -> None:
    """Write `best.pth`: aside first, so that a usable one exists at every moment."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / (BEST + ".tmp")
    try:
        write_synced(state, aside)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"{folder / BEST} cannot be written ({error}); free some space, run again") from error
    aside.replace(folder / BEST)
    sync_folder(folder)

"""One of nnU-Net's training commands, cut to ALICE_STEPS steps; it counts the weights of a checkpoint in the network.

Runs in nnU-Net's environment (tests/test_nnunet_installed.py), with the checkpoint's path in ALICE_CHECKPOINT. Without
steps it ends before the first; with steps it leaves out the validation after them, which takes far longer:

    python nnunet_short_training.py nnUNetv2_train_pretrained ARGUMENTS OF THAT COMMAND
"""

import functools
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

NUM_STEPS = int(os.environ["ALICE_STEPS"])


def shortened(plain: Callable) -> Callable:
    """The trainer's constructor, then: one epoch of a few steps."""

    @functools.wraps(plain)
    def construct(trainer, *given, **named) -> None:
        plain(trainer, *given, **named)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, NUM_STEPS, 1

    return construct


def counting(plain: Callable) -> Callable:
    """The start of a training, then: how many entries of the network equal the checkpoint's."""

    def start(trainer) -> None:
        plain(trainer)
        weights = torch.load(os.environ["ALICE_CHECKPOINT"], weights_only=True)["network_weights"]
        own = trainer.network.state_dict()
        for part in ("encoder", "decoder"):
            names = [name for name in own if name.startswith(f"{part}.")]
            num_equal = sum(name in weights and torch.equal(own[name], weights[name]) for name in names)
            print(f"{part}: {num_equal} of {len(names)} entries equal")
        if not NUM_STEPS:
            raise SystemExit

    return start


if __name__ == "__main__":
    nnUNetTrainer.__init__ = shortened(nnUNetTrainer.__init__)
    nnUNetTrainer.on_train_start = counting(nnUNetTrainer.on_train_start)
    nnUNetTrainer.perform_actual_validation = lambda *_: None
    (command,) = entry_points(group="console_scripts", name=sys.argv.pop(1))
    command.load()()

"""nnU-Net's trainer for pretrained weights; nnU-Net (2.8 or newer) finds it where `nnUNet_extTrainer` points.

The plans that `scripts/make_nnunet_plans.py` writes say which network to build and which weights it starts from.
Everything else is nnU-Net's: sampling, augmentation, loss, folds, prediction.
"""

import sys
from pathlib import Path

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.optim import make_optimizer
from models.nnunet import SegmenterInNNUNet
from models.pretrained import load_pretrained


class nnUNetTrainerAlice(nnUNetTrainer):  # noqa: N801 (nnU-Net's own way of naming)
    """AdamW at our finetuning's rate instead of SGD at 0.01, which such networks do not bear; no deep supervision."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net reads the default)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.initial_lr = 3e-4
        self.weight_decay = 0.01

    def initialize(self) -> None:
        """Build as nnU-Net does, then load the weights; a resumed run overwrites them with its checkpoint."""
        super().initialize()
        given = self.configuration_manager.configuration["alice"]
        report = load_pretrained(self.plain_network().segmenter, given["weights"], part=given["part"])
        self.print_to_log_file(f"pretrained weights: {report.describe()}")

    def plain_network(self) -> SegmenterInNNUNet:
        """The network without DDP and torch.compile around it."""
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    @staticmethod
    def build_network_architecture(
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> SegmenterInNNUNet:
        """For training and prediction."""
        given = configuration_manager.configuration["alice"]
        return SegmenterInNNUNet(given["backbone"], num_input_channels, num_output_channels, given["feature_size"])

    def configure_optimizers(self):
        optimizer = make_optimizer(self.network, self.initial_lr, self.weight_decay, self.device)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none to switch."""

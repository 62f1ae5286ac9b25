"""The finetuning loss against the formulas written out, and the weights of rare classes."""

import pytest
import torch
import torch.nn.functional as F

from losses.segmentation import make_dice_ce, rare_class_weights


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 3 classes, and a class map with mostly background in which class 2 is rare."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4, generator=generator)
    classes = torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8)
    classes[0, 0, 0] = 1
    classes[1, 0, 1, 1, 1] = 2
    return logits, classes


def dice_by_hand(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """One minus soft Dice over the whole batch, mean over the organs."""
    probabilities, losses = logits.softmax(1), []
    for channel in (1, 2):
        p, t = probabilities[:, channel], (classes[:, 0] == channel).float()
        losses.append(1 - 2 * (p * t).sum() / (p.sum() + t.sum() + 1e-5))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 0.8, 2.0])])
def test_dice_of_organs_plus_cross_entropy_of_all_classes(weights):
    logits, classes = batch()
    per_voxel = F.cross_entropy(logits, classes[:, 0].long(), reduction="none")
    share = torch.ones_like(per_voxel) if weights is None else weights[classes[:, 0].long()]
    expected = dice_by_hand(logits, classes) + (share * per_voxel).sum() / share.sum()
    torch.testing.assert_close(make_dice_ce(weights)(logits, classes), expected)


def test_rare_classes_weigh_more_by_the_root_of_their_share():
    weights = rare_class_weights([900, 100, 0, 1])
    assert weights[1] / weights[0] == pytest.approx(3.0)
    assert weights[3] / weights[0] == pytest.approx(30.0)
    assert weights[2] == 0
    assert weights[[0, 1, 3]].mean() == pytest.approx(1.0)

"""A segmentation network as nnU-Net feeds it: its arrays lie in another order than the ones our weights know.

nnU-Net's `NibabelIOWithReorient` gives arrays [Z, Y, X] whose indices grow to superior, anterior, right; pretraining
sees superior, posterior, left ("SPL"). Both differ by two flips, which are undone on the way out.
"""

from torch import Tensor, nn

from models.segmenters import SEGMENTERS

READER = "NibabelIOWithReorient"
FLIPPED = (-2, -1)


class SegmenterInNNUNet(nn.Module):
    """The segmenter of one backbone behind nnU-Net's array order; maps [B, C, Z, Y, X] to logits [B, K, Z, Y, X].

    Args:
        backbone: a name in `models.segmenters.SEGMENTERS`.
        in_channels: C.
        num_classes: K, nnU-Net's number of segmentation heads.
        feature_size: the weights' own.
    """

    def __init__(self, backbone: str, in_channels: int, num_classes: int, feature_size: int) -> None:
        super().__init__()
        self.segmenter = SEGMENTERS[backbone].build(in_channels, num_classes, feature_size)

    def forward(self, volumes: Tensor) -> Tensor:
        return self.segmenter(volumes.flip(FLIPPED)).flip(FLIPPED)

"""An Alice small enough for tests: a three-layer backbone in a few milliseconds, or SwinUNETR at its smallest."""

import copy

import torch
from torch import Tensor, nn

from models.backbones import BACKBONES
from models.backbones.interface import Size3, upsample_mask
from models.methods.alice import AliceStudent, AliceTeacher, StudentOutputs, TeacherOutputs, build_alice

ROI = (64, 32, 32)
OUT_DIM = 32
SMALL = {
    "feature_size": 12,
    "roi": ROI,
    "out_dim": OUT_DIM,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "casa_heads": 2,
    "casa_head_dim": 8,
    "casa_hidden_dim": 32,
}


class TinyBackbone(nn.Module):
    """The least that `models.backbones.interface.Backbone` asks for: strides 8, 16 and 32, one layer each way."""

    encoder_key_prefixes = ("encoder.",)
    decoder_key_prefixes = ("decoder.",)
    roi_multiple = 32

    def __init__(self, feature_size: int, roi: Size3, decoder_stride: int | None, use_checkpoint: bool) -> None:
        super().__init__()
        width = feature_size
        self.channels = {8: width, 16: 2 * width, 32: 4 * width}
        self.decoder_channels = {8: width} if decoder_stride else {}
        encoder = [nn.Conv3d(1, width, 8, 8), nn.Conv3d(width, 2 * width, 2, 2), nn.Conv3d(2 * width, 4 * width, 2, 2)]
        self.network = nn.ModuleDict({"encoder": nn.ModuleList(encoder)})
        if decoder_stride:
            self.network["decoder"] = nn.ConvTranspose3d(4 * width, width, 4, 4)
        if decoder_stride == 1:
            self.network["out"] = nn.ConvTranspose3d(width, 1, 8, 8)
        self.mask_token = nn.Parameter(torch.randn(1, width, 1, 1, 1))

    def encode(self, volumes: Tensor, masked: Tensor | None = None) -> dict[int, Tensor]:
        features = {}
        x = volumes
        for stride, layer in zip(self.channels, self.network["encoder"]):
            x = layer(x)
            if stride == 8 and masked is not None:
                x = torch.where(upsample_mask(masked, tuple(x.shape[2:])), self.mask_token, x)
            x = features[stride] = torch.tanh(x)
        return features

    def decode(self, features: dict[int, Tensor]) -> tuple[Tensor | None, dict[int, Tensor]]:
        if "decoder" not in self.network:
            return None, {}
        decoded = torch.tanh(self.network["decoder"](features[32])) + features[8]
        return (self.network["out"](decoded) if "out" in self.network else None), {8: decoded}

    def encoder_twin(self) -> "TinyBackbone":
        twin = copy.deepcopy(self)
        for name in ("decoder", "out"):
            if name in twin.network:
                del twin.network[name]
        del twin.mask_token
        return twin


def small_alice(seed: int = 0, backbone: str = "tiny", **options) -> tuple[AliceStudent, AliceTeacher]:
    """A student and its teacher with weights drawn from `seed`."""
    torch.manual_seed(seed)
    BACKBONES["tiny"] = TinyBackbone
    try:
        return build_alice(backbone=backbone, **(SMALL | options))
    finally:
        del BACKBONES["tiny"]


def small_batch(num_pairs: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random views; every mask hides a different set of 12 of the 16 blocks."""
    generator = torch.Generator().manual_seed(seed)
    names = ("query", "key", "query_student", "query_teacher", "key_student", "key_teacher")
    batch = {name: torch.rand(num_pairs, 1, *ROI, generator=generator) for name in names}
    for name in ("query_mask", "key_mask"):
        order = torch.rand(num_pairs, 16, generator=generator).argsort(dim=1)
        batch[name] = (order < 12).reshape(num_pairs, 4, 2, 2)
    return batch


def run_alice(
    student: nn.Module, teacher: AliceTeacher, batch: dict[str, Tensor]
) -> tuple[StudentOutputs, TeacherOutputs]:
    """Both networks' outputs for a batch."""
    online = student(batch["query_student"], batch["query_mask"], batch["key_student"], batch["key_mask"])
    return online, teacher(batch["query_teacher"], batch["key_teacher"], online)

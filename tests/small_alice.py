"""An Alice small enough for tests: a three-layer backbone in a few milliseconds, or SwinUNETR at its smallest."""

import copy

import torch
from torch import Tensor, nn

from datasets.samples.masks import mask_grid
from models.backbones import BACKBONES
from models.backbones.interface import Size3, drop_mask_tokens, upsample_mask
from models.methods.alice import Alice, AliceOptions, StudentOutputs, TeacherOutputs
from models.methods.method import rows_of

ROI = (64, 32, 32)
OUT_DIM = 32
SMALL = {
    "out_dim": OUT_DIM,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "casa_heads": 2,
    "casa_head_dim": 8,
    "casa_hidden_dim": 32,
}
NOW = {"step": 0, "teacher_temp": 0.04, "momentum_teacher": 0.9, "last_layer_frozen": 0.0}


class TinyBackbone(nn.Module):
    """The least that `models.backbones.interface.Backbone` asks for: strides 8, 16 and 32, one layer each way.

    For slices its kernels are one voxel deep."""

    encoder_key_prefixes = ("encoder.",)
    decoder_key_prefixes = ("decoder.",)
    roi_multiple = 32

    def __init__(
        self,
        feature_size: int,
        roi: Size3,
        decoder_stride: int | None,
        use_checkpoint: bool = False,
        with_masks: bool = True,
    ) -> None:
        super().__init__()
        width = feature_size
        self.channels = {8: width, 16: 2 * width, 32: 4 * width}
        self.decoder_channels = {8: width} if decoder_stride else {}
        two, four, eight = ((1 if roi[0] == 1 else side, side, side) for side in (2, 4, 8))
        widths = [(1, width, eight), (width, 2 * width, two), (2 * width, 4 * width, two)]
        encoder = [nn.Conv3d(before, after, side, side) for before, after, side in widths]
        self.network = nn.ModuleDict({"encoder": nn.ModuleList(encoder)})
        if decoder_stride:
            self.network["decoder"] = nn.ConvTranspose3d(4 * width, width, four, four)
        if decoder_stride == 1:
            self.network["out"] = nn.ConvTranspose3d(width, 1, eight, eight)
        if with_masks:
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

    @property
    def skip_channels(self) -> dict[int, int]:
        return self.channels

    def skips(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        return features

    def encoder_twin(self) -> "TinyBackbone":
        twin = copy.deepcopy(self)
        for name in ("decoder", "out"):
            if name in twin.network:
                del twin.network[name]
        drop_mask_tokens(twin)
        return twin


def small_alice(
    seed: int = 0,
    backbone: str = "tiny",
    feature_size: int = 12,
    roi: Size3 = ROI,
    use_checkpoint: bool = False,
    **options,
) -> Alice:
    """The method with weights drawn from `seed`; `options` are fields of `AliceOptions`."""
    kind = TinyBackbone if backbone == "tiny" else BACKBONES[backbone]

    def make_backbone(decoder_stride: int | None, with_masks: bool) -> nn.Module:
        return kind(feature_size, roi, decoder_stride, use_checkpoint, with_masks)

    torch.manual_seed(seed)
    return Alice(AliceOptions(**(SMALL | options)), make_backbone)


def small_batch(num_samples: int, seed: int = 0, roi: Size3 = ROI) -> dict[str, Tensor]:
    """A batch of random crops and views, V = 2; every mask hides a different set of three quarters of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    batch = {name: torch.rand(num_samples, 2, 1, *roi, generator=generator) for name in ("crop", "student", "teacher")}
    grid = mask_grid(roi, 16)
    num_blocks = grid[0] * grid[1] * grid[2]
    order = torch.rand(num_samples, 2, num_blocks, generator=generator).argsort(dim=2)
    cases = torch.arange(num_samples)
    return batch | {
        "mask": (order < 3 * num_blocks // 4).reshape(num_samples, 2, *grid),
        "case": torch.stack([cases, cases + 1], dim=1) % 3,
        "centre_mm": torch.zeros(num_samples, 2, 3),
        "score": torch.ones(num_samples),
        "is_fallback": torch.zeros(num_samples, dtype=torch.bool),
    }


def run_alice(method: Alice, batch: dict[str, Tensor]) -> tuple[StudentOutputs, TeacherOutputs]:
    """Both networks' outputs for a batch."""
    online = method.student(rows_of(batch["student"]), rows_of(batch["mask"]))
    return online, method.teacher(rows_of(batch["teacher"]), online.casa_query)

"""The finest block of SwinUNETR's decoder without the map that it upsamples, and without the joined one.

MONAI's `UnetrUpBlock` doubles the grid of its input by a transposed convolution (2x2x2, stride 2, no bias), joins the
result with the skip connection, and gives both to a convolution of 3x3x3 and to one of 1x1x1. No activation lies
between, so each pair of convolutions is one convolution of the coarse input; its weights are sums of their products:

    conv(cat(up(x), skip)) = conv_up(up(x)) + conv_skip(skip) = shuffle(K * x) + conv_skip(skip)

A window of 3 fine voxels lies in 2 coarse ones. K therefore has 2x2x2 places instead of 3x3x3. It gives the 8 fine
voxels of a coarse one as 8 groups of channels, which `shuffle` puts beside each other. The numbers are the same to
rounding, and so is the state dict. Where as many channels come in as go out, a quarter of the block's arithmetic goes,
and the backward pass needs neither map.

One axis. Output 2j - 1 + q (q = 0, 1) reads the fine voxels 2j - 2 + q + t (t = 0, 1, 2). Fine voxel 2i + a is made of
coarse voxel i by place a of the transposed convolution. So t and a meet in coarse voxel j - 1 + p where q + t = 2p + a.

Letters: B samples; I channels in, M in between, O out; d, h, w coarse voxels.
"""

import torch
import torch.nn.functional as F
from monai.networks.blocks.unetr_block import UnetrUpBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.layers.channels_last import is_channels_last, make_channels_last
from models.layers.constants import constant
from models.layers.convolution import mix_channels
from models.layers.instance_norm import SteadyResBlock


class ComposedUpBlock(UnetrUpBlock):
    """MONAI's block, computed from the coarse map; adds no weights."""

    def forward(self, inp: Tensor, skip: Tensor) -> Tensor:
        """[B, I, d, h, w], [B, M, 2d, 2h, 2w] -> [B, M, 2d, 2h, 2w]."""
        block = self.conv_block
        up, window, mix = (one.conv.weight for one in (self.transp_conv, block.conv1, block.conv3))
        num_between = up.shape[1]
        first = upsample_and_convolve(inp, up, window[:, :num_between])
        first = first + F.conv3d(skip, window[:, num_between:], padding=1)
        mix_skip = mix_channels if is_channels_last(skip) else F.conv3d
        residual = upsample_and_mix(inp, up, mix[:, :num_between]) + mix_skip(skip, mix[:, num_between:])
        return block.finish(first, residual)


def upsample_and_convolve(x: Tensor, up: Tensor, window: Tensor) -> Tensor:
    """conv3d(conv_transpose3d(x, up, stride=2), window, padding=1).

    Args:
        x: [B, I, d, h, w].
        up: [I, M, 2, 2, 2].
        window: [O, M, 3, 3, 3].

    Returns:
        [B, O, 2d, 2h, 2w], channels last where `x` is.
    """
    kernel = compose(up, window)
    if is_channels_last(x):
        made = F.conv3d(x, make_channels_last(kernel), padding=1)
        return Shuffle.apply(made.movedim(1, -1).unflatten(-1, (2, 2, 2, -1))).movedim(-1, 1)
    made = F.conv3d(x, kernel, padding=1).unflatten(1, (2, 2, 2, -1))
    fine = made.permute(0, 4, 5, 1, 6, 2, 7, 3).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return fine[:, :, 1:-1, 1:-1, 1:-1]


def compose(up: Tensor, window: Tensor) -> Tensor:
    """K, the weights of both convolutions as one: [I, M, 2, 2, 2], [O, M, 3, 3, 3] -> [8O, I, 2, 2, 2]."""
    with torch.autocast(up.device.type, enabled=False):  # sums of weights in their own type
        meets = constant(meeting_places, up.device).to(up.dtype)
        kernel = torch.einsum("imabc,omtuv->oiatbucv", up, window)
        kernel = torch.einsum("oiatbucv,xpta->oibucvxp", kernel, meets)
        kernel = torch.einsum("oibucvxp,yqub->oicvxpyq", kernel, meets)
        kernel = torch.einsum("oicvxpyq,zrvc->xyzoipqr", kernel, meets)
    return kernel.flatten(0, 3).contiguous()


def upsample_and_mix(x: Tensor, up: Tensor, mix: Tensor) -> Tensor:
    """conv3d(conv_transpose3d(x, up, stride=2), mix): a fine voxel is a product with its coarse one.

    Args:
        x: [B, I, d, h, w].
        up: [I, M, 2, 2, 2].
        mix: [O, M, 1, 1, 1].

    Returns:
        [B, O, 2d, 2h, 2w], channels last where `x` is.
    """
    with torch.autocast(up.device.type, enabled=False):
        kernel = torch.einsum("imabc,om->ioabc", up, mix.flatten(1))
    if not is_channels_last(x):
        return F.conv_transpose3d(x, kernel.contiguous(), stride=2)
    coarse = F.linear(x.movedim(1, -1), kernel.permute(2, 3, 4, 1, 0).flatten(0, 3))  # [B, d, h, w, 8O]
    return beside(coarse.unflatten(-1, (2, 2, 2, -1))).movedim(-1, 1)


def beside(coarse: Tensor) -> Tensor:
    """Groups of channels set beside each other: [B, d, h, w, 2, 2, 2, O] -> [B, 2d, 2h, 2w, O]."""
    return coarse.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class Shuffle(torch.autograd.Function):
    """Coarse places with 2x2x2 groups of channels -> fine places, without those of the rim.

    Torch's own slices would bring the gradient into torch's order, one axis after the other.
    """

    INNER = (slice(None), *[slice(1, -1)] * 3)

    @staticmethod
    def forward(ctx, coarse: Tensor) -> Tensor:
        """[B, d + 1, h + 1, w + 1, 2, 2, 2, O] -> [B, 2d, 2h, 2w, O]."""
        return beside(coarse)[Shuffle.INNER]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        """The other way, zeros in the rim."""
        batch, *fine, channels = grad.shape
        whole = grad.new_zeros(batch, *(side + 2 for side in fine), channels)
        whole[Shuffle.INNER] = grad
        split = [part for side in fine for part in (side // 2 + 1, 2)]
        return whole.view(batch, *split, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)


def meeting_places() -> Tensor:
    """[q, p, t, a] = [2, 2, 3, 2]: 1 where q + t = 2p + a, see the top."""
    q, p, t, a = torch.meshgrid(*map(torch.arange, (2, 2, 3, 2)), indexing="ij")
    return (q + t == 2 * p + a).float()


def use_composed_upsampling(network: nn.Module, composed: bool = True) -> None:
    """Let the finest of MONAI's upsampling blocks in `network` go this way, or its own; its state dict does not change.

    The block must be the one of 3-D SwinUNETR, with `models.layers.instance_norm` in it. Deeper blocks have twice as
    many channels before as behind and few voxels: there the products of weights cost what is gained.
    """
    for part in network.modules():
        if isinstance(part, UnetrUpBlock) and isinstance(part.conv_block, SteadyResBlock):
            up = part.transp_conv.conv
            if isinstance(up, nn.ConvTranspose3d) and up.in_channels == up.out_channels:
                part.__class__ = ComposedUpBlock if composed else UnetrUpBlock

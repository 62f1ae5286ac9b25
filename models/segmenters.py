"""Segmentation networks by the name of their backbone: what pretrained weights are finetuned into.

A segmenter is the backbone's own third-party network with one output channel per class, so that extracted weights fit
by name. Beside the network, finetuning must know which keys are the encoder (to load or freeze it) and how deep each
weight lies (to let early layers move less, as BEiT's finetuning does).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from models.backbones import BACKBONES, segmentation_network
from models.backbones.interface import Size3
from models.layers.hypercolumns import HypercolumnHead, join


@dataclass(frozen=True)
class SegmenterKind:
    """How to build and take apart the segmentation network of one backbone.

    Attributes:
        name: of the backbone, in `models.backbones.BACKBONES`.
        depth_prefixes: key prefix -> depth of the encoder's layers, 0 nearest to the input; all other keys lie deepest.
        map_modules: the modules that give the encoder's maps, see `models.layers.hypercolumns.join`.
    """

    name: str
    depth_prefixes: dict[str, int]
    map_modules: tuple[str, ...]

    output_key_prefixes = ("out.", "hypercolumns.")  # of the layers whose shapes depend on the number of classes

    def build(
        self,
        in_channels: int,
        num_classes: int,
        feature_size: int,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
        hypercolumns: bool = False,
    ) -> nn.Module:
        """A network that maps [B, in_channels, D, H, W] to logits [B, num_classes, D, H, W]; D = 1 in 2-D.

        `hypercolumns`: with a head on the encoder's joined maps beside the decoder (`models.layers.hypercolumns`).
        """
        backbone = BACKBONES[self.name]
        network = segmentation_network(self.name, in_channels, num_classes, feature_size, use_checkpoint, spatial_dims)
        if hypercolumns:
            channels = {stride: width for stride, width in backbone.channels_of(feature_size).items() if stride > 1}
            join(network, HypercolumnHead(channels, num_classes), self.map_modules)
        return network

    @property
    def encoder_key_prefixes(self) -> tuple[str, ...]:
        return BACKBONES[self.name].encoder_key_prefixes

    @property
    def num_depths(self) -> int:
        """Depths there are, with that of the decoder and the output."""
        return max(self.depth_prefixes.values()) + 2

    def depth_of(self, key: str) -> int:
        """The depth of one weight: 0 nearest to the input, `num_depths - 1` for decoder and output."""
        matches = [depth for prefix, depth in self.depth_prefixes.items() if key.startswith(prefix)]
        return matches[0] if matches else self.num_depths - 1

    def check_sizes(self, feature_size: int, roi: Size3) -> None:
        """Raise ValueError, naming the flag, for a feature size or crop (D, H, W) that the network cannot take."""
        BACKBONES[self.name](feature_size, tuple(roi), 1, False)


# The convolutions on SwinUNETR's skip connections lie as deep as the map that they read; the "c" are version 2's.
SWIN_UNETR_DEPTHS = {
    **{"swinViT.patch_embed.": 0, "encoder1.": 0, "encoder10.": 5},
    **{f"swinViT.layers{depth}.": depth for depth in range(1, 5)},
    **{f"swinViT.layers{depth}c.": depth for depth in range(1, 5)},
    **{f"encoder{depth + 1}.": depth for depth in range(1, 4)},
}
STAGED_DEPTHS = {"embed.": 0, "encoder.2.": 1, "encoder.4.": 2, "encoder.8.": 3, "encoder.16.": 4}
RESENC_DEPTHS = {
    **{"embed.": 0, "encoder.1.": 1, "encoder.2.": 2, "encoder.4.": 3},
    **{"encoder.8.": 4, "encoder.16.": 5, "encoder.32.": 6},
}
RESNET_DEPTHS = {
    **{"encoder.conv1.": 0, "encoder.bn1.": 0},
    **{f"encoder.layer{depth}.": depth for depth in range(1, 5)},
}

STAGED_MAPS = tuple(f"encoder.{stride}" for stride in (2, 4, 8, 16))

SEGMENTERS = {
    "nnformer": SegmenterKind("nnformer", STAGED_DEPTHS, STAGED_MAPS),
    "resenc": SegmenterKind("resenc", RESENC_DEPTHS, (*STAGED_MAPS, "encoder.32")),
    "resnet50_unet": SegmenterKind("resnet50_unet", RESNET_DEPTHS, ("encoder",)),
    "swin_unetr": SegmenterKind("swin_unetr", SWIN_UNETR_DEPTHS, ("swinViT",)),
    "swin_unetr_v2": SegmenterKind("swin_unetr_v2", SWIN_UNETR_DEPTHS, ("swinViT",)),
    "unet": SegmenterKind("unet", STAGED_DEPTHS, STAGED_MAPS),
}


def kind_of(network: nn.Module) -> SegmenterKind | None:
    """The registry's entry for a network; None for networks that are not in it. SwinUNETR says its version itself."""
    version = getattr(getattr(network, "swinViT", None), "use_v2", False)
    for kind in SEGMENTERS.values():
        backbone = BACKBONES[kind.name]
        if isinstance(network, backbone.network_class) and getattr(backbone, "use_v2", False) == version:
            return kind
    return None


def layer_groups(
    network: nn.Module, kind: SegmenterKind, layer_decay: float, decays: Callable[[str, nn.Parameter], bool]
) -> list[dict]:
    """Parameter groups for layer-wise learning-rate decay: one per depth and per kind of weight decay.

    Args:
        network: parameters that need no gradient are left out.
        layer_decay: a weight `n` depths below the output learns at `layer_decay ** n` of the rate; 1 = off.
        decays: (name, parameter) -> whether weight decay applies.

    Returns:
        Dicts with "params", "lr_scale", "is_decayed", sorted, so that the same network gives the same order.

    Raises:
        ValueError: the decay does not lie in (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"--layer_decay is {layer_decay}, expected above 0 and up to 1 (1 = off)")
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((kind.depth_of(name), decays(name, parameter)), []).append(parameter)
    return [
        {"params": groups[key], "lr_scale": layer_decay ** (kind.num_depths - 1 - key[0]), "is_decayed": key[1]}
        for key in sorted(groups)
    ]


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters of a network."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def freeze(network: nn.Module, keys: Collection[str], is_frozen: bool = True) -> None:
    """Stop gradients to the parameters named in `keys`, or let them flow again.

    Batch norms among them also stop following the batches while they are frozen.

    Raises:
        ValueError: none of the keys is a parameter.
    """
    wanted = set(keys)
    chosen = [parameter for name, parameter in network.named_parameters() if name in wanted]
    if not chosen:
        raise ValueError("--freeze_encoder_steps: no encoder weights were loaded, so there is nothing to freeze")
    for parameter in chosen:
        parameter.requires_grad_(not is_frozen)
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in wanted:
            module.train(not is_frozen)

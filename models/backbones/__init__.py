"""Backbones by name. A new one is a file that fits `models.backbones.interface.Backbone`, and a line here."""

import importlib
from collections.abc import Iterator, Mapping

from torch import nn

from models.backbones.interface import Backbone


class NamedBackbones(Mapping[str, type[Backbone]]):
    """Name -> class, imported when it is asked for: the libraries behind it take seconds, `--help` wants names alone.

    Args:
        places: name -> (module in this package, class there).
    """

    def __init__(self, places: dict[str, tuple[str, str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> type[Backbone]:
        module, class_name = self._places[name]
        return getattr(importlib.import_module(f"{__name__}.{module}"), class_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places  # a Mapping's own way would import it


BACKBONES = NamedBackbones(
    {
        "nnformer": ("nnformer", "NNFormerBackbone"),
        "resenc": ("resenc", "ResEncBackbone"),
        "resnet50_unet": ("resnet_unet", "ResNetUNetBackbone"),
        "swin_unetr": ("swin_unetr", "SwinUNETRBackbone"),
        "swin_unetr_v2": ("swin_unetr", "SwinUNETRV2Backbone"),
        "unet": ("unet", "UNetBackbone"),
    }
)


def segmentation_network(
    name: str,
    in_channels: int,
    out_channels: int,
    feature_size: int,
    use_checkpoint: bool = False,
    spatial_dims: int = 3,
) -> nn.Module:
    """The whole network that a backbone pretrains, with an output for another task.

    Extracted weights carry its names (all but those of the output, `out.`), so `load_state_dict(weights, strict=False)`
    fits.

    Args:
        name: of `BACKBONES`.
        out_channels: number of classes, background included.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.
        spatial_dims: 3, or 2 for slices (see `models.backbones.interface.spatial_dims_of`).

    Returns:
        A module that maps [B, in_channels, D, H, W] to logits [B, out_channels, D, H, W]; D = 1 in 2-D.

    Raises:
        ValueError: unknown name, or a network that does not exist in so many dimensions, naming the flag.
    """
    if name not in BACKBONES:
        raise ValueError(f"--backbone must be one of {sorted(BACKBONES)}, got {name!r}")
    return BACKBONES[name].make_network(in_channels, out_channels, feature_size, use_checkpoint, spatial_dims)

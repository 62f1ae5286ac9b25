"""The weights of `resnet50_unet` under the names of other libraries, for people who load them there.

    ours (as segmentation_models_pytorch)   `Unet("resnet50")` there    `torchvision.models.resnet50`
    encoder.conv1.weight                    encoder.conv1.weight        conv1.weight
    decoder.blocks.0.conv1.0.weight         the same                    -
    out.0.weight                            segmentation_head.0.weight  -

Reading such files back is the task of `models.pretrained`.
"""

from torch import Tensor

from models.backbones.resnet_unet import GREY_CHANNELS
from models.pretrained import fit_input_channels

BACKBONE = "resnet50_unet"  # the only one that these libraries have too
LAYOUTS = ("torchvision", "smp")
TASK_LAYER = {"out.": "segmentation_head."}  # our prefix -> segmentation_models_pytorch's
FIRST_CONVOLUTION = "encoder.conv1.weight"


def with_names_of(layout: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names -> under those of a library; what the library's network lacks is left out.

    The first convolution gets three input channels. Where it had one, three equal channels give what one gave.

    Args:
        layout: one of `LAYOUTS`.
        weights: of `resnet50_unet`: encoder, and where there is one, decoder and output layer.

    Raises:
        ValueError: the first convolution has neither one nor three input channels.
    """
    first = weights[FIRST_CONVOLUTION]
    fitted = fit_input_channels(first, first.new_empty(first.shape[0], GREY_CHANNELS, *first.shape[2:]))
    if fitted is None:
        raise ValueError(
            f"{FIRST_CONVOLUTION} has {first.shape[1]} input channels; --format {layout} writes networks of "
            f"{GREY_CHANNELS}: use --format monai"
        )
    weights = weights | {FIRST_CONVOLUTION: fitted.contiguous()}
    if layout == "torchvision":
        return {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
    return {renamed(key): value for key, value in weights.items()}


def renamed(key: str) -> str:
    """Our key as segmentation_models_pytorch calls it."""
    for ours, theirs in TASK_LAYER.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key

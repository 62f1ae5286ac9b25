"""A pretrained `resenc` as the checkpoint that nnU-Net finetunes from by itself: weights, and a plan to build on.

nnU-Net's master (`nnUNetv2_preprocess_like_nnssl`, `nnUNetv2_train_pretrained`) reads the fields below; it takes
encoder and stem, strictly by name, and builds the network, spacing and patch from the plan. The release 2.8.1
(`nnUNetv2_train -pretrained_weights`) reads `network_weights` alone, and wants decoder and encoder in every spelling.
Both serve from one file:

    network_weights         name -> tensor: every layer under each name that nnU-Net gives it; no segmentation layers
    nnssl_adaptation_plan   how to build the network, how the pretraining saw volumes, where encoder and stem are
    citations               papers, printed in nnU-Net's log
    pretraining             our description of the run; nnU-Net does not read it

Values are CPU tensors and plain Python values, which nnU-Net's `torch.load(..., weights_only=True)` asks for.

    ours                        nnU-Net's
    embed.                      encoder.stem.
    encoder.STRIDE.             encoder.stages.I.           I = log2(STRIDE)
    decoder.STRIDE.transpconv.  decoder.transpconvs.J.      J counts from the coarsest stride
    decoder.STRIDE.convs.       decoder.stages.J.
"""

import torch
from torch import Tensor

from models.backbones.resenc_plan import DECODER_STRIDES, KWARGS_TO_IMPORT, STRIDES, architecture_kwargs

BACKBONE = "resenc"
FORMAT = "nnunet"
ARCHITECTURE = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
TASK_LAYERS = ".seg_layers."
PREFIXES = {
    "embed.": "encoder.stem.",
    **{f"encoder.{stride}.": f"encoder.stages.{stage}." for stage, stride in enumerate(STRIDES)},
    **{f"decoder.{s}.transpconv.": f"decoder.transpconvs.{number}." for number, s in enumerate(DECODER_STRIDES)},
    **{f"decoder.{s}.convs.": f"decoder.stages.{number}." for number, s in enumerate(DECODER_STRIDES)},
}
PAPERS = {
    "alice": "Jiang, Y., Sun, M., Guo, H., Bai, X., Yan, K., Lu, L., & Xu, M. (2023). Anatomical Invariance Modeling "
    "and Semantic Alignment for Self-supervised Learning in 3D Medical Image Analysis. ICCV.",
    "simsiam": "Chen, X., & He, K. (2021). Exploring Simple Siamese Representation Learning. CVPR.",
    "dino": "Caron, M., Touvron, H., Misra, I., Jegou, H., Mairal, J., Bojanowski, P., & Joulin, A. (2021). Emerging "
    "Properties in Self-Supervised Vision Transformers. ICCV.",
    "voco": "Wu, L., Zhuang, J., & Chen, H. (2024). VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework "
    "for 3D Medical Image Analysis. CVPR.",
    "caid": "Hosseinzadeh Taher, M. R., Haghighi, F., Gotway, M. B., & Liang, J. (2022). CAiD: Context-Aware Instance "
    "Discrimination for Self-supervised Learning in Medical Imaging. MIDL.",
}
RESENC_PAPER = (
    "Isensee, F., Wald, T., Ulrich, C., Baumgartner, M., Roy, S., Maier-Hein, K., & Jaeger, P. F. (2024). nnU-Net "
    "Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation. MICCAI."
)


def nnunet_checkpoint(weights: dict[str, Tensor], description: dict) -> dict:
    """What `torch.save` writes for nnU-Net.

    Args:
        weights: of a `resenc`, under its own names. Where there is no decoder, the file holds the random weights that
            nnU-Net itself would start from.
        description: of the run: "method", "backbone" (feature_size, in_channels) and "preprocessing" (spacing_mm, roi).

    Raises:
        ValueError: a name that a `resenc` does not have.
    """
    backbone = description["backbone"]
    return {
        "network_weights": network_weights(weights, backbone["in_channels"], backbone["feature_size"]),
        "nnssl_adaptation_plan": adaptation_plan(backbone, description["preprocessing"]),
        "citations": citations(description["method"]),
        "pretraining": description,
    }


def network_weights(weights: dict[str, Tensor], in_channels: int, feature_size: int) -> dict[str, Tensor]:
    """Our weights under nnU-Net's names; names of one layer share its tensor."""
    from models.backbones.resenc import nnunet_network  # takes seconds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of a decoder that was not trained: the same file every time
        network = nnunet_network(in_channels, 1, feature_size)
    network.load_state_dict({nnunet_name(name): value for name, value in weights.items()}, strict=False)
    return {name: value for name, value in network.state_dict().items() if TASK_LAYERS not in name}


def nnunet_name(name: str) -> str:
    """The name that nnU-Net gives to one of our weights."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name}: expected the name of a weight of {BACKBONE}, which starts with {', '.join(PREFIXES)}")


def adaptation_plan(backbone: dict, preprocessing: dict) -> dict:
    """The fields from which nnU-Net plans, builds and loads.

    Args:
        backbone: feature_size, in_channels.
        preprocessing: spacing_mm (D, H, W) or "native", which lets nnU-Net take the data set's; roi (D, H, W), voxels.
    """
    spacing, patch = preprocessing["spacing_mm"], [int(side) for side in preprocessing["roi"]]
    configuration = {
        "spacing": None if spacing == "native" else [float(length) for length in spacing],
        "patch_size": patch,
    }
    return {
        "architecture_plans": {
            "arch_class_name": ARCHITECTURE,
            "arch_kwargs": architecture_kwargs(backbone["feature_size"]),
            "arch_kwargs_requiring_import": list(KWARGS_TO_IMPORT),
        },
        "pretrain_plan": {"configurations": {"pretraining": configuration}},
        "pretrain_num_input_channels": backbone["in_channels"],
        "recommended_downstream_patchsize": patch,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,  # a convolutional network has no learnt positions
    }


def citations(method: str) -> list[dict]:
    """The papers behind network and method; a method without a paper of its own has no entry."""
    cited = [("Architecture", "ResEnc U-Net", RESENC_PAPER)]
    if method in PAPERS:
        cited.append(("Pretraining method", method, PAPERS[method]))
    return [{"type": kind, "name": name, "apa_citations": [paper]} for kind, name, paper in cited]

"""nnU-Net's residual encoder U-Net in plain values: what its plans say of the network. Needs no library of networks."""

NUM_BLOCKS = (1, 3, 4, 6, 6, 6)
NUM_STAGES = len(NUM_BLOCKS)
STRIDES = tuple(2**stage for stage in range(NUM_STAGES))
DECODER_STRIDES = STRIDES[-2::-1]
MOST_CHANNELS = 320
KWARGS_TO_IMPORT = ("conv_op", "norm_op", "dropout_op", "nonlin")


def architecture_kwargs(feature_size: int) -> dict:
    """Arguments of `ResidualEncoderUNet` as nnU-Net's plans hold them: plain values, classes as import paths.

    Those that depend on the task (input channels, classes, deep supervision) are not among them.
    """
    return {
        "n_stages": NUM_STAGES,
        "features_per_stage": [min(feature_size * stride, MOST_CHANNELS) for stride in STRIDES],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * NUM_STAGES,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (NUM_STAGES - 1),
        "n_blocks_per_stage": list(NUM_BLOCKS),
        "n_conv_per_stage_decoder": [1] * (NUM_STAGES - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }

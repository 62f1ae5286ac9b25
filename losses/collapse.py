"""Tells collapse from health by the monitors of `losses.distillation`: method section "Losses", "Watch for collapse".

Thresholds were found by making a network of three convolutions collapse on purpose (K = 128, 96 pairs of phantom crops
of 32 voxels a side, 8 pairs a step, 240 steps, AdamW at 1e-3). Ranges of the means over 30 steps, without the first 30;
entropy and KL as shares of log K:

    run                                          entropy        KL to uniform   feature_std   CASA: right - shuffled
    the default recipe                           0.968 - 0.991  0.001 - 0.03    0.46 - 0.63   0.06 to 0.32
    cls alone                                    0.856 - 0.974  0.005 - 0.05    0.51 - 0.76   -
    no centring, teacher at 0.01                 0.000          0.91 - 1.00     0.26 - 0.37   0.02 to 0.21
    no centring, teacher at 0.04 to 0.07         0.003 - 0.11   0.77 - 1.00     0.46 - 0.52   -
    the published choices at these settings      0.000 - 0.99   0.02 - 0.94     0.23 - 0.35   -
    teacher at 1 (no sharpening)                 1.000          0.000           0.18 - 0.32   -0.07 to 0.03
    one pair a step (its views share anatomy)    0.971 - 0.999  0.000 - 0.03    0.11 - 0.14   -
    no moving average, 5e-3                      0.19  - 0.99   0.03 - 0.54     0.0001-0.0006 -

`feature_std` depends on the backbone: of random weights and 16 views it is 0.73 for nnFormer, 0.29 for the U-Net, 0.09
for SwinUNETR, and 0.02 for SwinUNETR with a single pair; hence its low threshold.
"""

import math
from collections import Counter

ENTROPY_SHARE = 0.998
KL_SHARE = 0.8
FEATURE_STD = 0.01
CASA_GAP = 0.02
NUM_READINGS = 3


def collapse_warnings(values: dict[str, float], out_dim: int) -> list[str]:
    """What the monitors of one reading say.

    Args:
        values: means by name; monitors that are absent (objectives switched off) are not judged.
        out_dim: K, the width of the compared distributions.

    Returns:
        One line per kind of collapse; what stands before the colon names the kind. Empty when all is well.
    """
    warnings = []
    largest = math.log(out_dim)
    entropy, divergence = values.get("teacher_entropy"), values.get("teacher_kl_uniform")
    if entropy is not None and entropy > ENTROPY_SHARE * largest:
        warnings.append(
            f"collapse to uniform: teacher_entropy {entropy:.4f} is all but log {out_dim} = {largest:.4f}, every view "
            "looks alike; lower --teacher_temp, raise --batch_size, or take --centring sinkhorn"
        )
    if divergence is not None and divergence > KL_SHARE * largest:
        warnings.append(
            f"collapse to one output: teacher_kl_uniform {divergence:.3f} of at most {largest:.3f}, the teacher gives "
            "all views the same few outputs; raise --teacher_temp, lower --centre_momentum or --lr, or take --centring "
            "sinkhorn"
        )
    spread = values.get("feature_std")
    if spread is not None and spread < FEATURE_STD:
        warnings.append(
            f"collapse of features: feature_std {spread:.2g} (1 = spread over the sphere), pooled features of all "
            "views are the same; lower --lr, or raise --momentum_teacher or --batch_size"
        )
    right, shuffled = values.get("casa_cos_right"), values.get("casa_cos_shuffled")
    if right is not None and right - shuffled < CASA_GAP:
        warnings.append(
            f"CASA ignores the view: its answer agrees with the right view ({right:.3f}) no better than with another "
            f"({shuffled:.3f}); with --batch_size 1 that other view shows the same anatomy, and this says little"
        )
    return warnings


class CollapseWatch:
    """Says each kind once: when it has stood for `NUM_READINGS` readings in a row, and anew after it has gone."""

    def __init__(self, out_dim: int) -> None:
        self.out_dim = out_dim
        self.num_in_a_row: Counter[str] = Counter()

    def __call__(self, values: dict[str, float]) -> list[str]:
        """The warnings to be told at this reading; `values` and result as in `collapse_warnings`."""
        found = {warning.split(":")[0]: warning for warning in collapse_warnings(values, self.out_dim)}
        self.num_in_a_row = Counter({kind: self.num_in_a_row[kind] + 1 for kind in found})
        return [warning for kind, warning in found.items() if self.num_in_a_row[kind] == NUM_READINGS]

"""The random inputs of the golden data, drawn again from their seeds: a reduced set need not hold them.

`INPUTS[file][array]()` is the array of that file. Seeds and scales are those with which the numbers were computed once.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

Draw = Callable[[], np.ndarray]


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normally distributed numbers of standard deviation `scale`, float32."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal(shape).astype(np.float32) * np.float32(scale)


def positive(seed: int, *shape: int) -> np.ndarray:
    """Absolute values of normally distributed numbers."""
    return np.abs(normal(seed, *shape))


def related(first_seed: int, seed: int, *shape: int) -> np.ndarray:
    """Numbers correlated with `normal(first_seed)`, as a second view's features are with the first's."""
    return np.float32(0.7) * normal(first_seed, *shape) + np.float32(0.7) * normal(seed, *shape)


def directions(seed: int, *shape: int) -> np.ndarray:
    """Embeddings [1, C, D, H, W] of length 1 over channels."""
    values = normal(seed, *shape)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def matched_embedding() -> np.ndarray:
    """The key's fine embedding: random but for the vectors of two query voxels, which are to be found there."""
    query, key = directions(1, 1, 128, 12, 16, 16), directions(3, 1, 128, 11, 16, 16)
    key[0, :, 0, 0, 15] = query[0, :, 6, 8, 8]
    key[0, :, 10, 15, 15] = query[0, :, 1, 1, 1]
    return key


HEAD: dict[str, Draw] = {
    "cls_token": partial(normal, 11, 2, 384),
    "encoder": partial(normal, 12, 2, 384, 4, 4, 4),
    "decoder": partial(normal, 13, 2, 192, 8, 8, 8),
}

INPUTS: dict[str, dict[str, Draw]] = {
    "golden_sam.npz": {"input": partial(normal, 0, 1, 1, 32, 48, 48, scale=50)},
    "golden_match.npz": {
        "q_fine": partial(directions, 1, 1, 128, 12, 16, 16),
        "q_coarse": partial(directions, 2, 1, 128, 6, 2, 2),
        "k_fine": matched_embedding,
        "k_coarse": partial(directions, 4, 1, 128, 6, 2, 2),
    },
    "golden_casa.npz": {
        "query": partial(normal, 1, 2, 8, 512),
        "kv_student": partial(normal, 2, 2, 64, 512),
        "kv_teacher": partial(normal, 3, 2, 64, 512),
    },
    "golden_head_student.npz": HEAD,
    "golden_head_teacher.npz": HEAD,
    "golden_loss.npz": {
        "img0": partial(positive, 21, 1, 1, 32, 32, 32),
        "img1": partial(positive, 22, 1, 1, 32, 32, 32),
        "student_cls": partial(normal, 31, 2, 512, scale=0.3),
        "student_rec": partial(normal, 34, 2, 1, 32, 32, 32, scale=0.5),
        "teacher_cls": partial(normal, 41, 2, 512, scale=0.05),
        "feat_student": partial(normal, 51, 2, 64, 512, scale=0.3),
        "feat_teacher": partial(normal, 52, 2, 64, 512, scale=0.05),
        "center_in": partial(normal, 61, 1, 512, scale=0.02),
        "center2_in": partial(normal, 62, 1, 1, 512, scale=0.02),
    },
    "golden_voco.npz": {"P_in": partial(normal, 101, 33, 24), "P_full_in": partial(normal, 102, 22, 1152)},
    "golden_simsiam_dino.npz": {
        "ss_x1": partial(normal, 801, 3, 8, 768),
        "ss_x2": partial(related, 801, 802, 3, 8, 768),
        "dino_x1": partial(normal, 803, 4, 4, 768),
        "dino_x2": partial(related, 803, 804, 4, 4, 768),
    },
}

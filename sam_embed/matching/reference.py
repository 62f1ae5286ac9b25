"""A labelled volume, from which labels are carried to others."""

from dataclasses import dataclass

import numpy as np

from sam_embed.embeddings.embedding_store import Embedding


@dataclass(frozen=True, eq=False)
class Reference:
    """A labelled volume.

    Attributes:
        embedding: of the volume, by the same weights as the scan's.
        labels: integers, 0 or more, [D, H, W]; 0 is background.
        affine: [4, 4], index (d, h, w) in `labels` -> world mm; the grid need not be the embedding's.
    """

    embedding: Embedding
    labels: np.ndarray
    affine: np.ndarray

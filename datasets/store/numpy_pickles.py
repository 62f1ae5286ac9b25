"""What may be read from PyTorch files beside tensors without running code: numpy's arrays and numbers."""

import numpy as np


def numpy_globals() -> list:
    """What `torch.load` must know to read numpy arrays and numbers, under the names of numpy 1 and 2.

    For `torch.serialization.safe_globals`: checkpoints of other projects hold a best score or a learning rate as such.
    """
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    named = [
        (function, f"{core}.multiarray.{name}")
        for core in ("numpy.core", "numpy._core")
        for name, function in (("_reconstruct", reconstruct), ("scalar", scalar))
    ]
    return [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"}, *named]

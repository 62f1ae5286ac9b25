"""Memory that a CPU step frees stays with the process, instead of going back to the kernel page by page.

glibc maps every large block anew and unmaps it when it is freed, so that each step of training faults all pages of its
activations in again. With both thresholds raised, blocks are reused. Measured by `python -m benchmarks.pretrain_step`.
"""

import ctypes
import os
import platform

THRESHOLD_BYTES = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Raise glibc's mmap and trim thresholds of this process to 1 GiB; it cannot be undone.

    Nothing happens with other C libraries, or where the user has set the allocator by `SET_BY_USER`.

    Returns:
        Whether the thresholds were raised.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in SET_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES) and mallopt(M_TRIM_THRESHOLD, THRESHOLD_BYTES))

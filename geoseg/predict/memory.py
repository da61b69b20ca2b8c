"""A worker's memory stays flat: what is freed between windows goes back to the system."""

from __future__ import annotations

import ctypes
import os

_MMAP_THRESHOLD = -3  # a parameter of glibc's mallopt(3)
_LARGEST_ON_HEAP = 2 << 20
_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def give_back_at_once() -> bool:
    """Let glibc's malloc map arrays from 2 MiB on by themselves, for all of this process, and unmap them when freed.

    Left alone, it takes arrays of up to 32 MiB from its heaps once one has been freed, a heap for each thread; blocks that
    are kept lie between arrays that come and go, and peaks creep up with the number of windows. Whether it was done: not
    with another C library, nor where the environment sets thresholds itself.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP))

"""A worker's memory stays flat: what is freed between windows goes back to the system."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_FREE = 4 << 20
_LARGEST_ON_HEAP = 32 << 20
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_little_free() -> bool:
    """Let glibc's malloc keep at most 4 MiB free at the end of each thread's heap, for all of this process.

    Left alone, it raises that to twice the largest array below 32 MiB that was ever freed, and peaks creep up with the
    number of windows. Arrays up to 32 MiB stay on the heap, since fresh pages cost: mapping those from 2 MiB on by
    themselves keeps memory flatter still, but made a run 20 % slower. Whether it was done: not with another C library,
    nor where the environment sets these thresholds itself.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP) and mallopt(_TRIM_THRESHOLD, _KEPT_FREE)
    )

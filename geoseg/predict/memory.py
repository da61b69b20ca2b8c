"""A worker's memory stays flat, and fresh pages come cheap."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_FREE = 4 << 20
_LARGEST_ON_HEAP = 4 << 20
_MOST_IN_WINDOW = 1900 << 20
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def set_memory_up() -> bool:
    """Give what is freed between windows back to the system, and take tensors in huge pages; for all of this process.

    glibc's malloc keeps at most 4 MiB free at the end of each thread's heap and takes larger arrays from the system one
    by one. Left alone, it raises both limits up to the largest array below 32 MiB that was ever freed, and peaks creep
    up with the number of windows. Pages fresh from the system cost a fault each, so torch is told to ask for pages of
    2 MiB; it listens when this comes before its first tensor.

    Whether it was done: not with another C library, nor where the environment sets these thresholds itself.
    """
    os.environ.setdefault(_HUGE_PAGES, "1")
    if any(name in os.environ for name in _USERS_OWN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP) and mallopt(_TRIM_THRESHOLD, _KEPT_FREE)
    )


def window_bytes() -> int:
    """What a network may hold of a window: a fourth of each core's share of the machine's memory, 1.9 GiB at most."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_MOST_IN_WINDOW, memory // (4 * (os.cpu_count() or 1)))

"""What a worker frees goes back to the system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

MIB = 2**20
PROGRAM = """
import sys
import numpy as np
from geoseg.predict.memory import keep_little_free

def resident():
    pages = open("/proc/self/statm").read().split()[1]
    return int(pages) * 4096

if "keep" in sys.argv:
    assert keep_little_free()
np.ones(31 << 20, np.uint8)  # freed: from now on malloc takes arrays up to this size from its heap
before = resident()
many = [np.ones(2900 << 10, np.uint8) for _ in range(20)]
del many
print(resident() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def kept_bytes(*arguments: str) -> int:
    """Resident bytes that a process of its own has not given back after freeing 57 MiB."""
    out = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return int(out.stdout)


@glibc
def test_freed_arrays_go_back_to_the_system() -> None:
    assert kept_bytes() > 40 * MIB, "malloc itself gives back what it freed here; the function is not needed any more"
    assert kept_bytes("keep") < 8 * MIB


@glibc
def test_the_users_own_thresholds_stay() -> None:
    program = "from geoseg.predict.memory import keep_little_free; print(keep_little_free())"
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "1000000"}
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert out.stdout.strip() == "False"

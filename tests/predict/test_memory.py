"""What a worker frees goes back to the system, and what it takes comes in large pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
PROGRAM = """
import sys
import numpy as np
from geoseg.predict.memory import set_memory_up

def resident():
    pages = open("/proc/self/statm").read().split()[1]
    return int(pages) * 4096

if "keep" in sys.argv:
    assert set_memory_up()
np.ones(31 << 20, np.uint8)  # freed: from now on malloc takes arrays up to this size from its heap
before = resident()
many = [np.ones(2900 << 10, np.uint8) for _ in range(20)]
del many
print(resident() - before)
"""

FAULTS = """
import resource
import sys
from geoseg.predict.memory import set_memory_up

if "keep" in sys.argv:
    set_memory_up()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
torch.ones(64 << 18)
print(faults() - before)
"""
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def told(program: str, *arguments: str, **environment: str) -> str:
    """What a program says that runs in a process of its own."""
    environment = {**{name: value for name, value in os.environ.items() if "THP" not in name}, **environment}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.strip()


@glibc
def test_freed_arrays_go_back_to_the_system() -> None:
    """57 MiB are freed."""
    assert int(told(PROGRAM)) > 40 * MIB, "malloc itself gives back what it freed; the function is not needed any more"
    assert int(told(PROGRAM, "keep")) < 8 * MIB


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(),
    reason="this system gives large pages always or never",
)
def test_tensors_come_in_large_pages() -> None:
    """64 MiB are 16,384 pages of 4 KiB, or 32 large ones."""
    assert int(told(FAULTS)) > 16_000
    assert int(told(FAULTS, "keep")) < 1_600


@glibc
def test_the_users_own_thresholds_stay() -> None:
    program = "from geoseg.predict.memory import set_memory_up; print(set_memory_up())"
    assert told(program, MALLOC_TRIM_THRESHOLD_="1000000") == "False"

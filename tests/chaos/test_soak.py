"""A worker that has seen thousands of windows holds what it held after the first thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
WINDOWS, WARM = 5000, 1000
# A leaked window would be 786,000 a thousand, a leaked kilobyte 1,000. Resident memory has the free parts of malloc's arenas too,
# one for each thread; how full they are when memory is counted is chance.
MOST_ALLOCATED, MOST_RESIDENT = 500, 3000


def soak(folder: Path, num: int) -> list[dict[str, int]]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "kit.soak", str(folder), str(num)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_memory_and_descriptors_stay_flat(tmp_path: Path, figure: Callable[..., None]) -> None:
    told = soak(tmp_path, WINDOWS)
    assert told[-1]["windows"] == WINDOWS
    warm = [one for one in told if one["windows"] >= WARM]
    flat = []
    for what, named, most in (("allocated_kb", "allocated", MOST_ALLOCATED), ("kb", "resident", MOST_RESIDENT)):
        slope, _ = np.polyfit([one["windows"] / 1000 for one in warm], [one[what] for one in warm], 1)
        print([one[what] for one in told])
        figure(
            "R18",
            f"slope of {named} memory over {WINDOWS:,} windows after the first {WARM:,}, kB per 1,000",
            round(float(slope)),
            goal=f"< {most}",
        )
        flat.append(slope < most)
    for what in ("descriptors", "threads"):
        figure(
            "R18",
            f"open {what}, least and most",
            f"{min(one[what] for one in warm)} to {max(one[what] for one in warm)}",
        )
    assert all(flat)
    for what in ("descriptors", "threads"):
        assert max(one[what] for one in warm) < min(one[what] for one in warm) + 10, (
            "pools may fill; a leak has hundreds"
        )

"""What the benchmarks of whole runs stand on: costs of processes, and windows that come together to a mask."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from benchmarks.ways import place, windows
from kit.measured import run_measured

_WORK = "import time\nkept = b'1' * (80 << 20)\nwhile time.process_time() < 0.5: pass"
_WAITS = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {!r}])\nprint('done')"
_LEAVES = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {!r}])\ntime.sleep(1)\nprint('done')"


@pytest.mark.parametrize("program", [_WAITS, _LEAVES], ids=["waits for it", "leaves it behind"])
def test_what_a_program_starts_counts_as_its_own(program: str) -> None:
    told, cost = run_measured([sys.executable, "-c", program.format(_WORK)], environment=os.environ)
    assert told == "done\n"
    assert cost.cpu_s > 0.4
    assert cost.peak_bytes > 80 << 20


def test_a_program_that_fails_is_no_measurement() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], environment=os.environ)


@pytest.mark.parametrize("shape", [(1024, 960), (700, 512), (513, 959)])
def test_windows_come_together_without_the_pixels_near_their_sides(shape: tuple[int, int]) -> None:
    truth_hw = np.random.default_rng(0).integers(0, 3, shape, np.uint8)
    mask_hw = np.full(shape, 255, np.uint8)
    for row, col in windows(shape, 512, 64):
        seen_hw = np.full((512, 512), 9, np.uint8)
        top, left = 32 * (row > 0), 32 * (col > 0)
        bottom, right = 512 - 32 * (row + 512 < shape[0]), 512 - 32 * (col + 512 < shape[1])
        seen_hw[top:bottom, left:right] = truth_hw[row + top : row + bottom, col + left : col + right]
        place(mask_hw, seen_hw, row, col, trim=32)
    np.testing.assert_array_equal(mask_hw, truth_hw)


def test_a_window_that_reaches_beyond_the_scene_gives_what_lies_inside() -> None:
    mask_hw = np.zeros((100, 100), np.uint8)
    place(mask_hw, np.arange(60 * 60).reshape(60, 60) % 251, -20, 70, trim=5)
    np.testing.assert_array_equal(mask_hw[:35, 75:], (np.arange(60 * 60).reshape(60, 60) % 251)[20:55, 5:30])
    assert not mask_hw[35:].any()
    assert not mask_hw[:, :75].any()

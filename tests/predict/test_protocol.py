"""A model check of what runs do to an output: thousands of interleavings of geoseg's own code, with faults at every store call.

A failure names its seed; ``interleave(given, SEED)`` plays it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from kit.protocol import Given, given_runs, interleave, interleave_all

PROCESSES = 2


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    with given_runs(tmp_path_factory.mktemp("protocol")) as made:
        yield made


def test_runs_that_meet_leave_what_one_would(given: Given) -> None:
    told = [interleave(given, seed) for seed in range(200)]
    assert len({one.trace for one in told}) == len(told)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_so_they_do_in_ten_thousand_interleavings(tmp_path: Path, figure: Callable[..., None]) -> None:
    shares = [range(1000 + share, 13_000, PROCESSES) for share in range(PROCESSES)]
    folders = [tmp_path / str(share) for share in range(PROCESSES)]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        told = [one for share in pool.map(interleave_all, folders, shares) for one in share]
    different = len({one.trace for one in told})
    figure("R7", "interleavings of runs in the model check, no two alike", different, goal=">= 10,000")
    assert different >= 10_000

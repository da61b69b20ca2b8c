"""A model check of what runs do to an output: thousands of interleavings of geoseg's own code, with faults at every store call.

A failure names its seed; ``interleave(given, SEED)`` plays it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from kit.protocol import Given, given_runs, interleave, interleave_all, strike_everywhere

PROCESSES = 2


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    with given_runs(tmp_path_factory.mktemp("protocol")) as made:
        yield made


def test_runs_that_meet_leave_what_one_would(given: Given) -> None:
    told = [interleave(given, seed) for seed in range(100)]
    assert len({one.trace for one in told}) >= 95, "no two alike, or hardly any"


def test_a_run_that_is_struck_anywhere_harms_no_later_one(given: Given) -> None:
    assert len(strike_everywhere(given, step=12, begin=5)) >= 80


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_so_they_do_in_ten_thousand_interleavings(tmp_path: Path, figure: Callable[..., None]) -> None:
    shares = [range(1000 + share, 12_000, PROCESSES) for share in range(PROCESSES)]
    folders = [tmp_path / str(share) for share in range(PROCESSES)]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        told = [one for share in pool.map(interleave_all, folders, shares) for one in share]
    different = len({one.trace for one in told})
    figure(
        "R7",
        "interleavings of runs in the model check, no two alike, none that breaks a promise",
        different,
        goal=">= 10,000",
    )
    figure("R7", "store calls in those, each with the output looked at after it", sum(one.num_calls for one in told))
    assert different >= 10_000


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_no_request_or_answer_is_a_bad_moment_to_be_struck(given: Given, figure: Callable[..., None]) -> None:
    num = len(strike_everywhere(given, step=1))
    figure("R4", "requests and answers at which a run was killed, or paused until others had done its work", num)
    figure(
        "R4",
        "items of later runs that it replaced, files it changed, results that differ from a calm run's",
        0,
        goal="0",
    )
    assert num >= 900

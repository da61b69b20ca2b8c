"""Jobs of one scene dealt to tasks all over the cluster: what is too much for the process that publishes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import ray

from geoseg.errors import GeosegError
from geoseg.raster.splice import SpliceError

_RETRIES = 2
_PER_NODE = 2  # each holds a piece and what it is made from, and mostly waits for the store
_CPUS = 0.01  # as it waits, it fits beside device actors that have taken nearly all


def deal_to_tasks(step: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """What ``step`` makes of each job, in order; a few jobs for each node are under way at a time, and no more are made.

    A job whose process ends is tried again elsewhere. Raises what a job raised of geoseg's errors, and SpliceError when it
    ends its process every time; the others are given up then.
    """
    nodes = len([node for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
    task = ray.remote(_do).options(num_cpus=_CPUS, max_retries=_RETRIES, scheduling_strategy="SPREAD")
    waiting: deque[Any] = deque()
    try:
        for job in jobs:
            waiting.append(task.remote(step, job))
            if len(waiting) >= max(2, _PER_NODE * nodes):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for reference in waiting:
            with suppress(ray.exceptions.RayError):
                ray.cancel(reference)


def _do(step: Callable[[Any], Any], job: Any) -> Any:
    return step(job)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, GeosegError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        told = str(error).splitlines()[0]
        raise SpliceError(f"putting it together ended the process of a step: {told}; run again to try it") from error

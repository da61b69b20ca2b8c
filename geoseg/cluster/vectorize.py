"""Trace on Ray: the windows of masks are dealt to tasks, and what these found comes back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from geoseg.cluster.resources import plan_workers
from geoseg.cluster.session import session
from geoseg.config import ClusterConfig
from geoseg.predict.failure import Failure
from geoseg.vectorizing import Part, Target, trace_part

_IN_FLIGHT = 2  # windows for each worker
_RETRIES = 2


def trace_on_cluster(targets: Sequence[Target], *, cluster: ClusterConfig) -> Iterator[tuple[int, Part | Failure]]:
    """The parts of target after target, with its place, as ``trace_locally`` has them.

    A window whose process ends is tried again, then its target is given up.
    """
    with session(cluster.address, workers=cluster.workers or 1):
        workers = plan_workers(cluster)
        at_once = cluster.workers or workers.read_tasks
        task = ray.remote(trace_part).options(num_cpus=min(1.0, max(0.1, workers.cpus)), max_retries=_RETRIES)
        waiting: deque[tuple[int, Any]] = deque()
        given_up: set[int] = set()
        for place, target in enumerate(targets):
            shared = ray.put(target)
            for piece in target.pieces():
                if place in given_up:
                    break
                waiting.append((place, task.remote(shared, piece)))
                while len(waiting) >= _IN_FLIGHT * at_once:
                    yield from _next(waiting, targets, given_up)
        while waiting:
            yield from _next(waiting, targets, given_up)


def _next(
    waiting: deque[tuple[int, Any]], targets: Sequence[Target], given_up: set[int]
) -> Iterator[tuple[int, Part | Failure]]:
    """The oldest part that was asked for; of a target that was given up the first failure alone."""
    place, reference = waiting.popleft()
    if place in given_up:
        ray.cancel(reference)
        return
    try:
        part = ray.get(reference)
    except ray.exceptions.RayError as error:
        told = str(error).splitlines()[0]
        part = Failure(sentence=f"{targets[place].name}: tracing it ended the process it ran in: {told}")
    if isinstance(part, Failure):
        given_up.add(place)
    yield place, part

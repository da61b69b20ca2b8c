"""How many workers, and what each takes of a node."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from geoseg.config import ClusterConfig

_MAX_PUBLISHERS = 8
_NEARLY = 0.97  # so that actors that start again on fewer nodes never fill one
_ROWS_ON_CPU, _ROWS_ON_GPU = 4, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Device actors: how many, Ray's CPUs and GPUs for each, threads of the network in each, and read tasks at once.

    ``rows_per_block``: the fewest windows that a worker is handed together; few where each takes long, so that the last spread.
    """

    num: int
    cpus: float
    gpus: float
    threads: int
    read_tasks: int
    publishers: int
    rows_per_block: int


def plan_workers(cluster: ClusterConfig) -> Workers:
    """A worker for each GPU, or without GPUs one for each core; ``cluster.workers`` and ``cluster.gpus`` overrule.

    With a thread each, no worker waits for a thread that another process holds up, and one reads while another computes;
    fewer workers take less memory. Device actors never take all CPUs: planning and reading would wait for ever.
    """
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = len([node for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
    cpus, gpus = there.get("CPU", 1.0), int(there.get("GPU", 0))
    read_tasks, publishers = max(1, int(cpus) - 1), min(nodes, _MAX_PUBLISHERS)
    if cluster.gpus or gpus:
        num, per_worker, threads, rows = cluster.workers or gpus, 0.0, 1, _ROWS_ON_GPU
        gpu_share = cluster.gpus or min(1.0, gpus / num)
        if cluster.gpus:  # the cluster is to grow to them
            read_tasks = max(read_tasks, num)
    else:
        cores = (os.cpu_count() or 1) if nodes == 1 else max(1, int(cpus))
        num, gpu_share, rows = cluster.workers or max(1, min(cores, int(cpus))), 0.0, _ROWS_ON_CPU
        per_worker = _NEARLY * min(1.0, max(0.1, int(10 * max(cpus - 1, 0.5) / num) / 10))
        threads = max(1, cores // num)
    return Workers(
        num=num,
        cpus=per_worker,
        gpus=gpu_share,
        threads=threads,
        read_tasks=read_tasks,
        publishers=publishers,
        rows_per_block=rows,
    )

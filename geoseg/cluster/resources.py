"""How many workers, and what each takes of a node."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from geoseg.config import ClusterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Device actors: how many, Ray's CPUs and GPUs for each, threads of the network in each, and read tasks at once."""

    num: int
    cpus: float
    gpus: float
    threads: int
    read_tasks: int


def plan_workers(cluster: ClusterConfig) -> Workers:
    """A worker for each GPU, or without GPUs one for each two cores; ``cluster.workers`` overrules.

    Device actors never take all CPUs: planning, reading and publishing would wait for ever.
    """
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = there.get("CPU", 1.0), int(there.get("GPU", 0))
    if gpus:
        num = cluster.workers or gpus
        return Workers(num=num, cpus=0, gpus=min(1.0, gpus / num), threads=1, read_tasks=max(1, int(cpus) - 1))
    nodes = len([node for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
    cores = (os.cpu_count() or 1) if nodes == 1 else max(1, int(cpus))
    num = cluster.workers or max(1, cores // 2)
    share = int(10 * max(cpus - 1, 0.5) / num) / 10
    return Workers(
        num=num, cpus=min(1.0, max(0.1, share)), gpus=0, threads=max(1, cores // num), read_tasks=max(1, int(cpus) - 1)
    )

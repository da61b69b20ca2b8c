"""Train on Ray: chips -> steps on each worker, gradients averaged -> checkpoints and bundles; and on again after a loss."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from geoseg.cluster.chips import STAGE, ChipData, feed_from_ray
from geoseg.cluster.driver import last_line
from geoseg.errors import ConfigError, GeosegError, StopError, StoreError, stop_error
from geoseg.train.chips import TrainScene
from geoseg.train.feed import feed_from_threads
from geoseg.train.index import CellTable
from geoseg.train.job import TrainClusterConfig
from geoseg.train.loop import Group
from geoseg.train.plan import TrainPlan
from geoseg.training import Prepared, Tell, train_share, try_to_keep_table

_POLL_S = 0.2
_AHEAD = 256
_RESIZE_S = 60.0  # between looks whether an elastic group could grow
# Ray notices that a node is gone after up to 20 s, and until then waits so many seconds for as many workers as before.
_START_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")


def keep_tables_on_cluster(
    kept: Sequence[tuple[str, TrainScene]], resolution_m: float, num_classes: int
) -> list[CellTable | str]:
    """The chip indexes of scenes, each counted in a task of its own."""
    count = ray.remote(try_to_keep_table).options(max_retries=3)
    waiting: list[Any] = []
    tables: list[CellTable | str] = []
    for one in kept:
        waiting.append(count.remote(one, resolution_m, num_classes))
        if len(waiting) >= _AHEAD:
            tables.append(ray.get(waiting.pop(0)))
    return tables + list(ray.get(waiting))


def train_on_cluster(prepared: Prepared, cluster: TrainClusterConfig, tell: Tell, *, can_grow: bool = True) -> None:
    """Train with Ray Train within a Ray session; ``tell`` hears in this process how it goes.

    ``can_grow``: whether Ray may get more nodes than it has.

    A lost worker is replaced and training goes on from the last checkpoint, as it does when an elastic group grows or shrinks.
    Raises StopError kinds, StoreError.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    is_elastic = isinstance(cluster.workers, tuple)
    read_themselves = is_elastic and not gpus  # the group takes every CPU, and read tasks would wait for one for ever
    waits = find_room(cluster, cpus=cpus, gpus=gpus, read_themselves=read_themselves, can_grow=can_grow)
    if waits:
        tell("warned", waits)
    if is_elastic:
        os.environ.setdefault(*_START_TIMEOUT)
    desk = ray.remote(_Desk).options(num_cpus=0, scheduling_strategy=_here()).remote()
    folder = tempfile.mkdtemp(prefix="geoseg-train-")
    trainer = TorchTrainer(
        _train,
        train_loop_config={
            "prepared": [ray.put(prepared)],
            "desk": desk,
            "feed": partial(feed_from_threads, threads=cluster.read_threads) if read_themselves else feed_from_ray,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=cluster.workers,  # type: ignore[arg-type]
            use_gpu=gpus > 0,
            resources_per_worker={"GPU": 1} if gpus else {"CPU": 1},
            elastic_resize_monitor_interval_s=_RESIZE_S,
        ),
        run_config=RunConfig(
            name="geoseg",
            storage_path=folder,  # what Ray notes of a run; we go on from our own checkpoints
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
        **({} if read_themselves else _chips(prepared.plan, cluster)),
    )
    failure: BaseException | None = None
    with _listening(desk, tell) as hear, _quiet():
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 (Ray has many; what it was about is told below)
            failure = error
        ended = hear()
    shutil.rmtree(folder, ignore_errors=True)
    if ended is not None:
        kind, sentence = ended
        raise StoreError(sentence) if kind == StoreError.__name__ else stop_error(kind, sentence)
    if failure is not None:
        raise StopError(
            f"training on Ray failed: {last_line(failure)}; the same command goes on from the last checkpoint"
        )


def find_room(cluster: TrainClusterConfig, *, cpus: int, gpus: int, read_themselves: bool, can_grow: bool) -> str:
    """What the workers will wait for in a Ray of so many CPUs and GPUs, as a sentence; "" when there is room for them.

    A cluster that can grow adds nodes for workers that wait for GPUs. Raises ConfigError where they would wait for ever.
    """
    least = cluster.least_workers
    if not gpus and least + (not read_themselves) > cpus:
        readers = "" if read_themselves else " and one to read chips"
        raise ConfigError(
            f"{least} workers want a CPU each{readers}, and Ray has {cpus}; take fewer workers, or add nodes"
        )
    if not gpus or least <= gpus:
        return ""
    told = f"{least} workers want a GPU each, and Ray has {gpus}"
    if not can_grow:
        raise ConfigError(f"{told} on this machine; take fewer workers, or the address of a larger cluster")
    return f"{told}: training begins when nodes with the others have come; take fewer workers if none are to come"


def _here() -> NodeAffinitySchedulingStrategy:
    """Keeps an actor on this process's node: any other may go."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _chips(plan: TrainPlan, cluster: TrainClusterConfig) -> dict[str, Any]:
    """What a trainer wants to be told of the chips that Ray Data reads."""
    return {
        "datasets": {f"{STAGE}{number}": _nothing for number in range(len(plan.stages))},
        "dataset_config": ChipData([ray.put(plan)], read_cpus=cluster.read_cpus),
    }


def _nothing() -> Any:
    """Stands in for a stage's chips, which ``ChipData`` makes when it knows the workers."""
    return ray.data.range(1)


def _train(config: dict[str, Any]) -> None:
    """What each worker runs. An error that concerns the job as a whole is told, and ends all workers without another try.

    It may be one worker's alone, as when the store denies the first one its checkpoint; the others then wait for what that one
    has to add. So it is raised as well: Ray ends the group, and those that replace it find that training has ended.
    """
    context = ray.train.get_context()
    desk = config["desk"]
    if ray.get(desk.has_ended.remote()):
        return
    prepared: Prepared = ray.get(config["prepared"][0])
    group = Group(context.get_world_rank(), context.get_world_size())
    cuda = torch.cuda.is_available() and ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))

    def tell(kind: str, what: Any) -> None:
        desk.put.remote(kind, what)

    try:
        train_share(prepared, config["feed"], tell, group=group, device="cuda" if cuda else "cpu")
    except StopError as error:
        ray.get(desk.put.remote("ended", (type(error).__name__, str(error))))
        raise
    except GeosegError as error:
        desk.put.remote("warned", f"{error}; trying again from the last checkpoint")
        raise


class _Desk:
    """Holds what workers tell until the driver takes it."""

    def __init__(self) -> None:
        self._told: list[tuple[str, Any]] = []
        self._ended = False

    def put(self, kind: str, what: Any) -> None:
        """Take something in."""
        self._told.append((kind, what))
        self._ended = self._ended or kind == "ended"

    def has_ended(self) -> bool:
        """Whether a worker told that it is of no use to go on."""
        return self._ended

    def take(self) -> list[tuple[str, Any]]:
        """All that came since the last time."""
        told, self._told = self._told, []
        return told


@contextlib.contextmanager
def _listening(desk: Any, tell: Tell) -> Iterator[Any]:
    """Pass on what comes to the desk; yields a function that ends this and gives the error that a worker told, if any."""
    done = threading.Event()
    ended: list[tuple[str, str]] = []

    def pass_on() -> None:
        for kind, what in ray.get(desk.take.remote()):
            if kind == "ended":
                ended.append(what)
            else:
                tell(kind, what)

    def listen() -> None:
        try:
            while not done.wait(_POLL_S):
                pass_on()
        except GeosegError as error:  # this run must end: Ray ends its own when it is interrupted
            ended.append((type(error).__name__, str(error)))
            signal.raise_signal(signal.SIGINT)

    listener = threading.Thread(target=listen, name="desk", daemon=True)
    listener.start()

    def hear() -> tuple[str, str] | None:
        done.set()
        listener.join()
        if not ended:
            pass_on()
        return ended[0] if ended else None

    try:
        yield hear
    finally:
        done.set()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Train's own lines are left out; geoseg tells how it goes."""
    loggers = [logging.getLogger(name) for name in ("ray.train", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Predict on Ray: scenes -> windows -> (pixels ->) masks in parts -> published scenes, one streaming chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from geoseg.cluster.driver import Driver
from geoseg.cluster.metrics import SceneMeter
from geoseg.cluster.operators import PredictWindows, read_windows
from geoseg.cluster.resources import Workers, plan_workers
from geoseg.cluster.resting import forget
from geoseg.cluster.rows import PlannedScenes, Sizes, list_scene_windows
from geoseg.cluster.session import session, settings
from geoseg.config import ClusterConfig
from geoseg.predict.drain import Drain
from geoseg.predict.ledger import Ledger
from geoseg.predict.plan import RunSpec
from geoseg.predict.turns import Turn

_RETRIES = 1
_MOST_IN_SHARE = 16  # times the least: a minute's work of a CPU
# Ray Data does not replace a worker that may not restart any more, so some must be to spare; but a worker that cannot so
# much as start must come to an end.
_RESTARTS = 32
# They mostly wait, and fit beside device actors that have crowded onto the nodes that are left. Were they alike, Ray would
# fuse them.
_PLANNING_CPUS, _LISTING_CPUS = 0.01, 0.02


def predict_on_cluster(
    turns: Sequence[Turn],
    run: RunSpec,
    ledger: Ledger,
    *,
    cluster: ClusterConfig,
    run_id: str,
    check: Callable[[], None],
    drain: Drain,
) -> None:
    """Predict and publish scenes with Ray; ``check`` is called now and then and may end the run.

    ``run_id`` is the label of the run in the metrics. No window is begun after ``drain`` asks. What came of the scenes is in
    the ledger. The objects are those of ``predict_locally``, byte for byte. Raises StopError kinds alone.
    """
    with session(cluster.address, workers=cluster.workers or 1):
        drain.listen()
        workers = plan_workers(cluster)
        ledger.progress.held_by_workers(gpus=workers.num * workers.gpus, cpus=workers.num * max(workers.cpus, 1.0))
        meter = SceneMeter(run_id)
        driver = Driver(run, ledger, check, drain=drain, publishers=workers.publishers, meter=meter, run_id=run_id)
        for left in ledger.rounds(turns):
            alone = ledger.is_last_round
            with settings(cluster):
                driver.follow(window_outcomes(left, run, cluster, workers, run_id=run_id, alone=alone))
            if drain.asked:
                forget(run_id)
                break
        meter.settled(ledger.reports)


def window_outcomes(
    turns: Sequence[Turn], run: RunSpec, cluster: ClusterConfig, workers: Workers, *, run_id: str, alone: bool
) -> Dataset:
    """The chain: turns of scenes go in, an ``Outcome`` comes out for what was planned and for some windows that ended.

    A task that ends its process twice is given up with the windows it has; ``alone`` gives each scene and each window
    that is still to do a task of its own, so that what ends a process takes nothing else along.
    """
    least, at_once = (1, 1) if alone else (workers.rows_per_block, 2)
    sizes = Sizes(least=least, most=1 if alone else _MOST_IN_SHARE * least, workers=workers.num)
    source = PlannedScenes(turns, run, alone=alone)
    scenes: Dataset = ray.data.read_datasource(
        source,
        override_num_blocks=source.num_tasks,
        concurrency=workers.read_tasks,
        ray_remote_args={"max_retries": _RETRIES, "num_cpus": _PLANNING_CPUS},
    )
    rows: Dataset = scenes.map_batches(
        partial(list_scene_windows, run=run, sizes=sizes, only_todo=alone),
        batch_size=source.scenes_per_listing,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(workers.read_tasks),
        num_cpus=_LISTING_CPUS,
        max_retries=_RETRIES,
    )
    if cluster.read == "tasks":
        rows = rows.map_batches(
            partial(read_windows, run=run),
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(workers.read_tasks),
            max_retries=_RETRIES,
        )
    outcomes: Dataset = rows.map_batches(
        PredictWindows,
        fn_constructor_args=(run, run_id, cluster.read_threads, workers.threads, least),
        batch_size=least if cluster.read == "tasks" else 1,  # a row holds a window with its pixels, or a share
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers.num, max_tasks_in_flight_per_actor=at_once),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        max_restarts=_RESTARTS,
        max_task_retries=_RETRIES,
    )
    return outcomes

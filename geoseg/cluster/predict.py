"""Predict on Ray: scenes -> windows -> (pixels ->) masks in parts -> published scenes, one streaming chain."""

from __future__ import annotations

from collections.abc import Callable

import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from geoseg.cluster.driver import Driver
from geoseg.cluster.operators import PredictWindows, read_windows
from geoseg.cluster.resources import Workers, plan_workers
from geoseg.cluster.rows import SceneWindows
from geoseg.cluster.session import session, settings
from geoseg.config import ClusterConfig
from geoseg.predict.ledger import Ledger
from geoseg.predict.plan import RunSpec
from geoseg.predict.progress import Progress
from geoseg.raster.scene import SceneRef


def predict_on_cluster(
    refs: list[SceneRef], run: RunSpec, cluster: ClusterConfig, progress: Progress, *, check: Callable[[], None]
) -> Ledger:
    """Predict and publish scenes with Ray; ``check`` is called now and then and may end the run.

    The objects are those of ``predict_locally``, byte for byte. Raises StopError kinds alone.
    """
    with session(cluster):
        workers = plan_workers(cluster)
        with settings(cluster, rows_per_block=workers.rows_per_block):
            driver = Driver(run, progress, check, publishers=workers.publishers)
            return driver.follow(window_outcomes(refs, run, cluster, workers), refs)


def window_outcomes(refs: list[SceneRef], run: RunSpec, cluster: ClusterConfig, workers: Workers) -> Dataset:
    """The chain: scenes go in, a row comes out for each scene that was planned and each window that ended."""
    rows: Dataset = ray.data.read_datasource(SceneWindows(refs, run, rows_per_block=workers.rows_per_block))
    if cluster.read == "tasks":
        rows = rows.map_batches(
            read_windows,
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(workers.read_tasks),
            max_retries=2,
        )
    outcomes: Dataset = rows.map_batches(
        PredictWindows,
        fn_constructor_args=(run, cluster.read_threads, workers.threads),
        batch_size=workers.rows_per_block,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=workers.num,
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=2,  # the next block is read while the network is at this one
            enable_true_multi_threading=True,
        ),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        max_restarts=cluster.max_restarts,  # Ray's default is for ever, also for a window that kills its worker
        max_task_retries=2,
    )
    return outcomes

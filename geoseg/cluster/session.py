"""A connection to Ray: one that is there, one by address, or a private one on this machine that ends with the run."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.data import DataContext, ExecutionResources

from geoseg.config import ClusterConfig
from geoseg.errors import StopError

_OBJECT_STORE_BYTES = 1 << 30
_SPARE_CPUS = 2


@contextmanager
def session(address: str | None, *, workers: int, spare_cpus: int = _SPARE_CPUS) -> Iterator[bool]:
    """Ray is up within the block: the one at ``address``, or without one that of ``RAY_ADDRESS`` or a private one.

    Yields whether it can get more nodes, as a private one cannot. A private one gets its own folder, no dashboard, and
    ``spare_cpus`` beside those for workers and cores, for reading.

    Raises StopError when the address does not answer.
    """
    if ray.is_initialized():
        yield True
        return
    address = address or os.environ.get("RAY_ADDRESS")
    folder = None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if address and address != "local":
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            os.environ.setdefault(
                "RAY_BACKEND_LOG_LEVEL", "fatal"
            )  # else a line of Ray's for each actor, on the terminal
            folder = tempfile.mkdtemp(prefix="geoseg-ray-")
            cores = os.cpu_count() or 1
            with _without_greeting():
                ray.init(
                    address="local",
                    num_cpus=max(cores, workers) + spare_cpus,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    _temp_dir=folder,
                )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise StopError(
            f"Ray at {address or 'this machine'} did not start or answer: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield folder is None
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_greeting() -> Iterator[None]:
    """Ray's native code greets on stderr while it starts; it is shown only when the start fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def settings(cluster: ClusterConfig) -> Iterator[None]:
    """Ray Data's settings for the block, put back afterwards.

    Each row is a block of its own, so that a worker is handed what was meant to go together; the object store has a ceiling.
    However many blocks are given up because they end their workers, the job goes on: the ledger knows what is missing.
    """
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=cluster.object_store_mib << 20
    )
    context.max_errored_blocks = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # progress and outcomes are told by geoseg
    try:
        with DataContext.current(context), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*ray_remote_args.*"
            )  # the one way to cap restarts until Ray 2.64
            warnings.filterwarnings(
                "ignore", message=".*number of concurrent (tasks|actors).*"
            )  # few scenes are no fault
            yield
    finally:
        logger.setLevel(level)

"""Ray within a test process: one session that tests share, or one of a module's own in its place."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import ray

_SETTINGS = {"address": "local", "num_cpus": 6, "object_store_memory": 256 << 20}


def share_ray() -> None:
    """Start a private Ray unless one runs in this process; it stays until the process ends, or a module wants one of its own."""
    if not ray.is_initialized():
        _start()


@contextlib.contextmanager
def own_ray(**settings: Any) -> Iterator[None]:
    """A private Ray, started with these settings beside ours, in place of whichever runs, for the length of the block."""
    ray.shutdown()
    folder = _start(**settings)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def no_ray() -> Iterator[None]:
    """None runs when the block begins, nor after it."""
    ray.shutdown()
    try:
        yield
    finally:
        ray.shutdown()


def _start(**settings: Any) -> str:
    folder = tempfile.mkdtemp(prefix="geoseg-test-ray-", dir="/tmp")  # short: Ray's sockets lie below it
    ray.init(**{**_SETTINGS, **settings}, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    return folder

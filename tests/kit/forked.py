"""Processes forked from one that has imported geoseg and done nothing, so that a start takes no seconds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[1]
CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")


def start(target: Callable[..., None], *args: Any, daemon: bool = False, **environment: str) -> ForkServerProcess:
    """Start ``target(*args)`` with the environment of this moment, and these variables.

    The process it is forked from has that of the first test that wanted one, and with it the way to that one's bucket.
    """
    CONTEXT.set_forkserver_preload(["geoseg.nightly", "geoseg.catalogue", "geoseg.predict.local"])
    process = CONTEXT.Process(target=_begin, args=({**os.environ, **environment}, target, args), daemon=daemon)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(_TESTS), str(_TESTS.parent), before or ""]
    )  # for what is imported once
    try:
        process.start()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return process


def _begin(environment: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)

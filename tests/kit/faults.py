"""Faults in the processes of Ray's workers: a hook of theirs wraps steps of geoseg's, a file says where to die."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = "GEOSEG_TEST_FAULTS"


def runtime_env(file: Path) -> dict[str, Any]:
    """What ``ray.init`` takes to have the steps wrapped; ``file`` says where to die, and may change from run to run."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return {
        "worker_process_setup_hook": f"{__name__}.{install.__name__}",
        "env_vars": {FILE: str(file), "PYTHONPATH": path},
    }


def install() -> None:
    """Wrap the steps; called in each worker's process before its first task."""
    import geoseg.cluster.rows
    from geoseg.predict import ledger, publish, reading

    _wrap(ledger, "plan_scene", "plan", lambda ref, *_: ref.id)
    _wrap(publish, "make_item", "publish", lambda _, plan, **__: plan.scene.id)
    _wrap(
        reading.WindowReader, "_read", "read",
        lambda _, task: f"{task.plan.scene.id}/{task.window.row_off}/{task.window.col_off}",
    )  # fmt: skip
    listing = geoseg.cluster.rows.list_scene_windows

    def list_scene_windows(*args: Any, **settings: Any) -> Iterator[Any]:
        for count, table in enumerate(listing(*args, **settings)):
            if count == 6:
                _die_while_work_is_under_way()
            yield table

    geoseg.cluster.rows.list_scene_windows = list_scene_windows


def _asked() -> dict[str, Any]:
    return json.loads(Path(os.environ[FILE]).read_text())


def _wrap(owner: Any, name: str, step: str, place: Callable[..., str]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **settings: Any) -> Any:
        if place(*args, **settings) in _asked().get(step, ()):
            os._exit(1)
        return original(*args, **settings)

    setattr(owner, name, wrapped)


def _die_while_work_is_under_way() -> None:
    """Once, when some parts of the windows told so far are made."""
    parts = _asked().get("list once, with parts in")
    if parts is None or Path(parts, "died").exists():
        return
    deadline = time.monotonic() + 60
    while sum(1 for _ in Path(parts).rglob("r*c*")) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    Path(parts, "died").touch()
    os._exit(1)

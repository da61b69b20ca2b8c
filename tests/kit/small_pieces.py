"""Small pieces in the processes of Ray's workers, so that small scenes are put together as large ones are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

PIECE_BYTES = 8000
NOTES = "GEOSEG_TEST_PIECES"


def runtime_env(notes: Path) -> dict[str, Any]:
    """What ``ray.init`` takes for it; who writes a piece leaves a file in ``notes``, ``task`` or ``actor``."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return {
        "worker_process_setup_hook": f"{__name__}.{install.__name__}",
        "env_vars": {NOTES: str(notes), "PYTHONPATH": path},
    }


def install() -> None:
    """Make pieces small and note who writes them; called in each worker's process before its first task."""
    from geoseg.raster import cog, upload

    cog.PIECE_BYTES = PIECE_BYTES
    write = upload.Upload.write

    def noted(*args: Any) -> str:
        Path(os.environ[NOTES], "actor" if ray.get_runtime_context().get_actor_id() else "task").touch()
        return write(*args)

    upload.Upload.write = noted

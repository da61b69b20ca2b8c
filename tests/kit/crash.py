"""Processes that run a command of geoseg's and die where they are told to, as by a power cut: ``GEOSEG_CRASH_AT=step:n``.

A step is a call by which something changes in the store, before or after it: ``before put item``, ``after delete part``; so is
the end of a lease. The process ends itself by SIGKILL at the n-th pass of that step. Where GEOSEG_TEST_NOTES names a folder, each
process appends a line for each window that it has computed, and stored, and for each step that it has passed to a file there.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from kit import forked

CRASH_AT, NOTES, PIECE_BYTES = "GEOSEG_CRASH_AT", "GEOSEG_TEST_NOTES", "GEOSEG_TEST_PIECE_BYTES"
MADE, WINDOW, STEP = "made", "window", "step"
_TESTS = Path(__file__).resolve().parents[1]
_KINDS = (
    ("lease", r"_geoseg/lease\.json"),
    ("marker", r"_geoseg/parts/.*/upload-[^/]*"),
    ("part", r"_geoseg/parts/.*"),
    ("bundle", r"_geoseg/bundles/.*"),
    ("index", r"_geoseg/index\.json\.gz"),
    ("record", r"_geoseg/runs/.*\.json"),
    ("page", r"_geoseg/runs/.*\.html"),
    ("collection", r"collection\.json"),
    ("items", r"items\.parquet"),
    ("item", r"[^/]+/item\.json"),
    ("asset", r"[^/]+/[^/]+\.(?:tif|png)"),
)
_REQUESTS = {
    "CreateMultipartUpload": "begin upload",
    "UploadPart": "piece",
    "CompleteMultipartUpload": "complete upload",
    "AbortMultipartUpload": "give up upload",
}
_lock, _passed = threading.Lock(), Counter[str]()


def kind_of(key: str) -> str:
    """What an object of an output is, by the end of its key; "other" for what no protocol knows."""
    return next((kind for kind, pattern in _KINDS if re.search(rf"(?:^|/){pattern}$", key)), "other")


def install() -> None:
    """Wrap the steps of this process; of Ray's workers this is the ``worker_process_setup_hook``."""
    import obstore
    from botocore.client import BaseClient

    from geoseg.predict.lease import Lease
    from geoseg.predict.worker import Worker
    from geoseg.raster import cog

    cog.PIECE_BYTES = int(os.environ.get(PIECE_BYTES, cog.PIECE_BYTES))
    for name in ("put", "delete"):
        _wrap(obstore, name, lambda _, key, *__, _name=name, **___: f"{_name} {kind_of(key)}")
    _wrap(BaseClient, "_make_api_call", lambda _, operation, *__: _REQUESTS.get(operation, ""))
    _wrap(Lease, "__exit__", lambda *_: "release lease")
    write_part = Worker._write_part

    def noted(self: Worker, task: Any, *args: Any) -> int:
        about = f"{task.plan.scene.id} {task.window.row_off} {task.window.col_off}"
        _note(MADE, about)
        valid_pixels = write_part(self, task, *args)
        _note(WINDOW, about)
        return valid_pixels

    Worker._write_part = noted  # type: ignore[method-assign]


def _wrap(owner: Any, name: str, step: Callable[..., str]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **settings: Any) -> Any:
        about = step(*args, **settings)
        _pass(f"before {about}" if about else "")
        told = original(*args, **settings)
        _pass(f"after {about}" if about else "")
        return told

    setattr(owner, name, wrapped)


def _pass(step: str) -> None:
    if not step:
        return
    with _lock:
        _passed[step] += 1
        if os.environ.get(CRASH_AT) == f"{step}:{_passed[step]}":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the lock held: no other thread gets any further
        _note(STEP, step)


def _note(kind: str, what: str) -> None:
    if NOTES in os.environ:
        with Path(os.environ[NOTES], str(os.getpid())).open("a") as lines:
            lines.write(f"{kind}\t{what}\n")


def noted(folder: Path, kind: str) -> list[str]:
    """What the processes of a run have noted of a kind; a line that a process died over does not count."""
    texts = [file.read_text() for file in sorted(folder.iterdir())]
    lines = [line.partition("\t") for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [what.rstrip("\n") for found, _, what in lines if found == kind]


def ray_runtime_env(notes: Path) -> dict[str, Any]:
    """What ``ray.init`` takes for workers that note what they compute."""
    path = os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {
        "worker_process_setup_hook": f"{__name__}.{install.__name__}",
        "env_vars": {NOTES: str(notes), "PYTHONPATH": path},
    }


def start(arguments: Sequence[str], log: Path, **environment: str) -> ForkServerProcess:
    """Begin ``geoseg ARGUMENTS`` in a process group of its own with the steps wrapped; what it prints goes to ``log``."""
    return forked.start(_work, list(arguments), str(log), **environment)


def _work(arguments: list[str], log: str) -> None:
    os.setsid()
    with Path(log).open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    from geoseg.cli import main

    torch.set_num_threads(1)
    install()
    main(arguments)


if __name__ == "__main__":
    install()
    from geoseg.cli import main as geoseg_main

    geoseg_main(sys.argv[1:])

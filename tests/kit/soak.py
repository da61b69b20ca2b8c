"""One worker over thousands of windows, as an actor has them: ``python -m kit.soak FOLDER NUM`` tells what it holds meanwhile.

Nine windows in ten are scenes of their own, the others are of large ones, so that scenes are opened and left behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch

from geoseg.config import load_job
from geoseg.predict.ledger import PlannedWindows, prepare_windows
from geoseg.predict.memory import set_memory_up
from geoseg.predict.plan import RunSpec
from geoseg.predict.reading import Task
from geoseg.predict.worker import Worker
from geoseg.raster.scene import SceneRef
from geoseg.run import make_run_spec
from kit.big import write_repeated
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene

EVERY = 250
_LARGE_SIDE, _LARGE_EVERY = 4096, 10
_KINDS = 16


def tasks(run: RunSpec, folder: Path, num: int) -> Iterator[Task]:
    """Windows of scenes that are made as they come, and planned."""
    large: Iterator[Task] = iter(())
    made = [write_scene(folder / f"kind-{kind}.tif", noise(3, 60 + kind, 50, seed=kind)) for kind in range(_KINDS)]
    for number, kind in zip(range(num), cycle(made), strict=False):
        if number % _LARGE_EVERY:
            path = folder / f"s{number}.tif"
            path.write_bytes(kind.read_bytes())
            yield from _windows(run, path)
            continue
        window = next(large, None)
        if window is None:
            path = write_repeated(folder / f"large-{number}.tif", noise(3, 512, 512, seed=number), _LARGE_SIDE)
            large = _windows(run, path)
            window = next(large)
        yield window


def _windows(run: RunSpec, path: Path) -> Iterator[Task]:
    found = prepare_windows(SceneRef(path.stem, str(path)), run, only_todo=False)
    assert isinstance(found, PlannedWindows), found
    return (Task(found.plan, window) for window in found.each)


class _Mallinfo(ctypes.Structure):
    """What glibc's ``mallinfo2`` gives, in bytes over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def held() -> dict[str, int]:
    """What this process holds: memory in kB, resident and as allocated (without what malloc keeps free), descriptors, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    now = mallinfo()
    return {
        "kb": pages * os.sysconf("SC_PAGE_SIZE") >> 10,
        "allocated_kb": (now.uordblks + now.hblkhd) >> 10,
        "descriptors": len([*Path("/proc/self/fd").iterdir()]),
        "threads": len([*Path("/proc/self/task").iterdir()]),
    }


def main(folder: Path, num: int) -> None:
    """Print a line of JSON for every so many windows."""
    set_memory_up()
    torch.set_num_threads(1)
    values = {"scenes": [str(folder)], "out": str(folder / "out"), "bundle": str(seeded_bundle(folder / "bundle"))}
    run = make_run_spec(load_job(None, {**values, "predict": {"window": 512}}))
    worker = Worker(run)
    for number, done in enumerate(worker.run(islice(tasks(run, folder, num), num)), 1):
        assert done.failure is None, done.failure
        if number % EVERY == 0:
            print(json.dumps({"windows": number, **held()}), flush=True)
    worker.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

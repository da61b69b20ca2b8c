"""The operators of the chain: thin shells around ``predict``'s steps, batches of rows in, batches of rows out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from geoseg.cluster.deal import deal_to_tasks
from geoseg.cluster.metrics import WindowMeter
from geoseg.cluster.resting import RestSign
from geoseg.cluster.rows import DESCRIPTOR, OUTCOME, ended, outcome_row, pack_pixels, task_of, unpack_pixels
from geoseg.predict.failure import Failure
from geoseg.predict.plan import RunSpec, plan_from_json
from geoseg.predict.publish import HeldBack, Published, try_to_publish
from geoseg.predict.reading import Task, WindowPixels, WindowReader

_PIXELS = pa.schema([*DESCRIPTOR, ("pixels", pa.large_binary())])


@lru_cache(maxsize=1)
def _reader(run: RunSpec) -> WindowReader:
    """One for each process, so that scenes stay open from task to task."""
    return WindowReader(run)


def read_windows(table: pa.Table, run: RunSpec) -> pa.Table:
    """Split mode: descriptors in, the same with pixels out; they travel through the object store to the device."""
    rows = []
    for row in table.to_pylist():
        told: dict[str, Any] = {**row, "pixels": b""}
        if row["kind"] == "window":
            read = _reader(run).read(task_of(row))
            if isinstance(read, WindowPixels):
                told["pixels"] = pack_pixels(read)
            else:
                told |= ended(read)
        rows.append(told)
    return pa.Table.from_pylist(rows, schema=_PIXELS)


class PredictWindows:
    """A device actor: the network is loaded once, then batches of window rows become parts in the store."""

    def __init__(self, run: RunSpec, run_id: str, read_threads: int, threads: int) -> None:
        import torch

        from geoseg.predict.memory import set_memory_up
        from geoseg.predict.worker import Worker

        set_memory_up()
        torch.set_num_threads(threads)
        self._worker = Worker(run, read_threads=read_threads)
        self._ready_at = time.time()
        self._meter = WindowMeter(run_id)
        self._rest = RestSign(run_id)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Descriptors (or, in split mode, pixels) in, outcomes out; "left" is that of a window that was not begun."""
        rows = table.to_pylist()
        settled = [row for row in rows if row["kind"] != "window" or row["error"] or row["skipped"]]
        outcomes = [outcome_row(row, None, self._ready_at) for row in settled]
        todo = [row for row in rows if row["kind"] == "window" and not row["error"] and not row["skipped"]]
        by_task = {task_of(row): row for row in todo}
        begun: list[Task] = []
        pixels = (unpack_pixels(row["pixels"]) for row in todo) if "pixels" in table.column_names else None
        for done in self._worker.run(self._begin(by_task, begun), pixels):
            outcomes.append(outcome_row(by_task[done.task], done, self._ready_at))
            self._meter.window(done)
        left = [{**by_task[task], "kind": "left"} for task in by_task.keys() - set(begun)]
        outcomes += [outcome_row(row, None, self._ready_at) for row in left]
        self._meter.waited(self._worker.waited_s)
        return pa.Table.from_pylist(outcomes, schema=OUTCOME)

    def _begin(self, tasks: Iterable[Task], begun: list[Task]) -> Iterator[Task]:
        for task in tasks:
            if self._rest.is_up():
                return
            begun.append(task)
            yield task


class Publisher:
    """Publishes scenes; it stands from the start of a run, so that the first scene does not wait for its imports.

    Of a scene that is large it sees what its blocks are, not the blocks.
    """

    def __init__(self, run: RunSpec) -> None:
        self._run = run

    def publish(self, plan_json: str) -> Published | HeldBack | Failure:
        """What was published, or why nothing was."""
        return try_to_publish(self._run, plan_from_json(plan_json), deal_to_tasks)

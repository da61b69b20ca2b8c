"""The operators of the chain: thin shells around ``predict``'s steps, batches of rows in, batches of rows out."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch
from ray.util.metrics import Counter

from geoseg.cluster.rows import DESCRIPTOR, OUTCOME, outcome_row, pack_pixels, task_of, unpack_pixels
from geoseg.errors import GeosegError, StopError
from geoseg.predict.plan import RunSpec, plan_from_json
from geoseg.predict.publish import Published, publish_scene
from geoseg.predict.worker import WindowDone, WindowReader, Worker

_PIXELS = pa.schema([*DESCRIPTOR, ("pixels", pa.large_binary())])


@lru_cache(maxsize=1)
def _reader() -> WindowReader:
    """One for each process, so that scenes stay open from task to task."""
    return WindowReader()


def read_windows(table: pa.Table) -> pa.Table:
    """Split mode: descriptors in, the same with pixels out; they travel through the object store to the device."""
    rows = []
    for row in table.to_pylist():
        told: dict[str, Any] = {**row, "pixels": b""}
        if row["kind"] == "window":
            try:
                told["pixels"] = pack_pixels(_reader().read(task_of(row)))
            except (GeosegError, MemoryError) as error:
                told["error"] = str(error) or f"{row['scene_id']}: out of memory while reading"
                told["stop"] = type(error).__name__ if isinstance(error, StopError) else ""
        rows.append(told)
    return pa.Table.from_pylist(rows, schema=_PIXELS)


class PredictWindows:
    """A device actor: the network is loaded once, then batches of window rows become parts in the store."""

    def __init__(self, run: RunSpec, read_threads: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._worker = Worker(run, read_threads=read_threads)
        self._ready_at = time.time()
        self._windows = Counter("geoseg_windows", "Write windows ended, by outcome", tag_keys=("outcome",))
        self._pixels = Counter("geoseg_pixels", "Valid pixels predicted")
        self._seconds = Counter("geoseg_seconds", "Seconds spent, by step", tag_keys=("step",))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Descriptors (or, in split mode, pixels) in, outcomes out."""
        rows = table.to_pylist()
        settled = [row for row in rows if row["kind"] != "window" or row["error"]]
        outcomes = [outcome_row(row, None, self._ready_at) for row in settled]
        todo = [row for row in rows if row["kind"] == "window" and not row["error"]]
        by_task = {task_of(row): row for row in todo}
        pixels = [unpack_pixels(row["pixels"]) for row in todo] if "pixels" in table.column_names else None
        for done in self._worker.run(list(by_task), pixels):
            outcomes.append(outcome_row(by_task[done.task], done, self._ready_at))
            self._count(done)
        return pa.Table.from_pylist(outcomes, schema=OUTCOME)

    def _count(self, done: WindowDone) -> None:
        self._windows.inc(1, {"outcome": "failed" if done.error else "done"})
        if done.valid_pixels:
            self._pixels.inc(done.valid_pixels)
        for step, seconds in (("read", done.read_s), ("predict", done.predict_s), ("write", done.write_s)):
            if seconds > 0:
                self._seconds.inc(seconds, {"step": step})


class Publisher:
    """Publishes scenes; it stands from the start of a run, so that the first scene does not wait for its imports."""

    def __init__(self, run: RunSpec) -> None:
        self._run = run

    def publish(self, plan_json: str) -> tuple[Published | None, str, str]:
        """What was published, or a sentence, and the kind of error that stops the job."""
        try:
            return publish_scene(self._run, plan_from_json(plan_json)), "", ""
        except GeosegError as error:
            return None, str(error), type(error).__name__ if isinstance(error, StopError) else ""

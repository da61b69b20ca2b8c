"""The operators of the chain: thin shells around ``predict``'s steps, batches of rows in, batches of rows out."""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import takewhile

import pyarrow as pa

from geoseg.cluster.deal import deal_to_tasks
from geoseg.cluster.metrics import WindowMeter
from geoseg.cluster.resting import RestSign
from geoseg.cluster.rows import ROW, Outcome, Share, WindowEnded, ended, pack, pack_pixels, unpack, unpack_pixels
from geoseg.predict.failure import Failure
from geoseg.predict.plan import RunSpec, plan_from_json
from geoseg.predict.publish import HeldBack, Published, try_to_publish
from geoseg.predict.reading import Task, WindowPixels, WindowReader
from geoseg.raster.window import Window

_Key = tuple[str, Window]
_PIXELS = pa.schema([*ROW, ("pixels", pa.large_binary()), ("ended", pa.binary())])


@lru_cache(maxsize=1)
def _reader(run: RunSpec) -> WindowReader:
    """One for each process, so that scenes stay open from task to task."""
    return WindowReader(run)


def read_windows(table: pa.Table, run: RunSpec) -> Iterator[pa.Table]:
    """Split mode: shares in, a row for each window with its pixels out, which travel through the object store to the device."""
    for share in map(unpack, table["packed"].to_pylist()):
        if share.opened:
            yield _with_pixels(Share(share.opened), b"", b"")
        for (place, window), task in zip(share.windows, share.tasks(), strict=True):
            read = _reader(run).read(task)
            alone = Share((), (share.plans[place],), ((0, window),))
            if isinstance(read, WindowPixels):
                yield _with_pixels(alone, pack_pixels(read), b"")
            else:
                yield _with_pixels(alone, b"", pickle.dumps(ended(task, read)))


def _with_pixels(share: Share, pixels: bytes, told: bytes) -> pa.Table:
    return pa.table({"packed": [pickle.dumps(share)], "pixels": [pixels], "ended": [told]}, schema=_PIXELS)


class PredictWindows:
    """A device actor: the network is loaded once, then shares of the work become parts in the store."""

    def __init__(self, run: RunSpec, run_id: str, read_threads: int, threads: int, told_together: int) -> None:
        import torch

        from geoseg.predict.memory import set_memory_up
        from geoseg.predict.worker import Worker

        set_memory_up()
        torch.set_num_threads(threads)
        self._worker = Worker(run, read_threads=read_threads)
        self._ready_at = time.time()
        self._meter = WindowMeter(run_id)
        self._rest = RestSign(run_id)
        self._told_together = told_together

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Shares (or, in split mode, windows with pixels) in, outcomes out, while others are still at work.

        A share gives as many rows, each of the same windows, whenever it is worked on: Ray drops from the second try as many
        rows as came of the first.
        """
        shares: list[Share] = [unpack(one) for one in table["packed"].to_pylist()]
        opened = tuple(one for share in shares for one in share.opened)
        if opened:
            yield pack(Outcome(self._ready_at, opened))
        tasks = [task for share in shares for task in share.tasks()]
        told = [unpack(one) for one in table["ended"].to_pylist() if one] if "ended" in table.column_names else []
        done: dict[_Key, WindowEnded] = {(one.scene_id, one.window): one for one in told}
        todo = [task for task in tasks if _key(task) not in done]
        pixels = None
        if "pixels" in table.column_names:
            pixels = (unpack_pixels(one) for one in table["pixels"].to_pylist() if one)
        parts = deque(tasks[at : at + self._told_together] for at in range(0, len(tasks), self._told_together))
        for ending in self._worker.run(self._begin(todo), pixels):
            done[_key(ending.task)] = ended(ending.task, ending)
            self._meter.window(ending)
            while parts and all(_key(task) in done for task in parts[0]):
                yield self._outcome(parts.popleft(), done)
        self._meter.waited(self._worker.waited_s)
        for part in parts:
            yield self._outcome(part, done)

    def _outcome(self, tasks: list[Task], done: dict[_Key, WindowEnded]) -> pa.Table:
        told = tuple(done.get(_key(task)) or ended(task, None) for task in tasks)
        return pack(Outcome(self._ready_at, windows=told))

    def _begin(self, tasks: Iterable[Task]) -> Iterator[Task]:
        return takewhile(lambda _: not self._rest.is_up(), tasks)


def _key(task: Task) -> _Key:
    return task.plan.scene.id, task.window


class Publisher:
    """Publishes scenes; it stands from the start of a run, so that the first scene does not wait for its imports.

    Of a scene that is large it sees what its blocks are, not the blocks.
    """

    def __init__(self, run: RunSpec) -> None:
        self._run = run

    def publish(self, plan_json: str) -> Published | HeldBack | Failure:
        """What was published, or why nothing was."""
        return try_to_publish(self._run, plan_from_json(plan_json), deal_to_tasks)

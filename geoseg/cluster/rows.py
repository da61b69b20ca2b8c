"""Rows between the operators: shares of the work, and what came of them, packed; pixels only in split mode."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from geoseg.predict.failure import Failure
from geoseg.predict.ledger import PlannedWindows, SceneReport, list_windows, prepare_scene
from geoseg.predict.plan import RunSpec, plan_from_json
from geoseg.predict.reading import Task, WindowDone, WindowPixels
from geoseg.predict.turns import Turn
from geoseg.raster.raster import Raster
from geoseg.raster.window import Window

_SMALL_WINDOW = 1024
_BYTES_PER_ROW = 3000
_SCENES_PER_TASK, _FEW_SCENES = 32, 256
_SCENES_PER_LISTING = 8
ROW = pa.schema([("packed", pa.binary())])


@dataclass(frozen=True, slots=True)
class Opened:
    """A turn of a scene, and what planning found: a plan as JSON, a report when there is nothing to do, or a failure.

    ``num_windows`` are those of the whole scene.
    """

    turn: Turn
    found: str | SceneReport | Failure
    num_windows: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What a worker is handed together: scenes that are opened, and windows, each with the place of its plan (JSON)."""

    opened: tuple[Opened, ...] = ()
    plans: tuple[str, ...] = ()
    windows: tuple[tuple[int, Window], ...] = ()

    def with_windows(self, windows: Iterable[Window]) -> Share:
        """The share with windows of its last plan besides."""
        place = len(self.plans) - 1
        return replace(self, windows=(*self.windows, *((place, window) for window in windows)))

    def tasks(self) -> list[Task]:
        """The windows with their plans."""
        return [Task(plan_from_json(self.plans[place]), window) for place, window in self.windows]


@dataclass(frozen=True, slots=True)
class WindowEnded:
    """How a window ended, as the driver wants to know it; ``left``: it was not begun, since the run is to end."""

    scene_id: str
    window: Window
    failure: Failure | None = None
    skipped: bool = False
    left: bool = False
    area_km2: float = 0.0
    bytes_fetched: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a share, or of a part of it. ``ready_at``: when its worker's network stood (seconds since 1970)."""

    ready_at: float
    opened: tuple[Opened, ...] = ()
    windows: tuple[WindowEnded, ...] = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many windows make a share: ``most`` at the most, fewer towards the end of a scene, and seldom less than ``least``.

    Windows that one worker reads share their borders, and a row costs Ray some milliseconds, so a share is to be large; but the
    last ones are to end at the same time, so each is at most half of what is left for each of ``workers``.
    """

    least: int
    most: int
    workers: int

    def of(self, window: int) -> Sizes:
        """The same for windows of this side: what is said is meant for small ones, and twice the side takes four times as long.

        Half as many then, so that one is still read while another is computed.
        """
        fewer = max(1, (window // _SMALL_WINDOW) ** 2 // 2)
        return replace(self, least=max(1, self.least // fewer), most=max(1, self.most // fewer))

    def next(self, left: int) -> int:
        """The size of the next share when ``left`` windows are left: a power of two times ``least``, as squares of windows are."""
        size = self.least
        while 2 * size <= min(self.most, left // (2 * self.workers)):
            size *= 2
        return size


def pack(told: Share | Outcome | Opened) -> pa.Table:
    """A row."""
    return pa.table({"packed": [pickle.dumps(told)]}, schema=ROW)


def unpack(packed: bytes) -> Any:
    """What a row holds; it comes from a process of this run, as all that Ray hands from one to the other."""
    return pickle.loads(packed)  # noqa: S301


class PlannedScenes(Datasource):
    """A row for each turn of a scene, planned in read tasks on the cluster, in order: no plan waits in the driver.

    Ray runs a task again whose process or node was lost, and drops of its blocks as many as came before; so a task must
    give as many rows the second time, whatever was published meanwhile. Planning sees what was published, but gives one
    row in any case; the windows of a planned scene, many rows, are told by tasks of their own and follow from the plan.
    """

    def __init__(self, turns: Sequence[Turn], run: RunSpec, *, alone: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._turns, self._run = turns, run
        self._is_few = alone or len(turns) < _FEW_SCENES
        self._per_task = 1 if self._is_few else _SCENES_PER_TASK
        self.num_tasks = -(-len(turns) // self._per_task)
        self.scenes_per_listing = 1 if self._is_few else _SCENES_PER_LISTING

    def estimate_inmemory_data_size(self) -> int | None:
        """A guess for Ray's planner; rows are small and stream."""
        return len(self._turns) * _BYTES_PER_ROW

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A read task for some of the turns each, for each turn when they are few or ``alone``; cheap, as Ray wants."""
        del parallelism, data_context
        tasks = []
        for first in range(0, len(self._turns), self._per_task):
            share = self._turns[first : first + self._per_task]
            size = len(share) * _BYTES_PER_ROW
            metadata = BlockMetadata(num_rows=len(share), size_bytes=size, input_files=None, exec_stats=None)
            read = partial(_plan, share, self._run)
            tasks.append(ReadTask(read, metadata, schema=ROW, per_task_row_limit=per_task_row_limit))
        return tasks


def _plan(turns: Sequence[Turn], run: RunSpec) -> Iterator[pa.Table]:
    for turn in turns:
        found = prepare_scene(turn.ref, run)
        yield pack(Opened(turn, found if isinstance(found, (SceneReport, Failure)) else found.to_json()))


def list_scene_windows(table: pa.Table, run: RunSpec, *, sizes: Sizes, only_todo: bool) -> Iterator[pa.Table]:
    """Planned scenes in; out come shares that open them and deal out the windows of these turns.

    Small scenes come together in a share, unless a share is to hold one window alone.
    """
    waiting = Share()
    for opened in map(unpack, table["packed"].to_pylist()):
        windows = list_windows(run, plan_from_json(opened.found), only_todo=only_todo) if _is_plan(opened) else None
        if not isinstance(windows, PlannedWindows):
            told = replace(opened, found=windows or opened.found)
            waiting = replace(waiting, opened=(*waiting.opened, told))
            continue
        waiting = Share(
            (*waiting.opened, replace(opened, num_windows=windows.num)),
            (*waiting.plans, opened.found),
            waiting.windows,
        )
        if sizes.most == 1:
            yield pack(waiting)
            waiting = Share(plans=waiting.plans)
        each, left = opened.turn.share(windows.each, windows.num), opened.turn.num_windows(windows.num)
        here = sizes.of(windows.plan.window)
        while len(waiting.windows) + left >= here.least:
            room = max(0, here.next(len(waiting.windows) + left) - len(waiting.windows))
            yield pack(waiting.with_windows(islice(each, room)))
            left, waiting = left - room, Share(plans=(opened.found,))
        waiting = waiting.with_windows(each)
    if waiting.opened or waiting.windows:
        yield pack(waiting)


def _is_plan(opened: Opened) -> bool:
    return isinstance(opened.found, str)


def ended(task: Task, done: WindowDone | None) -> WindowEnded:
    """What the driver is told of a window; None of one that was not begun."""
    scene_id, window = task.plan.scene.id, task.window
    if done is None:
        return WindowEnded(scene_id, window, left=True)
    return WindowEnded(
        scene_id,
        window,
        done.failure,
        done.skipped,
        area_km2=done.area_km2,
        bytes_fetched=done.bytes_fetched,
    )


def pack_pixels(read: WindowPixels) -> bytes:
    """What was read for a window, as bytes for a row of split mode."""
    rasters = [raster for raster in (read.around, read.coarse) if raster is not None]
    told = {
        "rasters": [[list(one.pixels.shape), one.pixels.dtype.str, list(one.valid.shape)] for one in rasters],
        "valid": list(read.valid.shape),
        "bytes_fetched": read.bytes_fetched,
        "seconds": read.seconds,
    }
    head = json.dumps(told).encode()
    parts = [len(head).to_bytes(4, "little"), head, np.packbits(read.valid).tobytes()]
    for one in rasters:
        parts += [np.packbits(one.valid).tobytes(), np.ascontiguousarray(one.pixels).tobytes()]
    return b"".join(parts)


def unpack_pixels(data: bytes) -> WindowPixels:
    """The inverse of ``pack_pixels``."""
    at = 4 + int.from_bytes(data[:4], "little")
    told = json.loads(data[4:at])
    valid, at = _unpack_bits(data, at, told["valid"])
    rasters: list[Raster | None] = []
    for shape, dtype, valid_shape in told["rasters"]:
        raster_valid, at = _unpack_bits(data, at, valid_shape)
        pixels = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
        at += pixels.nbytes
        rasters.append(Raster(pixels, raster_valid))
    around, coarse = [*rasters, None, None][:2]
    return WindowPixels(around, valid, told["bytes_fetched"], told["seconds"], coarse)


def _unpack_bits(data: bytes, at: int, shape: list[int]) -> tuple[Any, int]:
    count = math.prod(shape)
    end = at + -(-count // 8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8, end - at, at), count=count)
    return bits.astype(np.bool_).reshape(shape), end

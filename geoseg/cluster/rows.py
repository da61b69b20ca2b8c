"""Rows between the operators: descriptors and outcomes with fixed columns and dtypes; pixels only in split mode."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
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
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import Window

BYTES_PER_ROW = 3000
_SCENES_PER_TASK, _FEW_SCENES = 32, 256

DESCRIPTOR = pa.schema(
    [
        ("kind", pa.string()),  # "scene" opens or settles a scene, "window" is one write window
        ("scene_id", pa.string()),
        ("scene_uri", pa.string()),
        ("plan", pa.string()),
        ("report", pa.string()),
        ("error", pa.string()),
        ("stop", pa.string()),
        ("again", pa.bool_()),
        ("denied", pa.bool_()),
        ("skipped", pa.bool_()),
        ("turn", pa.int64()),
        ("num_turns", pa.int64()),
        ("num_windows", pa.int64()),
        ("col_off", pa.int64()),
        ("row_off", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
    ]
)
OUTCOME = pa.schema(
    [
        *DESCRIPTOR,
        ("valid_pixels", pa.int64()),
        ("bytes_fetched", pa.int64()),
        ("area_km2", pa.float64()),
        ("ready_at", pa.float64()),
    ]
)

_BLANKS = {pa.string(): "", pa.bool_(): False, pa.int64(): 0}
_BLANK: dict[str, Any] = {field.name: _BLANKS[field.type] for field in DESCRIPTOR}


class PlannedScenes(Datasource):
    """A row for each turn of a scene, planned in read tasks on the cluster, in order: no plan waits in the driver.

    Ray runs a task again whose process or node was lost, and drops of its blocks as many as came before; so a task must
    give as many rows the second time, whatever was published meanwhile. Planning sees what was published, but gives one
    row in any case; the windows of a planned scene, many rows, are told by tasks of their own and follow from the plan.
    """

    def __init__(self, turns: Sequence[Turn], run: RunSpec, *, alone: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._turns, self._run = turns, run
        self._per_task = 1 if alone or len(turns) < _FEW_SCENES else _SCENES_PER_TASK
        self.num_tasks = -(-len(turns) // self._per_task)

    def estimate_inmemory_data_size(self) -> int | None:
        """A guess for Ray's planner; rows are small and stream."""
        return len(self._turns) * BYTES_PER_ROW

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A read task for some of the turns each, for each turn when they are few or ``alone``; cheap, as Ray wants."""
        del parallelism, data_context
        tasks = []
        for first in range(0, len(self._turns), self._per_task):
            share = self._turns[first : first + self._per_task]
            size = len(share) * BYTES_PER_ROW
            metadata = BlockMetadata(num_rows=len(share), size_bytes=size, input_files=None, exec_stats=None)
            read = partial(_plan, share, self._run)
            tasks.append(ReadTask(read, metadata, schema=DESCRIPTOR, per_task_row_limit=per_task_row_limit))
        return tasks


def _plan(turns: Sequence[Turn], run: RunSpec) -> Iterator[pa.Table]:
    for turn in turns:
        ref = turn.ref
        found = prepare_scene(ref, run)
        row = {**_BLANK, "kind": "scene", "scene_id": ref.id, "scene_uri": ref.uri}
        row |= {"turn": turn.index, "num_turns": turn.count}
        if isinstance(found, Failure):
            row |= failed(found)
        elif isinstance(found, SceneReport):
            row |= {"report": json.dumps(asdict(found))}
        else:
            row |= {"plan": found.to_json()}
        yield pa.Table.from_pylist([row], schema=DESCRIPTOR)


def list_scene_windows(table: pa.Table, run: RunSpec, *, rows_per_block: int, only_todo: bool) -> Iterator[pa.Table]:
    """A scene's row in; the same with the number of all its windows out, then a row for each window of this turn."""
    (scene,) = table.to_pylist()
    windows = list_windows(run, plan_from_json(scene["plan"]), only_todo=only_todo) if scene["plan"] else None
    if isinstance(windows, PlannedWindows):
        yield pa.Table.from_pylist([{**scene, "num_windows": windows.num}], schema=DESCRIPTOR)
        row = {**_BLANK, "kind": "window", "scene_id": scene["scene_id"], "plan": scene["plan"]}
        turn = Turn(SceneRef(scene["scene_id"], scene["scene_uri"]), scene["turn"], scene["num_turns"])
        rows = ({**row, **asdict(window)} for window in turn.share(windows.each, windows.num))
        while some := list(islice(rows, rows_per_block)):
            yield pa.Table.from_pylist(some, schema=DESCRIPTOR)
    else:
        yield pa.Table.from_pylist([{**scene, **(failed(windows) if windows else {})}], schema=DESCRIPTOR)


def failed(failure: Failure) -> dict[str, Any]:
    """A failure as columns of a row."""
    return {"error": failure.sentence, "stop": failure.stop, "again": failure.again, "denied": failure.denied}


def ended(done: WindowDone) -> dict[str, Any]:
    """How a window ended as columns of its row."""
    return {"skipped": done.skipped, **(failed(done.failure) if done.failure else {})}


def failure_of(row: dict[str, Any]) -> Failure | None:
    """The failure that a row tells of."""
    if not row["error"]:
        return None
    return Failure(sentence=row["error"], stop=row["stop"], again=row["again"], denied=row["denied"])


def window_of(row: dict[str, Any]) -> Window:
    """The window of a window row."""
    return Window(row["col_off"], row["row_off"], row["width"], row["height"])


def task_of(row: dict[str, Any]) -> Task:
    """The task that a window row describes."""
    return Task(plan_from_json(row["plan"]), window_of(row))


def report_of(row: dict[str, Any]) -> SceneReport | None:
    """The report of a scene row that is settled already."""
    return SceneReport(**json.loads(row["report"])) if row["report"] else None


def outcome_row(row: dict[str, Any], done: WindowDone | None, ready_at: float) -> dict[str, Any]:
    """The outcome of a row; a window's plan goes no further, only a scene's does.

    ``ready_at`` is the time (seconds since 1970) at which the worker's network stood.
    """
    return {
        **{name: row[name] for name in DESCRIPTOR.names},
        **(ended(done) if done else {}),
        "plan": row["plan"] if row["kind"] == "scene" else "",
        "valid_pixels": done.valid_pixels if done else 0,
        "bytes_fetched": done.bytes_fetched if done else 0,
        "area_km2": done.area_km2 if done else 0.0,
        "ready_at": ready_at,
    }


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

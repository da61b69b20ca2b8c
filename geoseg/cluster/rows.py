"""Rows between the operators: descriptors and outcomes with fixed columns and dtypes; pixels only in split mode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from geoseg.errors import StopError
from geoseg.predict.ledger import SceneReport, prepare_scene
from geoseg.predict.plan import RunSpec, plan_from_json
from geoseg.predict.worker import Task, WindowDone, WindowPixels
from geoseg.raster.raster import Raster
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import Window

BYTES_PER_ROW = 3000
_SCENES_PER_TASK = 64
_MAX_TASKS = 256

DESCRIPTOR = pa.schema(
    [
        ("kind", pa.string()),  # "scene" opens or settles a scene, "window" is one write window, "stop" ends the job
        ("scene_id", pa.string()),
        ("plan", pa.string()),
        ("report", pa.string()),
        ("error", pa.string()),
        ("stop", pa.string()),
        ("num_todo", pa.int64()),
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


_BLANK: dict[str, Any] = {field.name: 0 if field.type == pa.int64() else "" for field in DESCRIPTOR}


class SceneWindows(Datasource):
    """Plans scenes in read tasks on the cluster and streams their windows as rows: the plan never stands in the driver."""

    def __init__(self, refs: list[SceneRef], run: RunSpec, *, rows_per_block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._refs, self._run, self._rows_per_block = refs, run, rows_per_block

    def estimate_inmemory_data_size(self) -> int | None:
        """A guess for Ray's planner; rows are small and stream."""
        return len(self._refs) * BYTES_PER_ROW * 100

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A read task for a share of the scenes each; cheap, since Ray asks more than once."""
        del data_context
        num_tasks = min(len(self._refs), max(min(parallelism, _MAX_TASKS), -(-len(self._refs) // _SCENES_PER_TASK)))
        tasks = []
        for index in range(num_tasks):
            read = partial(_plan, self._refs[index::num_tasks], self._run, self._rows_per_block)

            metadata = BlockMetadata(num_rows=None, size_bytes=BYTES_PER_ROW * 100, input_files=None, exec_stats=None)
            tasks.append(ReadTask(read, metadata, schema=DESCRIPTOR, per_task_row_limit=per_task_row_limit))
        return tasks


def _plan(refs: list[SceneRef], run: RunSpec, rows_per_block: int) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    for ref in refs:
        try:
            prepared = prepare_scene(ref, run)
        except StopError as error:
            stop = {"kind": "stop", "scene_id": ref.id, "error": str(error), "stop": type(error).__name__}
            yield pa.Table.from_pylist([{**_BLANK, **stop}], schema=DESCRIPTOR)
            return
        plan = prepared.plan.to_json() if prepared.plan else ""
        report = json.dumps(asdict(prepared.report)) if prepared.report else ""
        opening = {"kind": "scene", "scene_id": ref.id, "plan": plan, "report": report, "num_todo": prepared.num_todo}
        rows.append({**_BLANK, **opening})
        for window in prepared.windows(run):
            place = {
                "col_off": window.col_off,
                "row_off": window.row_off,
                "width": window.width,
                "height": window.height,
            }
            rows.append({**_BLANK, "kind": "window", "scene_id": ref.id, "plan": plan, **place})
            if len(rows) >= rows_per_block:
                yield pa.Table.from_pylist(rows, schema=DESCRIPTOR)
                rows = []
    yield pa.Table.from_pylist(rows, schema=DESCRIPTOR)


def task_of(row: dict[str, Any]) -> Task:
    """The task that a window row describes."""
    window = Window(int(row["col_off"]), int(row["row_off"]), int(row["width"]), int(row["height"]))
    return Task(plan_from_json(str(row["plan"])), window)


def report_of(row: dict[str, Any]) -> SceneReport | None:
    """The report of a scene row that is settled already."""
    return SceneReport(**json.loads(row["report"])) if row["report"] else None


def outcome_row(row: dict[str, Any], done: WindowDone | None, ready_at: float) -> dict[str, Any]:
    """The outcome of a row; a window's plan goes no further, only a scene's does.

    ``ready_at`` is the time (seconds since 1970) at which the worker's network stood.
    """
    return {
        **{name: row[name] for name in DESCRIPTOR.names},
        "plan": row["plan"] if row["kind"] == "scene" else "",
        "error": done.error if done else row["error"],
        "stop": done.stop if done else row["stop"],
        "valid_pixels": done.valid_pixels if done else 0,
        "bytes_fetched": done.bytes_fetched if done else 0,
        "area_km2": done.area_km2 if done else 0.0,
        "ready_at": ready_at,
    }


def pack_pixels(read: WindowPixels) -> bytes:
    """What was read for a window, as bytes for a row of split mode."""
    around = read.around
    shape = list(around.pixels.shape) if around is not None else []
    told = {
        "shape": shape,
        "dtype": around.pixels.dtype.str if around is not None else "",
        "valid": list(read.valid.shape),
        "bytes_fetched": read.bytes_fetched,
        "seconds": read.seconds,
    }
    head = json.dumps(told).encode()
    parts = [len(head).to_bytes(4, "little"), head, np.packbits(read.valid).tobytes()]
    if around is not None:
        parts += [np.packbits(around.valid).tobytes(), np.ascontiguousarray(around.pixels).tobytes()]
    return b"".join(parts)


def unpack_pixels(data: bytes) -> WindowPixels:
    """The inverse of ``pack_pixels``."""
    at = 4 + int.from_bytes(data[:4], "little")
    told = json.loads(data[4:at])
    valid, at = _unpack_bits(data, at, told["valid"])
    around = None
    if told["shape"]:
        shape = told["shape"]
        around_valid, at = _unpack_bits(data, at, shape[1:])
        pixels = np.frombuffer(data, told["dtype"], offset=at).reshape(shape)
        around = Raster(pixels, around_valid)
    return WindowPixels(around, valid, told["bytes_fetched"], told["seconds"])


def _unpack_bits(data: bytes, at: int, shape: list[int]) -> tuple[Any, int]:
    count = shape[0] * shape[1]
    end = at + -(-count // 8)
    bits = np.unpackbits(np.frombuffer(data, np.uint8, end - at, at), count=count)
    return bits.astype(np.bool_).reshape(shape), end

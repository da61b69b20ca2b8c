"""Windows of scenes as tasks, what is read for them, and how they ended; knows no torch, so any process may read."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from geoseg.predict.failure import Failure, attempt
from geoseg.predict.parts import finished_parts
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.raster.geotiff import SceneReader, keep_decoded
from geoseg.raster.raster import Raster
from geoseg.raster.stack import StackReader
from geoseg.raster.window import Window, WindowSet

_KNOWN_SCENES = 8
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Task:
    """One write window of one scene."""

    plan: ScenePlan
    window: Window


@dataclass(frozen=True, slots=True)
class WindowPixels:
    """What was read for a window: the core with its margin (None when nothing is valid) and the pixels that count.

    ``coarse`` is the core of a coarse pass with its margin, where there is to be one.
    """

    around: Raster | None
    valid: npt.NDArray[np.bool_]
    bytes_fetched: int
    seconds: float
    coarse: Raster | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowDone:
    """The outcome of a window: what was counted, or a ``failure``; ``skipped`` when its part stood already."""

    task: Task
    failure: Failure | None = None
    skipped: bool = False
    valid_pixels: int = 0
    bytes_fetched: int = 0
    read_s: float = 0.0
    predict_s: float = 0.0
    write_s: float = 0.0

    @property
    def area_km2(self) -> float:
        """Ground under the valid pixels."""
        return self.valid_pixels * self.task.plan.scene.grid.resolution_m**2 / 1e6


@dataclass(frozen=True, slots=True)
class _KnownScene:
    """A scene's block indexes, and the windows whose parts stood when it was met."""

    reader: SceneReader | StackReader
    finished: WindowSet


class WindowReader:
    """Reads windows that have no part yet; keeps what is known of the last few scenes. For any number of threads."""

    def __init__(self, run: RunSpec) -> None:
        self._run = run
        self._scenes: OrderedDict[tuple[str, str], _KnownScene] = OrderedDict()
        self._lock = threading.Lock()

    def _scene(self, plan: ScenePlan) -> _KnownScene:
        key = (plan.scene.id, plan.fingerprint)
        with self._lock:
            scene = self._scenes.pop(key, None)
            if scene is None:
                scene = _KnownScene(plan.reader(), finished_parts(self._run, plan))
                keep_decoded(plan.decoded_bytes)
            self._scenes[key] = scene
            while len(self._scenes) > _KNOWN_SCENES:
                self._scenes.popitem(last=False)
        return scene

    def read(self, task: Task) -> WindowPixels | WindowDone:
        """Pixels and validity for a window, or its outcome when it stands already or cannot be read."""
        return try_for(task, lambda: self._read(task), "reading")

    def _read(self, task: Task) -> WindowPixels | WindowDone:
        start = time.perf_counter()
        plan, write = task.plan, task.window
        scene = self._scene(plan)
        if scene.finished.has(write.row_off, write.col_off):
            return WindowDone(task=task, skipped=True)
        before = scene.reader.bytes_fetched
        around, valid = read_window(plan, scene.reader, write)
        coarse: Raster | None = None
        if plan.coarse is not None and around is not None:
            coarse = plan.coarse.read_core(scene.reader, plan.coarse.core(write), plan.bands)
        fetched = scene.reader.bytes_fetched - before
        return WindowPixels(around, valid, fetched, time.perf_counter() - start, coarse)


def read_window(
    plan: ScenePlan, reader: SceneReader | StackReader, write: Window
) -> tuple[Raster | None, npt.NDArray[np.bool_]]:
    """The core of a write window with its margin, None when nothing is valid, and the valid pixels (row, col).

    Decoded blocks that no window after it in the plan's order needs are the first to be dropped.
    """
    inside = plan.area.inside(write) if plan.area is not None else None
    stitching = plan.stitching
    around: Raster | None = None
    if inside is not None and not inside.any():
        valid = inside
    elif stitching.is_native:
        around = stitching.read_core(reader, stitching.core(write), plan.bands)
        valid = stitching.read_valid(reader, write, around, plan.bands)
    else:
        valid = reader.read_valid(write, plan.bands)
        if valid.any():
            around = stitching.read_core(reader, stitching.core(write), plan.bands)
    if inside is not None:
        valid = valid & inside
    settled = stitching.settled(write)
    if settled is not None:
        reader.let_go(settled, level=stitching.level)
    return (around if valid.any() else None), valid


def try_for(task: Task, step: Callable[[], _T], doing: str) -> _T | WindowDone:
    """What a step gives for a window, or that it failed."""
    got = attempt(step, task.plan.scene.id, f"{doing} {task.window}")
    return WindowDone(task=task, failure=got) if isinstance(got, Failure) else got

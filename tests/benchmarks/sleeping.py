"""A run without pixels: a device actor that sleeps as long as a GPU would take for a window, publishing that is done at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

import geoseg.cluster.driver
import geoseg.cluster.predict
from geoseg.cluster.operators import PredictWindows
from geoseg.predict.plan import RunSpec, plan_from_json
from geoseg.predict.publish import Published
from geoseg.predict.reading import Task, WindowDone
from geoseg.raster.store import Version


class SleepingWorker:
    """Stands for ``Worker``: neither reads nor writes."""

    window_s = 0.0

    def __init__(self, run: RunSpec, **_: Any) -> None:
        self._classes = len(run.description.classes)
        self.waited_s = 0.0

    def run(self, tasks: Iterable[Task], pixels: Any = None) -> Iterator[WindowDone]:
        """Tell of each task after the time that a window takes; short sleeps are taken together."""
        del pixels
        owed = 0.0
        for task in tasks:
            owed += self.window_s
            if owed > 0.01:
                before = time.perf_counter()
                time.sleep(owed)
                owed -= time.perf_counter() - before
            yield WindowDone(task=task, valid_pixels=task.window.width * task.window.height)


class SleepingWindows(PredictWindows):
    """The device actor with a worker that sleeps."""

    def __init__(self, *arguments: Any, window_s: float) -> None:
        import geoseg.predict.worker

        SleepingWorker.window_s = window_s
        geoseg.predict.worker.Worker = SleepingWorker  # type: ignore[assignment,misc]
        super().__init__(*arguments)


class SleepingPublisher:
    """Publishes nothing and says that it did."""

    def __init__(self, run: RunSpec) -> None:
        self._classes = len(run.description.classes)

    def publish(self, plan_json: str) -> Published:
        """What a publisher answers."""
        scene_id = plan_from_json(plan_json).scene.id
        return Published(scene_id=scene_id, item_uri="", version=Version(), mask_uri="", classes=[1] * self._classes)


def use(patch: pytest.MonkeyPatch, window_s: float) -> None:
    """Let runs on this process's cluster sleep."""
    mapped = geoseg.cluster.predict.Dataset.map_batches

    def map_batches(self: Any, function: Any, **settings: Any) -> Any:
        if function is PredictWindows:
            return mapped(self, SleepingWindows, **settings, fn_constructor_kwargs={"window_s": window_s})
        return mapped(self, function, **settings)

    patch.setattr(geoseg.cluster.predict.Dataset, "map_batches", map_batches)
    patch.setattr(geoseg.cluster.driver, "Publisher", SleepingPublisher)

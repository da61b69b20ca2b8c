"""What a worker does with windows: read, predict, store the encoded blocks; the same steps in every engine."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geoseg.errors import GeosegError, SceneReadError, StopError
from geoseg.predict.bundles import load_bundle
from geoseg.predict.mask import class_mask, class_probabilities, count_classes, to_scene_pixels
from geoseg.predict.parts import part_uri
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.predictor import Predictor, default_device
from geoseg.raster import store
from geoseg.raster.cog import encode_window, pack_blocks
from geoseg.raster.geotiff import SceneReader, keep_decoded
from geoseg.raster.raster import Raster
from geoseg.raster.window import Window

_KNOWN_SCENES = 8


@dataclass(frozen=True, slots=True)
class Task:
    """One write window of one scene."""

    plan: ScenePlan
    window: Window


@dataclass(frozen=True, slots=True)
class WindowPixels:
    """What was read for a window: the core with its margin (None when nothing is valid) and the pixels that count."""

    around: Raster | None
    valid: npt.NDArray[np.bool_]
    bytes_fetched: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowDone:
    """The outcome of a window: an empty ``error`` and what was counted, or a sentence.

    ``stop`` names the kind of error when the whole job cannot go on.
    """

    task: Task
    error: str = ""
    stop: str = ""
    valid_pixels: int = 0
    bytes_fetched: int = 0
    read_s: float = 0.0
    predict_s: float = 0.0
    write_s: float = 0.0

    @property
    def area_km2(self) -> float:
        """Ground under the valid pixels."""
        return self.valid_pixels * self.task.plan.scene.grid.resolution_m**2 / 1e6


class WindowReader:
    """Reads windows; keeps the block indexes of the last few scenes. For any number of threads."""

    def __init__(self) -> None:
        self._readers: OrderedDict[tuple[str, str], SceneReader] = OrderedDict()
        self._lock = threading.Lock()

    def _reader(self, plan: ScenePlan) -> SceneReader:
        key = (plan.scene.uri, plan.scene.etag)
        with self._lock:
            reader = self._readers.pop(key, None)
            if reader is None:
                reader = SceneReader(plan.scene)
                keep_decoded(plan.decoded_bytes)
            self._readers[key] = reader
            while len(self._readers) > _KNOWN_SCENES:
                self._readers.popitem(last=False)
        return reader

    def read(self, task: Task) -> WindowPixels:
        """Pixels and validity for a window. Raises SceneError or StoreError."""
        start = time.perf_counter()
        plan, write = task.plan, task.window
        reader = self._reader(plan)
        before = reader.bytes_fetched
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
        if not valid.any():
            around = None
        return WindowPixels(around, valid, reader.bytes_fetched - before, time.perf_counter() - start)


class Worker:
    """A worker's state: the network on its device and the open scenes. ``run`` takes tasks and tells how each went.

    Two threads may ``run`` at once: one reads ahead and stores while the other has the device.
    """

    def __init__(self, run: RunSpec, *, device: str | None = None, read_threads: int = 1) -> None:
        self.run_spec = run
        bundle = load_bundle(run.bundle_uri)
        if bundle.digest != run.bundle_digest:
            raise StopError(f"{run.bundle_uri}: the bundle was changed while the run was going on; start the run again")
        device = device or default_device()
        self.predictor = Predictor(bundle, device=device, scale=run.config.scale)
        self.batch = run.config.batch or (8 if device.startswith("cuda") else 1)
        self.reader = WindowReader()
        self._readers = ThreadPoolExecutor(read_threads, thread_name_prefix="read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._ahead = read_threads + self.batch
        self._device = threading.Lock()

    def run(self, tasks: Iterable[Task], pixels: Iterable[WindowPixels] | None = None) -> Iterator[WindowDone]:
        """Read (unless ``pixels`` come along), predict and store windows; one outcome for each task, in no order.

        Reading runs ahead in threads and storing behind in another, so the network does not wait for either. What
        concerns a scene alone becomes an outcome with an error; what concerns the whole job is marked as such.
        """
        batch: list[tuple[Task, WindowPixels]] = []
        writes: list[Future[WindowDone]] = []
        for task, read in self._read_ahead(tasks) if pixels is None else zip(tasks, pixels, strict=True):
            if isinstance(read, WindowDone):
                yield read
                continue
            if read.around is None:
                writes.append(self._writer.submit(self._store, task, read, None, None, 0.0))
            else:
                if batch and _shape(batch[0][1]) != _shape(read):
                    writes += self._predict(batch)
                    batch = []
                batch.append((task, read))
                if len(batch) == self.batch:
                    writes += self._predict(batch)
                    batch = []
            while writes and (writes[0].done() or len(writes) > 2 * self.batch):
                yield writes.pop(0).result()
        if batch:
            writes += self._predict(batch)
        for write in writes:
            yield write.result()

    def _read_ahead(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, WindowPixels | WindowDone]]:
        waiting: list[tuple[Task, Future[WindowPixels]]] = []
        for task in tasks:
            waiting.append((task, self._readers.submit(self.reader.read, task)))
            if len(waiting) > self._ahead:
                yield _outcome(*waiting.pop(0))
        for task, future in waiting:
            yield _outcome(task, future)

    def _predict(self, batch: list[tuple[Task, WindowPixels]]) -> list[Future[WindowDone]]:
        done: list[tuple[Task, WindowPixels, Any, Any]] = []
        with self._device:
            start = time.perf_counter()
            logits = self.predictor.core_logits([read.around for _, read in batch if read.around is not None])
            for (task, read), logits_chw in zip(batch, logits, strict=True):
                stitching = task.plan.stitching
                placed = to_scene_pixels(logits_chw, stitching, stitching.core(task.window), task.window)
                mask = class_mask(placed, read.valid)
                chances = class_probabilities(placed, read.valid) if self.run_spec.config.probabilities else None
                done.append((task, read, mask, chances))
            seconds = (time.perf_counter() - start) / len(batch)
        return [self._writer.submit(self._store, *each, seconds) for each in done]

    def _store(
        self,
        task: Task,
        read: WindowPixels,
        mask: npt.NDArray[np.uint8] | None,
        chances: npt.NDArray[np.uint8] | None,
        predict_s: float,
    ) -> WindowDone:
        start = time.perf_counter()
        plan, window = task.plan, task.window
        try:
            if mask is None and read.around is not None:
                raise SceneReadError(
                    f"{plan.scene.id}: the network answered with numbers that are not finite at {window}"
                )
            num_classes = len(self.run_spec.description.classes)
            classes = count_classes(mask, num_classes) if mask is not None else [0] * num_classes
            uri = part_uri(self.run_spec, plan, window)
            if chances is not None:
                store.write(uri + ".probabilities", pack_blocks({}, encode_window(chances, window, plan.window)))
            blocks = encode_window(mask[None], window, plan.window) if mask is not None else []
            store.write(uri, pack_blocks({"classes": classes}, blocks))
        except GeosegError as error:
            return _failed(task, error)
        return WindowDone(
            task=task,
            valid_pixels=sum(classes),
            bytes_fetched=read.bytes_fetched,
            read_s=read.seconds,
            predict_s=predict_s,
            write_s=time.perf_counter() - start,
        )

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown()
        self._writer.shutdown()


def _outcome(task: Task, future: Future[WindowPixels]) -> tuple[Task, WindowPixels | WindowDone]:
    try:
        return task, future.result()
    except (GeosegError, MemoryError) as error:
        return task, _failed(task, error)


def _failed(task: Task, error: Exception) -> WindowDone:
    sentence = str(error) if isinstance(error, GeosegError) else f"{task.plan.scene.id}: out of memory at {task.window}"
    return WindowDone(task=task, error=sentence, stop=type(error).__name__ if isinstance(error, StopError) else "")


def _shape(read: WindowPixels) -> tuple[int, ...]:
    assert read.around is not None
    return read.around.pixels.shape

"""What a worker does with windows: read, predict, store the encoded blocks; the same steps in every engine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from geoseg.errors import SceneReadError
from geoseg.model.precision import Precision
from geoseg.predict.bundles import bundle_of
from geoseg.predict.coarse_to_fine import run_coarse_to_fine
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.light import window_light
from geoseg.predict.mask import (
    class_mask,
    class_probabilities,
    class_uncertainty,
    count_classes,
    sum_by_class,
    to_scene_pixels,
)
from geoseg.predict.parts import part_uri
from geoseg.predict.plan import RunSpec
from geoseg.predict.predictor import Predictor, default_device
from geoseg.predict.reading import Task, WindowDone, WindowPixels, WindowReader, try_for
from geoseg.predict.seams import Seams, count_seams
from geoseg.predict.tuning import remembered
from geoseg.raster import store
from geoseg.raster.cog import encode_window, pack_blocks


@dataclass(frozen=True, slots=True)
class _Made:
    """What the network makes of a window: the mask (row, col), None when it cannot be told, further layers (band, row, col).

    ``fine_pixels``: valid pixels at full resolution, where a coarse pass decided on it.
    """

    mask: npt.NDArray[np.uint8] | None = None
    layers: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    seams: Seams | None = None
    fine_pixels: int | None = None
    seconds: float = 0.0


class Worker:
    """A worker's state: the network on its device and the open scenes. ``run`` takes tasks and tells how each went.

    ``precision`` overrules the settings' and the device's (see ``Predictor``).
    """

    def __init__(
        self, run: RunSpec, *, device: str | None = None, read_threads: int = 1, precision: Precision | None = None
    ) -> None:
        self.run_spec = run
        device = device or default_device()
        self.predictor = Predictor(bundle_of(run), run.config, device=device, precision=precision)
        self.num_gpus = int(device.startswith("cuda"))
        tuned = remembered(run.bundle_digest, self.predictor.device)
        self.batch = run.config.batch or (tuned.batch if tuned else 8 if self.num_gpus else 1)
        self.reader = WindowReader(run)
        self._readers = ThreadPoolExecutor(read_threads, thread_name_prefix="read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._ahead = read_threads + self.batch
        self.waited_s = 0.0  # for pixels, when no window was ready to be predicted

    def run(self, tasks: Iterable[Task], pixels: Iterable[WindowPixels] | None = None) -> Iterator[WindowDone]:
        """Read (unless their ``pixels`` come along), predict and store windows; one outcome for each task, in no order.

        Reading runs ahead in threads and storing behind in another, so the network does not wait for either. What
        concerns a scene alone becomes an outcome with an error; what concerns the whole job is marked as such.
        """
        batch: list[tuple[Task, WindowPixels]] = []
        writes: list[Future[WindowDone]] = []
        for task, read in self._read_ahead(tasks) if pixels is None else zip(tasks, pixels, strict=False):
            if isinstance(read, WindowDone):
                yield read
                continue
            if read.around is None:
                writes.append(self._writer.submit(self._store, task, read, _Made()))
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
        waiting: list[tuple[Task, Future[WindowPixels | WindowDone]]] = []
        for task in tasks:
            waiting.append((task, self._readers.submit(self.reader.read, task)))
            if len(waiting) > self._ahead:
                first, future = waiting.pop(0)
                yield first, self._wait_for(future)
        for last, future in waiting:
            yield last, self._wait_for(future)

    def _wait_for(self, read: Future[WindowPixels | WindowDone]) -> WindowPixels | WindowDone:
        start = time.perf_counter()
        done = read.result()
        self.waited_s += time.perf_counter() - start
        return done

    def _predict(self, batch: list[tuple[Task, WindowPixels]]) -> list[Future[WindowDone]]:
        """Masks of a batch on their way to the store. What fails together is tried in halves, in the end each alone."""
        first = batch[0][0]
        done = attempt(lambda: self._masks(batch), first.plan.scene.id, f"predicting {first.window}")
        if not isinstance(done, Failure):
            return [self._writer.submit(self._store, *each) for each in done]
        if len(batch) == 1:
            return [self._writer.submit(WindowDone, task=first, failure=done)]
        half = len(batch) // 2
        if done.again:  # there was not enough memory, and there will not be for the next batch
            self.batch = half
        return self._predict(batch[:half]) + self._predict(batch[half:])

    def _masks(self, batch: list[tuple[Task, WindowPixels]]) -> list[tuple[Task, WindowPixels, _Made]]:
        start = time.perf_counter()
        done = self._coarse_to_fine(batch) if self.run_spec.config.coarse else self._in_full(batch)
        seconds = (time.perf_counter() - start) / len(batch)
        return [(task, read, replace(made, seconds=seconds)) for task, read, made in done]

    def _in_full(self, batch: list[tuple[Task, WindowPixels]]) -> list[tuple[Task, WindowPixels, _Made]]:
        cores = self.predictor.cores([read.around for _, read in batch if read.around is not None])
        done = []
        for (task, read), (logits_chw, differ_ahw) in zip(batch, cores, strict=True):
            stitching, core = task.plan.stitching, task.plan.stitching.core(task.window)
            placed = to_scene_pixels(logits_chw, stitching, core, task.window)
            seams = None
            if differ_ahw is not None and self.predictor.tiling is not None:
                seams = count_seams(differ_ahw, self.predictor.tiling, stitching, core, task.window, read.valid)
            done.append((task, read, replace(self._layers(placed, read), seams=seams)))
        return done

    def _coarse_to_fine(self, batch: list[tuple[Task, WindowPixels]]) -> list[tuple[Task, WindowPixels, _Made]]:
        """As ``_in_full``, with the mask background wherever full resolution was not deserved."""
        done = []
        windows = run_coarse_to_fine(self.predictor, batch, self.run_spec.config, most=self.batch)
        for (task, read), window in zip(batch, windows, strict=True):
            made = self._layers(window.logits_chw, read)
            if made.mask is not None:
                made.mask[read.valid & ~window.fine_hw] = 0
            made = replace(made, fine_pixels=int(np.count_nonzero(read.valid & window.fine_hw)))
            done.append((task, read, made))
        return done

    def _layers(self, placed_chw: Tensor, read: WindowPixels) -> _Made:
        """The mask and what else is asked for, of logits (class, row, col) at the window's own pixels."""
        config, description = self.run_spec.config, self.run_spec.description
        mask = class_mask(placed_chw, read.valid, description)
        layers: dict[str, npt.NDArray[np.uint8]] = {}
        if config.probabilities:
            layers["probabilities"] = class_probabilities(placed_chw, read.valid, description)
        if config.uncertainty:
            layers["uncertainty"] = class_uncertainty(placed_chw, read.valid, description, config.uncertainty)[None]
        return _Made(mask, layers)

    def _store(self, task: Task, read: WindowPixels, made: _Made) -> WindowDone:
        start = time.perf_counter()

        def write() -> WindowDone:
            valid_pixels = self._write_part(task, read, made)
            return WindowDone(
                task=task,
                valid_pixels=valid_pixels,
                bytes_fetched=read.bytes_fetched,
                read_s=read.seconds,
                predict_s=made.seconds,
                write_s=time.perf_counter() - start,
            )

        return try_for(task, write, "storing")

    def _write_part(self, task: Task, read: WindowPixels, made: _Made) -> int:
        """Write a window's part; the number of its valid pixels."""
        plan, window, mask = task.plan, task.window, made.mask
        if mask is None and read.around is not None:
            raise SceneReadError(f"{plan.scene.id}: the network answered with numbers that are not finite at {window}")
        num_classes = len(self.run_spec.description.classes)
        classes = count_classes(mask, num_classes) if mask is not None else [0] * num_classes
        for name, pixels in made.layers.items():
            uri = part_uri(self.run_spec, plan, window, name)
            store.write(uri, pack_blocks({}, encode_window(pixels, window, plan.window)))
        blocks = encode_window(mask[None], window, plan.window) if mask is not None else []
        told: dict[str, Any] = {"classes": classes}
        if read.around is not None:
            told["precision"] = self.predictor.precision
        if made.seams is not None:
            told["seams"] = made.seams.counts()
        if made.fine_pixels is not None:
            told["fine"] = made.fine_pixels
        if mask is not None and "uncertainty" in made.layers:
            told["uncertainty"] = sum_by_class(made.layers["uncertainty"][0], mask, num_classes)
        description = self.run_spec.description
        if read.around is not None and description.light:
            light = window_light(
                read.around, read.valid, plan.stitching, window, description, self.run_spec.config.scale
            )
            told["light"] = light.tolist()
        store.write(part_uri(self.run_spec, plan, window), pack_blocks(told, blocks))
        return sum(classes)

    def close(self) -> None:
        """End the threads; what they have not begun is left."""
        self._readers.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)


def _shape(read: WindowPixels) -> tuple[int, ...]:
    assert read.around is not None
    return read.around.pixels.shape

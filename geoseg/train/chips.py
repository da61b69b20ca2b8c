"""Chips: random crops of whole scenes, drawn from the chip index and read at the stage's resolution, never cut to disk.

Which chip comes at which place of which step follows from the seed alone: not from the number of workers, nor from restarts.
Legend of axes: b batch, k bands (of a stack those of each date), t dates, h rows, w columns.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geoseg.errors import SceneError
from geoseg.raster.geotiff import ReadOptions, SceneReader, keep_decoded
from geoseg.raster.scene import Scene, SceneRef
from geoseg.raster.stack import StackReader, common_levels
from geoseg.raster.window import Window
from geoseg.raster.work import WorkGrid, near_work_grid
from geoseg.train.augment import Augmentation, draw_augmentation
from geoseg.train.border import border_weights
from geoseg.train.codes import UNLABELLED
from geoseg.train.index import CellTable
from geoseg.train.labels import SceneLabels
from geoseg.train.stages import Stage

_OPEN_SCENES = 64
_DECODED_BYTES = 256 << 20
_PLACE, _LIGHT = 0, 1


@dataclass(frozen=True, slots=True)
class TrainScene:
    """A scene (or a stack, whose scenes are ``stack`` and whose first is ``scene``) with its labels.

    ``source`` is the place of its source in the job, ``ref`` and ``options`` how it is described again, ``bands`` the places of the
    bundle's bands, from 0; ``found`` are the classes that the labels find wherever they are. ``scale``: raw values that stand
    for the ends of ``value_range``, to which pixels are brought; None when they are as the bundle takes them. ``warp``: the
    scenes of a stack may lie on other grids than its first.
    """

    source: int
    ref: SceneRef
    options: ReadOptions
    scene: Scene
    stack: tuple[Scene | None, ...]
    bands: tuple[int, ...]
    labels: SceneLabels
    found: tuple[int, ...]
    scale: tuple[float, float] | None = None
    warp: bool = False

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Sizes (row, col) of the full image and its overviews."""
        return common_levels(self.stack or (self.scene,))

    def reader(self) -> SceneReader | StackReader:
        """A reader of its pixels. Raises SceneError."""
        return StackReader(self.stack) if self.stack else SceneReader(self.scene)


@dataclass(frozen=True, slots=True)
class Place:
    """Which chip stands where: stage, step and place in the step's batch, all from 0."""

    stage: int
    step: int
    position: int

    def rng(self, seed: int, purpose: int) -> np.random.Generator:
        """Random numbers for this place alone, apart for each purpose."""
        return np.random.default_rng([seed, self.stage, self.step, self.position, purpose])


def augmentation_of(place: Place, stage: Stage, *, seed: int, num_bands: int) -> Augmentation:
    """How the chip at a place is turned, scaled and lit."""
    return draw_augmentation(stage.augment, place.rng(seed, _LIGHT), num_bands)


@dataclass(frozen=True, slots=True)
class ChipDraw:
    """A chip as a descriptor: a scene by its number, and a window of it on a work grid."""

    scene: int
    work: WorkGrid
    window: Window


@dataclass(frozen=True, slots=True, eq=False)
class Chip:
    """A chip: pixels (k, h, w), labels uint8 (h, w) of the codes, valid bool ([t,] h, w), weights float32 (h, w) or None.

    Pixels and validity reach ``context`` pixels further than the labels on each side. ``failure`` says why nothing could be
    read; such a chip has no valid pixel and no label.
    """

    pixels: npt.NDArray[Any]
    labels: npt.NDArray[np.uint8]
    valid: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float32] | None
    failure: str = ""


class Sampler:
    """Draws chips from the cells of all scenes. The same draws come out for the same scenes, tables and seed."""

    def __init__(
        self, scenes: Sequence[TrainScene], tables: Sequence[CellTable], source_weights: Sequence[float], *, seed: int
    ) -> None:
        self._scenes, self._tables, self._seed = scenes, tables, seed
        areas = [scene.scene.grid.resolution_m**2 for scene in scenes]
        self._sources = []
        for source, weight in enumerate(source_weights):
            numbers = [
                number for number, scene in enumerate(scenes) if scene.source == source and len(tables[number].labelled)
            ]
            if numbers and weight > 0:
                self._sources.append((weight, _SourceCells.of(numbers, tables, areas)))
        shares = np.cumsum([weight for weight, _ in self._sources])
        self._shares = shares / shares[-1] if len(shares) else shares

    def draw(self, stage: Stage, place: Place) -> ChipDraw:
        """The chip of a place."""
        chances = place.rng(self._seed, _PLACE).random(9)
        cells = self._sources[int(np.searchsorted(self._shares, chances[0], side="right"))][1]
        number, row, col = cells.draw(chances[1:4], focus=stage.focus)
        scene, side = self._scenes[number], self._tables[number].side
        wanted_m = stage.resolutions_m[int(chances[4] * len(stage.resolutions_m))]
        zoom = augmentation_of(place, stage, seed=self._seed, num_bands=len(scene.bands)).scale
        work = near_work_grid(scene.levels, wanted_m / zoom / scene.scene.grid.resolution_m)
        offsets = []
        for axis, cell in enumerate((row, col)):
            size, native = work.work_shape[axis], work.scene_shape[axis]
            point = min((cell + chances[5 + axis]) * side, native) * size / native
            offset = int(np.floor(point - chances[7 + axis] * stage.chip))
            spare = size - stage.chip
            offsets.append(min(max(offset, 0), spare) if spare >= 0 else spare // 2)
        return ChipDraw(number, work, Window(offsets[1], offsets[0], stage.chip, stage.chip))


@dataclass(frozen=True, slots=True, eq=False)
class _SourceCells:
    """The cells of a source's scenes, and running sums of labelled ground and of the ground of each class, in m2."""

    scenes: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    labelled: npt.NDArray[np.float64]
    of_class: tuple[npt.NDArray[np.float64], ...]

    @classmethod
    def of(cls, numbers: Sequence[int], tables: Sequence[CellTable], areas: Sequence[float]) -> _SourceCells:
        scenes = np.repeat(numbers, [len(tables[number].labelled) for number in numbers])
        labelled = np.concatenate([tables[number].labelled * areas[number] for number in numbers])
        of_class = np.concatenate([tables[number].of_class * areas[number] for number in numbers])
        found = [of_class[:, code] for code in range(1, of_class.shape[1]) if of_class[:, code].any()]
        return cls(
            scenes,
            np.concatenate([tables[number].places for number in numbers]),
            np.cumsum(labelled),
            tuple(np.cumsum(one) for one in found),
        )

    def draw(self, chances: npt.NDArray[np.float64], *, focus: float) -> tuple[int, int, int]:
        """Scene, row and column of a cell: around a class in ``focus`` of the cases, else evenly over labelled ground."""
        sums = self.labelled
        if self.of_class and chances[0] < focus:
            sums = self.of_class[int(chances[1] * len(self.of_class))]
        cell = min(int(np.searchsorted(sums, chances[2] * sums[-1], side="right")), len(sums) - 1)
        return int(self.scenes[cell]), int(self.places[cell, 0]), int(self.places[cell, 1])


class ChipReader:
    """Reads chips; the last scenes stay open, and decoded blocks serve again. For any number of threads.

    ``value_range`` are the values that the bundle's imagery may take, ``dtype`` that of all chips.
    """

    def __init__(self, scenes: Sequence[TrainScene], *, dtype: str, value_range: tuple[float, float]) -> None:
        self._scenes, self._dtype, self._value_range = scenes, dtype, value_range
        self._open: OrderedDict[int, SceneReader | StackReader] = OrderedDict()
        self._lock = threading.Lock()
        keep_decoded(_DECODED_BYTES)

    def read(self, draw: ChipDraw, stage: Stage, *, context: int = 0, border_class: int | None = None) -> Chip:
        """The chip of a draw, with ``context`` pixels more around its pixels. What concerns the scene alone is its failure."""
        try:
            return self._read(draw, stage, context, border_class)
        except SceneError as error:
            return self._nothing(draw, stage, context, str(error))

    def _read(self, draw: ChipDraw, stage: Stage, context: int, border_class: int | None) -> Chip:
        scene = self._scenes[draw.scene]
        raster = draw.work.read(
            self._reader(draw.scene), draw.window.grown(context) if context else draw.window, scene.bands
        )
        labels = scene.labels.read(draw.work, draw.window)
        inner = slice(context, context + draw.window.height), slice(context, context + draw.window.width)
        labels = np.where(raster.valid_at_all[inner], labels, np.uint8(UNLABELLED))
        weights = None
        if stage.border is not None and border_class is not None:
            instances = scene.labels.read_instances(draw.work, draw.window, border_class)
            weights = border_weights(labels, instances, w0=stage.border.w0, sigma=stage.border.sigma)
        return Chip(self._values(raster.pixels, scene.scale), labels, raster.valid, weights)

    def _values(self, pixels: npt.NDArray[Any], scale: tuple[float, float] | None) -> npt.NDArray[Any]:
        if scale is not None:
            low, high = self._value_range
            pixels = (pixels.astype(np.float32) - np.float32(scale[0])) * np.float32(
                (high - low) / (scale[1] - scale[0])
            )
            pixels += np.float32(low)
        return pixels.astype(self._dtype, copy=False)

    def _nothing(self, draw: ChipDraw, stage: Stage, context: int, failure: str) -> Chip:
        scene = self._scenes[draw.scene]
        rows, cols = draw.window.height + 2 * context, draw.window.width + 2 * context
        dates = len(scene.stack) or 1
        return Chip(
            np.zeros((dates * len(scene.bands), rows, cols), self._dtype),
            np.full((draw.window.height, draw.window.width), UNLABELLED, np.uint8),
            np.zeros((dates, rows, cols) if scene.stack else (rows, cols), np.bool_),
            np.zeros((draw.window.height, draw.window.width), np.float32) if stage.border is not None else None,
            failure,
        )

    def _reader(self, number: int) -> SceneReader | StackReader:
        with self._lock:
            reader = self._open.pop(number, None)
        if reader is None:
            reader = self._scenes[number].reader()
        with self._lock:
            reader = self._open.setdefault(number, reader)
            self._open.move_to_end(number)
            while len(self._open) > _OPEN_SCENES:
                self._open.popitem(last=False)
        return reader

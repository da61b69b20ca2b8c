"""The pixels that a network sees of a scene: its extent at another pixel size, read from the overview nearest to that."""

from __future__ import annotations

from dataclasses import dataclass

from geoseg.raster.geotiff import SceneReader
from geoseg.raster.raster import Raster
from geoseg.raster.resample import Axis, mirrored, resample
from geoseg.raster.stack import StackReader
from geoseg.raster.window import Window

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class WorkGrid:
    """A scene at another pixel size; both grids have the same extent.

    ``scene_shape`` and ``work_shape`` are (row, col) of the scene and of what the network sees; ``level`` is the overview that
    is read (0 = full size) and ``level_shape`` its size. A box is (row_off, row_end, col_off, col_end).
    """

    scene_shape: tuple[int, int]
    work_shape: tuple[int, int]
    level: int
    level_shape: tuple[int, int]

    @property
    def is_native(self) -> bool:
        """Whether the network runs on the scene's own pixels."""
        return self.scene_shape == self.work_shape

    def to_scene(self, axis: int) -> Axis:
        """The resampling from the work grid to the scene along rows (0) or columns (1)."""
        return Axis(self.work_shape[axis], self.scene_shape[axis])

    def read(self, reader: SceneReader | StackReader, window: Window, bands: tuple[int, ...]) -> Raster:
        """Pixels and validity of a window of the work grid; what of it lies outside the scene is its mirror image."""
        rows = mirrored(window.row_off, window.row_end, self.work_shape[0])
        cols = mirrored(window.col_off, window.col_end, self.work_shape[1])
        box = (int(rows.min()), int(rows.max()) + 1, int(cols.min()), int(cols.max()) + 1)
        inside = self._read_box(reader, box, bands)
        if (box[1] - box[0], box[3] - box[2]) == (window.height, window.width):
            return inside
        rows, cols = rows - box[0], cols - box[2]
        return Raster(*(one.take(rows, -2).take(cols, -1) for one in (inside.pixels, inside.valid)))

    def _read_box(self, reader: SceneReader | StackReader, box: Box, bands: tuple[int, ...]) -> Raster:
        row_start, row_end = self.on_level(0, box[0], box[1])
        col_start, col_end = self.on_level(1, box[2], box[3])
        source = reader.read(
            Window(col_start, row_start, col_end - col_start, row_end - row_start), bands, level=self.level
        )
        if self.level_shape == self.work_shape:
            return source
        row_axis, col_axis = (Axis(self.level_shape[axis], self.work_shape[axis]) for axis in (0, 1))
        resampled = [
            Raster(*resample(one.pixels, one.valid, row_axis, col_axis, box, (row_start, col_start)))
            for one in source.dates()
        ]
        return resampled[0] if source.valid.ndim == 2 else Raster.stacked(resampled)

    def on_level(self, axis: int, start: int, end: int) -> tuple[int, int]:
        """The pixels of the level, from and up to, that pixels ``start`` to ``end`` of the work grid are made from."""
        if self.level_shape == self.work_shape:
            return start, end
        return Axis(self.level_shape[axis], self.work_shape[axis]).span(start, end)


def work_grid(levels: tuple[tuple[int, int], ...], factor: float) -> WorkGrid:
    """The work grid whose pixels are ``factor`` times as large as those of the scene with these levels (row, col)."""
    rows, cols = (max(1, round(size / factor)) for size in levels[0])
    level = nearest_level(levels, (rows, cols))
    return WorkGrid(levels[0], (rows, cols), level, levels[level])


def near_work_grid(levels: tuple[tuple[int, int], ...], factor: float) -> WorkGrid:
    """As ``work_grid``, but an overview as it is where its pixels are within 1 % of the wanted size.

    Overviews of odd sizes lack a part of a pixel, and the next larger one would be read in their stead.
    """
    exact = work_grid(levels, factor)
    for level, shape in enumerate(levels):
        if all(abs(have - want) <= 0.01 * want for have, want in zip(shape, exact.work_shape, strict=True)):
            return WorkGrid(levels[0], shape, level, shape)
    return exact


def nearest_level(levels: tuple[tuple[int, int], ...], work: tuple[int, int]) -> int:
    """The smallest level that has at least the pixels of the work grid along both axes."""
    fitting = [index for index, (rows, cols) in enumerate(levels) if rows >= work[0] and cols >= work[1]]
    return fitting[-1] if fitting else 0

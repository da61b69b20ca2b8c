"""Cutting a scene into windows so that the mask does not depend on the cut: the overlap-tile strategy, exact.

Two grids are involved: the scene's own, on which masks are written, and the work grid at the bundle's resolution, on which
the network runs (often they are the same). A write window on the scene needs a core on the work grid, aligned to the
network's stride; the core needs ``margin`` more pixels on every side; outside the scene they are mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geoseg.raster.geotiff import SceneReader
from geoseg.raster.raster import Raster
from geoseg.raster.resample import Axis, mirrored, resample
from geoseg.raster.stack import StackReader
from geoseg.raster.window import Window


@dataclass(frozen=True, slots=True)
class Stitching:
    """How write windows of a scene relate to cores on the work grid.

    ``scene_shape`` and ``work_shape`` are (row, col); ``level`` is the overview the scene is read from (0 = full size)
    and ``level_shape`` its size; ``stride`` and ``margin`` are the network's.
    """

    scene_shape: tuple[int, int]
    work_shape: tuple[int, int]
    level: int
    level_shape: tuple[int, int]
    stride: int
    margin: int

    @property
    def is_native(self) -> bool:
        """Whether the network runs on the scene's own pixels."""
        return self.scene_shape == self.work_shape

    def core(self, write: Window) -> Window:
        """The core on the work grid for a write window: multiples of the stride that cover all it is made from."""
        row_off, height = self._core_axis(0, write.row_off, write.row_end)
        col_off, width = self._core_axis(1, write.col_off, write.col_end)
        return Window(col_off, row_off, width, height)

    def _core_axis(self, axis: int, start: int, end: int) -> tuple[int, int]:
        low, high = self.to_scene(axis).span(start, end)
        low = low // self.stride * self.stride
        return low, -(-(high - low) // self.stride) * self.stride

    def to_scene(self, axis: int) -> Axis:
        """The resampling from the work grid to the scene along rows (0) or columns (1)."""
        return Axis(self.work_shape[axis], self.scene_shape[axis])

    def read_core(self, reader: SceneReader | StackReader, core: Window, bands: tuple[int, ...]) -> Raster:
        """Pixels and validity of a core and the margin around it, on the work grid, mirrored outside the scene."""
        around = core.grown(self.margin)
        rows = mirrored(around.row_off, around.row_end, self.work_shape[0])
        cols = mirrored(around.col_off, around.col_end, self.work_shape[1])
        box = (int(rows.min()), int(rows.max()) + 1, int(cols.min()), int(cols.max()) + 1)
        inside = self._read_box(reader, box, bands)
        if (box[1] - box[0], box[3] - box[2]) == (around.height, around.width):
            return inside
        rows, cols = rows - box[0], cols - box[2]
        return Raster(inside.pixels[:, rows[:, None], cols[None, :]], inside.valid[..., rows[:, None], cols[None, :]])

    def _read_box(
        self, reader: SceneReader | StackReader, box: tuple[int, int, int, int], bands: tuple[int, ...]
    ) -> Raster:
        if self.level_shape == self.work_shape:
            window = Window(box[2], box[0], box[3] - box[2], box[1] - box[0])
            return reader.read(window, bands, level=self.level)
        row_axis = Axis(self.level_shape[0], self.work_shape[0])
        col_axis = Axis(self.level_shape[1], self.work_shape[1])
        row_start, row_end = row_axis.span(box[0], box[1])
        col_start, col_end = col_axis.span(box[2], box[3])
        source = reader.read(
            Window(col_start, row_start, col_end - col_start, row_end - row_start), bands, level=self.level
        )
        resampled = [
            Raster(*resample(one.pixels, one.valid, row_axis, col_axis, box, (row_start, col_start)))
            for one in source.dates()
        ]
        return resampled[0] if source.valid.ndim == 2 else Raster.stacked(resampled)

    def read_valid(
        self, reader: SceneReader | StackReader, write: Window, around: Raster, bands: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """Valid pixels (row, col) of a write window, always those of the scene's own pixels."""
        if not self.is_native or self.level:
            return reader.read_valid(write, bands)
        margin = self.margin
        return around.valid_at_all[margin : margin + write.height, margin : margin + write.width]

    def taps(self, axis: int, start: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Work-grid indexes and weights (tap, pixel) that make the scene's pixels ``start`` to ``end`` of an axis."""
        return self.to_scene(axis).taps(start, end)


def work_shape(scene_shape: tuple[int, int], factor: float) -> tuple[int, int]:
    """Rows and columns of the work grid when its pixels are ``factor`` times as large as the scene's."""
    rows, cols = (max(1, round(size / factor)) for size in scene_shape)
    return rows, cols


def nearest_level(levels: tuple[tuple[int, int], ...], work: tuple[int, int]) -> int:
    """The smallest level that has at least the pixels of the work grid along both axes."""
    fitting = [index for index, (rows, cols) in enumerate(levels) if rows >= work[0] and cols >= work[1]]
    return fitting[-1] if fitting else 0

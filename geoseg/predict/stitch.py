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
from geoseg.raster.stack import StackReader
from geoseg.raster.window import Window
from geoseg.raster.work import WorkGrid


@dataclass(frozen=True, slots=True)
class Stitching(WorkGrid):
    """How write windows of a scene relate to cores on the work grid; ``stride`` and ``margin`` are the network's."""

    stride: int
    margin: int

    def core(self, write: Window) -> Window:
        """The core on the work grid for a write window: multiples of the stride that cover all it is made from."""
        row_off, height = self._core_axis(0, write.row_off, write.row_end)
        col_off, width = self._core_axis(1, write.col_off, write.col_end)
        return Window(col_off, row_off, width, height)

    def _core_axis(self, axis: int, start: int, end: int) -> tuple[int, int]:
        low, high = self.to_scene(axis).span(start, end)
        low = low // self.stride * self.stride
        return low, -(-(high - low) // self.stride) * self.stride

    def read_core(self, reader: SceneReader | StackReader, core: Window, bands: tuple[int, ...]) -> Raster:
        """Pixels and validity of a core and the margin around it, on the work grid, mirrored outside the scene."""
        return self.read(reader, core.grown(self.margin), bands)

    def read_valid(
        self, reader: SceneReader | StackReader, write: Window, around: Raster, bands: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """Valid pixels (row, col) of a write window, always those of the scene's own pixels."""
        if not self.is_native or self.level:
            return reader.read_valid(write, bands)
        core = self.core(write)
        top, left = write.row_off - core.row_off + self.margin, write.col_off - core.col_off + self.margin
        return around.valid_at_all[top : top + write.height, left : left + write.width]

    def settled(self, write: Window) -> Window | None:
        """The pixels of the level that are read for a write window and for none below it or to its right; None without any."""
        (top, bottom), (left, right) = (
            self._settled_axis(axis, *ends)
            for axis, ends in enumerate(((write.row_off, write.row_end), (write.col_off, write.col_end)))
        )
        return Window(left, top, right - left, bottom - top) if top < bottom and left < right else None

    def _settled_axis(self, axis: int, start: int, end: int) -> tuple[int, int]:
        first, following = (
            self.on_level(axis, low, low + 1)[0] if low < self.work_shape[axis] else self.level_shape[axis]
            for low in (max(0, self._core_axis(axis, at, at + 1)[0] - self.margin) for at in (start, end))
        )
        return first, following if end < self.scene_shape[axis] else self.level_shape[axis]

    def taps(self, axis: int, start: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Work-grid indexes and weights (tap, pixel) that make the scene's pixels ``start`` to ``end`` of an axis."""
        return self.to_scene(axis).taps(start, end)

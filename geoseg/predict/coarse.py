"""Coarse to fine: what a pass over a scene's overviews has to see of it, and which cells of the scene follow from that.

A scene has a fixed lattice of cells. A cell deserves full resolution when the coarse pass sees something in it or close to it;
that is asked of the same pixels of the coarse grid in whichever window the cell lies, and so no mask depends on the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from geoseg.predict.stitch import Stitching
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.raster import Raster
from geoseg.raster.stack import StackReader
from geoseg.raster.window import Window
from geoseg.raster.work import Box

CELL = 256
STRIP_ROWS = 64  # of the coarse grid, read at once
_CLOSE = 4  # pixels of the coarse grid around a cell; one would do for interpolation
_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class CoarsePass(Stitching):
    """The grid of a scene's coarse pass; the core of a write window holds all that decides on the window's cells."""

    def _core_axis(self, axis: int, start: int, end: int) -> tuple[int, int]:
        low, high = self._seen(axis, start, end)
        low = low // self.stride * self.stride
        return low, -(-(high - low) // self.stride) * self.stride

    def _seen(self, axis: int, start: int, end: int) -> tuple[int, int]:
        """The pixels [first, last) of the coarse grid in and close to the scene's pixels ``start`` to ``end``."""
        work, scene = self.work_shape[axis], self.scene_shape[axis]
        return max(0, start * work // scene - _CLOSE), min(work, -(-end * work // scene) + _CLOSE)

    def read_core(self, reader: SceneReader | StackReader, core: Window, bands: tuple[int, ...]) -> Raster:
        """See ``Stitching``. Without overviews it is many more pixels that are read, and so they come in strips."""
        around = core.grown(self.margin)
        strips = [
            self.read(reader, Window(around.col_off, row, around.width, min(STRIP_ROWS, around.row_end - row)), bands)
            for row in range(around.row_off, around.row_end, STRIP_ROWS)
        ]
        return Raster(
            np.concatenate([strip.pixels for strip in strips], axis=1),
            np.concatenate([strip.valid for strip in strips], axis=-2),
        )

    def cells(
        self, likely_hw: npt.NDArray[np.bool_], valid_hw: npt.NDArray[np.bool_], write: Window
    ) -> npt.NDArray[np.bool_]:
        """Which cells (row, col) of a write window deserve full resolution: something is likely there, and something valid.

        ``likely_hw`` are pixels of the window's core on the coarse grid, ``valid_hw`` those of the window itself.
        """
        core = self.core(write)
        for axis, start, end, off in (
            (0, write.row_off, write.row_end, core.row_off),
            (1, write.col_off, write.col_end, core.col_off),
        ):
            seen = (self._seen(axis, at, min(at + CELL, end)) for at in range(start, end, CELL))
            slices = [slice(first - off, last - off) for first, last in seen]
            likely_hw = np.stack([likely_hw.swapaxes(0, axis)[one].any(0) for one in slices], axis)
        return likely_hw & _any_by_cell(valid_hw)


def _any_by_cell(valid_hw: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    by_row = np.logical_or.reduceat(valid_hw, range(0, valid_hw.shape[0], CELL), axis=0)
    return np.asarray(np.logical_or.reduceat(by_row, range(0, valid_hw.shape[1], CELL), axis=1))


def by_pixel(cells: npt.NDArray[_T], shape: tuple[int, int]) -> npt.NDArray[_T]:
    """What is told of the cells (row, col) of a window of this shape, told of each of its pixels."""
    rows, cols = (np.arange(size) // CELL for size in shape)
    return cells[rows[:, None], cols[None, :]]


def cover(cells: npt.NDArray[np.bool_], rim: float) -> list[Box]:
    """Boxes of cells that hold all that deserve it and do not overlap, in a way that is cheap to compute.

    What a box costs are its cells with ``rim`` more along both axes, which is the context that a network computes.
    A box is cut in two as long as its parts, drawn tight, cost less than it does.
    """
    rows, cols = np.flatnonzero(cells.any(1)), np.flatnonzero(cells.any(0))
    if not len(rows):
        return []
    return _cut(cells, (int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1), rim)


def _cut(cells: npt.NDArray[np.bool_], box: Box, rim: float) -> list[Box]:
    top, bottom, left, right = box
    halves = [((top, row, left, right), (row, bottom, left, right)) for row in range(top + 1, bottom)]
    halves += [((top, bottom, left, col), (top, bottom, col, right)) for col in range(left + 1, right)]
    tight = [(_tight(cells, one), _tight(cells, other)) for one, other in halves]
    costs = [_cost(one, rim) + _cost(other, rim) for one, other in tight]
    if not costs or min(costs) >= _cost(box, rim):
        return [box]
    one, other = tight[int(np.argmin(costs))]
    return _cut(cells, one, rim) + _cut(cells, other, rim)


def _tight(cells: npt.NDArray[np.bool_], box: Box) -> Box:
    """A box without rows and columns at its sides that deserve nothing; there are some that do, or it was not tight before."""
    part = cells[box[0] : box[1], box[2] : box[3]]
    rows, cols = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    return box[0] + int(rows[0]), box[0] + int(rows[-1]) + 1, box[2] + int(cols[0]), box[2] + int(cols[-1]) + 1


def _cost(box: Box, rim: float) -> float:
    return (box[1] - box[0] + rim) * (box[3] - box[2] + rim)

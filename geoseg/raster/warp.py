"""A scene read on another scene's grid, bilinear, each pixel the same whatever the window it is read in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.errors import CRSError
from rasterio.warp import transform

from geoseg.errors import StackError
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.raster import Raster
from geoseg.raster.scene import Scene
from geoseg.raster.window import Window

_STEP = 32
_FLOAT = npt.NDArray[np.float64]


class WarpedReader:
    """Reads windows of ``onto``'s grid, or of its levels, from ``scene``; otherwise as ``SceneReader``.

    Places are transformed at every 32nd corner of pixels, counted from the grid's own, and are linear between them. A pixel is
    the weighted mean of the valid ones among its four neighbours at the scene's nearest level that is as fine; it is valid
    when these weigh half or more, and invalid outside the scene. Whole-number dtypes are rounded, half to even.
    """

    def __init__(self, scene: Scene, onto: Scene) -> None:
        self._reader = SceneReader(scene)
        self._scene = scene
        self._onto = onto

    @property
    def bytes_fetched(self) -> int:
        """See ``SceneReader``."""
        return self._reader.bytes_fetched

    def is_stored(self, window: Window, *, level: int = 0) -> bool:
        """See ``SceneReader``; of the scene's pixels under the window."""
        under = self._under(self._nodes(window, level), 0)
        return under is not None and self._reader.is_stored(under)

    def stored_bytes(self, window: Window, *, level: int = 0) -> int:
        """See ``SceneReader``; blocks under the edge of two windows may be counted for both."""
        under = self._under(self._nodes(window, 0), 0)
        return self._reader.stored_bytes(under, level=self._level(level)) if under is not None else 0

    def read_valid(self, window: Window, bands: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Validity (row, col)."""
        return self.read(window, bands).valid

    def read(self, window: Window, bands: tuple[int, ...], *, level: int = 0) -> Raster:
        """Pixels and validity of a window inside the level of ``onto``."""
        source = self._level(level)
        nodes = self._nodes(window, level)
        under = self._under(nodes, source)
        shape = (window.height, window.width)
        if under is None:
            return Raster(np.zeros((len(bands), *shape), self._scene.dtype), np.zeros(shape, np.bool_))
        rows, cols = (self._between(axis_nodes, window) for axis_nodes in self._to_level(nodes, source))
        return _sampled(self._reader.read(under, bands, level=source), under, rows, cols, self._scene.levels[source])

    def _level(self, level: int) -> int:
        """The scene's smallest level whose pixels are no larger than those of ``onto``'s level."""
        wanted_m = self._onto.grid.resolution_m * self._onto.grid.height / self._onto.levels[level][0]
        found = 0
        for index, (rows, _) in enumerate(self._scene.levels):
            if self._scene.grid.resolution_m * self._scene.grid.height / rows <= wanted_m * 1.001:
                found = index
        return found

    def _nodes(self, window: Window, level: int) -> tuple[_FLOAT, _FLOAT]:
        """Row and column in the scene (full size, corner of the first pixel 0) of the nodes around a window."""
        height, width = self._onto.levels[level]
        rows = _STEP * np.arange(window.row_off // _STEP, -(-window.row_end // _STEP) + 1, dtype=np.float64)
        cols = _STEP * np.arange(window.col_off // _STEP, -(-window.col_end // _STEP) + 1, dtype=np.float64)
        rows_at, cols_at = np.meshgrid(
            rows * (self._onto.grid.height / height), cols * (self._onto.grid.width / width), indexing="ij"
        )
        a, b, c, d, e, f = self._onto.grid.geotransform
        xs, ys = a * cols_at + b * rows_at + c, d * cols_at + e * rows_at + f
        if self._scene.grid.crs != self._onto.grid.crs:
            xs, ys = self._transformed(xs, ys)
        a, b, c, d, e, f = (~self._scene.grid.affine)[:6]
        return d * xs + e * ys + f, a * xs + b * ys + c

    def _transformed(self, xs: _FLOAT, ys: _FLOAT) -> tuple[_FLOAT, _FLOAT]:
        try:
            moved = transform(self._onto.grid.crs, self._scene.grid.crs, xs.ravel().tolist(), ys.ravel().tolist())
        except CRSError as error:
            raise StackError(
                f"{self._scene.id}: its CRS, {self._scene.grid.crs.to_string()}, cannot be reached from that of "
                f"{self._onto.id}, {self._onto.grid.crs.to_string()}"
            ) from error
        xs_moved, ys_moved = (np.asarray(one, np.float64).reshape(xs.shape) for one in moved[:2])
        return xs_moved, ys_moved

    def _to_level(self, nodes: tuple[_FLOAT, _FLOAT], source: int) -> tuple[_FLOAT, _FLOAT]:
        height, width = self._scene.levels[source]
        return nodes[0] * (height / self._scene.grid.height), nodes[1] * (width / self._scene.grid.width)

    def _under(self, nodes: tuple[_FLOAT, _FLOAT], source: int) -> Window | None:
        """The part of the scene's level under some nodes and a pixel around, None when there is none."""
        bounds = []
        for at, size in zip(self._to_level(nodes, source), self._scene.levels[source], strict=True):
            finite = at[np.isfinite(at)]
            if not finite.size or finite.min() > size + 1 or finite.max() < -1:
                return None
            bounds.append((max(0, int(np.floor(finite.min())) - 2), min(size, int(np.ceil(finite.max())) + 2)))
        (top, bottom), (left, right) = bounds
        return Window(left, top, right - left, bottom - top) if top < bottom and left < right else None

    @staticmethod
    def _between(nodes: _FLOAT, window: Window) -> _FLOAT:
        """Values (row, col) at the centres of a window's pixels, linear between the nodes around it."""
        for axis, start, end in ((0, window.row_off, window.row_end), (1, window.col_off, window.col_end)):
            at = (np.arange(start, end) + 0.5) / _STEP
            node = at.astype(np.int64)
            share = (at - node).reshape((-1, 1) if axis == 0 else (1, -1))
            first = node - start // _STEP
            nodes = np.take(nodes, first, axis) * (1 - share) + np.take(nodes, first + 1, axis) * share
        return nodes


def _sampled(source: Raster, under: Window, rows: _FLOAT, cols: _FLOAT, level_shape: tuple[int, int]) -> Raster:
    """Pixels and validity at places (row, col) of a level of which ``source`` holds the window ``under``."""
    height, width = level_shape
    inside = (rows >= 0) & (rows <= height) & (cols >= 0) & (cols <= width)  # NaN is not
    rows, cols = np.where(inside, rows - 0.5, under.row_off), np.where(inside, cols - 0.5, under.col_off)
    row, col = np.floor(rows).astype(np.int64), np.floor(cols).astype(np.int64)
    down, right = (rows - row).astype(np.float32), (cols - col).astype(np.float32)
    total = np.zeros((len(source.pixels), *rows.shape), np.float32)
    share = np.zeros(rows.shape, np.float32)
    for row_step, col_step, weight in (
        (0, 0, (1 - down) * (1 - right)),
        (0, 1, (1 - down) * right),
        (1, 0, down * (1 - right)),
        (1, 1, down * right),
    ):
        at = (
            np.clip(row + row_step, under.row_off, under.row_end - 1) - under.row_off,
            np.clip(col + col_step, under.col_off, under.col_end - 1) - under.col_off,
        )
        weight = weight * source.valid[at]  # noqa: PLW2901
        total += np.where(source.valid[at], source.pixels[:, at[0], at[1]], 0).astype(np.float32) * weight
        share += weight
    valid = inside & (share >= 0.5 - 1e-6)
    mean: npt.NDArray[Any] = total / np.where(valid, share, 1)
    if source.pixels.dtype.kind in "iu":
        limits = np.iinfo(source.pixels.dtype)
        mean = np.clip(np.rint(mean), limits.min, limits.max)
    return Raster(np.where(valid, mean, 0).astype(source.pixels.dtype), valid)

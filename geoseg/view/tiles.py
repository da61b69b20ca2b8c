"""From a GeoTIFF of any kind (striped, 16 bit, without overviews, rotated) to small pictures that a browser puts on a map.

Tiles have square pixels in units of the CRS and lie on the extent of the image, north up: level by level twice as fine, the last
one with the image's own pixels. What an image lacks in overviews is made once, from its smallest one, and kept in memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from geoseg.errors import BandError, SceneReadError
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.grid import Grid
from geoseg.raster.raster import Raster
from geoseg.raster.scene import Scene
from geoseg.raster.window import Window

TILE = 256
_REDUCED_SIDE = 2048
_MOST_REDUCED_PIXELS = 400 << 20  # of the smallest level, to be read whole once
_MOST_TILE_PIXELS = 16 << 20
_STRIP_PIXELS = 4 << 20
_STRETCH_SIDE = 512
_PERCENTILES = (2, 98)
_QUALITY = 85
Rgba = tuple[int, int, int, int]


@dataclass(frozen=True)
class TileGrid:
    """The pyramid of tiles over an image: its extent, and for each level, the coarsest first, the CRS units per pixel."""

    grid: Grid

    @cached_property
    def corners(self) -> list[tuple[float, float]]:
        """Where the image's corners are in its CRS, one after the other around it."""
        width, height = self.grid.width, self.grid.height
        a, b, c, d, e, f = self.grid.geotransform
        places = ((0, 0), (width, 0), (width, height), (0, height))
        return [(a * col + b * row + c, d * col + e * row + f) for col, row in places]

    @cached_property
    def extent(self) -> tuple[float, float, float, float]:
        """The box around the image in its CRS: xmin, ymin, xmax, ymax."""
        xs, ys = zip(*self.corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @cached_property
    def resolutions(self) -> tuple[float, ...]:
        """CRS units per pixel, halved from level to level down to the shorter side of an image pixel."""
        a, b, _, d, e, _ = self.grid.geotransform
        finest = min(math.hypot(a, d), math.hypot(b, e))
        xmin, ymin, xmax, ymax = self.extent
        num = max(0, math.ceil(math.log2(max(xmax - xmin, ymax - ymin) / finest / TILE) - 1e-9))
        return tuple(finest * 2**place for place in range(num, -1, -1))

    def has(self, level: int, col: int, row: int) -> bool:
        """Whether there is such a tile."""
        if not 0 <= level < len(self.resolutions):
            return False
        xmin, ymin, xmax, ymax = self.extent
        side = TILE * self.resolutions[level]
        return 0 <= col < math.ceil((xmax - xmin) / side) and 0 <= row < math.ceil((ymax - ymin) / side)

    def positions(self, level: int, col: int, row: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Where the centres of a tile's pixels (row, col) lie in the image: its columns and its rows, from its corner."""
        step = self.resolutions[level]
        along = (np.arange(TILE) + 0.5) * step
        xs = (self.extent[0] + col * TILE * step + along)[None, :]
        ys = (self.extent[3] - row * TILE * step - along)[:, None]
        a, b, c, d, e, f = tuple(~self.grid.affine)[:6]
        return a * xs + b * ys + c, d * xs + e * ys + f


class Picture:
    """Tiles of one image, in colours; any number of threads may ask for them.

    ``colors`` gives codes their colours (such an image is sampled, never averaged); without it the image is shown in the
    ``bands`` given: bytes as they are, other dtypes stretched between the 2nd and the 98th percentile of each band. Raises
    what reading a scene raises.
    """

    def __init__(self, scene: Scene, bands: tuple[int, ...], *, is_codes: bool = False) -> None:
        self.scene, self.bands, self.tile_grid = scene, bands, TileGrid(scene.grid)
        self._is_codes = is_codes
        self._reader = SceneReader(scene)
        self._lock = Lock()
        self._limits: npt.NDArray[np.float64] | None = None

    @cached_property
    def _factors(self) -> list[float]:
        """Image pixels per pixel of each level of the file, finest first."""
        return [self.scene.grid.width / cols for _, cols in self.scene.levels]

    @property
    def coarsest(self) -> float:
        """Image pixels per screen pixel up to which the image can be shown; beyond, too much would have to be read."""
        rows, cols = self.scene.levels[-1]
        if rows * cols <= _MOST_REDUCED_PIXELS:
            return math.inf
        return self._factors[-1] * math.isqrt(_MOST_TILE_PIXELS) / TILE / 2

    def tile(self, level: int, col: int, row: int, colors: Mapping[int, Rgba] | None = None) -> tuple[bytes, str]:
        """A picture of a tile and its media type; JPEG where all of it is data, otherwise a PNG with alpha.

        Raises SceneReadError for a tile that is not there or would need too many pixels, and what reading raises.
        """
        if not self.tile_grid.has(level, col, row):
            raise SceneReadError(f"{self.scene.id}: there is no such tile")
        cols, rows = self.tile_grid.positions(level, col, row)
        raster = self._sample(cols, rows, self.tile_grid.resolutions[level] / self.tile_grid.resolutions[-1])
        if self._is_codes:
            return _encoded(_palette(colors or {})[raster.pixels[0]], raster.valid)
        return _encoded(self._as_rgb(raster), raster.valid)

    def _sample(self, cols: npt.NDArray[np.float64], rows: npt.NDArray[np.float64], scale: float) -> Raster:
        """The pixels under the positions, each the mean of about ``scale`` x ``scale`` image pixels; outside is invalid."""
        grid = self.scene.grid
        inside = (cols >= 0) & (rows >= 0) & (cols < grid.width) & (rows < grid.height)
        if not inside.any():
            shape = inside.shape
            return Raster(np.zeros((len(self.bands), *shape), self.scene.dtype), np.zeros(shape, np.bool_))
        level = max((at for at, factor in enumerate(self._factors) if factor <= scale * 1.01), default=0)
        needs = scale / self._factors[level]
        reduced = None
        if max(self.scene.levels[-1]) > _REDUCED_SIDE and level == len(self._factors) - 1:
            reduced, factor = self._copy_for(scale)
        if reduced is None:
            height, width = self.scene.levels[level]
            across, down, block = width / grid.width, height / grid.height, 1 if self._is_codes else max(1, int(needs))
        else:
            height, width = reduced.valid.shape
            across, down, block = 1 / factor, 1 / factor, 1
        at_cols = np.minimum((np.where(inside, cols, 0) * across).astype(np.int64), width - 1)
        at_rows = np.minimum((np.where(inside, rows, 0) * down).astype(np.int64), height - 1)
        if reduced is not None:
            return Raster(reduced.pixels[:, at_rows, at_cols], reduced.valid[at_rows, at_cols] & inside)
        left, right = int(at_cols[inside].min()) // block * block, int(at_cols[inside].max()) // block * block + block
        top, bottom = int(at_rows[inside].min()) // block * block, int(at_rows[inside].max()) // block * block + block
        window = Window(left, top, min(right, width) - left, min(bottom, height) - top)
        if window.width * window.height > _MOST_TILE_PIXELS:
            raise SceneReadError(f"{self.scene.id}: has no overview for this scale; zoom in to see it")
        raster = _means(self._reader.read(window, self.bands, level=level), block)
        at_rows = np.clip((at_rows - top) // block, 0, raster.valid.shape[0] - 1)
        at_cols = np.clip((at_cols - left) // block, 0, raster.valid.shape[1] - 1)
        return Raster(raster.pixels[:, at_rows, at_cols], raster.valid[at_rows, at_cols] & inside)

    def _copy_for(self, scale: float) -> tuple[Raster | None, float]:
        """The copy in memory where it is fine enough for ``scale``, and the image pixels in one of its own."""
        block = self._copy_block
        factor = self._factors[-1] * block
        if factor > scale * 1.01:
            return None, factor
        with self._lock:
            return self._copy, factor

    @cached_property
    def _copy_block(self) -> int:
        return -(-max(self.scene.levels[-1]) // _REDUCED_SIDE)

    @cached_property
    def _copy(self) -> Raster | None:
        """The smallest level reduced to at most 2048 pixels a side, read in strips; None when it is too large to be read."""
        level, block = len(self.scene.levels) - 1, self._copy_block
        height, width = self.scene.levels[level]
        if height * width > _MOST_REDUCED_PIXELS:
            return None
        strip = block * max(1, _STRIP_PIXELS // (width * block))
        parts = [
            _means(
                self._reader.read(Window(0, row, width, min(strip, height - row)), self.bands, level=level),
                block,
                is_codes=self._is_codes,
            )
            for row in range(0, height, strip)
        ]
        return Raster(
            np.concatenate([one.pixels for one in parts], axis=1), np.concatenate([one.valid for one in parts])
        )

    def _as_rgb(self, raster: Raster) -> npt.NDArray[np.uint8]:
        pixels = raster.pixels
        if pixels.dtype != np.uint8:
            low, high = self._stretch()[:, :, None, None]
            share = (np.nan_to_num(pixels.astype(np.float64)) - low) / np.where(high > low, high - low, 1)
            pixels = (share.clip(0, 1) * 255).round().astype(np.uint8)
        if len(pixels) == 1:
            pixels = pixels.repeat(3, axis=0)
        return np.asarray(pixels.transpose(1, 2, 0))

    def _stretch(self) -> npt.NDArray[np.float64]:
        """Values (low and high, band) that become black and white, from the whole of the image where it can be had."""
        if self._limits is None:
            grid = self.scene.grid
            step = max(1.0, max(grid.width, grid.height) / _STRETCH_SIDE)
            if step > self.coarsest:  # a piece from the middle stands for the rest
                step, along = 1.0, np.arange(_STRETCH_SIDE) - _STRETCH_SIDE / 2
                cols, rows = np.meshgrid(grid.width / 2 + along, grid.height / 2 + along)
            else:
                cols, rows = np.meshgrid(np.arange(step / 2, grid.width, step), np.arange(step / 2, grid.height, step))
            raster = self._sample(cols, rows, step)
            seen = raster.pixels[:, raster.valid].astype(np.float64)
            found = np.percentile(seen, _PERCENTILES, axis=1) if seen.size else np.zeros((2, len(self.bands)))
            self._limits = np.asarray(found)
        return self._limits


def shown_bands(scene: Scene, named: tuple[str, ...], chosen: tuple[int, ...] | None) -> tuple[int, ...]:
    """The bands (from 0) to show of an image: the first three that the network sees, or else of those that it has, or one."""
    try:
        bands = scene.band_indexes(named, chosen)
    except BandError:
        bands = tuple(place for place, name in enumerate(scene.bands) if name != "alpha")
    return bands[:3] if len(bands) >= 3 else bands[:1]


def _means(raster: Raster, block: int, *, is_codes: bool = False) -> Raster:
    """Means of the valid pixels of ``block`` x ``block``, valid where half of them are; codes are sampled."""
    if block == 1:
        return raster
    if is_codes:
        middle = block // 2
        rows = np.minimum(np.arange(0, raster.valid.shape[0], block) + middle, raster.valid.shape[0] - 1)
        cols = np.minimum(np.arange(0, raster.valid.shape[1], block) + middle, raster.valid.shape[1] - 1)
        return Raster(raster.pixels[:, rows[:, None], cols], raster.valid[rows[:, None], cols])
    down, across = (np.arange(0, size, block) for size in raster.valid.shape)

    def summed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(np.add.reduceat(np.add.reduceat(values, down, axis=-2), across, axis=-1))

    count = summed(raster.valid.astype(np.int64))
    full = summed(np.ones(raster.valid.shape, np.int64))
    values = summed(np.where(raster.valid, raster.pixels, 0).astype(np.float64)) / np.maximum(count, 1)
    if raster.pixels.dtype.kind in "iu":
        values = values.round()
    return Raster(values.astype(raster.pixels.dtype), count * 2 >= full)


def _palette(colors: Mapping[int, Rgba]) -> npt.NDArray[np.uint8]:
    table = np.zeros((256, 4), np.uint8)
    for code, color in colors.items():
        table[code] = color
    return table


def _encoded(pixels: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_]) -> tuple[bytes, str]:
    """A picture of pixels (row, col, rgb or rgba) and its media type."""
    out = io.BytesIO()
    if pixels.shape[2] == 3 and valid.all():
        Image.fromarray(pixels).save(out, "JPEG", quality=_QUALITY)
        return out.getvalue(), "image/jpeg"
    alpha = pixels[..., 3:] if pixels.shape[2] == 4 else np.uint8(255)
    shown = np.concatenate([pixels[..., :3], np.where(valid[..., None], alpha, 0).astype(np.uint8)], axis=2)
    Image.fromarray(shown).save(out, "PNG", compress_level=1)
    return out.getvalue(), "image/png"

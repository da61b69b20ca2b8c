"""Published masks in, what is vectorised as one raster out: a scene by itself, or scenes that lie on one lattice of pixels."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import shapely
from numpy.typing import NDArray

from geoseg.pieces import roots
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.grid import Grid
from geoseg.raster.scene import Scene
from geoseg.raster.window import Window

NODATA = 255
_SAME = 0.01  # of a pixel: as far as two lattices may lie apart and be one
_OPEN_READERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A mask of a sheet: its header, that of its probabilities (None without any), and the place of its first pixel."""

    mask: Scene
    shares: Scene | None
    row_off: int = 0
    col_off: int = 0

    @property
    def window(self) -> Window:
        """Where it lies in the sheet."""
        return Window(self.col_off, self.row_off, self.mask.grid.width, self.mask.grid.height)


@dataclass(frozen=True)
class Sheet:
    """Masks that are vectorised as one raster on ``grid``: of those with data at a pixel the first counts.

    ``origin`` is the place (row, col) of the grid's first pixel on the lattice that begins where the coordinates of the CRS are
    0, so that a pixel has the same place there in whatever scene it was published.
    """

    grid: Grid
    origin: tuple[int, int]
    pieces: tuple[Piece, ...]

    @property
    def has_shares(self) -> bool:
        """Whether every mask has probabilities."""
        return all(piece.shares is not None for piece in self.pieces)

    @cached_property
    def _tree(self) -> shapely.STRtree:
        windows = [piece.window for piece in self.pieces]
        return shapely.STRtree([shapely.box(one.col_off, one.row_off, one.col_end, one.row_end) for one in windows])

    def read(
        self, window: Window, values: Sequence[int], *, shares: bool
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None] | None:
        """The classes (row, col) of a window, which may reach past the grid, and the probabilities (value, row, col) of ``values``.

        255 where nothing is known; None where no pixel has data. Probabilities are None unless ``shares`` asks for them. Raises
        SceneReadError, SceneChangedError, StoreError.
        """
        shape = (window.height, window.width)
        mask_hw = np.full(shape, NODATA, np.uint8)
        shares_vhw = np.full((len(values), *shape), NODATA, np.uint8) if shares else None
        box = shapely.box(window.col_off, window.row_off, window.col_end, window.row_end)
        for place in sorted(self._tree.query(box)):
            piece = self.pieces[place]
            inside = _common(window, piece.window)
            if inside is None:
                continue
            there = replace(inside, col_off=inside.col_off - piece.col_off, row_off=inside.row_off - piece.row_off)
            reader = _reader(piece.mask)
            if not reader.is_stored(there):
                continue
            raster = reader.read(there, (0,))
            read_hw = np.where(
                raster.valid, raster.pixels[0], np.uint8(NODATA)
            )  # blocks of nodata alone are not stored
            here = (
                slice(inside.row_off - window.row_off, inside.row_end - window.row_off),
                slice(inside.col_off - window.col_off, inside.col_end - window.col_off),
            )
            open_hw = (mask_hw[here] == NODATA) & (read_hw != NODATA)
            if not open_hw.any():
                continue
            mask_hw[here][open_hw] = read_hw[open_hw]
            if shares_vhw is not None and piece.shares is not None:
                read_vhw = _reader(piece.shares).read(there, tuple(values)).pixels
                shares_vhw[(slice(None), *here)][:, open_hw] = read_vhw[:, open_hw]
        return (mask_hw, shares_vhw) if bool((mask_hw != NODATA).any()) else None


def of_scene(mask: Scene, shares: Scene | None) -> Sheet:
    """One mask by itself."""
    return Sheet(mask.grid, _origin(mask.grid), (Piece(mask=mask, shares=shares),))


def join_scenes(masks: Sequence[tuple[Scene, Scene | None]]) -> list[list[Sheet]]:
    """For each lattice the fewest sheets that hold the masks on it (with their probabilities), the first of which count.

    Masks are on one lattice when they have one CRS and their pixels lie on each other to a hundredth of a pixel; they are in one
    sheet when they touch or overlap, directly or through others. Places on one lattice are told apart by ``Sheet.origin``.
    """
    lattices: dict[tuple[object, ...], list[tuple[Scene, Scene | None]]] = defaultdict(list)
    for mask, shares in masks:
        lattices[_lattice(mask.grid, lattices)].append((mask, shares))
    return [_islands(on_one) for on_one in lattices.values()]


def lattice_name(grid: Grid) -> str:
    """A short name for the lattice of a grid's pixels: the same for grids on one, but for those at the edge of a rounding."""
    a, b, c, d, e, f = grid.geotransform
    area = a * e - b * d
    phases = ((e * c - b * f) / area, (a * f - d * c) / area)
    told = [f"{step:.9g}" for step in (a, b, d, e)] + [f"{(phase + 0.005) % 1:.1f}" for phase in phases]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:8]


def _islands(masks: list[tuple[Scene, Scene | None]]) -> list[Sheet]:
    first_grid = masks[0][0].grid
    to_first = ~first_grid.affine
    places = [to_first * (mask.grid.geotransform[2], mask.grid.geotransform[5]) for mask, _ in masks]
    origins = np.array([(round(row), round(col)) for col, row in places], np.int64) + _origin(first_grid)
    shapes = np.array([(mask.grid.height, mask.grid.width) for mask, _ in masks], np.int64)
    (tops, lefts), (bottoms, rights) = origins.T, (origins + shapes).T
    boxes = shapely.box(lefts, tops, rights, bottoms)
    one, other = shapely.STRtree(boxes).query(boxes, predicate="intersects")
    island = roots(len(masks), one, other)
    found = []
    for first in np.unique(island):
        members = np.flatnonzero(island == first)
        top, left = int(tops[members].min()), int(lefts[members].min())
        pieces = tuple(
            Piece(
                mask=masks[place][0],
                shares=masks[place][1],
                row_off=int(tops[place]) - top,
                col_off=int(lefts[place]) - left,
            )
            for place in members
        )
        height, width = int(bottoms[members].max()) - top, int(rights[members].max()) - left
        corner = masks[members[0]][0].grid
        at = Window(-pieces[0].col_off, -pieces[0].row_off, width, height)
        found.append(Sheet(corner.crop(at), (top, left), pieces))
    return found


def _lattice(grid: Grid, known: dict[tuple[object, ...], list[tuple[Scene, Scene | None]]]) -> tuple[object, ...]:
    """The key of the lattice among those known that this grid lies on, or one of its own."""
    for key, members in known.items():
        if _on_one_lattice(members[0][0].grid, grid):
            return key
    return (grid.crs_wkt, grid.geotransform)


def _on_one_lattice(one: Grid, other: Grid) -> bool:
    if one.crs_wkt != other.crs_wkt:
        return False
    # A step that is off by so little is less than a hundredth of a pixel wrong over both grids.
    span = one.height + one.width + other.height + other.width
    steps = [(one.geotransform[place], other.geotransform[place]) for place in (0, 1, 3, 4)]
    size = max(abs(mine) for mine, _ in steps)
    if any(abs(mine - theirs) * span > _SAME * size for mine, theirs in steps):
        return False
    cols, rows = ~one.affine * (other.geotransform[2], other.geotransform[5])
    return bool(abs(cols - round(cols)) <= _SAME and abs(rows - round(rows)) <= _SAME)


def _origin(grid: Grid) -> tuple[int, int]:
    """The place (row, col) of a grid's first pixel, counted in its pixels from where the coordinates of the CRS are 0."""
    a, b, c, d, e, f = grid.geotransform
    area = a * e - b * d
    # A lattice that lies half a pixel off is one that rounding must not tear apart.
    return math.floor((a * f - d * c) / area + 0.5 + _SAME), math.floor((e * c - b * f) / area + 0.5 + _SAME)


def _common(one: Window, other: Window) -> Window | None:
    left, top = max(one.col_off, other.col_off), max(one.row_off, other.row_off)
    right, bottom = min(one.col_end, other.col_end), min(one.row_end, other.row_end)
    return Window(left, top, right - left, bottom - top) if right > left and bottom > top else None


@lru_cache(maxsize=_OPEN_READERS)
def _reader(scene: Scene) -> SceneReader:
    return SceneReader(scene)

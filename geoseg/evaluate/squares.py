"""The uncertainty and the mask of a scene in, its least certain squares out; tile by tile, so memory is flat.

Squares lie on a lattice of the scene's own pixels, half a square apart from its top-left corner on, the last ones flush with its
far edges: so no sum of one depends on how the scene was cut when it was predicted, or is when it is read.
Legend of axes: c classes, h rows, w columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geoseg.errors import SceneReadError
from geoseg.raster import store
from geoseg.raster.cog import NODATA
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.grid import Grid
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import ACROSS, Window

STEPS = 254  # uncertainty comes in steps of 1/254
_TILE = 1024


@dataclass(frozen=True, slots=True)
class Square:
    """A square of a scene, no larger than that: the sum of its uncertainty in steps, its valid pixels, and those of each class."""

    scene_id: str
    window: Window
    steps: int
    valid: int
    classes: tuple[int, ...]

    @property
    def score(self) -> float:
        """Mean uncertainty of the valid pixels, 0 to 1."""
        return self.steps / self.valid / STEPS

    @property
    def share_valid(self) -> float:
        """Valid pixels as a share of the square's."""
        return self.valid / (self.window.width * self.window.height)

    @property
    def place(self) -> tuple[float, str, int, int]:
        """Squares sorted by this are in the order of their worth, those of equal worth in that of their place."""
        return -self.score, self.scene_id, self.window.row_off, self.window.col_off


@dataclass(frozen=True, slots=True)
class Lattice:
    """Squares of ``chip`` pixels a side (an even number) that begin at multiples of ``step``, half of that.

    ``spacing``: two squares that are chosen have at least so many pixels between them; with 0 they may touch. ``min_valid``:
    the least share of a square's pixels that are valid.
    """

    chip: int
    spacing: int
    min_valid: float

    @property
    def step(self) -> int:
        """Pixels from a square to the next."""
        return self.chip // 2

    def places(self, size: int) -> list[int]:
        """Where squares begin along an axis."""
        last = max(0, size - self.chip)
        return [*range(0, last, self.step), last]

    @property
    def num_near(self) -> int:
        """How many places along an axis are too near to one of them at most, itself among them and one that is flush."""
        return 2 * -(-(self.chip + self.spacing) // self.step)

    def are_near(self, one: Square, other: Square) -> bool:
        """Whether two squares of a scene overlap or have too few pixels between them."""
        apart = self.chip + self.spacing
        return (
            abs(one.window.row_off - other.window.row_off) < apart
            and abs(one.window.col_off - other.window.col_off) < apart
        )


class UncertainScene:
    """Reads the uncertainty and the mask of one scene. Raises SceneError, StoreError; SceneReadError when they do not match."""

    def __init__(self, scene_id: str, *, uncertainty: str, mask: str, num_classes: int) -> None:
        scenes = [describe(SceneRef(scene_id, uri), ReadOptions()) for uri in (uncertainty, mask)]
        if scenes[0].grid != scenes[1].grid:
            raise SceneReadError(
                f"{scene_id}: its uncertainty and its mask do not lie on one grid; geoseg verify tells which is damaged"
            )
        self.scene_id, self.grid, self.num_classes = scene_id, scenes[0].grid, num_classes
        self._unsure, self._mask = (SceneReader(scene) for scene in scenes)

    def is_stored(self, window: Window) -> bool:
        """Whether the uncertainty has any data under a window, as far as its block index tells."""
        return self._unsure.is_stored(window)

    def read(self, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Steps of uncertainty and classes (row, col) of a window, both 255 where there is no data."""
        unsure, mask = self._unsure.read(window, (0,)), self._mask.read(window, (0,))
        if not np.array_equal(unsure.valid, mask.valid) or (mask.pixels[0][mask.valid] >= self.num_classes).any():
            raise SceneReadError(
                f"{self.scene_id}: {store.redact(self._mask.scene.uri)} is not the mask of its uncertainty; geoseg verify tells "
                "more"
            )
        unsure_hw, mask_hw = (np.where(one.valid, one.pixels[0], np.uint8(NODATA)) for one in (unsure, mask))
        return unsure_hw, mask_hw


def best_squares(scene: UncertainScene, lattice: Lattice, most: int) -> list[Square]:
    """Up to ``most`` squares of a scene, the least certain first: each the best of those that are not near a better one.

    Memory holds a tile of about 1024 pixels a side, or one and a half squares, and the squares that may still be among them.
    """
    best = _Best(most * lattice.num_near**2)  # each that is taken rules out so many at most, itself among them
    for rows, cols in _tiles(scene.grid, lattice):
        tile = _around(scene.grid, lattice, rows, cols)
        if scene.is_stored(tile):
            best.add(_squares_of(scene, lattice, tile, (rows, cols), best.least_score))
    chosen: list[Square] = []
    for one in best.sorted():
        if len(chosen) == most:
            break
        if not any(lattice.are_near(one, other) for other in chosen):
            chosen.append(one)
    return chosen


def _tiles(grid: Grid, lattice: Lattice) -> Iterator[tuple[list[int], list[int]]]:
    """Where the squares begin (rows, columns) that are looked at together.

    Tiles come in columns of a few side by side, so that the blocks under their common borders are decoded once.
    """
    side = max(2, _TILE // lattice.step)
    rows, cols = lattice.places(grid.height), lattice.places(grid.width)
    for first_col in range(0, len(cols), ACROSS * side):
        for row in range(0, len(rows), side):
            for col in range(first_col, min(first_col + ACROSS * side, len(cols)), side):
                yield rows[row : row + side], cols[col : col + side]


def _around(grid: Grid, lattice: Lattice, rows: list[int], cols: list[int]) -> Window:
    """The window over all squares that begin at these rows and columns."""
    height, width = (
        min(places[-1] + lattice.chip, size) - places[0] for places, size in ((rows, grid.height), (cols, grid.width))
    )
    return Window(cols[0], rows[0], width, height)


def _squares_of(
    scene: UncertainScene, lattice: Lattice, tile: Window, places: tuple[list[int], list[int]], least_score: float
) -> Iterator[Square]:
    """The squares of a tile that have enough valid pixels and at least this score."""
    unsure_hw, mask_hw = scene.read(tile)
    rows, cols = (np.array(each) - first for each, first in zip(places, (tile.row_off, tile.col_off), strict=True))
    size = min(lattice.chip, scene.grid.height), min(lattice.chip, scene.grid.width)
    valid_hw = mask_hw != NODATA
    valid = _sums(valid_hw, rows, cols, size)
    steps = _sums(np.where(valid_hw, unsure_hw, 0), rows, cols, size)
    classes_c = np.stack([_sums(mask_hw == value, rows, cols, size) for value in range(scene.num_classes)])
    enough = valid >= max(1.0, lattice.min_valid * size[0] * size[1])
    enough &= steps / np.maximum(valid, 1) / STEPS >= least_score
    for down, across in np.argwhere(enough).tolist():
        yield Square(
            scene_id=scene.scene_id,
            window=Window(places[1][across], places[0][down], size[1], size[0]),
            steps=int(steps[down, across]),
            valid=int(valid[down, across]),
            classes=tuple(classes_c[:, down, across].tolist()),
        )


def _sums(
    values_hw: NDArray[np.bool_] | NDArray[np.uint8],
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    size: tuple[int, int],
) -> NDArray[np.int64]:
    """Sums over windows of a size that begin at these rows and columns, the last of which ends where the values do.

    Values are summed up between the places where a window begins or ends, what is left by a table of sums (Crow 1984).
    """
    edges = [np.unique([starts, starts + side]) for starts, side in zip((rows, cols), size, strict=True)]
    by_row = np.add.reduceat(values_hw, edges[0][:-1], axis=0, dtype=np.int64)
    cells = np.add.reduceat(by_row, edges[1][:-1], axis=1)
    table = np.pad(cells.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    top, bottom = (table[np.searchsorted(edges[0], each)] for each in (rows, rows + size[0]))
    left, right = (np.searchsorted(edges[1], each) for each in (cols, cols + size[1]))
    sums: NDArray[np.int64] = bottom[:, right] - bottom[:, left] - top[:, right] + top[:, left]
    return sums


@dataclass(slots=True)
class _Best:
    """The best squares so far, in any order; ``least_score``: one with less is not among them."""

    limit: int
    least_score: float = 0.0
    _squares: list[Square] = field(default_factory=list)

    def add(self, squares: Iterator[Square]) -> None:
        self._squares += squares
        if len(self._squares) > 2 * self.limit:
            self._squares = self.sorted()[: self.limit]
            self.least_score = self._squares[-1].score

    def sorted(self) -> list[Square]:
        return sorted(self._squares, key=lambda one: one.place)

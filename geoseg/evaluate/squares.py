"""The uncertainty and the mask of a scene in, its least certain squares out; tile by tile, so memory is flat.

Squares lie on a lattice of the scene's own pixels, from its top-left corner, half a square apart: so no sum of one depends on
how the scene was cut when it was predicted, or is when it is read. Legend of axes: c classes, h rows, w columns.
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
    """A square of a scene, clipped to it: sum of the uncertainty in steps, valid pixels, and those of each class.

    ``whole`` is how many pixels a square in the middle of the scene has.
    """

    scene_id: str
    window: Window
    steps: int
    valid: int
    whole: int
    classes: tuple[int, ...]

    @property
    def score(self) -> float:
        """Mean uncertainty of the valid pixels, 0 to 1."""
        return self.steps / self.valid / STEPS

    @property
    def share_valid(self) -> float:
        """Valid pixels as a share of a whole square."""
        return self.valid / self.whole

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

    def places(self, size: int) -> int:
        """How many squares begin along an axis: as many as it takes to cover it, the last reaching less than a step past it."""
        return max(1, -(-size // self.step) - 1)

    @property
    def reach(self) -> int:
        """Squares that lie at most so many steps from another along both axes are too near to it."""
        return -(-(self.chip + self.spacing) // self.step) - 1

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

    Memory holds a tile of about 1024 pixels a side, or three steps, and the squares that may still be among them.
    """
    best = _Best(most * (2 * lattice.reach + 1) ** 2)  # each that is taken rules out so many at most, itself among them
    for window, squares in _tiles(scene.grid, lattice):
        if scene.is_stored(window):
            best.add(_squares_of(scene, lattice, window, squares, best.least_score))
    chosen: list[Square] = []
    for one in best.sorted():
        if len(chosen) == most:
            break
        if not any(lattice.are_near(one, other) for other in chosen):
            chosen.append(one)
    return chosen


def _tiles(grid: Grid, lattice: Lattice) -> Iterator[tuple[Window, tuple[int, int, int, int]]]:
    """Windows to read, and the squares of each that begin in it: first row, rows, first column, columns of the lattice.

    A tile takes one step more than the squares that begin in it, which reach into the next. Tiles come in columns of a few side
    by side, so that the blocks under their common borders are decoded once.
    """
    step = lattice.step
    side = max(2, _TILE // step)
    num_rows, num_cols = lattice.places(grid.height), lattice.places(grid.width)
    for first_col in range(0, num_cols, ACROSS * side):
        for row in range(0, num_rows, side):
            for col in range(first_col, min(first_col + ACROSS * side, num_cols), side):
                rows, cols = min(side, num_rows - row), min(side, num_cols - col)
                height = min((row + rows + 1) * step, grid.height) - row * step
                width = min((col + cols + 1) * step, grid.width) - col * step
                yield Window(col * step, row * step, width, height), (row, rows, col, cols)


def _squares_of(
    scene: UncertainScene, lattice: Lattice, tile: Window, squares: tuple[int, int, int, int], least_score: float
) -> Iterator[Square]:
    """The squares of a tile that have enough valid pixels and at least this score."""
    unsure_hw, mask_hw = scene.read(tile)
    row, rows, col, cols = squares
    valid_hw = mask_hw != NODATA
    valid = _sums(valid_hw, lattice.step, rows, cols)
    steps = _sums(np.where(valid_hw, unsure_hw, 0), lattice.step, rows, cols)
    classes_c = np.stack([_sums(mask_hw == value, lattice.step, rows, cols) for value in range(scene.num_classes)])
    height, width = scene.grid.height, scene.grid.width
    whole = min(lattice.chip, height) * min(lattice.chip, width)
    enough = (valid >= max(1.0, lattice.min_valid * whole)) & (steps / np.maximum(valid, 1) / STEPS >= least_score)
    for down, across in np.argwhere(enough).tolist():
        row_off, col_off = (row + down) * lattice.step, (col + across) * lattice.step
        size = min(lattice.chip, width - col_off), min(lattice.chip, height - row_off)
        yield Square(
            scene_id=scene.scene_id,
            window=Window(col_off, row_off, *size),
            steps=int(steps[down, across]),
            valid=int(valid[down, across]),
            whole=whole,
            classes=tuple(classes_c[:, down, across].tolist()),
        )


def _sums(values_hw: NDArray[np.bool_] | NDArray[np.uint8], step: int, rows: int, cols: int) -> NDArray[np.int64]:
    """Sums over squares of 2 x 2 cells of ``step`` pixels, of which ``rows`` x ``cols`` begin in a tile."""
    padded = np.zeros(((rows + 1) * step, (cols + 1) * step), values_hw.dtype)
    padded[: values_hw.shape[0], : values_hw.shape[1]] = values_hw
    cells: NDArray[np.int64] = padded.reshape(rows + 1, step, cols + 1, step).sum((1, 3), dtype=np.int64)
    return cells[:-1, :-1] + cells[1:, :-1] + cells[:-1, 1:] + cells[1:, 1:]


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

"""Windows: which pixels are read together, and in which order a grid is worked through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from geoseg.errors import ConfigError

BLOCK = 512
ACROSS = 4


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """A rectangle of pixels, counted from the grid's top-left corner; it may reach past the edges."""

    col_off: int
    row_off: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ConfigError(f"a window needs at least one pixel, got width={self.width} height={self.height}")

    @property
    def row_end(self) -> int:
        """One past the last row."""
        return self.row_off + self.height

    @property
    def col_end(self) -> int:
        """One past the last column."""
        return self.col_off + self.width

    def grown(self, pixels: int) -> Window:
        """The window with ``pixels`` more on every side."""
        return Window(self.col_off - pixels, self.row_off - pixels, self.width + 2 * pixels, self.height + 2 * pixels)


def num_windows(height: int, width: int, size: int) -> int:
    """How many windows ``plan_windows`` yields."""
    return -(-height // size) * -(-width // size)


def plan_windows(height: int, width: int, size: int, *, across: int = ACROSS) -> Iterator[Window]:
    """The write windows of a grid: squares of ``size`` pixels, clipped to the grid, each pixel in exactly one.

    ``size`` is 512 times a power of two, so that a window holds whole blocks of the mask and of its first overviews.
    The order keeps neighbours close in time, so that blocks decoded for one serve the next: from top to bottom in
    columns of ``across`` windows side by side, and there in squares of 4 x 4, so that some that follow each other have
    little edge. Nothing else depends on it.
    """
    check_window_size(size)
    rows, cols = -(-height // size), -(-width // size)
    for first_col in range(0, cols, across):
        end_col = min(first_col + across, cols)
        for first_row, col_of_square in product(range(0, rows, ACROSS), range(first_col, end_col, ACROSS)):
            square = (
                range(first_row, min(first_row + ACROSS, rows)),
                range(col_of_square, min(col_of_square + ACROSS, end_col)),
            )
            for row, col in product(*square):
                row_off, col_off = row * size, col * size
                yield Window(col_off, row_off, min(size, width - col_off), min(size, height - row_off))


def check_window_size(size: int) -> int:
    """``size`` itself; raises ConfigError unless it is 512, 1024, 2048, 4096 or 8192."""
    if size not in (512, 1024, 2048, 4096, 8192):
        raise ConfigError(f"the window must be 512, 1024, 2048, 4096 or 8192 pixels, got {size}")
    return size


class WindowSet:
    """Windows of one plan, known by their corners: a bit for each, a million in some hundred kilobytes."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def add(self, row_off: int, col_off: int) -> None:
        """Take the window at a corner in."""
        self._rows[row_off] = self._rows.get(row_off, 0) | 1 << col_off // BLOCK

    def has(self, row_off: int, col_off: int) -> bool:
        """Whether the window at a corner is in."""
        return bool(self._rows.get(row_off, 0) >> col_off // BLOCK & 1)

    def __len__(self) -> int:
        return sum(bits.bit_count() for bits in self._rows.values())

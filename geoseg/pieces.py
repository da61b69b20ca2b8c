"""From a boolean raster to its connected pieces, and from joined pairs to the groups that hang together. Knows numpy alone.

Legend of axes: h rows, w columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def connected(inside_hw: NDArray[np.bool_]) -> NDArray[np.int32]:
    """An instance raster: the pieces that hang together by the sides of pixels, from 1 in the order of their first pixel."""
    height, width = inside_hw.shape
    pitch = width + 1  # a column of ground keeps the rows apart
    edges = np.zeros(height * pitch + 1, np.int8)
    edges[1:].reshape(height, pitch)[:, :width] = inside_hw
    edges = np.diff(edges, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    # Run by run with those of the row above: which of them share a column.
    first = np.searchsorted(ends, starts - pitch, side="right")
    last = np.searchsorted(starts, ends - pitch, side="left")
    num_above = np.maximum(last - first, 0)
    below = np.repeat(np.arange(len(starts)), num_above)
    above = np.arange(len(below)) - np.repeat(num_above.cumsum() - num_above, num_above) + np.repeat(first, num_above)
    _, pieces = np.unique(roots(len(starts), above, below), return_inverse=True)
    numbers = np.zeros(2 * len(starts) + 1, np.int32)
    numbers[1::2] = pieces + 1
    bounds = np.zeros(2 * len(starts) + 2, np.int64)
    bounds[1:-1:2], bounds[2:-1:2], bounds[-1] = starts, ends, height * pitch
    return np.repeat(numbers, np.diff(bounds)).reshape(height, pitch)[:, :width]


def roots(num: int, one: NDArray[np.integer], other: NDArray[np.integer]) -> NDArray[np.intp]:
    """The lowest (num) of those that each of 0 to ``num - 1`` hangs together with; ``one`` and ``other`` are joined pairs."""
    root = np.arange(num)
    while True:
        low, high = np.minimum(root[one], root[other]), np.maximum(root[one], root[other])
        if np.array_equal(low, high):
            return root
        np.minimum.at(root, high, low)
        while not np.array_equal(root, shorter := root[root]):
            root = shorter

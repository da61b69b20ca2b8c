"""Masks of roads with known lines and widths, and their tracing in windows of any size."""

from __future__ import annotations

import itertools
import random

import numpy as np
from numpy.typing import NDArray

from geoseg.raster.window import Window
from geoseg.vector.graph import Graph
from geoseg.vector.roads import WindowRoads, join_roads, trace_roads
from geoseg.vector.skeleton import UNKNOWN, Reach

Corners = list[tuple[float, float]]


def drawn(shape: tuple[int, int], *roads: Corners, width: float) -> NDArray[np.uint8]:
    """A mask with 1 on pixels whose centres lie within half the width of roads given by corners (row, col)."""
    row, col = np.indices(shape, np.float64)
    mask_hw = np.zeros(shape, np.uint8)
    for corners in roads:
        for (row0, col0), (row1, col1) in itertools.pairwise(corners):
            down, across = row1 - row0, col1 - col0
            along = ((row - row0) * down + (col - col0) * across) / max(down**2 + across**2, 1e-9)
            along = np.clip(along, 0, 1)
            mask_hw[np.hypot(row - row0 - along * down, col - col0 - along * across) <= width / 2] = 1
    return mask_hw


def windows(shape: tuple[int, int], size: int) -> list[Window]:
    """Windows of any size that tile a scene."""
    height, width = shape
    return [
        Window(col, row, min(size, width - col), min(size, height - row))
        for row in range(0, height, size)
        for col in range(0, width, size)
    ]


def parts(
    mask_hw: NDArray[np.uint8],
    size: int,
    reach: Reach,
    *,
    shares_hw: NDArray[np.uint8] | None = None,
    values: tuple[int, ...] = (1,),
) -> list[WindowRoads]:
    """The roads of each window of a scene, whose outside is unknown."""
    halo = reach.halo
    wide_hw = np.pad(mask_hw, halo, constant_values=UNKNOWN)
    shares_wide_hw = None if shares_hw is None else np.pad(shares_hw, halo, constant_values=UNKNOWN)
    found = []
    for window in windows(mask_hw.shape, size):
        rows = slice(window.row_off, window.row_end + 2 * halo)
        cols = slice(window.col_off, window.col_end + 2 * halo)
        shares = None if shares_wide_hw is None else shares_wide_hw[rows, cols]
        found.append(trace_roads(wide_hw[rows, cols], shares, window, values=values, reach=reach))
    return found


def traced(mask_hw: NDArray[np.uint8], size: int, reach: Reach, *, seed: int | None = None, **options: object) -> Graph:
    """The graph of a scene cut in windows of ``size``, put together in the order of a seed."""
    found = parts(mask_hw, size, reach, **options)
    if seed is not None:
        random.Random(seed).shuffle(found)
    return join_roads(found, reach)

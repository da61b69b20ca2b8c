"""Shapes in, the pixels whose centres lie in them out, for any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import DTypeLike, NDArray
from rasterio.features import rasterize

# rasterize silences a warning by way of the filters of the whole process, which threads would restore in each other's midst.
_BURNING = threading.Lock()


def burn(
    shapes: Iterable[tuple[Any, int]],
    shape: tuple[int, int],
    *,
    affine: Affine = Affine.identity(),  # noqa: B008 (it cannot be changed)
    fill: int = 0,
    dtype: DTypeLike,
) -> NDArray[Any]:
    """An array (row, col) of the number beside each shape, ``fill`` where there is none; of several shapes the last one's.

    Shapes are shapely's. ``affine`` brings pixels to the coordinates of the shapes; a pixel counts by its centre.
    """
    pairs = list(shapes)
    with _BURNING:
        return np.asarray(rasterize(pairs, out_shape=shape, fill=fill, transform=affine, dtype=np.dtype(dtype).name))

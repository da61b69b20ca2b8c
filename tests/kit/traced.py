"""An oracle for polygons: GDAL's, of whole masks, from a process of its own, for geoseg takes the driver it needs out of ours."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

_SCRIPT = """
import pickle, sys, shapely
from rasterio.features import shapes
masks = pickle.load(sys.stdin.buffer)
outline = lambda one: shapely.to_wkb(shapely.geometry.shape(one))
traced = [[(outline(one), int(value)) for one, value in shapes(mask, connectivity=4)] for mask in masks]
pickle.dump(traced, sys.stdout.buffer)
"""


def traced_by_gdal(
    masks: Sequence[NDArray[np.uint8]], values: Sequence[int]
) -> list[list[tuple[int, shapely.Polygon]]]:
    """The polygons of the ``values`` in each mask, in pixels, with their value; in the order of (value, first pixel)."""
    every_driver = {name: value for name, value in os.environ.items() if name != "GDAL_SKIP"}
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=pickle.dumps(list(masks)),
        stdout=subprocess.PIPE,
        check=True,
        env=every_driver,
    )
    found = [
        [(value, shapely.from_wkb(wkb)) for wkb, value in some if value in values]
        for some in pickle.loads(ran.stdout)  # noqa: S301 - our own script's
    ]
    return [sorted(some, key=lambda one: (one[0], first_vertex(one[1]))) for some in found]


def first_vertex(polygon: shapely.Polygon) -> tuple[float, float]:
    """The least (row, col) of a polygon in pixels, which is its first pixel."""
    return min((y, x) for x, y in polygon.exterior.coords)

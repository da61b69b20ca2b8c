"""Burning: the pixels whose centres lie in a shape, and warnings as they were, however many threads burn."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from affine import Affine
from numpy.testing import assert_array_equal
from shapely.geometry import box

from geoseg.raster.burn import burn


def test_a_pixel_has_the_number_of_the_last_shape_around_its_centre() -> None:
    shapes = [(box(0, 0, 4, 4), 7), (box(2.6, 0, 4, 8), 9)]
    burnt = burn(shapes, (3, 4), affine=Affine.scale(2), fill=-1, dtype=np.int32)
    assert burnt.dtype == np.int32
    assert_array_equal(burnt, [[7, 9, -1, -1], [7, 9, -1, -1], [-1, 9, -1, -1]])


def test_threads_that_burn_at_once_leave_the_filters_of_warnings_as_they_were() -> None:
    before = list(warnings.filters)

    def some(_: int) -> None:
        for _ in range(20):
            burn([(box(0, 0, 100, 100), 1)], (200, 200), dtype=np.uint8)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(some, range(8)))
    assert list(warnings.filters) == before

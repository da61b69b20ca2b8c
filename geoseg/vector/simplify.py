"""Polygons along the sides of pixels in, smoother ones out, without gaps between those that touch.

Visvalingam and Whyatt's method on coverages (GEOS): of the corners of an outline the one whose triangle with its neighbours is
smallest goes first, as long as it is under the square of the tolerance and no other vertex of the coverage lies in it; what two
polygons share stays shared.
"""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.errors import GEOSException


def simplify_groups(
    polygons: NDArray[np.object_], group: NDArray[np.integer], tolerance_px: float
) -> NDArray[np.object_]:
    """Polygons in pixels, those of a ``group`` side by side in it, simplified with a tolerance that is the root of an area.

    Each group is simplified by itself, so nothing depends on which others are in the call. One of which any polygon would vanish,
    break apart or become invalid stays as it is, and so does a rectangle that touches none: there is nothing to smooth. Corners
    of neighbouring outlines lie in different places only where the polygons touch; a polygon may come to lie over another that it
    did not touch, where a notch is filled: from tolerances above 1 on.
    """
    if not len(polygons):
        return polygons
    simplified = polygons.copy()
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    ends = np.append(starts[1:], len(group))
    is_rectangle = (shapely.get_num_coordinates(polygons) == 5) & (shapely.get_num_interior_rings(polygons) == 0)
    is_done = is_rectangle[starts] & (ends == starts + 1)
    for start, end in zip(starts[~is_done].tolist(), ends[~is_done].tolist(), strict=True):
        try:
            simplified[start:end] = shapely.coverage_simplify(polygons[start:end], tolerance_px)
        except GEOSException:
            continue
    good = (shapely.get_type_id(simplified) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(simplified)
    good &= shapely.is_valid(simplified) & (
        shapely.get_num_interior_rings(simplified) == shapely.get_num_interior_rings(polygons)
    )
    is_good = np.repeat(np.logical_and.reduceat(good, starts), ends - starts)
    return np.where(is_good, simplified, polygons)

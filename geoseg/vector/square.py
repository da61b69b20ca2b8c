"""Outlines of buildings in, the same with right angles out, by the library buildingregulariser."""

from __future__ import annotations

import warnings

import geopandas
import numpy as np
import shapely
from buildingregulariser import regularize_geodataframe
from numpy.typing import NDArray


def square(polygons: NDArray[np.object_], pixel_size_m: tuple[float, float]) -> NDArray[np.object_]:
    """Polygons in pixels with the sides of each parallel or at right angles to its main direction, in pixels again.

    Angles are those on the ground: pixels are stretched by ``pixel_size_m`` (across, down), each polygon counted from its own
    first vertex. The library takes them one by one, so nothing depends on which others are in the call. What it makes invalid,
    leaves empty, breaks apart or robs of a hole comes back as it was. It takes some milliseconds for each.
    """
    if not len(polygons):
        return polygons
    scale = np.array(pixel_size_m)
    counts = shapely.get_num_coordinates(polygons)
    xy = shapely.get_coordinates(polygons)
    first = xy[np.cumsum(counts) - counts]
    local = shapely.set_coordinates(polygons.copy(), (xy - np.repeat(first, counts, axis=0)) * scale)
    # No coarser than a pixel: the outline is simplified already.
    tolerance_m = float(np.sqrt(scale.prod()))
    frame = geopandas.GeoDataFrame({"place": np.arange(len(polygons))}, geometry=local)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it could not do comes back as it was
        made = regularize_geodataframe(
            frame, parallel_threshold=2 * tolerance_m, simplify_tolerance=tolerance_m, allow_circles=False, num_cores=1
        )
    place, outline = made["place"].to_numpy(), np.asarray(made.geometry.array)
    is_one = np.bincount(place, minlength=len(polygons))[place] == 1
    is_good = is_one & (shapely.get_type_id(outline) == shapely.GeometryType.POLYGON) & shapely.is_valid(outline)
    is_good &= shapely.get_num_interior_rings(outline) == shapely.get_num_interior_rings(polygons[place])
    place, outline = place[is_good], outline[is_good]
    moved = first[np.repeat(place, shapely.get_num_coordinates(outline))]
    squared = polygons.copy()
    squared[place] = shapely.set_coordinates(outline, shapely.get_coordinates(outline) / scale + moved)
    return squared

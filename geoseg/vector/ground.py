"""Polygons in any CRS in, their areas on the ground out.

Edges are geodesics of WGS 84 from vertex to vertex, as for pyproj.Geod. Of short edges the area is that of great circles on the
sphere with the ellipsoid's own area (the authalic sphere; J. P. Snyder, Map Projections - A Working Manual, 1987, equations 3-11 to
3-13): latitudes are changed so that no area is, and what is left is under 3e-7 of it while edges are shorter than 1 km.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray
from pyproj.exceptions import ProjError

_GEOD = pyproj.Geod(ellps="WGS84")
_E2 = _GEOD.es
_E = float(np.sqrt(_E2))
_SHORT_M = 1000.0
_POLAR = 89.0


def areas_m2(polygons: NDArray[np.object_], crs_wkt: str) -> NDArray[np.float64] | None:
    """The geodesic area of each polygon (without its holes) in m2; None where the CRS has no longitude and latitude there."""
    to_lonlat = _to_lonlat(crs_wkt)
    if not len(polygons):
        return np.zeros(0)
    if to_lonlat is None:
        return None
    _, xy, (ring_ends, polygon_rings) = shapely.to_ragged_array(polygons, include_z=False, include_m=False)
    lon, lat = to_lonlat.transform(xy[:, 0], xy[:, 1])
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        return None
    starts, lengths = ring_ends[:-1], np.diff(ring_ends)
    ring_areas = np.abs(_ring_areas(lon, lat, starts, lengths))
    is_hole = np.ones(len(starts), np.bool_)
    is_hole[polygon_rings[:-1]] = False
    areas: NDArray[np.float64] = np.add.reduceat(np.where(is_hole, -ring_areas, ring_areas), polygon_rings[:-1])
    too_long = np.logical_or.reduceat(_is_long(lon, lat, starts), polygon_rings[:-1])
    for place in np.flatnonzero(too_long):
        rings = range(polygon_rings[place], polygon_rings[place + 1])
        each = [
            abs(_GEOD.polygon_area_perimeter(*(some[ring_ends[k] : ring_ends[k + 1]] for some in (lon, lat)))[0])
            for k in rings
        ]
        areas[place] = each[0] - sum(each[1:])
    return areas


@lru_cache(maxsize=64)
def _to_lonlat(crs_wkt: str) -> pyproj.Transformer | None:
    try:
        return pyproj.Transformer.from_crs(pyproj.CRS.from_wkt(crs_wkt), "EPSG:4326", always_xy=True)
    except ProjError:
        return None


def _is_long(lon: NDArray[np.float64], lat: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a ring has an edge too long, or lies too near to a pole, for the sphere."""
    east = np.radians(_turn(np.diff(lon, append=lon[-1:]))) * np.cos(np.radians(lat))
    north = np.radians(np.diff(lat, append=lat[-1:]))
    lengths_m = np.hypot(east, north) * _GEOD.a
    lengths_m[starts[1:] - 1] = 0  # from the end of a ring to the next one
    worst: NDArray[np.bool_] = np.logical_or.reduceat((lengths_m > _SHORT_M) | (np.abs(lat) > _POLAR), starts)
    return worst


def _ring_areas(
    lon: NDArray[np.float64], lat: NDArray[np.float64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The signed area of closed rings in m2.

    Under an edge lies the spherical excess E, tan(E / 2) = tan(d / 2) sin(m) / cos(h / 2), with d the step in longitude, h that in
    latitude and m the latitude in its middle. Of E only what differs from d sin(first latitude) is summed, for over a ring that
    adds up to nothing; so small areas keep their digits.
    """
    authalic, radius2_m2 = _authalic(lat)
    first = np.repeat(authalic[starts], lengths)
    step = np.radians(_turn(np.diff(lon, append=lon[-1:])))
    nearer = np.diff(authalic, append=authalic[-1:])
    middle = authalic + nearer / 2
    slope = np.sin(middle) / np.cos(nearer / 2)
    above = 2 * np.cos((middle + first) / 2) * np.sin((middle - first) / 2) + np.sin(middle) * (
        1 / np.cos(nearer / 2) - 1
    )
    # 2 atan(slope tan(step / 2)) - slope step, to the fifth power of the step: short edges have no longer ones.
    bent = slope * step**3 / 12 * (1 - slope**2)
    excess = step * above + bent
    excess[starts[1:] - 1] = 0
    excess[-1] = 0
    areas: NDArray[np.float64] = np.add.reduceat(excess, starts) * radius2_m2
    return areas


def _authalic(lat: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Authalic latitudes in radians and the square of the authalic sphere's radius in m2."""

    def q(sin: NDArray[np.float64]) -> NDArray[np.float64]:
        return (1 - _E2) * (sin / (1 - _E2 * sin**2) + np.arctanh(_E * sin) / _E)

    pole = q(np.ones(1))
    ratio = np.clip(q(np.sin(np.radians(lat))) / pole, -1, 1)
    return np.arcsin(ratio), float(_GEOD.a**2 * pole[0] / 2)


def _turn(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Steps in longitude, the short way round."""
    return np.where(np.abs(degrees) <= 180, degrees, (degrees + 180) % 360 - 180)

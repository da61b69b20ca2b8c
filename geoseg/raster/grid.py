"""The grid of a raster: where its pixels lie on the ground and how large they are."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from affine import Affine
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform as transform_points

from geoseg.errors import GeoreferenceError
from geoseg.raster.window import Window

_WGS84_RADIUS_M = 6378137.0
_WGS84_E2 = 6.69437999014e-3
_EDGE_POINTS = 21
_LARGEST = 1e12


@dataclass(frozen=True)
class Grid:
    """CRS (as WKT), geotransform (pixel corner to CRS) and size of a raster. Raises GeoreferenceError when made."""

    crs_wkt: str
    geotransform: tuple[float, float, float, float, float, float]
    height: int
    width: int

    def __post_init__(self) -> None:
        a, b, _, d, e, _ = self.geotransform
        if not all(math.isfinite(value) for value in self.geotransform):
            raise GeoreferenceError(f"the geotransform has values that are not finite: {self.geotransform}")
        longest = max(abs(value) for value in (a, b, d, e))
        if longest and not 1 / _LARGEST < longest < _LARGEST:
            raise GeoreferenceError(f"the geotransform is out of all proportion: {self.geotransform}")
        if longest == 0 or abs((a / longest) * (e / longest) - (b / longest) * (d / longest)) <= 1e-12:
            raise GeoreferenceError(f"the geotransform is singular, pixels have no area: {self.geotransform}")
        if min(self.height, self.width) < 1:
            raise GeoreferenceError(f"the raster has no pixels: {self.width} x {self.height}")

    @property
    def affine(self) -> Affine:
        """The geotransform as an ``Affine``."""
        return Affine(*self.geotransform)

    @cached_property
    def crs(self) -> CRS:
        """The CRS, parsed."""
        return CRS.from_wkt(self.crs_wkt)

    def crop(self, window: Window) -> Grid:
        """The grid of a window of this one."""
        moved = self.affine * Affine.translation(window.col_off, window.row_off)
        return Grid(self.crs_wkt, (moved.a, moved.b, moved.c, moved.d, moved.e, moved.f), window.height, window.width)

    @cached_property
    def pixel_size_m(self) -> tuple[float, float]:
        """Ground length in metres of a step of one column and of one row at the centre of the grid.

        On Earth it is measured on the WGS 84 ellipsoid, so that Web Mercator's stretching is undone; a grid of another
        body, or one whose centre has no longitude or lies so far out that a step is lost in rounding, is taken at the unit
        of its CRS.
        """
        row, col = self.height / 2, self.width / 2
        lonlat = self.to_lonlat([col, col + 1, col], [row, row, row + 1])
        if lonlat is not None and np.isfinite(lonlat).all():
            lon, lat = lonlat
            sin2 = math.sin(math.radians(lat[0])) ** 2
            radius_m = math.radians(1) * _WGS84_RADIUS_M
            north_m = radius_m * (1 - _WGS84_E2) / (1 - _WGS84_E2 * sin2) ** 1.5
            east_m = radius_m / math.sqrt(1 - _WGS84_E2 * sin2) * math.cos(math.radians(lat[0]))
            steps = [((lon[i] - lon[0] + 540) % 360 - 180, lat[i] - lat[0]) for i in (1, 2)]
            across, down = (math.hypot(dlon * east_m, dlat * north_m) for dlon, dlat in steps)
            if across and down:
                return across, down
        a, b, _, d, e, _ = self.geotransform
        unit_m = self.crs.units_factor[1] * (_WGS84_RADIUS_M if self.crs.is_geographic else 1)
        return math.hypot(a, d) * unit_m, math.hypot(b, e) * unit_m

    @property
    def resolution_m(self) -> float:
        """Side in metres of a square with the ground area of a pixel at the grid's centre."""
        across, down = self.pixel_size_m
        return math.sqrt(across * down)

    def to_lonlat(self, cols: list[float], rows: list[float]) -> Any:
        """Longitudes and latitudes (2, n) in degrees of pixel corners; None when the CRS is not of the Earth."""
        a, b, c, d, e, f = self.geotransform
        col, row = np.asarray(cols, dtype=np.float64), np.asarray(rows, dtype=np.float64)
        xs, ys = a * col + b * row + c, d * col + e * row + f
        try:
            lon, lat = transform_points(self.crs, CRS.from_epsg(4326), list(xs), list(ys))
        except (RasterioError, CRSError, CPLE_BaseError):
            return None
        return np.array([lon, lat])

    def outline(self, margin: tuple[float, float] = (0.0, 0.0)) -> tuple[list[float], list[float]]:
        """Columns and rows of the corners and of 19 points on each edge, in turn, the first not repeated.

        ``margin`` is how many columns and rows outside the edges they lie.
        """
        along = np.linspace(0, 1, _EDGE_POINTS)
        left, right = -margin[0], self.width + margin[0]
        top, bottom = -margin[1], self.height + margin[1]
        corners = [(left, top), (left, bottom), (right, bottom), (right, top), (left, top)]
        cols: list[float] = []
        rows: list[float] = []
        for (col, row), (next_col, next_row) in itertools.pairwise(corners):
            cols += list(col + along[:-1] * (next_col - col))
            rows += list(row + along[:-1] * (next_row - row))
        return cols, rows

    def outline_lonlat(self) -> list[tuple[float, float]] | None:
        """The footprint's ring in degrees, each edge in 20 steps, longitudes continuous (they may pass 180).

        None when a part of the edge has no longitude and latitude (another body, a full disk seen from space).
        """
        cols, rows = self.outline()
        lonlat = self.to_lonlat(cols, rows)
        if lonlat is None or not np.isfinite(lonlat).all():
            return None
        lon = lonlat[0] if self.crs.is_geographic else np.unwrap(lonlat[0], period=360)
        ring = [(float(x), float(y)) for x, y in zip(lon, lonlat[1], strict=True)]
        return [*ring, ring[0]]

"""An area of interest: polygons of a GeoJSON file, placed on a scene's pixels."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform as transform_points
from shapely import affinity
from shapely.geometry import box, shape

from geoseg.errors import ConfigError, GeoreferenceError, StopError
from geoseg.raster import store
from geoseg.raster.burn import burn
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window

_SNAP = 256.0
_TURN = 360.0
_MARGIN = 0.05
_MARGIN_PX = 3
_LEAST_TURN = 1e-3  # of a scene's extent; less is rounding
_FIRST_EDGES = 16
_MOST_EDGES = 1 << 19


@dataclass(frozen=True, slots=True)
class AreaFile:
    """The file of an area of interest in the version, by its SHA-256, that a run was started with."""

    uri: str
    sha256: str


def find_area(uri: str) -> AreaFile:
    """The file as it is now. Raises ConfigError when it is missing or holds no polygon that has a place."""
    try:
        data = store.read(store.normalize_uri(uri))
    except store.ObjectMissingError as error:
        raise ConfigError(f"the area of interest {error}") from error
    AreaOfInterest(uri, data)
    return AreaFile(uri, hashlib.sha256(data).hexdigest())


@lru_cache(maxsize=4)
def load_area(file: AreaFile) -> AreaOfInterest:
    """The area in that very version. Raises StopError when the file was changed or removed since."""
    try:
        data = store.read(store.normalize_uri(file.uri))
    except store.ObjectMissingError:
        data = b""
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise StopError(
            f"{store.redact(file.uri)}: the area of interest was changed while the run was going on, or is another file on "
            "this machine; start the run again, with a file that all workers see"
        )
    return AreaOfInterest(file.uri, data)


class AreaOfInterest:
    """Polygons in the CRS of their file (WGS 84 unless the file's ``crs`` member says otherwise).

    Raises ConfigError when there are none, or one has coordinates that are none in that CRS.
    """

    def __init__(self, uri: str, data: bytes) -> None:
        self.uri = uri
        try:
            document = json.loads(data)
            self.crs = _crs(document)
            shapes = [shape(geometry) for geometry in _geometries(document)]
        except (ValueError, KeyError, TypeError, AttributeError, CRSError, shapely.errors.ShapelyError) as error:
            raise ConfigError(f"{uri}: not a GeoJSON file of polygons: {error}") from error
        polygons = [part for part in shapes if part.geom_type in ("Polygon", "MultiPolygon") and not part.is_empty]
        if not polygons:
            raise ConfigError(f"{uri}: holds no polygon; an area of interest needs at least one")
        xy = shapely.get_coordinates(polygons)
        most = (540.0, 90.0) if self.crs.is_geographic else (np.inf, np.inf)
        is_odd = ~(np.isfinite(xy) & (np.abs(xy) <= most)).all(axis=1)
        if is_odd.any():
            x, y = xy[is_odd][0]
            raise ConfigError(
                f"{uri}: holds the coordinates {x:g}, {y:g}, which are no place in its CRS, {self.crs.to_string()[:80]}; write it "
                "again in longitude and latitude (ogr2ogr -t_srs EPSG:4326)"
            )
        self.geometry = shapely.union_all([shapely.make_valid(polygon) for polygon in polygons])

    def on(self, grid: Grid, scene_id: str) -> PixelArea:
        """The area in the pixels of a scene's grid; an empty one when no part of it lies near the scene.

        Edges are straight lines in the file's CRS, for longitude and latitude as GeoJSON says it (RFC 7946, 3.1.1), and are
        followed in the scene's to 1/256 pixel. What lies away from the scene is cut off first: few CRSs have a place for all
        of the Earth. Raises GeoreferenceError when the rest cannot be brought there.
        """
        way = _Way(self.crs, grid)
        near = way.near(self.geometry)
        if near.is_empty:
            return PixelArea(near)
        try:
            placed = near if self.crs == grid.crs else _with_short_edges(near, way)
        except _TornError as error:
            raise GeoreferenceError(
                f"{scene_id}: the area of interest {self.uri} cannot be brought into its CRS, where a part of the area has no "
                "place or is torn apart; cut the area down to the ground of the scenes"
            ) from error
        # On a lattice of 1/256 pixel every window subtracts its offset without rounding: all windows see one polygon.
        snapped = shapely.transform(placed, lambda xy: np.round(way.to_pixels(xy) * _SNAP) / _SNAP)
        return PixelArea(_polygons_of(shapely.make_valid(snapped)))


class _TornError(Exception):
    """Edges that do not become continuous lines."""


class _Way:
    """From the CRS of an area to the pixels of a scene; of longitudes it takes any, as -170 or 190."""

    def __init__(self, crs: CRS, grid: Grid) -> None:
        self._crs, self._grid = crs, grid
        self._around: tuple[float, float, float, float] | None = None
        size = np.array([grid.width, grid.height])
        margin = _MARGIN * size + _MARGIN_PX
        cols, rows = grid.outline((margin[0], margin[1]))
        outline = _affine(grid.affine, np.array([cols, rows]).T)
        ring = _transformed(outline, grid.crs, crs)
        if not np.isfinite(ring).all():
            return
        if crs.is_geographic:
            ring = self._unwrapped(ring, outline)
        (west, south), (east, north) = ring.min(axis=0).tolist(), ring.max(axis=0).tolist()
        self._around = west, south, east, north
        if crs.is_geographic and abs(ring[-1, 0] - ring[0, 0]) > _TURN / 2:
            # Longitudes that do not come back to where they began have gone around a pole.
            off = np.abs(self.to_pixels(np.array([[0.0, 90.0]])) - size / 2)
            is_north = bool((off <= size / 2 + margin).all())
            self._around = (-180.0, south, 180.0, 90.0) if is_north else (-180.0, -90.0, 180.0, north)

    def _unwrapped(self, ring: NDArray[np.float64], outline: NDArray[np.float64]) -> NDArray[np.float64]:
        """The outline's longitudes without jumps, as far around the Earth as the scene's CRS has them."""
        unwrapped = np.stack([np.unwrap(ring[:, 0], period=_TURN), ring[:, 1]], -1)
        (turn,) = self._turns(ring[:1, 1])
        if np.hypot(*turn) > _LEAST_TURN * np.hypot(*np.ptp(outline, axis=0)):
            off = outline[0] - self._to_crs(unwrapped[:1])[0]
            unwrapped[:, 0] += _TURN * np.round(off @ turn / (turn @ turn))
        return unwrapped

    def _turns(self, lat: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far (n, 2) a turn around the Earth leads in the scene's CRS; 0 where it leads back to the same place."""
        east, west = (
            _transformed(np.stack([np.full_like(lat, lon), lat], -1), self._crs, self._grid.crs)
            for lon in (180.0, -180.0)
        )
        return np.nan_to_num(east - west, nan=0.0)

    def near(self, geometry: Any) -> Any:
        """The part of an area near the scene; all of it when the scene's outline has no place in the area's CRS."""
        if self._around is None:
            return _polygons_of(geometry)
        around = box(*self._around)
        turns = range(1)
        if self._crs.is_geographic:
            west, _, east, _ = geometry.bounds
            first = math.ceil((self._around[0] - east) / _TURN)
            turns = range(first, math.floor((self._around[2] - west) / _TURN) + 1)
        parts = [shapely.intersection(affinity.translate(geometry, _TURN * turn), around) for turn in turns]
        return _polygons_of(shapely.union_all(parts))

    def to_pixels(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Columns and rows (n, 2) of points (n, 2); all of them NaN when one has no place."""
        return _affine(~self._grid.affine, self._to_crs(xy))

    def _to_crs(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self._crs.is_geographic:
            return _transformed(xy, self._crs, self._grid.crs)
        turns = np.round(xy[:, 0] / _TURN)
        moved = _transformed(np.stack([xy[:, 0] - _TURN * turns, xy[:, 1]], -1), self._crs, self._grid.crs)
        if turns.any():
            moved = moved + turns[:, None] * self._turns(xy[:, 1])
        return moved


def _with_short_edges(area: Any, way: _Way) -> Any:
    """Polygons with so many vertices that on the pixels no edge bends by more than the lattice; raises _TornError.

    The bend of an edge goes with the square of its length.
    """
    west, south, east, north = area.bounds
    length = math.hypot(east - west, north - south) / _FIRST_EDGES
    while area.length / length < _MOST_EDGES:
        fine = shapely.segmentize(area, length)
        xy, ring = shapely.get_coordinates(shapely.get_rings(shapely.get_parts(fine)), return_index=True)
        is_edge = ring[1:] == ring[:-1]
        ends, middles = way.to_pixels(xy), way.to_pixels(((xy[1:] + xy[:-1]) / 2)[is_edge])
        bend = float(np.hypot(*(middles - ((ends[1:] + ends[:-1]) / 2)[is_edge]).T).max())
        if bend <= 1 / _SNAP:
            return fine
        if not math.isfinite(bend):
            break
        length *= max(0.1, 0.9 / math.sqrt(bend * _SNAP))
    raise _TornError


def _transformed(xy: NDArray[np.float64], source: CRS, target: CRS) -> NDArray[np.float64]:
    """Points (n, 2) in another CRS; all of them NaN when one has no place there."""
    if source == target:
        return xy
    try:
        moved = np.array(transform_points(source, target, xy[:, 0].tolist(), xy[:, 1].tolist())).T
    except (RasterioError, CRSError, CPLE_BaseError):
        return np.full_like(xy, np.nan)
    return moved if np.isfinite(moved).all() else np.full_like(xy, np.nan)


def _affine(affine: Affine, xy: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b, c, d, e, f = affine[:6]
    return np.stack([a * xy[:, 0] + b * xy[:, 1] + c, d * xy[:, 0] + e * xy[:, 1] + f], -1)


def _polygons_of(geometry: Any) -> Any:
    """What of a geometry has an area, as one polygon or several."""
    parts = shapely.get_parts(geometry)
    kinds = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)
    return shapely.MultiPolygon(list(shapely.get_parts(parts[np.isin(shapely.get_type_id(parts), kinds)])))


class PixelArea:
    """An area in the pixel coordinates of one scene: polygons, or none."""

    def __init__(self, geometry: Any) -> None:
        self._geometry = geometry
        shapely.prepare(self._geometry)

    def touches(self, window: Window) -> bool:
        """Whether any part of a window may lie inside."""
        return bool(self._geometry.intersects(box(window.col_off, window.row_off, window.col_end, window.row_end)))

    def inside(self, window: Window) -> NDArray[np.bool_]:
        """(row, col), True for the pixels whose centre lies inside."""
        outline = box(window.col_off - 1, window.row_off - 1, window.col_end + 1, window.row_end + 1)
        if self._geometry.contains(outline):
            return np.ones((window.height, window.width), np.bool_)
        moved = affinity.translate(self._geometry, -window.col_off, -window.row_off)
        if moved.is_empty:
            return np.zeros((window.height, window.width), np.bool_)
        return burn([(moved, 1)], (window.height, window.width), dtype=np.uint8).astype(np.bool_)


def _crs(document: dict[str, Any]) -> CRS:
    named = (document.get("crs") or {}).get("properties", {}).get("name")
    return CRS.from_user_input(named) if named else CRS.from_epsg(4326)


def _geometries(document: dict[str, Any]) -> list[dict[str, Any]]:
    if document["type"] == "FeatureCollection":
        return [feature["geometry"] for feature in document["features"] if feature.get("geometry")]
    if document["type"] == "Feature":
        return [document["geometry"]]
    return [document]

"""An area of interest: polygons of a GeoJSON file, placed on a scene's pixels."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform_geom
from shapely import affinity
from shapely.geometry import box, mapping, shape

from geoseg.errors import ConfigError, GeoreferenceError, StopError
from geoseg.raster import store
from geoseg.raster.burn import burn
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window

_SNAP = 256.0


@dataclass(frozen=True, slots=True)
class AreaFile:
    """The file of an area of interest in the version, by its SHA-256, that a run was started with."""

    uri: str
    sha256: str


def find_area(uri: str) -> AreaFile:
    """The file as it is now. Raises ConfigError when it is missing or holds no polygon."""
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
    """Polygons in the CRS of their file (WGS 84 unless the file's ``crs`` member says otherwise)."""

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
        self.geometry = shapely.union_all([shapely.make_valid(polygon) for polygon in polygons])

    def on(self, grid: Grid, scene_id: str) -> PixelArea:
        """The area in the pixels of a scene's grid. Raises GeoreferenceError when it cannot be brought there."""
        try:
            placed = shape(transform_geom(self.crs, grid.crs, mapping(self.geometry)))
        except (RasterioError, CRSError, CPLE_BaseError, ValueError) as error:
            raise GeoreferenceError(
                f"{scene_id}: the area of interest {self.uri} cannot be brought into its CRS"
            ) from error
        inverse = ~grid.affine
        pixels = affinity.affine_transform(
            placed, [inverse.a, inverse.b, inverse.d, inverse.e, inverse.xoff, inverse.yoff]
        )
        # On a lattice of 1/256 pixel every window subtracts its offset without rounding: all windows see one polygon.
        snapped = shapely.transform(pixels, lambda xy: np.round(xy * _SNAP) / _SNAP)
        return PixelArea(shapely.make_valid(snapped))


class PixelArea:
    """An area in the pixel coordinates of one scene."""

    def __init__(self, geometry: Any) -> None:
        self._geometry = geometry
        shapely.prepare(self._geometry)

    def touches(self, window: Window) -> bool:
        """Whether any part of a window may lie inside."""
        return bool(self._geometry.intersects(box(window.col_off, window.row_off, window.col_end, window.row_end)))

    def inside(self, window: Window) -> npt.NDArray[np.bool_]:
        """(row, col), True for the pixels whose centre lies inside."""
        outline = box(window.col_off - 1, window.row_off - 1, window.col_end + 1, window.row_end + 1)
        if self._geometry.contains(outline):
            return np.ones((window.height, window.width), np.bool_)
        moved = affinity.translate(self._geometry, -window.col_off, -window.row_off)
        parts = [part for part in getattr(moved, "geoms", [moved]) if part.geom_type in ("Polygon", "MultiPolygon")]
        if not parts:
            return np.zeros((window.height, window.width), np.bool_)
        return burn([(part, 1) for part in parts], (window.height, window.width), dtype=np.uint8).astype(np.bool_)


def _crs(document: dict[str, Any]) -> CRS:
    named = (document.get("crs") or {}).get("properties", {}).get("name")
    return CRS.from_user_input(named) if named else CRS.from_epsg(4326)


def _geometries(document: dict[str, Any]) -> list[dict[str, Any]]:
    if document["type"] == "FeatureCollection":
        return [feature["geometry"] for feature in document["features"] if feature.get("geometry")]
    if document["type"] == "Feature":
        return [document["geometry"]]
    return [document]

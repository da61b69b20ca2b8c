"""Vector files in, shapes on a scene's pixels out: polygons, and lines as wide as the ground that they stand for."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform as transform_points

from geoseg.apart import run_apart
from geoseg.errors import LabelError, StopError
from geoseg.raster import store
from geoseg.raster.burn import burn
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window
from geoseg.raster.work import WorkGrid

_SQLITE = b"SQLite format 3\x00"
_GEOPACKAGES = (b"GPKG", b"GP10", b"GP11")
_TIFFS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_GEOPARQUET = "GeoParquet"
_FORMATS = "GeoJSON, GeoPackage, FlatGeobuf and GeoParquet"
_POLYGONS = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)
_LINES = (shapely.GeometryType.LINESTRING, shapely.GeometryType.MULTILINESTRING)
_SNAP = 1024.0
_MESH = 21
_MARGIN = 0.05
_SEGMENT_PX = 64

_Geometries = NDArray[Any]


@dataclass(frozen=True, slots=True)
class VectorFile:
    """A vector file in one version, by its SHA-256; ``layer`` is None where it has a single one."""

    uri: str
    sha256: str
    layer: str | None = None

    @property
    def told(self) -> str:
        """Its name for a message."""
        return store.redact(self.uri)


@dataclass(frozen=True, slots=True)
class LineWidth:
    """How wide the lines of a file are, in metres on the ground: by a field, and ``width_m`` where that has no value."""

    width_m: float | None
    field: str | None


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a file that have a geometry: polygons (valid) and lines in two dimensions, in the CRS of the file.

    ``numbers`` are their places in the file, from 1, ``columns`` the values of the fields that were asked for. ``remarks``
    say which features were left out or repaired, and why.
    """

    file: VectorFile
    geometries: _Geometries
    numbers: NDArray[np.int32]
    columns: dict[str, list[Any]]
    crs: CRS
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlacedShapes:
    """Polygons in the pixel coordinates (column, row of the full image) of a scene, in the order of the file.

    ``numbers`` and ``columns`` are as those of Features. ``is_elsewhere``: the extent of the file does not meet the scene's.
    """

    geometries: _Geometries
    numbers: NDArray[np.int32]
    columns: dict[str, list[Any]]
    tree: shapely.STRtree
    is_elsewhere: bool

    @property
    def num_corners(self) -> int:
        """How many corners there are to keep in memory; a shape by itself counts as 10."""
        return int(shapely.get_num_coordinates(self.geometries).sum()) + 10 * len(self.geometries)

    def only(self, kept: NDArray[np.bool_]) -> PlacedShapes:
        """Those of the shapes."""
        columns = {
            name: [value for value, keep in zip(values, kept, strict=True) if keep]
            for name, values in self.columns.items()
        }
        shapes = self.geometries[kept]
        return PlacedShapes(shapes, self.numbers[kept], columns, shapely.STRtree(shapes), self.is_elsewhere)

    def burn(self, work: WorkGrid, window: Window, values: NDArray[np.int32], *, fill: int) -> NDArray[np.int32]:
        """``values``, one for each shape, (row, col) at the pixels whose centre lies in it; of several shapes the last one's.

        The window is one of the work grid. Its pixels do not depend on it: places are whole multiples of 1/1024 pixel, of
        which a window subtracts its own without rounding.
        """
        down, right = (work.work_shape[axis] / work.scene_shape[axis] for axis in (0, 1))
        left, top = (window.col_off - 1) / right, (window.row_off - 1) / down
        found = self.tree.query(shapely.box(left, top, (window.col_end + 1) / right, (window.row_end + 1) / down))
        if not found.size:
            return np.full((window.height, window.width), fill, np.int32)
        found.sort()
        offset = np.array([window.col_off, window.row_off]) * _SNAP
        moved = shapely.transform(self.geometries[found], lambda xy: np.round(xy * (right, down) * _SNAP) - offset)
        pairs = zip(moved, values[found].tolist(), strict=True)
        return burn(pairs, (window.height, window.width), affine=Affine.scale(_SNAP), fill=fill, dtype=np.int32)


def find_vectors(uri: str, layer: str | None) -> VectorFile:
    """The file as it is now. Raises LabelError when there is none, AccessDeniedError, StoreError."""
    try:
        info = store.head(uri)
    except store.ObjectMissingError as error:
        raise LabelError(f"missing labels: there is no {store.redact(uri)}; check the uri under labels") from error
    return VectorFile(uri, _sha256(uri, info.etag), layer)


@lru_cache(maxsize=256)
def _sha256(uri: str, _etag: str) -> str:
    return hashlib.sha256(store.read(uri)).hexdigest()


_LOADING = threading.Lock()


def load_features(file: VectorFile, fields: tuple[str, ...]) -> Features:
    """The features of that very version; the files read last are kept, once for all threads of a process.

    Raises LabelError, which names the file and the feature at fault, StopError when the file was changed since, and
    StoreError.
    """
    with _LOADING:
        return _load(file, fields)


@lru_cache(maxsize=4)
def _load(file: VectorFile, fields: tuple[str, ...]) -> Features:
    try:
        data = store.read(file.uri)
    except store.ObjectMissingError:
        data = b""
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise StopError(
            f"{file.told}: the labels were changed while the run was going on, or are another file on this machine; start the "
            "run again, with a file that all workers see"
        )
    kind = _format(data, file)
    table = _read_geoparquet(data, file, fields) if kind == _GEOPARQUET else _read_by_gdal(kind, data, file, fields)
    named = (table.schema.metadata or {}).get(b"crs", b"").decode()
    if not named:
        raise LabelError(
            f"{file.told}: it has no CRS, so it cannot be placed; name one with ogr2ogr -a_srs EPSG:<code>"
        )
    try:
        crs = CRS.from_user_input(named)
    except CRSError as error:
        raise LabelError(f"{file.told}: its CRS is none that PROJ knows: {named[:80]}") from error
    wkb = np.array(table.column("geometry").to_pylist(), dtype=object)
    geometries, numbers, remarks = _checked(wkb, file)
    columns = {field: table.column(field).take(numbers - 1).to_pylist() for field in fields}
    return Features(file, geometries, numbers, columns, crs, remarks)


def _format(data: bytes, file: VectorFile) -> str:
    """The name of GDAL's driver for the file, or GeoParquet; by its first bytes."""
    if data.startswith(_SQLITE) and data[68:72] in _GEOPACKAGES:
        return "GPKG"
    if data.startswith(b"fgb\x03"):
        return "FlatGeobuf"
    if data.startswith(b"PAR1"):
        return _GEOPARQUET
    if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return "GeoJSON"
    told = (
        "a GeoTIFF; a label raster has values = {<class> = [<value>, ...]} and no class" if data[:4] in _TIFFS else ""
    )
    raise LabelError(f"{file.told}: vector labels are {_FORMATS}, and this is {told or 'none of them'}")


def _read_geoparquet(data: bytes, file: VectorFile, fields: tuple[str, ...]) -> Any:
    if file.layer:
        raise LabelError(f"{file.told}: a GeoParquet file has no layers; leave out layer = {file.layer!r}")
    try:
        parquet = pq.ParquetFile(io.BytesIO(data))
        geo = json.loads((parquet.schema_arrow.metadata or {})[b"geo"])
        name = geo["primary_column"]
        column = geo["columns"][name]
        encoding, crs = column["encoding"], column.get("crs", "OGC:CRS84")
        lacking = [field for field in fields if field not in parquet.schema_arrow.names]
        if lacking:
            known = ", ".join(one for one in parquet.schema_arrow.names if one != name) or "geometries"
            raise LabelError(f"{file.told}: has no field {lacking[0]!r}, only {known}")
        if encoding != "WKB":
            raise LabelError(
                f"{file.told}: its geometries are encoded as {encoding}, geoseg reads WKB; write it again with WKB"
            )
        table = parquet.read(columns=[name, *fields])
        named = crs if isinstance(crs, str) else json.dumps(crs) if crs else ""
        table = pa.table(
            [table.column(name).cast(pa.binary()), *(table.column(field) for field in fields)],
            names=["geometry", *fields],
        )
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabelError(f"{file.told}: not a readable GeoParquet file: {error!r}") from error
    return table.replace_schema_metadata({"crs": named})


def _read_by_gdal(driver: str, data: bytes, file: VectorFile, fields: tuple[str, ...]) -> Any:
    """The layer as an Arrow table, decoded by another process from a copy of the file in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="geoseg-labels-") as folder:
        copy, out = Path(folder, "labels"), Path(folder, "arrow")
        copy.write_bytes(data)
        told = (driver, str(copy), str(out), file.layer or "", *fields)
        done = run_apart("geoseg.train.ogr", *told, folder=Path(folder))
        if done.told:
            raise LabelError(f"{file.told}: {done.told}")
        if done.complaint:
            detail = done.complaint.rpartition("Error: ")[2].replace(str(copy), "the file")
            raise LabelError(f"{file.told}: cannot be read as {driver}: {detail}")
        return pa.ipc.open_file(pa.BufferReader(out.read_bytes())).read_all()


def _checked(wkb: NDArray[Any], file: VectorFile) -> tuple[_Geometries, NDArray[np.int32], tuple[str, ...]]:
    """Geometries, their numbers and what there is to remark."""
    is_there = np.array([one is not None for one in wkb], np.bool_)
    geometries = shapely.force_2d(shapely.from_wkb(wkb, on_invalid="ignore"))
    _refuse(is_there & shapely.is_missing(geometries), file, "has a geometry that is damaged or of a kind unknown here")
    kinds = shapely.get_type_id(geometries)
    for kind in np.unique(kinds[is_there & ~np.isin(kinds, (*_POLYGONS, *_LINES))]):
        name = shapely.GeometryType(kind).name.capitalize()
        _refuse(kinds == kind, file, f"is a {name}; labels are polygons, or lines with a width")
    coordinates, owner = shapely.get_coordinates(geometries, return_index=True)
    is_odd = np.zeros(len(geometries), np.bool_)
    is_odd[owner[~np.isfinite(coordinates).all(axis=1)]] = True
    _refuse(is_odd, file, "has a coordinate that is not finite")
    is_bad = np.isin(kinds, _POLYGONS) & ~shapely.is_valid(geometries)
    reasons = shapely.is_valid_reason(geometries[is_bad])
    geometries[is_bad] = [_polygons_of(one) for one in shapely.make_valid(geometries[is_bad])]
    is_empty = shapely.is_missing(geometries) | shapely.is_empty(geometries)
    repaired = np.flatnonzero(is_bad & ~is_empty)
    remarks = []
    if is_empty.any():
        first = np.flatnonzero(is_empty)[0] + 1
        remarks.append(
            f"{file.told}: {is_empty.sum()} feature(s) without a geometry or area left out, first feature {first}"
        )
    if repaired.size:
        reason = reasons[np.searchsorted(np.flatnonzero(is_bad), repaired[0])]
        remarks.append(
            f"{file.told}: {repaired.size} invalid polygon(s) repaired, first feature {repaired[0] + 1} ({reason})"
        )
    numbers = np.flatnonzero(~is_empty)
    return geometries[numbers], (numbers + 1).astype(np.int32), tuple(remarks)


def _refuse(at_fault: NDArray[np.bool_], file: VectorFile, what: str) -> None:
    if at_fault.any():
        raise LabelError(f"{file.told}: feature {np.flatnonzero(at_fault)[0] + 1} {what}; mend or remove it")


def _polygons_of(geometry: Any) -> Any:
    """What of a repaired polygon has an area: make_valid also keeps spikes, as lines."""
    if geometry.geom_type != "GeometryCollection":
        return geometry if shapely.get_type_id(geometry) in _POLYGONS else shapely.Polygon()
    parts = shapely.get_parts(geometry)
    return shapely.union_all(parts[np.isin(shapely.get_type_id(parts), _POLYGONS)])


def place(features: Features, grid: Grid, *, width: LineWidth | None) -> PlacedShapes:
    """The features that may lie in a scene, on its pixels; ``width`` None takes polygons alone.

    A file of another CRS is transformed with long edges cut to 64 pixels. A line becomes the ground within half its width, with
    round ends, in metres at the centre of the grid (whose axes are taken to be at right angles). Raises LabelError.
    """
    file = features.file
    is_line = np.isin(shapely.get_type_id(features.geometries), _LINES)
    width_m = np.zeros(len(is_line))
    if is_line.any():
        width_m[is_line] = _widths(features, np.flatnonzero(is_line), width)
    reach_px = width_m.max(initial=0) / 2 / min(grid.pixel_size_m)
    around, length = _around(features.crs, grid, reach_px, file)
    near = np.arange(len(is_line))
    if around is not None:
        near = np.flatnonzero(_meet(shapely.bounds(features.geometries), around))
    is_elsewhere = (
        around is not None and is_line.size > 0 and not _meet(shapely.total_bounds(features.geometries), around)
    )
    shapes = features.geometries[near]
    if features.crs != grid.crs:
        if around is not None:
            is_area = ~is_line[near]
            shapes[is_area] = shapely.clip_by_rect(shapes[is_area], *around)
        shapes = shapely.segmentize(shapes, length)
    shapes = _on_pixels(shapes, features.numbers[near], features.crs, grid, file)
    lines = np.flatnonzero(is_line[near])
    size_m = np.array(grid.pixel_size_m)
    on_ground = shapely.transform(shapes[lines], lambda xy: xy * size_m)
    wide = shapely.buffer(on_ground, width_m[near][lines] / 2)
    shapes[lines] = shapely.transform(wide, lambda xy: xy / size_m)
    columns = {field: [values[at] for at in near] for field, values in features.columns.items()}
    return PlacedShapes(shapes, features.numbers[near], columns, shapely.STRtree(shapes), is_elsewhere)


def _meet(bounds: NDArray[np.float64], around: tuple[float, float, float, float]) -> Any:
    """Whether bounds (..., 4) meet some ground."""
    left, bottom, right, top = np.moveaxis(bounds, -1, 0)
    return (left <= around[2]) & (right >= around[0]) & (bottom <= around[3]) & (top >= around[1])


def _widths(features: Features, lines: NDArray[np.intp], width: LineWidth | None) -> list[float]:
    """The width in metres of each line."""
    file = features.file
    if width is None:
        raise LabelError(f"{file.told}: feature {features.numbers[lines[0]]} is a line; an area is made of polygons")
    widths = []
    for line in lines:
        number = features.numbers[line]
        told = features.columns[width.field][line] if width.field else None
        if told is None or told == "":
            told = width.width_m
        if told is None:
            raise LabelError(
                f"{file.told}: feature {number} is a line without a width; give width_m, in metres, for those that have none"
            )
        try:
            value = float(told)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 < value < math.inf:
            raise LabelError(
                f"{file.told}: feature {number} has the width {told!r} in {width.field!r}; it must be a number of metres above 0"
            )
        widths.append(value)
    return widths


def _around(
    crs: CRS, grid: Grid, reach_px: float, file: VectorFile
) -> tuple[tuple[float, float, float, float] | None, float]:
    """The bounds, in a file's CRS, of a scene and some ground around it; and the length there of 64 pixels.

    The bounds are None where a part of that has no place in the CRS; the length is then of what has.
    """
    margins = [_MARGIN * size + reach_px + 2 for size in (grid.width, grid.height)]
    cols, rows = np.meshgrid(
        np.linspace(-margins[0], grid.width + margins[0], _MESH),
        np.linspace(-margins[1], grid.height + margins[1], _MESH),
    )
    a, b, c, d, e, f = grid.geotransform
    xy = _transformed(
        np.stack([a * cols + b * rows + c, d * cols + e * rows + f], -1).reshape(-1, 2), grid.crs, crs, file
    )
    finite = xy[np.isfinite(xy).all(axis=1)]
    if not finite.size:
        raise LabelError(f"{file.told}: its CRS, {crs.to_string()[:80]}, has no place for the scene")
    low, high = finite.min(axis=0), finite.max(axis=0)
    length = float(np.hypot(*(high - low)) / math.hypot(grid.width, grid.height) * _SEGMENT_PX)
    bounds = (float(low[0]), float(low[1]), float(high[0]), float(high[1])) if len(finite) == len(xy) else None
    return bounds, length


def _on_pixels(
    shapes: _Geometries, numbers: Sequence[int] | NDArray[np.int32], crs: CRS, grid: Grid, file: VectorFile
) -> _Geometries:
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    if crs != grid.crs:
        xy = _transformed(xy, crs, grid.crs, file)
        lost = np.flatnonzero(~np.isfinite(xy).all(axis=1))
        if lost.size:
            raise LabelError(
                f"{file.told}: feature {numbers[owner[lost[0]]]} has no place in the scene's CRS; mend or remove it"
            )
    a, b, c, d, e, f = (~grid.affine)[:6]
    pixels = np.stack([a * xy[:, 0] + b * xy[:, 1] + c, d * xy[:, 0] + e * xy[:, 1] + f], -1)
    return np.asarray(shapely.set_coordinates(shapes.copy(), pixels))


def _transformed(xy: NDArray[np.float64], source: CRS, target: CRS, file: VectorFile) -> NDArray[np.float64]:
    if source == target:
        return xy
    try:
        moved = transform_points(source, target, xy[:, 0].tolist(), xy[:, 1].tolist())
    except (RasterioError, CRSError, CPLE_BaseError) as error:
        raise LabelError(
            f"{file.told}: its CRS, {source.to_string()[:80]}, and the scene's, {target.to_string()[:80]}, cannot be "
            "brought together; reproject it with ogr2ogr -t_srs"
        ) from error
    return np.array(moved[:2]).T

"""Features in any order in, one file whose rows are ordered in space out: GeoParquet, and from it what others read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS
from typing_extensions import Self

from geoseg.apart import run_apart
from geoseg.errors import SceneError

ROWS_PER_GROUP = 8192
GEOMETRY, BBOX = "geometry", "bbox"
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_BBOX_TYPE = pa.struct([(side, pa.float64()) for side in _SIDES])
_HILBERT_BITS = 16
_AT_ONCE = 65536

Kind = Literal["Polygon", "LineString", "Point"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What a layer holds: its name, the type of its geometries, and the columns (Arrow) beside ``geometry`` and ``bbox``.

    Among them is ``id``, int64; the order of the rows follows from geometries and ids alone.
    """

    name: str
    geometry: Kind
    columns: pa.Schema

    @property
    def schema(self) -> pa.Schema:
        """The columns of its file."""
        return pa.schema([*self.columns, pa.field(BBOX, _BBOX_TYPE), pa.field(GEOMETRY, pa.binary())])


class LayerSpool:
    """Features of a layer wait in a file of ``folder`` until all are there; in memory stay 40 bytes of each.

    Used as a context: the file goes when the block ends.
    """

    def __init__(self, kind: LayerKind, folder: Path) -> None:
        self.kind = kind
        self._path = folder / f"{kind.name}.arrow"
        self._sink: Any = None
        self._writer: Any = None
        self._bounds: list[NDArray[np.float64]] = []
        self._ids: list[NDArray[np.int64]] = []

    def __enter__(self) -> Self:
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self.kind.schema)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, pa.ArrowException):  # a disk that is full has been told already
            self._close()
        self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None

    @property
    def num_features(self) -> int:
        """Features so far."""
        return sum(map(len, self._ids))

    @property
    def bounds(self) -> tuple[float, float, float, float] | None:
        """Extent (xmin, ymin, xmax, ymax) of all features so far; None of none."""
        if not self.num_features:
            return None
        low = np.min([each[:, :2].min(axis=0) for each in self._bounds], axis=0)
        high = np.max([each[:, 2:].max(axis=0) for each in self._bounds], axis=0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    def add(self, columns: dict[str, Any], geometries: NDArray[Any]) -> None:
        """Take features: values by column, and their geometries (shapely, in the CRS of the layer)."""
        if not len(geometries):
            return
        bounds = shapely.bounds(geometries)
        boxes = pa.StructArray.from_arrays([pa.array(side) for side in bounds.T.copy()], names=list(_SIDES))
        arrays = [pa.array(columns[field.name], field.type) for field in self.kind.columns]
        batch = pa.record_batch([*arrays, boxes, pa.array(shapely.to_wkb(geometries))], schema=self.kind.schema)
        for start in range(0, batch.num_rows, _AT_ONCE):
            self._writer.write_batch(batch.slice(start, _AT_ONCE))
            piece = slice(start, start + _AT_ONCE)
            self._bounds.append(bounds[piece])
            self._ids.append(np.asarray(columns["id"], np.int64)[piece])

    def write_parquet(self, path: Path, crs_wkt: str) -> None:
        """Write all of them as GeoParquet 1.1, in row groups along a Hilbert curve; nothing can be added after that.

        The same features give the same bytes, in whatever order they came.
        """
        self._close()
        schema = self.kind.schema.with_metadata({"geo": json.dumps(self._geo(crs_wkt), sort_keys=True)})
        with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=True) as writer:
            for batch in self._in_order():
                writer.write_batch(batch, row_group_size=ROWS_PER_GROUP)

    def _in_order(self) -> Iterator[pa.RecordBatch]:
        if not self._ids:
            return
        order = self._order()
        first = np.cumsum([0, *map(len, self._ids)])
        with pa.memory_map(str(self._path)) as source:
            held = pa.ipc.open_file(source)
            for start in range(0, len(order), ROWS_PER_GROUP):
                wanted = order[start : start + ROWS_PER_GROUP]
                by_batch = np.argsort(wanted, kind="stable")
                ascending = wanted[by_batch]
                batches, begins = np.unique(np.searchsorted(first, ascending, side="right") - 1, return_index=True)
                pieces = [
                    held.get_batch(int(place)).take(pa.array(rows - first[place]))
                    for place, rows in zip(batches, np.split(ascending, begins[1:]), strict=True)
                ]
                back = np.empty(len(wanted), np.int64)
                back[by_batch] = np.arange(len(wanted))
                yield pa.concat_batches(pieces).take(pa.array(back))

    def _order(self) -> NDArray[np.intp]:
        bounds = np.concatenate(self._bounds)
        centers = (bounds[:, :2] + bounds[:, 2:]) / 2
        low, high = centers.min(axis=0), centers.max(axis=0)
        steps = (1 << _HILBERT_BITS) - 1
        cells = ((centers - low) / np.where(high > low, high - low, 1) * steps).astype(np.int64)
        return np.lexsort((np.concatenate(self._ids), hilbert_code(cells[:, 0], cells[:, 1])))

    def _geo(self, crs_wkt: str) -> dict[str, Any]:
        """The file's metadata by the GeoParquet specification 1.1.0."""
        column: dict[str, Any] = {
            "encoding": "WKB",
            "geometry_types": [self.kind.geometry] if self.num_features else [],
            "crs": CRS.from_wkt(crs_wkt).to_dict(projjson=True),
            "edges": "planar",
            "covering": {BBOX: {side: [BBOX, side] for side in _SIDES}},
        }
        if self.kind.geometry == "Polygon":
            column["orientation"] = "counterclockwise"
        bounds = self.bounds
        if bounds is not None:
            column["bbox"] = list(bounds)
        return {"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}


def hilbert_code(cols: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places (int64) of cells (0 to 65,535 either way) along the Hilbert curve; neighbours on it lie beside each other.

    The turns of each quadrant: D. Hilbert, "Ueber die stetige Abbildung einer Linie auf ein Flaechenstueck", Math. Ann. 38, 1891.
    """
    x, y = cols.copy(), rows.copy()
    code = np.zeros_like(x)
    for bit in reversed(range(_HILBERT_BITS)):
        side = 1 << bit
        right, down = (x & side) > 0, (y & side) > 0
        code += side * side * np.where(right, np.where(down, 2, 3), np.where(down, 1, 0))
        flipped = right & ~down
        x, y = (
            np.where(flipped, side - 1 - (x & (side - 1)), x & (side - 1)),
            np.where(flipped, side - 1 - (y & (side - 1)), y & (side - 1)),
        )
        x, y = np.where(down, x, y), np.where(down, y, x)
    return code


def convert(parquet: Path, path: Path, kind: LayerKind) -> None:
    """Write a layer's GeoParquet file again as ``path`` says: FlatGeobuf, GeoPackage or PMTiles.

    In a process of its own: pyogrio and rasterio each bring a GDAL. The same features give the same bytes. Raises SceneError.
    """
    told = (str(parquet.absolute()), str(path.absolute()), kind.name, kind.geometry)
    # Without a date of its own a GeoPackage holds the time at which it was made.
    done = run_apart("geoseg.vector.convert", *told, folder=parquet.parent, OGR_CURRENT_DATE="1970-01-01T00:00:00Z")
    if done.complaint:
        raise SceneError(f"{path.name}: the layer {kind.name} could not be written: {done.complaint}")

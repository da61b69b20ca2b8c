"""From a GeoParquet file with a bbox column and a box to the features in it, as GeoJSON; only row groups near it are read."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from geoseg.errors import SceneReadError
from geoseg.raster import store
from geoseg.raster.geotiff import RangeFile

Box = tuple[float, float, float, float]
MOST_FEATURES, MOST_POINTS = 4000, 400_000
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_EXACT_IN_BROWSERS = 2**53


class _Seekable(io.RawIOBase):
    """A file object over the ranges of a stored object."""

    def __init__(self, file: RangeFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._file.size if size < 0 else min(self._file.size, self._at + size)
        if end <= self._at:
            return b""
        body = self._file.fetch([(self._at, end)])[0].tobytes()
        self._at = end
        return body


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """A GeoParquet file whose footer was read. Raises SceneReadError for one without WKB geometries and their boxes."""

    name: str
    file: RangeFile
    metadata: Any

    @classmethod
    def open(cls, info: store.ObjectInfo) -> FeatureFile:
        """Read the footer of a stored file. Raises SceneReadError, and what the store raises."""
        file, name = RangeFile(info.uri, info.size, info.etag), store.base_name(info.uri)
        try:
            opened = cls(name, file, pq.read_metadata(pa.PythonFile(_Seekable(file), mode="r")))
            opened._geometry  # noqa: B018 - a file without what is needed is refused here
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SceneReadError(
                f"{name}: not a GeoParquet file with WKB geometries and a column of their boxes; write it again with "
                "write_covering_bbox=True"
            ) from error
        return opened

    @cached_property
    def _geometry(self) -> tuple[str, list[str]]:
        """The column of geometries, and the paths of the four sides of its box."""
        geo = json.loads(self.metadata.metadata[b"geo"])
        primary = geo["primary_column"]
        column = geo["columns"][primary]
        if column["encoding"] != "WKB":
            raise ValueError(f"geometries are {column['encoding']}")
        covering = column["covering"]["bbox"]
        return str(primary), [".".join(covering[side]) for side in _SIDES]

    @cached_property
    def _group_boxes(self) -> Any:
        """The box (xmin, ymin, xmax, ymax) of each row group; of one without statistics all of the plane."""
        paths = self._geometry[1]
        boxes = np.tile([-math.inf, -math.inf, math.inf, math.inf], (self.metadata.num_row_groups, 1))
        for place in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(place)
            for at in range(group.num_columns):
                column = group.column(at)
                if column.path_in_schema in paths and column.is_stats_set and column.statistics.has_min_max:
                    side = paths.index(column.path_in_schema)
                    boxes[place, side] = column.statistics.min if side < 2 else column.statistics.max
        return boxes

    def groups_in(self, box: Box) -> list[int]:
        """The row groups whose statistics meet a box."""
        boxes = self._group_boxes
        meets = (boxes[:, 0] <= box[2]) & (boxes[:, 2] >= box[0]) & (boxes[:, 1] <= box[3]) & (boxes[:, 3] >= box[1])
        return [int(place) for place in np.flatnonzero(meets)]

    def read(self, box: Box, *, most: int = MOST_FEATURES) -> bytes:
        """A GeoJSON FeatureCollection, in the file's CRS, of the features whose own boxes meet ``box`` (xmin, ymin, xmax, ymax).

        Where they are more than ``most`` it has none, and ``too_many`` is true: a part would look like all.
        """
        paths = self._geometry[1]
        try:
            file = pq.ParquetFile(pa.PythonFile(_Seekable(self.file), mode="r"), metadata=self.metadata)
            tables, num = [], 0
            for group in self.groups_in(box):
                table = file.read_row_group(group)
                table = table.filter(_meets(table, paths, box))
                tables.append(table)
                num += table.num_rows
                if num > most:
                    return _collection([], too_many=True)
            return self._as_geojson(pa.concat_tables(tables)) if num else _collection([])
        except (pa.ArrowException, shapely.errors.ShapelyError, OSError, ValueError, KeyError) as error:
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise SceneReadError(f"{self.name}: its features cannot be read: {told}") from error

    def _as_geojson(self, table: Any) -> bytes:
        geometry, paths = self._geometry
        shapes = shapely.from_wkb(table.column(geometry).to_numpy(zero_copy_only=False))
        if shapely.get_num_coordinates(shapes).sum() > MOST_POINTS:
            return _collection([], too_many=True)
        beside = {geometry, *(path.split(".")[0] for path in paths)}
        rows = table.select([name for name in table.column_names if name not in beside]).to_pylist()
        return _collection(
            [
                f'{{"type":"Feature","geometry":{shape},"properties":{json.dumps(_plain(row), default=str)}}}'
                for shape, row in zip(shapely.to_geojson(shapes), rows, strict=True)
                if shape is not None
            ]
        )


def _meets(table: Any, paths: list[str], box: Box) -> Any:
    sides = [_column(table, path) for path in paths]
    tests = (
        pc.less_equal(sides[0], box[2]),
        pc.less_equal(sides[1], box[3]),
        pc.greater_equal(sides[2], box[0]),
        pc.greater_equal(sides[3], box[1]),
    )
    return pc.and_(pc.and_(tests[0], tests[1]), pc.and_(tests[2], tests[3]))


def _column(table: Any, path: str) -> Any:
    name, *fields = path.split(".")
    column = table.column(name)
    for field in fields:
        column = pc.struct_field(column, field)
    return column


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: what is not finite is null, a whole number that a browser would round is text."""
    return {name: _plain_value(value) for name, value in row.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, int) and abs(value) > _EXACT_IN_BROWSERS else value


def _collection(features: list[str], *, too_many: bool = False) -> bytes:
    told = f'{{"type":"FeatureCollection","too_many":{json.dumps(too_many)},"features":[{",".join(features)}]}}'
    return told.encode()

"""Vector files of each format, written by a process of its own: see ``geoseg.train.ogr`` for why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import shapely

FORMATS = (".geojson", ".gpkg", ".fgb", ".parquet")
_WRITE = """
import json, sys
import numpy as np
import pyogrio.raw
path, driver, request = sys.argv[1], sys.argv[2], json.loads(sys.stdin.read())
geometries = np.array([one and bytes.fromhex(one) for one in request.pop("geometries")], object)
fields = request.pop("fields")
def column(values):
    numbers = all(value is None or isinstance(value, (int, float)) for value in values)
    return np.array([np.nan if value is None else value for value in values], float) if numbers else np.array(values, object)
pyogrio.raw.write(path, geometries, [column(values) for values in fields.values()], list(fields), driver=driver,
    geometry_type="Unknown", **request)
"""


def write_vectors(
    path: Path,
    geometries: Sequence[Any],
    *,
    crs: str | None,
    layer: str | None = None,
    append: bool = False,
    **fields: Sequence[Any],
) -> Path:
    """Write geometries, None for none, with fields as GeoJSON, GeoPackage, FlatGeobuf or GeoParquet, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wkb = [None if one is None else shapely.to_wkb(one) for one in geometries]
    if path.suffix == ".parquet":
        column = {"encoding": "WKB", "geometry_types": [], "crs": pyproj.CRS(crs).to_json_dict() if crs else None}
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
        table = pa.table({"geometry": pa.array(wkb, pa.binary()), **fields})
        pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)
        return path
    if path.suffix == ".geojson":
        told = [None if one is None else shapely.geometry.mapping(one) for one in geometries]
        rows = [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)] or [{} for _ in told]
        features = [{"type": "Feature", "geometry": g, "properties": r} for g, r in zip(told, rows, strict=True)]
        named = {"type": "name", "properties": {"name": crs}}
        path.write_text(json.dumps({"type": "FeatureCollection", "crs": named, "features": features}))
        return path
    driver = {".gpkg": "GPKG", ".fgb": "FlatGeobuf"}[path.suffix]
    if path.exists() and not append:
        path.unlink()
    request = {
        "geometries": [one and one.hex() for one in wkb],
        "fields": fields,
        "crs": crs,
        "layer": layer or path.stem,
        "append": append,
    }
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", _WRITE, str(path), driver],
        input=json.dumps(request),
        text=True,
        check=True,
        env=environment,
    )
    return path

"""A layer as GeoParquet in, the same as FlatGeobuf, GeoPackage or PMTiles out: ``python -m geoseg.vector.convert``.

It runs as a process of its own, as ``geoseg.train.ogr`` does: rasterio's GDAL and pyogrio's do not share one.
"""

from __future__ import annotations

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pyproj

_DRIVERS = {".fgb": "FlatGeobuf", ".gpkg": "GPKG", ".pmtiles": "PMTiles"}
_MAX_ZOOM = 15  # a step of a tile's coordinates is 0.3 m there, on the equator
_BBOX = "bbox"


def main(parquet: str, path: str, layer: str, geometry: str) -> None:
    """Write the file, in flat memory but for what the format's driver keeps."""
    suffix = path[path.rindex(".") :]
    file = pq.ParquetFile(parquet)
    column = json.loads(file.schema_arrow.metadata[b"geo"])["columns"]["geometry"]
    names = [name for name in file.schema_arrow.names if name != _BBOX]
    schema = pa.schema([file.schema_arrow.field(name) for name in names])
    batches = (pa.record_batch(list(batch.columns), schema=schema) for batch in file.iter_batches(columns=names))
    options = {"MINZOOM": "8", "MAXZOOM": str(_MAX_ZOOM)} if suffix == ".pmtiles" else {}
    pyogrio.write_arrow(
        pa.RecordBatchReader.from_batches(schema, batches),
        path,
        layer=layer,
        driver=_DRIVERS[suffix],
        geometry_name="geometry",
        geometry_type=geometry,
        crs=pyproj.CRS.from_json_dict(column["crs"]).to_wkt(),
        dataset_options=options,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

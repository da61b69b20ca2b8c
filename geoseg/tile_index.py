"""The places of an output's masks in, a GeoPackage that GDAL opens as one raster (GTI) out: ``python -m geoseg.tile_index``.

It runs as a process of its own, as ``geoseg.train.ogr`` does and for its reason: pyogrio's GDAL and rasterio's do not share one.
"""

from __future__ import annotations

import json
import os
import sys

import pyarrow as pa

LAYER = "masks"
_NO_TIME = "2000-01-01T00:00:00.000Z"  # the same masks make the same bytes


def main(source: str, out: str) -> None:
    """Write the rows of the Arrow file ``source`` (geometry as WKB, location, place) to the GeoPackage ``out``.

    The metadata of its schema say ``crs`` and ``settings``: the JSON of the layer's metadata.
    """
    os.environ["OGR_CURRENT_DATE"] = _NO_TIME
    import pyogrio.raw  # noqa: PLC0415 - its GDAL reads the environment

    with pa.OSFile(source, "rb") as file:
        table = pa.ipc.open_file(file).read_all()
    told = table.schema.metadata
    pyogrio.raw.write_arrow(
        table,
        out,
        layer=LAYER,
        driver="GPKG",
        geometry_name="geometry",
        geometry_type="Polygon",
        crs=told[b"crs"].decode(),
        layer_metadata=json.loads(told[b"settings"]),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

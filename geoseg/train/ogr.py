"""A vector file in, the geometries of a layer and some of its fields out as Arrow: ``python -m geoseg.train.ogr``.

It runs as a process of its own. rasterio and pyogrio each bring a GDAL; whichever is loaded second obeys the variables that
keep the first on a short lead, so that in one process the formats that can be read would depend on the order of imports.
Here, too, the lead is short: no driver but the one of the format that the file's first bytes announce stays registered, so a
file in disguise opens no other file and no connection.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pyarrow as pa
import pyogrio
import pyogrio._io
import pyogrio.raw


def main(driver: str, path: str, out: str, layer: str, *fields: str) -> str:
    """Write the layer (the only one with geometries, if ``layer`` is empty) to the Arrow file ``out``.

    Its columns are ``geometry`` (WKB) and ``fields``, the metadata of its schema say ``crs`` ("" when there is none).
    Returns what is wrong with the request, in words that go on after the file's name; nothing when nothing is.
    """
    _keep_driver(driver)
    layers = [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]
    if layer and layer not in layers:
        return f"has no layer {layer!r} with geometries, only {', '.join(layers)}"
    if not layer and len(layers) != 1:
        told = f"has {len(layers)} layers with geometries"
        return f"{told} ({', '.join(layers)}); say which with layer = {layers[0]!r}" if layers else told
    layer = layer or layers[0]
    known = [str(name) for name in pyogrio.read_info(path, layer=layer)["fields"]]
    for field in fields:
        if field not in known:
            return f"has no field {field!r}, only {', '.join(known) or 'geometries'}"
    meta, table = pyogrio.raw.read_arrow(path, layer=layer, columns=list(fields))
    geometry = table.column(meta["geometry_name"] or "wkb_geometry").cast(pa.binary())
    kept = pa.table([geometry, *(table.column(field) for field in fields)], names=["geometry", *fields])
    kept = kept.replace_schema_metadata({"crs": meta["crs"] or ""})
    with pa.OSFile(out, "wb") as sink, pa.ipc.new_file(sink, kept.schema) as writer:
        writer.write_table(kept)
    return ""


def _keep_driver(kept: str) -> None:
    """Take all drivers but one out of the GDAL that pyogrio is linked to; pyogrio itself has no call for this."""
    gdal: Any = ctypes.CDLL(pyogrio._io.__file__)  # noqa: SLF001 - through it, whatever the library is called
    gdal.GDALGetDriver.argtypes, gdal.GDALGetDriver.restype = [ctypes.c_int], ctypes.c_void_p
    gdal.GDALGetDriverShortName.argtypes, gdal.GDALGetDriverShortName.restype = [ctypes.c_void_p], ctypes.c_char_p
    gdal.GDALDeregisterDriver.argtypes = [ctypes.c_void_p]
    for place in reversed(range(gdal.GDALGetDriverCount())):
        driver = gdal.GDALGetDriver(place)
        if gdal.GDALGetDriverShortName(driver).decode() != kept:
            gdal.GDALDeregisterDriver(driver)


if __name__ == "__main__":
    sys.stdout.write(main(*sys.argv[1:]))

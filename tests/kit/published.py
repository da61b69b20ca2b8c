"""A published output to look at: generated scenes run through the bundle that was trained on such, one of them held back."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import geopandas
from affine import Affine
from rasterio.crs import CRS

from geoseg.config import load_job
from geoseg.raster import store
from geoseg.raster.geotiff import write_geotiff
from geoseg.raster.grid import Grid
from geoseg.raster.seal import sealed
from geoseg.raster.synthetic import SyntheticImage, synthetic_image
from geoseg.run import run_job

SIDE = 640
PIXEL_M = 0.6
CORNER = (350_000.0, 5_600_000.0)


def predicted(
    root: str, *names: str, dark: Sequence[str] = (), probabilities: bool = False
) -> tuple[str, dict[str, SyntheticImage]]:
    """Write a scene of 640 x 640 pixels for each name side by side, run them; the output's URI and what the scenes show.

    Those named in ``dark`` as well get too little light for the bundle, are held back, and have no item.
    """
    images = {}
    for place, name in enumerate(names):
        image = images[name] = synthetic_image(SIDE, SIDE, seed=2001 + place)
        affine = Affine(PIXEL_M, 0, CORNER[0] + place * SIDE * PIXEL_M, 0, -PIXEL_M, CORNER[1])
        grid = Grid(CRS.from_epsg(25832).to_wkt(), tuple(affine)[:6], SIDE, SIDE)
        pixels = image.pixels_bhw // 8 if name in dark else image.pixels_bhw
        write_geotiff(f"{root}/in/{name}.tif", pixels, grid, nodata=0)
    out = f"{root}/out"
    values = {"scenes": [f"{root}/in/"], "out": out, "bundle": "demo", "cluster": {"engine": "local"}}
    run_job(load_job(None, {**values, "guard": {"max_novelty": 4.0}, "predict": {"probabilities": probabilities}}))
    return out, images


def put_layers(out: str, scene: str, **layers: geopandas.GeoDataFrame) -> None:
    """Publish vector layers of a scene as ``geoseg`` does: GeoParquet files with boxes, and ``vectors.json`` that names them.

    Each frame is in the order of its rows; a row group has 100.
    """
    assets = {}
    for key, frame in layers.items():
        made = io.BytesIO()
        frame.to_parquet(made, write_covering_bbox=True, row_group_size=100)
        body = made.getvalue()
        name = f"{key}-{hashlib.sha256(body).hexdigest()[:16]}.parquet"
        store.write(f"{out}/{scene}/{name}", body)
        checksum = "1220" + hashlib.sha256(body).hexdigest()
        media = "application/vnd.apache.parquet"
        assets[key] = {"href": f"./{name}", "type": media, "file:size": len(body), "file:checksum": checksum}
    item = {"type": "Feature", "stac_version": "1.1.0", "id": f"{scene}-vectors", "geometry": None, "bbox": None}
    told: dict[str, Any] = {**item, "properties": {"datetime": "2026-01-01T00:00:00Z"}, "links": [], "assets": assets}
    store.write(f"{out}/{scene}/vectors.json", sealed(told))

"""Real scenes with each building by itself: OpenAerialMap imagery (CC-BY-4.0), buildings of OpenStreetMap (ODbL)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.features import rasterize
from rasterio.warp import transform_geom

from geoseg.train.border import cut_touching
from geoseg.train.codes import UNLABELLED

TRAINING, HELD_OUT = ("zanzibar_tz", "nairobi_ke"), "kampala_ug"


@dataclass(frozen=True, slots=True, eq=False)
class BuildingScene:
    """Pixels uint8 (3, h, w); labels 0 ground, 1 building, 255 where there is no image; ids; outlines in pixels.

    The id of a building is its place among the outlines, from 1. Touching buildings are cut apart in labels and ids.
    """

    pixels_bhw: NDArray[np.uint8]
    labels_hw: NDArray[np.uint8]
    instances_hw: NDArray[np.int32]
    outlines: list[shapely.Polygon]
    size_m: float


def read_buildings(folder: Path, place: str, *, coarser: int = 1) -> BuildingScene:
    """A scene of ``hot_buildings``, at a pixel ``coarser`` times as large as its own."""
    stem = folder / "hot_buildings" / place
    with rasterio.open(f"{stem}_z20.tif") as source:
        shape = source.height // coarser, source.width // coarser
        pixels_bhw = source.read((1, 2, 3), out_shape=(3, *shape), resampling=Resampling.average)
        valid_hw = source.dataset_mask(out_shape=shape, resampling=Resampling.nearest) > 0
        geotransform, crs = source.transform * Affine.scale(coarser), source.crs
    features = json.loads(Path(f"{stem}_osm_buildings.geojson").read_text(encoding="utf-8"))["features"]
    on_map = [transform_geom("EPSG:4326", crs, feature["geometry"]) for feature in features]
    instances_hw = rasterize(
        zip(on_map, range(1, len(on_map) + 1), strict=True), out_shape=shape, transform=geotransform, dtype="int32"
    )
    labels_hw = np.where(valid_hw, instances_hw > 0, UNLABELLED).astype(np.uint8)
    a, b, c, d, e, f = (~geotransform)[:6]
    outlines = [shapely.affinity.affine_transform(shapely.geometry.shape(one), (a, b, d, e, c, f)) for one in on_map]
    labels_hw, instances_hw = cut_touching(labels_hw, instances_hw)
    return BuildingScene(pixels_bhw, labels_hw, instances_hw, outlines, abs(geotransform.a))

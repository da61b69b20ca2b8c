"""How many buildings come out as objects of their own: polygons from labels, and from predicted masks, against the labels.

    python tests/benchmarks/objects.py [--bundle roads-buildings]

An object is found when its IoU with one of the truth is 0.5 or more (SpaceNet). The truth of Dubai and Austin are the connected
pieces of their label rasters, that of Kampala the outlines of OpenStreetMap; those under 10 m2 do not count on either side, and
neither do polygons that lie for more than half where nothing is labelled. "labels" are polygons traced from the label raster: what
is lost there, tracing loses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import geopandas
import numpy as np
import rasterio
import shapely

sys.path.insert(0, str(Path(__file__).parents[2]))

from geoseg.config import PolygonsConfig, load_job
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window
from geoseg.run import run_job
from geoseg.vector.join import split_whole
from geoseg.vector.polygons import finish_polygons
from geoseg.vector.trace import trace_window
from geoseg.vectorize import VectorsJob, run_vectorize

DATA = Path(__file__).parents[3] / "shared" / "data"
SCENES = (
    ("dubai_2", "dubai/dubai_2.tif", "dubai/dubai_2_classes.tif", (1,), ""),
    (
        "kampala",
        "hot_buildings/kampala_ug_z20.tif",
        "hot_buildings/kampala_ug_z20_buildings.tif",
        (255,),
        "hot_buildings/kampala_ug_osm_buildings.geojson",
    ),
    ("austin", "inria_austin/austin.tif", "inria_austin/austin_classes.tif", (1,), ""),
)
SMALLEST_M2 = 10.0


def traced(mask_hw, grid, *, simplify_px, square=False):
    """The buildings (1) of a whole mask as polygons in its CRS."""
    shape = mask_hw.shape
    groups, _ = split_whole(trace_window(mask_hw, Window(0, 0, shape[1], shape[0]), shape, (1,), None))
    config = PolygonsConfig(simplify_px=simplify_px, square=square, min_area_m2=SMALLEST_M2)
    return finish_polygons(groups, grid, config, {1: "building"}).geometry


def found(truth, proposal):
    """Precision, recall and F1 of polygons matched at an IoU of 0.5."""
    one, other = shapely.STRtree(truth).query(proposal, predicate="intersects")
    common = shapely.area(shapely.intersection(proposal[one], truth[other]))
    union = shapely.area(proposal[one]) + shapely.area(truth[other]) - common
    good = common >= 0.5 * union
    matched = min(len(np.unique(one[good])), len(np.unique(other[good])))
    precision, recall = matched / max(1, len(proposal)), matched / max(1, len(truth))
    return precision, recall, 2 * matched / max(1, len(proposal) + len(truth))


def judged(polygons, known_hw, affine):
    """Those that lie for half or more where something is labelled."""
    inverse = ~affine
    kept = []
    for polygon in polygons:
        point = shapely.get_coordinates(shapely.segmentize(polygon, abs(affine.a) * 8))
        inside = shapely.get_coordinates(shapely.point_on_surface(polygon))
        cols, rows = inverse * np.concatenate([point, inside]).T
        cols, rows = cols.astype(int).clip(0, known_hw.shape[1] - 1), rows.astype(int).clip(0, known_hw.shape[0] - 1)
        kept.append(known_hw[rows, cols].mean() >= 0.5)
    return np.asarray(polygons)[np.array(kept, bool)] if len(polygons) else np.asarray(polygons)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="roads-buildings")
    asked = parser.parse_args()
    print(f"{'scene':9} {'polygons of':24} {'truth':>6} {'found':>6} precision recall    F1")
    with tempfile.TemporaryDirectory() as folder:
        for name, image, labels, values, outlines in SCENES:
            with rasterio.open(DATA / labels) as dataset:
                raw_hw, affine, crs = dataset.read(1), dataset.transform, dataset.crs
            with rasterio.open(DATA / image) as dataset:
                valid_hw = dataset.dataset_mask() > 0
                affine, crs = dataset.transform, dataset.crs
            known_hw = valid_hw & (raw_hw != 255 if 255 not in values else True)
            mask_hw = np.where(~valid_hw, 255, np.isin(raw_hw, values)).astype(np.uint8)
            grid = Grid(crs.to_wkt(), tuple(affine)[:6], *mask_hw.shape)
            exact = traced(mask_hw, grid, simplify_px=0)
            truth = exact
            if outlines:
                features = json.loads((DATA / outlines).read_text())["features"]
                frame = geopandas.GeoDataFrame.from_features(features, crs="EPSG:4326").to_crs(crs)
                truth = judged(shapely.make_valid(frame.geometry.explode().to_numpy()), valid_hw, affine)
            out = f"{folder}/{name}"
            values_of_job = {"scenes": [str(DATA / image)], "out": out, "bundle": asked.bundle}
            run_job(load_job(None, {**values_of_job, "cluster": {"engine": "local"}}), quiet=True)
            predicted = {}
            for way, config in (("smoothed", {}), ("squared", {"square": True})):
                run_vectorize(VectorsJob(out=out, vectors={"buildings": config}), quiet=True)
                (scene,) = (path for path in Path(out).iterdir() if (path / "vectors.json").exists())
                told = json.loads((scene / "vectors.json").read_text())
                href = told["assets"]["buildings"]["href"]
                predicted[way] = geopandas.read_parquet(scene / href).geometry.to_numpy()
            for way, polygons in (
                ("labels, pixel sides", exact),
                ("labels, smoothed", traced(mask_hw, grid, simplify_px=1)),
                ("labels, squared", traced(mask_hw, grid, simplify_px=1, square=True)),
                ("mask, smoothed", judged(predicted["smoothed"], known_hw, affine)),
                ("mask, squared", judged(predicted["squared"], known_hw, affine)),
            ):
                assert shapely.is_valid(polygons).all(), way
                precision, recall, f1 = found(truth, polygons)
                print(f"{name:9} {way:24} {len(truth):6} {len(polygons):6} {precision:9.3f} {recall:6.3f} {f1:5.3f}")


if __name__ == "__main__":
    main()

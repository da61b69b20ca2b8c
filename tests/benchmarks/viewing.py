"""What the page of an output waits for: the list of many scenes, a box of a million polygons, tiles of a scene without overviews.

    python tests/benchmarks/viewing.py --scenes 10000 --polygons 1000000 --scene ../shared/data/hot_buildings/zanzibar_tz_z20.tif

Prints the median and the longest of the seconds that each answer took, and its bytes. All in a folder of its own, in one process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import geopandas
import numpy as np
import shapely

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.published import predicted

from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, describe
from geoseg.raster.scene import SceneRef
from geoseg.view.catalogue import Catalogue
from geoseg.view.features import FeatureFile
from geoseg.view.tiles import Picture


def measure(name: str, ask: Callable[[int], bytes], times: int) -> None:
    """Print how long ``ask`` takes and how many bytes it gives."""
    took, num_bytes = [], 0
    for place in range(times):
        start = time.perf_counter()
        num_bytes = len(ask(place))
        took.append(time.perf_counter() - start)
    print(f"{name:<58}{statistics.median(took):>9.3f}{max(took):>9.3f}{num_bytes:>12,}", flush=True)


def many_scenes(root: Path, num: int) -> None:
    """Measure the list of ``num`` scenes and the facts of one, each with its own folder."""
    out, _ = predicted(str(root), "scene")
    for place in range(num - 1):
        shutil.copytree(f"{out}/scene", f"{out}/scene-{place:05}", copy_function=_link)
    catalogue = Catalogue(out)
    measure(f"list of {num:,} scenes", lambda _: json.dumps(catalogue.scenes()).encode(), 3)
    measure("facts of one of them", lambda at: json.dumps(catalogue.scene(f"scene-{at:05}")).encode(), 20)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def many_polygons(root: Path, num: int) -> None:
    """Measure boxes of several sizes of ``num`` squares in one file, in the order of a grid of cells."""
    side = int(num**0.5)
    place = np.arange(num)
    xs, ys = place % side * 20.0, place // side * 20.0
    order = np.lexsort((xs, xs // 2000, ys // 2000))
    squares = shapely.box(xs[order], ys[order], xs[order] + 12, ys[order] + 12)
    told = {"id": place, "class": 1, "area_m2": 144.0, "confidence": 0.9, "pixels": 400}
    path = root / "buildings.parquet"
    frame = geopandas.GeoDataFrame(told, geometry=squares, crs=32633)
    frame.to_parquet(path, write_covering_bbox=True, row_group_size=20_000)
    info = store.head(str(path))
    measure(
        f"footer of a file of {num:,} polygons, {info.size / 1e6:.0f} MB",
        lambda _: bool(FeatureFile.open(info)) * b"1",
        5,
    )
    file, middle = FeatureFile.open(info), side * 10.0
    for half in (100, 500, 5000):
        box = (middle - half, middle - half, middle + half, middle + half)
        num_groups, groups = len(file.groups_in(box)), file.metadata.num_row_groups
        measure(f"box of {2 * half} m ({num_groups} of {groups} row groups)", lambda _, box=box: file.read(box), 5)


def one_scene(uri: str) -> None:
    """Measure the tiles of a scene at its coarsest and at its finest level."""
    picture = Picture(describe(SceneRef("scene", store.normalize_uri(uri)), ReadOptions()), (0, 1, 2))
    grid, fine = picture.scene.grid, len(picture.tile_grid.resolutions) - 1
    measure(
        f"first coarse tile of {grid.width} x {grid.height} px, {len(picture.scene.levels)} levels",
        lambda _: picture.tile(0, 0, 0)[0],
        1,
    )
    measure("coarse tile after it", lambda _: picture.tile(0, 0, 0)[0], 5)
    for level in range(1, fine + 1):
        step = 256 * picture.tile_grid.resolutions[level]
        xmin, ymin, xmax, ymax = picture.tile_grid.extent
        col, row = int((xmax - xmin) / 2 / step), int((ymax - ymin) / 2 / step)
        measure(f"tile of level {level} of {fine}", lambda _, at=(level, col, row): picture.tile(*at)[0], 5)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=0)
    parser.add_argument("--polygons", type=int, default=0)
    parser.add_argument("--scene", default="")
    asked = parser.parse_args()
    print(f"{'answer':<58}{'median s':>9}{'most s':>9}{'bytes':>12}")
    with tempfile.TemporaryDirectory(prefix="geoseg-viewing-") as folder:
        if asked.scenes:
            many_scenes(Path(folder), asked.scenes)
        if asked.polygons:
            many_polygons(Path(folder), asked.polygons)
        if asked.scene:
            one_scene(asked.scene)


if __name__ == "__main__":
    main()

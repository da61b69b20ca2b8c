"""Seconds and memory for polygons of generated masks of 1e4, 1e5 and 1e6 buildings, beside GDAL's of the whole mask and a dissolve.

    python tests/benchmarks/polygons.py [--sizes 10000 100000 1000000] [--repeats 1]

``geoseg`` makes polygons with their attributes window by window (2048 pixels, on whose borders many buildings lie), with the
sides of the pixels and simplified by 1 pixel; every mask is made window by window, too. ``shapes`` is ``rasterio.features.shapes``
on the whole mask with ``shapely.geometry.shape`` of each, without an attribute, and then with what geoseg's simplified ones
have: each simplified by the same method, with its geodesic area from pyproj. ``dissolve`` traces each window with ``shapes`` and
takes geopandas' dissolve over all; it is left out for a million, where it would take hours. Each run has a process of its own;
in the seconds (of this process alone, on one core, CPU and wall) making the mask is not counted; memory is the highest that the
process held, above what it held before it began. ``slower`` compares the CPU seconds with those of geoseg that make the like.
What is made is counted and let go at once where the method can.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

CELL, WINDOW = 33, 2048
METHODS = ("geoseg, pixel sides", "shapes", "dissolve", "geoseg, simplified", "shapes, simplified")
NOT_ABOVE = {"dissolve": 100_000}
UTM_ORIGIN = (0.5, 0.0, 300_000.0, 0.0, -0.5, 4_000_000.0)


def patterns() -> NDArray[np.uint8]:
    """64 turned rectangles, some with a courtyard or a wing, each in a cell of 33 pixels with ground around it."""
    rng = np.random.default_rng(0)
    rows, cols = np.indices((CELL, CELL)) - CELL // 2
    made = []
    for number in range(64):
        turn = rng.uniform(0, math.pi)
        along, across = cols * math.cos(turn) + rows * math.sin(turn), rows * math.cos(turn) - cols * math.sin(turn)
        house = (abs(along) < rng.uniform(6, 12)) & (abs(across) < rng.uniform(4, 9))
        if number % 4 == 0:
            house |= (abs(along - 3) < 4) & (abs(across) < 12)
        if number % 8 == 1:
            house &= (abs(along) > 2) | (abs(across) > 2)
        made.append(house)
    return np.array(made, np.uint8)


def block(cells: NDArray[np.uint8], row_off: int, col_off: int, height: int, width: int) -> NDArray[np.uint8]:
    """Return a part of the endless mask."""
    rows = np.arange(row_off // CELL, -(-(row_off + height) // CELL))
    cols = np.arange(col_off // CELL, -(-(col_off + width) // CELL))
    which = (rows[:, None] * 7919 ^ cols * 104_729) % 64
    laid = cells[which].transpose(0, 2, 1, 3).reshape(len(rows) * CELL, len(cols) * CELL)
    top, left = row_off - rows[0] * CELL, col_off - cols[0] * CELL
    return np.ascontiguousarray(laid[top : top + height, left : left + width])


def windows(side: int) -> Iterator[tuple[int, int, int, int]]:
    for row in range(0, side, WINDOW):
        for col in range(0, side, WINDOW):
            yield row, col, min(WINDOW, side - row), min(WINDOW, side - col)


class Clock:
    """CPU and wall seconds of what runs under it."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def __call__(self, work: Callable, *args):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        done = work(*args)
        self.cpu_s += time.process_time() - cpu_s
        self.wall_s += time.perf_counter() - wall_s
        return done


def run_geoseg(cells: NDArray[np.uint8], side: int, clock: Clock, simplify_px: float) -> int:
    import pyproj

    from geoseg.raster.grid import Grid
    from geoseg.raster.window import Window
    from geoseg.vector.join import Joiner
    from geoseg.vector.polygons import PolygonsConfig, finish_polygons
    from geoseg.vector.trace import trace_window

    grid = Grid(pyproj.CRS.from_epsg(32636).to_wkt(), UTM_ORIGIN, side, side)
    config, names = PolygonsConfig(simplify_px=simplify_px, min_area_m2=0), {0: "background", 1: "building"}
    joiner = Joiner((side, side))
    found = 0

    def one(window: Window, mask: NDArray[np.uint8], shares: NDArray[np.uint8]) -> int:
        groups = joiner.add(trace_window(mask, window, (side, side), (1,), shares))
        return len(finish_polygons(groups, grid, config, names))

    for row, col, height, width in windows(side):
        mask = block(cells, row, col, height, width)
        found += clock(one, Window(col, row, width, height), mask, np.full((1, height, width), 200, np.uint8))
    clock(joiner.finish)
    return found


def run_shapes(cells: NDArray[np.uint8], side: int, clock: Clock, *, simplified: bool) -> int:
    import pyproj
    import shapely
    from affine import Affine
    from rasterio.features import shapes

    to_lonlat = pyproj.Transformer.from_crs(32636, 4326, always_xy=True).transform
    geod = pyproj.Geod(ellps="WGS84")

    def area_m2(outline: dict) -> float:
        (polygon,) = shapely.coverage_simplify([shapely.geometry.shape(outline)], 0.5)  # a pixel in metres
        return abs(geod.geometry_area_perimeter(shapely.transform(polygon, to_lonlat, interleaved=False))[0])

    mask = np.empty((side, side), np.uint8)
    for row, col, height, width in windows(side):
        mask[row : row + height, col : col + width] = block(cells, row, col, height, width)
    finish = area_m2 if simplified else shapely.geometry.shape
    place = Affine(*UTM_ORIGIN)
    return clock(
        lambda: sum(finish(one) is not None for one, _ in shapes(mask, mask > 0, connectivity=4, transform=place))
    )


def run_dissolve(cells: NDArray[np.uint8], side: int, clock: Clock) -> int:
    import geopandas
    import shapely
    from affine import Affine
    from rasterio.features import shapes

    pieces = []

    def one(mask: NDArray[np.uint8], row: int, col: int) -> None:
        at = Affine.translation(col, row)
        pieces.extend(shapely.geometry.shape(one) for one, _ in shapes(mask, mask > 0, connectivity=4, transform=at))

    for row, col, height, width in windows(side):
        clock(one, block(cells, row, col, height, width), row, col)
    return clock(lambda: len(geopandas.GeoDataFrame(geometry=pieces).dissolve().explode()))


def run_one(method: str, buildings: int) -> None:
    """Run in a process of its own and print what it took, as JSON."""
    clock, cells, side = Clock(), patterns(), round(math.sqrt(buildings)) * CELL
    works = {
        "geoseg, pixel sides": lambda side, clock: run_geoseg(cells, side, clock, 0),
        "geoseg, simplified": lambda side, clock: run_geoseg(cells, side, clock, 1),
        "shapes": lambda side, clock: run_shapes(cells, side, clock, simplified=False),
        "shapes, simplified": lambda side, clock: run_shapes(cells, side, clock, simplified=True),
        "dissolve": lambda side, clock: run_dissolve(cells, side, clock),
    }
    works[method](4 * CELL, Clock())  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = works[method](side, clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {
        "found": found,
        "cpu_s": clock.cpu_s,
        "wall_s": clock.wall_s,
        "mib": (peak - before) / 1024,
        "peak_mib": peak / 1024,
    }
    print(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        run_one(asked.one[0], int(asked.one[1]))
        return
    print(
        f"{'buildings':>9}  {'method':<20} {'polygons':>8} {'CPU us each':>11} {'wall us':>8} {'MiB':>7} {'slower':>6}"
    )
    for buildings in asked.sizes:
        for _ in range(asked.repeats):
            cpu_s: dict[str, float] = {}
            for method in (one for one in METHODS if buildings <= NOT_ABOVE.get(one, buildings)):
                command = [sys.executable, __file__, "--one", method, str(buildings)]
                ran = subprocess.run(
                    command, stdout=subprocess.PIPE, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                run = json.loads(ran.stdout)
                cpu_s[method], each = run["cpu_s"], 1e6 / run["found"]
                ours = cpu_s["geoseg, simplified" if "simplified" in method else "geoseg, pixel sides"]
                print(
                    f"{buildings:>9}  {method:<20} {run['found']:>8} {run['cpu_s'] * each:>11.1f} "
                    f"{run['wall_s'] * each:>8.1f} {run['mib']:>7.0f} {run['cpu_s'] / ours:>6.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

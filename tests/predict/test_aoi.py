"""An area of interest lies on a scene where its edges, straight in longitude and latitude, say, however far it reaches."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from kit.oracle import seeded_bundle
from numpy.typing import NDArray
from shapely.geometry import box, mapping

from geoseg.config import load_job
from geoseg.errors import ConfigError, GeoreferenceError
from geoseg.predict.aoi import AreaFile, AreaOfInterest
from geoseg.predict.plan import PIXEL_VERSION
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window
from geoseg.run import make_run_spec

SIDE = 64


def area_of(*polygons: Any, crs: str | None = None) -> AreaOfInterest:
    features = [{"type": "Feature", "properties": {}, "geometry": mapping(one)} for one in polygons]
    document: dict[str, Any] = {"type": "FeatureCollection", "features": features}
    if crs is not None:
        document["crs"] = {"type": "name", "properties": {"name": crs}}
    return AreaOfInterest("area.json", json.dumps(document).encode())


def wkt(epsg: int | str) -> str:
    return str(rasterio.crs.CRS.from_user_input(epsg).to_wkt())


def grid_at(lon: float, lat: float, epsg: int | str, *, pixel: float = 10.0, side: int = SIDE) -> Grid:
    """A square scene of which a place is the centre."""
    x, y = pyproj.Transformer.from_crs(4326, epsg, always_xy=True).transform(lon, lat)
    half = side / 2 * pixel
    return Grid(wkt(epsg), (pixel, 0.0, x - half, 0.0, -pixel, y + half), side, side)


def centres(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(row, col), longitude and latitude of pixel centres."""
    col, row = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
    x, y = grid.affine @ (col, row)
    to_lonlat = pyproj.Transformer.from_crs(pyproj.CRS.from_wkt(grid.crs_wkt), 4326, always_xy=True)
    lon, lat = to_lonlat.transform(x, y)
    return np.asarray(lon), np.asarray(lat)


def inside(area: AreaOfInterest, grid: Grid, size: int = 0) -> NDArray[np.bool_]:
    """(row, col), put together from windows of a size, by default from one."""
    placed = area.on(grid, "scene")
    found = np.zeros((grid.height, grid.width), np.bool_)
    step = size or max(grid.height, grid.width)
    for row, col in itertools.product(range(0, grid.height, step), range(0, grid.width, step)):
        window = Window(col, row, min(step, grid.width - col), min(step, grid.height - row))
        if placed.touches(window):
            found[row : window.row_end, col : window.col_end] = placed.inside(window)
    return found


def wanted(grid: Grid, *polygons: Any) -> NDArray[np.bool_]:
    """(row, col) by the longitude and latitude of each pixel's centre, on any turn around the Earth."""
    lon, lat = centres(grid)
    whole = shapely.union_all(polygons)
    return np.asarray(np.any([shapely.intersects_xy(whole, lon + turn, lat) for turn in (-360, 0, 360)], axis=0))


@pytest.mark.parametrize(("lat", "is_inside"), [(48.02, True), (47.98, False), (53.98, True), (54.02, False)])
def test_an_edge_is_straight_in_longitude_and_latitude(lat: float, is_inside: bool) -> None:
    grid = grid_at(15, lat, "EPSG:32633")
    found = inside(area_of(box(12, 48, 18, 54)), grid)
    assert found.all() == found.any() == is_inside


SLANTED = shapely.Polygon([(10, 45), (20, 47.5), (25, 56), (14, 52)])
ON_EDGES = {
    "UTM, a parallel": (grid_at(15, 48, "EPSG:32633"), box(12, 48, 18, 54)),
    "UTM, a slanted edge": (grid_at(15, 46.25, "EPSG:32633"), SLANTED),
    "the zone beside": (grid_at(12.01, 45.5025, "EPSG:32632", side=999), SLANTED),
    "LAEA, a few pixels": (grid_at(15, 48.000003, "EPSG:3035", pixel=1.0, side=3), box(12, 48, 18, 54)),
    "LAEA, a continent": (grid_at(15, 50, "EPSG:3035", pixel=20e3, side=150), box(-10, 40, 30, 60)),
    "polar, a parallel": (grid_at(30, 75, "EPSG:3995", pixel=100.0), box(-180, 75, 180, 90)),
    "polar, around the pole": (grid_at(0, 90, "EPSG:3995", pixel=50e3, side=101), box(-179, 75, 91, 90)),
    "polar, a disk": (grid_at(0, 90, "EPSG:3995", pixel=50e3, side=101), box(-180, 75, 180, 90)),
    "around the south pole": (grid_at(0, -90, "EPSG:3031", pixel=50e3, side=101), box(-100, -90, 170, -75)),
    "polar, beyond the equator": (grid_at(0, 90, "EPSG:3995", pixel=500e3, side=101), box(-170, -20, 125, 80)),
    "antimeridian, UTM": (grid_at(180, -17, "EPSG:32760", side=99), box(179.998, -18, 180, -16)),
    "antimeridian, beyond": (grid_at(180, -17, "EPSG:32760", side=99), box(-180, -18, -179.998, -16)),
    "antimeridian, longitudes over 180": (grid_at(-179.99, -17, "EPSG:32701", side=99), box(179, -18, 180.01, -16)),
    "longitudes to 360": (
        Grid(wkt("EPSG:4326"), (0.1, 0, 185, 0, -0.1, 5), 80, 90),
        box(-173.02, -1, -170, 2),
    ),
    "Web Mercator over 180": (
        Grid(wkt("EPSG:3857"), (1000.0, 0, 20037508.34 - 30e3, 0, -1000.0, 30e3), 60, 60),
        shapely.MultiPolygon([box(179.9, -0.1, 180, 0.1), box(-180, -0.1, -179.85, 0.1)]),
    ),
    "Web Mercator beyond 180": (
        Grid(wkt("EPSG:3857"), (1000.0, 0, 20037508.34 + 30e3, 0, -1000.0, 30e3), 60, 60),
        box(-180, -0.1, -179.5, 0.1),
    ),
    "Web Mercator, the Earth": (
        Grid(wkt("EPSG:3857"), (200e3, 0, -20e6, 0, -200e3, 19e6), 190, 200),
        box(-180, -30, 100, 30),
    ),
    "another datum, the Earth": (Grid(wkt("EPSG:4258"), (2, 0, -180, 0, -2, 90), 90, 180), box(-100, -30, 100, 30)),
    "sinusoidal, where the Earth ends": (
        Grid(wkt("+proj=sinu +R=6371007.181 +units=m"), (10e3, 0, 17e6, 0, -10e3, 3.5e6), 100, 100),
        box(100, 10, 180, 27),
    ),
}


@pytest.mark.parametrize("case", ON_EDGES)
def test_pixels_are_inside_by_longitude_and_latitude(case: str) -> None:
    grid, polygon = ON_EDGES[case]
    truth = wanted(grid, polygon)
    assert truth.any()
    assert not truth.all()
    found = inside(area_of(polygon), grid)
    assert (found != truth).sum() <= grid.width // 32, "only centres within 1/100 pixel of the edge may differ"


@pytest.mark.parametrize("lon", [9.0, 12.0, 27.3])
def test_scenes_of_two_zones_meet_without_a_gap(lon: float) -> None:
    """The same edge, 30 km long, on two scenes: what is inside by one is inside by the other."""
    for epsg in ("EPSG:32632", "EPSG:32633"):
        grid = grid_at(lon, 54, epsg, pixel=30.0, side=1000)
        found, truth = inside(area_of(box(0, 40, 40, 54)), grid), wanted(grid, box(0, 40, 40, 54))
        assert (found != truth).sum() <= 10


@pytest.mark.parametrize(
    ("bounds", "place"),
    [
        ((-180, -90, 180, 90), (9, 50, "EPSG:32632")),
        ((-180, -60, 180, 75), (9, 50, "EPSG:32632")),
        ((-10, 0, 180, 80), (9, 50, "EPSG:32632")),
        ((-10, 0, 180, 80), (105, 20, "EPSG:32648")),
        ((19, 41, 180, 82), (60, 55, "EPSG:32641")),
        ((-180, -90, 180, 90), (180, 65, "EPSG:32660")),
        ((-180, -90, 180, 90), (0, 89.99, "EPSG:32661")),
        ((-180, -90, 180, 90), (0, 0, "EPSG:3857")),
    ],
    ids=str,
)
def test_a_large_area_covers_the_scenes_in_it(bounds: tuple[float, ...], place: tuple[float, float, str]) -> None:
    assert inside(area_of(box(*bounds)), grid_at(*place)).all()


def test_a_polygon_far_away_changes_nothing() -> None:
    grid, near, far = grid_at(9, 50, "EPSG:32632"), box(8.999, 49, 10, 51), box(103, 1, 104, 2)
    found = inside(area_of(near, far), grid)
    assert found.any()
    np.testing.assert_array_equal(found, inside(area_of(near), grid))
    assert not inside(area_of(far), grid).any()
    assert not area_of(far).on(grid, "scene").inside(Window(0, 0, SIDE, SIDE)).any()


@pytest.mark.parametrize("case", ["UTM, a slanted edge", "polar, around the pole", "antimeridian, UTM"])
@pytest.mark.parametrize("size", [7, 32])
def test_windows_see_the_same_area(case: str, size: int) -> None:
    grid, polygon = ON_EDGES[case]
    np.testing.assert_array_equal(inside(area_of(polygon), grid, size), inside(area_of(polygon), grid))


@pytest.mark.parametrize(
    ("x", "crs"),
    [(500_000.0, None), (float("nan"), None), (float("inf"), "EPSG:32633")],
    ids=["metres as degrees", "no number", "infinite"],
)
def test_coordinates_that_are_none_in_their_crs_are_refused(x: float, crs: str | None) -> None:
    with pytest.raises(ConfigError, match=r"^area.json: holds the coordinates .*; write it again in longitude"):
        area_of(box(1, 1, 2, 2), shapely.Polygon([(0, 0), (x, 5), (1, 0)]), crs=crs)


def test_edges_of_an_area_in_the_scenes_crs_stay_straight_there() -> None:
    grid = grid_at(15, 48, "EPSG:32633", side=200)
    x, y = grid.affine @ (20, 180)
    slanted = shapely.Polygon([(x, y), (x + 1e6, y + 1e6), (x + 1e6, y)])
    row, col = np.mgrid[:200, :200] + 0.5
    on = inside(area_of(slanted, crs="EPSG:32633"), grid)
    np.testing.assert_array_equal(
        on[row + col != 200], ((col > 20) & (row < 180) & (row + col > 200))[row + col != 200]
    )


FULL_DISK = Grid(
    wkt("+proj=geos +h=35785831 +lon_0=0 +sweep=y +ellps=WGS84 +units=m"),
    (55e3, 0, -5.5e6, 0, -55e3, 5.5e6),
    200,
    200,
)


def test_a_scene_whose_outline_is_nowhere_on_the_earth_takes_what_it_can_see() -> None:
    polygon = box(-20, -10, 30, 40)
    assert (inside(area_of(polygon), FULL_DISK) != wanted(FULL_DISK, polygon)).sum() <= 6
    with pytest.raises(GeoreferenceError, match=r"^scene: the area of interest area.json .* cut the area down"):
        area_of(box(100, 0, 180, 10)).on(FULL_DISK, "scene")


def test_masks_of_an_area_are_made_by_other_rules_than_before_and_no_others(tmp_path: Path) -> None:
    """Where an area was cut by the edges' ends alone, the mask is made again; all other masks stand."""
    seeded_bundle(tmp_path / "bundle", seed=0)
    values = {"scenes": ["a.tif"], "out": str(tmp_path / "out"), "bundle": str(tmp_path / "bundle")}
    run = make_run_spec(load_job(None, values))
    told = {
        "version": PIXEL_VERSION,
        "input": "etag",
        "bundle": run.bundle_digest,
        "settings": run.config.pixel_settings(),
        "aoi": None,
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    assert run.fingerprint("etag") == digest
    cut = replace(run, area=AreaFile("area.json", "0" * 64))
    before = hashlib.sha256(json.dumps({**told, "aoi": "0" * 64}, sort_keys=True).encode()).hexdigest()
    assert cut.fingerprint("etag") not in (before, digest)
    versions = [("etag", None)]
    assert cut.made_from(versions).changes_to(cut.made_from(versions)) == ("geoseg changed",)

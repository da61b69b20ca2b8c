"""Where pixels lie and how large they are on the ground: broken places are refused, sizes agree with geodesics."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from rasterio.crs import CRS
from rasterio.windows import Window as RasterioWindow
from rasterio.windows import transform as window_transform

from geoseg.errors import GeoreferenceError
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window

WEB_MERCATOR = "EPSG:3857"
MARS = (
    'PROJCS["Mars",GEOGCS["GCS_Mars",DATUM["D_Mars",SPHEROID["Mars",3396190,0]],PRIMEM["Reference_Meridian",0],'
    'UNIT["degree",0.0174532925199433]],PROJECTION["Equirectangular"],PARAMETER["standard_parallel_1",0],'
    'PARAMETER["central_meridian",0],PARAMETER["false_easting",0],PARAMETER["false_northing",0],UNIT["metre",1]]'
)
NAN, INF = float("nan"), float("inf")
PLACE = (0.5, 0.0, 500_000.0, 0.0, -0.5, 5_300_000.0)


def grid(crs: str, geotransform: Any, height: int = 100, width: int = 100) -> Grid:
    return Grid(CRS.from_user_input(crs).to_wkt(), tuple(geotransform), height, width)


def north_up(crs: str, pixel: float, west: float, north: float, *, height: int = 100, width: int = 100) -> Grid:
    return grid(crs, (pixel, 0.0, west, 0.0, -pixel, north), height, width)


BROKEN = {
    "NaN in the offset": ((0.5, 0, NAN, 0, -0.5, 0), "not finite"),
    "NaN in the pixel": ((NAN, 0, 0, 0, -0.5, 0), "not finite"),
    "infinite": ((0.5, 0, 0, 0, -INF, 0), "not finite"),
    "all zero": ((0, 0, 0, 0, 0, 0), "singular"),
    "no width": ((0, 0, 500_000, 0, -0.5, 5_300_000), "singular"),
    "no height": ((0.5, 0, 500_000, 0, 0, 5_300_000), "singular"),
    "sheared to a line": ((0.5, 0.5, 0, 0.5, 0.5, 0), "singular"),
    "sheared to nearly a line": ((1, 1, 0, 1, 1 + 1e-15, 0), "singular"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_pixels_without_a_place_or_an_area_are_refused(name: str) -> None:
    geotransform, reason = BROKEN[name]
    with pytest.raises(GeoreferenceError, match=reason):
        grid("EPSG:32633", geotransform)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
def test_a_grid_has_pixels(height: int, width: int) -> None:
    with pytest.raises(GeoreferenceError, match="has no pixels"):
        grid("EPSG:32633", PLACE, height, width)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(st.tuples(FINITE, FINITE, FINITE, FINITE, FINITE, FINITE))
@example((0.0, 1.0, 0.0, 1.0, 0.0, 8189470254308979.0))
def test_any_six_numbers_make_a_grid_with_a_size_or_are_refused(geotransform: tuple[float, ...]) -> None:
    """A damaged file may hold any numbers; what is done with an accepted grid (areas, ratios) must be finite too."""
    try:
        found = grid("EPSG:32633", geotransform)
    except GeoreferenceError:
        return
    assert 0 < found.resolution_m < INF
    assert 0 < found.resolution_m**2 < INF


@pytest.mark.parametrize(
    "geotransform",
    [
        (0.3, 0.4, 1000.0, 0.4, -0.3, 2000.0),
        (0.5, 0.0, 0.0, 0.0, 0.5, 0.0),
        (0.0, 0.5, 0.0, 0.5, 0.0, 0.0),
        (1.0, 0.99, 0.0, 0.0, 1.0, 0.0),
        (1e-9, 0.0, 10.0, 0.0, -1e-9, 50.0),
    ],
    ids=["rotated", "south-up", "transposed", "sheared", "tiny pixels"],
)
def test_unusual_places_are_places(geotransform: tuple[float, ...]) -> None:
    assert grid("EPSG:32633", geotransform).geotransform == geotransform


@settings(deadline=None)
@given(
    st.tuples(*[st.floats(-10, 10)] * 2, st.floats(-1e6, 1e6), *[st.floats(-10, 10)] * 2, st.floats(-1e6, 1e6)),
    st.integers(0, 5000),
    st.integers(0, 5000),
)
def test_a_window_lies_where_rasterio_puts_it(geotransform: tuple[float, ...], col: int, row: int) -> None:
    try:
        whole = grid("EPSG:32633", geotransform, 6000, 6000)
    except GeoreferenceError:
        return
    part = whole.crop(Window(col, row, 30, 20))
    want = window_transform(RasterioWindow(col, row, 30, 20), whole.affine)
    assert part.affine == want
    assert (part.height, part.width, part.crs_wkt) == (20, 30, whole.crs_wkt)


def test_utm_pixels_are_true_but_for_the_scale_of_the_projection() -> None:
    """On the central meridian UTM shrinks by 0.9996 exactly (Snyder 1987, p. 57)."""
    assert_allclose(north_up("EPSG:32633", 0.5, 500_000 - 25, 5_300_000).pixel_size_m, [0.5 / 0.9996] * 2, rtol=1e-6)


@pytest.mark.parametrize("latitude", [0, 30, 60, -45, 80])
def test_web_mercator_pixels_shrink_with_the_latitude(latitude: float) -> None:
    """East to west by cos(lat) N / R, north to south by cos(lat) M / R (N, M: radii of curvature of WGS 84)."""
    radius, e2 = 6378137.0, 6.69437999014e-3
    north = radius * math.asinh(math.tan(math.radians(latitude)))
    found = north_up(WEB_MERCATOR, 1.0, 0, north + 50).pixel_size_m
    cos, sin2 = math.cos(math.radians(latitude)), math.sin(math.radians(latitude)) ** 2
    assert_allclose(found[0], cos / math.sqrt(1 - e2 * sin2), rtol=2e-5)
    assert_allclose(found[1], cos * (1 - e2) / (1 - e2 * sin2) ** 1.5, rtol=2e-5)


def test_degrees_are_measured_on_the_ellipsoid() -> None:
    """At 60 degrees a degree is 55 800 m east to west and 111 412 m north to south (Snyder 1987, table 12)."""
    across, down = north_up("EPSG:4326", 1e-5, 10, 60.0005).pixel_size_m
    assert_allclose([across, down], [0.55800, 1.11412], rtol=1e-4)
    assert_allclose(north_up("EPSG:4326", 1e-5, 10, 60.0005).resolution_m, math.sqrt(across * down))


def test_feet_are_not_metres() -> None:
    """New York's state plane, true to scale within 1 in 10 000, counts in US survey feet."""
    assert_allclose(north_up("EPSG:2263", 1.0, 980_000, 200_000).pixel_size_m, [1200 / 3937] * 2, rtol=1e-4)


def test_a_rotated_pixel_is_as_large_as_an_upright_one() -> None:
    upright = north_up("EPSG:32633", 0.5, 500_000, 5_300_000).pixel_size_m
    rotated = grid("EPSG:32633", (0.3, 0.4, 500_000, 0.4, -0.3, 5_300_000)).pixel_size_m
    assert_allclose(rotated, upright, rtol=1e-5)


def test_the_antimeridian_makes_no_pixel_large() -> None:
    west = north_up("EPSG:4326", 0.001, 170, 10).pixel_size_m
    assert_allclose(north_up("EPSG:4326", 0.001, 179.95, 10).pixel_size_m, west, rtol=1e-9)
    assert_allclose(north_up("EPSG:32660", 10, 833_000 - 500, 1_000_000).pixel_size_m, [10, 10], rtol=2e-3)


def test_at_the_pole_a_pixel_is_what_the_projection_says() -> None:
    """EPSG:3413 is true at 70 degrees north; at the pole it shrinks to 0.9698 (Snyder 1987, eq. 21-36 f)."""
    assert_allclose(north_up("EPSG:3413", 100, -5000, 5000).pixel_size_m, [100 / 0.9698] * 2, rtol=1e-3)


def test_another_planet_keeps_the_unit_of_its_crs() -> None:
    mars = north_up(MARS, 5.0, 7_000_000, -800_000)
    assert mars.pixel_size_m == (5.0, 5.0)
    assert mars.to_lonlat([0], [0]) is None
    assert mars.outline_lonlat() is None


@pytest.mark.parametrize(("unit", "metres"), [("metre", 1.0), ("foot", 0.3048)])
def test_a_local_crs_keeps_its_unit(unit: str, metres: float) -> None:
    """A site's own axes have no longitude, but a length."""
    local = north_up(f'LOCAL_CS["site",UNIT["{unit}",{metres}]]', 2.0, 0, 0)
    assert_allclose(local.pixel_size_m, [2 * metres] * 2, rtol=1e-9)


def test_the_outline_is_a_closed_ring_through_the_corners() -> None:
    ring = north_up("EPSG:4326", 0.1, 10, 50, height=20, width=30).outline_lonlat()
    assert ring is not None
    assert ring[0] == ring[-1] == (10, 50)
    assert {(10.0, 50.0), (13.0, 50.0), (13.0, 48.0), (10.0, 48.0)} <= {(round(x, 9), round(y, 9)) for x, y in ring}
    area = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in itertools.pairwise(ring)) / 2
    assert_allclose(area, 3 * 2, rtol=1e-9)  # above 0: counter-clockwise, as RFC 7946 wants it


def test_an_outline_over_the_antimeridian_does_not_jump() -> None:
    ring = north_up("EPSG:32660", 1000, 700_000, 1_000_000, height=50, width=300).outline_lonlat()
    assert ring is not None
    longitudes = np.array([x for x, _ in ring])
    assert np.abs(np.diff(longitudes)).max() < 1
    assert longitudes.max() > 180

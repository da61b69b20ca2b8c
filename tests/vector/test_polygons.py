"""Polygons of masks: GDAL's, whatever the cutting; touching ones stay side by side; attributes hold on the ground."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence

import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kit.data import data_folder
from kit.traced import first_vertex, traced_by_gdal
from numpy.typing import NDArray
from rasterio.features import rasterize

from geoseg.errors import ConfigError
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window
from geoseg.vector.ground import areas_m2
from geoseg.vector.join import Groups, Joiner, split_whole
from geoseg.vector.polygons import Polygons, PolygonsConfig, class_values, finish_polygons, lattice_id
from geoseg.vector.trace import trace_window

UTM = pyproj.CRS.from_epsg(32636).to_wkt()
NAMES = {0: "background", 1: "building", 2: "road", 3: "water"}
EVERY = PolygonsConfig(classes=("building", "road", "water"), min_area_m2=0, simplify_px=0)
GEOD = pyproj.Geod(ellps="WGS84")


def grid_of(mask: NDArray[np.uint8]) -> Grid:
    """Return pixels of 4 m, the columns as x and the rows as -y, so that pixels are easily had back."""
    return Grid(UTM, (4.0, 0.0, 400_000.0, 0.0, -4.0, 600_000.0), *mask.shape)


def cells(shape: tuple[int, int], rows: Sequence[int], cols: Sequence[int]) -> list[Window]:
    """Return the windows between cuts at ``rows`` and ``cols``."""
    downs = itertools.pairwise([0, *sorted(set(rows)), shape[0]])
    acrosses = list(itertools.pairwise([0, *sorted(set(cols)), shape[1]]))
    return [Window(left, top, right - left, bottom - top) for top, bottom in downs for left, right in acrosses]


def squares(shape: tuple[int, int], height: int, width: int) -> list[Window]:
    return cells(shape, range(height, shape[0], height), range(width, shape[1], width))


def joined(
    mask: NDArray[np.uint8],
    windows: Sequence[Window],
    *,
    values: Sequence[int] = (1, 2, 3),
    shares: NDArray[np.uint8] | None = None,
    together: bool = True,
) -> Groups:
    joiner = Joiner(mask.shape, together=together)
    found = []
    for window in windows:
        here = np.s_[window.row_off : window.row_end, window.col_off : window.col_end]
        part = trace_window(mask[here], window, mask.shape, values, None if shares is None else shares[(..., *here)])
        found.append(joiner.add(pickle.loads(pickle.dumps(part))))  # noqa: S301 - as between workers
    joiner.finish()
    return Groups.of(found)


def polygons(mask: NDArray[np.uint8], windows: Sequence[Window], config: PolygonsConfig = EVERY, **how) -> Polygons:
    return finish_polygons(joined(mask, windows, **how), grid_of(mask), config, NAMES)


def whole(mask: NDArray[np.uint8], config: PolygonsConfig = EVERY, **how) -> Polygons:
    return polygons(mask, [Window(0, 0, mask.shape[1], mask.shape[0])], config, **how)


def facts(found: Polygons) -> dict[int, tuple]:
    """Return all that is told of each polygon, by id."""
    columns = (found.name, found.area_m2, found.confidence.astype(str), found.pixels, shapely.to_wkb(found.geometry))
    told = dict(zip(found.id.tolist(), zip(*(column.tolist() for column in columns), strict=True), strict=True))
    assert len(told) == len(found)
    return told


def in_pixels(found: Polygons) -> list[tuple[int, shapely.Polygon]]:
    """Return value and polygon in pixels, sorted by value and first pixel."""
    place = np.array([400_000.0, 600_000.0])
    geometry = shapely.transform(found.geometry, lambda xy: (xy - place) / (4, -4))
    value = {name: value for value, name in NAMES.items()}
    named = [(value[name], polygon) for name, polygon in zip(found.name.tolist(), geometry, strict=True)]
    return sorted(named, key=lambda one: (one[0], first_vertex(one[1])))


def same_as_gdal(found: Polygons, oracle: list[tuple[int, shapely.Polygon]]) -> None:
    ours = in_pixels(found)
    assert [value for value, _ in ours] == [value for value, _ in oracle]
    mine, theirs = (np.array([polygon for _, polygon in some], object) for some in (ours, oracle))
    assert shapely.is_valid(mine).all()
    np.testing.assert_array_equal(shapely.area(mine), shapely.area(theirs))
    assert shapely.equals(mine, theirs).all()
    assert sorted(found.pixels.tolist()) == sorted(shapely.area(theirs).astype(int).tolist())
    # No vertex in the middle of a straight side.
    for polygon in mine:
        for ring in (polygon.exterior, *polygon.interiors):
            steps = np.diff(np.array(ring.coords), axis=0)
            turns = steps[:, 0] * np.roll(steps[:, 1], -1) - steps[:, 1] * np.roll(steps[:, 0], -1)
            assert np.all(turns != 0)


def noise(shape: tuple[int, int], density: float, classes: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.integers(1, classes + 1, shape), 0).astype(np.uint8)


def test_polygons_are_those_that_gdal_traces_in_the_whole_mask():
    masks = [
        noise((37, 53), density, classes, seed)
        for seed, (density, classes) in enumerate(itertools.product((0.1, 0.35, 0.5, 0.6, 0.75, 0.95, 1.0), (1, 3)))
    ]
    masks += [noise((1, 40), 0.5, 2, 20), noise((40, 1), 0.5, 2, 21), np.ones((3, 3), np.uint8)]
    for place, (mask, oracle) in enumerate(zip(masks, traced_by_gdal(masks, (1, 2, 3)), strict=True)):
        same_as_gdal(whole(mask), oracle)
        windows = squares(mask.shape, 8, 11)
        np.random.default_rng(place).shuffle(windows)
        same_as_gdal(polygons(mask, windows), oracle)
        same_as_gdal(polygons(mask, windows, together=False), oracle)


@pytest.mark.parametrize("cut_col", [1, 2])
def test_every_mask_of_three_by_three_pixels_may_be_cut_in_its_middle(cut_col):
    """Vertices at which four windows meet, and those at which pixels of one component touch by a corner, are all among these."""
    every = np.array(list(itertools.product((0, 1), repeat=9)), np.uint8).reshape(16, 32, 3, 3)
    mask = np.pad(every, ((0, 0), (0, 0), (0, 1), (0, 1))).transpose(0, 2, 1, 3).reshape(64, 128)
    (oracle,) = traced_by_gdal([mask], (1,))
    windows = cells(mask.shape, range(1, 64, 4), range(cut_col, 128, 4))
    np.random.default_rng(0).shuffle(windows)
    same_as_gdal(polygons(mask, windows), oracle)


@st.composite
def cut_masks(draw: st.DrawFn) -> tuple[NDArray[np.uint8], list[Window], NDArray[np.uint8]]:
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    codes = draw(st.sampled_from([(0, 1), (0, 1, 1, 1), (0, 1, 2, 255), (1, 2, 3)]))
    mask = draw(arrays(np.uint8, (height, width), elements=st.sampled_from(codes), fill=st.nothing()))
    rows, cols = (draw(st.sets(st.integers(1, size - 1))) if size > 1 else [] for size in (height, width))
    windows = draw(st.permutations(cells((height, width), sorted(rows), sorted(cols))))
    shares = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (3, height, width), dtype=np.uint8)
    return mask, windows, shares


@settings(max_examples=100, deadline=None)
@given(cut_masks(), st.sampled_from([0, 1.0, 2.5]))
def test_cutting_does_not_matter(cut, simplify_px):
    mask, windows, shares = cut
    config = EVERY.model_copy(update={"simplify_px": simplify_px})
    assert facts(polygons(mask, windows, config, shares=shares)) == facts(whole(mask, config, shares=shares))


@pytest.mark.parametrize("seed", [0, 1])
def test_cutting_does_not_matter_where_all_touch(seed):
    """Corners of one outline are in the way of another's: they must go in the same order."""
    mask = noise((40, 40), 0.9, 3, seed)
    windows = squares(mask.shape, 7, 9)
    np.random.default_rng(seed).shuffle(windows)
    config = EVERY.model_copy(update={"simplify_px": 2.5})
    assert facts(polygons(mask, windows, config)) == facts(whole(mask, config))


def spiral(size: int) -> NDArray[np.uint8]:
    """Return one component as wide as a pixel that winds inwards, and the ground beside it."""
    mask = np.zeros((size, size), np.uint8)
    row, col, step = 0, 0, (0, 1)
    mask[0, 0] = 1
    for _ in range(size * size):
        for _turn in range(2):
            ahead = row + step[0], col + step[1]
            beyond = row + 2 * step[0], col + 2 * step[1]
            inside = all(0 <= some < size for some in ahead)
            if inside and not mask[ahead] and not (all(0 <= some < size for some in beyond) and mask[beyond]):
                break
            step = step[1], -step[0]
        else:
            return mask
        row, col = ahead
        mask[row, col] = 1
    return mask


def comb(height: int, teeth: int) -> NDArray[np.uint8]:
    mask = np.zeros((height, 2 * teeth), np.uint8)
    mask[:, ::2] = 1
    mask[-1] = 1
    return mask


def nested(size: int) -> NDArray[np.uint8]:
    away = np.abs(np.arange(size) - size // 2)
    return (np.maximum.outer(away, away) % 2).astype(np.uint8)


SHAPES = {
    "spiral": spiral(41),
    "spiral of two classes": 1 + spiral(29),
    "comb": comb(24, 20),
    "checkerboard": (np.indices((21, 25)).sum(axis=0) % 2).astype(np.uint8),
    "checkerboard of two classes": (1 + np.indices((21, 25)).sum(axis=0) % 2).astype(np.uint8),
    "nested rings": nested(31),
    "one long line": np.pad(np.ones((1, 300), np.uint8), 1),
    "nothing": np.zeros((30, 30), np.uint8),
    "everything": np.ones((17, 18), np.uint8),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_cross_many_borders_come_out_whole(shape):
    mask = SHAPES[shape]
    (oracle,) = traced_by_gdal([mask], (1, 2))
    for height, width in ((1, mask.shape[1]), (mask.shape[0], 1), (3, 2), (7, 8)):
        windows = squares(mask.shape, height, width)
        np.random.default_rng(height).shuffle(windows)
        groups = joined(mask, windows)
        same_as_gdal(finish_polygons(groups, grid_of(mask), EVERY, NAMES), oracle)
        simple = EVERY.model_copy(update={"simplify_px": 1.0})
        assert facts(finish_polygons(groups, grid_of(mask), simple, NAMES)) == facts(whole(mask, simple))


def test_other_classes_and_no_data_are_ground():
    mask = np.array([[1, 255, 2], [1, 1, 2], [0, 2, 3]], np.uint8)
    found = whole(mask, values=(1,))
    assert found.name.tolist() == ["building"]
    assert found.pixels.tolist() == [3]
    assert len(whole(mask, values=(1, 2, 3))) == 4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.7, 1.0]), st.sampled_from([0.75, 1.0, 2.0, 5.0]))
def test_neighbours_stay_side_by_side_when_they_are_simplified(seed, density, simplify_px):
    coarse = noise((9, 11), density, 3, seed)
    mask = np.repeat(np.repeat(coarse, 3, axis=0), 3, axis=1)
    flips = np.random.default_rng(seed).random(mask.shape) < 0.1
    mask = np.where(flips, np.roll(mask, 1, axis=1), mask)
    config = EVERY.model_copy(update={"simplify_px": simplify_px})
    groups = joined(mask, squares(mask.shape, 10, 10))
    found = finish_polygons(groups, grid_of(mask), config, NAMES)
    assert len(found) == len(groups)
    assert shapely.is_valid(found.geometry).all()
    # Sizes of millions of metres lose digits in the plane: back to pixels.
    outlines = np.array([polygon for _, polygon in in_pixels(found)])
    assert shapely.coverage_is_valid(outlines)
    if density == 1:
        together = shapely.union_all(outlines)
        assert together.geom_type == "Polygon"
        assert not together.interiors
        assert together.area == pytest.approx(shapely.area(outlines).sum())


def test_simplifying_takes_the_stairs_and_keeps_what_there_is():
    rows, cols = np.indices((60, 60))
    mask = ((np.abs(rows + cols - 60) < 20) & (np.abs(rows - cols) < 30)).astype(np.uint8)
    mask[30, 30] = 0
    mask[0, 0] = mask[0, 58:] = 1
    plain, simple = whole(mask), whole(mask, EVERY.model_copy(update={"simplify_px": 1.0}))
    assert facts(plain).keys() == facts(simple).keys()
    assert shapely.get_num_coordinates(simple.geometry).sum() < shapely.get_num_coordinates(plain.geometry).sum() / 5
    assert shapely.get_num_interior_rings(simple.geometry).sum() == 1
    np.testing.assert_allclose(np.sort(simple.area_m2), np.sort(plain.area_m2), rtol=0.02)
    # Rectangles of a few pixels are no stairs.
    assert (shapely.get_num_coordinates(simple.geometry) == 5).sum() == 2


@pytest.mark.parametrize("density", [0.25, 0.45])
def test_polygons_do_not_overlap_by_the_default_smoothing(density):
    found = whole(
        noise((150, 150), density, 1, 0), EVERY.model_copy(update={"simplify_px": PolygonsConfig().simplify_px})
    )
    one, other = shapely.STRtree(found.geometry).query(found.geometry, predicate="intersects")
    one, other = found.geometry[one[one < other]], found.geometry[other[one < other]]
    assert len(one) > 500
    assert shapely.area(shapely.intersection(one, other)).max() < 1e-6


def test_attributes_are_those_of_the_pixels_and_of_the_geometry():
    mask = noise((60, 70), 0.4, 2, 3)
    mask[20:40, 20:40] = 1
    mask[25:30, 25:30] = 0
    rng = np.random.default_rng(0)
    shares = rng.integers(100, 255, (2, 60, 70), dtype=np.uint8)
    found = whole(mask, values=(1, 2), shares=shares)
    to_lonlat = pyproj.Transformer.from_crs(UTM, 4326, always_xy=True).transform
    for place in range(len(found)):
        polygon = found.geometry[place]
        inside = rasterize([polygon], out_shape=mask.shape, transform=grid_of(mask).affine).astype(bool)
        value = 1 if found.name[place] == "building" else 2
        assert found.pixels[place] == inside.sum()
        assert found.confidence[place] == np.float32(shares[value - 1][inside].mean() / 254)
        row, col = np.argwhere(inside)[0]
        assert found.id[place] == (row << 32) + col
        on_ground = abs(GEOD.geometry_area_perimeter(shapely.transform(polygon, to_lonlat, interleaved=False))[0])
        assert found.area_m2[place] == pytest.approx(on_ground, rel=1e-6, abs=1e-4)
    smallest = EVERY.model_copy(update={"min_area_m2": 1000.0})
    large = whole(mask, smallest, values=(1, 2), shares=shares)
    assert set(facts(large).items()) == {(key, told) for key, told in facts(found).items() if told[1] >= 1000}
    assert shapely.get_num_interior_rings(large.geometry).sum() > 0
    assert shapely.is_ccw(shapely.get_exterior_ring(found.geometry)).all()


def test_without_probabilities_there_is_no_confidence():
    mask = np.ones((3, 4), np.uint8)
    assert np.isnan(whole(mask).confidence).all()
    unknown = np.full((3, 3, 4), 255, np.uint8)
    assert np.isnan(whole(mask, shares=unknown).confidence).all()
    unknown[0, 1, 2:] = 127, 254
    assert whole(mask, shares=unknown).confidence.tolist() == [0.75]


@pytest.mark.parametrize("lat", [0, -33, 60, 84, 88.9, -89.5, 89.999])
@pytest.mark.parametrize("size_m", [15, 200, 1500, 50_000])
def test_areas_are_those_of_geod(lat, size_m):
    rng = np.random.default_rng(size_m)
    outlines = []
    for _ in range(20):
        angle = np.sort(rng.uniform(0, 0.4, 9) + np.arange(9) * 2 * np.pi / 9)
        reach = size_m / 2 * rng.uniform(0.4, 1, 9)
        north = lat + np.degrees(reach * np.sin(angle) / 6.4e6)
        east = 179.9999 + np.degrees(reach * np.cos(angle) / 6.4e6 / np.cos(np.radians(lat)))
        ring = np.stack([east, north], axis=1)
        center = ring.mean(axis=0)
        outlines.append(shapely.Polygon(ring, [center + (ring - center) / 3]))
    areas = areas_m2(np.array(outlines), pyproj.CRS.from_epsg(4326).to_wkt())
    exact = [abs(GEOD.geometry_area_perimeter(shapely.orient_polygons(one))[0]) for one in outlines]
    # Geod itself tells areas to about 1e-4 m2.
    np.testing.assert_allclose(areas, exact, rtol=1e-6, atol=2e-4)


def test_a_grid_that_is_not_of_the_earth_has_its_areas_in_the_plane():
    moon = pyproj.CRS.from_proj4("+proj=eqc +R=1737400 +units=m").to_wkt()
    mask = np.ones((3, 5), np.uint8)
    groups = joined(mask, squares((3, 5), 2, 2))
    found = finish_polygons(groups, Grid(moon, (2.0, 0.0, 0.0, 0.0, -2.0, 0.0), 3, 5), EVERY, NAMES)
    assert found.area_m2 == pytest.approx([60.0])


def test_an_id_is_a_place_on_the_lattice():
    rows, cols = np.array([0, 7, 3]), np.array([0, 5, 1])
    ids = lattice_id(rows, cols, -10, -4)
    np.testing.assert_array_equal(ids >> 32, rows - 10)
    np.testing.assert_array_equal(ids.astype(np.int32), cols - 4)
    assert len(np.unique(ids)) == 3
    with pytest.raises(ConfigError, match="origin nearer"):
        lattice_id(rows, cols, 1 << 31, 0)
    mask = noise((20, 30), 0.4, 2, 1)
    groups = joined(mask[5:, 8:], squares((15, 22), 4, 4))
    moved = Grid(UTM, (4.0, 0.0, 400_032.0, 0.0, -4.0, 599_980.0), 15, 22)
    part = facts(finish_polygons(groups, moved, EVERY, NAMES, origin=(5, 8)))
    shared = part.items() & facts(whole(mask)).items()
    assert len(shared) > len(part) / 2


def test_what_ends_in_a_window_needs_no_joiner():
    mask = noise((40, 40), 0.3, 2, 5)
    window = Window(0, 0, 20, 20)
    part = trace_window(mask[:20, :20], window, mask.shape, (1, 2), None)
    ended, rest = split_whole(part, together=False)
    assert len(ended) + len(rest) == len(part)
    assert len(ended) > len(rest) > 0
    again, same = split_whole(rest, together=False)
    assert len(again) == 0
    assert len(same) == len(rest)
    assert facts(finish_polygons(ended, grid_of(mask), EVERY, NAMES)).items() <= facts(whole(mask)).items()


def test_what_waits_for_no_neighbour_is_handed_out_at_once():
    mask = np.zeros((30, 300), np.uint8)
    mask[10:20, 2::5] = 1  # each column of a window or less, some on borders
    mask[10:20, 3::5] = 1
    joiner, waiting = Joiner(mask.shape), []
    found = 0
    for window in squares(mask.shape, 30, 8):
        part = trace_window(mask[:, window.col_off : window.col_end], window, mask.shape, (1,), None)
        found += len(joiner.add(part))
        waiting.append(len(joiner._waiting) + len(joiner._parent) + len(joiner._sides))
    joiner.finish()
    assert found == 60
    assert max(waiting) <= 3
    assert waiting[-1] == 0


def test_windows_that_do_not_tile_the_scene_are_refused():
    mask = np.ones((8, 8), np.uint8)
    windows = squares(mask.shape, 4, 4)
    parts = [trace_window(mask[:4, :4], window, mask.shape, (1,), None) for window in windows]
    joiner = Joiner(mask.shape)
    for part in parts[:3]:
        joiner.add(part)
    with pytest.raises(ConfigError, match="48 of its 64 pixels"):
        joiner.finish()
    joiner = Joiner(mask.shape)
    joiner.add(parts[0])
    with pytest.raises(ConfigError, match="added before"):
        joiner.add(parts[0])
    with pytest.raises(ConfigError, match="without a halo"):
        trace_window(mask, windows[0], mask.shape, (1,), None)
    with pytest.raises(ConfigError, match="past the scene"):
        trace_window(mask, Window(1, 0, 8, 8), mask.shape, (1,), None)
    with pytest.raises(ConfigError, match="from 1 to 254"):
        trace_window(mask[:4, :4], windows[0], mask.shape, (0, 1), None)
    with pytest.raises(ConfigError, match="probabilities of 1 classes"):
        trace_window(mask[:4, :4], windows[0], mask.shape, (1,), mask[None])


def test_classes_are_found_by_name():
    assert class_values(("road", "building"), NAMES) == (2, 1)
    with pytest.raises(ConfigError, match="the mask has building, road, water"):
        class_values(("roof",), NAMES)


def buildings(seed: int) -> NDArray[np.uint8]:
    """Return turned rectangles, some with a wing, none of which touch."""
    rng = np.random.default_rng(seed)
    rows, cols = np.indices((40, 40)) - 20
    mask = np.zeros((200, 240), np.uint8)
    for row, col in itertools.product(range(0, 200, 40), range(0, 240, 40)):
        turn = rng.uniform(0, np.pi)
        along, across = cols * np.cos(turn) + rows * np.sin(turn), rows * np.cos(turn) - cols * np.sin(turn)
        house = (np.abs(along) < rng.uniform(6, 15)) & (np.abs(across) < rng.uniform(5, 10))
        wing = (np.abs(along - 4) < 4) & (np.abs(across - 6) < 8)
        mask[row : row + 40, col : col + 40] = house | wing if rng.random() < 0.5 else house
    return mask


def test_squared_buildings_have_right_angles_and_do_not_depend_on_the_others():
    mask = buildings(0)
    config = EVERY.model_copy(update={"square": True, "simplify_px": 1.0})
    found, plain = whole(mask, config), whole(mask, EVERY)
    assert facts(found).keys() == facts(plain).keys()
    assert facts(polygons(mask, squares(mask.shape, 64, 64)[::-1], config)) == facts(found)
    alone = np.where(np.indices(mask.shape)[0] < 80, mask, 0).astype(np.uint8)
    assert facts(whole(alone, config)).items() <= facts(found).items()
    assert shapely.is_valid(found.geometry).all()
    overlap = shapely.area(shapely.intersection(found.geometry, plain.geometry)) / shapely.area(plain.geometry)
    assert overlap.min() > 0.85
    right = 0
    for polygon in found.geometry:
        steps = np.diff(np.array(polygon.exterior.coords), axis=0)
        angle = np.degrees(np.arctan2(steps[:, 1], steps[:, 0]))
        turns = np.abs(np.diff(np.append(angle, angle[0])))
        right += bool(np.all(np.minimum(turns % 45, -turns % 45) < 1))
    assert right > 0.9 * len(found)


@pytest.mark.parametrize("place", ["dubai/dubai_1_classes.tif", "hot_buildings/kampala_ug_z20_buildings.tif"])
def test_real_masks_come_out_as_gdal_traces_them(place):
    with rasterio.open(data_folder() / place) as source:
        mask = source.read(1)
    # In the second a building is 255, elsewhere no data.
    mask = mask[900:1900, 1000:2200] if place.startswith("dubai") else (mask == 255).astype(np.uint8)
    (oracle,) = traced_by_gdal([mask], (1, 2))
    assert len(oracle) > 40
    windows = squares(mask.shape, 512, 300)[::-1]
    groups = joined(mask, windows)
    same_as_gdal(finish_polygons(groups, grid_of(mask), EVERY, NAMES), oracle)
    simple = EVERY.model_copy(update={"simplify_px": 1.0})
    found = finish_polygons(groups, grid_of(mask), simple, NAMES)
    assert facts(found) == facts(whole(mask, simple))
    assert shapely.coverage_is_valid(np.array([polygon for _, polygon in in_pixels(found)]))

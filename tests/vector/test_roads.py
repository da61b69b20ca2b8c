"""Roads from masks: exact whatever the cutting, true to generated networks, and cleaned as a router needs them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.roads import drawn, parts, traced
from rasterio.crs import CRS
from scipy import ndimage
from skimage import morphology

from geoseg.errors import ConfigError, GeoreferenceError
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window
from geoseg.vector.roads import (
    RoadEdges,
    RoadNodes,
    RoadsConfig,
    finish_roads,
    join_roads,
    reach_of,
    reduced,
    reduced_grid,
    reduced_shares,
    trace_roads,
    tracing_factor,
)
from geoseg.vector.skeleton import UNKNOWN, Reach, filled, thin, thin_window
from geoseg.vector.wide import _straight

UTM = CRS.from_epsg(32633).to_wkt()
SMALL = Reach(half_width=5, hole=3)
ALL_OF_IT = 10_000


def grid_of(mask_hw, *, pixel_m=1.0, crs=UTM):
    """On the central meridian, where a pixel of UTM is 0.9996 of its size on the ground."""
    return Grid(crs, (pixel_m, 0, 500_000, 0, -pixel_m, 5_300_000), *mask_hw.shape)


def network(mask_hw, *, pixel_m=1.0, origin=(0, 0), shares_hw=None, **settings) -> tuple[RoadEdges, RoadNodes]:
    grid, config = grid_of(mask_hw, pixel_m=pixel_m), RoadsConfig(**settings)
    graph = traced(mask_hw, ALL_OF_IT, reach_of(grid, config), shares_hw=shares_hw)
    return finish_roads(graph, grid, config, {1: "road"}, origin=origin)


def pixels(geometry, pixel_m=1.0):
    """Rows and columns of the corners of shapes on ``grid_of``, whole where they lie at the centre of a pixel."""
    xy = shapely.get_coordinates(geometry)
    return np.stack([(5_300_000 - xy[:, 1]) / pixel_m - 0.5, (xy[:, 0] - 500_000) / pixel_m - 0.5], axis=1)


def spiral(side):
    mask_hw = np.zeros((side, side), np.uint8)
    turn = np.linspace(0, 2 * np.pi * side / 24, 40 * side)
    away = turn * 12 / (2 * np.pi)
    row, col = (side / 2 + away * np.sin(turn)).astype(int), (side / 2 + away * np.cos(turn)).astype(int)
    inside = (row >= 0) & (row < side) & (col >= 0) & (col < side)
    mask_hw[row[inside], col[inside]] = 1
    return ndimage.binary_dilation(mask_hw, iterations=2).astype(np.uint8)


def comb(shape):
    mask_hw = np.zeros(shape, np.uint8)
    mask_hw[4:9] = 1
    mask_hw[4:-3, ::6] = mask_hw[4:-3, 1::6] = mask_hw[4:-3, 2::6] = 1
    return mask_hw


def blobs(shape, seed, size, share):
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.random(shape), size)
    mask_hw = (noise > np.quantile(noise, 1 - share)).astype(np.uint8)
    unknown = ndimage.gaussian_filter(rng.random(shape), 12)
    mask_hw[unknown > np.quantile(unknown, 0.93)] = UNKNOWN
    return mask_hw


def car_parks(shape, seed):
    """Wide areas that many windows share, with roads into and between them."""
    rng = np.random.default_rng(seed)
    mask_hw = np.zeros(shape, np.uint8)
    for _ in range(4):
        row, col = rng.integers(0, shape[0] - 20), rng.integers(0, shape[1] - 20)
        mask_hw[row : row + rng.integers(12, 60), col : col + rng.integers(12, 60)] = 1
    for _ in range(5):
        ends = rng.integers(0, min(shape), (2, 2)).tolist()
        mask_hw |= drawn(shape, [tuple(end) for end in ends], width=float(rng.integers(2, 7)))
    return mask_hw


@st.composite
def masks(draw):
    shape = draw(st.tuples(st.integers(30, 110), st.integers(30, 110)))
    seed = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["blobs", "car parks", "comb", "spiral", "specks"]))
    if kind == "blobs":
        return blobs(shape, seed, draw(st.sampled_from([1.0, 2.0, 4.0, 9.0])), draw(st.sampled_from([0.2, 0.4, 0.7])))
    if kind == "specks":
        return (np.random.default_rng(seed).random(shape) < draw(st.sampled_from([0.3, 0.6, 0.9]))).astype(np.uint8)
    if kind == "car parks":
        return car_parks(shape, seed)
    return spiral(shape[0]) if kind == "spiral" else comb(shape)


def same_columns(one, other):
    for name in one.__slots__:
        mine, theirs = getattr(one, name), getattr(other, name)
        if name == "geometry":
            mine, theirs = shapely.to_wkb(mine), shapely.to_wkb(theirs)
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    mask_hw=masks(),
    size=st.integers(7, 60),
    seed=st.integers(0, 99),
    half_width=st.integers(2, 7),
    hole=st.integers(1, 5),
)
def test_neither_cutting_nor_order_changes_a_graph(mask_hw, size, seed, half_width, hole):
    reach = Reach(half_width=half_width, hole=hole)
    shares_hw = np.random.default_rng(seed).integers(0, 255, mask_hw.shape, np.uint8)
    whole = traced(mask_hw, ALL_OF_IT, reach, shares_hw=shares_hw)
    cut = traced(mask_hw, size, reach, shares_hw=shares_hw, seed=seed)
    for name in whole.__slots__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name), err_msg=name)
    config = RoadsConfig(min_spur_m=2, min_length_m=4, max_gap_m=6)
    for one, other in zip(
        *(finish_roads(graph, grid_of(mask_hw), config, {1: "road"}) for graph in (whole, cut)), strict=True
    ):
        same_columns(one, other)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mask_hw=masks(), half_width=st.integers(2, 7))
def test_ids_are_unique_and_lines_run_between_their_nodes(mask_hw, half_width):
    graph = traced(mask_hw, 40, Reach(half_width=half_width, hole=2))
    edges, nodes = finish_roads(graph, grid_of(mask_hw), RoadsConfig(min_spur_m=2, min_length_m=4), {1: "road"})
    assert len(np.unique(edges.id)) == len(edges.id)
    assert len(np.unique(nodes.id)) == len(nodes.id)
    assert (np.diff(edges.id) > 0).all()
    assert shapely.is_valid(edges.geometry).all()
    assert (edges.length_m > 0).all()
    place = {int(one): point for one, point in zip(nodes.id, nodes.geometry, strict=True)}
    ends = zip(edges.from_node.tolist(), edges.to_node.tolist(), edges.geometry, strict=True)
    assert all(
        shapely.Point(line.coords[0]) == place[first] and shapely.Point(line.coords[-1]) == place[last]
        for first, last, line in ends
    )
    np.testing.assert_array_equal(
        nodes.degree,
        [np.count_nonzero(edges.from_node == one) + np.count_nonzero(edges.to_node == one) for one in nodes.id],
    )
    loops = np.isin(nodes.id, edges.from_node[edges.from_node == edges.to_node])
    assert (nodes.degree[~loops] != 2).all()


@pytest.mark.parametrize("rounds", [1, 3, 200])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_thinning_is_that_of_scikit_image(rounds, share):
    """Another implementation of the same paper, which looks at every pixel in every pass."""
    road_hw = blobs((150, 170), 3, 2.5, share) == 1
    ours_hw = thin(road_hw, np.zeros_like(road_hw), rounds)
    np.testing.assert_array_equal(ours_hw, morphology.thin(road_hw, max_num_iter=rounds))


@settings(max_examples=30, deadline=None)
@given(mask_hw=masks(), half_width=st.integers(2, 7))
def test_the_rounds_suffice_for_all_that_is_not_wide(mask_hw, half_width):
    """More rounds change nothing: what is left are lines and the cores of wide areas."""
    reach = Reach(half_width=half_width, hole=1)

    class Longer(Reach):
        rounds = 100

    longer = Longer(half_width=half_width, hole=1)
    thinned, more = thin_window(mask_hw, (1,), reach), thin_window(mask_hw, (1,), longer)
    assert (thinned is None) == (more is None)
    if thinned is not None:
        np.testing.assert_array_equal(thinned.lines_hw, more.lines_hw)


def test_an_empty_window_is_empty():
    reach = Reach(half_width=3, hole=2)
    side = 10 + 2 * reach.halo
    for mask_hw in (np.zeros((side, side), np.uint8), np.full((side, side), UNKNOWN, np.uint8)):
        assert trace_roads(mask_hw, None, Window(0, 0, 10, 10), values=(1, 2), reach=reach).is_empty
    edges, nodes = finish_roads(join_roads([], reach), grid_of(mask_hw), RoadsConfig(), {1: "road"})
    assert len(edges.id) == len(edges.geometry) == len(nodes.id) == 0


def test_a_ring_over_many_windows_begins_where_it_does_in_one():
    """It has no node of its own; its lowest pixel becomes one."""
    turn = np.linspace(0, 2 * np.pi, 90)
    mask_hw = drawn((90, 90), list(zip(45 + 30 * np.sin(turn), 45 + 30 * np.cos(turn), strict=True)), width=3)
    whole, cut = traced(mask_hw, ALL_OF_IT, SMALL), traced(mask_hw, 30, SMALL, seed=1)
    assert len(whole.keys) == 1
    np.testing.assert_array_equal(whole.keys, cut.keys)
    np.testing.assert_array_equal(whole.path, cut.path)


def test_a_crossing_of_thin_lines_is_one_pixel_and_no_web_of_diagonals():
    mask_hw = np.zeros((21, 21), np.uint8)
    mask_hw[10, 2:19] = mask_hw[2:19, 10] = 1
    (part,) = parts(mask_hw, 21, SMALL)
    assert sorted(part.graph.degree.tolist()) == [1, 1, 1, 1, 4]
    assert len(part.graph.ends) == 4


def test_small_holes_are_filled_unless_they_are_unknown():
    mask_hw = np.ones((30, 60), np.uint8)
    mask_hw[12:15, 10:13] = 0
    mask_hw[12:15, 30:33] = UNKNOWN
    mask_hw[12:16, 45:49] = 0
    filled_hw = filled(mask_hw == 1, mask_hw == UNKNOWN, 3)
    assert filled_hw[12:15, 10:13].all()
    assert not filled_hw[12:15, 30:33].any()
    assert not filled_hw[12:16, 45:49].any()


@pytest.mark.parametrize("angle", [0, 7, 22.5, 30, 38, 45, 90])
@pytest.mark.parametrize("width", [3, 5, 9, 12.5])
def test_a_straight_road_has_its_length_and_width(angle, width):
    """Its ends are half of its width short of the mask's, which is round there; the width is true within a pixel."""
    length = 200.0
    start = np.array([40.0, 40.0])
    end = start + length * np.array([np.sin(np.radians(angle)), np.cos(np.radians(angle))])
    mask_hw = drawn((280, 280), [tuple(start), tuple(end)], width=width)
    edges, nodes = network(mask_hw)
    assert (len(edges.id), nodes.degree.tolist()) == (1, [1, 1])
    assert edges.length_m[0] == pytest.approx(length, abs=0.01 * length + 3)
    assert edges.length_m[0] == pytest.approx(np.hypot(*np.diff(pixels(nodes.geometry), axis=0)[0]) / 0.9996, rel=0.005)
    drawn_width = (np.count_nonzero(mask_hw) - np.pi * width**2 / 4) / length
    assert edges.width_m[0] == pytest.approx(drawn_width, abs=1)
    off = np.abs((pixels(edges.geometry) - start) @ np.array([np.cos(np.radians(angle)), -np.sin(np.radians(angle))]))
    assert off.max() <= 1.1


def test_a_winding_road_has_its_length():
    turn = np.linspace(0, 4 * np.pi, 400)
    corners = list(zip(100 + 40 * np.sin(turn), 30 + 20 * turn, strict=True))
    edges, _ = network(drawn((200, 320), corners, width=6))
    assert len(edges.id) == 1
    assert edges.length_m[0] == pytest.approx(shapely.LineString(corners).length, rel=0.02)


def test_a_grid_of_streets():
    """Four by three streets: twelve crossings and no hairs; each block has four sides."""
    streets = [[(60 * i + 30, 10), (60 * i + 30, 260)] for i in range(3)] + [
        [(10, 60 * i + 40), (170, 60 * i + 40)] for i in range(4)
    ]
    edges, nodes = network(drawn((180, 270), *streets, width=9))
    at = {tuple(np.rint(one).astype(int)) for one in pixels(nodes.geometry[nodes.degree == 4])}
    want = {(60 * i + 30, 60 * j + 40) for i in range(3) for j in range(4)}
    assert len(at) == 12
    assert all(min(np.hypot(r - a, c - b) for a, b in at) <= 1.5 for r, c in want)
    assert np.count_nonzero(nodes.degree == 1) == 14
    assert len(nodes.id) == 26
    inner = np.isin(edges.from_node, nodes.id[nodes.degree == 4]) & np.isin(edges.to_node, nodes.id[nodes.degree == 4])
    assert np.count_nonzero(inner) == 17
    np.testing.assert_allclose(edges.length_m[inner], 60, atol=1.5)
    np.testing.assert_allclose(edges.width_m, 9, atol=1)


@pytest.mark.parametrize("angle", [90, 60, 45])
@pytest.mark.parametrize("width", [5, 9])
def test_an_oblique_crossing_is_one_node(angle, width):
    """Thinning makes two T of it."""
    half = 90 * np.array([np.sin(np.radians(angle)), np.cos(np.radians(angle))])
    mask_hw = drawn((220, 220), [(110, 10), (110, 210)], [tuple(110 - half), tuple(110 + half)], width=width)
    edges, nodes = network(mask_hw)
    assert sorted(nodes.degree.tolist()) == [1, 1, 1, 1, 4]
    assert len(edges.id) == 4
    assert np.hypot(*(pixels(nodes.geometry[nodes.degree == 4])[0] - 110)) < 2.5


def test_a_t_junction_a_dead_end_and_a_roundabout():
    turn = np.linspace(0, 2 * np.pi, 60)
    ring = list(zip(100 + 25 * np.sin(turn), 100 + 25 * np.cos(turn), strict=True))
    mask_hw = drawn(
        (200, 300), ring, [(100, 125), (100, 290)], [(100, 200), (180, 200)], [(100, 75), (100, 10)], width=6
    )
    edges, nodes = network(mask_hw)
    assert sorted(nodes.degree.tolist()) == [1, 1, 1, 3, 3, 3]
    assert len(edges.id) == 6
    west, east = nodes.id[nodes.degree == 3][np.argsort(pixels(nodes.geometry[nodes.degree == 3])[:, 1])][:2]
    round_it = (np.minimum(edges.from_node, edges.to_node) == min(west, east)) & (
        np.maximum(edges.from_node, edges.to_node) == max(west, east)
    )
    assert np.count_nonzero(round_it) == 2  # two lines between the same nodes, each with an id
    np.testing.assert_allclose(edges.length_m[round_it], np.pi * 25, rtol=0.03)


def test_a_ring_road_alone_has_one_node():
    turn = np.linspace(0, 2 * np.pi, 90)
    ring = list(zip(70 + 40 * np.sin(turn), 70 + 40 * np.cos(turn), strict=True))
    mask_hw = drawn((140, 140), ring, width=5)
    edges, nodes = network(mask_hw)
    assert nodes.degree.tolist() == [2]
    assert edges.from_node.tolist() == edges.to_node.tolist() == nodes.id.tolist()
    assert edges.length_m[0] == pytest.approx(2 * np.pi * 40, rel=0.02)


def test_roads_side_by_side_stay_apart():
    edges, nodes = network(drawn((60, 220), [(20, 10), (20, 210)], [(29, 10), (29, 210)], width=6))
    assert len(edges.id) == 2
    assert nodes.degree.tolist() == [1, 1, 1, 1]


def test_hairs_go_and_streets_stay():
    """A stub that reaches 5 m beyond the edge of the road is a hair, one of 20 m is a street; two prongs at an end are one."""
    road, stub, street = [(60, 10), (60, 200)], [(60, 80), (51, 80)], [(60, 140), (36, 140)]
    _, nodes = network(drawn((120, 220), road, stub, street, width=8))
    assert sorted(nodes.degree.tolist()) == [1, 1, 1, 3]
    fork = drawn((120, 220), road, [(60, 200), (66, 206)], [(60, 200), (54, 206)], width=5)
    assert network(fork)[1].degree.tolist() == [1, 1]


@pytest.mark.parametrize(("gap", "num_lines"), [(8, 1), (14, 1), (18, 2)])
def test_a_gap_is_closed_up_to_its_largest_length(gap, num_lines):
    mask_hw = drawn((60, 240), [(30, 10), (30, 230)], width=7)
    mask_hw[:, 120 : 120 + gap] = 0
    edges, _ = network(mask_hw, max_gap_m=15)
    assert len(edges.id) == num_lines
    if num_lines == 1:
        assert edges.length_m[0] == pytest.approx(220, rel=0.02)
        assert edges.width_m[0] == pytest.approx(7, abs=1)


def test_a_gap_before_the_side_of_a_road_makes_a_junction():
    mask_hw = drawn((160, 240), [(100, 10), (100, 230)], [(20, 120), (84, 120)], width=6)
    edges, nodes = network(mask_hw)
    assert sorted(nodes.degree.tolist()) == [1, 1, 1, 3]
    assert len(edges.id) == 3
    assert network(mask_hw, max_gap_m=5)[1].degree.tolist() == [1, 1, 1, 1]


def test_a_gap_is_not_closed_round_a_corner():
    """Two roads that end side by side, and one that ends beside another which it does not point at."""
    side_by_side = drawn((120, 240), [(40, 10), (40, 120)], [(52, 120), (52, 230)], width=5)
    assert len(network(side_by_side, max_gap_angle_deg=35)[0].id) == 2
    beside = drawn((120, 240), [(40, 10), (40, 230)], [(52, 60), (52, 180)], width=5)
    assert len(network(beside)[0].id) == 2


def test_a_hook_is_not_closed_onto_itself(monkeypatch):
    hook = drawn((140, 240), [(100, 20), (100, 200), (55, 180), (66, 173)], width=4)
    assert len(network(hook, max_gap_m=50)[0].id) == 1
    monkeypatch.setattr("geoseg.vector.mend._WAY_ROUND", 0)
    assert len(network(hook, max_gap_m=50)[0].id) > 1


def test_between_two_ends_a_crossing_road_is_met_and_not_jumped():
    mask_hw = drawn((160, 240), [(10, 120), (150, 120)], [(80, 10), (80, 107)], [(80, 133), (80, 230)], width=6)
    edges, nodes = network(mask_hw)
    assert len(edges.id) == 4
    assert sorted(nodes.degree.tolist()) == [1, 1, 1, 1, 4]


def test_crumbs_are_left_out():
    mask_hw = drawn((120, 240), [(30, 10), (30, 230)], [(90, 100), (90, 112)], width=5)
    assert len(network(mask_hw)[0].id) == 1
    assert len(network(mask_hw, min_length_m=5)[0].id) == 2


@pytest.mark.parametrize("angle", [90, 60, 45])
def test_a_road_that_leaves_the_scene_runs_to_its_edge(angle):
    """Up to the last row of pixels, in the middle of the road, without a fork into its corners; so does one at nodata."""
    across = 150 / np.tan(np.radians(angle))
    road = [(75 - 150, 150 - across), (75 + 150, 150 + across)]
    mask_hw = drawn((150, 300), road, width=12)
    edges, nodes = network(mask_hw)
    assert nodes.degree.tolist() == [1, 1]
    rows, cols = pixels(nodes.geometry).T
    assert sorted(np.rint(rows).tolist()) == [0, 149]
    on_line = 150 + (rows - 75) / np.tan(np.radians(angle))
    np.testing.assert_allclose(cols, on_line, atol=1.5)
    with_collar = np.pad(mask_hw, 40, constant_values=UNKNOWN)
    beside, _ = network(with_collar)
    assert beside.length_m.tolist() == pytest.approx(edges.length_m.tolist())


def test_a_road_cut_lengthwise_by_the_scenes_edge_has_no_stub():
    mask_hw = drawn((80, 260), [(2, 10), (2, 250)], width=9)
    edges, nodes = network(mask_hw)
    assert (len(edges.id), nodes.degree.tolist()) == (1, [1, 1])


def test_a_wide_area_is_crossed_by_a_star():
    """Three roads into a square of 100 m meet in it; inside there is no other line."""
    mask_hw = drawn((300, 300), [(150, 10), (150, 110)], [(150, 190), (150, 290)], [(10, 150), (110, 150)], width=8)
    mask_hw[100:200, 100:200] = 1
    edges, nodes = network(mask_hw)
    assert sorted(nodes.degree.tolist()) == [1, 1, 1, 3]
    assert edges.length_m.sum() == pytest.approx(140 + 140 + 140, rel=0.06)


def test_two_roads_into_a_wide_area_are_one_and_one_ends_at_it():
    mask_hw = drawn((240, 400), [(120, 10), (120, 390)], width=8)
    mask_hw[70:170, 100:300] = 1
    edges, _ = network(mask_hw)
    assert len(edges.id) == 1
    assert edges.length_m[0] == pytest.approx(381, rel=0.01)
    mask_hw[:, 300:] = 0
    edges, _ = network(mask_hw)
    assert len(edges.id) == 1
    assert edges.length_m[0] < 140
    mask_hw[:, :100] = 0
    assert len(network(mask_hw)[0].id) == 0


def test_a_way_through_a_bent_wide_area_stays_inside():
    mask_hw = np.zeros((400, 400), np.uint8)
    mask_hw[100:370, 60:140] = mask_hw[100:370, 260:340] = mask_hw[290:370, 60:340] = 1
    mask_hw |= drawn((400, 400), [(20, 100), (110, 100)], [(20, 300), (110, 300)], width=8)
    edges, _ = network(mask_hw)
    assert len(edges.id) == 1
    row, col = np.rint(pixels(shapely.segmentize(edges.geometry, 1))).astype(int).T
    assert mask_hw[row, col].all()
    assert edges.width_m[0] == pytest.approx(9, abs=1)


def test_chords_over_cells_do_not_leave_them():
    """An L of cells is gone along in two chords, a block in one."""
    bent = np.array([[row, 0] for row in range(8)] + [[7, col] for col in range(1, 8)], np.int64)
    assert _straight(bent, list(range(15))) == [0, 7, 14]
    block = np.argwhere(np.ones((8, 8))).astype(np.int64)
    assert _straight(block, [0, 8, 16, 24, 25, 26, 27]) == [0, 27]


def test_attributes_are_those_of_the_pixels():
    mask_hw = drawn((80, 240), [(40, 10), (40, 230)], width=6)
    mask_hw[:, 100:] *= 3
    shares_hw = np.where(mask_hw > 0, 127, 10).astype(np.uint8)
    grid, config = grid_of(mask_hw), RoadsConfig()
    graph = traced(mask_hw, 64, reach_of(grid, config), shares_hw=shares_hw, values=(1, 3))
    edges, _ = finish_roads(graph, grid, config, {1: "track", 3: "road"})
    assert edges.confidence.tolist() == [0.5]
    assert edges.class_name.tolist() == ["road"]
    assert np.isnan(network((mask_hw > 0).astype(np.uint8))[0].confidence).all()


def test_ids_are_places_on_a_lattice_that_scenes_share():
    """A scene that begins elsewhere has the same ids where it shows the same, rows and columns below nought among them."""
    mask_hw = drawn((120, 240), [(60, 10), (60, 230)], [(60, 120), (110, 120)], width=6)
    edges, nodes = network(mask_hw, origin=(-1000, 7))
    row, col = nodes.id >> 32, nodes.id.astype(np.int32)
    np.testing.assert_array_equal(np.stack([row + 1000, col - 7], axis=1), np.rint(pixels(nodes.geometry)))
    moved = np.pad(mask_hw, ((30, 0), (50, 0)))
    other, other_nodes = network(moved, origin=(-1030, -43))
    np.testing.assert_array_equal(edges.id, other.id)
    np.testing.assert_array_equal(nodes.id, other_nodes.id)
    assert not np.isin(network(mask_hw)[0].id, edges.id).any()


def test_numbers_that_come_out_equal_are_told_apart(monkeypatch):
    monkeypatch.setattr("geoseg.vector.roads._mixed", lambda bits: bits * np.uint64(0))
    edges, _ = network(drawn((120, 120), [(30, 10), (30, 110)], [(60, 10), (60, 110)], [(90, 10), (90, 110)], width=6))
    assert edges.id.tolist() == [0, 1, 2]


def test_lengths_are_geodesic_on_any_grid():
    """In Web Mercator at 60 degrees north a pixel of 1.2 m is 0.6 m on the ground."""
    mask_hw = drawn((80, 500), [(40, 0), (40, 499)], width=11)
    mercator = CRS.from_epsg(3857).to_wkt()
    grid = Grid(mercator, (1.2, 0, 1_000_000, 0, -1.2, 8_399_737), *mask_hw.shape)
    assert grid.resolution_m == pytest.approx(0.6, rel=0.01)
    config = RoadsConfig()
    edges, _ = finish_roads(traced(mask_hw, 300, reach_of(grid, config)), grid, config, {1: "road"})
    assert edges.length_m.tolist() == pytest.approx([499 * 0.6], rel=0.01)
    assert edges.width_m.tolist() == pytest.approx([6.6], abs=0.6)
    mars = Grid('LOCAL_CS["somewhere",UNIT["metre",1]]', (1.0, 0, 0, 0, -1.0, 0), *mask_hw.shape)
    with pytest.raises(GeoreferenceError, match="no longitude and latitude"):
        finish_roads(traced(mask_hw, 300, reach_of(mars, config)), mars, config, {1: "road"})


@pytest.mark.parametrize(("pixel_m", "factor"), [(0.15, 4), (0.3, 2), (0.5, 2), (0.6, 1), (1.0, 1), (3.0, 1)])
def test_small_pixels_are_put_together(pixel_m, factor):
    grid = grid_of(np.zeros((1001, 77)), pixel_m=pixel_m)
    assert tracing_factor(grid, RoadsConfig()) == factor
    small = reduced_grid(grid, factor)
    assert (small.height, small.width) == (-(-1001 // factor), -(-77 // factor))
    assert small.affine * (1, 1) == grid.affine * (factor, factor)


def test_putting_pixels_together_keeps_thin_roads_and_tells_what_is_unknown():
    """Where every second pixel would be taken, the road on odd rows would vanish."""
    mask_hw = np.zeros((8, 16), np.uint8)
    mask_hw[1] = 2
    mask_hw[4:, 8:] = UNKNOWN
    mask_hw[5, 8:10] = 2
    assert not (mask_hw[::2, ::2] == 2).any()
    small_hw = reduced(mask_hw, (2,), 2)
    assert small_hw[0].tolist() == [2] * 8
    assert small_hw[2].tolist() == [0] * 4 + [2] + [UNKNOWN] * 3 or small_hw[2].tolist() == [0] * 4 + [UNKNOWN] * 4
    for size in (4, 8):
        parts_hw = [reduced(mask_hw[:, col : col + size], (2,), 4) for col in range(0, 16, size)]
        np.testing.assert_array_equal(np.concatenate(parts_hw, axis=1), reduced(mask_hw, (2,), 4))
    shares_hw = np.where(mask_hw == UNKNOWN, UNKNOWN, 100).astype(np.uint8)
    shares_hw[0, 0] = 104
    assert reduced_shares(shares_hw, 2)[0, :2].tolist() == [101, 100]
    assert reduced_shares(shares_hw, 2)[3, -1] == UNKNOWN
    with pytest.raises(ConfigError, match="read whole multiples"):
        reduced(mask_hw[:7], (2,), 2)


def test_what_does_not_fit_is_refused():
    reach = Reach(half_width=3, hole=2)
    with pytest.raises(ConfigError, match="must have"):
        trace_roads(np.zeros((10, 10), np.uint8), None, Window(0, 0, 10, 10), values=(1,), reach=reach)
    with pytest.raises(ConfigError, match="smaller max_width_m or a larger resolution_m"):
        reach_of(grid_of(np.zeros((9, 9)), pixel_m=0.01), RoadsConfig(max_width_m=60))
    with pytest.raises(ValueError, match="Extra inputs"):
        RoadsConfig(max_width=60)


def test_the_parts_of_a_scene_travel_small():
    """13 bytes for each pixel of line, and some for each line and part."""
    mask_hw = drawn((600, 600), [(300, 0), (300, 599)], [(0, 300), (599, 300)], width=8)
    found = parts(mask_hw, 300, Reach(half_width=20, hole=4))
    assert sum(len(pickle.dumps(part)) for part in found) < 1200 * 13 + 4 * 2500


def test_a_turned_grid_is_laid_out_by_its_geotransform():
    mask_hw = drawn((120, 200), [(60, 20), (60, 180)], width=6)
    turned = Affine.translation(500_000, 5_300_000) * Affine.rotation(30) * Affine.scale(1, -1)
    grid = Grid(UTM, tuple(turned)[:6], *mask_hw.shape)
    config = RoadsConfig()
    edges, nodes = finish_roads(traced(mask_hw, 90, reach_of(grid, config)), grid, config, {1: "road"})
    (x0, y0), (x1, y1) = shapely.get_coordinates(nodes.geometry)
    assert abs(np.degrees(np.arctan2(y1 - y0, x1 - x0))) == pytest.approx(30, abs=1)
    assert edges.length_m[0] == pytest.approx(shapely.length(edges.geometry[0]) / 0.9996, rel=1e-3)

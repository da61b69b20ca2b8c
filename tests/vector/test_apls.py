"""Average path length similarity against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from pyproj import CRS, Geod, Transformer

from geoseg.errors import GeoreferenceError
from geoseg.vector.apls import RoadGraphGeometry, apls, on_a_plane


def graph(*lines: list[tuple[float, float]]) -> RoadGraphGeometry:
    """Lines of corners in metres; those that begin or end in one place share a node."""
    places = sorted({corner for line in lines for corner in (line[0], line[-1])})
    nodes = np.array([[places.index(line[0]), places.index(line[-1])] for line in lines], np.int64).reshape(-1, 2)
    return RoadGraphGeometry(np.array([shapely.LineString(line) for line in lines], np.object_), nodes + 1000)


SQUARE = ([(0, 0), (40, 0)], [(40, 0), (40, 40)], [(40, 40), (0, 40)], [(0, 40), (0, 0)])
CITY = [
    [(x, y), (x + dx, y + dy)]
    for x in range(0, 400, 100)
    for y in range(0, 400, 100)
    for dx, dy in ((100, 0), (0, 100))
]
BENT = ([(0, 0), (30, 5), (60, 0)], [(60, 0), (60, 80)], [(60, 0), (90, 0), (100, 40), (60, 0)])


@pytest.mark.parametrize(
    "lines", [SQUARE, CITY, BENT, ([(0, 0), (500, 3)],)], ids=["square", "city", "loop", "one line"]
)
def test_a_graph_is_wholly_like_itself(lines):
    told = apls(graph(*lines), graph(*lines))
    assert (told.score, told.truth_in_proposal, told.proposal_in_truth) == pytest.approx((1, 1, 1))


def test_turned_lines_and_other_cuts_are_the_same_roads():
    turned = [line[::-1] for line in CITY][::-1]
    assert apls(graph(*CITY), graph(*turned)).score == pytest.approx(1)
    halves = [half for line in SQUARE for half in ([line[0], mid(line)], [mid(line), line[1]])]
    assert apls(graph(*SQUARE), graph(*halves)).score == pytest.approx(1)


def mid(line):
    (x, y), (u, v) = line
    return ((x + u) / 2, (y + v) / 2)


def test_a_missing_side_of_a_square_makes_one_pair_of_six_go_round_three():
    """Truth in proposal: 40 m become 120 m, a loss of 1 for one of six pairs. Back: 120 m become 40 m, a loss of 2 / 3."""
    told = apls(graph(*SQUARE), graph(*SQUARE[:3]))
    assert told.truth_in_proposal == pytest.approx(1 - 1 / 6)
    assert told.proposal_in_truth == pytest.approx(1 - 2 / 3 / 6)
    assert told.score == pytest.approx(2 / (6 / 5 + 9 / 8))


def test_a_road_cut_in_two_loses_the_paths_over_the_cut():
    """Three nodes in a row: 2 of 3 paths go through the second line."""
    truth = graph([(0, 0), (40, 0)], [(40, 0), (80, 0)])
    told = apls(truth, graph([(0, 0), (40, 0)]))
    assert told.truth_in_proposal == pytest.approx(1 / 3)
    assert told.proposal_in_truth == pytest.approx(1)


def test_points_on_long_lines_count_too():
    """A line of 200 m has five control points, ten paths; its first half has three of them, and so three of the paths."""
    told = apls(graph([(0, 0), (200, 0)]), graph([(0, 0), (100, 0)]))
    assert told.truth_in_proposal == pytest.approx(3 / 10)
    assert told.proposal_in_truth == pytest.approx(1)


@pytest.mark.parametrize(("shift", "score"), [(0.5, 1.0), (3.9, 1.0), (4.1, 0.0)])
def test_a_shift_below_the_snap_distance_costs_nothing_above_it_everything(shift, score):
    moved = [[(x, y + shift) for x, y in line] for line in ([(0, 0), (40, 0)], [(40, 0), (90, 0)])]
    assert apls(graph([(0, 0), (40, 0)], [(40, 0), (90, 0)]), graph(*moved)).score == pytest.approx(score)


def test_a_detour_costs_its_share():
    """10 m up and down again: 100 m are 120 m; a fifth is lost one way, a sixth the other."""
    told = apls(graph([(0, 0), (40, 0)]), graph([(0, 0), (20, 10), (40, 0)]))
    long = 2 * math.hypot(20, 10)
    assert told.truth_in_proposal == pytest.approx(1 - (long - 40) / 40)
    assert told.proposal_in_truth == pytest.approx(1 - (long - 40) / long)


def test_two_roads_side_by_side_between_the_same_crossings_are_not_added_up():
    """The shorter of two lines with the same ends counts, whichever stands first."""
    short, long = [(0, 0), (40, 0)], [(0, 0), (20, 15), (40, 0)]
    assert apls(graph(short, long), graph(long, short)).score == pytest.approx(1)
    assert apls(graph(short), graph(short, long)).truth_in_proposal == pytest.approx(1)


def test_no_roads_are_like_none():
    nothing = graph()
    assert apls(graph(*SQUARE), nothing).score == 0
    assert apls(nothing, graph(*SQUARE)).score == 0
    assert math.isnan(apls(nothing, nothing).score)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:32637"])
def test_a_plane_keeps_the_metres_of_the_ellipsoid(crs):
    lonlat = [[(36.80, -1.29), (36.81, -1.28)], [(36.81, -1.28), (36.81, -1.30), (36.83, -1.30)]]
    to_crs = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    lines = [[to_crs.transform(*corner) for corner in line] for line in lonlat]
    one, other = on_a_plane(CRS.from_user_input(crs).to_wkt(), graph(*lines), graph(lines[0]))
    want_m = [Geod(ellps="WGS84").line_length(*zip(*line, strict=True)) for line in lonlat]
    assert shapely.length(one.lines).tolist() == pytest.approx(want_m, rel=1e-5)
    assert shapely.equals_exact(one.lines[0], other.lines[0], tolerance=1e-6)
    with pytest.raises(GeoreferenceError, match="no plane in metres"):
        on_a_plane('LOCAL_CS["somewhere",UNIT["metre",1]]', graph(*SQUARE))


def test_it_is_symmetric_and_many_points_are_taken_in_parts(monkeypatch):
    """The score does not depend on which graph is the truth, nor on how many sources are looked at together."""
    proposal = CITY[:20] + CITY[21:]
    told, other = apls(graph(*CITY), graph(*proposal)), apls(graph(*proposal), graph(*CITY))
    assert (told.score, told.truth_in_proposal) == pytest.approx((other.score, other.proposal_in_truth))
    assert 0.8 < told.score < 1
    monkeypatch.setattr("geoseg.vector.apls._SOURCES_AT_ONCE", 7)
    assert apls(graph(*CITY), graph(*proposal)).score == pytest.approx(told.score)

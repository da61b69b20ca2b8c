"""Two road graphs in, how alike their shortest paths are out (average path length similarity).

A. Van Etten, D. Lindenbaum, T. M. Bacastow, "SpaceNet: A Remote Sensing Dataset and Challenge Series", arXiv:1807.01232, section
on road networks. Control points of one graph are snapped to the other. For each pair of them that a path joins, the path in the
other graph may be longer or shorter by a share of its length; that share, at most 1, is the pair's loss, and it is 1 where a
point does not snap or no path is found. The score is the harmonic mean of 1 minus the mean loss, both ways round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import ProjError
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import dijkstra

from geoseg.errors import GeoreferenceError

CONTROL_M = 50.0
SNAP_M = 4.0
_SOURCES_AT_ONCE = 256
_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RoadGraphGeometry:
    """A road graph on a plane in metres: shapely LineStrings, and the ids (line, 2) of the nodes where each begins and ends."""

    lines: NDArray[np.object_]
    nodes: _Ints


@dataclass(frozen=True, slots=True)
class Apls:
    """The score and its halves, each from 0 to 1: paths of the truth in the proposal, and of the proposal in the truth."""

    score: float
    truth_in_proposal: float
    proposal_in_truth: float


@dataclass(frozen=True, slots=True, eq=False)
class _Points:
    """Places on lines: of which line, and how far along it in metres."""

    line: _Ints
    along_m: _Floats


def on_a_plane(crs_wkt: str, *graphs: RoadGraphGeometry) -> tuple[RoadGraphGeometry, ...]:
    """Graphs in a CRS of the Earth on one plane in metres, which is true to distances from the middle of all of them.

    At 50 km from it distances across are off by less than 1 in 10,000. Raises GeoreferenceError for another body's CRS.
    """
    west, south, east, north = shapely.total_bounds(np.concatenate([one.lines for one in graphs]))
    crs = CRS.from_wkt(crs_wkt)
    try:
        to_lonlat = Transformer.from_crs(crs, CRS.from_epsg(4326), always_xy=True)
        lon, lat = to_lonlat.transform([(west + east) / 2], [(south + north) / 2], errcheck=True)
        plane = CRS.from_proj4(f"+proj=aeqd +lat_0={lat[0]:.9f} +lon_0={lon[0]:.9f} +datum=WGS84 +units=m")
        to_plane = Transformer.from_crs(crs, plane, always_xy=True)

        def moved(xy: _Floats) -> _Floats:
            return np.stack(to_plane.transform(xy[:, 0], xy[:, 1], errcheck=True), axis=1)

        return tuple(RoadGraphGeometry(shapely.transform(one.lines, moved), one.nodes) for one in graphs)
    except ProjError as error:
        raise GeoreferenceError(f"the roads have no longitude and latitude, so no plane in metres: {error}") from error


def apls(truth: RoadGraphGeometry, proposal: RoadGraphGeometry) -> Apls:
    """How alike the shortest paths of two graphs are; 1 for graphs without a difference, 0 where one of them has no roads.

    Control points are the nodes and points at equal distances of at most 50 m along the lines between them; they snap to the
    nearest point of the other graph up to 4 m away. Where neither graph has roads there is nothing to compare, and all is
    NaN.
    """
    if not len(truth.lines) and not len(proposal.lines):
        return Apls(math.nan, math.nan, math.nan)
    there, back = _similarity(truth, proposal), _similarity(proposal, truth)
    return Apls(2 * there * back / (there + back) if there + back else 0.0, there, back)


def _similarity(one: RoadGraphGeometry, other: RoadGraphGeometry) -> float:
    """1 minus the mean loss of the paths of one graph in the other."""
    if not len(one.lines) or not len(other.lines):
        return 0.0
    points = _control_points(one)
    snapped, found = _snapped(shapely.line_interpolate_point(one.lines[points.line], points.along_m), other)
    ways, at = _network(one, points)
    other_ways, other_at = _network(other, snapped)
    num, lost = 0, 0.0
    for first in range(0, len(at), _SOURCES_AT_ONCE):
        some = slice(first, first + _SOURCES_AT_ONCE)
        here_m = dijkstra(ways, directed=False, indices=at[some])[:, at]
        there_m = np.full(here_m.shape, np.inf)
        rows = np.flatnonzero(found[some])
        if len(rows):
            from_m = dijkstra(other_ways, directed=False, indices=other_at[np.cumsum(found)[some][rows] - 1])
            there_m[np.ix_(rows, found)] = from_m[:, other_at]
        counts = np.isfinite(here_m) & (here_m > 0)
        here_m, there_m = here_m[counts], there_m[counts]
        num += len(here_m)
        lost += float(np.minimum(1.0, np.abs(here_m - there_m) / here_m).sum())
    return 1 - lost / num if num else 0.0


def _control_points(graph: RoadGraphGeometry) -> _Points:
    """Each node once, at the end of one of its lines, and the points that cut each line in equal parts of at most 50 m."""
    length_m = shapely.length(graph.lines)
    _, first = np.unique(graph.nodes.ravel(), return_index=True)
    parts = np.maximum(1, np.ceil(length_m / CONTROL_M)).astype(np.int64)
    line = np.repeat(np.arange(len(parts)), parts - 1)
    part = np.arange(len(line)) - np.repeat(np.cumsum(parts - 1) - (parts - 1), parts - 1) + 1
    return _Points(
        np.append(first // 2, line),
        np.append(np.where(first % 2 == 0, 0, length_m[first // 2]), length_m[line] * part / parts[line]),
    )


def _snapped(points: NDArray[np.object_], graph: RoadGraphGeometry) -> tuple[_Points, NDArray[np.bool_]]:
    """The nearest places on a graph's lines of those points that are near enough, and which these are."""
    nearest = shapely.STRtree(graph.lines).query_nearest(points, max_distance=SNAP_M, all_matches=True)
    nearest = nearest[:, np.lexsort((nearest[1], nearest[0]))]
    which, first = np.unique(nearest[0], return_index=True)
    found = np.zeros(len(points), np.bool_)
    found[which] = True
    line = nearest[1][first]
    return _Points(line, shapely.line_locate_point(graph.lines[line], points[which])), found


def _network(graph: RoadGraphGeometry, points: _Points) -> tuple[csr_array, _Ints]:
    """Lengths in metres between the graph's nodes and points on its lines, as far as they come next, and where the points are."""
    _, ends = np.unique(graph.nodes, return_inverse=True)
    ends = ends.reshape(-1, 2)
    num_nodes, num_lines = int(ends.max()) + 1, len(graph.lines)
    line = np.concatenate([np.arange(num_lines), points.line, np.arange(num_lines)])
    along_m = np.concatenate([np.zeros(num_lines), points.along_m, shapely.length(graph.lines)])
    at = num_nodes + np.arange(len(points.line))
    node = np.concatenate([ends[:, 0], at, ends[:, 1]])
    turn = np.repeat([0, 1, 2], [num_lines, len(at), num_lines])
    order = np.lexsort((turn, along_m, turn == 2, turn != 0, line))
    line, along_m, node = line[order], along_m[order], node[order]
    next_m = np.maximum(0, np.diff(along_m))
    same = line[1:] == line[:-1]
    low, high = np.minimum(node[:-1], node[1:])[same], np.maximum(node[:-1], node[1:])[same]
    order = np.lexsort((next_m[same], high, low))
    low, high, next_m = low[order], high[order], next_m[same][order]
    shortest = np.append(True, (low[1:] != low[:-1]) | (high[1:] != high[:-1]))
    num = num_nodes + len(at)
    ways = coo_array((next_m[shortest], (low[shortest], high[shortest])), shape=(num, num)).tocsr()
    return ways, at

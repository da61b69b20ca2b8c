"""Cells of areas too wide to be a road and the roads that run into them in, the shortest ways through them out.

A car park, a square or an apron has no centre line. It is kept as the cells of a coarse lattice that its core touches. The ways
through it are those from the roads that enter it to its middle, without what lies beyond the last branching: two roads
are joined by one line, more by a star, and an area that one road enters, or none, gets no line at all.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, dijkstra

from geoseg.vector.graph import PIXEL, Graph, key_of, kind_of, make_graph, place_of, straight
from geoseg.vector.skeleton import HALF_STEPS, UNKNOWN, nearest_to_centroid

_Ints = NDArray[np.int64]


def cell_side(half_width: int) -> int:
    """Side of a cell in pixels: a power of two, small enough that cores of areas that do not touch have no cells side by side.

    Two such cores are more than two half widths apart, pixels of cells that touch less than 2.9 sides.
    """
    return 1 << max(0, (2 * half_width // 3).bit_length() - 1)


def crossed(graph: Graph, cells: _Ints, side: int, half_width: int) -> Graph:
    """The graph with its cell nodes at the middle pixels of their cells, and with ways between them through the wide areas.

    ``cells`` (cell, 2) are all rows and columns of cells, each once, sorted. The half width of a way is the largest there is.
    """
    if not len(cells):
        return graph
    entered = kind_of(graph.keys) == 1
    row, col = place_of(graph.keys)
    entries = np.searchsorted(_packed(cells), _packed(np.stack([row[entered], col[entered]], axis=1)))
    keys = graph.keys.copy()
    pixels = graph.pixels.copy()
    pixels[entered] = _middles(cells[entries], side, half_width)
    keys[entered] = key_of(pixels["row"][entered], pixels["col"][entered])
    middles = _middles(cells, side, half_width)
    middle_keys = key_of(middles["row"], middles["col"])
    ways = _ways(cells, np.unique(entries))
    paths = [_drawn(middles, _straight(cells, way)) for way in ways]
    on_way = np.concatenate([np.zeros(0, PIXEL), *paths])
    ends = np.array([[middle_keys[way[0]], middle_keys[way[-1]]] for way in ways], np.int64).reshape(-1, 2)
    on_way["half"], on_way["value"] = half_width * HALF_STEPS, UNKNOWN
    return make_graph(
        np.concatenate([keys, middle_keys]),
        np.concatenate([pixels, middles]),
        np.concatenate([keys[graph.ends], ends]),
        (
            np.concatenate([np.diff(graph.offsets), np.array([len(path) for path in paths], np.int64)]),
            np.concatenate([graph.path, on_way]),
        ),
    )


def _packed(cells: _Ints) -> _Ints:
    return (cells[:, 0] << 32) + cells[:, 1]


def _middles(cells: _Ints, side: int, half_width: int) -> NDArray[np.void]:
    pixels = np.zeros(len(cells), PIXEL)
    pixels["row"], pixels["col"] = (cells * side + side // 2).T
    pixels["half"], pixels["value"] = half_width * HALF_STEPS, UNKNOWN
    return pixels


def _ways(cells: _Ints, entries: _Ints) -> list[list[int]]:
    """Runs of cells from an entry or a branching to the next."""
    links = _beside(cells)
    _, area = connected_components(links, directed=False)
    centres = nearest_to_centroid(cells[:, 0], cells[:, 1], area)
    centres = centres[np.isin(area[centres], area[entries])]
    if not len(centres):
        return []
    _, before, _ = dijkstra(links, directed=False, indices=centres, return_predecessors=True, min_only=True)
    num_outer = np.zeros(len(cells), np.int64)  # how many cells on a way lead through this one to the middle
    on_way = np.zeros(len(cells), np.bool_)
    for at in entries.tolist():
        while not on_way[at]:
            on_way[at] = True
            if before[at] < 0:
                break
            num_outer[before[at]] += 1
            at = int(before[at])  # noqa: PLW2901
    is_entry = np.zeros(len(cells), np.bool_)
    is_entry[entries] = True
    stops = on_way & (is_entry | (num_outer != 1))
    ways = []  # beyond the last branching nothing is a stop any more, so the middle alone gets no way
    for start in np.flatnonzero(stops).tolist():
        way = [start]
        while before[way[-1]] >= 0 and on_way[before[way[-1]]]:
            way.append(int(before[way[-1]]))
            if stops[way[-1]]:
                ways.append(way)
                break
    return ways


def _beside(cells: _Ints) -> csr_array:
    """Which cells touch, by a side or a corner, and how far their middles lie apart, in cells."""
    packed = _packed(cells)
    one, other, weight = [], [], []
    for down, across in ((0, 1), (1, -1), (1, 0), (1, 1)):
        beside = packed + (down << 32) + across
        place = np.minimum(np.searchsorted(packed, beside), len(packed) - 1)
        there = np.flatnonzero(packed[place] == beside)
        one.append(there)
        other.append(place[there])
        weight.append(np.full(len(there), float(np.hypot(down, across))))
    links: csr_array = coo_array(
        (np.concatenate(weight), (np.concatenate(one), np.concatenate(other))), shape=(len(cells), len(cells))
    ).tocsr()
    return links


def _straight(cells: _Ints, way: list[int]) -> list[int]:
    """The corners of a way over cells: it is cut at the cell farthest from its chord until every chord stays inside."""
    packed = _packed(cells)
    corners = [way[0]]
    runs = [(0, len(way) - 1)]
    while runs:
        first, last = runs.pop()
        start, end = cells[way[first]], cells[way[last]]
        seen = _packed(straight(tuple(start), tuple(end)))
        if last - first < 2 or np.array_equal(packed[np.searchsorted(packed, seen) % len(packed)], seen):
            corners.append(way[last])
            continue
        chord = end - start
        away = cells[way[first + 1 : last]] - start
        cut = first + 1 + int(np.abs(away[:, 0] * chord[1] - away[:, 1] * chord[0]).argmax())
        runs += [(cut, last), (first, cut)]
    return corners


def _drawn(middles: NDArray[np.void], corners: list[int]) -> NDArray[np.void]:
    """The pixels on the way from corner to corner, without the first and the last."""
    steps = [np.zeros((0, 2), np.int64)]
    for one, other in itertools.pairwise(corners):
        start, end = middles[one], middles[other]
        steps.append(straight((start["row"], start["col"]), (end["row"], end["col"]))[1:])
    between = np.concatenate(steps)[:-1]
    pixels = np.zeros(len(between), PIXEL)
    pixels["row"], pixels["col"] = between.T
    return pixels

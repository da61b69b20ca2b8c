"""A raw graph of centre lines in; without hairs and crumbs, its gaps closed and its crossings whole, out.

Every choice is made by lengths and places, ties by the order of nodes and edges, which is that of their places.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from geoseg.vector.graph import (
    PIXEL,
    Graph,
    dissolved,
    edge_lengths,
    key_of,
    make_graph,
    merged,
    path_keys,
    straight,
    take_edges,
    with_ends,
)
from geoseg.vector.skeleton import HALF_STEPS, UNKNOWN

_LOOK_BACK = 10  # pixels from which an end has its direction, or four half widths
_WAY_ROUND = 3  # a gap is none if the way round is not longer than so many times its length
_TO_A_SIDE = 1.25  # an end as near as this is rather joined to than the side of a line
_ENDS_AT_ONCE = 1024
_OF_ONE_CROSSING = 2.25  # half widths
_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is a hair, a gap, a crumb. Lengths in metres; ``step_m`` are those of a row and of a column, ``pixel_m`` their mean."""

    step_m: tuple[float, float]
    pixel_m: float
    min_spur_m: float
    max_gap_m: float
    max_gap_angle_deg: float
    min_length_m: float


def mended(graph: Graph, limits: Limits) -> Graph:
    """The graph without short spurs, with gaps closed, crossings put together, and pieces that are too short left out."""
    graph = pruned(graph, limits)
    graph = pruned(dissolved(with_gaps_closed(graph, limits)), limits)
    graph = dissolved(with_crossings_merged(graph, limits))
    return dissolved(without_crumbs(graph, limits))


def pruned(graph: Graph, limits: Limits) -> Graph:
    """The graph without dead ends that reach less than ``min_spur_m`` beyond the edge of the road that they leave.

    Of those at one node the shortest goes first, one that leaves the scene last; what is left is looked at anew, so that of
    two prongs at the end of a road one stays and becomes the road's end.
    """
    while True:
        degree = graph.degree[graph.ends]
        is_spur = (degree.min(axis=1, initial=9) == 1) & (degree.max(axis=1, initial=0) >= 3)
        foot = np.where(degree[:, 0] == 1, graph.ends[:, 1], graph.ends[:, 0])
        length = edge_lengths(graph, limits.step_m)
        beyond = length - graph.pixels["half"][foot] * (limits.pixel_m / HALF_STEPS)
        short = np.flatnonzero(is_spur & (beyond < limits.min_spur_m))
        if not len(short):
            return graph
        leaves = np.any(graph.pixels["at_edge"][graph.ends], axis=1)
        short = short[np.lexsort((short, length[short], leaves[short], foot[short]))]
        goes = short[np.append(True, foot[short][1:] != foot[short][:-1])]
        stays = np.ones(len(length), np.bool_)
        stays[goes] = False
        graph = dissolved(take_edges(graph, np.flatnonzero(stays)))


def with_crossings_merged(graph: Graph, limits: Limits) -> Graph:
    """The graph in which two junctions are one where the line between them is little longer than the road is wide.

    Thinning makes two T of an X; those of one of 45 degrees are as far apart.
    """
    busy = (graph.degree >= 3)[graph.ends].all(axis=1) & (graph.ends[:, 0] != graph.ends[:, 1])
    half_m = graph.pixels["half"][graph.ends].max(axis=1, initial=0) * (limits.pixel_m / HALF_STEPS)
    return merged(graph, busy & (edge_lengths(graph, limits.step_m) <= _OF_ONE_CROSSING * half_m))


def without_crumbs(graph: Graph, limits: Limits) -> Graph:
    """The graph without pieces whose lines together are shorter than ``min_length_m``."""
    total_m = _piece_lengths(graph, limits)
    return take_edges(graph, np.flatnonzero(total_m[graph.ends[:, 0]] >= limits.min_length_m))


def _piece_lengths(graph: Graph, limits: Limits) -> _Floats:
    """For each node the length of all lines of the piece of the network to which it belongs."""
    num = len(graph.keys)
    ones = np.ones(len(graph.ends), np.bool_)
    links = coo_array((ones, (graph.ends[:, 0], graph.ends[:, 1])), shape=(num, num))
    _, piece = connected_components(links, directed=False) if num else (0, np.zeros(0, np.int64))
    total_m: _Floats = np.bincount(piece[graph.ends[:, 0]], edge_lengths(graph, limits.step_m), num).astype(np.float64)
    return total_m[piece]


@dataclass(frozen=True, slots=True, eq=False)
class _Pixels:
    """All pixels of all edges, the ends among them: whose, at which place of it (0 the first node), in metres and as they are."""

    edge: _Ints
    place: _Ints
    xy_m: _Floats
    pixel: NDArray[np.void]
    num: _Ints  # by edge


@dataclass(frozen=True, slots=True, eq=False)
class _Gaps:
    """Possible ways over gaps: from which end (a node) to which pixel (a place in _Pixels), sorted by what they cost."""

    start: _Ints
    target: _Ints


def with_gaps_closed(graph: Graph, limits: Limits) -> Graph:
    """The graph with lines from dead ends on over gaps, to other dead ends or to the sides of lines, which are cut there.

    A gap counts from edge to edge of the mask, that is without the half widths at both ends (as far as these are below
    ``max_gap_m``). The shortest is closed first; a side counts as 1.25 times as far, and must lie ahead within half of the
    angle, or roads side by side would be tied together. A dead end is joined once, never to where it can be reached from by a
    way round of less than three times the gap, and not if all of its piece of the network is shorter than the gap.
    """
    dead = np.flatnonzero(graph.degree == 1)
    if not len(dead) or not limits.max_gap_m:
        return graph
    edge, pixel = with_ends(graph)
    num = np.diff(graph.offsets) + 2
    place = np.arange(len(edge)) - np.repeat(np.cumsum(num) - num, num)
    xy_m = np.stack([pixel["row"] * limits.step_m[0], pixel["col"] * limits.step_m[1]], axis=1)
    all_pixels = _Pixels(edge, place, xy_m, pixel, num)
    node = np.full(len(edge), -1, np.int64)
    starts = np.cumsum(num) - num
    node[starts], node[starts + num - 1] = graph.ends.T
    gaps = _possible(graph, dead, all_pixels, node, limits)
    open_ends = set(dead.tolist())
    taken: list[tuple[int, int]] = []
    for start, target in zip(gaps.start.tolist(), gaps.target.tolist(), strict=True):
        other = int(node[target])
        is_dead = other >= 0 and graph.degree[other] == 1
        if start in open_ends and (not is_dead or other in open_ends):
            open_ends.discard(start)
            open_ends.discard(other)
            taken.append((start, target))
    return _closed(graph, all_pixels, node, taken)


def _possible(graph: Graph, dead: _Ints, pixels: _Pixels, node: _Ints, limits: Limits) -> _Gaps:
    """The ways from dead ends that keep to the limits, from those that cost least on."""
    at = np.full(len(graph.keys), -1, np.int64)  # of a dead end, its one place among the pixels
    at[node[node >= 0]] = np.flatnonzero(node >= 0)
    end = at[dead]
    long_enough_m = _piece_lengths(graph, limits)[dead]
    half_m = np.minimum(pixels.pixel["half"] * (limits.pixel_m / HALF_STEPS), limits.max_gap_m)
    reach_m = limits.max_gap_m + half_m[end] + float(half_m.max())
    near = _near(pixels.xy_m, pixels.xy_m[end], float(reach_m.max()))
    tree = cKDTree(pixels.xy_m[near])
    ahead = _ahead(pixels, end)
    least, least_to_side = np.cos(np.radians(limits.max_gap_angle_deg) * np.array([1, 0.5]))
    starts, targets, costs = [], [], []
    for first in range(0, len(dead), _ENDS_AT_ONCE):
        some = np.arange(first, min(first + _ENDS_AT_ONCE, len(dead)))
        found = tree.query_ball_point(pixels.xy_m[end[some]], reach_m[some], return_sorted=True)
        start = np.repeat(some, [len(one) for one in found])
        target = near[np.concatenate([np.asarray(one, np.int64) for one in found])]
        over_m = pixels.xy_m[target] - pixels.xy_m[end[start]]
        far_m = np.hypot(over_m[:, 0], over_m[:, 1])
        ok = (far_m > 0) & ((ahead[start] * over_m).sum(axis=1) >= least * far_m) & (long_enough_m[start] >= far_m)
        ok &= far_m - half_m[end[start]] - half_m[target] <= limits.max_gap_m
        start, target, over_m, far_m = start[ok], target[ok], over_m[ok], far_m[ok]
        ok = _way_round(graph, pixels, end[start], target) * limits.pixel_m > _WAY_ROUND * far_m
        start, target, over_m, far_m = start[ok], target[ok], over_m[ok], far_m[ok]
        is_end = (node[target] >= 0) & (graph.degree[node[target]] == 1)
        target_ahead = np.zeros((len(target), 2))
        target_ahead[is_end] = ahead[np.searchsorted(dead, node[target[is_end]])]
        faces = is_end & ((target_ahead * -over_m).sum(axis=1) >= least * far_m)
        ok = faces | ((ahead[start] * over_m).sum(axis=1) >= least_to_side * far_m)
        starts.append(start[ok])
        targets.append(target[ok])
        costs.append((far_m * np.where(faces, 1, _TO_A_SIDE))[ok])
    start, target, cost = np.concatenate(starts), np.concatenate(targets), np.concatenate(costs)
    order = np.lexsort((path_keys(pixels.pixel[target]), start, cost))
    return _Gaps(dead[start[order]], target[order])


def _near(all_m: _Floats, ends_m: _Floats, reach_m: float) -> _Ints:
    """Which points lie in the squares of side ``reach_m`` around those of the ends."""

    def squares(xy: _Floats, down: int, across: int) -> _Ints:
        square = np.floor(xy / reach_m).astype(np.int64)
        return (square[:, 0] + down << 32) + square[:, 1] + across

    around = np.unique(np.concatenate([squares(ends_m, down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]))
    own = squares(all_m, 0, 0)
    return np.flatnonzero(around[np.minimum(np.searchsorted(around, own), len(around) - 1)] == own)


def _ahead(pixels: _Pixels, end: _Ints) -> _Floats:
    """The direction (end, 2), a unit vector, in which a line would go on."""
    far = np.minimum(np.maximum(_LOOK_BACK, 4 * pixels.pixel["half"][end].astype(np.int64) // HALF_STEPS), 1 << 20)
    num = pixels.num[pixels.edge[end]]
    back = np.where(pixels.place[end] == 0, 1, -1) * np.minimum(far, num - 1)
    ahead = pixels.xy_m[end] - pixels.xy_m[end + back]
    unit: _Floats = ahead / np.maximum(np.hypot(ahead[:, 0], ahead[:, 1]), 1e-9)[:, None]
    return unit


def _way_round(graph: Graph, pixels: _Pixels, end: _Ints, target: _Ints) -> _Ints:
    """Pixels from an end to a target along its own line, or past the node at its line's other end; more than all otherwise."""
    edge, other = pixels.edge[end], pixels.edge[target]
    far = np.full(len(end), np.iinfo(np.int32).max, np.int64)
    far[edge == other] = np.abs(pixels.place[end] - pixels.place[target])[edge == other]
    node = np.where(pixels.place[end] == 0, graph.ends[edge, 1], graph.ends[edge, 0])
    for side in (0, 1):
        beyond = np.where(side == 0, pixels.place[target], pixels.num[other] - 1 - pixels.place[target])
        meets = (graph.ends[other, side] == node) & (edge != other)
        far[meets] = np.minimum(far, pixels.num[edge] - 1 + beyond)[meets]
    return far


def _closed(graph: Graph, pixels: _Pixels, node: _Ints, taken: list[tuple[int, int]]) -> Graph:
    """The graph with lines from nodes to pixels; edges are cut where one ends on their side."""
    if not taken:
        return graph
    keys = path_keys(pixels.pixel)
    first = np.cumsum(pixels.num) - pixels.num
    cuts: defaultdict[int, set[int]] = defaultdict(set)
    ends, paths, new = [], [], []
    for start, target in taken:
        if node[target] < 0:
            cuts[int(pixels.edge[target])].add(target)
            new.append(target)
        one, other = graph.pixels[start], pixels.pixel[target]
        over = (graph.keys[start], keys[target])
        if over[0] > over[1]:
            one, other = other, one
        ends.append((min(over), max(over)))
        between = straight((one["row"], one["col"]), (other["row"], other["col"]))[1:-1]
        path = np.zeros(len(between), PIXEL)
        path["row"], path["col"] = between.T
        path["half"] = min(one["half"], other["half"])
        path["share"] = path["value"] = UNKNOWN
        paths.append(path)
    for edge, places in cuts.items():
        at = [int(first[edge]), *sorted(places), int(first[edge] + pixels.num[edge] - 1)]
        keys_at = [graph.keys[graph.ends[edge, 0]], *keys[at[1:-1]], graph.keys[graph.ends[edge, 1]]]
        for i in range(len(at) - 1):
            ends.append((keys_at[i], keys_at[i + 1]))
            paths.append(pixels.pixel[at[i] + 1 : at[i + 1]])
    uncut = np.ones(len(graph.ends), np.bool_)
    uncut[list(cuts)] = False
    kept = take_edges(graph, np.flatnonzero(uncut))
    return make_graph(
        np.concatenate([graph.keys, key_of(pixels.pixel["row"][new], pixels.pixel["col"][new])]),
        np.concatenate([graph.pixels, pixels.pixel[new]]),
        np.concatenate([graph.keys[kept.ends], np.array(ends, np.int64)]),
        (
            np.concatenate([np.diff(kept.offsets), np.array([len(one) for one in paths], np.int64)]),
            np.concatenate([kept.path, *paths]),
        ),
    )

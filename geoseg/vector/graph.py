"""Pixels and the links between them in, a graph of nodes and pixel paths out: joined, dissolved, pruned, and in one order.

A graph is a handful of flat arrays; an edge's path is the pixels between its two nodes, without theirs. Everything is decided
by places on the lattice of pixels, never by the order in which parts came, and whatever it makes is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from geoseg.vector.skeleton import nearest_to_centroid

PIXEL = np.dtype([("row", "<i4"), ("col", "<i4"), ("half", "<u2"), ("share", "u1"), ("value", "u1"), ("at_edge", "?")])
_TINY_LOOP = 4
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Nodes by key, and edges with the pixels between their nodes.

    ``keys`` (node) int64, rising: where the node lies, see ``key_of``; ``pixels`` (node) PIXEL: its own pixel, if it has one.
    ``ends`` (edge, 2) places of nodes. The path of edge i, from its first to its second end, is
    ``path[offsets[i] : offsets[i + 1]]``, PIXEL: row and column, half width in 1/64 pixel, probability in steps of 1/254, and the
    value in the mask, 255 for one that was made up to close a gap or to cross a wide area; and whether it is the last pixel of a
    road that leaves the scene. Memory follows the length of the roads: 13 bytes per pixel of line.
    """

    keys: _Ints
    pixels: NDArray[np.void]
    ends: _Ints
    offsets: _Ints
    path: NDArray[np.void]

    @property
    def degree(self) -> _Ints:
        """How many ends of edges each node has; both of a loop count."""
        return np.bincount(self.ends.ravel(), minlength=len(self.keys))

    @property
    def has_pixel(self) -> NDArray[np.bool_]:
        """Which nodes are pixels, and not the middle of a link between two of them or a cell of a wide area."""
        is_pixel: NDArray[np.bool_] = kind_of(self.keys) == 0
        return is_pixel


def key_of(row: NDArray[np.integer], col: NDArray[np.integer], kind: int = 0) -> _Ints:
    """The key of a node on a lattice with four steps per pixel: 0 a pixel, 1 a cell (rows and columns of cells).

    A link that leaves a window ends in its middle, at the mean of two pixels, which is neither.
    """
    return ((4 * row.astype(np.int64) + kind) << 32) + 4 * col.astype(np.int64) + kind


def middle_key(row: NDArray[np.integer], col: NDArray[np.integer], down: int, across: int) -> _Ints:
    """The key of the middle of the link from a pixel to a neighbour."""
    return key_of(row, col) + (2 * down << 32) + 2 * across


def place_of(keys: _Ints) -> tuple[_Ints, _Ints]:
    """Row and column of a pixel or a cell, from its key."""
    return keys >> 34, (keys & 0xFFFFFFFF) >> 2


def kind_of(keys: _Ints) -> _Ints:
    """0 a pixel, 1 a cell, 2 the middle of a link."""
    down, across = keys >> 32 & 3, keys & 3
    return np.where((down == 2) | (across == 2), 2, down & across)


def empty_graph() -> Graph:
    """A graph without anything."""
    nothing = np.zeros(0, np.int64)
    return Graph(nothing, np.zeros(0, PIXEL), np.zeros((0, 2), np.int64), np.zeros(1, np.int64), np.zeros(0, PIXEL))


def make_graph(
    keys: _Ints, pixels: NDArray[np.void], end_keys: _Ints, paths: tuple[_Ints, NDArray[np.void]] | None = None
) -> Graph:
    """A graph of nodes in any order (of several with one key the first counts) and edges between keys.

    ``end_keys`` (edge, 2); ``paths`` are lengths and pixels, all empty without.
    """
    known, first = np.unique(keys, return_index=True)
    lengths, path = paths if paths is not None else (np.zeros(len(end_keys), np.int64), np.zeros(0, PIXEL))
    ends = np.searchsorted(known, end_keys.reshape(-1, 2))
    return in_order(Graph(known, pixels[first], ends, np.append(0, np.cumsum(lengths)), path))


def concatenated(graphs: Sequence[Graph]) -> Graph:
    """Graphs as one; nodes with one key become one, with the pixel of the first that has one."""
    graphs = [empty_graph(), *graphs]
    return make_graph(
        np.concatenate([one.keys for one in graphs]),
        np.concatenate([one.pixels for one in graphs]),
        np.concatenate([one.keys[one.ends] for one in graphs]),
        (
            np.concatenate([np.diff(one.offsets) for one in graphs]),
            np.concatenate([one.path for one in graphs]),
        ),
    )


def path_keys(path: NDArray[np.void]) -> _Ints:
    """The keys of the pixels of a path."""
    return key_of(path["row"], path["col"])


def straight(start: tuple[int, int], end: tuple[int, int]) -> _Ints:
    """The rows and columns (n, 2) of the pixels on the straight way from one to another, both among them."""
    first = np.array(start, np.int64)
    over = np.array(end, np.int64) - first
    num = int(np.abs(over).max())
    along = np.arange(num + 1)[:, None]
    way: _Ints = first + (2 * along * over + num) // max(1, 2 * num)
    return way


def spans(starts: _Ints, lengths: _Ints, steps: _Ints | None = None) -> _Ints:
    """``starts[0], starts[0] + 1, ...``, ``lengths[0]`` of them, then those of the next; or by -1 where ``steps`` says so."""
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places: _Ints = np.repeat(starts, lengths) + (within if steps is None else within * np.repeat(steps, lengths))
    return places


def take_edges(graph: Graph, edges: _Ints, *, turned: NDArray[np.bool_] | None = None) -> Graph:
    """These edges in this order, those that are ``turned`` the other way round; all nodes stay."""
    turned = np.zeros(len(edges), np.bool_) if turned is None else turned
    lengths = np.diff(graph.offsets)[edges]
    starts = np.where(turned, graph.offsets[edges + 1] - 1, graph.offsets[edges])
    path = graph.path[spans(starts, lengths, np.where(turned, -1, 1))]
    ends = np.where(turned[:, None], graph.ends[edges][:, ::-1], graph.ends[edges])
    return Graph(graph.keys, graph.pixels, ends, np.append(0, np.cumsum(lengths)), path)


def in_order(graph: Graph) -> Graph:
    """The same graph, each edge from its lower end on (a loop from its lower neighbour on), edges sorted, none twice.

    Nodes without edges are left out.
    """
    lengths = np.diff(graph.offsets)
    first, last = graph.ends.T.copy()
    if len(graph.path):
        top = len(graph.path) - 1
        first_key = path_keys(graph.path[np.minimum(graph.offsets[:-1], top)])
        last_key = path_keys(graph.path[np.maximum(graph.offsets[1:] - 1, 0)])
        first_key, last_key = (np.where(lengths > 0, one, -1) for one in (first_key, last_key))
    else:
        first_key = last_key = np.full(len(lengths), -1, np.int64)
    turned = (first > last) | ((first == last) & (first_key > last_key))
    low, high = np.where(turned, last, first), np.where(turned, first, last)
    low_key, high_key = np.where(turned, last_key, first_key), np.where(turned, first_key, last_key)
    rank = (lengths, high_key, low_key, high, low)
    order = np.lexsort(rank)
    same = np.ones(max(0, len(order) - 1), np.bool_)
    for column in rank:
        same &= column[order][1:] == column[order][:-1]
    order = order[np.append(True, ~same)[: len(order)]]
    graph = take_edges(graph, order, turned=turned[order])
    used, ends = np.unique(graph.ends, return_inverse=True)
    return Graph(graph.keys[used], graph.pixels[used], ends.reshape(-1, 2), graph.offsets, graph.path)


def dissolved(graph: Graph, may_go: NDArray[np.bool_] | None = None) -> Graph:
    """The graph without nodes of degree two (those that ``may_go``); their pixels are in the paths that go on through them.

    A ring without another node keeps one: its lowest pixel. Edges are strung together by pointer doubling, so the effort is
    that of sorting them.
    """
    if not len(graph.ends):
        return in_order(graph)
    goes = graph.degree == 2
    if may_go is not None:
        goes &= may_go
    tail = graph.ends.ravel()  # half-edges: 2 i leaves the first end of edge i, 2 i + 1 the second
    next_one = _next(tail, goes)
    last, steps = _followed(next_one)
    ring = next_one[last] >= 0
    if ring.any():
        goes[_lowest_of_ring(next_one, tail)[ring]] = False
        next_one = _next(tail, goes)
        last, steps = _followed(next_one)
    first_of = np.empty(len(tail), np.int64)  # by last half-edge, the first
    is_first = np.ones(len(tail), np.bool_)
    is_first[next_one[next_one >= 0]] = False
    first_of[last[is_first]] = np.flatnonzero(is_first)
    backwards = first_of[last] > (last ^ 1)  # of each chain and its reverse one is taken
    kept = np.flatnonzero(~backwards)
    kept = kept[np.lexsort((-steps[kept], last[kept]))]
    joined = _strung(graph, kept, next_one)
    return in_order(_with_low_rings(in_order(joined)))


def _next(tail: _Ints, goes: NDArray[np.bool_]) -> _Ints:
    """The half-edge that follows each one through a node that goes, or -1."""
    next_one = np.full(len(tail), -1, np.int64)
    leaving = np.argsort(tail, kind="stable")
    leaving = leaving[goes[tail[leaving]]].reshape(-1, 2)
    next_one[leaving[:, 0] ^ 1] = leaving[:, 1]
    next_one[leaving[:, 1] ^ 1] = leaving[:, 0]
    return next_one


def _followed(next_one: _Ints) -> tuple[_Ints, _Ints]:
    """For each half-edge the last of its chain, and how many steps away that is; anything in a ring."""
    jump = np.where(next_one < 0, np.arange(len(next_one)), next_one)
    steps = (next_one >= 0).astype(np.int64)
    for _ in range(len(next_one).bit_length() + 1):
        further = jump[jump]
        if np.array_equal(further, jump):
            break
        steps = steps + steps[jump]
        jump = further
    return jump, steps


def _lowest_of_ring(next_one: _Ints, tail: _Ints) -> _Ints:
    """For each half-edge the lowest node on its way; on a ring that is the ring's."""
    jump = np.where(next_one < 0, np.arange(len(next_one)), next_one)
    lowest = tail.copy()
    for _ in range(len(next_one).bit_length() + 1):
        lowest = np.minimum(lowest, lowest[jump])
        jump = jump[jump]
    return lowest


def _strung(graph: Graph, kept: _Ints, next_one: _Ints) -> Graph:
    """The graph whose edges are the chains of the half-edges ``kept``, given chain by chain from first to last."""
    edge, turned = kept >> 1, kept % 2 == 1
    goes_on = next_one[kept] >= 0
    head = graph.ends.ravel()[kept ^ 1]
    lengths = np.diff(graph.offsets)[edge]
    with_node = lengths + (goes_on & graph.has_pixel[head])
    starts = np.where(turned, graph.offsets[edge + 1] - 1, graph.offsets[edge])
    places = spans(starts, with_node, np.where(turned, -1, 1))
    after = np.cumsum(with_node) - 1
    inserted = with_node > lengths
    pool = np.concatenate([graph.path, graph.pixels])
    places[after[inserted]] = len(graph.path) + head[inserted]
    chain_last = np.flatnonzero(~goes_on)
    chain_first = np.append(0, chain_last[:-1] + 1)
    ends = np.stack([graph.ends.ravel()[kept[chain_first]], head[chain_last]], axis=1)
    offsets = np.append(0, (after + 1)[chain_last])
    return Graph(graph.keys, graph.pixels, ends, offsets, pool[places])


def _with_low_rings(graph: Graph) -> Graph:
    """The graph with each ring that hangs on nothing turned so that its one node is its lowest pixel."""
    alone = np.flatnonzero((graph.ends[:, 0] == graph.ends[:, 1]) & (graph.degree[graph.ends[:, 0]] == 2))
    keys, pixels, path = graph.keys.copy(), graph.pixels.copy(), graph.path.copy()
    lengths = np.diff(graph.offsets)
    has_pixel = graph.has_pixel
    moved = np.zeros(len(lengths), np.bool_)
    for edge in alone.tolist():
        part = slice(int(graph.offsets[edge]), int(graph.offsets[edge + 1]))
        node = int(graph.ends[edge, 0])
        around = np.concatenate([graph.pixels[node : node + 1], path[part]]) if has_pixel[node] else path[part]
        lowest = int(path_keys(around).argmin())
        if has_pixel[node] and lowest == 0:
            continue
        around = np.roll(around, -lowest)
        keys[node], pixels[node] = path_keys(around[:1])[0], around[0]
        path[part.start : part.start + len(around) - 1] = around[1:]
        moved[edge] = not has_pixel[node]  # its path is one pixel shorter now
    if moved.any():
        path = np.delete(path, graph.offsets[1:][moved] - 1)
        lengths = lengths - moved
    order = np.argsort(keys, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return Graph(keys[order], pixels[order], rank[graph.ends], np.append(0, np.cumsum(lengths)), path)


def merged(graph: Graph, edges: NDArray[np.bool_]) -> Graph:
    """The graph with the nodes at both ends of these edges made one, at their or the edges' pixel nearest to the centroid of all.

    The edges go; so do others that thereby become loops of a few pixels. All the nodes have pixels.
    """
    if not edges.any():
        return graph
    pairs = graph.ends[edges]
    num = len(graph.keys)
    links = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(num, num))
    _, group = connected_components(links, directed=False)
    gone = take_edges(graph, np.flatnonzero(edges))
    pool = np.concatenate([graph.pixels, gone.path])
    pool_group = np.concatenate([group, np.repeat(group[gone.ends[:, 0]], np.diff(gone.offsets))])
    middle = nearest_to_centroid(pool["row"], pool["col"], pool_group)[group]
    widest = np.zeros(num, np.uint16)
    np.maximum.at(widest, pool_group, pool["half"])
    is_merged = np.isin(group, group[pairs])
    keys = np.where(is_merged, path_keys(pool[middle]), graph.keys)
    pixels = np.where(is_merged, pool[middle], graph.pixels)
    pixels["half"] = np.where(is_merged, widest[group], pixels["half"])
    is_tiny = (group[graph.ends[:, 0]] == group[graph.ends[:, 1]]) & (np.diff(graph.offsets) <= _TINY_LOOP)
    kept = take_edges(graph, np.flatnonzero(~edges & ~(is_tiny & is_merged[graph.ends[:, 0]])))
    return make_graph(keys, pixels, keys[kept.ends], (np.diff(kept.offsets), kept.path))


def with_clusters_merged(graph: Graph) -> Graph:
    """The graph in which neighbouring pixels at which three or more ways meet are one node."""
    busy = (graph.degree >= 3) & graph.has_pixel
    return merged(graph, (np.diff(graph.offsets) == 0) & busy[graph.ends].all(axis=1))


def edge_lengths(graph: Graph, step_m: tuple[float, float] = (1.0, 1.0)) -> NDArray[np.float64]:
    """The length of each edge along its pixels, ``step_m`` being that of a row and of a column.

    Steps of each kind are counted before they are weighed, so that a sum does not depend on its order.
    """
    edge, down, across = _steps(graph)
    length = np.zeros(len(graph.ends))
    near = (down <= 1) & (across <= 1)
    for d, a in ((0, 1), (1, 0), (1, 1)):
        count = np.bincount(edge[near & (down == d) & (across == a)], minlength=len(graph.ends))
        length += count * float(np.hypot(d * step_m[0], a * step_m[1]))
    far = np.flatnonzero(~near)  # from a merged node to the first pixel of a path: at most two of an edge
    if len(far):
        length += np.bincount(edge[far], np.hypot(down[far] * step_m[0], across[far] * step_m[1]), len(graph.ends))
    return length


def _steps(graph: Graph) -> tuple[_Ints, _Ints, _Ints]:
    """For each step of each edge: the edge, and the rows and columns from one pixel to the next, unsigned."""
    edge, pixels = with_ends(graph)
    inside = edge[1:] == edge[:-1]
    down = np.abs(np.diff(pixels["row"].astype(np.int64)))[inside]
    across = np.abs(np.diff(pixels["col"].astype(np.int64)))[inside]
    return edge[1:][inside], down, across


def with_ends(graph: Graph) -> tuple[_Ints, NDArray[np.void]]:
    """For all edges one after the other the pixels of the first node, the path and the second node; and whose they are."""
    lengths = np.diff(graph.offsets)
    edge = np.repeat(np.arange(len(lengths)), lengths + 2)
    pixels = np.empty(len(edge), PIXEL)
    ends = np.cumsum(lengths + 2)
    inner = np.ones(len(edge), np.bool_)
    inner[ends - 1] = inner[ends - lengths - 2] = False
    pixels[inner] = graph.path
    pixels[ends - lengths - 2] = graph.pixels[graph.ends[:, 0]]
    pixels[ends - 1] = graph.pixels[graph.ends[:, 1]]
    return edge, pixels

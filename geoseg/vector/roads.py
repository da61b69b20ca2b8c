"""Windows of a mask in, a road graph out: lines with length, width, confidence and the nodes that they join.

``trace_roads`` does a window, ``join_roads`` puts the windows of a scene together, ``finish_roads`` cleans the network, lays it on
the ground and numbers it. A network, numbers included, depends neither on how the scene was cut nor on the order of its parts.
Where pixels are small, ``reduced`` first makes larger ones (``tracing_factor``, ``reduced_grid``): the others work on those.

Legend of axes: h rows, w columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import ProjError

from geoseg.config import RoadsConfig
from geoseg.errors import ConfigError, GeoreferenceError
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window
from geoseg.vector.graph import (
    PIXEL,
    Graph,
    concatenated,
    dissolved,
    empty_graph,
    key_of,
    make_graph,
    middle_key,
    place_of,
    with_clusters_merged,
    with_ends,
)
from geoseg.vector.mend import Limits, mended
from geoseg.vector.skeleton import HALF_STEPS, UNKNOWN, Reach, Thinned, is_road, thin_window
from geoseg.vector.wide import cell_side, crossed

_SHARE_STEPS = 254
_FINER = 1.05  # a pixel of 1.02 m passes for one of 1 m
_SMOOTHINGS = 8
_FORWARD = ((0, 1), (1, -1), (1, 0), (1, 1))
_BACKWARD = ((0, -1), (-1, 1), (-1, 0), (-1, -1))
_SIDES_FIRST = ((-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
_Length = Annotated[FiniteFloat, Field(ge=0)]
_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


def tracing_factor(grid: Grid, config: RoadsConfig) -> int:
    """How many pixels of a mask's side become one before it is traced: a power of two."""
    times = config.resolution_m * _FINER / grid.resolution_m
    return 1 << max(0, math.floor(math.log2(times)))


def reduced_grid(grid: Grid, factor: int) -> Grid:
    """The grid on which ``factor`` x ``factor`` pixels are one; the last ones may reach past the edge."""
    larger = grid.affine * Affine.scale(factor)
    size = (-(-grid.height // factor), -(-grid.width // factor))
    return Grid(grid.crs_wkt, (larger.a, larger.b, larger.c, larger.d, larger.e, larger.f), *size)


def reduced(mask_hw: NDArray[np.uint8], values: tuple[int, ...], factor: int) -> NDArray[np.uint8]:
    """The mask in pixels ``factor`` times as large: of the values that at least half of the known pixels have the most frequent.

    Where fewer have one it is 0 (254 if 0 is one of the values), and 255 where more than half are unknown. The overviews of a
    mask take every second pixel, so that lines narrower than their pixels break into dots; here a line stays where it
    fills half of a pixel. The sides must be multiples of ``factor``, and begin at such a row and column of the scene.
    """
    if factor == 1:
        return mask_hw
    height, width = mask_hw.shape
    if height % factor or width % factor:
        raise ConfigError(
            f"a mask of {width} x {height} pixels cannot be put together by {factor}; read whole multiples"
        )
    blocks = mask_hw.reshape(height // factor, factor, width // factor, factor)
    counts = [np.count_nonzero(blocks == value, axis=(1, 3)) for value in values]
    unknown = np.count_nonzero(blocks == UNKNOWN, axis=(1, 3))
    best = np.asarray(values, np.uint8)[np.argmax(counts, axis=0)]
    is_one = 2 * np.sum(counts, axis=0) >= np.maximum(1, factor * factor - unknown)
    small_hw: NDArray[np.uint8] = np.where(is_one, best, np.uint8(_SHARE_STEPS if 0 in values else 0))
    small_hw[2 * unknown > factor * factor] = UNKNOWN
    return small_hw


def reduced_shares(shares_hw: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Probabilities in steps of 1/254, 255 unknown, in pixels ``factor`` times as large: the means of those known."""
    if factor == 1:
        return shares_hw
    height, width = shares_hw.shape
    blocks = shares_hw.reshape(height // factor, factor, width // factor, factor)
    known = blocks != UNKNOWN
    count = np.count_nonzero(known, axis=(1, 3))
    total = np.where(known, blocks, 0).sum(axis=(1, 3), dtype=np.int64)
    mean = (2 * total + count) // np.maximum(1, 2 * count)
    return np.where(count > 0, mean, UNKNOWN).astype(np.uint8)


def reach_of(grid: Grid, config: RoadsConfig) -> Reach:
    """How far the mask around a pixel of the traced grid decides on its centre line."""
    half_width = max(2, math.ceil(config.max_width_m / (2 * grid.resolution_m)))
    if half_width > 1000:
        raise ConfigError(
            f"max_width_m = {config.max_width_m:g} is {2 * half_width} pixels of {grid.resolution_m:.3g} m; the widest road may "
            "have 2000, so set a smaller max_width_m or a larger resolution_m"
        )
    return Reach(half_width=half_width, hole=max(1, math.floor(config.max_hole_m / grid.resolution_m)))


@dataclass(frozen=True, slots=True, eq=False)
class WindowRoads:
    """The roads of a window: a graph in pixels of the scene whose loose ends are the middles of links that leave the window.

    ``cells`` (cell, 2) are rows and columns of those cells of a coarse lattice that wide areas touch here.
    """

    graph: Graph
    cells: _Ints

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing here."""
        return not len(self.graph.ends) and not len(self.cells)


def trace_roads(
    mask_hw: NDArray[np.uint8],
    shares_hw: NDArray[np.uint8] | None,
    window: Window,
    *,
    values: tuple[int, ...],
    reach: Reach,
) -> WindowRoads:
    """The roads of a window of the traced grid.

    ``mask_hw`` is uint8 of the window grown by ``reach.halo``, 255 where nothing is known and outside the scene; pixels with one of
    the ``values`` are road. ``shares_hw``, uint8 of the same pixels, is the probability of the roads in steps of 1/254.
    """
    halo = reach.halo
    shape = (window.height + 2 * halo, window.width + 2 * halo)
    for name, pixels_hw in (("mask", mask_hw), ("probabilities", shares_hw)):
        if pixels_hw is not None and pixels_hw.shape != shape:
            raise ConfigError(
                f"the {name} of {window} with a halo of {halo} must have {shape} pixels, got {pixels_hw.shape}"
            )
    near = (
        slice(halo - reach.hole, halo + reach.hole + window.height),
        slice(halo - reach.hole, halo + reach.hole + window.width),
    )
    if not is_road(mask_hw[near], values).any():
        return _NOTHING
    thinned = thin_window(mask_hw, values, reach)
    if thinned is None:
        return _NOTHING
    inner = slice(halo, halo + window.height), slice(halo, halo + window.width)
    core_row, core_col = (
        place + start
        for place, start in zip(np.nonzero(thinned.core_hw[inner]), (window.row_off, window.col_off), strict=True)
    )
    side = cell_side(reach.half_width)
    cells = np.unique(np.stack([core_row // side, core_col // side], axis=1).astype(np.int64), axis=0)
    graph = _links(thinned, window, halo, side)
    row, col = place_of(graph.keys)
    at = row - window.row_off + halo, col - window.col_off + halo
    own = graph.has_pixel
    measured = np.zeros(len(graph.keys), PIXEL)
    at = at[0][own], at[1][own]
    distance = np.sqrt(np.minimum(thinned.square_hw[at], reach.half_width**2))
    measured["row"][own], measured["col"][own] = row[own], col[own]
    measured["half"][own] = np.rint((distance - _TO_EDGE) * HALF_STEPS)
    measured["share"][own] = shares_hw[at] if shares_hw is not None else UNKNOWN
    measured["value"][own] = np.where(is_road(mask_hw, values)[at], mask_hw[at], UNKNOWN)
    measured["at_edge"][own] = thinned.ends_hw[at]
    graph = Graph(graph.keys, measured, graph.ends, graph.offsets, graph.path)
    return WindowRoads(dissolved(graph, own), cells)


_NOTHING = WindowRoads(empty_graph(), np.zeros((0, 2), np.int64))
_TO_EDGE = 0.125  # on average over roads of all widths and directions, see tests/benchmarks/roads.py


def _links(thinned: Thinned, window: Window, halo: int, side: int) -> Graph:
    """A graph of single pixels: links to neighbours, a diagonal one only where no way of two sides leads there.

    A pixel that touches the core of a wide area is linked to the cell of one core pixel, and not to others that touch it too.
    """
    height, width = window.height, window.width

    def shifted(pixels_hw: NDArray[np.bool_], down: int, across: int, grown: int) -> NDArray[np.bool_]:
        rows = slice(halo - grown + down, halo + grown + height + down)
        return pixels_hw[rows, halo - grown + across : halo + grown + width + across]

    lines_hw, core_hw = thinned.lines_hw, thinned.core_hw
    has_core = bool(core_hw.any())
    any_hw = lines_hw | core_hw
    touches_hw = np.zeros(lines_hw.shape, np.bool_)
    if has_core:
        near_hw = np.zeros((height + 2, width + 2), np.bool_)
        for down, across in _SIDES_FIRST:
            near_hw |= shifted(core_hw, down, across, 1)
        touches_hw[halo - 1 : halo + 1 + height, halo - 1 : halo + 1 + width] = near_hw & shifted(lines_hw, 0, 0, 1)
    row, col = np.nonzero(shifted(lines_hw, 0, 0, 0))
    row, col = row + halo, col + halo
    to_scene = np.array([window.row_off - halo, window.col_off - halo])
    keys = [key_of(row + to_scene[0], col + to_scene[1])]
    ends: list[_Ints] = []
    for down, across in (*_FORWARD, *_BACKWARD):
        linked = lines_hw[row + down, col + across] & ~(touches_hw[row, col] & touches_hw[row + down, col + across])
        if down and across:
            linked &= ~any_hw[row + down, col] & ~any_hw[row, col + across]
        leaves = (
            (row + down < halo) | (row + down >= halo + height) | (col + across < halo) | (col + across >= halo + width)
        )
        own = linked & ~leaves if (down, across) in _FORWARD else np.zeros(len(row), np.bool_)
        ends.append(np.stack([keys[0][own], keys[0][own] + (4 * down << 32) + 4 * across], axis=1))
        out = linked & leaves
        middles = middle_key(row[out] + to_scene[0], col[out] + to_scene[1], down, across)
        ends.append(np.stack([keys[0][out], middles], axis=1))
        keys.append(middles)
    entered = np.zeros(len(row), np.bool_)
    for down, across in _SIDES_FIRST if has_core else ():
        enters = core_hw[row + down, col + across] & ~entered
        entered |= enters
        cell_row, cell_col = row[enters] + down + to_scene[0], col[enters] + across + to_scene[1]
        cells = key_of(cell_row // side, cell_col // side, 1)
        ends.append(np.stack([keys[0][enters], cells], axis=1))
        keys.append(cells)
    all_keys = np.concatenate(keys)
    return make_graph(all_keys, np.zeros(len(all_keys), PIXEL), np.concatenate(ends))


def join_roads(parts: Iterable[WindowRoads], reach: Reach) -> Graph:
    """The windows of a scene as one graph in pixels; each window in one of the parts, in any order."""
    held = [part for part in parts if not part.is_empty]
    graph = dissolved(concatenated([part.graph for part in held]))
    cells = np.unique(np.concatenate([_NOTHING.cells, *(part.cells for part in held)]), axis=0)
    graph = crossed(graph, cells, cell_side(reach.half_width), reach.half_width)
    return dissolved(with_clusters_merged(dissolved(graph)))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoadEdges:
    """The lines of a road network, a column each, sorted by ``id``.

    ``id``, ``from_node`` and ``to_node`` int64; ``length_m`` along the line on the WGS 84 ellipsoid; ``width_m`` the median;
    ``confidence`` the mean probability along the line, NaN where none is known; ``class_name``; ``geometry`` shapely
    LineStrings in the CRS of the grid, from the first node to the second.
    """

    id: _Ints
    from_node: _Ints
    to_node: _Ints
    length_m: _Floats
    width_m: _Floats
    confidence: _Floats
    class_name: NDArray[np.object_]
    geometry: NDArray[np.object_]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoadNodes:
    """The nodes of a road network, sorted by ``id`` (int64): how many ends of lines meet there, and shapely Points."""

    id: _Ints
    degree: _Ints
    geometry: NDArray[np.object_]


def finish_roads(
    graph: Graph,
    grid: Grid,
    config: RoadsConfig,
    class_names: dict[int, str],
    *,
    origin: tuple[int, int] = (0, 0),
) -> tuple[RoadEdges, RoadNodes]:
    """The network of a traced ``grid``, cleaned, as lines and points on the ground.

    ``class_names`` are those of the values that were traced; a line has that of most of its pixels. ``origin`` is the row and
    column of the grid's first pixel on the lattice of all scenes that are joined: numbers of nodes and lines come from places on
    it, so that they stay when scenes are added. Raises GeoreferenceError for a grid that is not on the Earth.
    """
    across_m, down_m = grid.pixel_size_m
    limits = Limits(
        step_m=(down_m, across_m),
        pixel_m=grid.resolution_m,
        min_spur_m=config.min_spur_m,
        max_gap_m=config.max_gap_m,
        max_gap_angle_deg=config.max_gap_angle_deg,
        min_length_m=config.min_length_m,
    )
    graph = mended(graph, limits)
    node_ids = _node_ids(graph, origin)
    edge_ids = _edge_ids(graph, node_ids, origin)
    lines, points = _smooth(graph, config.simplify_px)
    order, node_order = np.argsort(edge_ids, kind="stable"), np.argsort(node_ids, kind="stable")
    geometry = _on_the_ground(lines[order], grid)
    half, confidence, value = _measured(graph, sorted(class_names))
    names = np.array([*(class_names.get(one, "") for one in range(256))], np.object_)
    edges = RoadEdges(
        id=edge_ids[order],
        from_node=node_ids[graph.ends[order, 0]],
        to_node=node_ids[graph.ends[order, 1]],
        length_m=_geodesic_m(geometry, grid),
        width_m=2 * half[order] * grid.resolution_m,
        confidence=confidence[order],
        class_name=names[value[order]],
        geometry=geometry,
    )
    nodes = RoadNodes(
        id=node_ids[node_order], degree=graph.degree[node_order], geometry=_on_the_ground(points[node_order], grid)
    )
    return edges, nodes


def _node_ids(graph: Graph, origin: tuple[int, int]) -> _Ints:
    """Row and column on the lattice of all scenes, 32 bits each, both signed."""
    return _packed(*place_of(graph.keys), origin)


def _packed(row: NDArray[np.integer], col: NDArray[np.integer], origin: tuple[int, int]) -> _Ints:
    ids: _Ints = (row.astype(np.int64) + origin[0] << 32) | (col.astype(np.int64) + origin[1] & 0xFFFFFFFF)
    return ids


def _edge_ids(graph: Graph, node_ids: _Ints, origin: tuple[int, int]) -> _Ints:
    """63 bits mixed from both nodes and the middle pixel, by which lines between the same nodes differ.

    Of two that are equal all the same, which takes billions of lines, the later one gets the next number.
    """
    lengths = np.diff(graph.offsets)
    pool = np.append(graph.path, np.zeros(1, PIXEL))
    middle = np.where(lengths > 0, graph.offsets[:-1] + (lengths - 1) // 2, len(graph.path))
    places = _packed(pool["row"][middle], pool["col"][middle], origin)
    places[lengths == 0] = 0
    mixed = np.zeros(len(lengths), np.uint64)
    for one in (node_ids[graph.ends[:, 0]], node_ids[graph.ends[:, 1]], places):
        mixed = _mixed(mixed ^ one.astype(np.uint64))
    ids = (mixed >> np.uint64(1)).astype(np.int64)
    while len(np.unique(ids)) < len(ids):
        _, first = np.unique(ids, return_index=True)
        again = np.ones(len(ids), np.bool_)
        again[first] = False
        ids[again] += 1
    return ids


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _measured(graph: Graph, values: list[int]) -> tuple[_Floats, _Floats, _Ints]:
    """Of each edge the median half width in pixels, the mean probability, and the value that most of its pixels have.

    Pixels of closed gaps and of ways through wide areas count for the width where there are no others, and for nothing else.
    """
    num = len(graph.ends)
    edge, pixels = with_ends(graph)
    is_node = np.append(True, edge[1:] != edge[:-1])[: len(edge)]
    is_node |= np.append(edge[1:] != edge[:-1], True)[: len(edge)]
    rank = np.where(pixels["value"] == UNKNOWN, 0, np.where(is_node, 1, 2))
    best = np.zeros(num, np.int64)
    np.maximum.at(best, edge, rank)
    counts = rank == best[edge]  # the pixels between the nodes, else the nodes, else what was made up

    def total(of: NDArray[np.bool_], numbers: NDArray[np.integer]) -> _Ints:
        return np.bincount(edge[of], numbers[of], minlength=num).astype(np.int64)

    ones = np.ones(len(edge), np.int64)
    order = np.lexsort((pixels["half"], ~counts, edge))  # of each edge first those that count, from the narrowest on
    first = np.flatnonzero(np.append(True, edge[1:] != edge[:-1])[: len(edge)])
    half = pixels["half"][order[first + (total(counts, ones) - 1) // 2]] / HALF_STEPS
    known = counts & (pixels["share"] != UNKNOWN) & (pixels["value"] != UNKNOWN)
    num_known = total(known, ones)
    confidence = np.where(
        num_known > 0, total(known, pixels["share"]) / np.maximum(1, num_known) / _SHARE_STEPS, np.nan
    )
    most, value = np.zeros(num, np.int64), np.full(num, min(values))
    for one in values:
        count = total(counts & (pixels["value"] == one), ones)
        value = np.where(count > most, one, value)
        most = np.maximum(count, most)
    return half, confidence, value


def _smooth(graph: Graph, tolerance: float) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Lines and points in columns and rows, at the centres of pixels, the stairs of the pixels smoothed out.

    Each point is put eight times at the mean of itself and of the middle of its neighbours (binomial weights, a standard deviation
    of 2 pixels); the sums are exact in float64. Then corners go that are no farther from the line than ``tolerance``.
    """
    edge, pixels = with_ends(graph)
    points = np.stack([pixels["col"], pixels["row"]], axis=1) + 0.5
    inner = np.zeros(len(edge), np.bool_)
    inner[1:-1] = (edge[1:-1] == edge[:-2]) & (edge[1:-1] == edge[2:])
    for _ in range(_SMOOTHINGS):
        means = points.copy()
        means[1:-1] = (points[:-2] + 2 * points[1:-1] + points[2:]) / 4
        points = np.where(inner[:, None], means, points)
    lines = shapely.linestrings(points, indices=edge) if len(edge) else np.zeros(0, np.object_)
    row, col = place_of(graph.keys)
    return shapely.simplify(lines, tolerance), shapely.points(np.stack([col, row], axis=1) + 0.5)


def _on_the_ground(shapes: NDArray[np.object_], grid: Grid) -> NDArray[np.object_]:
    """Shapes in columns and rows as shapes in the CRS of the grid."""
    a, b, c, d, e, f = grid.geotransform

    def moved(xy: _Floats) -> _Floats:
        col, row = xy.T
        return np.stack([a * col + b * row + c, d * col + e * row + f], axis=1)

    placed: NDArray[np.object_] = shapely.transform(shapes, moved)
    return placed


def _geodesic_m(lines: NDArray[np.object_], grid: Grid) -> _Floats:
    """The length of each line on the WGS 84 ellipsoid."""
    try:
        to_lonlat = Transformer.from_crs(CRS.from_wkt(grid.crs_wkt), CRS.from_epsg(4326), always_xy=True)
        xy, line = shapely.get_coordinates(lines, return_index=True)
        lon, lat = to_lonlat.transform(xy[:, 0], xy[:, 1], errcheck=True)
    except ProjError as error:
        raise GeoreferenceError(f"the roads have no longitude and latitude, so no length in metres: {error}") from error
    same = line[1:] == line[:-1]
    _, _, step_m = Geod(ellps="WGS84").inv(lon[:-1][same], lat[:-1][same], lon[1:][same], lat[1:][same])
    length_m: _Floats = np.bincount(line[1:][same], step_m, minlength=len(lines)).astype(np.float64)
    return length_m

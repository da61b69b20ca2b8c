"""Tracing masks: windows in, features in spools out; the steps that a plain loop and a cluster share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from typing_extensions import Self

from geoseg.config import PolygonsConfig, RoadsConfig, VectorsConfig
from geoseg.predict.failure import Failure, attempt
from geoseg.progress import StatusLine, duration
from geoseg.raster.grid import Grid
from geoseg.raster.window import Window, num_windows, plan_windows
from geoseg.vector.join import Joiner, split_whole
from geoseg.vector.layers import LayerKind, LayerSpool
from geoseg.vector.polygons import Polygons, class_values, finish_polygons
from geoseg.vector.roads import (
    WindowRoads,
    finish_roads,
    join_roads,
    reach_of,
    reduced,
    reduced_grid,
    reduced_shares,
    trace_roads,
    tracing_factor,
)
from geoseg.vector.sheet import NODATA, Sheet
from geoseg.vector.skeleton import Reach
from geoseg.vector.trace import WindowShapes, trace_window

BUILDINGS = LayerKind(
    name="buildings",
    geometry="Polygon",
    columns=pa.schema(
        [
            ("id", pa.int64()),
            ("class", pa.string()),
            ("area_m2", pa.float64()),
            ("confidence", pa.float32()),
            ("pixels", pa.int64()),
        ]
    ),
)
ROADS = LayerKind(
    name="roads",
    geometry="LineString",
    columns=pa.schema(
        [
            ("id", pa.int64()),
            ("class", pa.string()),
            ("from", pa.int64()),
            ("to", pa.int64()),
            ("length_m", pa.float64()),
            ("width_m", pa.float64()),
            ("confidence", pa.float32()),
        ]
    ),
)
ROAD_NODES = LayerKind(
    name="road_nodes", geometry="Point", columns=pa.schema([("id", pa.int64()), ("degree", pa.int64())])
)
LAYERS = (BUILDINGS, ROADS, ROAD_NODES)
_STEPS = 254
_STRIP_PIXELS = 1 << 24


@dataclass(frozen=True, slots=True)
class Piece:
    """A window to trace: of the mask's own pixels for ``buildings``, of the grid that roads are traced on for ``roads``."""

    kind: Literal["buildings", "roads"]
    window: Window


@dataclass(frozen=True, slots=True)
class BuildingsPart:
    """What a window holds of buildings: the polygons that end in it, and what goes on in others."""

    polygons: Polygons
    open: WindowShapes


Part = BuildingsPart | WindowRoads


@dataclass(frozen=True)
class Target:
    """A raster that is traced, and how: ``classes`` are the codes of its classes by name."""

    name: str
    sheet: Sheet
    classes: tuple[tuple[str, int], ...]
    config: VectorsConfig

    @property
    def names(self) -> dict[int, str]:
        """The names of the classes by code."""
        return {value: name for name, value in self.classes}

    @property
    def are_smoothed_together(self) -> bool:
        """Whether polygons that touch wait for each other; those that keep the sides of their pixels need not."""
        return self.config.buildings.simplify_px > 0

    @cached_property
    def building_values(self) -> tuple[int, ...]:
        """The codes that become polygons. Raises ConfigError for a class that is asked for and that the mask does not have."""
        return _values(self.config.buildings, "building", self.names)

    @cached_property
    def road_values(self) -> tuple[int, ...]:
        """The codes that become lines. Raises ConfigError for a class that is asked for and that the mask does not have."""
        return _values(self.config.roads, "road", self.names)

    @cached_property
    def factor(self) -> int:
        """How many pixels of the mask's side are one of the grid that roads are traced on."""
        return tracing_factor(self.sheet.grid, self.config.roads)

    @cached_property
    def road_start(self) -> tuple[int, int]:
        """The row and column of the mask where that grid begins: a multiple of the factor on the world's lattice, 0 or less."""
        row, col = self.sheet.origin
        return -(row % self.factor), -(col % self.factor)

    @cached_property
    def road_grid(self) -> Grid:
        """The grid that roads are traced on."""
        (row, col), grid = self.road_start, self.sheet.grid
        return reduced_grid(grid.crop(Window(col, row, grid.width - col, grid.height - row)), self.factor)

    @cached_property
    def reach(self) -> Reach:
        """How far the mask around a pixel of that grid decides on its centre line."""
        return reach_of(self.road_grid, self.config.roads)

    @property
    def num_pieces(self) -> int:
        """How many windows it is cut into."""
        size = self.config.window
        buildings = num_windows(self.sheet.grid.height, self.sheet.grid.width, size) if self.building_values else 0
        roads = num_windows(self.road_grid.height, self.road_grid.width, size) if self.road_values else 0
        return buildings + roads

    def pieces(self) -> Iterator[Piece]:
        """The windows that tile it, once for buildings and once for roads."""
        size, grid = self.config.window, self.sheet.grid
        if self.building_values:
            yield from (Piece("buildings", window) for window in plan_windows(grid.height, grid.width, size))
        if self.road_values:
            grid = self.road_grid
            yield from (Piece("roads", window) for window in plan_windows(grid.height, grid.width, size))


def _values(config: PolygonsConfig | RoadsConfig, default: str, names: dict[int, str]) -> tuple[int, ...]:
    """The codes of the classes that are asked for, or of the one that is meant where there is one."""
    asked = config.classes
    return class_values([name for name in names.values() if name == default] if asked is None else asked, names)


def trace_part(target: Target, piece: Piece) -> Part | Failure:
    """What a window holds, or why that cannot be told."""
    trace = _trace_buildings if piece.kind == "buildings" else _trace_roads
    return attempt(partial(trace, target, piece.window), target.name, f"tracing {piece.kind}")


def _trace_buildings(target: Target, window: Window) -> BuildingsPart:
    sheet, values = target.sheet, target.building_values
    read = sheet.read(window, values, shares=sheet.has_shares)
    shape = (sheet.grid.height, sheet.grid.width)
    shapes = WindowShapes.nothing(window) if read is None else trace_window(read[0], window, shape, values, read[1])
    whole, rest = split_whole(shapes, together=target.are_smoothed_together)
    buildings = target.config.buildings
    polygons = finish_polygons(whole, sheet.grid, buildings, target.names, origin=sheet.origin)
    return BuildingsPart(polygons, rest)


def _trace_roads(target: Target, window: Window) -> WindowRoads:
    around, values = window.grown(target.reach.halo), target.road_values
    shape = (around.height, around.width)
    mask_hw = np.full(shape, NODATA, np.uint8)
    shares_hw = np.full(shape, NODATA, np.uint8) if target.sheet.has_shares else None
    # Strip by strip, so that the pixels of the mask that are put together need not all be there at once.
    rows = max(1, _STRIP_PIXELS // (around.width * target.factor**2))
    for top in range(0, around.height, rows):
        strip = slice(top, min(top + rows, around.height))
        read = _reduced_strip(target, Window(around.col_off, around.row_off + top, around.width, strip.stop - top))
        if read is None:
            continue
        mask_hw[strip] = read[0]
        if shares_hw is not None and read[1] is not None:
            shares_hw[strip] = read[1]
    return trace_roads(mask_hw, shares_hw, window, values=values, reach=target.reach)


def _reduced_strip(target: Target, strip: Window) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None] | None:
    """Classes and probabilities of a window of the grid that roads are traced on; None where nothing is known."""
    factor, values = target.factor, target.road_values
    row, col = target.road_start
    wanted = Window(
        strip.col_off * factor + col, strip.row_off * factor + row, strip.width * factor, strip.height * factor
    )
    read = target.sheet.read(wanted, values, shares=target.sheet.has_shares)
    if read is None:
        return None
    mask_hw, shares_vhw = read
    shares_hw = reduced_shares(_summed(shares_vhw), factor) if shares_vhw is not None else None
    return reduced(mask_hw, values, factor), shares_hw


def _summed(shares_vhw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The probability of any of the classes, in steps of 1/254; 255 stays 255."""
    total_hw = np.minimum(shares_vhw.sum(axis=0, dtype=np.uint16), _STEPS)
    return np.where(shares_vhw[0] == NODATA, np.uint8(NODATA), total_hw.astype(np.uint8))


class Layers:
    """The features of the files of one group while they come in; a context, with which they go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spools = {kind.name: LayerSpool(kind, folder) for kind in LAYERS}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for spool in self.spools.values():
            self._stack.enter_context(spool)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Tracing:
    """The windows of one target, put together as they come."""

    def __init__(self, target: Target) -> None:
        self.target = target
        grid = target.sheet.grid
        self._joiner = Joiner((grid.height, grid.width), together=target.are_smoothed_together)
        self._roads: list[WindowRoads] = []

    def add(self, part: Part, layers: Layers) -> None:
        """Take a window in; what is whole by now goes to the layers."""
        if isinstance(part, WindowRoads):
            if not part.is_empty:
                self._roads.append(part)
            return
        self._take(part.polygons, layers)
        target = self.target
        whole = self._joiner.add(part.open)
        if len(whole):
            buildings, origin = target.config.buildings, target.sheet.origin
            self._take(finish_polygons(whole, target.sheet.grid, buildings, target.names, origin=origin), layers)

    def finish(self, layers: Layers) -> None:
        """All windows are in: the road network goes to the layers."""
        target = self.target
        if target.building_values:
            self._joiner.finish()
        if not self._roads:
            return
        row, col = (place // target.factor for place in target.sheet.origin)
        graph = join_roads(self._roads, target.reach)
        edges, nodes = finish_roads(graph, target.road_grid, target.config.roads, target.names, origin=(row, col))
        columns = {
            "id": edges.id,
            "class": edges.class_name,
            "from": edges.from_node,
            "to": edges.to_node,
            "length_m": edges.length_m,
            "width_m": edges.width_m,
            "confidence": _or_null(edges.confidence),
        }
        layers.spools[ROADS.name].add(columns, edges.geometry)
        layers.spools[ROAD_NODES.name].add({"id": nodes.id, "degree": nodes.degree}, nodes.geometry)

    def _take(self, polygons: Polygons, layers: Layers) -> None:
        columns = {
            "id": polygons.id,
            "class": polygons.name,
            "area_m2": polygons.area_m2,
            "confidence": _or_null(polygons.confidence),
            "pixels": polygons.pixels,
        }
        layers.spools[BUILDINGS.name].add(columns, polygons.geometry)


def _or_null(values: NDArray[np.floating]) -> pa.Array:
    return pa.array(values, pa.float32(), mask=np.isnan(values))


class TracingProgress:
    """Windows done, with their rate and the time that is left."""

    def __init__(self, targets: Sequence[Target], *, quiet: bool) -> None:
        self._num = sum(target.num_pieces for target in targets)
        self._done = 0
        self._began = time.monotonic()
        self._line = StatusLine(quiet=quiet)

    def piece_done(self) -> None:
        """One more."""
        self._done += 1
        self._line.show(self._text, last=self._done == self._num)

    def _text(self) -> str:
        rate = self._done / max(1e-9, time.monotonic() - self._began)
        left = duration((self._num - self._done) / rate)
        return f"traced {self._done}/{self._num} windows | {rate:.3g} windows/s | ETA {left}"


Engine = Callable[[Sequence[Target]], Iterator[tuple[int, Part | Failure]]]


def trace_locally(targets: Sequence[Target]) -> Iterator[tuple[int, Part | Failure]]:
    """The plain loop: the parts of target after target, with its place; the first that fails is its last."""
    for place, target in enumerate(targets):
        for piece in target.pieces():
            part = trace_part(target, piece)
            yield place, part
            if isinstance(part, Failure):
                break


def trace_groups(
    groups: Sequence[Sequence[Target]], engine: Engine, scratch: Path, progress: TracingProgress
) -> Iterator[Layers | Failure]:
    """The layers of group after group, or why a group has none; a group's layers are good until the next one is asked for."""
    parts = engine([target for group in groups for target in group])
    coming = next(parts, None)
    place = 0
    for group in groups:
        failure: Failure | None = None
        with Layers(scratch) as layers:
            for target in group:
                tracing = Tracing(target)
                while coming is not None and coming[0] == place:
                    failure = failure or _added(tracing, coming[1], layers)
                    progress.piece_done()
                    coming = next(parts, None)
                if failure is None:
                    ended = attempt(partial(tracing.finish, layers), target.name, "joining what was traced")
                    failure = ended if isinstance(ended, Failure) else None
                place += 1
            yield failure or layers


def _added(tracing: Tracing, part: Part | Failure, layers: Layers) -> Failure | None:
    if isinstance(part, Failure):
        return part
    done = attempt(partial(tracing.add, part, layers), tracing.target.name, "joining what was traced")
    return done if isinstance(done, Failure) else None

"""A generated aerial scene with its exact truth: a size and a seed come in, pixels, classes and valid pixels go out.

It stands in for imagery at about 0.6 m per pixel in the demonstration, the tests and the benchmarks. A street grid is
bent over the ground, lots and buildings line its streets, and everything becomes a list of polygons that are painted
over each other; the truth is read off the same painting. Strips of rows are rendered one at a time, so little memory is
needed beyond the result, the polygons and the coarse noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from shapely import LineString, Polygon, STRtree

from geoseg.errors import ConfigError
from geoseg.raster.burn import burn

BACKGROUND, BUILDING, ROAD = 0, 1, 2

_STRIP_ROWS = 256
_RIM = 16
_MAX_SHADOW = _RIM - 2
_SIDEWALK = 3.0
_STEP = 8.0

_Color = tuple[float, float, float]
_ROOFS: tuple[_Color, ...] = (
    (170, 106, 84),
    (146, 90, 74),
    (134, 110, 94),
    (158, 157, 154),
    (216, 213, 206),
    (204, 188, 162),
    (112, 127, 148),
    (92, 92, 96),
    (182, 128, 104),
)
_CARS: tuple[_Color, ...] = ((225, 225, 225), (45, 45, 50), (150, 30, 30), (60, 80, 130), (170, 170, 175))
_SOILS: tuple[_Color, ...] = ((176, 152, 120), (158, 136, 108), (188, 172, 142), (146, 128, 104))
_GRASSES: tuple[_Color, ...] = ((98, 112, 68), (84, 104, 62), (120, 126, 82))


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticImage:
    """A generated image and what it shows; about 0.6 m per pixel.

    ``pixels_bhw`` uint8 (3, h, w): red, green, blue; 1 to 255 where data are, 0 elsewhere.
    ``classes_hw`` uint8 (h, w): 0 background, 1 building, 2 road; 0 where no data are.
    ``valid_hw`` bool (h, w): True = data.
    """

    pixels_bhw: NDArray[np.uint8]
    classes_hw: NDArray[np.uint8]
    valid_hw: NDArray[np.bool_]


def synthetic_image(height: int, width: int, *, seed: int, nodata_fraction: float = 0.05) -> SyntheticImage:
    """A scene of ``height`` x ``width`` pixels; the same arguments give the same bytes.

    ``nodata_fraction`` (0 to 0.5) of the pixels, a triangle in one corner, hold no data. Raises ConfigError for a size
    below one pixel or a fraction outside that range.
    """
    if height < 1 or width < 1:
        raise ConfigError(f"a synthetic image needs at least one pixel, got height={height} width={width}")
    if not 0 <= nodata_fraction <= 0.5:
        raise ConfigError(f"nodata_fraction is a triangle's share of the image, 0 to 0.5, got {nodata_fraction}")
    rng = np.random.default_rng(seed)
    painting = _Painting.of(rng, height, width)
    valid_hw = _outside_wedge(height, width, nodata_fraction, corner=int(rng.integers(4)))
    pixels_bhw = np.zeros((3, height, width), np.uint8)
    classes_hw = np.zeros((height, width), np.uint8)
    for start in range(0, height, _STRIP_ROWS):
        stop = min(start + _STRIP_ROWS, height)
        pixels_bhw[:, start:stop], classes_hw[start:stop] = painting.rows(
            start, stop, np.random.default_rng((seed, start))
        )
    pixels_bhw *= valid_hw
    classes_hw *= valid_hw
    return SyntheticImage(pixels_bhw, classes_hw, valid_hw)


def _outside_wedge(height: int, width: int, fraction: float, *, corner: int) -> NDArray[np.bool_]:
    """False in a triangle of ``fraction`` of the area; its legs are the same share of the height and of the width."""
    down, right = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    down, right = down[:: -1 if corner & 1 else 1], right[:: -1 if corner & 2 else 1]
    return down[:, None] + right >= math.sqrt(2 * fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Element:
    """One painted polygon, in image coordinates (x, y), with how it looks and what it is.

    ``height`` is the length of its shadow in pixels. Brightness changes by ``relief`` from one side of the line through
    the middle, ``normal`` to it, to the other, over ``1 / slope`` pixels on each side of that line.
    """

    shape: Polygon
    color: _Color
    kind: int = BACKGROUND
    cover: float = 1.0
    height: float = 0.0
    relief: float = 0.0
    normal: tuple[float, float] = (0.0, 0.0)
    slope: float = 1.0
    texture: float = 0.05


@dataclass(frozen=True, slots=True)
class _Texture:
    """Value noise of several octaves: random grids, each stretched over ``cell`` pixels, smooth between grid points."""

    octaves: tuple[tuple[int, NDArray[np.float32]], ...]

    @classmethod
    def of(cls, rng: np.random.Generator, height: int, width: int, cells: tuple[int, ...]) -> _Texture:
        def grid(cell: int) -> NDArray[np.float32]:
            return rng.uniform(-1, 1, (height // cell + 3, width // cell + 3)).astype(np.float32)

        return cls(tuple((cell, grid(cell)) for cell in cells))

    def rows(self, start: int, stop: int, width: int) -> NDArray[np.float32]:
        """(stop - start, width) float32 in about -1 to 1; the row before the first one is number -1."""
        total = np.zeros((stop - start, width), np.float32)
        for cell, grid in self.octaves:
            row, row_share = _grid_places(np.arange(start, stop), cell)
            col, col_share = _grid_places(np.arange(width) - 1, cell)
            lines = grid[row] + (grid[row + 1] - grid[row]) * row_share[:, None]
            left = lines[:, col]
            total += left + (lines[:, col + 1] - left) * col_share
        return total / np.float32(math.sqrt(len(self.octaves)))


def _grid_places(index: NDArray[np.int64], cell: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    whole, part = np.divmod(index + cell, cell)
    share = (part / cell).astype(np.float32)
    return whole, share * share * (3 - 2 * share)


@dataclass(frozen=True, slots=True)
class _Painting:
    """Everything that decides the pixels, as polygons, tables with a line per polygon, and coarse random grids."""

    width: int
    shapes: NDArray[np.object_]
    bounds: NDArray[np.float64]
    tables: dict[str, NDArray[np.float32]]
    sun: tuple[float, float]
    soil: _Color
    grass: _Color
    greenness: float
    light: tuple[float, float, float]
    patches: _Texture
    grain: _Texture

    @classmethod
    def of(cls, rng: np.random.Generator, height: int, width: int) -> _Painting:
        """The layout of a scene of ``height`` x ``width`` pixels."""
        bearing = rng.uniform(0, 2 * math.pi)
        sun = math.cos(bearing), math.sin(bearing)
        greenness = rng.uniform(-0.9, 0.5)
        town = _Town(rng, height, width, sun=sun, greenness=greenness)
        ground = _Element(
            shape=shapely.box(-_RIM, -_RIM, width + _RIM, height + _RIM), color=(0, 0, 0), cover=0, texture=0.1
        )
        elements = [ground, *town.elements()]
        shapes = np.array([element.shape for element in elements], dtype=object)
        middles = shapely.get_coordinates(shapely.centroid(shapes)).reshape(-1, 2)
        columns = {
            "color": [element.color for element in elements],
            "kind": [element.kind for element in elements],
            "cover": [element.cover for element in elements],
            "height": [element.height for element in elements],
            "relief": [element.relief for element in elements],
            "normal": [(element.normal[0] * element.slope, element.normal[1] * element.slope) for element in elements],
            "texture": [element.texture for element in elements],
            "middle": middles,
        }
        tables = {name: np.asarray(values, np.float32) for name, values in columns.items()}
        slant = rng.uniform(-0.08, 0.08, 2)
        return cls(
            width=width,
            shapes=shapes,
            bounds=shapely.bounds(shapes).reshape(-1, 4),
            tables=tables,
            sun=sun,
            soil=_SOILS[rng.integers(len(_SOILS))],
            grass=_GRASSES[rng.integers(len(_GRASSES))],
            greenness=greenness,
            light=(rng.uniform(0.92, 1.08), slant[0] / max(width, 1), slant[1] / max(height, 1)),
            patches=_Texture.of(rng, height, width, (160, 64, 24)),
            grain=_Texture.of(rng, height, width, (12, 5, 2)),
        )

    def rows(self, start: int, stop: int, noise: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Pixels (3, rows, width) and classes (rows, width) of the rows from ``start`` to before ``stop``."""
        wide_hw = self._painted(start - _RIM, stop + _RIM)
        shaded_hw = self._shaded(self.tables["height"][wide_hw])
        inner = slice(_RIM - 1, 1 - _RIM)
        color_bhw = self._colors(start - 1, wide_hw[inner, inner])
        color_bhw *= np.where(shaded_hw, np.float32(0.5), np.float32(1))
        color_bhw[2] += np.float32(6) * shaded_hw
        color_bhw = color_bhw[:, :-2] + 3 * color_bhw[:, 1:-1] + color_bhw[:, 2:]
        color_bhw = color_bhw[:, :, :-2] + 3 * color_bhw[:, :, 1:-1] + color_bhw[:, :, 2:]
        level, across, down = self.light
        light_hw = level + across * np.arange(self.width, dtype=np.float32) + down * np.arange(start, stop)[:, None]
        color_bhw *= (light_hw / 25).astype(np.float32)
        color_bhw += 3 * noise.standard_normal(color_bhw.shape, dtype=np.float32)
        core = slice(_RIM, -_RIM)
        return (
            np.clip(np.rint(color_bhw), 1, 255).astype(np.uint8),
            self.tables["kind"][wide_hw[core, core]].astype(np.uint8),
        )

    def _painted(self, start: int, stop: int) -> NDArray[np.int32]:
        """The number of the polygon that lies on top, with a rim on every side; number 0 is the bare ground."""
        (here,) = np.nonzero((self.bounds[:, 1] < stop) & (self.bounds[:, 3] > start))
        return burn(
            [(self.shapes[index], int(index)) for index in here],
            (stop - start, self.width + 2 * _RIM),
            affine=Affine.translation(-_RIM, start),
            dtype=np.int32,
        )

    def _shaded(self, height_hw: NDArray[np.float32]) -> NDArray[np.bool_]:
        """True where something higher stands towards the sun; all but one pixel of the rim is gone."""
        rows, cols = height_hw.shape
        first, last_row, last_col = _RIM - 1, rows - _RIM + 1, cols - _RIM + 1
        here_hw = height_hw[first:last_row, first:last_col]
        shaded_hw = np.zeros(here_hw.shape, np.bool_)
        for distance in range(1, math.ceil(height_hw.max(initial=0.0)) + 1):
            col, row = round(distance * self.sun[0]), round(distance * self.sun[1])
            there_hw = height_hw[first + row : last_row + row, first + col : last_col + col]
            shaded_hw |= there_hw - distance > here_hw
        return shaded_hw

    def _colors(self, start: int, painted_hw: NDArray[np.int32]) -> NDArray[np.float32]:
        """Sunlit colours (3, rows, cols) float32; the first row is number ``start``, the first column number -1."""
        rows, cols = painted_hw.shape
        patches_hw = self.patches.rows(start, start + rows, cols)
        grain_hw = self.grain.rows(start, start + rows, cols)
        green_hw = 1 / (1 + np.exp(-6 * (patches_hw + np.float32(self.greenness) + 0.3 * grain_hw)))
        cover_hw = self.tables["cover"][painted_hw]
        brightness_hw = 1 + self.tables["texture"][painted_hw] * (grain_hw + 0.5 * patches_hw)
        row, col = np.nonzero(self.tables["relief"][painted_hw])
        index = painted_hw[row, col]
        away = np.stack([col - np.float32(0.5), row + np.float32(start + 0.5)], axis=1) - self.tables["middle"][index]
        side = np.clip((away * self.tables["normal"][index]).sum(axis=1), -1, 1)
        brightness_hw[row, col] += self.tables["relief"][index] * side
        color_bhw = np.empty((3, rows, cols), np.float32)
        for band in range(3):
            ground_hw = self.soil[band] + (self.grass[band] - self.soil[band]) * green_hw
            color_hw = self.tables["color"][:, band][painted_hw]
            color_bhw[band] = (ground_hw + (color_hw - ground_hw) * cover_hw) * brightness_hw
        return color_bhw


def _pieces(
    line: LineString,
    starts: NDArray[np.float64],
    length: float,
    width: float,
    *,
    aside: NDArray[np.float64] | float = 0.0,
) -> NDArray[np.object_]:
    """Straight pieces of a line that begin ``starts`` pixels along it, as rectangles ``aside`` of it."""
    first = shapely.get_coordinates(shapely.line_interpolate_point(line, starts))
    last = shapely.get_coordinates(shapely.line_interpolate_point(line, starts + length))
    along = last - first
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.maximum(np.hypot(*along.T), 1e-6)[:, None]
    shift = across * np.reshape(aside, (-1, 1))
    side = across * (width / 2)
    corners = [first + shift - side, last + shift - side, last + shift + side, first + shift + side]
    pieces: NDArray[np.object_] = shapely.polygons(np.stack(corners, axis=1))
    return pieces


@dataclass(slots=True)
class _Town:
    """Where streets, lots, buildings and trees stand.

    Streets run along u and v of a grid that ``_place`` turns and bends into image coordinates.
    """

    rng: np.random.Generator
    height: int
    width: int
    sun: tuple[float, float]
    greenness: float
    angle: float = field(init=False)
    bend: NDArray[np.float64] = field(init=False)
    roofs: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.angle = self.rng.uniform(0, 2 * math.pi)
        self.bend = np.stack(
            [self.rng.uniform(0, 26, 2), self.rng.uniform(90, 160, 2), self.rng.uniform(0, 2 * math.pi, 2)]
        )
        self.roofs = self.rng.dirichlet(np.full(len(_ROOFS), 0.8))

    def elements(self) -> list[_Element]:
        """All polygons in the order in which they are painted."""
        reach = math.hypot(self.height, self.width) / 2 + 40
        streets_u, widths_u = self._lines(reach)
        streets_v, widths_v = self._lines(reach)
        sidewalks, roads, paint = self._streets(streets_u, widths_u, streets_v, widths_v)
        streets = STRtree([element.shape for element in sidewalks])
        lots: list[_Element] = []
        buildings: list[_Element] = []
        for i in range(len(streets_u) - 1):
            for j in range(len(streets_v) - 1):
                u0, u1 = streets_u[i] + widths_u[i] / 2 + 5, streets_u[i + 1] - widths_u[i + 1] / 2 - 5
                v0, v1 = streets_v[j] + widths_v[j] / 2 + 5, streets_v[j + 1] - widths_v[j + 1] / 2 - 5
                for lot, parts in self._block(u0, u1, v0, v1):
                    lots.append(lot)
                    if parts and not streets.query([part.shape for part in parts], predicate="intersects").size:
                        buildings += parts
        trees = self._trees([*sidewalks, *buildings])
        return [*lots, *sidewalks, *roads, *paint, *buildings, *trees]

    def _is_near(self, u: float, v: float, reach: float) -> bool:
        """Whether something of that size there may touch the image or throw a shadow into it."""
        x, y = self._place(np.array(u), np.array(v))
        reach += _RIM
        return bool(-reach < x < self.width + reach and -reach < y < self.height + reach)

    def _place(self, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
        """Image coordinates (..., 2) as x, y of places of the street grid."""
        (swing_u, swing_v), (length_u, length_v), (phase_u, phase_v) = self.bend
        bent_u = u + swing_u * np.sin(v / length_u + phase_u)
        bent_v = v + swing_v * np.sin(u / length_v + phase_v)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x = self.width / 2 + cos * bent_u - sin * bent_v
        y = self.height / 2 + sin * bent_u + cos * bent_v
        return np.stack([x, y], axis=-1)

    def _box(self, u: float, v: float, half_u: float, half_v: float) -> Polygon:
        """A right-angled rectangle about a place of the grid, along the street there."""
        before, x_y, after = self._place(np.array([u - 1, u, u + 1]), np.array([v, v, v]))
        along = (after - before) / np.hypot(*(after - before))
        across = np.array([-along[1], along[0]])
        corners = [a * half_u * along + b * half_v * across + x_y for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        return Polygon(corners)

    def _lines(self, reach: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the streets of one direction lie and how wide they are."""
        num = int(2 * reach / 95) + 4
        offsets = -reach - 60 + self.rng.uniform(0, 90) + np.cumsum(self.rng.uniform(95, 190, num))
        offsets = offsets[: np.searchsorted(offsets, reach) + 1]
        return offsets, self.rng.choice([24.0, 15.0, 11.0], offsets.size, p=[0.2, 0.5, 0.3])

    def _streets(
        self,
        streets_u: NDArray[np.float64],
        widths_u: NDArray[np.float64],
        streets_v: NDArray[np.float64],
        widths_v: NDArray[np.float64],
    ) -> tuple[list[_Element], list[_Element], list[_Element]]:
        """Sidewalks, carriageways and what lies on them."""
        sidewalks: list[_Element] = []
        roads: list[_Element] = []
        paint: list[_Element] = []
        gray = self.rng.uniform(88, 142)
        for crossing, offsets, widths, turned in (
            (streets_v, streets_u, widths_u, True),
            (streets_u, streets_v, widths_v, False),
        ):
            for offset, width in zip(offsets, widths, strict=True):
                tone = gray + self.rng.uniform(-10, 10)
                for start, stop in pairwise(crossing):
                    along = np.append(np.arange(start, stop, _STEP), stop)
                    aside = np.full(along.size, offset)
                    u, v = (aside, along) if turned else (along, aside)
                    left_out = width < 20 and self.rng.random() < 0.15
                    if left_out or not self._is_near(u[u.size // 2], v[v.size // 2], stop - start):
                        continue
                    line = LineString(self._place(u, v))
                    kerb, road = (line.buffer(width / 2 + extra, quad_segs=4) for extra in (_SIDEWALK, 0))
                    sidewalks.append(_Element(shape=kerb, color=(178, 174, 166), cover=0.8))
                    roads.append(_Element(shape=road, color=(tone, tone, tone + 2), kind=ROAD))
                    paint += self._paint(line, width, tone)
        return sidewalks, roads, paint

    def _paint(self, line: LineString, width: float, tone: float) -> Iterator[_Element]:
        """Lane marks of the wider streets, patches of newer asphalt and cars."""
        if self.rng.random() < 0.1:
            start, dark = self.rng.uniform(0, line.length), tone - self.rng.uniform(8, 20)
            (patch,) = _pieces(line, np.array([start]), self.rng.uniform(10, 25), width - 2)
            yield _Element(shape=patch, color=(dark, dark, dark + 2), kind=ROAD)
        if width > 12:
            for mark in _pieces(line, np.arange(0, line.length - 6, 15), 6, 1.1):
                yield _Element(shape=mark, color=(225, 222, 210), kind=ROAD)
        num_cars = self.rng.poisson(line.length / 90)
        lanes = self.rng.choice([-1, 1], num_cars) * width * self.rng.uniform(0.18, 0.32, num_cars)
        for car in _pieces(line, self.rng.uniform(0, line.length - 8, num_cars), 7, 3.2, aside=lanes):
            yield _Element(shape=car, color=_CARS[self.rng.integers(len(_CARS))], kind=ROAD, height=2.5)

    def _block(self, u0: float, u1: float, v0: float, v1: float) -> Iterator[tuple[_Element, list[_Element]]]:
        """Lots between four streets, each with the parts of its building: houses, halls, a park or nothing."""
        middle_u, middle_v, half_u, half_v = (u0 + u1) / 2, (v0 + v1) / 2, (u1 - u0) / 2, (v1 - v0) / 2
        if min(half_u, half_v) < 10 or not self._is_near(middle_u, middle_v, half_u + half_v):
            return
        use = self.rng.choice(["houses", "flats", "halls", "park", "field"], p=[0.6, 0.14, 0.12, 0.07, 0.07])
        if use in ("park", "field"):
            color, cover = ((86, 108, 62), 0.85) if use == "park" else ((172, 150, 118), 0.6)
            yield self._lot(middle_u, middle_v, half_u, half_v, color, cover), []
            return
        step_u, step_v = {"houses": (31.0, 38.0), "flats": (76.0, 52.0), "halls": (104.0, 84.0)}[use]
        cols, rows = max(1, round(2 * half_u / step_u)), max(1, min(2, round(2 * half_v / step_v)))
        half_u, half_v = half_u / cols, half_v / rows
        for col in range(cols):
            for row in range(rows):
                u, v = u0 + (2 * col + 1) * half_u, v0 + (2 * row + 1) * half_v
                lawn = self.rng.random() < 0.5 + 0.4 * self.greenness
                color = (104, 118, 74) if lawn else (182, 166, 142)
                if use != "houses":
                    color = (174, 170, 160)
                lot = self._lot(u, v, half_u - 0.7, half_v - 0.7, color, self.rng.uniform(0.2, 0.75))
                built = self.rng.random() < 0.88
                yield lot, self._building(u, v, half_u - 3, half_v - 3, detached=use == "houses") if built else []

    def _lot(self, u: float, v: float, half_u: float, half_v: float, color: _Color, cover: float) -> _Element:
        return _Element(shape=self._box(u, v, half_u, half_v), color=color, cover=cover, texture=0.09)

    def _building(self, u: float, v: float, room_u: float, room_v: float, *, detached: bool) -> list[_Element]:
        """The parts of one building that fits about its lot's middle: a block, perhaps a wing, things on the roof."""
        half_u = room_u * self.rng.uniform(0.62, 0.92)
        half_v = min(room_v * self.rng.uniform(0.5, 0.9), half_u * (1.4 if detached else 1.0))
        u += self.rng.uniform(-1, 1) * (room_u - half_u) * 0.6
        v += self.rng.uniform(-1, 1) * (room_v - half_v) * 0.6
        tint = self.rng.uniform(-14, 14, 3)
        red, green, blue = np.asarray(_ROOFS[self.rng.choice(len(_ROOFS), p=self.roofs)]) + tint.mean() + tint * 0.3
        color = (red, green, blue)
        gabled = detached and self.rng.random() < 0.65
        height = self.rng.uniform(4, 7) if detached else self.rng.uniform(6, _MAX_SHADOW - 2)

        def part(u: float, v: float, half_u: float, half_v: float) -> _Element:
            shape = self._box(u, v, half_u, half_v)
            if not gabled:
                return _Element(shape=shape, color=color, kind=BUILDING, height=height, texture=0.04)
            (x0, y0), (x1, y1), (x2, y2) = shape.exterior.coords[:3]
            run = (x1 - x0, y1 - y0) if half_u < half_v else (x2 - x1, y2 - y1)
            length = math.hypot(*run)
            normal = (run[0] / length, run[1] / length)
            relief = 0.2 * (normal[0] * self.sun[0] + normal[1] * self.sun[1])
            return _Element(
                shape=shape, color=color, kind=BUILDING, height=height, relief=relief, normal=normal, texture=0.04
            )

        if min(half_u, half_v) > 6 and self.rng.random() < 0.4:
            split = self.rng.uniform(0.4, 0.6) * half_u
            side, end = self.rng.choice([-1, 1], 2)
            wing = part(u + side * (half_u - split), v, split, half_v)
            parts = [wing, part(u, v + end * half_v * 0.5, half_u, half_v * 0.5)]
        else:
            parts = [part(u, v, half_u, half_v)]
        if gabled:
            return parts
        body = parts[-1].shape
        inner = body.buffer(-1.5, join_style="mitre")
        if inner.area > 40:
            parts.append(
                _Element(
                    shape=inner,
                    color=(1.07 * red, 1.07 * green, 1.07 * blue),
                    kind=BUILDING,
                    height=height - 0.8,
                    texture=0.05,
                )
            )
            left, top, right, bottom = inner.bounds
            for _ in range(self.rng.poisson(inner.area / 350)):
                x, y, gray = self.rng.uniform((left, top, 120), (right, bottom, 225))
                box = shapely.box(x - 1.5, y - 1.5, x + 1.5, y + 1.5)
                if inner.contains(box):
                    parts.append(_Element(shape=box, color=(gray, gray, gray), kind=BUILDING, height=height + 2))
        return parts

    def _trees(self, obstacles: list[_Element]) -> list[_Element]:
        """Crowns in groups, none over a street or a roof."""
        area = (self.height + 2 * _RIM) * (self.width + 2 * _RIM)
        num_groups = self.rng.poisson(area / 5000 * (1.5 + self.greenness))
        groups = self.rng.uniform(-_RIM, [self.width + _RIM, self.height + _RIM], (num_groups, 2))
        places = np.repeat(groups, self.rng.geometric(0.35, num_groups), axis=0)
        places = places + self.rng.normal(0, 9, places.shape)
        radii = self.rng.uniform(2.5, 7, len(places))
        crowns = shapely.points(places)
        hit, _ = STRtree([obstacle.shape for obstacle in obstacles]).query(
            crowns, predicate="dwithin", distance=radii + 0.7
        )
        free = np.setdiff1d(np.arange(len(places)), hit)
        greens = self.rng.uniform(0.8, 1.15, len(places))
        return [
            _Element(
                shape=crowns[index].buffer(radii[index], quad_segs=3),
                color=(66 * greens[index], 84 * greens[index], 50 * greens[index]),
                height=0.9 * radii[index],
                relief=0.3,
                normal=self.sun,
                slope=1 / radii[index],
                texture=0.22,
            )
            for index in free
        ]

"""From scenes and their footprints to a map of what came of them: what to draw, in units of a picture of known width.

Places are laid out in longitude and latitude, stretched so that a kilometre is as long both ways in the middle. A map begins
where most of a circle of latitude is free, so that scenes on both sides of the antimeridian lie side by side. Groups that
would be specks on a map of all get maps of their own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from shapely import affinity

from geoseg.model.pictures import round_ticks

OUTCOMES = ("failed", "held", "refused", "gone", "removed", "published", "unchanged")
WIDTH, _DETAIL_WIDTH = 960, 420
_MOST_MARKS, _MOST_DETAIL_MARKS = 2500, 300
_MOST_DETAILS = 6
_CELLS = 24  # a map of all has so many across to tell groups apart
_SPECK = 1 / 9  # of a map's width: smaller groups get a map of their own
_SMALLEST = 7.0  # units: below it a footprint is drawn as a dot
_COARSER = 1.25
_LEAST_DEG = 0.002
_LEAST_ASPECT, _MOST_ASPECT, _DETAIL_ASPECT = 0.36, 0.6, 0.66
_PAD, _DETAIL_PAD = 0.08, 0.18  # labels stand there
_KM_PER_DEG = 111.195
_TOLD_IDS = 3


@dataclass(frozen=True, slots=True)
class MappedScene:
    """A scene, what came of it (one of ``OUTCOMES``), and its footprint (WKT; "" when nobody knows)."""

    id: str
    outcome: str
    footprint: str


@dataclass(frozen=True, slots=True)
class Mark:
    """One or more scenes at one place: an SVG path around them, or, of a dot, to a single point."""

    outcome: str
    title: str
    path: str
    is_dot: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """A label and where it stands, in per cent of the map's width or height."""

    percent: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A map, ``width`` x ``height`` units. ``letter`` is its own, "" for the map of all, which shows where others lie."""

    letter: str
    width: int
    height: int
    marks: tuple[Mark, ...]
    num_scenes: int
    num_left_out: int
    meridians: tuple[Tick, ...]
    parallels: tuple[Tick, ...]
    scale: Tick
    letters: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SceneMap:
    """The map of all and those of groups, and how many scenes nobody can place."""

    panels: tuple[Panel, ...]
    num_unplaced: int


@dataclass(frozen=True, slots=True)
class _Placed:
    """Scenes with their geometries and bounds (scene, west south east north), continuous over the antimeridian."""

    scenes: list[MappedScene]
    shapes: npt.NDArray[Any]
    bounds: npt.NDArray[np.float64]

    def take(self, places: npt.NDArray[np.intp]) -> _Placed:
        return _Placed([self.scenes[place] for place in places], self.shapes[places], self.bounds[places])

    @property
    def frame(self) -> tuple[float, float, float, float]:
        west, south = self.bounds[:, :2].min(axis=0)
        east, north = self.bounds[:, 2:].max(axis=0)
        return float(west), float(south), float(east), float(north)


def draw_map(scenes: Iterable[MappedScene]) -> SceneMap:
    """What to draw for these scenes; the same, whatever their order."""
    ordered = sorted(scenes, key=lambda scene: (scene.id, scene.outcome))
    placed = _place(ordered)
    num_unplaced = len(ordered) - len(placed.scenes)
    if not placed.scenes:
        return SceneMap((), num_unplaced)
    groups = _groups(placed)
    details = [
        _panel(group, letter=letter, width=_DETAIL_WIDTH, most=_MOST_DETAIL_MARKS)
        for letter, group in zip("ABCDEF", groups, strict=False)
    ]
    whole = _panel(placed, letter="", width=WIDTH, most=_MOST_MARKS, details=groups)
    return SceneMap((whole, *details), num_unplaced)


def _place(scenes: Sequence[MappedScene]) -> _Placed:
    shapes = shapely.from_wkt([scene.footprint or None for scene in scenes], on_invalid="ignore")
    found = [place for place, one in enumerate(shapes) if one is not None and not one.is_empty]
    if not found:
        return _Placed([], shapes, np.zeros((0, 4)))
    shapes = shapely.make_valid(shapes[found])
    seam = _seam(shapely.bounds(shapely.get_parts(shapes)))
    for place in np.flatnonzero((shapely.bounds(shapes)[:, 0] < seam) | (shapely.get_num_geometries(shapes) > 1)):
        shapes[place] = _east_of(seam, shapes[place])
    return _Placed([scenes[place] for place in found], shapes, shapely.bounds(shapes))


def _seam(bounds: npt.NDArray[np.float64]) -> float:
    """The longitude from which on all is drawn: the far end of the widest gap, if it is wider than that over 180 degrees."""
    ordered = bounds[np.argsort(bounds[:, 0], kind="stable")]
    reached = np.maximum.accumulate(ordered[:, 2])
    gaps = ordered[1:, 0] - reached[:-1]
    over_180 = ordered[0, 0] + 360 - reached[-1]
    if not len(gaps) or gaps.max() <= over_180:
        return -math.inf
    return float(ordered[1 + int(gaps.argmax()), 0])


def _east_of(seam: float, geometry: Any) -> Any:
    parts = shapely.get_parts(geometry)
    turned = [affinity.translate(part, 360) if part.bounds[0] < seam else part for part in parts]
    return shapely.union_all(turned) if len(turned) > 1 else turned[0]


def _groups(placed: _Placed) -> list[_Placed]:
    """Groups of scenes near each other that are specks on a map of all, from west to east; none when most scenes are in none.

    When there are too many, those with bad scenes are kept, then those with many.
    """
    west, south, east, north = placed.frame
    squeeze = _squeeze(south, north)
    extent = max((east - west) * squeeze, north - south)
    if extent < 10 * _LEAST_DEG:
        return []
    centres = (placed.bounds[:, :2] + placed.bounds[:, 2:]) / 2 * (squeeze, 1)
    cells = np.floor((centres - centres.min(axis=0)) / (extent / _CELLS)).astype(int)
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, (col, row) in enumerate(cells.tolist()):
        members[col, row].append(place)
    groups = [placed.take(np.array(places)) for places in _connected(members)]
    if len(groups) == 1:
        return []
    specks = [group for group in groups if _extent(group, squeeze) < extent * _SPECK]
    if sum(len(group.scenes) for group in specks) < len(placed.scenes) / 2:
        return []
    specks.sort(
        key=lambda group: (-sum(one.outcome in OUTCOMES[:3] for one in group.scenes), -len(group.scenes), group.frame)
    )
    return sorted(specks[:_MOST_DETAILS], key=lambda group: group.frame)


def _squeeze(south: float, north: float) -> float:
    return max(0.2, math.cos(math.radians((south + north) / 2)))


def _extent(placed: _Placed, squeeze: float) -> float:
    west, south, east, north = placed.frame
    return max((east - west) * squeeze, north - south)


def _connected(members: dict[tuple[int, int], list[int]]) -> list[list[int]]:
    """What lies in cells that touch, together."""
    left, found = dict(members), []
    while left:
        waiting, together = [next(iter(left))], []
        while waiting:
            col, row = waiting.pop()
            places = left.pop((col, row), None)
            if places is not None:
                together += places
                waiting += [(col + right, row + down) for right in (-1, 0, 1) for down in (-1, 0, 1)]
        found.append(sorted(together))
    return found


@dataclass(frozen=True, slots=True)
class _Projection:
    """Degrees to units, from the north-west corner of a map."""

    west: float
    north: float
    across: float
    down: float
    width: int
    height: int

    @classmethod
    def around(cls, frame: tuple[float, float, float, float], width: int, *, is_detail: bool) -> _Projection:
        """That of a map around a frame; details are all of one shape."""
        pad = 1 + 2 * (_DETAIL_PAD if is_detail else _PAD)
        least, most = (_DETAIL_ASPECT, _DETAIL_ASPECT) if is_detail else (_LEAST_ASPECT, _MOST_ASPECT)
        west, south, east, north = frame
        squeeze = _squeeze(south, north)
        wide = min(max((east - west) * squeeze, _LEAST_DEG) * pad, 360 * squeeze)
        high = max(north - south, _LEAST_DEG) * pad
        wide = max(wide, high / most)
        high = max(high, wide * least)
        scale = width / wide
        left, top = (west + east) / 2 - wide / 2 / squeeze, (south + north) / 2 + high / 2
        return cls(left, top, scale * squeeze, scale, width, round(high * scale))

    def units(self, lonlat: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return (lonlat - (self.west, self.north)) * (self.across, -self.down)

    @property
    def frame(self) -> tuple[float, float, float, float]:
        south, east = self.north - self.height / self.down, self.west + self.width / self.across
        return self.west, south, east, self.north


def _panel(placed: _Placed, *, letter: str, width: int, most: int, details: Sequence[_Placed] = ()) -> Panel:
    projection = _Projection.around(placed.frame, width, is_detail=letter != "")
    west, south, east, north = projection.frame
    marks = _marks(placed, projection, most)
    letters = []
    for name, group in zip("ABCDEF", details, strict=False):
        left, _, right, top = group.frame
        at = projection.units(np.array([(left + right) / 2, top]))
        letters.append((name, round(100 * at[0] / width, 2), round(100 * at[1] / projection.height, 2)))
    return Panel(
        letter=letter,
        width=width,
        height=projection.height,
        marks=tuple(marks[:most]),
        num_scenes=len(placed.scenes),
        num_left_out=len(marks[most:]),
        meridians=tuple(
            Tick(round(100 * (lon - west) / (east - west), 2), _lon_label(lon)) for lon in round_ticks(west, east, 4)
        ),
        parallels=tuple(
            Tick(round(100 * (north - lat) / (north - south), 2), _lat_label(lat))
            for lat in round_ticks(south, north, 3)
            if abs(lat) <= 90
        ),
        scale=_scale_bar(projection),
        letters=tuple(letters),
    )


def _marks(placed: _Placed, projection: _Projection, most: int) -> list[Mark]:
    """Footprints, and dots for those that are small; the more there are, the coarser. Bad scenes come first."""
    corners = projection.units(placed.bounds.reshape(-1, 2, 2))
    sizes = np.abs(corners[:, 1] - corners[:, 0]).max(axis=1)
    centres = corners.mean(axis=1)
    paths = _Paths(projection)
    smallest = _SMALLEST
    while True:
        together: dict[tuple[str, str, bool], list[str]] = defaultdict(list)
        is_small = sizes < smallest
        at = (np.floor(centres / smallest) + 0.5) * smallest if is_small.sum() > 1 else centres
        for place, scene in enumerate(placed.scenes):
            if is_small[place]:
                path = f"M{at[place, 0]:.1f} {at[place, 1]:.1f}h0"
            else:
                path = paths.of(scene.footprint, placed.shapes[place])
            together[scene.outcome, path, bool(is_small[place])].append(scene.id)
        if len(together) <= most or smallest > projection.width:
            break
        smallest *= _COARSER
    keys = sorted(together, key=lambda key: (OUTCOMES.index(key[0]), key[1]))
    return [Mark(outcome, _title(outcome, together[outcome, path, dot]), path, dot) for outcome, path, dot in keys]


class _Paths:
    """Footprints as paths, each drawn once, however many scenes have it."""

    def __init__(self, projection: _Projection) -> None:
        self._projection = projection
        self._known: dict[str, str] = {}

    def of(self, footprint: str, geometry: Any) -> str:
        path = self._known.get(footprint)
        if path is None:
            path = self._known[footprint] = _path(geometry, self._projection)
        return path


def _title(outcome: str, ids: list[str]) -> str:
    if len(ids) == 1:
        return f"{ids[0]}: {outcome}"
    more = f" and {len(ids) - _TOLD_IDS} more" if len(ids) > _TOLD_IDS else ""
    return f"{len(ids)} scenes {outcome}: {', '.join(ids[:_TOLD_IDS])}{more}"


def _path(geometry: Any, projection: _Projection) -> str:
    """Rings as an SVG path; points that fall together are one."""
    told = []
    for polygon in shapely.get_parts(geometry):
        for ring in shapely.get_rings(polygon):
            points = projection.units(shapely.get_coordinates(ring)).round(1) + 0.0
            kept = points[np.r_[True, (np.diff(points, axis=0) != 0).any(axis=1)]]
            if len(kept) > 3:
                told.append("M" + "L".join(f"{x:g} {y:g}" for x, y in kept[:-1].tolist()) + "Z")
    return "".join(told)


def _lon_label(lon: float) -> str:
    turned = float(f"{(lon + 180) % 360 - 180:.9g}")
    return f"{abs(turned):g}°" + ("" if turned in (0, -180) else " E" if turned > 0 else " W")


def _lat_label(lat: float) -> str:
    return f"{abs(lat):g}°" + (" N" if lat > 0 else " S" if lat < 0 else "")


def _scale_bar(projection: _Projection) -> Tick:
    """A round length of at most a third of the map's width, as it is in the middle of the map."""
    whole_km = projection.width / projection.down * _KM_PER_DEG
    km = round_ticks(0, whole_km / 3, 3)[-1]
    text = f"{km:,.0f} km" if km >= 1 else f"{km * 1000:g} m"
    return Tick(round(100 * km / whole_km, 2), text)

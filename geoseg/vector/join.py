"""The parts of windows, in any order, joined to components along the windows' sides; each is handed out once it is whole.

Runs meet runs along the sides, corners of four windows meet at their vertex, and union-find keeps what hangs together:
no outline is ever compared with another, and what is kept is what still waits for a neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geoseg.errors import ConfigError
from geoseg.pieces import roots
from geoseg.vector.trace import NO_RECORDS, Records, Strip, WindowShapes, records_around, touching_around

_NO_PART = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Whole components, in groups of those that touch by a side or a corner of pixels; it travels between processes.

    For each component the class value, its pixels, the sum of the shares of its class (steps of 1/254), the number of pixels
    that have one, and its ``group``, counted from 0; ``records`` are those of all their vertices.
    """

    value: NDArray[np.uint8]
    pixels: NDArray[np.int64]
    shares: NDArray[np.int64]
    known: NDArray[np.int64]
    group: NDArray[np.int64]
    records: Records

    def __len__(self) -> int:
        return len(self.value)

    @classmethod
    def of(cls, some: Sequence[Groups]) -> Groups:
        """Several as one."""
        empty = cls(NO_RECORDS.kind, _NO_PART, _NO_PART, _NO_PART, _NO_PART, NO_RECORDS)
        some = [empty, *some]
        before = np.cumsum([0, *(len(one) for one in some)])
        groups_before = np.cumsum([0, *(int(one.group.max(initial=-1)) + 1 for one in some)])
        return cls(
            value=np.concatenate([one.value for one in some]),
            pixels=np.concatenate([one.pixels for one in some]),
            shares=np.concatenate([one.shares for one in some]),
            known=np.concatenate([one.known for one in some]),
            group=np.concatenate([one.group + first for one, first in zip(some, groups_before, strict=False)]),
            records=Records(
                np.concatenate([one.records.part + first for one, first in zip(some, before, strict=False)]).astype(
                    np.int32
                ),
                np.concatenate([one.records.row for one in some]),
                np.concatenate([one.records.col for one in some]),
                np.concatenate([one.records.kind for one in some]),
            ),
        )


@dataclass(slots=True, eq=False)
class _Waiting:
    """Parts that hang together or touch, and for how many sides and corners of windows they still wait.

    ``parts`` are, by the window's group that they were, the number of the first, a table (part, 4) of value, pixels, shares and
    known, and one (record, 4) of part, row, col and kind; ``records`` and ``joined`` (pair, 2) come from where windows meet.
    """

    waits: int
    parts: dict[int, tuple[int, NDArray[np.int64], NDArray[np.int32]]]
    records: list[NDArray[np.int64]] = field(default_factory=list)
    joined: list[NDArray[np.int64]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.parts) + len(self.records) + len(self.joined)

    def take_in(self, other: _Waiting) -> None:
        self.waits += other.waits
        self.parts.update(other.parts)
        self.records += other.records
        self.joined += other.joined


@dataclass(frozen=True, slots=True, eq=False)
class _Along:
    """One side of a window as runs: where they start, and the class value, part and group of each (0 and -1 for ground)."""

    window: tuple[int, int]
    starts: NDArray[np.int64]
    values: NDArray[np.uint8]
    parts: NDArray[np.int64]
    groups: NDArray[np.int64]

    def at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.integer], ...]:
        """Value, part and group at places along the side."""
        run = np.searchsorted(self.starts, places, side="right") - 1
        return self.values[run], self.parts[run], self.groups[run]


@dataclass(slots=True)
class _Met:
    """What became known when a window came: vertices with all they have around them, runs side by side, whose wait is over."""

    vertices: list[tuple[NDArray[np.int64], ...]] = field(default_factory=list)
    beside: list[tuple[NDArray[np.int64], ...]] = field(default_factory=list)
    over: list[NDArray[np.int64]] = field(default_factory=list)


def split_whole(part: WindowShapes, *, together: bool = True) -> tuple[Groups, WindowShapes]:
    """The groups that end inside the window, and the window without them, for whom the first need no joiner.

    ``together``: a component waits for all that touch it, by a side or a corner of pixels; else it is a group by itself.
    """
    num, pairs = len(part), part.touching if together else part.touching[:0]
    is_open = np.zeros(num, np.bool_)
    for strip in part.sides:
        is_open[strip.parts[strip.parts >= 0]] = True
    root = roots(num, pairs[:, 0], pairs[:, 1])
    is_open = np.isin(root, root[is_open])
    if not num or is_open.all():
        return Groups.of([]), part
    number = np.where(is_open, np.cumsum(is_open), np.cumsum(~is_open)) - 1
    whole, left = np.flatnonzero(~is_open), np.flatnonzero(is_open)
    goes_on = is_open[part.records.part]
    records = [part.records.take(which, number[part.records.part[which]]) for which in (~goes_on, goes_on)]
    groups = Groups(
        value=part.value[whole],
        pixels=part.pixels[whole],
        shares=part.shares[whole],
        known=part.known[whole],
        group=np.unique(root[whole], return_inverse=True)[1].astype(np.int64),
        records=records[0],
    )
    numbers = np.append(number, -1).astype(np.int32)
    top, left_side, bottom, right = (Strip(strip.starts, numbers[strip.parts]) for strip in part.sides)
    rest = WindowShapes(
        window=part.window,
        value=part.value[left],
        pixels=part.pixels[left],
        shares=part.shares[left],
        known=part.known[left],
        touching=numbers[part.touching[is_open[part.touching].all(axis=1)]],
        records=records[1],
        sides=(top, left_side, bottom, right),
    )
    return groups, rest


class Joiner:
    """Takes the windows of a scene of ``scene_shape`` (row, col) in any order and hands out what is whole.

    The windows are the cells of rows and columns that cut the whole scene. ``together`` as in ``split_whole``.
    """

    def __init__(self, scene_shape: tuple[int, int], *, together: bool = True) -> None:
        self._shape, self._together = scene_shape, together
        self._sides: dict[tuple[str, int, int, int], _Along] = {}
        self._corners: dict[tuple[int, int], dict[int, tuple[int, int, int]]] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._parent: dict[int, int] = {}
        self._num_parts = self._num_groups = self._num_pixels = 0

    def add(self, part: WindowShapes) -> Groups:
        """Take a window in; the groups that are whole by now. Raises ConfigError for one that is no new cell of the scene."""
        window = part.window
        self._num_pixels += window.height * window.width
        whole, part = split_whole(part, together=self._together)
        sides = self._take_in(part)
        met = _Met()
        self._meet_sides(part, sides, met)
        self._meet_corners(part, sides, met)
        ended = self._settle(met)
        return Groups.of([whole, self._hand_out(ended)]) if ended else whole

    def finish(self) -> None:
        """Make sure that all is handed out. Raises ConfigError when windows are missing."""
        pixels = self._shape[0] * self._shape[1]
        if self._num_pixels != pixels or self._sides or self._corners or self._waiting:
            raise ConfigError(
                f"the windows do not tile the scene of {self._shape[0]} rows and {self._shape[1]} columns: they have "
                f"{self._num_pixels} of its {pixels} pixels and {len(self._sides)} sides wait for a neighbour; add every window "
                "once, those without a polygon too"
            )

    def _take_in(self, part: WindowShapes) -> list[_Along | None]:
        """Number the parts and their groups; the window's open sides with these numbers (None at the scene's edge)."""
        num = len(part)
        pairs = part.touching if self._together else part.touching[:0]
        _, group = np.unique(roots(num, pairs[:, 0], pairs[:, 1]), return_inverse=True)
        num_groups = int(group.max(initial=-1)) + 1
        order = np.argsort(group, kind="stable")
        number = np.empty(num, np.int64)
        number[order] = np.arange(num)
        table = np.stack([part.value.astype(np.int64), part.pixels, part.shares, part.known], axis=1)[order]
        records = part.records
        place = number[records.part] if num else _NO_PART
        by_place = np.argsort(place, kind="stable")
        rows = np.stack([place, records.row.astype(np.int64), records.col, records.kind], axis=1)[by_place]
        ends = np.cumsum(np.bincount(group, minlength=num_groups))
        record_ends = np.searchsorted(rows[:, 0], ends)
        first = record_first = 0
        for index, (end, record_end) in enumerate(zip(ends.tolist(), record_ends.tolist(), strict=True)):
            mine = rows[record_first:record_end].copy()
            mine[:, 0] -= first
            group_number = self._num_groups + index
            kept = self._num_parts + first, table[first:end].copy(), mine.astype(np.int32)
            self._waiting[group_number] = _Waiting(0, {group_number: kept})
            self._parent[group_number] = group_number
            first, record_first = end, record_end
        numbers = np.append(number + self._num_parts, -1)
        groups = np.append(group + self._num_groups, -1)
        values = np.append(part.value, 0).astype(np.uint8)
        self._num_parts += num
        self._num_groups += num_groups
        corner = part.window.row_off, part.window.col_off
        return [
            _Along(corner, side.starts.astype(np.int64), values[side.parts], numbers[side.parts], groups[side.parts])
            if is_open
            else None
            for side, is_open in zip(part.sides, self._is_open(part), strict=True)
        ]

    def _is_open(self, part: WindowShapes) -> tuple[bool, bool, bool, bool]:
        window, (rows, cols) = part.window, self._shape
        return window.row_off > 0, window.col_off > 0, window.row_end < rows, window.col_end < cols

    def _meet_sides(self, part: WindowShapes, sides: list[_Along | None], met: _Met) -> None:
        window = part.window
        keys = [
            ("row", window.row_off, window.col_off, window.width),
            ("column", window.col_off, window.row_off, window.height),
            ("row", window.row_end, window.col_off, window.width),
            ("column", window.col_end, window.row_off, window.height),
        ]
        for place, (key, side) in enumerate(zip(keys, sides, strict=True)):
            if side is None:
                continue
            self._wait(side.groups)
            other = self._sides.pop(key, None)
            if other is None:
                self._sides[key] = side
                continue
            if other.window == side.window:
                raise ConfigError(
                    f"the window at row {window.row_off}, column {window.col_off} was added before; add each once"
                )
            before, after = (other, side) if place in (0, 1) else (side, other)
            if before.values.any() or after.values.any():
                met.over += [np.unique(before.groups), np.unique(after.groups)]
                _compare(before, after, key, met)

    def _meet_corners(self, part: WindowShapes, sides: list[_Along | None], met: _Met) -> None:
        window = part.window
        top, left, bottom, right = sides
        # The slot of the vertex that the window's pixel fills, and a side that begins (0) or ends (-1) with that pixel.
        corners: Sequence[tuple[int, int, int, tuple[_Along | None, int], tuple[_Along | None, int]]] = (
            (3, window.row_off, window.col_off, (top, 0), (left, 0)),
            (2, window.row_off, window.col_end, (top, -1), (right, 0)),
            (1, window.row_end, window.col_off, (bottom, 0), (left, -1)),
            (0, window.row_end, window.col_end, (bottom, -1), (right, -1)),
        )
        for slot, row, col, one, other in corners:
            side, at = one if one[0] is not None else other
            if side is None:
                continue
            filled = self._corners.setdefault((row, col), {})
            filled[slot] = int(side.values[at]), int(side.parts[at]), int(side.groups[at])
            self._wait(side.groups[at : at + 1] if at == 0 else side.groups[at:])
            expected = (1 + (0 < row < self._shape[0])) * (1 + (0 < col < self._shape[1]))
            if len(filled) == expected:
                del self._corners[row, col]
                around = np.array([filled.get(slot, (0, -1, -1)) for slot in range(4)])
                if around[:, 0].any():
                    met.vertices.append((*around.T[:, :, None], np.array([row]), np.array([col])))
                    met.over += [around[slot : slot + 1, 2] for slot in range(4)]

    def _settle(self, met: _Met) -> list[_Waiting]:
        """Bring together what hangs together, give it its records, and end what waits for nothing more."""
        if not (met.vertices or met.beside or met.over):
            return []
        no_vertex, none = np.zeros((4, 0), np.int64), np.zeros((6, 0), np.int64)
        beside = np.concatenate([none, *(np.stack(some) for some in met.beside)], axis=1)
        same = beside[0] == beside[1]
        touching = [beside[4:, slice(None) if self._together else same].T]
        vertices = [(no_vertex, no_vertex, no_vertex, _NO_PART, _NO_PART), *met.vertices]
        values, parts, groups, rows, cols = (np.concatenate(some, axis=-1) for some in zip(*vertices, strict=True))
        if self._together:
            touching.append(touching_around(groups))
        for one, other in np.unique(np.concatenate(touching), axis=0).tolist():
            self._unite(one, other)
        slot, vertex, kind = records_around(values.astype(np.uint8))
        records = np.stack([parts[slot, vertex], rows[vertex], cols[vertex], kind], axis=1)
        for group, some in _by_group(groups[slot, vertex], records):
            self._waiting[self._root(group)].records.append(some)
        for group, some in _by_group(beside[4, same], beside[2:4, same].T):
            self._waiting[self._root(group)].joined.append(some)
        over = np.concatenate([_NO_PART, *met.over])
        return self._end(over[over >= 0].tolist())

    def _end(self, over: Sequence[int]) -> list[_Waiting]:
        """End a wait of each of these groups; those that wait for nothing more."""
        ended: list[_Waiting] = []
        for group in over:
            root = self._root(group)
            waiting = self._waiting[root]
            waiting.waits -= 1
            if waiting.waits == 0:
                ended.append(self._waiting.pop(root))
        for waiting in ended:
            for group in waiting.parts:
                del self._parent[group]
        return ended

    def _unite(self, one: int, other: int) -> None:
        one, other = self._root(one), self._root(other)
        if one == other:
            return
        if len(self._waiting[one]) < len(self._waiting[other]):
            one, other = other, one
        self._parent[other] = one
        self._waiting[one].take_in(self._waiting.pop(other))

    def _hand_out(self, ended: Sequence[_Waiting]) -> Groups:
        """Parts put together to components, those of each of ``ended`` as a group."""
        pieces = [(index, *part) for index, waiting in enumerate(ended) for part in waiting.parts.values()]
        firsts = np.array([first for _, first, _, _ in pieces])
        sizes = np.array([len(table) for _, _, table, _ in pieces])
        places = np.cumsum(sizes) - sizes
        order = np.argsort(firsts)
        sorted_firsts = firsts[order]

        def place_of(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
            which = order[np.searchsorted(sorted_firsts, numbers, side="right") - 1]
            found: NDArray[np.int64] = numbers - firsts[which] + places[which]
            return found

        table = np.concatenate([table for _, _, table, _ in pieces])
        joined = place_of(np.concatenate([np.zeros((0, 2), np.int64), *(some for one in ended for some in one.joined)]))
        known, component = np.unique(roots(len(table), joined[:, 0], joined[:, 1]), return_inverse=True)
        total = np.zeros((len(known), 3), np.int64)
        np.add.at(total, component, table[:, 1:])
        inside = np.concatenate([some for _, _, _, some in pieces])
        part = inside[:, 0] + np.repeat(places, [len(some) for _, _, _, some in pieces])
        between = np.concatenate([np.zeros((0, 4), np.int64), *(some for one in ended for some in one.records)])
        row, col, kind = np.concatenate([inside[:, 1:], between[:, 1:]]).T
        return Groups(
            value=table[known, 0].astype(np.uint8),
            pixels=total[:, 0],
            shares=total[:, 1],
            known=total[:, 2],
            group=np.repeat(np.array([index for index, _, _, _ in pieces]), sizes)[known],
            records=Records(
                component[np.append(part, place_of(between[:, 0]))].astype(np.int32),
                row.astype(np.int32),
                col.astype(np.int32),
                kind.astype(np.uint8),
            ),
        )

    def _wait(self, groups: NDArray[np.int64]) -> None:
        for group in np.unique(groups).tolist():
            if group >= 0:
                self._waiting[self._root(group)].waits += 1

    def _root(self, group: int) -> int:
        parent = self._parent
        while (above := parent[group]) != group:
            parent[group] = group = parent[above]
        return group


def _compare(before: _Along, after: _Along, key: tuple[str, int, int, int], met: _Met) -> None:
    """The runs of two windows side by side, and the vertices between them, into ``met``."""
    along, line, offset, _ = key
    places = np.union1d(before.starts, after.starts)
    pairs = list(zip(before.at(places), after.at(places), strict=True))
    both = np.flatnonzero((pairs[0][0] > 0) & (pairs[0][1] > 0))
    met.beside.append(tuple(some[both].astype(np.int64) for pair in pairs for some in pair))
    at, lines = places[1:] + offset, np.full(len(places) - 1, line)
    is_column = along == "column"
    around = (
        np.stack([a[:-1], b[:-1], a[1:], b[1:]] if is_column else [a[:-1], a[1:], b[:-1], b[1:]]) for a, b in pairs
    )
    met.vertices.append((*around, *((at, lines) if is_column else (lines, at))))


def _by_group(groups: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The rows of each group, as copies that keep no others alive."""
    if not len(groups):
        return
    order = np.argsort(groups, kind="stable")
    known, first = np.unique(groups[order], return_index=True)
    for group, some in zip(known.tolist(), np.split(rows[order], first[1:]), strict=True):
        yield group, some.copy()

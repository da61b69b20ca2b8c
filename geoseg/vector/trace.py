"""From the mask of one window to the corners of its components and what its neighbours must know of it.

A component is a piece of one class that hangs together by the sides of pixels; in a window it is a part of one. A vertex is a
corner of pixels, (row, col) of the pixel to its lower right, counted from the scene's top-left. Slots name the pixels around
a vertex: 0 upper left, 1 upper right, 2 lower left, 3 lower right.

An outline is told by its records alone: where it turns (kinds 0 to 3, by the slot whose pixel has the corner's two sides:
0 goes up and left, 1 up and right, 2 down and left, 3 down and right), and where it goes straight on while two others meet
across it (4 up and down, 5 left and right). Sides of pixels lead from record to record along a row or a column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geoseg.errors import ConfigError
from geoseg.pieces import roots
from geoseg.raster.window import Window

PartsAt = Callable[[NDArray[np.integer]], NDArray[np.int32]]
STRAIGHT_DOWN, STRAIGHT_ACROSS = 4, 5
NO_SHARE = 255
# The neighbours of each slot: beside it, above or below it, across the vertex.
_AROUND = ((1, 2, 3), (0, 3, 2), (3, 0, 1), (2, 1, 0))
_PAIRS = ((0, 1), (0, 2), (1, 3), (2, 3), (0, 3), (1, 2))


@dataclass(frozen=True, slots=True, eq=False)
class Strip:
    """What lies along one side of a window: runs from ``starts`` (pixels from the side's beginning), each of a part or -1."""

    starts: NDArray[np.int32]
    parts: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Records of outlines: the part (or component), the vertex, the kind."""

    part: NDArray[np.int32]
    row: NDArray[np.int32]
    col: NDArray[np.int32]
    kind: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.part)

    def take(self, which: NDArray[np.generic], part: NDArray[np.integer]) -> Records:
        """Those at ``which``, as records of ``part``, which is theirs anew."""
        return Records(part.astype(np.int32), self.row[which], self.col[which], self.kind[which])


NO_RECORDS = Records(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.uint8))


@dataclass(frozen=True, slots=True, eq=False)
class WindowShapes:
    """The parts of components in a window; it travels between processes.

    For each part the class value, its ``pixels``, the sum of the shares of its class over them (steps of 1/254) and how many
    of them have one; ``touching`` (pair, 2) are different parts that share a side or a corner of pixels. ``records`` lack those
    at vertices that pixels of other windows share. ``sides`` (top, left, bottom, right) are empty at the scene's edge.
    """

    window: Window
    value: NDArray[np.uint8]
    pixels: NDArray[np.int64]
    shares: NDArray[np.int64]
    known: NDArray[np.int64]
    touching: NDArray[np.int32]
    records: Records
    sides: tuple[Strip, Strip, Strip, Strip]

    def __len__(self) -> int:
        return len(self.value)

    @classmethod
    def nothing(cls, window: Window) -> WindowShapes:
        """A window without a pixel of the classes asked for."""
        none, whole = np.zeros(0, np.int64), Strip(np.zeros(1, np.int32), np.full(1, -1, np.int32))
        pairs = np.zeros((0, 2), np.int32)
        return cls(window, NO_RECORDS.kind, none, none, none, pairs, NO_RECORDS, (whole, whole, whole, whole))


def trace_window(
    mask_hw: NDArray[np.uint8],
    window: Window,
    scene_shape: tuple[int, int],
    values: Sequence[int],
    shares_vhw: NDArray[np.uint8] | None,
) -> WindowShapes:
    """The parts of the classes ``values`` (1 to 254) in one of the windows that tile a scene of ``scene_shape`` (row, col).

    ``mask_hw`` uint8 has exactly the window's pixels; ``shares_vhw`` uint8 are the probabilities of ``values`` in their order, in
    steps of 1/254, 255 for none, or None if there are no probabilities. Raises ConfigError for other shapes and values.
    """
    _check(mask_hw, window, scene_shape, values, shares_vhw)
    # A frame of ground around the window keeps its rows apart and stands for what lies outside the scene.
    framed_hw = np.zeros((window.height + 2, window.width + 2), np.uint8)
    for value in values:
        framed_hw[1:-1, 1:-1] |= (mask_hw == value) * np.uint8(value)
    flat, pitch = framed_hw.reshape(-1), window.width + 2
    across = flat[1:] != flat[:-1]
    changes = np.flatnonzero(across) + 1
    if not len(changes):
        return WindowShapes.nothing(window)
    starts, stops = changes[flat[changes] != 0], changes[flat[changes - 1] != 0]
    part_of_run = _connect(starts, stops, flat[starts], pitch)
    num = int(part_of_run.max()) + 1

    def parts_at(places: NDArray[np.integer]) -> NDArray[np.int32]:
        runs = np.maximum(np.searchsorted(starts, places, side="right") - 1, 0)
        return np.where(flat[places] > 0, part_of_run[runs], -1).astype(np.int32)

    value_of = np.zeros(num, np.uint8)
    value_of[part_of_run] = flat[starts]
    shares, known = _sum_shares(mask_hw, shares_vhw, values, (stops - starts, part_of_run, flat[starts]))
    records, touching = _look_around(framed_hw, across, _own_vertices(window, scene_shape), parts_at)
    return WindowShapes(
        window=window,
        value=value_of,
        pixels=_summed(part_of_run, stops - starts, num),
        shares=shares,
        known=known,
        touching=touching,
        records=Records(records.part, records.row + window.row_off, records.col + window.col_off, records.kind),
        sides=_strips(flat, pitch, window, scene_shape, parts_at),
    )


def records_around(values_sn: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.uint8]]:
    """The records at vertices with the class values ``values_sn`` (slot, vertex) around them, 0 for ground: slot, vertex, kind.

    The slot is one whose pixel is of the record's component. Pixels of a class that meet at a corner alone have a record each.
    """
    slots: list[int] = []
    vertices: list[NDArray[np.intp]] = []
    kinds: list[int] = []
    for slot, (beside, over, across) in enumerate(_AROUND):
        own = values_sn[slot]
        is_beside, is_over, is_across = (values_sn[other] == own for other in (beside, over, across))
        turns = [(~is_beside & ~is_over, slot), (is_beside & is_over & ~is_across, 3 - slot)]
        if slot in (0, 1):
            turns.append((is_over & ~is_beside & ~is_across & (values_sn[beside] != values_sn[across]), STRAIGHT_DOWN))
        if slot in (0, 2):
            turns.append((is_beside & ~is_over & ~is_across & (values_sn[over] != values_sn[across]), STRAIGHT_ACROSS))
        for here, kind in turns:
            slots.append(slot)
            vertices.append(np.flatnonzero(here & (own > 0)))
            kinds.append(kind)
    counts = [len(some) for some in vertices]
    return np.repeat(slots, counts), np.concatenate(vertices), np.repeat(np.array(kinds, np.uint8), counts)


def touching_around(parts_sn: NDArray[np.integer]) -> NDArray[np.int64]:
    """The pairs (pair, 2) of different parts around vertices, from their numbers ``parts_sn`` (slot, vertex), -1 for ground."""
    pairs = np.concatenate([parts_sn[list(pair)] for pair in _PAIRS], axis=1)
    pairs = pairs[:, (pairs[0] >= 0) & (pairs[1] >= 0) & (pairs[0] != pairs[1])]
    return np.unique(np.sort(pairs, axis=0), axis=1).T.astype(np.int64)


def _check(
    mask_hw: NDArray[np.uint8],
    window: Window,
    scene_shape: tuple[int, int],
    values: Sequence[int],
    shares_vhw: NDArray[np.uint8] | None,
) -> None:
    shape = (window.height, window.width)
    if mask_hw.shape != shape or mask_hw.dtype != np.uint8:
        raise ConfigError(
            f"the mask of the window at row {window.row_off}, column {window.col_off} must be uint8 {shape}, got "
            f"{mask_hw.dtype} {mask_hw.shape}; give the pixels of the window, without a halo"
        )
    if not values or len(set(values)) != len(values) or not all(1 <= value <= 254 for value in values):
        raise ConfigError(f"polygons are traced of different class values from 1 to 254, got {list(values)}")
    if shares_vhw is not None and (shares_vhw.shape != (len(values), *shape) or shares_vhw.dtype != np.uint8):
        raise ConfigError(
            f"the probabilities of {len(values)} classes in a window must be uint8 {(len(values), *shape)}, got "
            f"{shares_vhw.dtype} {shares_vhw.shape}"
        )
    if window.row_off < 0 or window.col_off < 0 or window.row_end > scene_shape[0] or window.col_end > scene_shape[1]:
        raise ConfigError(f"{window} reaches past the scene of {scene_shape[0]} rows and {scene_shape[1]} columns")


def _connect(
    starts: NDArray[np.intp], stops: NDArray[np.intp], values: NDArray[np.uint8], pitch: int
) -> NDArray[np.intp]:
    """The part of each run, from 0 in the order of their first pixels; runs of a class that share a column hang together."""
    first = np.searchsorted(stops, starts - pitch, side="right")
    last = np.searchsorted(starts, stops - pitch, side="left")
    num_above = np.maximum(last - first, 0)
    below = np.repeat(np.arange(len(starts)), num_above)
    above = np.arange(len(below)) - np.repeat(num_above.cumsum() - num_above - first, num_above)
    same = values[below] == values[above]
    root = roots(len(starts), above[same], below[same])
    is_first = root == np.arange(len(root))
    return (np.cumsum(is_first) - 1)[root]


def _summed(where: NDArray[np.intp], what: NDArray[np.integer], num: int) -> NDArray[np.int64]:
    total = np.zeros(num, np.int64)
    np.add.at(total, where, what)
    return total


def _sum_shares(
    mask_hw: NDArray[np.uint8],
    shares_vhw: NDArray[np.uint8] | None,
    values: Sequence[int],
    runs: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.uint8]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each part the sum of the shares of its class over its pixels, and how many of these have one.

    ``runs`` are their lengths, parts and values, in the order of the pixels.
    """
    lengths, part_of_run, value_of_run = runs
    num = int(part_of_run.max()) + 1
    shares, known = np.zeros(num, np.int64), np.zeros(num, np.int64)
    if shares_vhw is None:
        return shares, known
    for value, shares_hw in zip(values, shares_vhw, strict=True):
        mine = np.flatnonzero(value_of_run == value)
        if not len(mine):
            continue
        first = np.cumsum(lengths[mine]) - lengths[mine]
        along = shares_hw[mask_hw == value]
        has_one = along != NO_SHARE
        np.add.at(shares, part_of_run[mine], np.add.reduceat(along * has_one, first, dtype=np.int64))
        np.add.at(known, part_of_run[mine], np.add.reduceat(has_one, first, dtype=np.int64))
    return shares, known


def _own_vertices(window: Window, scene_shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """First row and column, end row and column of the vertices that no other window shares, counted from the window's corner."""
    return (
        int(window.row_off > 0),
        int(window.col_off > 0),
        window.height + int(window.row_end == scene_shape[0]),
        window.width + int(window.col_end == scene_shape[1]),
    )


def _look_around(
    framed_hw: NDArray[np.uint8], across: NDArray[np.bool_], own: tuple[int, int, int, int], parts_at: PartsAt
) -> tuple[Records, NDArray[np.int32]]:
    """The records at the window's ``own`` vertices, and the parts that touch there; ``across``: where pixels in a row differ."""
    pitch = framed_hw.shape[1]
    flat = framed_hw.reshape(-1)
    down = flat[pitch:] != flat[:-pitch]
    # An outline goes straight through a vertex where no pixels differ on either of two opposite sides.
    rows, cols = np.divmod(np.flatnonzero((down[1:] | down[:-1]) & (across[pitch:] | across[:-pitch])), pitch)
    inside = (rows >= own[0]) & (cols >= own[1]) & (rows < own[2]) & (cols < own[3])
    rows, cols = rows[inside], cols[inside]
    places_sn = rows * pitch + cols + np.array([[0], [1], [pitch], [pitch + 1]])
    values_sn = flat[places_sn]
    slot, vertex, kind = records_around(values_sn)
    records = Records(
        parts_at(places_sn[slot, vertex]),
        rows[vertex].astype(np.int32),
        cols[vertex].astype(np.int32),
        kind,
    )
    a, b, c, d = values_sn
    several = [(x != y) & (x > 0) & (y > 0) for x, y in ((a, b), (a, c), (b, d), (c, d), (a, d), (b, c))]
    corners = ((a == d) & (a > 0) | (b == c) & (b > 0)) & (a != b) & (a != c) & (d != b)
    meet = np.flatnonzero(np.logical_or.reduce([*several, corners]))
    touching = touching_around(parts_at(places_sn[:, meet].reshape(-1)).reshape(4, -1))
    return records, touching.astype(np.int32)


def _strips(
    flat: NDArray[np.uint8], pitch: int, window: Window, scene_shape: tuple[int, int], parts_at: PartsAt
) -> tuple[Strip, Strip, Strip, Strip]:
    ends = window.row_off == 0, window.col_off == 0, window.row_end == scene_shape[0], window.col_end == scene_shape[1]
    across, down = np.arange(window.width), np.arange(window.height) * pitch
    last_row, last_col = (window.height - 1) * pitch, window.width - 1
    top, left, bottom, right = (
        Strip(np.zeros(0, np.int32), np.zeros(0, np.int32)) if is_end else _strip(flat, places + pitch + 1, parts_at)
        for is_end, places in zip(ends, (across, down, across + last_row, down + last_col), strict=True)
    )
    return top, left, bottom, right


def _strip(flat: NDArray[np.uint8], places: NDArray[np.intp], parts_at: PartsAt) -> Strip:
    along = flat[places]
    starts = np.flatnonzero(np.append(True, along[1:] != along[:-1]))
    return Strip(starts.astype(np.int32), parts_at(places[starts]))

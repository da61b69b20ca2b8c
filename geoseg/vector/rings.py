"""From the records of outlines to closed rings of vertices, one exterior and its holes for each component.

Along a row or a column the records of a component are, by turns, where its outline begins and where it ends: that links
each to the next, and the rings are the cycles. No collinear vertex is left but those asked for, and nothing tells of a cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoseg.pieces import roots
from geoseg.vector.trace import STRAIGHT_ACROSS, STRAIGHT_DOWN, Records

_FEW = 24
_LARGEST_KEY = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Rings:
    """Closed rings: ``row`` and ``col`` of their vertices, ``ends`` of each ring, and how many rings end with each component.

    A component's first ring is its exterior, from its least (row, col) on down; its holes follow by their least vertex, from
    which they go to the right. So with columns as x and rows as -y an exterior runs against the clock, a hole with it.
    """

    row: NDArray[np.int32]
    col: NDArray[np.int32]
    ends: NDArray[np.int64]
    component_ends: NDArray[np.int64]


def link_rings(records: Records, num: int, *, straight: bool) -> Rings:
    """The rings of ``num`` components; ``straight``: with the vertices at which others meet along a side."""
    kept = np.flatnonzero(straight | (records.kind < STRAIGHT_DOWN))
    order = kept[_order(records.part[kept], records.row[kept], records.col[kept], np.zeros(len(kept), np.int8))]
    part, row, col, kind = records.part[order], records.row[order], records.col[order], records.kind[order]
    following = _follow(part, row, col, kind)

    # A component's first record begins its exterior. What is left then are holes, if any.
    outer = np.flatnonzero(np.append(True, part[1:] != part[:-1])[: len(part)])
    outer_walk = _walk(following, 2 * outer + 1)
    is_left = np.ones(len(part), np.bool_)
    is_left[outer_walk[0] >> 1] = False
    left = np.flatnonzero(is_left)
    place = np.cumsum(is_left) - 1
    halves = np.concatenate([2 * left, 2 * left + 1])
    lowest = roots(len(left), place[halves >> 1], place[following[halves] >> 1])
    inner = left[lowest == np.arange(len(left))]
    inner_walk = _walk(following, 2 * inner)

    start = np.concatenate([outer, inner])
    lengths = np.concatenate([outer_walk[1], inner_walk[1]])
    by_start = np.argsort(start)
    vertices = np.concatenate([outer_walk[0], inner_walk[0]]) >> 1
    first = (np.cumsum(lengths) - lengths)[by_start]
    closed = lengths[by_start] + 1
    ends = np.cumsum(closed)
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + closed, closed)
    at[ends - 1] = first
    vertices = vertices[at]
    per_component = np.bincount(part[start], minlength=num)
    return Rings(row=row[vertices], col=col[vertices], ends=ends, component_ends=np.cumsum(per_component))


def _order(
    part: NDArray[np.int32], major: NDArray[np.int32], minor: NDArray[np.int32], last: NDArray[np.int8]
) -> NDArray[np.intp]:
    """The order by part, then major, minor and last (0 or 1)."""
    if not len(part):
        return np.zeros(0, np.intp)
    low, high = int(major.min()), int(major.max())
    left, right = int(minor.min()), int(minor.max())
    if (int(part.max()) + 1) * (high - low + 1) * (right - left + 1) * 2 > _LARGEST_KEY:
        return np.lexsort((last, minor, major, part))
    key = part.astype(np.int64) * (high - low + 1) + (major - low)
    key = (key * (right - left + 1) + (minor - left)) * 2 + last
    return np.argsort(key, kind="stable")


def _follow(
    part: NDArray[np.int32], row: NDArray[np.int32], col: NDArray[np.int32], kind: NDArray[np.uint8]
) -> NDArray[np.intp]:
    """For each half of a record (2 i and 2 i + 1) the half by which the outline leaves the next record.

    The first half of a corner goes along the row and its second along the column; both of a straight record go one way. The
    first comes before the second where both lie on one line.
    """
    num = len(part)
    partner = np.empty(2 * num, np.intp)
    every = np.arange(num)
    for along_row in (True, False):
        straight = np.flatnonzero(kind == (STRAIGHT_ACROSS if along_row else STRAIGHT_DOWN))
        corners = every[kind < STRAIGHT_DOWN]
        halves = np.concatenate([2 * corners + (not along_row), 2 * straight, 2 * straight + 1])
        # Whether a side begins here, in the direction in which rows and columns grow: to the right, or down.
        begins = np.concatenate(
            [
                kind[corners] % 2 if along_row else kind[corners] // 2,
                np.zeros(len(straight), np.uint8),
                np.ones(len(straight), np.uint8),
            ]
        ).astype(np.int8)
        record = halves >> 1
        lines, places = (row, col) if along_row else (col, row)
        order = _order(part[record], lines[record], places[record], begins)
        halves = halves[order]
        if along_row:
            _part_diagonals(halves, (part, row, col))
        partner[halves[0::2]], partner[halves[1::2]] = halves[1::2], halves[0::2]
    return partner ^ 1


def _part_diagonals(halves: NDArray[np.intp], where: tuple[NDArray[np.int32], ...]) -> None:
    """Where two pixels of one component meet at a corner alone, make its outline turn around the two of the ground instead.

    A ring that ran through the vertex twice would touch itself, which is not valid; so two rings touch there.
    """
    end, begin = halves[1:-1:2], halves[2::2]
    one, other = end >> 1, begin >> 1
    same = one != other
    for some in where:
        same &= some[one] == some[other]
    swap = np.flatnonzero(same)
    halves[2 * swap + 1], halves[2 * swap + 2] = begin[swap], end[swap]


def _walk(following: NDArray[np.intp], starts: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """The halves of each cycle from its start on, one cycle after the other, and the length of each.

    All go on together, a step at a time; the last few, which may be long, each by itself.
    """
    lengths = np.zeros(len(starts), np.int64)
    steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    ring, at = np.arange(len(starts)), starts
    while len(ring) > _FEW:
        steps.append((ring, at))
        at = following[at]
        goes_on = at != starts[ring]
        if not goes_on.all():
            lengths[ring[~goes_on]] = len(steps)
            ring, at = ring[goes_on], at[goes_on]
    tails: list[tuple[int, NDArray[np.intp]]] = []
    next_half: Any = memoryview(following)  # type: ignore[arg-type]
    for one, place in zip(ring.tolist(), at.tolist(), strict=True):
        start, here = int(starts[one]), place
        tail: list[int] = []
        while here != start or not (steps or tail):
            tail.append(here)
            here = next_half[here]
        lengths[one] = len(steps) + len(tail)
        tails.append((one, np.array(tail, np.intp)))
    first = np.cumsum(lengths) - lengths
    halves = np.empty(int(lengths.sum()), np.intp)
    for step, (some, place_of) in enumerate(steps):
        halves[first[some] + step] = place_of
    for one, some in tails:
        halves[first[one] + len(steps) : first[one] + lengths[one]] = some
    return halves, lengths

"""A window of a road mask with context in; its centre lines, one pixel wide, and their half widths out, whatever the cutting.

Legend of axes: h rows, w columns.

Thinning to the end is not local: how a pixel far inside a wide area ends depends on the area's whole outline. So it is bounded.
Pixels deeper than ``half_width`` are the *core* of a wide area; they are known locally, by the distance to the next pixel
that is no road, and stay as they are. Around them and elsewhere the mask is thinned in a fixed number of rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

UNKNOWN = 255
HALF_STEPS = 64  # half widths are kept in steps of 1/64 pixel: their sums are exact in any order
_ROUNDS_TO_SPARE = 6
_RING = (
    (0, 1),
    (-1, 1),
    (-1, 0),
    (-1, -1),
    (0, -1),
    (1, -1),
    (1, 0),
    (1, 1),
)  # x1 to x8: against the clock from the east


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far the mask around a pixel decides on its centre line, in pixels.

    ``half_width``: half of the widest road; ``hole``: largest side of a hole in a road that is filled before it is thinned,
    at least 1: around a hole of one pixel no pixel is deletable, so a road full of them would take any number of rounds.
    """

    half_width: int
    hole: int

    @property
    def rounds(self) -> int:
        """Rounds of thinning. A round takes at least one layer of pixels off every side, and no road has more than half_width."""
        return self.half_width + _ROUNDS_TO_SPARE

    @property
    def end(self) -> int:
        """Longest row of road pixels along the border of what is known at which a road leaves it, in rows or columns."""
        return 2 * self.half_width

    @property
    def halo(self) -> int:
        """Context on each side of a window that makes its result that of the whole scene.

        From the pixel outwards: 2 for its links to its neighbours and for whether these touch a core; 2 per round, since a round
        has two passes that look at the 8 neighbours; ``end`` + 2 for whether the row of border pixels that a fixed pixel is
        the middle of ends in time (a core needs half_width, which is less); ``hole`` + 1 for whether a hole is closed.
        """
        return 2 + 2 * self.rounds + self.end + 2 + self.hole + 1


def _deletable() -> list[NDArray[np.bool_]]:
    """For both passes, which of the 256 neighbourhoods (x1 in the lowest bit) let their pixel go.

    Z. Guo and R. W. Hall, "Parallel thinning with two-subiteration algorithms", Comm. ACM 32(3), 1989, algorithm A1, with the
    conditions in the form of L. Lam, S.-W. Lee, C. Y. Suen, "Thinning methodologies", PAMI 14(9), 1992, page 879.
    """
    codes = np.arange(256)
    x = [(codes >> (k % 8) & 1).astype(np.bool_) for k in range(9)]
    crossings = sum((~x[k] & (x[k + 1] | x[(k + 2) % 8])).astype(np.int64) for k in (0, 2, 4, 6))
    pairs = [sum((x[k] | x[k + 1]).astype(np.int64) for k in range(start, start + 8, 2) if k < 8) for start in (0, 1)]
    fewest = np.minimum(pairs[0], pairs[1])
    simple = (crossings == 1) & (fewest >= 2) & (fewest <= 3)
    return [simple & ~((x[1] | x[2] | ~x[7]) & x[0]), simple & ~((x[5] | x[6] | ~x[3]) & x[4])]


_DELETABLE = _deletable()


def thin(road_hw: NDArray[np.bool_], fixed_hw: NDArray[np.bool_], rounds: int) -> NDArray[np.bool_]:
    """What is left of the road after ``rounds`` rounds of thinning in which pixels that are ``fixed`` stay; outside is no road.

    A round is two passes, in each of which all deletable pixels go at once. Only pixels whose neighbourhood changed since the
    same pass of the last round are looked at, so that the effort follows the area of the roads and not that of the window.
    """
    height, width = road_hw.shape
    pitch = width + 2
    road = np.pad(road_hw, 1).ravel()
    loose = np.pad(road_hw & ~fixed_hw, 1).ravel()
    steps = [down * pitch + across for down, across in _RING]
    places = np.flatnonzero(loose)
    code = np.zeros(len(road), np.uint8)
    around = np.zeros(len(places), np.uint8)
    for bit, step in enumerate(steps):
        around |= road[places + step].astype(np.uint8) << bit
    code[places] = around
    stamp = np.zeros(len(road), np.int32)
    changed = [places, places[:0]]
    for turn in range(2 * rounds):
        looked_at = np.concatenate(changed) if turn != 1 else places
        gone = looked_at[_DELETABLE[turn % 2][code[looked_at]] & loose[looked_at]]
        stamp[gone] = np.arange(len(gone))
        gone = gone[stamp[gone] == np.arange(len(gone))]
        road[gone] = loose[gone] = False
        touched = []
        for bit, step in enumerate(steps):
            code[gone - step] &= np.uint8(
                255 ^ (1 << bit)
            )  # of the neighbour on the other side, this is the one in `bit`
            touched.append(gone - step)
        touched_all = np.concatenate(touched)
        changed = (
            [changed[1], touched_all[loose[touched_all]]] if turn else [places[:0], touched_all[loose[touched_all]]]
        )
        if turn and not len(changed[0]) and not len(changed[1]):
            break
    return road.reshape(height + 2, pitch)[1:-1, 1:-1]


@dataclass(frozen=True, slots=True, eq=False)
class Thinned:
    """Centre lines, the cores of wide areas, both (h, w), and the squared distance (h, w), int32, to the next pixel without road.

    Distances above the reach's half width say no more than that. ``ends_hw`` (h, w) are the last pixels of roads that run into
    the unknown.
    """

    lines_hw: NDArray[np.bool_]
    core_hw: NDArray[np.bool_]
    square_hw: NDArray[np.int32]
    ends_hw: NDArray[np.bool_]


def thin_window(mask_hw: NDArray[np.uint8], values: tuple[int, ...], reach: Reach) -> Thinned | None:
    """The centre lines of the pixels with one of the ``values``; 255 is unknown, as is all outside the scene. None without road.

    ``mask_hw`` has ``reach.halo`` pixels of context on each side; in what lies further in, the result is that of the whole
    scene. A road that runs into the unknown gets a centre line up to its last pixel: the middle one of the pixels where it
    meets the unknown is fixed. A road that the border cuts lengthwise does not, it meets it for too long.
    """
    road_hw = is_road(mask_hw, values)
    if not road_hw.any():
        return None
    unknown_hw = mask_hw == UNKNOWN
    road_hw = filled(road_hw, unknown_hw, reach.hole)
    square_hw = _square_distance(road_hw, reach)
    core_hw = square_hw > reach.half_width**2
    ends_hw = road_ends(road_hw, unknown_hw, reach.end)
    return Thinned(thin(road_hw, core_hw | ends_hw, reach.rounds) & ~core_hw, core_hw, square_hw, ends_hw)


def is_road(mask_hw: NDArray[np.uint8], values: tuple[int, ...]) -> NDArray[np.bool_]:
    """Where the mask has one of the values."""
    road_hw: NDArray[np.bool_] = mask_hw == values[0]
    for value in values[1:]:
        road_hw |= mask_hw == value
    return road_hw


def filled(road_hw: NDArray[np.bool_], unknown_hw: NDArray[np.bool_], hole: int) -> NDArray[np.bool_]:
    """The road with its holes of at most ``hole`` rows and columns filled; holes with unknown pixels stay."""
    pieces_hw, num = ndimage.label(~road_hw)
    if not hole or not num:
        return road_hw
    height, width = road_hw.shape
    small = np.zeros(num + 1, np.bool_)
    for piece, (rows, cols) in enumerate(ndimage.find_objects(pieces_hw), start=1):
        small[piece] = (
            max(rows.stop - rows.start, cols.stop - cols.start) <= hole
            and rows.start > 0
            and cols.start > 0
            and rows.stop < height
            and cols.stop < width
        )
    small[pieces_hw[unknown_hw]] = False
    filled_hw: NDArray[np.bool_] = road_hw | small[pieces_hw]
    return filled_hw


def _square_distance(road_hw: NDArray[np.bool_], reach: Reach) -> NDArray[np.int32]:
    """Squared distance of each pixel to the next that is no road (centre to centre); of one without any, more than all."""
    if road_hw.all():
        return np.full(road_hw.shape, (reach.half_width + 1) ** 2, np.int32)
    next_hw = ndimage.distance_transform_edt(road_hw, return_distances=False, return_indices=True)
    square_hw = np.zeros(road_hw.shape, np.int32)
    row, col = np.nonzero(road_hw)
    square_hw[row, col] = (next_hw[0, row, col] - row) ** 2 + (next_hw[1, row, col] - col) ** 2
    return square_hw


def road_ends(road_hw: NDArray[np.bool_], unknown_hw: NDArray[np.bool_], end: int) -> NDArray[np.bool_]:
    """The middle pixels of the rows of road pixels along the unknown that are at most ``end`` rows and columns long."""
    ends_hw = np.zeros(road_hw.shape, np.bool_)
    if not unknown_hw.any():
        return ends_hw
    beside_hw = np.zeros(road_hw.shape, np.bool_)
    beside_hw[1:] |= unknown_hw[:-1]
    beside_hw[:-1] |= unknown_hw[1:]
    beside_hw[:, 1:] |= unknown_hw[:, :-1]
    beside_hw[:, :-1] |= unknown_hw[:, 1:]
    beside_hw &= road_hw
    pieces_hw, num = ndimage.label(beside_hw, np.ones((3, 3), np.int8))
    if not num:
        return ends_hw
    height, width = road_hw.shape
    row, col = np.nonzero(beside_hw)
    piece = pieces_hw[row, col]
    first = np.full((2, num + 1), max(height, width))
    last = np.full((2, num + 1), -1)
    for axis, place in enumerate((row, col)):
        np.minimum.at(first[axis], piece, place)
        np.maximum.at(last[axis], piece, place)
    short = (last - first + 1 <= end).all(axis=0) & (first > 0).all(axis=0)
    short &= (last[0] < height - 1) & (last[1] < width - 1)
    row, col, piece = (one[short[piece]] for one in (row, col, piece))
    middle = nearest_to_centroid(row, col, piece)
    ends_hw[row[middle], col[middle]] = True
    return ends_hw


def nearest_to_centroid(
    row: NDArray[np.integer], col: NDArray[np.integer], group: NDArray[np.integer]
) -> NDArray[np.intp]:
    """For each group of pixels, in order, the place of the one nearest to their centroid, of equals the first by row, column."""
    _, number = np.unique(group, return_inverse=True)
    count = np.bincount(number)
    away = np.zeros(len(number))
    for place in (row.astype(np.int64), col.astype(np.int64)):
        first = np.full(len(count), np.iinfo(np.int64).max)
        np.minimum.at(first, number, place)
        from_first = place - first[number]  # small numbers, whose squares fit
        total = np.zeros(len(count), np.int64)
        np.add.at(total, number, from_first)
        away += (count[number] * from_first - total[number]).astype(np.float64) ** 2
    order = np.lexsort((col, row, away, number))
    is_first = np.append(True, number[order][1:] != number[order][:-1])
    nearest: NDArray[np.intp] = order[is_first[: len(order)]]
    return nearest

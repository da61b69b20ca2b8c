"""Objects of a mask and of the truth, found window by window, joined across the windows' sides, and matched.

An object is a piece of one class that hangs together by the sides of pixels. A pair of objects matches at an IoU of 0.5
(SpaceNet: A. Van Etten, D. Lindenbaum, T. Bacastow, arXiv:1807.01232). Areas are those of the pixels at which the
class is known. An object of the mask that matches none and lies for more than its half where the class is not known does not
count; no object is too small to count. Nothing depends on how the scene was cut or in which order its parts are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from geoseg.pieces import connected, roots
from geoseg.raster.window import Window
from geoseg.train.codes import LabelCodes
from geoseg.train.metrics import known_classes

_NODATA = 255
Side = tuple[str, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """The objects of one class in a part of a scene: counts of those that end in it, and the pieces that may go on beyond.

    ``mask`` (piece, 2) are the pixels of a piece of the mask where the class is known and where it is not, ``truth`` (piece) those
    of a piece of the truth, ``common`` (pair, 3) the places of one of each and the pixels that they share. ``sides`` are the
    edges on whose other side nothing was looked at yet, by direction and corner: the pieces of the mask and of the truth along
    it (2, pixel), counted from 1, 0 for none. Memory follows these edges, not the area.
    """

    matched: int
    false: int
    missed: int
    mask: NDArray[np.int64]
    truth: NDArray[np.int64]
    common: NDArray[np.int64]
    sides: dict[Side, NDArray[np.int32]]

    @classmethod
    def none(cls) -> Self:
        """No objects."""
        nothing = np.zeros((0, 3), np.int64)
        return cls(0, 0, 0, nothing[:, :2], nothing[:, 0], nothing, {})

    @property
    def settled(self) -> tuple[int, int, int]:
        """Matched, false and missed objects that end in this part."""
        return self.matched, self.false, self.missed


def find_objects(
    mask_hw: NDArray[np.uint8],
    labels_hw: NDArray[np.uint8],
    codes: LabelCodes,
    value: int,
    *,
    window: Window,
    scene_shape: tuple[int, int],
) -> Objects:
    """The objects of the class ``value`` in one of the windows that tile a scene of ``scene_shape`` (row, col).

    ``mask_hw`` is a class or 255 for no data, ``labels_hw`` has the ``codes``; both are of the window.
    """
    known_hw = known_classes(codes)[:, value][labels_hw]
    ours_hw = connected(mask_hw == value)
    theirs_hw = connected((labels_hw == value) & (mask_hw != _NODATA))
    num_ours, num_theirs = int(ours_hw.max(initial=0)), int(theirs_hw.max(initial=0))
    areas = [np.bincount(ours_hw[where_hw], minlength=num_ours + 1)[1:] for where_hw in (known_hw, ~known_hw)]
    both_hw = (ours_hw > 0) & (theirs_hw > 0)
    ours, theirs = ours_hw[both_hw].astype(np.int64) - 1, theirs_hw[both_hw].astype(np.int64) - 1
    common = _summed(ours, theirs, np.ones(len(ours), np.int64), num_theirs)
    ids = np.stack([ours_hw, theirs_hw])
    sides = {
        ("above", window.row_off, window.col_off): ids[:, 0],
        ("above", window.row_end, window.col_off): ids[:, -1],
        ("left of", window.col_off, window.row_off): ids[:, :, 0],
        ("left of", window.col_end, window.row_off): ids[:, :, -1],
    }
    ends = {("above", 0), ("above", scene_shape[0]), ("left of", 0), ("left of", scene_shape[1])}
    found = Objects(
        matched=0,
        false=0,
        missed=0,
        mask=np.stack(areas, axis=1),
        truth=np.bincount(theirs_hw.ravel(), minlength=num_theirs + 1)[1:],
        common=common,
        sides={side: along.copy() for side, along in sides.items() if side[:2] not in ends},
    )
    return join_objects([found])


def join_objects(parts: Sequence[Objects], *, complete: bool = False) -> Objects:
    """Parts of a scene as one, each window in one of them; ``complete``: these are all, and every object ends here."""
    parts = [Objects.none(), *parts]
    before = np.cumsum([(0, 0), *((len(part.mask), len(part.truth)) for part in parts)], axis=0)
    sides, met = _sides(parts, before)
    mask, to_mask = _merged(np.concatenate([part.mask for part in parts]), *met[0])
    truth, to_truth = _merged(np.concatenate([part.truth for part in parts]), *met[1])
    common = np.concatenate([part.common + np.append(first, 0) for part, first in zip(parts, before, strict=False)])
    common = _summed(to_mask[common[:, 0]], to_truth[common[:, 1]], common[:, 2], len(truth))

    # What shares pixels is settled together, or not yet.
    goes_on = np.zeros(len(mask) + len(truth), np.bool_)
    if not complete:
        for along in sides.values():
            goes_on[to_mask[along[0][along[0] >= 0]]] = True
            goes_on[len(mask) + to_truth[along[1][along[1] >= 0]]] = True
    root = roots(len(goes_on), common[:, 0], common[:, 1] + len(mask))
    goes_on = np.isin(root, root[goes_on])
    mask_open, truth_open = np.split(goes_on, [len(mask)])
    pair_open = mask_open[common[:, 0]]
    settled = _match(mask, truth, common[~pair_open], ~mask_open, ~truth_open)

    # The numbers of the open pieces from 1; those along open sides are all open.
    mask_number, truth_number = np.cumsum(mask_open), np.cumsum(truth_open)
    numbers = [np.append(mask_number[to_mask], 0), np.append(truth_number[to_truth], 0)]
    open_pairs = common[pair_open]
    matched, false, missed = (sum(one) for one in zip(settled, *(part.settled for part in parts), strict=True))
    return Objects(
        matched=matched,
        false=false,
        missed=missed,
        mask=mask[mask_open],
        truth=truth[truth_open],
        common=np.stack(
            [mask_number[open_pairs[:, 0]] - 1, truth_number[open_pairs[:, 1]] - 1, open_pairs[:, 2]], axis=1
        ),
        sides={}
        if complete
        else {
            side: np.stack([number[places] for number, places in zip(numbers, along, strict=True)]).astype(np.int32)
            for side, along in sides.items()
        },
    )


def _sides(
    parts: Sequence[Objects], before: NDArray[np.int64]
) -> tuple[dict[Side, NDArray[np.int64]], list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """The sides that stay open, with places (from 0, -1 for none) among all pieces; and which of mask and truth meet."""
    sides: dict[Side, NDArray[np.int64]] = {}
    met: list[NDArray[np.int64]] = [np.zeros((2, 2, 0), np.int64)]
    for part, first in zip(parts, before, strict=False):
        for side, numbers in part.sides.items():
            places = np.where(numbers > 0, numbers - 1 + first[:, None], -1)
            if side in sides:
                met.append(np.stack([sides.pop(side), places]))
            else:
                sides[side] = places
    pairs = np.concatenate(met, axis=2)  # (this and that side, mask and truth, pixel)
    met_of: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for this, that in pairs.transpose(1, 0, 2):
        both = (this >= 0) & (that >= 0)
        met_of.append((this[both], that[both]))
    return sides, met_of


def _merged(
    pixels: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pixels of pieces put together where ``one`` meets ``other``, and the new place of each piece."""
    known, place = np.unique(roots(len(pixels), one, other), return_inverse=True)
    total = np.zeros((len(known), *pixels.shape[1:]), np.int64)
    np.add.at(total, place, pixels)
    return total, place


def _summed(
    ours: NDArray[np.int64], theirs: NDArray[np.int64], pixels: NDArray[np.int64], num_theirs: int
) -> NDArray[np.int64]:
    """Pairs (pair, 3), each once, with the sum of its pixels."""
    known, place = np.unique(ours * max(1, num_theirs) + theirs, return_inverse=True)
    total = np.zeros(len(known), np.int64)
    np.add.at(total, place, pixels)
    return np.stack([*np.divmod(known, max(1, num_theirs)), total], axis=1)


def _match(
    mask: NDArray[np.int64],
    truth: NDArray[np.int64],
    common: NDArray[np.int64],
    mask_ends: NDArray[np.bool_],
    truth_ends: NDArray[np.bool_],
) -> tuple[int, int, int]:
    """Matched, false and missed objects among those that end.

    Above an IoU of 0.5 an object has one partner at most. At 0.5 exactly it may be two halves that share one: then the one
    of which more is known is taken, so that it is no matter which was found first.
    """
    ours, theirs, both = common.T
    good = 3 * both >= mask[ours, 0] + truth[theirs]  # both / (ours + theirs - both) >= 1 / 2
    ours, theirs = ours[good], theirs[good]
    order = np.argsort(mask[ours, 1], kind="stable")
    ours, theirs = ours[order], theirs[order]
    first = np.unique(ours, return_index=True)[1]
    ours, theirs = ours[np.sort(first)], theirs[np.sort(first)]
    first = np.unique(theirs, return_index=True)[1]
    unmatched = mask_ends.copy()
    unmatched[ours[first]] = False
    false = int(np.count_nonzero(unmatched & (mask[:, 1] <= mask[:, 0])))
    return len(first), false, int(np.count_nonzero(truth_ends)) - len(first)

"""A mask and the labels of the same pixels in, counts that add up over windows and workers out; scores from the sums.

A class counts at a pixel where the mask has data and the label says whether the pixel is of that class: a label that is a
class says so of all, one that is a set of classes of those outside the set alone. Elsewhere the pixel does not exist for the
class, for its contours and distances neither; the same holds beyond the scene. Knows numpy alone.

Legend of axes: c classes, h rows, w columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from geoseg.train.codes import LabelCodes

BOUNDARY_PX = 3
RELAXED_PX = 3
HALO = max(BOUNDARY_PX, RELAXED_PX)
NUM_BINS = 15
_NODATA = 255
_STEPS = 254  # probabilities come in steps of 1/254, so that a bin holds 17 of the 255 steps
_COLUMNS = (
    "known", "tp", "fp", "fn", "boundary_tp", "boundary_fp", "boundary_fn", "near_truth", "near_mask",
    "object_tp", "object_fp", "object_fn",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Whole numbers that add up: ``a + b`` are the counts of both.

    ``pixels``: those that count for some class. ``table`` (class, column): ``known`` pixels that count for the class; ``tp``,
    ``fp`` and ``fn`` of them, and the same of its boundary bands and its objects; ``near_truth``, pixels of the mask at most 3
    pixels from one of the truth, and ``near_mask``, the reverse. ``bins`` (class, bin, 3): pixels whose probability of the
    class lies in the bin, the sum of these probabilities in steps of 1/254, and how many of the pixels are of the class.
    """

    pixels: int
    table: NDArray[np.int64]
    bins: NDArray[np.int64]

    @classmethod
    def zero(cls, num_classes: int) -> Self:
        """Counts of nothing."""
        return cls(0, np.zeros((num_classes, len(_COLUMNS)), np.int64), np.zeros((num_classes, NUM_BINS, 3), np.int64))

    def __add__(self, other: Counts) -> Self:
        return type(self)(self.pixels + other.pixels, self.table + other.table, self.bins + other.bins)

    def only(self, classes: Sequence[int]) -> Self:
        """The counts of some classes, 0 for the others.

        A source that labels no roads says of its buildings that they are no road: enough to count what is false, but nothing
        would be right.
        """
        kept = np.isin(np.arange(len(self.table)), classes)
        return type(self)(self.pixels, self.table * kept[:, None], self.bins * kept[:, None, None])

    def of(self, column: str) -> NDArray[np.int64]:
        """The counts (class) of a column by name."""
        return self.table[:, _COLUMNS.index(column)]

    def with_objects(self, objects: Sequence[tuple[int, int, int]]) -> Self:
        """The same with ``object_tp``, ``object_fp`` and ``object_fn`` of the classes from 1 on."""
        table = self.table.copy()
        table[1:, -3:] = objects
        return type(self)(self.pixels, table, self.bins)

    def to_vector(self) -> NDArray[np.int64]:
        """All counts one after the other, for a sum over workers."""
        return np.concatenate([[self.pixels], self.table.ravel(), self.bins.ravel()])

    @classmethod
    def from_vector(cls, vector: NDArray[Any]) -> Self:
        """The counts that ``to_vector`` laid out; of a float64 vector too, which holds them up to 2^53."""
        numbers = np.asarray(vector).astype(np.int64)
        num_classes = (len(numbers) - 1) // (len(_COLUMNS) + 3 * NUM_BINS)
        table, bins = np.split(numbers[1:], [num_classes * len(_COLUMNS)])
        return cls(int(numbers[0]), table.reshape(num_classes, -1), bins.reshape(num_classes, NUM_BINS, 3))

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON has them."""
        rows = zip(self.table.tolist(), self.bins.tolist(), strict=True)
        classes = [{**dict(zip(_COLUMNS, row, strict=True)), "bins": bins} for row, bins in rows]
        return {"pixels": self.pixels, "classes": classes}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """The counts that ``to_dict`` told."""
        table = [[one[column] for column in _COLUMNS] for one in told["classes"]]
        bins = [one["bins"] for one in told["classes"]]
        return cls(int(told["pixels"]), np.array(table, np.int64), np.array(bins, np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """The scores of one class, 0 to 1; NaN where there is nothing to divide by.

    ``boundary_iou``: Cheng et al. 2021, arXiv:2103.16562. ``relaxed_``: V. Mnih, "Machine Learning for Aerial Image Labeling",
    2013. ``object_``: objects matched at an IoU of 0.5, as SpaceNet has it. ``ece``: expected calibration error of the class's
    probability (the class-wise one of Kull et al. 2019, arXiv:1910.12656, for this class), which is not bent by labels that
    leave classes open.
    """

    iou: float
    precision: float
    recall: float
    f1: float
    boundary_iou: float
    relaxed_precision: float
    relaxed_recall: float
    relaxed_f1: float
    object_precision: float
    object_recall: float
    object_f1: float
    ece: float


def class_scores(counts: Counts) -> tuple[ClassScores, ...]:
    """The scores of each class."""
    return tuple(_scores(dict(zip(_COLUMNS, row.tolist(), strict=True)), bins) for row, bins in _rows(counts))


def mean_iou(sources: Iterable[Counts]) -> float:
    """The mean IoU over sources and those classes but the first (background) that mask or truth have; NaN without any."""
    each = [one.iou for counts in sources for one in class_scores(counts)[1:] if not math.isnan(one.iou)]
    return sum(each) / len(each) if each else math.nan


def reliability(bins: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean probability and share of the class in each of a class's bins (bin, 3); NaN in empty ones."""
    with np.errstate(invalid="ignore"):
        return bins[:, 1] / (bins[:, 0] * _STEPS), bins[:, 2] / bins[:, 0]


def known_classes(codes: LabelCodes) -> NDArray[np.bool_]:
    """Whether a label of a code (256, class) says if its pixel is of a class."""
    is_a_class = np.arange(256) < codes.num_classes
    return ~codes.possible | is_a_class[:, None]


def count_window(
    mask_hw: NDArray[np.uint8],
    labels_hw: NDArray[np.uint8],
    codes: LabelCodes,
    *,
    core: tuple[slice, slice],
    steps_chw: NDArray[np.uint8],
    quick: bool,
) -> Counts:
    """The counts of the pixels in ``core``, a part (rows, columns) of arrays that hold what lies around it too.

    ``mask_hw`` is a class or 255 for no data, ``labels_hw`` has the ``codes``, ``steps_chw`` the probabilities in steps of 1/254.
    The arrays reach ``HALO`` pixels beyond the core or to the scene's edge; then the counts of windows that tile a scene
    add up to those of the whole. ``quick`` leaves boundaries and distances out, and needs no more than the core.
    """
    reach = tuple(slice(max(0, one.start - HALO), one.stop + HALO) for one in core)
    inner = tuple(slice(one.start - wide.start, one.stop - wide.start) for one, wide in zip(core, reach, strict=True))
    mask_hw, labels_hw, steps_chw = mask_hw[reach], labels_hw[reach], steps_chw[(slice(None), *core)]
    known_chw = np.stack([table[labels_hw] for table in known_classes(codes).T.copy()]) & (mask_hw != _NODATA)
    columns: list[dict[str, int]] = []
    bins: list[NDArray[np.int64]] = []
    for value, known_hw in enumerate(known_chw):
        ours_hw, theirs_hw = known_hw & (mask_hw == value), known_hw & (labels_hw == value)
        told = {"known": _num(known_hw[inner])} | _overlap("", ours_hw[inner], theirs_hw[inner])
        if not quick:
            bands = [_inner_band(one_hw, known_hw)[inner] for one_hw in (ours_hw, theirs_hw)]
            told |= _overlap("boundary_", *bands)
            told["near_truth"] = _num((ours_hw & _within_disc(theirs_hw, RELAXED_PX))[inner])
            told["near_mask"] = _num((theirs_hw & _within_disc(ours_hw, RELAXED_PX))[inner])
        columns.append(told)
        bins.append(_bins(steps_chw[value], known_hw[inner], theirs_hw[inner]))
    table = np.array([[told.get(column, 0) for column in _COLUMNS] for told in columns], np.int64)
    return Counts(_num(known_chw.any(0)[inner]), table, np.stack(bins))


def _num(hw: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(hw))


def _overlap(prefix: str, ours_hw: NDArray[np.bool_], theirs_hw: NDArray[np.bool_]) -> dict[str, int]:
    both = _num(ours_hw & theirs_hw)
    return {f"{prefix}tp": both, f"{prefix}fp": _num(ours_hw) - both, f"{prefix}fn": _num(theirs_hw) - both}


def _bins(steps_hw: NDArray[np.uint8], known_hw: NDArray[np.bool_], theirs_hw: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pixels, their sum of steps and those of the class, by bin (bin, 3)."""
    seen, true = (np.bincount(steps_hw[one], minlength=_STEPS + 1) for one in (known_hw, theirs_hw))
    by_step = np.stack([seen, seen * np.arange(_STEPS + 1), true], axis=1)
    binned: NDArray[np.int64] = by_step.reshape(NUM_BINS, -1, 3).sum(1)
    return binned


def _inner_band(one_hw: NDArray[np.bool_], known_hw: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a region with a known pixel beside the region within ``BOUNDARY_PX`` steps to any of 8 neighbours.

    So do the authors of boundary IoU, who erode by a 3 x 3 square as often; they take 2 % of the image's diagonal for the
    distance and let the image's edge be a contour, and a scene without end has neither.
    """
    beside_hw = known_hw & ~one_hw
    return one_hw & _along_rows(_along_rows(beside_hw, BOUNDARY_PX).T, BOUNDARY_PX).T


def _within_disc(one_hw: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Where a pixel of the region is at most ``radius`` away, centre to centre."""
    near_hw = _along_rows(one_hw, radius)
    for step in range(1, min(radius, len(one_hw) - 1) + 1):
        wide_hw = _along_rows(one_hw, math.isqrt(radius**2 - step**2))
        near_hw[step:] |= wide_hw[:-step]
        near_hw[:-step] |= wide_hw[step:]
    return near_hw


def _along_rows(one_hw: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Where a pixel of the region is at most ``reach`` columns away."""
    near_hw = np.pad(one_hw, ((0, 0), (reach, reach)))
    width = 1
    while width < 2 * reach + 1:
        step = min(width, 2 * reach + 1 - width)
        near_hw = near_hw[:, :-step] | near_hw[:, step:]
        width += step
    return near_hw


def _rows(counts: Counts) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    return zip(counts.table, counts.bins, strict=True)


def _scores(told: Mapping[str, int], bins: NDArray[np.int64]) -> ClassScores:
    tp, fp, fn = told["tp"], told["fp"], told["fn"]
    relaxed = _ratio(told["near_truth"], tp + fp), _ratio(told["near_mask"], tp + fn)
    band = told["boundary_tp"]
    objects = told["object_tp"], told["object_fp"], told["object_fn"]
    predicted, seen = reliability(bins)
    return ClassScores(
        iou=_ratio(tp, tp + fp + fn),
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, tp + fn),
        f1=_ratio(2 * tp, 2 * tp + fp + fn),
        boundary_iou=_ratio(band, band + told["boundary_fp"] + told["boundary_fn"]),
        relaxed_precision=relaxed[0],
        relaxed_recall=relaxed[1],
        relaxed_f1=_ratio(2 * relaxed[0] * relaxed[1], relaxed[0] + relaxed[1]),
        object_precision=_ratio(objects[0], objects[0] + objects[1]),
        object_recall=_ratio(objects[0], objects[0] + objects[2]),
        object_f1=_ratio(2 * objects[0], 2 * objects[0] + objects[1] + objects[2]),
        ece=_ratio(float(np.nansum(bins[:, 0] * np.abs(predicted - seen))), int(bins[:, 0].sum())),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

"""Counts against brute force, over any cut, and scores against their papers' definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from shapely.geometry import box
from shapely.ops import unary_union

from geoseg.pieces import connected
from geoseg.raster.window import Window
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.metrics import (
    BOUNDARY_PX,
    HALO,
    NUM_BINS,
    RELAXED_PX,
    Counts,
    class_scores,
    count_window,
    known_classes,
    mean_iou,
    reliability,
)
from geoseg.train.objects import Objects, find_objects, join_objects

NODATA = 255
CODES = LabelCodes.for_sources(3, [(1,), (1, 2)])
BESIDE_BUILDINGS = CODES.background_of((1,))


def blobs(shape: tuple[int, int], values: list[int], seed: int, *, size: int = 4) -> NDArray[np.uint8]:
    """Random patches about ``size`` pixels wide."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array(values, np.uint8), (shape[0] // size + 2, shape[1] // size + 2))
    fine = coarse.repeat(size, 0).repeat(size, 1)
    row, col = rng.integers(size, size=2)
    fine = fine[row : row + shape[0], col : col + shape[1]].copy()
    speckled = rng.random(shape) < 0.03
    fine[speckled] = rng.choice(np.array(values, np.uint8), int(speckled.sum()))
    return fine


def drawn(shape: tuple[int, int] = (41, 53), seed: int = 0) -> tuple[NDArray[np.uint8], ...]:
    mask = blobs(shape, [0, 0, 1, 2], seed)
    labels = blobs(shape, [0, 0, 1, 1, 2], seed + 100)
    agree = blobs(shape, [0, 1, 1], seed + 200, size=11) == 1
    labels[agree] = mask[agree]
    unknown = blobs(shape, [0, 0, 0, 1, 2], seed + 300, size=7)
    labels[unknown == 1] = UNLABELLED
    labels[(unknown == 2) & (labels != 1)] = BESIDE_BUILDINGS
    mask[:5, :9] = NODATA
    steps = np.random.default_rng(seed).integers(0, 255, (3, *shape)).astype(np.uint8)
    return mask, labels, steps


def whole(shape: tuple[int, int]) -> tuple[slice, slice]:
    return slice(0, shape[0]), slice(0, shape[1])


def count(
    mask: NDArray[np.uint8], labels: NDArray[np.uint8], steps: NDArray[np.uint8], codes: LabelCodes = CODES
) -> Counts:
    return count_window(mask, labels, codes, core=whole(mask.shape), steps_chw=steps, quick=False)


def nearest(from_hw: NDArray[np.bool_], to_hw: NDArray[np.bool_], *, chessboard: bool) -> NDArray[np.float64]:
    """Distance of each pixel of one region to the nearest of another, each pair looked at."""
    distances = np.full(from_hw.shape, np.inf)
    there = np.argwhere(to_hw)
    for row, col in np.argwhere(from_hw):
        if len(there):
            apart = np.abs(there - (row, col))
            distances[row, col] = (apart.max(1) if chessboard else np.hypot(*apart.T)).min()
    return distances


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_brute_force(seed: int) -> None:
    mask, labels, steps = drawn(seed=seed)
    counts = count(mask, labels, steps)
    for value in range(3):
        known = (mask != NODATA) & ((labels < 3) | ((labels == BESIDE_BUILDINGS) & (value == 1)))
        ours, theirs = known & (mask == value), known & (labels == value)
        told = {
            "known": known,
            "tp": ours & theirs,
            "fp": ours & ~theirs,
            "fn": ~ours & theirs,
            "near_truth": ours & (nearest(ours, theirs, chessboard=False) <= RELAXED_PX),
            "near_mask": theirs & (nearest(theirs, ours, chessboard=False) <= RELAXED_PX),
        }
        bands = [one & (nearest(one, known & ~one, chessboard=True) <= BOUNDARY_PX) for one in (ours, theirs)]
        told |= {"boundary_tp": bands[0] & bands[1], "boundary_fp": bands[0] & ~bands[1]}
        told |= {"boundary_fn": ~bands[0] & bands[1]}
        assert {name: counts.of(name)[value] for name in told} == {name: one.sum() for name, one in told.items()}
        assert all(one.any() for one in told.values())
        edges = np.linspace(0, 255, NUM_BINS + 1)
        for place, (low, high) in enumerate(itertools.pairwise(edges)):
            in_bin = known & (steps[value] >= low) & (steps[value] < high)
            expected = [in_bin.sum(), steps[value][in_bin].sum(dtype=int), (in_bin & theirs).sum()]
            assert counts.bins[value, place].tolist() == expected
    assert counts.pixels == ((mask != NODATA) & (labels != UNLABELLED)).sum()


def tiles(shape: tuple[int, int], size: int) -> list[Window]:
    rows, cols = range(0, shape[0], size), range(0, shape[1], size)
    return [Window(c, r, min(size, shape[1] - c), min(size, shape[0] - r)) for r in rows for c in cols]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("size", [2, 7, 16])
def test_windows_add_up_to_the_whole(size: int, quick: bool) -> None:
    mask, labels, steps = drawn()
    total = Counts.zero(3)
    for window in tiles(mask.shape, size):
        top, left = max(0, window.row_off - HALO), max(0, window.col_off - HALO)
        around = slice(top, window.row_end + HALO), slice(left, window.col_end + HALO)
        core = slice(window.row_off - top, window.row_end - top), slice(window.col_off - left, window.col_end - left)
        steps_chw = steps[(slice(None), *around)]
        total += count_window(mask[around], labels[around], CODES, core=core, steps_chw=steps_chw, quick=quick)
    expected = count_window(mask, labels, CODES, core=whole(mask.shape), steps_chw=steps, quick=quick)
    assert total.to_dict() == expected.to_dict()


def test_what_is_known_of_a_class_is_what_a_label_says() -> None:
    known = known_classes(CODES)
    assert known[:3].all()
    assert known[BESIDE_BUILDINGS].tolist() == [False, True, False]
    assert not known[UNLABELLED].any()
    assert not known[100].any()


def test_what_is_not_known_moves_no_count() -> None:
    mask, labels, steps = drawn()
    other, unknown = mask.copy(), (labels == UNLABELLED) & (mask != NODATA)
    other[unknown] = (mask[unknown] + 1) % 3
    assert count(mask, labels, steps).to_dict() == count(other, labels, steps).to_dict()
    beside = (labels == BESIDE_BUILDINGS) & (mask != NODATA) & (mask != 1)
    other[beside] = 2 - mask[beside]  # a road for background beside buildings
    assert count(mask, labels, steps).to_dict() == count(other, labels, steps).to_dict()
    assert unknown.any()
    assert beside.any()


def test_counts_come_back_from_a_vector_and_from_json() -> None:
    counts = count(*drawn()).with_objects([(1, 2, 3), (4, 5, 6)])
    for back in (
        Counts.from_vector(counts.to_vector()),
        Counts.from_vector(counts.to_vector().astype(np.float64)),
        Counts.from_dict(counts.to_dict()),
    ):
        assert back.to_dict() == counts.to_dict()
    assert_array_equal((counts + counts).to_vector(), 2 * counts.to_vector())
    assert (counts + Counts.zero(3)).to_dict() == counts.to_dict()


def test_scores_are_those_of_the_papers_on_shapes_whose_areas_are_known() -> None:
    """Two squares of 20 pixels, 4 apart: areas by hand, and the band of the boundary as shapely has it."""
    labels, mask = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    labels[10:30, 10:30] = mask[10:30, 14:34] = 1
    one = class_scores(count(mask, labels, np.zeros((2, 40, 40), np.uint8), LabelCodes(2)))[1]
    assert one.iou == 320 / 480
    assert one.precision == one.recall == one.f1 == 320 / 400
    assert one.relaxed_precision == one.relaxed_recall == 380 / 400
    rings = [
        (square := box(left, 10, left + 20, 30)).difference(square.buffer(-BOUNDARY_PX, join_style="mitre"))
        for left in (10, 14)
    ]
    assert_allclose(one.boundary_iou, rings[0].intersection(rings[1]).area / unary_union(rings).area, rtol=1e-12)


def test_the_mean_is_over_sources_and_classes_but_background() -> None:
    labels, mask = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    labels[10:30, 10:30] = mask[10:30, 14:34] = 1
    both, chances = LabelCodes(3), np.zeros((3, 40, 40), np.uint8)
    one, other = count(mask, labels, chances, both), count(labels, labels, chances, both)
    assert mean_iou([one]) == 320 / 480
    assert mean_iou([one, other]) == (320 / 480 + 1) / 2


def test_scores_of_nothing_are_not_numbers() -> None:
    scores = class_scores(Counts.zero(2))
    assert math.isnan(scores[1].iou)
    assert math.isnan(scores[1].object_f1)
    assert math.isnan(scores[1].ece)
    assert math.isnan(mean_iou([Counts.zero(2)]))


def test_a_calibrated_network_has_no_calibration_error_and_a_sure_one_errs_by_what_it_is_wrong() -> None:
    rng = np.random.default_rng(0)
    shape = (400, 500)
    steps = rng.integers(0, 255, shape).astype(np.uint8)
    labels = (rng.random(shape) < steps / 254).astype(np.uint8)
    both = np.stack([254 - steps, steps])
    counts = count((steps > 127).astype(np.uint8), labels, both, LabelCodes(2))
    assert class_scores(counts)[1].ece < 0.01
    predicted, seen = reliability(counts.bins[1])
    assert_allclose(predicted, seen, atol=0.03)
    sure = np.where(both > 127, 254, 0).astype(np.uint8)
    wrong = np.abs((sure[1] > 0) - labels.astype(float))
    high = sure[1] > 0
    expected = abs(high.mean() * wrong[high].mean()) + abs((~high).mean() * wrong[~high].mean())
    found = class_scores(count((steps > 127).astype(np.uint8), labels, sure, LabelCodes(2)))[1].ece
    assert found == pytest.approx(expected)
    assert found > 0.2


def objects_by_hand(mask: NDArray[np.uint8], labels: NDArray[np.uint8], value: int) -> tuple[int, int, int]:
    """Matched, false and missed objects; each pair is looked at."""
    known = (labels < 3) | ((labels == BESIDE_BUILDINGS) & (value == 1))
    ours, theirs = connected(mask == value), connected((labels == value) & (mask != NODATA))
    good = []
    for one in range(1, ours.max() + 1):
        for other in range(1, theirs.max() + 1):
            mine, yours = (ours == one) & known, theirs == other
            iou = (mine & yours).sum() / (mine | yours).sum()
            if iou >= 0.5:
                good.append((-iou, ((ours == one) & ~known).sum(), one, other))
    matched: dict[int, int] = {}
    for _, _, one, other in sorted(good):
        if one not in matched and other not in matched.values():
            matched[one] = other
    left = [ours == one for one in range(1, ours.max() + 1) if one not in matched]
    false = sum((one & known).sum() >= (one & ~known).sum() for one in left)
    return len(matched), int(false), int(theirs.max()) - len(matched)


def found_in_windows(
    mask: NDArray[np.uint8], labels: NDArray[np.uint8], value: int, size: int, *, group: int = 1, seed: int = 0
) -> Objects:
    windows = tiles(mask.shape, size)
    np.random.default_rng(seed).shuffle(windows)  # type: ignore[arg-type]
    parts = []
    for w in windows:
        own = slice(w.row_off, w.row_end), slice(w.col_off, w.col_end)
        parts.append(find_objects(mask[own], labels[own], CODES, value, window=w, scene_shape=mask.shape))
    joined = [join_objects(parts[start : start + group]) for start in range(0, len(parts), group)]
    return join_objects(joined, complete=True)


@pytest.mark.parametrize("seed", range(4))
def test_objects_are_matched_as_by_hand_however_the_scene_is_cut(seed: int) -> None:
    mask, labels, _ = drawn((60, 73), seed)
    for value in (1, 2):
        expected = objects_by_hand(mask, labels, value)
        assert min(expected) > 0
        for size, group in ((100, 1), (7, 1), (16, 1), (7, 5), (16, 3)):
            found = found_in_windows(mask, labels, value, size, group=group, seed=size)
            assert found.settled == expected, (size, group)
            assert len(found.mask) == len(found.truth) == len(found.common) == len(found.sides) == 0


def test_objects_end_where_a_window_holds_nothing() -> None:
    mask, labels, _ = drawn((60, 73))
    empty = slice(16, 32), slice(32, 48)
    mask[empty] = NODATA
    parts = [
        find_objects(mask[rows, cols], labels[rows, cols], CODES, 1, window=window, scene_shape=mask.shape)
        for window in tiles(mask.shape, 16)
        for rows, cols in [(slice(window.row_off, window.row_end), slice(window.col_off, window.col_end))]
        if (rows, cols) != empty
    ]
    assert join_objects(parts, complete=True).settled == objects_by_hand(mask, labels, 1)
    assert sum(join_objects(parts).settled) < sum(objects_by_hand(mask, labels, 1))


def test_two_halves_of_an_object_match_it_once() -> None:
    mask, labels = np.zeros((8, 9), np.uint8), np.zeros((8, 9), np.uint8)
    labels[2:4, 1:8] = 1
    mask[2, 1:8] = 1  # one half, IoU 1/2 to the digit
    assert found_in_windows(mask, labels, 1, 4).settled == (1, 0, 0)
    mask[4:6, 2:4] = 1
    mask[5, 3] = 0
    labels[2:4, 1:8], labels[2, 1:8] = 0, 1
    mask[2, 4], labels[3, 4] = 0, 0  # two pieces of three pixels for one object of seven: neither is half of it
    assert found_in_windows(mask, labels, 1, 4).settled == (0, 3, 1)


def test_an_object_that_lies_mostly_on_unknown_ground_does_not_count() -> None:
    labels, mask = np.full((12, 12), UNLABELLED, np.uint8), np.zeros((12, 12), np.uint8)
    labels[:, :6] = BESIDE_BUILDINGS
    mask[2:5, 4:10] = 1  # a third of it where there is no building, the others unknown
    mask[7:9, 3:8] = 1  # three fifths where there is none
    assert found_in_windows(mask, labels, 1, 5).settled == (0, 1, 0)
    labels[2:5, 4:6] = 1  # what is known of the first is all building
    assert found_in_windows(mask, labels, 1, 5).settled == (1, 1, 0)


def test_what_is_kept_open_follows_the_sides_and_not_the_area() -> None:
    mask, labels, _ = drawn((120, 120))
    parts = [
        find_objects(
            mask[r : r + 40, :], labels[r : r + 40, :], CODES, 1, window=Window(0, r, 120, 40), scene_shape=(120, 120)
        )
        for r in (0, 40)
    ]
    joined = join_objects(parts)
    assert [len(part.sides) for part in (*parts, joined)] == [1, 2, 1]
    assert 0 < len(joined.mask) < sum(len(part.mask) for part in parts)
    assert sum(joined.settled) > sum(sum(part.settled) for part in parts)

"""Resampling: weights are shares of ground, invalid pixels have no say, and a window holds what the whole holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.scenes import noise
from numpy.testing import assert_allclose, assert_array_equal

from geoseg.raster.resample import Axis, mirrored, resample

SIZES = st.integers(1, 200)
DTYPES = ["uint8", "uint16", "int16", "float32"]


@st.composite
def axes_and_span(draw: st.DrawFn) -> tuple[Axis, int, int]:
    axis = Axis(draw(SIZES), draw(SIZES))
    start = draw(st.integers(0, axis.num_out - 1))
    return axis, start, draw(st.integers(start + 1, axis.num_out))


@settings(deadline=None)
@given(axes_and_span())
def test_weights_sum_to_one_and_none_is_negative(case: tuple[Axis, int, int]) -> None:
    axis, start, end = case
    index, weight = axis.taps(start, end)
    assert index.shape == weight.shape == (len(index), end - start)
    assert_allclose(weight.sum(0), 1, atol=1e-6)
    assert weight.min() >= 0
    assert index.min() >= 0
    assert index.max() < axis.num_in


@settings(deadline=None)
@given(axes_and_span())
def test_the_taps_of_a_span_are_those_of_the_whole(case: tuple[Axis, int, int]) -> None:
    axis, start, end = case
    index, weight = axis.taps(start, end)
    whole_index, whole_weight = axis.taps(0, axis.num_out)
    assert_array_equal(index, whole_index[:, start:end])
    assert_array_equal(weight, whole_weight[:, start:end])
    low, high = axis.span(start, end)
    assert low <= index[weight > 0].min()
    assert index[weight > 0].max() < high


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_going_down_each_source_pixel_counts_for_its_own_area(num_in: int, num_out: int) -> None:
    """Over all output pixels every source pixel weighs num_out / num_in: nothing is skipped or counted twice."""
    if num_in < num_out:
        num_in, num_out = num_out, num_in
    index, weight = Axis(num_in, num_out).taps(0, num_out)
    total = np.zeros(num_in)
    np.add.at(total, index, weight)
    assert_allclose(total, num_out / num_in, atol=1e-5)


@settings(deadline=None)
@given(SIZES, SIZES)
def test_positions_are_kept(num_in: int, num_out: int) -> None:
    """A ramp stays a ramp: the mean position of a pixel's taps is its own centre, but for the repeated ends."""
    axis = Axis(num_in, num_out)
    index, weight = axis.taps(0, num_out)
    centre = ((index + 0.5) * weight).sum(0)
    want = (np.arange(num_out) + 0.5) * axis.scale
    inside = (want >= 0.5) & (want <= num_in - 0.5)
    # Going down the taps are whole pixels, cut at the borders of the one they make: half a source pixel at most.
    assert_allclose(centre[inside], want[inside], atol=0.5 if num_in > num_out else 1e-4)


@pytest.mark.parametrize(("num_in", "num_out"), [(12, 4), (12, 6), (8, 8)])
def test_whole_factors_are_plain_means(num_in: int, num_out: int) -> None:
    pixels = noise(1, 1, num_in, dtype="float32")
    valid = np.ones((1, num_in), np.bool_)
    found, _ = resample(pixels, valid, Axis(1, 1), Axis(num_in, num_out), (0, 1, 0, num_out), (0, 0))
    assert_allclose(found[0, 0], pixels[0, 0].reshape(num_out, -1).mean(1), rtol=1e-6)


def resampled(
    pixels: npt.NDArray[Any], valid: npt.NDArray[np.bool_], axes: tuple[Axis, Axis], box: tuple[int, int, int, int]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Resample a box from no more of the source than the box is made of."""
    row_start, row_end = axes[0].span(box[0], box[1])
    col_start, col_end = axes[1].span(box[2], box[3])
    part = (slice(row_start, row_end), slice(col_start, col_end))
    return resample(pixels[(slice(None), *part)], valid[part], *axes, box, (row_start, col_start))


@settings(deadline=None, max_examples=150)
@given(
    axes_and_span(), axes_and_span(), st.sampled_from(DTYPES), st.floats(0, 1), st.integers(1, 3), st.integers(0, 99)
)
def test_a_window_holds_bit_for_bit_what_the_whole_holds(
    rows: tuple[Axis, int, int], cols: tuple[Axis, int, int], dtype: str, share: float, num_bands: int, seed: int
) -> None:
    axes = (rows[0], cols[0])
    pixels = noise(num_bands, axes[0].num_in, axes[1].num_in, dtype=dtype, seed=seed)
    valid = np.random.default_rng(seed).uniform(size=pixels.shape[1:]) < share
    if dtype == "float32":
        pixels[:, ~valid] = np.nan
    box = (rows[1], rows[2], cols[1], cols[2])
    found, found_valid = resampled(pixels, valid, axes, box)
    whole, whole_valid = resampled(pixels, valid, axes, (0, axes[0].num_out, 0, axes[1].num_out))
    assert found.dtype == pixels.dtype
    assert found.tobytes() == np.ascontiguousarray(whole[:, box[0] : box[1], box[2] : box[3]]).tobytes()
    assert_array_equal(found_valid, whole_valid[box[0] : box[1], box[2] : box[3]])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES))
def test_what_is_invalid_has_no_say(height: int, width: int, rows: int, cols: int, dtype: str) -> None:
    """Whatever invalid pixels hold (NaN, the largest number), the result is the same, finite, and 0 where invalid."""
    pixels = noise(2, height, width, dtype=dtype)
    valid = np.random.default_rng(0).uniform(size=(height, width)) < 0.6
    axes = (Axis(height, rows), Axis(width, cols))
    box = (0, rows, 0, cols)
    outcomes = []
    for marker in (0, np.nan if dtype == "float32" else np.iinfo(dtype).max):
        marked = pixels.copy()
        marked[:, ~valid] = marker
        outcomes.append(resampled(marked, valid, axes, box))
    (first, first_valid), (second, second_valid) = outcomes
    assert_array_equal(first, second)
    assert_array_equal(first_valid, second_valid)
    assert np.isfinite(second).all()
    assert (second[:, ~second_valid] == 0).all()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_flat_scene_stays_flat(height: int, width: int, rows: int, cols: int) -> None:
    pixels = np.full((1, height, width), 201, np.uint8)
    valid = np.random.default_rng(1).uniform(size=(height, width)) < 0.7
    found, found_valid = resampled(pixels, valid, (Axis(height, rows), Axis(width, cols)), (0, rows, 0, cols))
    assert (found[0][found_valid] == 201).all()


def test_a_pixel_is_valid_when_half_of_it_is() -> None:
    pixels = np.full((1, 1, 8), 100, np.uint8)
    valid = np.array([[True, True, True, False, True, False, False, False]])
    found, found_valid = resample(pixels, valid, Axis(1, 1), Axis(8, 4), (0, 1, 0, 4), (0, 0))
    assert found_valid.tolist() == [[True, True, True, False]]
    assert found.tolist() == [[[100, 100, 100, 0]]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_whole_numbers_are_rounded_and_never_wrap(dtype: str) -> None:
    limits = np.iinfo(dtype)
    pixels = np.array([[[limits.max, limits.max, limits.min, limits.min, 0, 1, 1, 2]]], dtype)
    valid = np.ones((1, 8), np.bool_)
    found, _ = resample(pixels, valid, Axis(1, 1), Axis(8, 4), (0, 1, 0, 4), (0, 0))
    assert found[0, 0].tolist() == [limits.max, limits.min, 0, 2], "0.5 and 1.5 go to the even neighbour"


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 100))
def test_mirroring_is_that_of_numpy(size: int, before: int, after: int) -> None:
    """Also with margins larger than the image, where it is mirrored again and again."""
    want = np.pad(np.arange(size), (before, after), mode="reflect" if size > 1 else "edge")
    assert_array_equal(mirrored(-before, size + after, size), want)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(-100, 100), st.integers(1, 50))
def test_a_mirrored_span_is_a_piece_of_the_mirrored_whole(size: int, start: int, length: int) -> None:
    whole = mirrored(-100, 200, size)
    assert_array_equal(mirrored(start, start + length, size), whole[start + 100 : start + length + 100])

"""Border weights against the paper's formula over all pixels, and what they are made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from geoseg.errors import ConfigError
from geoseg.pieces import connected
from geoseg.train.border import balanced, border_weights, cut_touching
from geoseg.train.codes import UNLABELLED


def random_chip(seed: int, shape: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Labels of three classes with some unlabelled, and up to 8 instances, in one or several parts, with large ids."""
    rng = np.random.default_rng(seed)
    instances = np.zeros(shape, np.int32)
    for _ in range(rng.integers(9)):
        row, col = rng.integers(shape[0]), rng.integers(shape[1])
        height, width = rng.integers(1, 8, 2)
        instances[row : row + height, col : col + width] = rng.integers(1, 6) * 400_000_003
    labels = np.where(instances > 0, 1, rng.choice([0, 2], shape)).astype(np.uint8)
    labels[rng.random(shape) < 0.1] = UNLABELLED
    return labels, instances


def by_the_formula(
    labels: NDArray[np.uint8], instances: NDArray[np.int32], w0: float, sigma: float
) -> NDArray[np.float64]:
    """The distance of every pixel to every pixel of every instance."""
    rows, cols = np.indices(labels.shape)
    each = []
    for one in np.unique(instances[instances > 0]):
        to_rows, to_cols = np.nonzero(instances == one)
        each.append(np.hypot(rows[..., None] - to_rows, cols[..., None] - to_cols).min(-1))
    weights = (labels != UNLABELLED).astype(np.float64)
    if len(each) > 1:
        first, second = np.sort(np.stack(each), axis=0)[:2]
        border = w0 * np.exp(-((first + second) ** 2) / (2 * sigma**2))
        weights += border * (border >= 1e-3) * (instances == 0) * (labels != UNLABELLED)
    return weights


@pytest.mark.parametrize("sigma", [0.7, 2.0, 5.0, 40.0, 58.0])
@pytest.mark.parametrize("seed", range(12))
def test_border_weights_are_the_formula_of_the_paper(seed: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    labels, instances = random_chip(seed, (int(rng.integers(1, 40)), int(rng.integers(1, 40))))
    w0 = float(rng.choice([10.0, 3.0]))
    weights = border_weights(labels, instances, w0=w0, sigma=sigma)
    assert weights.dtype == np.float32
    assert_allclose(weights, by_the_formula(labels, instances, w0, sigma), atol=2e-6 * w0)


def test_border_weights_by_hand() -> None:
    """A gap of 3 pixels: distances 1 + 3 and 2 + 2 both add up to 4."""
    instances = np.array([[7, 0, 0, 0, 9]])
    weights = border_weights((instances > 0).astype(np.uint8), instances)
    between = 1 + 10 * np.exp(-(4**2) / 50)
    assert_allclose(weights, [[1, between, between, between, 1]], rtol=1e-6)


def test_the_furthest_instance_that_counts_counts() -> None:
    """Distances of 1 and 20.1 pixels, of 21.5 together; the sum of 22 at the next row is left out."""
    instances = np.zeros((23, 3), np.int32)
    instances[0, 0], instances[21, 2], instances[22, 0] = 1, 2, 2
    weights = border_weights(np.zeros_like(instances, np.uint8), instances)
    assert weights[1, 0] == pytest.approx(1 + 10 * np.exp(-((1 + np.hypot(20, 2)) ** 2) / 50), rel=1e-6)
    instances[21, 2] = 0
    assert border_weights(np.zeros_like(instances, np.uint8), instances)[1, 0] == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint32])
def test_ids_may_be_of_any_dtype(dtype: type[np.integer]) -> None:
    instances = np.array([[255, 0, 0, 0, 9]], dtype)
    assert border_weights(np.zeros((1, 5), np.uint8), instances).argmax() == 1


def test_the_weights_turn_with_the_chip() -> None:
    labels, instances = random_chip(7, (31, 23))
    weights = border_weights(labels, instances)
    assert weights.max() > 2
    for turns in (1, 2, 3):
        assert_array_equal(
            border_weights(np.rot90(labels, turns), np.rot90(instances, turns)), np.rot90(weights, turns)
        )
    assert_array_equal(border_weights(labels[:, ::-1], instances[:, ::-1]), weights[:, ::-1])


def test_the_numbers_of_instances_do_not_matter() -> None:
    labels, instances = random_chip(7, (31, 23))
    _, small = np.unique(instances, return_inverse=True)
    renumbered = np.array([0, 4, 1, 5, 3, 2])[small.reshape(instances.shape)]
    assert_array_equal(border_weights(labels, renumbered), border_weights(labels, instances))


def test_border_weights_add_to_the_weights_of_classes() -> None:
    labels, instances = random_chip(7, (31, 23))
    table = np.array([0.5, 3.0, 1.0] + [0.0] * 253)
    assert_allclose(
        border_weights(labels, instances, class_weights=(0.5, 3.0, 1.0)) - table[labels],
        border_weights(labels, instances) - (labels != UNLABELLED),
        atol=1e-5,
    )
    assert_array_equal(border_weights(labels, instances, w0=0), labels != UNLABELLED)


def test_balanced_classes_have_one_sum() -> None:
    counts = (900, 90, 0, 10)
    weights = balanced(counts)
    assert weights[2] == 0
    assert_allclose(np.multiply(weights, counts), [1000 / 3, 1000 / 3, 0, 1000 / 3])
    assert balanced((0, 0)) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"sigma": 0.0}, "sigma above 0"),
        ({"w0": -1.0}, "w0 of 0 or more"),
        ({"class_weights": (1.0, -1.0)}, "0 or more"),
        ({"class_weights": (1.0,)}, "1 class weights, the labels go up to 1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], sentence: str) -> None:
    labels = np.array([[0, 1, UNLABELLED]], np.uint8)
    with pytest.raises(ConfigError, match=sentence):
        border_weights(labels, labels == 1, **wrong)
    with pytest.raises(ValueError, match="one shape"):
        border_weights(labels, labels[:, 1:])


def flooded(inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Pieces numbered in the order of their first pixel, by spreading from it."""
    found = np.zeros(inside.shape, np.int32)
    for start in np.argwhere(inside):
        if found[tuple(start)]:
            continue
        number, ahead = found.max() + 1, [tuple(start)]
        while ahead:
            row, col = ahead.pop()
            if 0 <= row < inside.shape[0] and 0 <= col < inside.shape[1] and inside[row, col] and not found[row, col]:
                found[row, col] = number
                ahead += [(row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)]
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 24), st.integers(1, 24), st.floats(0, 1))
def test_connected_pieces_are_those_of_a_flood(seed: int, height: int, width: int, share: float) -> None:
    inside = np.random.default_rng(seed).random((height, width)) < share
    assert_array_equal(connected(inside), flooded(inside))


def test_a_spiral_is_one_piece() -> None:
    """Each turn meets its neighbours in runs that hang together only at the far end."""
    inside = np.zeros((41, 41), np.bool_)
    for ring in range(0, 20, 2):
        inside[ring, ring : 41 - ring] = True
        inside[ring : 41 - ring, 40 - ring] = True
        inside[40 - ring, ring : 41 - ring] = True
        inside[ring + 2 : 41 - ring, ring] = True
        inside[ring + 2, ring : ring + 2] = True
    assert connected(inside).max() == flooded(inside).max() == 1


def test_touching_instances_are_cut_apart_and_no_others_changed() -> None:
    instances = np.zeros((6, 9), np.int32)
    instances[:3, :3], instances[:3, 3:6], instances[3:, 6:] = 4, 2, 9  # side by side, corner to corner
    labels = (instances > 0).astype(np.uint8)
    labels[0, 8] = 2
    labels[1, 2] = UNLABELLED
    expected = labels.copy()
    expected[[0, 2], 2] = expected[:3, 3] = expected[2, 5] = expected[3, 6] = 0
    cut_labels, cut_instances = cut_touching(labels, instances)
    assert_array_equal(cut_labels, expected)
    expected_instances = np.where(expected != 0, instances, 0)
    expected_instances[1, 2] = 0
    assert_array_equal(cut_instances, expected_instances)
    assert_array_equal(cut_touching(labels[:, ::-1], instances[:, ::-1])[0], expected[:, ::-1])
    alone = np.where(instances == 4, 4, 0).astype(np.int32)
    assert_array_equal(cut_touching(labels, alone), (labels, alone))


def test_the_cut_has_the_greatest_weight() -> None:
    instances = np.repeat([[1, 1, 1, 2, 2, 2]], 9, axis=0).astype(np.int32)
    weights = border_weights(*cut_touching(np.ones_like(instances, np.uint8), instances))
    assert_allclose(
        weights, np.repeat([[1, 1, 1 + 10 * np.exp(-9 / 50)] * 2], 9, axis=0)[:, [0, 1, 2, 2, 1, 0]], rtol=1e-6
    )


def test_after_the_cut_each_piece_is_of_one_instance() -> None:
    rng = np.random.default_rng(3)
    instances = np.kron(rng.integers(0, 4, (8, 8)), np.ones((5, 5), np.int32))
    labels, left = cut_touching((instances > 0).astype(np.uint8), instances)
    assert_array_equal(labels == 1, left > 0)
    pieces = connected(labels == 1)
    for piece in range(1, pieces.max() + 1):
        assert len(np.unique(instances[pieces == piece])) == 1

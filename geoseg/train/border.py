"""From labels and building instances to weights that make a network keep neighbours apart (U-Net, 2015).

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
arXiv:1505.04597, section 3. An instance raster holds a number above 0 for each building and 0 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geoseg.errors import ConfigError
from geoseg.train.codes import UNLABELLED

NEGLIGIBLE = 1e-3
_ID_BITS = 15
_ID_MASK = (1 << _ID_BITS) - 1


def border_weights(
    labels_hw: NDArray[np.integer],
    instances_hw: NDArray[np.integer],
    *,
    class_weights: Sequence[float] | None = None,
    w0: float = 10.0,
    sigma: float = 5.0,
) -> NDArray[np.float32]:
    """The weight of each pixel, float32 (row, col): ``w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))`` (equation 2).

    ``d1`` and ``d2`` are the distances, in pixels between centres, to the nearest pixel of the nearest and of the second
    nearest instance; ``w_c`` is the class's weight, 1 without ``class_weights`` (see ``balanced``). The second term is that
    of ground, which may be of any class; pixels of an instance have ``w_c`` alone, unlabelled ones 0.

    Distances are exact. Where the second term is below 0.001 it is left out, so ``d1 + d2`` counts up to
    ``sigma sqrt(2 ln(1000 w0))`` (21.5 px with the paper's values), and an instance that lies beyond the chip does not count.
    Raises ConfigError.
    """
    if labels_hw.shape != instances_hw.shape:
        raise ValueError(f"labels and instances must be of one shape, got {labels_hw.shape} and {instances_hw.shape}")
    if not (0 <= w0 < math.inf and 0 < sigma < math.inf):
        raise ConfigError(f"border weights need a w0 of 0 or more and a sigma above 0, got {w0} and {sigma}")
    weights_hw = _class_weights(labels_hw, class_weights)
    if w0 > NEGLIGIBLE:
        reach = sigma * math.sqrt(2 * math.log(w0 / NEGLIGIBLE))
        ground_hw = (instances_hw == 0) & (labels_hw != UNLABELLED)
        pixels, distance = _between(instances_hw, ground_hw, reach)
        weights_hw.flat[pixels] += w0 * np.exp(-0.5 * (distance / sigma) ** 2)
    return weights_hw


def balanced(counts: Sequence[int]) -> tuple[float, ...]:
    """Class weights that give each class that occurs the same sum of weights, and pixels a mean weight of 1.

    ``counts`` are the pixels of each class in all the training data; a class without any gets 0.
    """
    num_present = sum(count > 0 for count in counts)
    return tuple(sum(counts) / (num_present * count) if count else 0.0 for count in counts)


def cut_touching(
    labels_hw: NDArray[np.uint8], instances_hw: NDArray[np.int32], *, background: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Labels and instances with ground where instances touch: at each pixel of one with another among its 8 neighbours.

    Both sides give way, so the cut is 2 pixels wide and does not depend on the numbers of the instances (the paper's "small
    separation borders that we introduce between touching cells"). In the labels it has the class ``background``; unlabelled
    pixels stay so.
    """
    touching_hw = np.zeros(instances_hw.shape, np.bool_)
    height, width = instances_hw.shape
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one = slice(0, height - down), slice(max(-right, 0), width - max(right, 0))
        other = slice(down, height), slice(max(right, 0), width - max(-right, 0))
        first, second = instances_hw[one], instances_hw[other]
        meet = (first != second) & (first != 0) & (second != 0)
        touching_hw[one] |= meet
        touching_hw[other] |= meet
    left_hw = np.where(touching_hw, np.int32(0), instances_hw)
    return np.where(touching_hw & (labels_hw != UNLABELLED), np.uint8(background), labels_hw), left_hw


def _class_weights(labels_hw: NDArray[np.integer], class_weights: Sequence[float] | None) -> NDArray[np.float32]:
    table = np.zeros(256, np.float32)
    table[:UNLABELLED] = 1.0
    if class_weights is not None:
        if not all(0 <= weight < math.inf for weight in class_weights):
            raise ConfigError(f"class weights are numbers of 0 or more, got {class_weights}")
        highest = int(labels_hw.max(initial=0, where=labels_hw != UNLABELLED))
        if highest >= len(class_weights):
            raise ConfigError(f"there are {len(class_weights)} class weights, the labels go up to {highest}")
        table[: len(class_weights)] = class_weights
    weights_hw: NDArray[np.float32] = table[labels_hw]
    return weights_hw


def _between(
    instances_hw: NDArray[np.integer], ground_hw: NDArray[np.bool_], reach: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Flat indices of ground pixels with ``d1 + d2`` up to ``reach``, and that sum.

    Row by row the two nearest instances, then up and down the best of them: one that is third in its row is not second
    over all. Up and down twice, for the nearest and its id, then for the nearest of another id; only where the square
    around a pixel holds two instances. Squares of distances are whole numbers, which lack no digit.
    """
    height, width = ground_hw.shape
    radius, half = int(reach), int(reach / 2)
    ids_hw = _small_ids(instances_hw)
    ground_hw = ground_hw & _two_within(ids_hw, radius)
    if not ground_hw.any():
        return np.zeros(0, np.intp), np.zeros(0)
    first_hw, second_hw = _two_nearest_in_rows(ids_hw, radius + 1)
    nothing = (radius + 1) ** 2  # in the rows above and below the chip
    first_hw = np.pad(first_hw, ((radius, radius), (0, 0)), constant_values=nothing << _ID_BITS)
    second_hw = np.pad(second_hw, ((radius, radius), (0, 0)), constant_values=nothing)

    nearest_hw = first_hw[radius : radius + height].copy()
    for step in range(1, half + 1):
        above, below = (first_hw[radius + move : radius + move + height] for move in (-step, step))
        moved_hw = np.minimum(above, below)
        moved_hw += step**2 << _ID_BITS
        np.minimum(nearest_hw, moved_hw, out=nearest_hw)
    pixels = np.flatnonzero(ground_hw & (nearest_hw <= (int((reach / 2) ** 2) << _ID_BITS | _ID_MASK)))
    nearest = nearest_hw.ravel()[pixels]

    def moved(padded_hw: NDArray[Any], step: int) -> NDArray[Any]:
        return padded_hw.ravel()[(radius + step) * width :].take(pixels)

    nearest_id, nearest = nearest & _ID_MASK, nearest >> _ID_BITS
    second = np.full_like(nearest, nothing)
    done = []
    for step in range(radius + 1):
        for sign in (-1, 1) if step else (1,):
            first = moved(first_hw, sign * step)
            square = np.where((first & _ID_MASK) == nearest_id, moved(second_hw, sign * step), first >> _ID_BITS)
            np.minimum(second, square + step**2, out=second)
        if step % 3 == 2 or step == radius:
            # Rows further off are of use to few: the others have an instance nearer, or those would be beyond reach.
            on = (second > step**2) & (nearest <= (reach - step) ** 2)
            distance = np.sqrt(nearest[~on]) + np.sqrt(second[~on])
            near = distance <= reach
            done.append((pixels[~on][near], distance[near]))
            pixels, nearest, nearest_id, second = pixels[on], nearest[on], nearest_id[on], second[on]
    return np.concatenate([one for one, _ in done]), np.concatenate([one for _, one in done])


def _two_within(ids_hw: NDArray[np.uint16], radius: int) -> NDArray[np.bool_]:
    """Where the square from ``radius`` pixels before to as many behind holds two instances or more."""
    return _over_square(np.maximum, ids_hw, radius) > _over_square(np.minimum, ids_hw - 1, radius) + 1


def _over_square(lowest_or_highest: np.ufunc, values_hw: NDArray[np.uint16], radius: int) -> NDArray[np.uint16]:
    """The least or the greatest of a square; what lies beyond the chip is as the chip's edge."""
    values_hw = np.pad(values_hw, radius, mode="edge")
    for _ in range(2):
        width = 1
        while width < 2 * radius + 1:
            step = min(width, 2 * radius + 1 - width)
            values_hw = lowest_or_highest(values_hw[:-step], values_hw[step:])
            width += step
        values_hw = values_hw.T
    return values_hw


def _two_nearest_in_rows(ids_hw: NDArray[np.uint16], far: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The two nearest instances in a pixel's row: square of distance and id in one number, and square of distance.

    A distance is ``far`` at most, and that without id where there is none.
    """
    left, left_next = _up_to(ids_hw, far)
    right, right_next = (one[:, ::-1] for one in _up_to(ids_hw[:, ::-1], far))
    same = ((left ^ right) & _ID_MASK) == 0
    second = np.maximum(left, right) >> _ID_BITS
    second = np.minimum(np.where(same, far, second), np.minimum(left_next, right_next))
    first = np.minimum(left, right)
    return ((first >> _ID_BITS) ** 2 << _ID_BITS) | (first & _ID_MASK), second**2


def _up_to(ids_hw: NDArray[np.uint16], far: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Distance and id, in one number, of the last instance pixel up to each; distance of the last one of another id."""
    dtype = np.int32 if 2 * far**2 + ids_hw.shape[1] < 2 ** (31 - _ID_BITS) else np.int64
    cols = np.arange(far, far + ids_hw.shape[1], dtype=dtype)  # counted so that 0, for none, is far away
    ids_hw = ids_hw.astype(dtype)
    last_hw = _highest_so_far(((cols << _ID_BITS) | ids_hw) * (ids_hw > 0))
    before_hw = np.zeros_like(last_hw)
    before_hw[:, 1:] = last_hw[:, :-1]
    changed_hw = (ids_hw > 0) & ((before_hw & _ID_MASK) != ids_hw)
    other_hw = _highest_so_far(before_hw * changed_hw)
    distance_hw = np.minimum(cols - (last_hw >> _ID_BITS), far)
    return (distance_hw << _ID_BITS) | (last_hw & _ID_MASK), np.minimum(cols - (other_hw >> _ID_BITS), far)


def _highest_so_far(keys_hw: NDArray[Any]) -> NDArray[Any]:
    # Several times as fast as numpy's maximum.accumulate.
    highest_hw: NDArray[Any] = torch.cummax(torch.from_numpy(np.ascontiguousarray(keys_hw)), 1).values.numpy()
    return highest_hw


def _small_ids(instances_hw: NDArray[np.integer]) -> NDArray[np.uint16]:
    """The same instances, numbered from 1 without gaps."""
    flat = instances_hw.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    known, ids = np.unique(flat[starts], return_inverse=True)
    if len(known) > _ID_MASK:
        raise ValueError(f"a chip may hold {_ID_MASK - 1} instances, got {len(known)}; cut it into smaller ones")
    numbers = (ids + (known[0] != 0)).astype(np.uint16)
    return np.repeat(numbers, np.diff(starts, append=flat.size)).reshape(instances_hw.shape)

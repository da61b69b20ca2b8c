"""Logits in, class codes and probabilities out. Legend of axes: c classes, h rows, w columns."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from geoseg.model.description import BundleDescription
from geoseg.predict.stitch import Stitching
from geoseg.raster.cog import NODATA
from geoseg.raster.window import Window

PROBABILITY_STEPS = 254
_STRIP_ROWS = 128


def to_scene_pixels(logits_chw: Tensor, stitching: Stitching, core: Window, write: Window) -> Tensor:
    """Logits (class, row, col) of the write window's own pixels from those of its core.

    Each output pixel is a fixed sum over fixed work-grid pixels, element by element, so that it is the same in every
    window it could have been computed in.
    """
    if stitching.is_native:
        top, left = write.row_off - core.row_off, write.col_off - core.col_off
        return logits_chw[:, top : top + write.height, left : left + write.width]
    for axis, start, end, core_off in (
        (0, write.row_off, write.row_end, core.row_off),
        (1, write.col_off, write.col_end, core.col_off),
    ):
        indexes, weights = stitching.taps(axis, start, end)
        shape = (-1, 1) if axis == 0 else (1, -1)
        total: Tensor | None = None
        for index, weight in zip(indexes - core_off, weights, strict=True):
            part = logits_chw.index_select(axis + 1, torch.from_numpy(index).to(logits_chw.device))
            part = part * torch.from_numpy(weight).to(logits_chw.device).reshape(shape)
            total = part if total is None else total + part
        assert total is not None
        logits_chw = total
    return logits_chw


def class_mask(
    logits_chw: Tensor, valid_hw: npt.NDArray[np.bool_], description: BundleDescription
) -> npt.NDArray[np.uint8] | None:
    """The class of each pixel (uint8, row, col) by the bundle's thresholds, the first of equals; 255 where ``valid_hw`` is False.

    None when a winning logit is not finite, and so no class can be told.
    """
    if any(description.offsets):
        logits_chw = logits_chw + torch.tensor(description.offsets, device=logits_chw.device)[:, None, None]
    best = logits_chw.max(0)
    if not bool(best.values.sum(dtype=torch.float64).isfinite()):
        return None
    codes = best.indices.to(torch.uint8).cpu().numpy()
    return np.where(valid_hw, codes, np.uint8(NODATA))


def count_classes(mask_hw: npt.NDArray[np.uint8], num_classes: int) -> list[int]:
    """Pixels of each class."""
    return [int(np.count_nonzero(mask_hw == value)) for value in range(num_classes)]


def class_probabilities(
    logits_chw: Tensor, valid_hw: npt.NDArray[np.bool_], description: BundleDescription
) -> npt.NDArray[np.uint8]:
    """Softmax at the bundle's temperature in steps of 1/254 (uint8, class, row, col); 255 where ``valid_hw`` is False."""
    if description.temperature != 1:
        logits_chw = logits_chw / description.temperature
    steps = (logits_chw.softmax(0) * PROBABILITY_STEPS).round_().to(torch.uint8).cpu().numpy()
    return np.where(valid_hw[None], steps, np.uint8(NODATA))


def class_uncertainty(
    logits_chw: Tensor,
    valid_hw: npt.NDArray[np.bool_],
    description: BundleDescription,
    kind: Literal["entropy", "margin"],
) -> npt.NDArray[np.uint8]:
    """How unsure each pixel's class is, 0 to 1 in steps of 1/254 (uint8, row, col); 255 where ``valid_hw`` is False.

    Of the probabilities p at the bundle's temperature: the entropy ``-sum p ln p`` over ``ln`` of the number of classes, or 1
    less the margin between the two largest (Scheffer et al. 2001); thresholds have no say. It is computed in double
    precision, where an exponential that rounds otherwise at the end of a row than inside it changes no step, and in strips,
    since doubles of a whole window would be its peak of memory.
    """
    num_classes = len(logits_chw)
    steps_hw = np.empty(valid_hw.shape, np.uint8)
    for row in range(0, len(steps_hw), _STRIP_ROWS):
        chances_chw = (logits_chw[:, row : row + _STRIP_ROWS].double() / description.temperature).softmax(0)
        if kind == "entropy":
            unsure_hw = torch.special.entr(chances_chw).sum(0) / math.log(num_classes)
        else:
            first, second = chances_chw.topk(2, dim=0).values
            unsure_hw = 1 - (first - second)
        steps_hw[row : row + _STRIP_ROWS] = (unsure_hw * PROBABILITY_STEPS).round_().to(torch.uint8).cpu().numpy()
    return np.where(valid_hw, steps_hw, np.uint8(NODATA))


def uncertainty_bytes(width: int, num_classes: int) -> int:
    """What ``class_uncertainty`` holds at most beside its arguments and its result, for rows of ``width``."""
    return 4 * 8 * num_classes * _STRIP_ROWS * width


def sum_by_class(steps_hw: npt.NDArray[np.uint8], mask_hw: npt.NDArray[np.uint8], num_classes: int) -> list[int]:
    """The sum of steps over the pixels of each class."""
    return [int(steps_hw[mask_hw == value].sum(dtype=np.int64)) for value in range(num_classes)]

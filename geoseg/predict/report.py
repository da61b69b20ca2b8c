"""Pictures of results: an image, its mask and, where there is one, the truth, side by side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from geoseg.model.description import ClassName
from geoseg.model.pictures import as_rgb, colored, page, swatch

_SIDE = 640


def class_iou(
    mask_hw: npt.NDArray[np.uint8], truth_hw: npt.NDArray[np.uint8], valid_hw: npt.NDArray[np.bool_], value: int
) -> float:
    """Intersection over union of one class over the valid pixels; NaN when neither has it."""
    ours, theirs = (mask_hw == value) & valid_hw, (truth_hw == value) & valid_hw
    union = int((ours | theirs).sum())
    return int((ours & theirs).sum()) / union if union else float("nan")


def side_by_side(
    image_bhw: npt.NDArray[np.uint8],
    valid_hw: npt.NDArray[np.bool_],
    panels: list[tuple[str, npt.NDArray[np.uint8]]],
    classes: tuple[ClassName, ...],
) -> bytes:
    """A PNG: the image (band, row, col), then a captioned panel for each array of class codes, and a legend."""
    row = [as_rgb(image_bhw, valid_hw), *(colored(codes, classes) for _, codes in panels)]
    legend = [(one.name, swatch(one.color)) for one in classes[1:]]
    return page(["image", *(title for title, _ in panels)], [row], legend, side=_SIDE)

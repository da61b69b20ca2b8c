"""Pictures of results: an image, its mask and, where there is one, the truth, side by side."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from geoseg.model.description import ClassName

_GAP, _CAPTION, _SIDE = 12, 34, 640
_PAPER, _INK, _GREY = (250, 249, 246), (40, 40, 45), (225, 223, 218)


def class_iou(
    mask_hw: npt.NDArray[np.uint8], truth_hw: npt.NDArray[np.uint8], valid_hw: npt.NDArray[np.bool_], value: int
) -> float:
    """Intersection over union of one class over the valid pixels; NaN when neither has it."""
    ours, theirs = (mask_hw == value) & valid_hw, (truth_hw == value) & valid_hw
    union = int((ours | theirs).sum())
    return int((ours & theirs).sum()) / union if union else float("nan")


def colored(codes_hw: npt.NDArray[np.uint8], classes: tuple[ClassName, ...]) -> npt.NDArray[np.uint8]:
    """Class codes as colours (row, col, rgb); background is dark, nodata light grey."""
    table = np.full((256, 3), _GREY, np.uint8)
    for value, one in enumerate(classes):
        table[value] = one.color if value else (38, 40, 46)
    return table[codes_hw]


def side_by_side(
    image_bhw: npt.NDArray[np.uint8],
    valid_hw: npt.NDArray[np.bool_],
    panels: list[tuple[str, npt.NDArray[np.uint8]]],
    classes: tuple[ClassName, ...],
) -> bytes:
    """A PNG: the image (band, row, col), then a captioned panel for each array of class codes, and a legend."""
    picture = np.where(valid_hw[..., None], image_bhw[:3].transpose(1, 2, 0), np.array(_GREY, np.uint8))
    drawn = [("image", picture), *((title, colored(codes, classes)) for title, codes in panels)]
    scale = _SIDE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    width = len(drawn) * (size[0] + _GAP) + _GAP
    canvas = Image.new("RGB", (width, size[1] + _CAPTION + 2 * _GAP), _PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    for place, (title, pixels) in enumerate(drawn):
        left = _GAP + place * (size[0] + _GAP)
        draw.text((left, _GAP), title, _INK, font)
        filter_ = Image.Resampling.LANCZOS if place == 0 else Image.Resampling.BOX
        canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, filter_), (left, _CAPTION + _GAP))
    left = width - _GAP
    for one in reversed(classes[1:]):
        left -= int(font.getlength(one.name))
        draw.text((left, _GAP), one.name, _INK, font)
        left -= 22
        draw.rectangle((left, _GAP + 3, left + 15, _GAP + 18), one.color)
        left -= 16
    out = io.BytesIO()
    canvas.save(out, "PNG", optimize=True)
    return out.getvalue()

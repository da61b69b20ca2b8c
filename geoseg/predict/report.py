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
    return compose(drawn, [(one.name, one.color) for one in classes[1:]], across=len(drawn))


def compose(
    panels: list[tuple[str, npt.NDArray[np.uint8]]], legend: list[tuple[str, tuple[int, int, int]]], *, across: int
) -> bytes:
    """A PNG of captioned panels (row, col, rgb) of one size, ``across`` side by side, and a legend at the top right or below.

    The first is smoothed where it is made smaller; the others are colours that stand for something.
    """
    height, cols = panels[0][1].shape[:2]
    scale = _SIDE / max(height, cols)
    size = (max(1, round(cols * scale)), max(1, round(height * scale)))
    width, step = across * (size[0] + _GAP) + _GAP, size[1] + _CAPTION + _GAP
    font = ImageFont.load_default(17)
    # In its own line where it would run into a caption.
    room = size[0] - font.getlength(panels[across - 1][0]) if across > 1 else 0
    below = sum(font.getlength(name) + 38 for name, _ in legend) > room
    rows = -(-len(panels) // across)
    canvas = Image.new("RGB", (width, rows * step + _GAP + below * _CAPTION), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, (title, pixels) in enumerate(panels):
        left, top = _GAP + place % across * (size[0] + _GAP), _GAP + place // across * step
        draw.text((left, top), title, _INK, font)
        filter_ = Image.Resampling.LANCZOS if place == 0 else Image.Resampling.BOX
        canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, filter_), (left, top + _CAPTION))
    left, top = width - _GAP, below * rows * step + _GAP
    for name, color in reversed(legend):
        left -= int(font.getlength(name))
        draw.text((left, top), name, _INK, font)
        left -= 22
        draw.rectangle((left, top + 3, left + 15, top + 18), color, _INK if below else None)
        left -= 16
    out = io.BytesIO()
    canvas.save(out, "PNG", optimize=True)
    return out.getvalue()

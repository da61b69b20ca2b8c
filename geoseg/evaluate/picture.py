"""Pictures of an evaluation: image, truth, mask and errors of a scene from every so-manieth pixel, and reliability.

And of two masks: what changed where most did.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from geoseg.evaluate.difference import ClassMatch
from geoseg.evaluate.judge import EvaluationScene, JudgedWindow, error_codes, error_map
from geoseg.model.description import ClassName
from geoseg.model.pictures import BACKGROUND, INK, NO_DATA, PAPER, Rgb, colored, page, png, swatch
from geoseg.train.codes import UNLABELLED
from geoseg.train.metrics import Counts, class_scores, reliability

_SIDE = 640
_OPEN = (112, 116, 126)
_ERRORS = {"missed": (255, 40, 170), "false": (40, 200, 255), "wrong class": (160, 255, 60)}
_CHANGE_SIDE = 360
_GAINED_HUES, _LOST_HUES, _SWAPPED = (0.33, 0.55), (0.91, 1.08), (165, 115, 255)
_LINE, _BAR, _GAP_BAR = (190, 188, 182), (80, 120, 190), (235, 150, 120)


@dataclass(frozen=True, slots=True)
class Sample:
    """A few pixels of a window, for the picture of its scene: where they go, colours (row, col, rgb), labels, mask, errors."""

    row: int
    col: int
    image: NDArray[np.uint8]
    labels_hw: NDArray[np.uint8]
    mask_hw: NDArray[np.uint8]
    errors_hw: NDArray[np.uint8]


def error_colors(classes: Sequence[ClassName]) -> tuple[Rgb, ...]:
    """The colours of an error map's codes: what is right is dark, errors are bright."""
    return (BACKGROUND, *_dark(classes[1:]), *(_ERRORS[name] for name in error_codes(len(classes))))


def _dark(classes: Sequence[ClassName]) -> list[Rgb]:
    return [(red * 5 // 9, green * 5 // 9, blue * 5 // 9) for red, green, blue in (one.color for one in classes)]


def _step(shape: tuple[int, int]) -> int:
    return max(1, -(-max(shape) // _SIDE))


def sample(scene: EvaluationScene, judged: JudgedWindow, value_range: tuple[float, float]) -> Sample | None:
    """Every n-th row and column of the scene as far as they lie in a window; None when none does.

    The first three bands are shown, of a stack those of its first date, from black to white over ``value_range``.
    """
    window, stitching = judged.window, scene.plan.stitching
    step = _step(stitching.scene_shape)
    rows = np.arange(-(-window.row_off // step) * step, window.row_end, step)
    cols = np.arange(-(-window.col_off // step) * step, window.col_end, step)
    if not len(rows) or not len(cols):
        return None
    seen = []
    for axis, places in ((0, rows), (1, cols)):
        scene_size, work_size = stitching.scene_shape[axis], stitching.work_shape[axis]
        seen.append((2 * places + 1) * work_size // (2 * scene_size) - judged.around_off[axis])
    bands = judged.around.pixels[: len(scene.plan.bands)][:, seen[0][:, None], seen[1]]
    own = (rows - window.row_off)[:, None], cols - window.col_off
    mask_hw, labels_hw = judged.mask_hw[own], judged.labels_hw[own]
    low, high = value_range
    shown = np.clip((bands.astype(np.float64) - low) / (high - low) * 255, 0, 255)
    image = np.nan_to_num(shown if len(shown) >= 3 else shown[:1].repeat(3, 0))[:3].astype(np.uint8).transpose(1, 2, 0)
    image = np.where((mask_hw == 255)[..., None], np.array(NO_DATA, np.uint8), image)
    errors_hw = error_map(mask_hw, labels_hw, scene.codes)
    return Sample(int(rows[0]) // step, int(cols[0]) // step, image, labels_hw, mask_hw, errors_hw)


def scene_picture(scene_shape: tuple[int, int], samples: Iterable[Sample], classes: tuple[ClassName, ...]) -> bytes:
    """The PNG of a scene: image, truth, mask and errors."""
    step = _step(scene_shape)
    shape = -(-scene_shape[0] // step), -(-scene_shape[1] // step)
    image = np.full((*shape, 3), NO_DATA, np.uint8)
    labels_hw, mask_hw, errors_hw = (np.full(shape, 255, np.uint8) for _ in range(3))
    for one in samples:
        place = slice(one.row, one.row + len(one.image)), slice(one.col, one.col + one.image.shape[1])
        image[place] = one.image
        labels_hw[place], mask_hw[place], errors_hw[place] = one.labels_hw, one.mask_hw, one.errors_hw
    is_open = (labels_hw >= len(classes)) & (labels_hw != UNLABELLED)
    truth = colored(labels_hw, classes, more=dict.fromkeys(np.unique(labels_hw[is_open]).tolist(), _OPEN))
    table = np.full((256, 3), NO_DATA, np.uint8)
    colors = error_colors(classes)
    table[: len(colors)] = colors
    legend = [(one.name, one.color) for one in classes[1:]] + list(_ERRORS.items()) + [("not known", NO_DATA)]
    if is_open.any():
        legend.append(("left open", _OPEN))
    panels = [("image", image), ("truth", truth), ("mask", colored(mask_hw, classes)), ("errors", table[errors_hw])]
    swatches = [(name, swatch(color)) for name, color in legend]
    return page([title for title, _ in panels], [[pixels for _, pixels in panels]], swatches, side=_SIDE)


@dataclass(frozen=True, slots=True)
class ChangedPlace:
    """A part of a scene: a caption, its image (row, col, rgb), and its masks before and after in codes of a ``ClassMatch``."""

    caption: str
    image: NDArray[np.uint8]
    before_hw: NDArray[np.uint8]
    after_hw: NDArray[np.uint8]


def changes_picture(places: Sequence[ChangedPlace], match: ClassMatch) -> bytes:
    """A PNG with a row for each place: image, published mask, new mask, and what changed in bright colours."""
    classes = match.all
    legend, table = _change_colors(classes)
    rows = [
        [
            one.image,
            *(colored(codes, classes) for codes in (one.before_hw, one.after_hw)),
            table[one.before_hw, one.after_hw],
        ]
        for one in places
    ]
    return page(
        ["image, where most changed", "published", "new", "changed"],
        rows,
        [(name, swatch(color)) for name, color in legend],
        side=_CHANGE_SIDE,
        captions=[one.caption for one in places],
    )


def _change_colors(classes: Sequence[ClassName]) -> tuple[list[tuple[str, Rgb]], NDArray[np.uint8]]:
    """A legend, and the colour (before, after, rgb) of each change; a class that stays is dark."""
    num = len(classes)
    table = np.full((256, 256, 3), NO_DATA, np.uint8)
    table[:num, :num] = _SWAPPED
    for code, color in enumerate((BACKGROUND, *_dark(classes[1:]))):
        table[code, code] = color
    legend = [(one.name, one.color) for one in classes[1:]]
    for code, one in enumerate(classes[1:], 1):
        for hues, name, change in ((_GAINED_HUES, "gained", (0, code)), (_LOST_HUES, "lost", (code, 0))):
            color = _bright(hues, (code - 1) / max(1, num - 2))
            table[change] = color
            legend.append((f"{one.name} {name}", color))
    return [*legend, ("one for another", _SWAPPED)], table


def _bright(hues: tuple[float, float], share: float) -> Rgb:
    red, green, blue = colorsys.hsv_to_rgb((hues[0] + share * (hues[1] - hues[0])) % 1, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def reliability_picture(counts: Counts, classes: Sequence[ClassName]) -> bytes:
    """A PNG with a diagram for each class: how often a pixel is of the class, by the probability that it was given."""
    side, left, top, foot = 300, 64, 44, 92
    width, height = left + side + 24, top + side + foot
    canvas = Image.new("RGB", (len(classes) * width, height), PAPER)
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(17), ImageFont.load_default(13)
    for place, (one, score) in enumerate(zip(classes, class_scores(counts), strict=True)):
        x0, y0 = place * width + left, top + side
        ece = "" if math.isnan(score.ece) else f"   ECE {score.ece:.3f}"
        draw.text((x0, 14), f"{one.name}{ece}", INK, font)
        predicted, seen = reliability(counts.bins[place])
        most = max(1, int(counts.bins[place, :, 0].max()))
        for at, (number, mean, share) in enumerate(
            zip(counts.bins[place, :, 0].tolist(), predicted.tolist(), seen.tolist(), strict=True)
        ):
            start, end = x0 + at * side // len(predicted), x0 + (at + 1) * side // len(predicted) - 2
            if number:
                low, high = sorted((y0 - round(side * share), y0 - round(side * mean)))
                draw.rectangle((start, y0 - round(side * share), end, y0), _BAR)
                draw.rectangle((start, low, end, high), outline=_GAP_BAR, width=2)
                tall = max(1, round(36 * math.sqrt(number / most)))
                draw.rectangle((start, height - 12 - tall, end, height - 12), _LINE)
        draw.line((x0, y0, x0 + side, top), INK, 1)
        draw.rectangle((x0, top, x0 + side, y0), outline=_LINE)
        for tenth in (0, 5, 10):
            draw.text((x0 - 34, y0 - side * tenth // 10 - 8), f"{tenth / 10:.1f}", INK, small)
            draw.text((x0 + side * tenth // 10 - 10, y0 + 4), f"{tenth / 10:.1f}", INK, small)
        draw.text((x0, y0 + 20), "share of the class by its probability; grey: root of pixels", INK, small)
    return png(canvas)

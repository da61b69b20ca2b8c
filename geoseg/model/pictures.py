"""From arrays and class codes to pictures: a page of panels in rows, captioned, with a legend. Knows no torch."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from geoseg.model.description import ClassName

Rgb = tuple[int, int, int]
PAPER, INK, NO_DATA = (250, 249, 246), (40, 40, 45), (225, 223, 218)
BACKGROUND = (38, 40, 46)
_GAP, _CAPTION, _SWATCH, _FONT = 12, 34, 16, 17
_PERCENTILES = (2, 98)


def png(canvas: Image.Image) -> bytes:
    """The bytes of a PNG."""
    out = io.BytesIO()
    canvas.save(out, "PNG", optimize=True)
    return out.getvalue()


def as_rgb(image_khw: npt.NDArray[np.generic], valid_hw: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """An image (row, col, rgb) to look at: the first three bands, or one in grey; light grey where it is invalid.

    Bytes stay as they are. Of another dtype each band is stretched between the 2nd and the 98th percentile of its valid
    pixels.
    """
    bands = image_khw[:3] if len(image_khw) >= 3 else image_khw[:1].repeat(3, axis=0)
    if bands.dtype != np.uint8:
        bands = np.stack([_stretched(band, valid_hw) for band in bands.astype(np.float64)])
    return np.where(valid_hw[..., None], bands.transpose(1, 2, 0), np.array(NO_DATA, np.uint8)).astype(np.uint8)


def _stretched(band_hw: npt.NDArray[np.float64], valid_hw: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    seen = band_hw[valid_hw & np.isfinite(band_hw)]
    low, high = np.percentile(seen, _PERCENTILES) if seen.size else (0.0, 0.0)
    share = (np.nan_to_num(band_hw) - low) / (high - low) if high > low else np.full_like(band_hw, 0.5)
    return (share.clip(0, 1) * 255).round().astype(np.uint8)


def colored(
    codes_hw: npt.NDArray[np.uint8], classes: Sequence[ClassName], *, more: Mapping[int, Rgb] | None = None
) -> npt.NDArray[np.uint8]:
    """Class codes as colours (row, col, rgb); background is dark, codes of ``more`` as it says, all others light grey."""
    table = np.full((256, 3), NO_DATA, np.uint8)
    table[: len(classes)] = class_colors(classes)
    for code, color in (more or {}).items():
        table[code] = color
    return table[codes_hw]


def class_colors(classes: Sequence[ClassName]) -> list[Rgb]:
    """The colour of each class, dark for background whatever its own is."""
    return [one.color if value else BACKGROUND for value, one in enumerate(classes)]


def page(
    titles: Sequence[str],
    rows: Sequence[Sequence[npt.NDArray[np.uint8]]],
    legend: Sequence[tuple[str, npt.NDArray[np.uint8]]],
    *,
    side: int,
    captions: Sequence[str] = (),
) -> bytes:
    """A PNG of panels (row, col, rgb) of which the longer side has ``side`` pixels, with a title above each column.

    ``captions`` stand above the rows, one for each.

    The first panel of a row is an image, the others are of class codes, whose edges stay sharp. The legend, at the top
    right, names square swatches (row, col, rgb); it gets a line of its own where the titles leave it no room.
    """
    font = ImageFont.load_default(_FONT)
    sizes = [_fitted(row[0].shape[1], row[0].shape[0], side) for row in rows]
    column = max(width for width, _ in sizes) + _GAP
    entries = [_SWATCH + 6 + int(font.getlength(name)) + 16 for name, _ in legend]
    width = max(len(titles) * column + _GAP, sum(entries) + 2 * _GAP)
    room = width - (len(titles) - 1) * column - _GAP - int(font.getlength(titles[-1])) - _GAP
    top = _GAP + (0 if sum(entries) <= room else _CAPTION)
    above = _CAPTION - _GAP if captions else 0
    canvas = Image.new("RGB", (width, top + _CAPTION + sum(above + height + _GAP for _, height in sizes)), PAPER)
    draw = ImageDraw.Draw(canvas)
    left = width - _GAP - sum(entries) + 16
    for (name, swatch), entry in zip(legend, entries, strict=True):
        canvas.paste(Image.fromarray(swatch).resize((_SWATCH, _SWATCH), Image.Resampling.BOX), (left, _GAP + 3))
        draw.text((left + _SWATCH + 6, _GAP), name, INK, font)
        left += entry
    for place, title in enumerate(titles):
        draw.text((_GAP + place * column, top), title, INK, font)
    top += _CAPTION
    for row, size, caption in zip(rows, sizes, captions or [""] * len(rows), strict=True):
        draw.text((_GAP, top), caption, INK, font)
        top += above
        for place, pixels in enumerate(row):
            kind = Image.Resampling.LANCZOS if place == 0 else Image.Resampling.BOX
            panel = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, kind)
            canvas.paste(panel, (_GAP + place * column, top))
        top += size[1] + _GAP
    return png(canvas)


def swatch(color: Rgb) -> npt.NDArray[np.uint8]:
    """One colour for a legend."""
    return np.full((_SWATCH, _SWATCH, 3), color, np.uint8)


def _fitted(width: int, height: int, side: int) -> tuple[int, int]:
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def round_ticks(lowest: float, highest: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from lowest to highest, at most ``most + 1`` of them."""
    wanted = (highest - lowest) / most
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    first, last = math.ceil(lowest / step - 1e-9), math.floor(highest / step + 1e-9)
    return [float(f"{count * step:.12g}") for count in range(first, last + 1)]

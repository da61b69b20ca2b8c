"""Pictures of a training run: its curves, and example chips with their labels and what the network says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from geoseg.errors import ConfigError
from geoseg.model.description import ClassName
from geoseg.model.pictures import (
    INK,
    NO_DATA,
    PAPER,
    Rgb,
    as_rgb,
    class_colors,
    colored,
    page,
    png,
    round_ticks,
    swatch,
)
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.log import Value

_CHIP_SIDE = 288
_HATCH: Rgb = (186, 184, 178)
_GREY: Rgb = (128, 128, 128)
_FINE = 3  # pictures are drawn so many times larger and scaled down, which makes lines smooth
_PLOT_WIDTH, _PLOT_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 640, 330, 64, 20, 34, 52, 16
_LEGEND_ROW, _SAMPLE, _ENTRY_GAP = 18, 20, 16
_GRID, _FAINT = (228, 226, 220), 0.72
# Okabe and Ito, "Color Universal Design" (2008), the darker ones first.
_COLORS: tuple[Rgb, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (90, 90, 90),
)
_X_TITLES = {"step": "step", "gflop": "GFLOP", "seconds": "seconds"}


@dataclass(frozen=True, slots=True)
class ExampleChip:
    """An image (band, row, col) of any real dtype, its valid pixels, label codes and mask (row, col)."""

    image_khw: npt.NDArray[np.generic]
    valid_hw: npt.NDArray[np.bool_]
    labels_hw: npt.NDArray[np.uint8]
    mask_hw: npt.NDArray[np.uint8]


def chips_png(chips: Sequence[ExampleChip], classes: Sequence[ClassName], codes: LabelCodes) -> bytes:
    """A PNG with a row for each chip: image, label, mask.

    A class left open has the mean colour of its set, towards grey; what is not labelled is hatched.
    """
    colors = class_colors(classes)
    of_sets = [_muted([colors[value] for value in one]) for one in codes.sets]
    by_code = {UNLABELLED - 1 - index: color for index, color in enumerate(of_sets)}
    rows = [
        [
            as_rgb(chip.image_khw, chip.valid_hw),
            _hatched(colored(chip.labels_hw, classes, more=by_code), chip.labels_hw == UNLABELLED),
            colored(chip.mask_hw, classes),
        ]
        for chip in chips
    ]
    names = [" or ".join(classes[value].name for value in one) for one in codes.sets]
    legend = [(one.name, swatch(color)) for one, color in zip(classes, colors, strict=True)]
    legend += [(name, swatch(color)) for name, color in zip(names, of_sets, strict=True)]
    hatched = _hatched(swatch(NO_DATA), np.ones(swatch(NO_DATA).shape[:2], np.bool_))
    return page(["image", "label", "mask"], rows, [*legend, ("not labelled", hatched)], side=_CHIP_SIDE)


def _muted(colors: Sequence[Rgb]) -> Rgb:
    return _towards(tuple(np.mean(colors, axis=0).round().astype(int).tolist()), _GREY, 0.35)


def _towards(color: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(one + share * (end - one)) for one, end in zip(color, other, strict=True))
    return red, green, blue


def _hatched(picture: npt.NDArray[np.uint8], where_hw: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """The picture with diagonal lines, as far apart in any chip when it is drawn."""
    period = max(4, round(max(where_hw.shape) / 32))
    rows, cols = np.indices(where_hw.shape)
    lines_hw = (rows + cols) % period < max(1, period // 4)
    return np.where((where_hw & lines_hw)[..., None], np.array(_HATCH, np.uint8), picture)


@dataclass(frozen=True, slots=True)
class _Line:
    """Points (x, y) to join; not finite where there is a gap."""

    name: str
    color: Rgb
    points: npt.NDArray[np.float64]
    style: Literal["thin", "thick", "marked"]


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    lines: tuple[_Line, ...]
    highest: float


def curves_png(
    runs: Mapping[str, Sequence[Mapping[str, Value]]], *, x: Literal["step", "gflop", "seconds"] = "step"
) -> bytes:
    """A PNG of loss and validation IoU over ``x``, a name in the records, for one run or, to compare, for several by name.

    Of one run the colours tell the classes apart, of several the runs, with a panel for each class. A dashed line marks
    where a stage begins, with its ``resolution_m``. The loss of single steps is faint, their running mean is strong.
    Raises ConfigError for records without ``x``.
    """
    for name, records in runs.items():
        if any(record.get(x) is None for record in records):
            raise ConfigError(f"{name}: curves over {x} need it in each record; draw them over steps instead")
    panels = _panels(runs, x)
    ends = [float(record[x] or 0) for records in runs.values() for record in records]
    x_range = (min([0.0, *ends]), max(ends, default=0.0) or 1.0)
    rows, cols = -(-len(panels) // 2), min(2, len(panels))
    top = _TOP + _ROW * len(runs) + _LEGEND_ROW * (max(len(_legend_rows(panel)) for panel in panels) - 1)
    width, height = _LEFT + _PLOT_WIDTH + _RIGHT, top + _PLOT_HEIGHT + _BOTTOM
    canvas = Image.new("RGB", (cols * width * _FINE, rows * height * _FINE), PAPER)
    starts = [_stage_starts(records, x) for records in runs.values()]
    for index, panel in enumerate(panels):
        corner = (index % 2 * width + _LEFT, index // 2 * height + top)
        _draw(_Plot(ImageDraw.Draw(canvas), corner, x_range, panel.highest), panel, starts, _X_TITLES[x])
    return png(canvas.reduce(_FINE))


def _panels(runs: Mapping[str, Sequence[Mapping[str, Value]]], x: str) -> list[_Panel]:
    names = dict.fromkeys(
        name for records in runs.values() for record in records for name in record if name.startswith("iou/")
    )
    alone = len(runs) == 1
    losses: list[_Line] = []
    scores: dict[str, list[_Line]] = {name: [] for name in names}
    for place, (run, records) in enumerate(runs.items()):
        color = _COLORS[place % len(_COLORS)]
        raw, told = _points(records, "train", x, "loss"), _points(records, "validate", x, "loss")
        losses.append(_Line("", _towards(color, PAPER, _FAINT), raw, "thin"))
        losses.append(_Line("training" if alone else run, color, _smooth(raw), "thick"))
        losses.append(_Line("validation" if alone else "", _COLORS[1] if alone else color, told, "marked"))
        for index, name in enumerate(names):
            points = _points(records, "validate", x, name)
            own = _COLORS[index % len(_COLORS)] if alone else color
            scores[name].append(_Line(name.removeprefix("iou/") if alone else run, own, points, "marked"))
    strong = [line.points[:, 1] for line in losses if line.style != "thin"]
    seen = np.concatenate([one[np.isfinite(one)] for one in strong] or [np.zeros(0)])
    loss = _Panel("loss", tuple(losses), float(np.percentile(seen, 99)) * 1.1 or 1.0 if seen.size else 1.0)
    if alone:
        return [loss, _Panel("validation IoU", tuple(line for lines in scores.values() for line in lines), 1.0)]
    return [
        loss,
        *(_Panel(f"validation IoU, {name.removeprefix('iou/')}", tuple(lines), 1.0) for name, lines in scores.items()),
    ]


def _points(records: Sequence[Mapping[str, Value]], kind: str, x: str, y: str) -> npt.NDArray[np.float64]:
    pairs = [(record[x], record[y]) for record in records if record["kind"] == kind and y in record]
    return np.array([[math.nan if one is None else float(one) for one in pair] for pair in pairs]).reshape(-1, 2)


def _smooth(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The running mean over a twentieth of the points, five at least, of those there are at the ends; gaps are left out."""
    half = max(2, len(points) // 40)
    known = np.isfinite(points[:, 1])
    sums = np.concatenate([[0.0], np.where(known, points[:, 1], 0.0).cumsum()])
    counts = np.concatenate([[0], known.cumsum()])
    first = np.maximum(np.arange(len(points)) - half, 0)
    last = np.minimum(np.arange(len(points)) + half + 1, len(points))
    num = counts[last] - counts[first]
    means = np.divide(sums[last] - sums[first], num, out=np.full(len(points), math.nan), where=num > 0)
    return np.stack([points[:, 0], means], axis=1)


def _stage_starts(records: Sequence[Mapping[str, Value]], x: str) -> list[tuple[float, str]]:
    """Where each stage begins, and the size of its pixels."""
    starts: dict[Value, tuple[float, str]] = {}
    for record in records:
        size = record.get("resolution_m")
        starts.setdefault(record["stage"], (float(record[x] or 0), "" if size is None else f"{size:g} m"))
    return list(starts.values())


def tick_label(value: float) -> str:
    """A round number, short: 250, 1.5k, 20M."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


@dataclass(frozen=True, slots=True)
class _Plot:
    """An area to draw in, its top left corner in pixels of the picture, with numbers for x and from 0 for y."""

    draw: ImageDraw.ImageDraw
    corner: tuple[int, int]
    x_range: tuple[float, float]
    highest: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        low, high = self.x_range
        right = (x - low) / (high - low) * _PLOT_WIDTH
        up = min(max(y / self.highest, 0.0), 1.0) * _PLOT_HEIGHT
        return (self.corner[0] + right) * _FINE, (self.corner[1] + _PLOT_HEIGHT - up) * _FINE

    def text(self, x: float, y: float, text: str, *, anchor: str, color: Rgb = INK, size: int = 13) -> None:
        """Text at pixels from the corner."""
        at = ((self.corner[0] + x) * _FINE, (self.corner[1] + y) * _FINE)
        self.draw.text(at, text, color, _font(size), anchor=anchor)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * _FINE)


def _draw(plot: _Plot, panel: _Panel, starts: Sequence[Sequence[tuple[float, str]]], x_title: str) -> None:
    for value in round_ticks(*plot.x_range):
        plot.draw.line([plot.at(value, 0), plot.at(value, plot.highest)], _GRID, _FINE)
        plot.text(plot.at(value, 0)[0] / _FINE - plot.corner[0], _PLOT_HEIGHT + 8, tick_label(value), anchor="mt")
    for value in round_ticks(0, plot.highest):
        plot.draw.line([plot.at(plot.x_range[0], value), plot.at(plot.x_range[1], value)], _GRID, _FINE)
        plot.text(-8, plot.at(0, value)[1] / _FINE - plot.corner[1], tick_label(value), anchor="rm")
    plot.text(_PLOT_WIDTH / 2, _PLOT_HEIGHT + 28, x_title, anchor="mt")
    band = _ROW * len(starts)
    plot.text(0, -band - 12, panel.title, anchor="ls", size=16)
    _draw_stages(plot, starts)
    for line in panel.lines:
        _draw_line(plot, line)
    axis = [plot.at(plot.x_range[0], plot.highest), plot.at(plot.x_range[0], 0), plot.at(plot.x_range[1], 0)]
    plot.draw.line(axis, INK, _FINE, joint="curve")
    for row, lines in enumerate(reversed(_legend_rows(panel))):
        _draw_legend_row(plot, lines, -band - 12 - row * _LEGEND_ROW)


def _legend_rows(panel: _Panel) -> list[list[_Line]]:
    """The lines that have a name, as many in a row as there is room for beside the panel's title."""
    room = _PLOT_WIDTH - _font(16).getlength(panel.title) / _FINE - _ENTRY_GAP
    rows: list[list[_Line]] = [[]]
    left = room
    for line in panel.lines:
        if line.name:
            width = _entry_width(line)
            if rows[-1] and width > left:
                rows.append([])
                left = room
            rows[-1].append(line)
            left -= width
    return rows


def _entry_width(line: _Line) -> float:
    return _font(14).getlength(line.name) / _FINE + 6 + _SAMPLE + _ENTRY_GAP


def _draw_legend_row(plot: _Plot, lines: Sequence[_Line], baseline: int) -> None:
    """Names with a sample of their lines before them, flush with the panel's right."""
    left = _PLOT_WIDTH - sum(_entry_width(line) for line in lines) + _ENTRY_GAP
    for line in lines:
        middle = (plot.corner[1] + baseline - 5) * _FINE
        ends = [((plot.corner[0] + left + end) * _FINE, middle) for end in (0, _SAMPLE)]
        plot.draw.line(ends, line.color, 3 * _FINE)
        plot.text(left + _SAMPLE + 6, baseline, line.name, anchor="ls", size=14)
        left += _entry_width(line)


def _draw_stages(plot: _Plot, starts: Sequence[Sequence[tuple[float, str]]]) -> None:
    alone = len(starts) == 1
    for row, of_run in enumerate(starts):
        color = _GREY if alone else _COLORS[row % len(_COLORS)]
        top = (plot.corner[1] - _ROW * (len(starts) - row)) * _FINE
        lefts = [plot.at(begin if index else plot.x_range[0], 0)[0] for index, (begin, _) in enumerate(of_run)]
        (_, ceiling), (right, bottom) = plot.at(0, plot.highest), plot.at(plot.x_range[1], 0)
        for left in lefts[1:]:
            plot.draw.line([(left, top), (left, top + _ROW * _FINE)], color, _FINE)
            for dash in range(int(ceiling), int(bottom), 8 * _FINE):
                plot.draw.line([(left, dash), (left, min(dash + 4 * _FINE, bottom))], color, _FINE)
        for (_, label), left, end in zip(of_run, lefts, [*lefts[1:], right][: len(lefts)], strict=True):
            if left + _font(12).getlength(label) + 6 * _FINE <= end:  # a short stage has no room for its label
                at = left / _FINE - plot.corner[0] + 4
                plot.text(at, top / _FINE - plot.corner[1] + 1, label, anchor="lt", color=color, size=12)


def _draw_line(plot: _Plot, line: _Line) -> None:
    width = {"thin": 1, "thick": 2, "marked": 2}[line.style] * _FINE
    piece: list[tuple[float, float]] = []
    for x, y in [*line.points.tolist(), (math.nan, math.nan)]:
        if math.isfinite(y):
            piece.append(plot.at(x, y))
            continue
        if len(piece) > 1:
            plot.draw.line(piece, line.color, width, joint="curve")
        if line.style == "marked" or len(piece) == 1:
            for right, down in piece:
                plot.draw.circle((right, down), 3 * _FINE, line.color)
        piece = []

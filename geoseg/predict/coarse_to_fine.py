"""Windows with their coarse pixels in, logits out that are those of full resolution in the cells that deserve it.

Legend of axes: c classes, h rows, w columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from geoseg.config import PredictConfig
from geoseg.predict.coarse import CELL, by_pixel, cover
from geoseg.predict.mask import to_scene_pixels
from geoseg.predict.predictor import Predictor
from geoseg.predict.reading import Task, WindowPixels
from geoseg.raster.raster import Raster
from geoseg.raster.window import Window

_RIM = 0.5  # of the margin: valid convolutions compute all of it at the first level and none at the deepest


@dataclass(frozen=True, slots=True)
class FineWhereLikely:
    """Logits (class, row, col) of a window's own pixels, and which of these (row, col) deserved full resolution."""

    logits_chw: Tensor
    fine_hw: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of window ``at`` of a batch to run at full resolution: its place in the scene, its core with the margin."""

    at: int
    write: Window
    core: Window
    around: Raster

    @property
    def size(self) -> tuple[int, int]:
        return self.core.height, self.core.width


def run_coarse_to_fine(
    predictor: Predictor, batch: Sequence[tuple[Task, WindowPixels]], config: PredictConfig, *, most: int
) -> list[FineWhereLikely]:
    """Run windows coarse first, then at full resolution in the cells where that sees a class that is not the first.

    Elsewhere the logits are those of the coarse pass, interpolated, where a layer is made of them, else 0. No more than ``most``
    rasters go through the network at once.
    """
    coarse = list(_logits(predictor, [_coarse_pixels(read) for _, read in batch], most))
    windows: list[FineWhereLikely] = []
    pieces: list[_Piece] = []
    for at, ((task, read), coarse_chw) in enumerate(zip(batch, coarse, strict=True)):
        grid, write = task.plan.coarse, task.window
        assert grid is not None
        cells = grid.cells(_likely(coarse_chw, predictor, config), read.valid, write)
        pieces += _pieces(at, task, read, cells)
        if config.probabilities or config.uncertainty:
            begun_chw = to_scene_pixels(coarse_chw, grid, grid.core(write), write)
        else:
            begun_chw = coarse_chw.new_zeros((len(coarse_chw), *read.valid.shape))
        windows.append(FineWhereLikely(begun_chw, by_pixel(cells, read.valid.shape)))
    pieces.sort(key=lambda piece: piece.size)  # those of one size go through the network together
    for piece, logits_chw in zip(pieces, _logits(predictor, [one.around for one in pieces], most), strict=True):
        task, window = batch[piece.at][0], windows[piece.at]
        placed_chw = to_scene_pixels(logits_chw, task.plan.stitching, piece.core, piece.write)
        rows, cols = _inside(piece.write, task.window)
        fine_hw = torch.from_numpy(window.fine_hw[rows, cols]).to(placed_chw.device)
        part_chw = window.logits_chw[:, rows, cols]
        part_chw.copy_(torch.where(fine_hw, placed_chw, part_chw))
    return windows


def _coarse_pixels(read: WindowPixels) -> Raster:
    assert read.coarse is not None
    return read.coarse


def _logits(predictor: Predictor, rasters: Sequence[Raster], most: int) -> Iterator[Tensor]:
    """The logits of the rasters' cores, in order; those of one shape that stand together are run together."""
    for _, alike in itertools.groupby(rasters, key=lambda raster: raster.pixels.shape):
        some = list(alike)
        for first in range(0, len(some), most):
            yield from predictor.core_logits(some[first : first + most])


def _likely(logits_chw: Tensor, predictor: Predictor, config: PredictConfig) -> npt.NDArray[np.bool_]:
    """Where (row, col) a class that is not the first has the probability that is asked for, or none can be told.

    In double precision, since an exponential may round otherwise at the end of a row than inside it.
    """
    assert config.coarse_threshold is not None
    chances_chw = (logits_chw.double() / predictor.description.temperature).softmax(0)
    unlikely_hw = (chances_chw[1:] < config.coarse_threshold).all(0)  # False for what is no number
    return np.asarray(~unlikely_hw.cpu().numpy())


def _pieces(at: int, task: Task, read: WindowPixels, cells: npt.NDArray[np.bool_]) -> Iterator[_Piece]:
    """Parts of a window that together hold its cells that deserve it."""
    stitching, window = task.plan.stitching, task.window
    assert read.around is not None
    whole = stitching.core(window)
    rim = _RIM * stitching.margin * stitching.scene_shape[0] / stitching.work_shape[0] / CELL
    for top, bottom, left, right in cover(cells, rim):
        col_off, row_off = window.col_off + left * CELL, window.row_off + top * CELL
        width, height = (right - left) * CELL, (bottom - top) * CELL
        write = Window(col_off, row_off, min(width, window.col_end - col_off), min(height, window.row_end - row_off))
        core = stitching.core(write)
        rows, cols = _inside(core.grown(stitching.margin), whole.grown(stitching.margin))
        around = Raster(read.around.pixels[:, rows, cols], read.around.valid[..., rows, cols])
        yield _Piece(at, write, core, around)


def _inside(part: Window, whole: Window) -> tuple[slice, slice]:
    """Rows and columns of a part, counted from the corner of the whole."""
    top, left = part.row_off - whole.row_off, part.col_off - whole.col_off
    return slice(top, top + part.height), slice(left, left + part.width)

"""The light of a write window, counted so that the counts of a scene's windows add up to the same however it is cut."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from geoseg.model.description import BundleDescription
from geoseg.model.light import NUM_MEASURES, NUM_STEPS, count_light
from geoseg.predict.stitch import Stitching
from geoseg.raster.raster import Raster
from geoseg.raster.window import Window

_EVERY = 4  # of the work grid's rows and columns one in so many is counted


def window_light(
    around: Raster,
    valid_hw: npt.NDArray[np.bool_],
    stitching: Stitching,
    write: Window,
    description: BundleDescription,
    scale: tuple[float, float] | None,
) -> npt.NDArray[np.int64]:
    """Pixels (measure, band, step) as ``count_light`` has them, of a stack over all dates.

    ``around`` is the window's core with its margin on the work grid, ``valid_hw`` the write window's own validity. A pixel of
    the work grid belongs to the window in which its centre lies, and counts when the scene's pixel there is valid.
    """
    core = stitching.core(write)
    rows, at_rows = _owned(stitching, 0, core.row_off, core.row_end, write.row_off, write.row_end)
    cols, at_cols = _owned(stitching, 1, core.col_off, core.col_end, write.col_off, write.col_end)
    counts_hw = valid_hw[at_rows[:, None], at_cols[None, :]]
    rows, cols = rows + stitching.margin, cols + stitching.margin
    beside = np.minimum(cols + 1, around.pixels.shape[2] - 1)
    counted = np.zeros((NUM_MEASURES, len(description.bands), NUM_STEPS), np.int64)
    for one in around.dates():
        here_hw = counts_hw & one.valid[rows[:, None], cols[None, :]] & one.valid[rows[:, None], beside[None, :]]
        values, right = (one.pixels[:, rows[:, None], at[None, :]][:, here_hw] for at in (cols, beside))
        counted += count_light(values, right, description.value_range, scale)
    return counted


def _owned(
    stitching: Stitching, axis: int, start: int, end: int, first: int, last: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places, from a core's ``start``, of the work grid's pixels that belong to a write window; where they lie in the window."""
    scene, work = stitching.scene_shape[axis], stitching.work_shape[axis]
    places = np.arange(-(-start // _EVERY) * _EVERY, min(end, work), _EVERY, dtype=np.int64)
    centres = (2 * places + 1) * scene // (2 * work)
    inside = (first <= centres) & (centres < last)
    return places[inside] - start, centres[inside] - first

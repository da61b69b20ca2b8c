"""How much tiles that are blended disagree, close to their borders and further inside; counts that add up.

Each pixel is looked at twice, once for two tiles side by side and once for two above each other: in the middle half of both
along the border, so that nothing but the distance to it matters. Whoever writes a pixel counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geoseg.model.tiling import Tiling
from geoseg.predict.stitch import Stitching
from geoseg.raster.window import Window

_RIM = 8  # the part of an overlap that lies at the border of one of the two tiles, at either side


@dataclass(frozen=True, slots=True)
class Seams:
    """Valid pixels at which the classes of two tiles differ, of how many, at the rim of their overlap and inside."""

    rim_differ: int = 0
    rim_pixels: int = 0
    inside_differ: int = 0
    inside_pixels: int = 0

    def __add__(self, other: Seams) -> Seams:
        return Seams(*(mine + theirs for mine, theirs in zip(self.counts(), other.counts(), strict=True)))

    def counts(self) -> tuple[int, int, int, int]:
        """The four counts."""
        return self.rim_differ, self.rim_pixels, self.inside_differ, self.inside_pixels

    @property
    def at_rim(self) -> float:
        """Share of the pixels at the rim at which two tiles disagree."""
        return _share(self.rim_differ, self.rim_pixels)

    @property
    def inside(self) -> float:
        """The same of the pixels inside."""
        return _share(self.inside_differ, self.inside_pixels)

    @property
    def score(self) -> float:
        """How many times as often tiles disagree at their borders as inside; 1 where no border shows.

        Both shares are taken to be one pixel of all larger, so that a scene without any disagreement has a score too: 1.
        """
        one = 1 / max(1, self.rim_pixels + self.inside_pixels)
        return _short((self.at_rim + one) / (self.inside + one))


def _share(differ: int, pixels: int) -> float:
    return _short(differ / pixels) if pixels else 0.0


def _short(value: float) -> float:
    return float(f"{value:.6g}")  # an item is read by people too, and reads back as it was written


def count_seams(
    differ_ahw: npt.NDArray[np.bool_],
    tiling: Tiling,
    stitching: Stitching,
    core: Window,
    write: Window,
    valid_hw: npt.NDArray[np.bool_],
) -> Seams:
    """The counts of a write window.

    ``differ_ahw`` (axis, row, col) says for each pixel of the core on the work grid whether the tiles above each other (0)
    and side by side (1) disagree; ``valid_hw`` are the write window's own pixels, which look at the nearest of those.
    """
    rows = _nearest(stitching, 0, write.row_off, write.row_end)
    cols = _nearest(stitching, 1, write.col_off, write.col_end)
    seams = Seams()
    for axis, places in enumerate((rows, cols)):
        differ_hw = differ_ahw[axis][(rows - core.row_off)[:, None], (cols - core.col_off)[None, :]]
        along = places % tiling.step
        is_rim = np.minimum(along, tiling.step - 1 - along) < tiling.step // _RIM
        rim_hw = np.broadcast_to(is_rim[:, None] if axis == 0 else is_rim[None, :], valid_hw.shape)
        seams += Seams(
            int(np.count_nonzero(differ_hw & valid_hw & rim_hw)),
            int(np.count_nonzero(valid_hw & rim_hw)),
            int(np.count_nonzero(differ_hw & valid_hw & ~rim_hw)),
            int(np.count_nonzero(valid_hw & ~rim_hw)),
        )
    return seams


def _nearest(stitching: Stitching, axis: int, start: int, end: int) -> npt.NDArray[np.int64]:
    work, scene = stitching.work_shape[axis], stitching.scene_shape[axis]
    return (2 * np.arange(start, end, dtype=np.int64) + 1) * work // (2 * scene)


def held_back(scene_id: str, score: float | None, limit: float | None) -> str:
    """Why a scene is not published, or does not count as such: its score is above the limit; else nothing."""
    if score is None or limit is None or score <= limit:
        return ""
    return (
        f"{scene_id}: its tiles disagree {score:.3g} times as often at their borders as inside, {limit:g} is the most that "
        "--max-seam-score allows; take a larger --tile, or allow more"
    )


def sum_seams(counts: Sequence[Sequence[int]]) -> Seams:
    """The sum of counts that were told as numbers."""
    return sum((Seams(*one) for one in counts), Seams())

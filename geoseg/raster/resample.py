"""Reading a scene at another pixel size: which source pixels make a pixel, and with which weights.

Every output pixel is a function of its own absolute position: weights come from exact coordinates, sums run in a fixed
order, element by element. So a window of a resampled scene holds, bit for bit, what the whole resampled scene holds there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of ``num_in`` source pixels resampled to ``num_out`` pixels over the same extent."""

    num_in: int
    num_out: int

    @property
    def scale(self) -> float:
        """Source pixels per output pixel."""
        return self.num_in / self.num_out

    def taps(self, start: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Source indexes (tap, out) and weights (tap, out), summing to 1, of the output pixels ``start`` to ``end``.

        Going down, a pixel is the mean of the area it covers; going up, it is interpolated between the two source
        centres around its own; at the ends the last source pixel is repeated.
        """
        out = np.arange(start, end, dtype=np.int64)
        if self.num_in == self.num_out:
            return out[None, :], np.ones((1, len(out)), np.float32)
        if self.num_in > self.num_out:
            index, share = self.shares(start, end)
            weight = share / self.num_in
        else:
            centre = (2 * out + 1) * self.num_in - self.num_out  # in units of 1 / (2 * num_out) source pixels
            first = np.floor_divide(centre, 2 * self.num_out)
            upper = (centre - first * 2 * self.num_out) / (2 * self.num_out)
            index = np.stack([first, first + 1])
            weight = np.stack([1 - upper, upper])
        return np.clip(index, 0, self.num_in - 1), weight.astype(np.float32)

    def shares(self, start: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Source indexes (tap, out) and how much of each the output pixels ``start`` to ``end`` cover, in whole numbers.

        Going down, a source pixel counts ``num_out``, and an output pixel ``num_in`` in sum. Otherwise an output pixel is the
        one source pixel that its centre lies in.
        """
        out = np.arange(start, end, dtype=np.int64)
        if self.num_in <= self.num_out:
            nearest = (2 * out + 1) * self.num_in // (2 * self.num_out)
            return nearest[None, :], np.ones((1, len(out)), np.int64)
        first = out * self.num_in // self.num_out
        num_taps = -(-self.num_in // self.num_out) + 1
        index = first[None, :] + np.arange(num_taps, dtype=np.int64)[:, None]
        low = np.maximum(index * self.num_out, (out * self.num_in)[None, :])
        high = np.minimum((index + 1) * self.num_out, ((out + 1) * self.num_in)[None, :])
        return np.clip(index, 0, self.num_in - 1), np.maximum(high - low, 0)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The source pixels [first, last) that the output pixels ``start`` to ``end`` are made of."""
        index, _ = self.taps(start, end)
        return int(index.min()), int(index.max()) + 1


def resample(
    pixels: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    row_axis: Axis,
    col_axis: Axis,
    box: tuple[int, int, int, int],
    source_off: tuple[int, int],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Pixels (band, row, col) and validity of the output box (row_off, row_end, col_off, col_end).

    ``pixels`` and ``valid`` are the source from row and column ``source_off`` on. Invalid pixels have no say: an output
    pixel is the weighted mean of its valid ones, and valid itself when they weigh half or more. Whole-number dtypes are
    rounded, half to even.
    """
    rows, row_weights = row_axis.taps(box[0], box[1])
    cols, col_weights = col_axis.taps(box[2], box[3])
    weight = valid.astype(np.float32)
    values = np.where(valid, pixels, 0).astype(np.float32)
    values *= weight
    stacked = np.concatenate([values, weight[None]])
    stacked = _weighted(stacked, rows - source_off[0], row_weights[:, :, None], axis=1)
    stacked = _weighted(stacked, cols - source_off[1], col_weights, axis=2)
    share = stacked[-1]
    out_valid = share >= 0.5 - 1e-6
    mean = stacked[:-1] / np.where(out_valid, share, 1)
    if pixels.dtype.kind in "iu":
        limits = np.iinfo(pixels.dtype)
        mean = np.clip(np.rint(mean), limits.min, limits.max)
    return np.where(out_valid, mean, 0).astype(pixels.dtype), out_valid


def _weighted(
    values: npt.NDArray[np.float32],
    index: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
    *,
    axis: int,
) -> npt.NDArray[np.float32]:
    total: npt.NDArray[np.float32] = np.take(values, index[0], axis=axis) * weights[0]
    for tap, weight in zip(index[1:], weights[1:], strict=True):
        total += np.take(values, tap, axis=axis) * weight
    return total


def mirrored(start: int, end: int, size: int) -> npt.NDArray[np.int64]:
    """Indexes inside ``0 .. size - 1`` of the positions ``start`` to ``end``, mirrored at both ends without repeating it.

    The U-Net paper extrapolates the missing context at the border of an image this way (Ronneberger et al. 2015, fig. 2).
    """
    position = np.arange(start, end, dtype=np.int64)
    if size == 1:
        return np.zeros_like(position)
    period = 2 * (size - 1)
    folded = np.mod(position, period)
    return np.asarray(np.minimum(folded, period - folded))

"""A raster in memory: pixels, which of them count, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Raster:
    """Pixels (band, row, col) and ``valid`` (row, col), True = data; self-contained, so it may travel.

    Of a stack: the bands of one date after the other, and ``valid`` (date, row, col). Pixels that are not valid hold
    whatever the file held there.
    """

    pixels: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        dates = len(self.valid) if self.valid.ndim == 3 else 1
        if self.pixels.ndim != 3 or self.pixels.shape[1:] != self.valid.shape[-2:] or len(self.pixels) % dates:
            raise ValueError(
                f"pixels (band, row, col) and valid (row, col) differ: {self.pixels.shape} {self.valid.shape}"
            )

    @property
    def valid_at_all(self) -> npt.NDArray[np.bool_]:
        """Pixels (row, col) that are valid, of a stack at any date."""
        return np.asarray(self.valid.any(0)) if self.valid.ndim == 3 else self.valid

    @staticmethod
    def stacked(rasters: Sequence[Raster | None]) -> Raster:
        """A stack of one date after the other; None, a missing date, becomes pixels that are not valid."""
        one = next(raster for raster in rasters if raster is not None)
        pixels = [raster.pixels if raster else np.zeros_like(one.pixels) for raster in rasters]
        valid = [raster.valid if raster else np.zeros_like(one.valid) for raster in rasters]
        return Raster(np.concatenate(pixels), np.stack(valid))

    def dates(self) -> list[Raster]:
        """The rasters of a stack's dates; a raster that is no stack by itself."""
        if self.valid.ndim == 2:
            return [self]
        return [
            Raster(pixels, valid)
            for pixels, valid in zip(np.split(self.pixels, len(self.valid)), self.valid, strict=True)
        ]

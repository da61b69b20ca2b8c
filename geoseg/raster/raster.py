"""A raster in memory: pixels, which of them count, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Raster:
    """Pixels (band, row, col) and ``valid`` (row, col), True = data; self-contained, so it may travel.

    Pixels that are not valid hold whatever the file held there.
    """

    pixels: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[1:] != self.valid.shape:
            raise ValueError(
                f"pixels (band, row, col) and valid (row, col) differ: {self.pixels.shape} {self.valid.shape}"
            )

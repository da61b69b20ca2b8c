"""The chip index: how much of each class lies in each cell of a scene, counted once, so that chips are drawn without reading."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from geoseg.errors import StoreError
from geoseg.raster import store
from geoseg.raster.window import Window
from geoseg.train.codes import UNLABELLED

_WINDOW = 2048

_PARSING = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class CellTable:
    """The cells of a scene that hold labelled pixels.

    Cells are squares of ``side`` scene pixels, counted from the top left. ``places`` int64 (cell, 2) are their row and column,
    ``labelled`` int64 (cell,) their valid pixels with any label, ``of_class`` int64 (cell, class) those of each class.
    """

    side: int
    places: npt.NDArray[np.int64]
    labelled: npt.NDArray[np.int64]
    of_class: npt.NDArray[np.int64]

    def to_bytes(self) -> bytes:
        """The table as bytes (numpy's ``npz``)."""
        out = io.BytesIO()
        np.savez_compressed(out, side=self.side, places=self.places, labelled=self.labelled, of_class=self.of_class)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> CellTable:
        """The table that ``to_bytes`` wrote.

        One thread at a time: numpy reads headers by Python's parser, which in 3.11 counts its depth for all threads together
        and gives up with a SystemError when two meet (CPython issue 106905).
        """
        with _PARSING, np.load(io.BytesIO(data), allow_pickle=False) as held:
            return cls(int(held["side"]), held["places"], held["labelled"], held["of_class"])


def count_cells(
    shape: tuple[int, int],
    side: int,
    num_classes: int,
    read: Callable[[Window], tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]],
) -> CellTable:
    """The table of a scene of ``shape`` (row, col).

    ``read`` gives the label codes and the validity (row, col) of a window of the scene's own pixels.
    """
    places, labelled, of_class = [], [], []
    for window in _windows(shape, side):
        codes, valid = read(window)
        known = valid & (codes != UNLABELLED)
        if not known.any():
            continue
        rows, cols = np.arange(0, window.height, side), np.arange(0, window.width, side)
        counts = [_by_cell(known, rows, cols)]
        counts += [_by_cell(known & (codes == code), rows, cols) for code in range(num_classes)]
        row, col = np.nonzero(counts[0])
        places.append(np.stack([row + window.row_off // side, col + window.col_off // side], 1))
        labelled.append(counts[0][row, col])
        of_class.append(np.stack([one[row, col] for one in counts[1:]], 1))
    if not places:
        return CellTable(side, np.zeros((0, 2), np.int64), np.zeros(0, np.int64), np.zeros((0, num_classes), np.int64))
    return CellTable(side, np.concatenate(places), np.concatenate(labelled), np.concatenate(of_class))


def _windows(shape: tuple[int, int], side: int) -> Iterator[Window]:
    """Windows of whole cells."""
    step = max(1, _WINDOW // side) * side
    for row in range(0, shape[0], step):
        for col in range(0, shape[1], step):
            yield Window(col, row, min(step, shape[1] - col), min(step, shape[0] - row))


def _by_cell(
    inside: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    by_row = np.add.reduceat(inside, rows, axis=0, dtype=np.int64)
    return np.asarray(np.add.reduceat(by_row, cols, axis=1))


def kept_table(uri: str, count: Callable[[], CellTable]) -> CellTable:
    """The table kept under ``uri``; the first time it is counted and put there. Raises what ``count`` and the store raise."""
    if store.exists(uri):
        try:
            return CellTable.from_bytes(store.read(uri))
        except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
            raise StoreError(f"{store.redact(uri)}: is no chip index ({error}); remove it and run again") from error
    table = count()
    store.write(uri, table.to_bytes())
    return table

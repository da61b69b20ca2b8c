"""Rasters of classes in patches, the COG that one process makes of them, and the same from parts in a store."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from rasterio import Affine
from rasterio.crs import CRS

from geoseg.raster import store
from geoseg.raster.cog import CogAssembler, CogProfile, encode_window, pack_blocks
from geoseg.raster.grid import Grid
from geoseg.raster.splice import PartNames, SplicedCog, SplicedFile, in_turn
from geoseg.raster.window import WindowSet, plan_windows

UTM = CRS.from_epsg(25832)
AFFINE = Affine(0.6, 0, 350_000.3, 0, -0.6, 5_600_000.7)
COLORS = ((0, 0, 0), (230, 85, 60), (250, 200, 60))


def profile(num_bands: int) -> CogProfile:
    return CogProfile(
        num_bands=num_bands,
        colors=COLORS if num_bands == 1 else None,
        tags=(("CLASS_0", "background"),) if num_bands == 1 else (),
        band_names=tuple(f"class {band}" for band in range(num_bands)),
        scale=None if num_bands == 1 else 1 / 254,
    )


def grid(height: int, width: int) -> Grid:
    return Grid(UTM.to_wkt(), tuple(AFFINE)[:6], height, width)


def blobs(num_bands: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Class codes in patches, the upper left third without data."""
    coarse = np.random.default_rng(0).integers(0, 3, (num_bands, height // 64 + 1, width // 64 + 1), dtype=np.uint8)
    pixels = coarse.repeat(64, 1).repeat(64, 2)[:, :height, :width].copy()
    pixels[:, : height // 2, : width // 3] = 255
    return pixels


def write_parts(pixels: npt.NDArray[np.uint8], names: PartNames) -> tuple[bytes, dict[str, str]]:
    """Store the parts of pixels (band, row, col); the file that one process makes of them, and its sums."""
    num_bands, height, width = pixels.shape
    with CogAssembler(grid(height, width), profile(num_bands)) as assembler:
        for window in plan_windows(height, width, names.window):
            part = pixels[:, window.row_off : window.row_end, window.col_off : window.col_end]
            blocks = encode_window(part, window, names.window)
            place = window.row_off // names.window, window.col_off // names.window
            store.write(names.of_window(*place), pack_blocks({}, blocks))
            assembler.add(blocks)
        assembler.make_overviews(names.window)
        file = assembler.finish()
        return b"".join(file.chunks()), file.sums()


def splice(shape: tuple[int, ...], names: PartNames, *, only: list[tuple[int, int]] | None = None) -> SplicedFile:
    """The file of a raster (band, row, col), ready to be written, from its parts: all, or those at some places (row, col)."""
    num_bands, height, width = shape
    windows = WindowSet()
    for window in plan_windows(height, width, names.window):
        if only is None or (window.row_off // names.window, window.col_off // names.window) in only:
            windows.add(window.row_off, window.col_off)
    spliced = SplicedCog(grid(height, width), profile(num_bands), names)
    assert sum(spliced.gather(windows, len, in_turn)) == len(windows)
    return spliced.finish()

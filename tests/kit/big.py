"""Scenes far larger than their files: one stored block stands for all, or most blocks are not stored at all."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.io import MemoryFile

from geoseg.raster import tiff
from geoseg.raster.window import BLOCK
from kit.oracle import AFFINE, UTM


def write_repeated(path: Path, block: npt.NDArray[np.uint8], side: int) -> Path:
    """A GeoTIFF of ``side`` x ``side`` pixels in which each block is ``block`` (band, 512, 512), stored once.

    To a reader it is a dense scene: every block is fetched by its range and decoded.
    """
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=BLOCK, height=BLOCK, count=block.shape[0], dtype="uint8", crs=UTM, transform=AFFINE,
            tiled=True, blockxsize=BLOCK, blockysize=BLOCK, compress="deflate", interleave="pixel",
            photometric="rgb" if block.shape[0] == 3 else "minisblack", BIGTIFF="NO",
        ) as dataset:  # fmt: skip
            dataset.write(block)
        data = bytes(memory.getbuffer())
    directory = tiff.read_directories(lambda start, end: data[start:end], len(data))[0]
    start, size = directory.number(tiff.TILE_OFFSETS), directory.number(tiff.TILE_BYTES)
    body, num = data[start : start + size], (side // BLOCK) ** 2
    entries = dict(directory.entries)
    entries[tiff.WIDTH] = entries[tiff.HEIGHT] = tiff.Entry(4, 1, struct.pack("<I", side))
    entries[tiff.TILE_OFFSETS] = tiff.Entry(4, num, np.full(num, 8, "<u4").tobytes())
    entries[tiff.TILE_BYTES] = tiff.Entry(4, num, np.full(num, size, "<u4").tobytes())
    at = 8 + size + size % 2
    table, _ = tiff.write_directories([entries], at, big=False)
    path.write_bytes((struct.pack("<2sHI", b"II", 42, at) + body).ljust(at, b"\0") + table)
    return path


def write_sparse(path: Path, block: npt.NDArray[np.uint8], side: int, places: list[tuple[int, int]]) -> Path:
    """A sparse GeoTIFF of ``side`` x ``side`` pixels with ``block`` at the given (row, col) of the block grid alone."""
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=block.shape[0], dtype="uint8", crs=UTM,
        transform=AFFINE, tiled=True, blockxsize=BLOCK, blockysize=BLOCK, compress="deflate", interleave="pixel",
        photometric="rgb" if block.shape[0] == 3 else "minisblack", BIGTIFF="YES", SPARSE_OK=True, nodata=0,
    ) as dataset:  # fmt: skip
        for row, col in places:
            dataset.write(block, window=rasterio.windows.Window(col * BLOCK, row * BLOCK, BLOCK, BLOCK))
    return path

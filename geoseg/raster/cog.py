"""Mask blocks in, one Cloud-Optimized GeoTIFF with overviews out, in flat memory.

A window encodes its own blocks and those of the first overviews; ``CogAssembler`` collects the encoded blocks of a scene,
makes the remaining overviews and gives the file as a stream of bytes. A block that is all nodata is not stored, so the
file is as sparse as the scene. Layout: header, directories, overviews from the smallest to the largest, full size last
(GDAL calls this layout IFDS_BEFORE_DATA).
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile
from typing_extensions import Self

from geoseg.raster import tiff
from geoseg.raster.grid import Grid
from geoseg.raster.window import BLOCK, Window

NODATA = 255
_DEFLATE_LEVEL = 6
_SPOOL_BYTES = 1 << 20
_CLASSIC_LIMIT = 4_000_000_000
_PIECE = 1 << 20
_GHOST = b"LAYOUT=IFDS_BEFORE_DATA\nBLOCK_ORDER=ROW_MAJOR\nKNOWN_INCOMPATIBLE_EDITION=NO\n "
_OF_THE_FULL_IMAGE_ONLY = (33550, 33922, 34264, 34735, 34736, 34737, 42112, tiff.SUBFILE, 306, 305, 270)

Block = tuple[int, int, int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class CogProfile:
    """What a COG says beside its pixels: number of uint8 bands, colours by value, texts, and names of bands."""

    num_bands: int
    colors: tuple[tuple[int, int, int], ...] | None
    tags: tuple[tuple[str, str], ...]
    band_names: tuple[str, ...]
    scale: float | None


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of the full image and its overviews: halves, rounded up, until one block holds all.

    A raster one pixel wide cannot be halved and ends there.
    """
    sizes = [(height, width)]
    while max(sizes[-1]) > BLOCK and min(sizes[-1]) > 1:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def encode_window(pixels: npt.NDArray[np.uint8], window: Window, size: int) -> list[Block]:
    """The encoded blocks (level, row, col, bytes) of a write window, blocks without data left out.

    ``pixels`` are (band, row, col) of the window; ``size`` is the window size of the plan, 512 * 2^k, so that the blocks
    of the levels 0 to k lie in this window alone. Overviews take every second pixel (nearest), as classes want.
    """
    blocks: list[Block] = []
    level = 0
    while True:
        row0, col0 = window.row_off // (BLOCK << level), window.col_off // (BLOCK << level)
        for row in range(0, pixels.shape[1], BLOCK):
            for col in range(0, pixels.shape[2], BLOCK):
                body = encode_block(pixels[:, row : row + BLOCK, col : col + BLOCK])
                if body:
                    blocks.append((level, row0 + row // BLOCK, col0 + col // BLOCK, body))
        if BLOCK << level >= size:
            return blocks
        level += 1
        pixels = pixels[:, ::2, ::2]


def encode_block(pixels: npt.NDArray[np.uint8], size: int = BLOCK) -> bytes:
    """One block as a DEFLATE stream, padded with nodata to ``size`` x ``size``; nothing when it is all nodata.

    The same pixels give the same bytes: one codec, one level, one thread.
    """
    if (pixels == NODATA).all():
        return b""
    block = np.full((size, size, pixels.shape[0]), NODATA, np.uint8)
    block[: pixels.shape[1], : pixels.shape[2]] = pixels.transpose(1, 2, 0)
    return zlib.compress(block.tobytes(), _DEFLATE_LEVEL)


def decode_block(body: bytes, num_bands: int) -> npt.NDArray[np.uint8]:
    """Pixels (band, 512, 512) of an encoded block."""
    return np.frombuffer(zlib.decompress(body), np.uint8).reshape(BLOCK, BLOCK, num_bands).transpose(2, 0, 1)


def decode_window(blocks: list[Block], window: Window, num_bands: int) -> npt.NDArray[np.uint8]:
    """Pixels (band, row, col) of a write window from the blocks that ``encode_window`` made of it."""
    pixels = np.full((num_bands, window.height, window.width), NODATA, np.uint8)
    for level, row, col, body in blocks:
        if level == 0:
            top, left = row * BLOCK - window.row_off, col * BLOCK - window.col_off
            part = pixels[:, top : top + BLOCK, left : left + BLOCK]
            part[:] = decode_block(body, num_bands)[:, : part.shape[1], : part.shape[2]]
    return pixels


def pack_blocks(header: dict[str, Any], blocks: list[Block]) -> bytes:
    """Encoded blocks and a JSON header as one self-describing run of bytes."""
    table = [[level, row, col, len(body)] for level, row, col, body in blocks]
    text = json.dumps({**header, "blocks": table}, separators=(",", ":"), sort_keys=True).encode()
    return b"".join([b"GSB1", struct.pack("<I", len(text)), text, *(body for *_, body in blocks)])


def unpack_blocks(data: bytes) -> tuple[dict[str, Any], list[Block]]:
    """What ``pack_blocks`` packed. Raises ValueError when the bytes are damaged or cut short."""
    if data[:4] != b"GSB1" or len(data) < 8:
        raise ValueError("not a run of blocks")
    at = 8 + struct.unpack("<I", data[4:8])[0]
    header = json.loads(data[8:at])
    blocks: list[Block] = []
    for level, row, col, size in header.pop("blocks"):
        blocks.append((level, row, col, data[at : at + size]))
        at += size
    if at != len(data):
        raise ValueError(f"a run of blocks should have {at} bytes, it has {len(data)}")
    return header, blocks


class CogAssembler:
    """Collects a scene's encoded blocks on disk (their compressed size) and streams the finished file.

    Memory holds 16 bytes per block and a handful of decoded blocks, whatever the size of the scene. Use it as a context
    manager; the temporary file goes with it.
    """

    def __init__(self, grid: Grid, profile: CogProfile) -> None:
        self.grid, self.profile = grid, profile
        self.sizes = level_sizes(grid.height, grid.width)
        shapes = [(-(-height // BLOCK), -(-width // BLOCK)) for height, width in self.sizes]
        self.counts = [np.zeros(shape, np.uint32) for shape in shapes]
        self._places = [np.zeros(shape, np.uint64) for shape in shapes]
        self.block_sizes = [BLOCK] * len(shapes)
        self._spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, prefix="geoseg-")  # noqa: SIM115
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, blocks: list[Block]) -> None:
        """Take encoded blocks; the same block twice keeps the last."""
        self._spool.seek(self._end)
        for level, row, col, body in blocks:
            if level >= len(self.sizes):
                continue
            self._spool.write(body)
            self._places[level][row, col] = self._end
            self.counts[level][row, col] = len(body)
            self._end += len(body)

    def body(self, level: int, row: int, col: int) -> bytes:
        """Return the encoded bytes of a block, none when it is not stored."""
        self._spool.seek(int(self._places[level][row, col]))
        return self._spool.read(int(self.counts[level][row, col]))

    def make_overviews(self, window_size: int) -> None:
        """Make the levels that windows of ``window_size`` did not bring, from those they did."""
        start = (window_size // BLOCK).bit_length() - 1
        top = len(self.sizes) - 1
        if start < top:
            for row, col in np.ndindex(self.counts[top].shape):
                self._overview(top, row, col, start)

    def _overview(self, level: int, row: int, col: int, start: int) -> npt.NDArray[np.uint8] | None:
        """Pixels of a block, made from its four children (depth first, so few are held); None when there is no data."""
        rows, cols = self.counts[level].shape
        if row >= rows or col >= cols:
            return None
        if level == start:
            return (
                decode_block(self.body(level, row, col), self.profile.num_bands)
                if self.counts[level][row, col]
                else None
            )
        pixels: npt.NDArray[np.uint8] | None = None
        half = BLOCK // 2
        for down in (0, 1):
            for across in (0, 1):
                child = self._overview(level - 1, 2 * row + down, 2 * col + across, start)
                if child is not None:
                    if pixels is None:
                        pixels = np.full((self.profile.num_bands, BLOCK, BLOCK), NODATA, np.uint8)
                    pixels[:, down * half : (down + 1) * half, across * half : (across + 1) * half] = child[:, ::2, ::2]
        if pixels is not None:
            body = encode_block(pixels)
            if body:
                self.add([(level, row, col, body)])
        return pixels

    def top_pixels(self) -> npt.NDArray[np.uint8]:
        """Pixels (band, row, col) of the smallest level; 512 a side at most, but for a raster one pixel wide."""
        height, width = self.sizes[-1]
        pixels = np.full((self.profile.num_bands, height, width), NODATA, np.uint8)
        for row, col in np.argwhere(self.counts[-1] > 0).tolist():
            block = decode_block(self.body(len(self.sizes) - 1, row, col), self.profile.num_bands)
            part = pixels[:, row * BLOCK : (row + 1) * BLOCK, col * BLOCK : (col + 1) * BLOCK]
            part[:] = block[:, : part.shape[1], : part.shape[2]]
        return pixels

    def finish(self) -> CogFile:
        """Fix the layout; the blocks must all be in, and nothing else may be asked of the assembler afterwards."""
        for level, (_, width) in enumerate(self.sizes):
            if width == BLOCK:
                self._halve_blocks(level)
        return CogFile(self)

    def _halve_blocks(self, level: int) -> None:
        """Cut a level's blocks in four: readers take a raster for untiled whose blocks are exactly as wide as it is."""
        half, counts, places = BLOCK // 2, self.counts[level], self._places[level]
        shape = (-(-self.sizes[level][0] // half), 2)
        whole = [(row, col, self.body(level, row, col)) for row, col in np.argwhere(counts > 0).tolist()]
        self.counts[level], self._places[level] = np.zeros(shape, counts.dtype), np.zeros(shape, places.dtype)
        self.block_sizes[level] = half
        for row, col, body in whole:
            pixels = decode_block(body, self.profile.num_bands)
            for down, across in np.ndindex(2, 2):
                part = pixels[:, down * half : (down + 1) * half, across * half : (across + 1) * half]
                quarter = encode_block(part, half)
                if quarter:
                    self.add([(level, 2 * row + down, 2 * col + across, quarter)])


class CogFile:
    """A finished COG that is not in memory: its size, its SHA-256, and its bytes as often as they are asked for."""

    def __init__(self, assembler: CogAssembler) -> None:
        self._assembler = assembler
        data_bytes = sum(int(counts.sum(dtype=np.uint64)) for counts in assembler.counts)
        blocks = sum(counts.size for counts in assembler.counts)
        self._header = _header(assembler, big=data_bytes + 16 * blocks + (1 << 20) > _CLASSIC_LIMIT)
        self.size = len(self._header) + data_bytes
        digest = hashlib.sha256()
        for piece in self.chunks():
            digest.update(piece)
        self.sha256 = digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The file's bytes in order, about a MiB at a time."""
        yield self._header
        held: list[bytes] = []
        size = 0
        for level in reversed(range(len(self._assembler.sizes))):
            for row, col in np.argwhere(self._assembler.counts[level] > 0).tolist():
                held.append(self._assembler.body(level, row, col))
                size += len(held[-1])
                if size >= _PIECE:
                    yield b"".join(held)
                    held, size = [], 0
        yield b"".join(held)


def _header(assembler: CogAssembler, *, big: bool) -> bytes:
    """Everything before the first block: signature, ghost area, directories and their values."""
    template = _template(assembler.grid, assembler.profile)
    number = 16 if big else 4
    directories: list[dict[int, tiff.Entry]] = []
    for level, (height, width) in enumerate(assembler.sizes):
        entries = {t: e for t, e in template.items() if level == 0 or t not in _OF_THE_FULL_IMAGE_ONLY}
        entries[tiff.SUBFILE] = tiff.Entry(4, 1, struct.pack("<I", 1 if level else 0))
        entries[tiff.WIDTH] = tiff.Entry(4, 1, struct.pack("<I", width))
        entries[tiff.HEIGHT] = tiff.Entry(4, 1, struct.pack("<I", height))
        side = struct.pack("<I", assembler.block_sizes[level])
        entries[tiff.TILE_WIDTH] = entries[tiff.TILE_HEIGHT] = tiff.Entry(4, 1, side)
        counts = assembler.counts[level]
        entries[tiff.TILE_BYTES] = tiff.Entry(4, counts.size, counts.astype("<u4").tobytes())
        entries[tiff.TILE_OFFSETS] = tiff.Entry(number, counts.size, bytes(counts.size * (8 if big else 4)))
        directories.append(entries)
    ghost = f"GDAL_STRUCTURAL_METADATA_SIZE={len(_GHOST):06d} bytes\n".encode() + _GHOST
    start = (16 if big else 8) + len(ghost)
    start += start % 2
    # First pass: sizes alone, which say where the blocks begin; second: the offsets that follow from it.
    end = tiff.write_directories(directories, start, big=big)[1]
    for level in reversed(range(len(directories))):
        counts = assembler.counts[level].astype(np.uint64)
        ends = np.cumsum(counts.ravel(), dtype=np.uint64) + np.uint64(end)
        offsets = np.where(counts.ravel() > 0, ends - counts.ravel(), 0)
        end = int(ends[-1])
        entry = directories[level][tiff.TILE_OFFSETS]
        raw = offsets.astype("<u8" if big else "<u4").tobytes()
        directories[level][tiff.TILE_OFFSETS] = tiff.Entry(entry.kind, entry.count, raw)
    body, _ = tiff.write_directories(directories, start, big=big)
    signature = struct.pack("<2sHHHQ", b"II", 43, 8, 0, start) if big else struct.pack("<2sHI", b"II", 42, start)
    return (signature + ghost).ljust(start, b"\0") + body


def _template(grid: Grid, profile: CogProfile) -> dict[int, tiff.Entry]:
    """The fields of a one-block GeoTIFF that GDAL writes with this place and profile: all georeferencing is GDAL's."""
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            width=BLOCK,
            height=BLOCK,
            count=profile.num_bands,
            dtype="uint8",
            crs=grid.crs,
            transform=grid.affine,
            nodata=NODATA,
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            compress="deflate",
            interleave="pixel",
            photometric="palette" if profile.colors else "minisblack",
            BIGTIFF="NO",
            SPARSE_OK=True,
            ENDIANNESS="LITTLE",
        ) as dataset:
            if profile.colors:
                dataset.write_colormap(1, {value: (*color, 255) for value, color in enumerate(profile.colors)})
            else:
                dataset.colorinterp = [ColorInterp.gray, *[ColorInterp.undefined] * (profile.num_bands - 1)]
            dataset.update_tags(**dict(profile.tags))
            for band, name in enumerate(profile.band_names, start=1):
                dataset.set_band_description(band, name)
            if profile.scale is not None:
                dataset.scales = [profile.scale] * profile.num_bands
                dataset.offsets = [0.0] * profile.num_bands
        data = bytes(memory.getbuffer())
    directory = tiff.read_directories(lambda start, end: data[start:end], len(data))[0]
    return dict(directory.entries)

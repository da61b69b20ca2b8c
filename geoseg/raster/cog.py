"""Mask blocks in, one Cloud-Optimized GeoTIFF with overviews out, in flat memory.

A window encodes its own blocks and those of the first overviews; ``CogAssembler`` collects the encoded blocks of a scene,
makes the remaining overviews and gives the file as a stream of bytes; ``geoseg.raster.splice`` does the same for files that
are too large for one process. A block that is all nodata is not stored, so the file is as sparse as the scene. Layout:
header, directories, overviews from the smallest to the largest, full size last (GDAL calls this layout IFDS_BEFORE_DATA).
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile
from typing_extensions import Self

from geoseg.errors import SceneReadError
from geoseg.raster import tiff
from geoseg.raster.grid import Grid
from geoseg.raster.window import BLOCK, Window

NODATA = 255
PIECE_BYTES = 32 << 20  # files up to it are handled whole; it decides what a file is named by, so it is no setting
_DEFLATE_LEVEL = 6
_SPOOL_BYTES = 1 << 20
_CLASSIC_LIMIT = 4_000_000_000
_CHUNK = 1 << 20
_FETCH_BYTES = 8 << 20
_MAGIC = b"GSB2"
_PART_START = struct.Struct("<4sII")
_TABLE = np.dtype([("level", "u1"), ("row", "<u4"), ("col", "<u4"), ("size", "<u4"), ("sha256", "u1", (32,))])
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


def window_level(size: int) -> int:
    """The highest level of which windows of ``size`` pixels, 512 * 2^k, hold whole blocks: k."""
    return (size // BLOCK).bit_length() - 1


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
        if level == window_level(size):
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
    """Encoded blocks and a JSON header as one self-describing run of bytes, the blocks of the highest level first.

    Before the blocks stands a table of them, with the SHA-256 of each; whoever knows the tables knows the layout of a file.
    """
    blocks = sorted(blocks, key=lambda block: -block[0])
    table = np.zeros(len(blocks), _TABLE)
    for place, (level, row, col, body) in enumerate(blocks):
        told = table[place]
        told["level"], told["row"], told["col"], told["size"] = level, row, col, len(body)
        told["sha256"] = np.frombuffer(hashlib.sha256(body).digest(), np.uint8)
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    start = _PART_START.pack(_MAGIC, len(text), len(blocks))
    return b"".join([start, text, table.tobytes(), *(body for *_, body in blocks)])


def head_size(start: bytes) -> int:
    """How many bytes of a run of blocks come before the blocks, from its first 12. Raises ValueError when they are others."""
    if start[:4] != _MAGIC or len(start) < _PART_START.size:
        raise ValueError("not a run of blocks")
    _, text_size, num_blocks = _PART_START.unpack_from(start)
    return _PART_START.size + int(text_size) + int(num_blocks) * _TABLE.itemsize


def unpack_head(head: bytes, size: int) -> tuple[dict[str, Any], npt.NDArray[Any]]:
    """The JSON header of a run of ``size`` bytes and the table of its blocks, from the bytes before these.

    The table has the fields level, row, col, size, and sha256 (32 numbers). Raises ValueError when it is damaged.
    """
    _, text_size, num_blocks = _PART_START.unpack_from(head)
    end = _PART_START.size + text_size
    header = json.loads(head[_PART_START.size : end])
    table = np.frombuffer(head, _TABLE, num_blocks, end)
    told = head_size(head) + int(table["size"].sum(dtype=np.uint64))
    if told != size:
        raise ValueError(f"a run of blocks should have {told} bytes, it has {size}")
    return header, table


def unpack_blocks(data: bytes) -> tuple[dict[str, Any], list[Block]]:
    """What ``pack_blocks`` packed. Raises ValueError when the bytes are damaged or cut short."""
    at = head_size(data)
    header, table = unpack_head(data[:at], len(data))
    blocks: list[Block] = []
    for told in table:
        body = data[at : at + int(told["size"])]
        if hashlib.sha256(body).digest() != told["sha256"].tobytes():
            raise ValueError("a run of blocks has other bytes than its table says")
        blocks.append((int(told["level"]), int(told["row"]), int(told["col"]), body))
        at += len(body)
    return header, blocks


class Pyramid(ABC):
    """The blocks of a raster at all its levels, wherever their bytes lie; it can make higher levels from lower ones."""

    def __init__(self, grid: Grid, profile: CogProfile) -> None:
        self.grid, self.profile = grid, profile
        self.sizes = level_sizes(grid.height, grid.width)
        self.block_sizes = [BLOCK] * len(self.sizes)

    @abstractmethod
    def body(self, level: int, row: int, col: int) -> bytes:
        """Return the encoded bytes of a block, none when it is not stored."""

    @abstractmethod
    def add(self, blocks: list[Block]) -> None:
        """Take encoded blocks; the same block twice keeps the last."""

    def shape(self, level: int) -> tuple[int, int]:
        """Rows and columns of the blocks of a level."""
        height, width = self.sizes[level]
        side = self.block_sizes[level]
        return -(-height // side), -(-width // side)

    def make_overviews(self, window_size: int) -> None:
        """Make the levels that windows of ``window_size`` did not bring, from those they did."""
        start, top = window_level(window_size), len(self.sizes) - 1
        if start < top:
            for row, col in np.ndindex(self.shape(top)):
                self.make_overview(top, row, col, start)

    def make_overview(self, level: int, row: int, col: int, start: int) -> npt.NDArray[np.uint8] | None:
        """Make a block and those below it down to level ``start``, which is there: its pixels, None when there are none.

        It goes depth first, so that few blocks are held.
        """
        rows, cols = self.shape(level)
        if row >= rows or col >= cols:
            return None
        if level == start:
            body = self.body(level, row, col)
            return decode_block(body, self.profile.num_bands) if body else None
        pixels: npt.NDArray[np.uint8] | None = None
        half = BLOCK // 2
        for down in (0, 1):
            for across in (0, 1):
                child = self.make_overview(level - 1, 2 * row + down, 2 * col + across, start)
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
        for row, col in np.ndindex(self.shape(len(self.sizes) - 1)):
            body = self.body(len(self.sizes) - 1, row, col)
            if body:
                part = pixels[:, row * BLOCK : (row + 1) * BLOCK, col * BLOCK : (col + 1) * BLOCK]
                part[:] = decode_block(body, self.profile.num_bands)[:, : part.shape[1], : part.shape[2]]
        return pixels

    def quarters(self, level: int) -> Iterator[Block]:
        """The blocks of a level cut in four, those without data left out."""
        half = BLOCK // 2
        for row, col in np.ndindex(self.shape(level)):
            body = self.body(level, row, col)
            if not body:
                continue
            pixels = decode_block(body, self.profile.num_bands)
            for down, across in np.ndindex(2, 2):
                part = pixels[:, down * half : (down + 1) * half, across * half : (across + 1) * half]
                quarter = encode_block(part, half)
                if quarter:
                    yield level, 2 * row + down, 2 * col + across, quarter

    def levels_to_halve(self) -> Iterator[int]:
        """Those whose blocks are as wide as they are: readers take such a raster for untiled, so their blocks are cut in four."""
        return (level for level, (_, width) in enumerate(self.sizes) if width == BLOCK)


class CogAssembler(Pyramid):
    """Collects a scene's encoded blocks on disk (their compressed size) and streams the finished file.

    Memory holds 16 bytes per block and a handful of decoded blocks, whatever the size of the scene. Use it as a context
    manager; the temporary file goes with it.
    """

    def __init__(self, grid: Grid, profile: CogProfile) -> None:
        super().__init__(grid, profile)
        self.counts = [np.zeros(self.shape(level), np.uint32) for level in range(len(self.sizes))]
        self._places = [np.zeros(self.shape(level), np.uint64) for level in range(len(self.sizes))]
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

    def finish(self) -> CogFile:
        """Fix the layout; the blocks must all be in, and nothing else may be asked of the assembler afterwards."""
        for level in self.levels_to_halve():
            whole = list(self.quarters(level))
            self.block_sizes[level] //= 2
            self.counts[level] = np.zeros(self.shape(level), np.uint32)
            self._places[level] = np.zeros(self.shape(level), np.uint64)
            self.add(whole)
        return CogFile(self)


class CogFile:
    """A finished COG that is not in memory: its size, its sum, and its bytes as often as they are asked for."""

    def __init__(self, assembler: CogAssembler) -> None:
        self._assembler = assembler
        self._header = cog_header(assembler, assembler.counts)
        self.size = len(self._header) + sum(int(counts.sum(dtype=np.uint64)) for counts in assembler.counts)

    def sums(self) -> dict[str, str]:
        """What the file is named by: ``sha256`` of its bytes up to 32 MiB, else ``blocks_sha256`` (see ``blocks_sum``)."""
        if self.size > PIECE_BYTES:
            digests = (hashlib.sha256(body).digest() for body in self._bodies())
            return {"blocks_sha256": blocks_sum(self._header, digests)}
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return {"sha256": digest.hexdigest()}

    def chunks(self) -> Iterator[bytes]:
        """The file's bytes in order, about a MiB at a time."""
        yield self._header
        held: list[bytes] = []
        size = 0
        for body in self._bodies():
            held.append(body)
            size += len(body)
            if size >= _CHUNK:
                yield b"".join(held)
                held, size = [], 0
        yield b"".join(held)

    def _bodies(self) -> Iterator[bytes]:
        for level in reversed(range(len(self._assembler.sizes))):
            for row, col in np.argwhere(self._assembler.counts[level] > 0).tolist():
                yield self._assembler.body(level, row, col)


def blocks_sum(header: bytes, digests: Iterable[bytes]) -> str:
    """SHA-256 (hex) over that of what stands before the first block, and those of the blocks, in the order of the file.

    A SHA-256 of a whole file has to be taken from its first byte to its last, by one process. This one says as much about
    the bytes, follows from the blocks whoever made them, and is known before the file is put together, as its name must be.
    """
    digest = hashlib.sha256(hashlib.sha256(header).digest())
    for one in digests:
        digest.update(one)
    return digest.hexdigest()


def read_blocks_sum(fetch: tiff.Fetch, size: int) -> str:
    """The ``blocks_sum`` of a file of ``size`` bytes; ``fetch(start, end)`` gives its bytes. Memory holds 24 bytes a block.

    Raises SceneReadError and NotGeoTiffError when it is damaged in such a way that its blocks are not where they should be.
    """
    places = []
    for directory in tiff.read_directories(fetch, size):
        index = tiff.block_index(directory, size)
        there = index.counts > 0
        places.append(np.stack([index.offsets[there], index.counts[there]], axis=1))
    blocks = np.concatenate(places)
    blocks = blocks[np.argsort(blocks[:, 0], kind="stable")]
    bounds = np.append(blocks[:, 0], size)
    if not (bounds[:-1] + blocks[:, 1] == bounds[1:]).all():
        raise SceneReadError("its blocks do not follow each other")

    def digests() -> Iterator[bytes]:
        first = 0
        while first < len(blocks):
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _FETCH_BYTES, side="right")) - 1)
            data = memoryview(fetch(int(bounds[first]), int(bounds[last])))
            for one in range(first, last):
                start = int(bounds[one] - bounds[first])
                yield hashlib.sha256(data[start : start + int(blocks[one, 1])]).digest()
            first = last

    return blocks_sum(fetch(0, int(bounds[0])), digests())


def cog_header(pyramid: Pyramid, counts_by_level: list[npt.NDArray[np.uint32]]) -> bytes:
    """Everything before the first block: signature, ghost area, directories and their values.

    It follows from the sizes of the blocks in bytes, ``counts_by_level`` (row, col), 0 for those that are not stored.
    """
    data_bytes = sum(int(counts.sum(dtype=np.uint64)) for counts in counts_by_level)
    big = data_bytes + 16 * sum(counts.size for counts in counts_by_level) + (1 << 20) > _CLASSIC_LIMIT
    template = _template(pyramid.grid, pyramid.profile)
    number = 16 if big else 4
    directories: list[dict[int, tiff.Entry]] = []
    for level, (height, width) in enumerate(pyramid.sizes):
        entries = {t: e for t, e in template.items() if level == 0 or t not in _OF_THE_FULL_IMAGE_ONLY}
        entries[tiff.SUBFILE] = tiff.Entry(4, 1, struct.pack("<I", 1 if level else 0))
        entries[tiff.WIDTH] = tiff.Entry(4, 1, struct.pack("<I", width))
        entries[tiff.HEIGHT] = tiff.Entry(4, 1, struct.pack("<I", height))
        side = struct.pack("<I", pyramid.block_sizes[level])
        entries[tiff.TILE_WIDTH] = entries[tiff.TILE_HEIGHT] = tiff.Entry(4, 1, side)
        counts = counts_by_level[level]
        entries[tiff.TILE_BYTES] = tiff.Entry(4, counts.size, counts.astype("<u4").tobytes())
        entries[tiff.TILE_OFFSETS] = tiff.Entry(number, counts.size, bytes(counts.size * (8 if big else 4)))
        directories.append(entries)
    ghost = f"GDAL_STRUCTURAL_METADATA_SIZE={len(_GHOST):06d} bytes\n".encode() + _GHOST
    start = (16 if big else 8) + len(ghost)
    start += start % 2
    # First pass: sizes alone, which say where the blocks begin; second: the offsets that follow from it.
    end = tiff.write_directories(directories, start, big=big)[1]
    for level in reversed(range(len(directories))):
        counts = counts_by_level[level].astype(np.uint64)
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

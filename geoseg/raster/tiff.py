"""The structure of a TIFF file without its pixels: directories, and where each block's bytes lie.

TIFF revision 6.0 (Adobe, 1992) and BigTIFF (Aware Systems). GDAL decodes; this module only says which bytes it will want.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geoseg.errors import NotGeoTiffError, SceneReadError, SceneTooCostlyError

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 277, 278, 279, 284
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, SUBFILE, OLD_SUBFILE = 322, 323, 324, 325, 254, 255
FORMAT, _PIXEL_SCALE, _TIE_POINT = 339, 33550, 33922

_SIZE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NUMBER = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_DECODED_BITS = (8, 16, 32, 64, 128)
_IS_FLOAT = 3  # of FORMAT
MAX_DIRECTORIES = 64
_MAX_ENTRIES = 1024
# What decoding depends on: fill order, orientation, predictor, colours, extra samples, tables of JPEG, fax, LERC.
_DECODING = frozenset(
    {BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, ROWS_PER_STRIP, PLANAR, TILE_WIDTH, TILE_HEIGHT, FORMAT}
    | {266, 274, 292, 293, 317, 320, 338, 347, 529, 530, 531, 532, 50674}
)
_MAX_VALUE_BYTES = 128 << 20  # of 8 bytes for each block: 1,000,000 x 1,000,000 pixels in blocks of 256
_MAX_FIELDS_BYTES = 256 << 20
_SHARED_BYTES = 1 << 20
_SPARE_BYTES = 64 << 10
_SHARED = "its fields claim more bytes than the file has, they share them; rewrite it with gdal_translate -of COG"
_TOO_MUCH = (
    f"its fields take more than {_MAX_FIELDS_BYTES >> 20} MiB without a pixel; rewrite it with gdal_translate -of COG"
)

Fetch = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """One field of a directory: its TIFF type, how many values, and their bytes in the file's byte order."""

    kind: int
    count: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Directory:
    """One image of the file (full size, an overview or a mask) and where its blocks lie."""

    entries: dict[int, Entry]
    byte_order: str

    def numbers(self, tag: int) -> npt.NDArray[np.int64]:
        """The values of a whole-number field, empty when the directory lacks it."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in _NUMBER:
            return np.zeros(0, np.int64)
        return np.frombuffer(entry.raw, self.byte_order + _NUMBER[entry.kind]).astype(np.int64)

    def number(self, tag: int, default: int = 0) -> int:
        """The first value of a whole-number field."""
        values = self.numbers(tag)
        return int(values[0]) if len(values) else default

    @property
    def width(self) -> int:
        """Columns."""
        return self.number(WIDTH)

    @property
    def height(self) -> int:
        """Rows."""
        return self.number(HEIGHT)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height, self.width

    @property
    def tiled(self) -> bool:
        """Whether the blocks are tiles rather than strips."""
        return TILE_WIDTH in self.entries

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of a block; a strip is as wide as the image."""
        if self.tiled:
            return max(1, self.number(TILE_HEIGHT)), max(1, self.number(TILE_WIDTH))
        return max(1, min(self.number(ROWS_PER_STRIP, self.height), self.height)), max(1, self.width)

    @property
    def num_planes(self) -> int:
        """1 when the bands lie pixel by pixel in the same block, else the number of bands."""
        return self.number(SAMPLES, 1) if self.number(PLANAR, 1) == 2 else 1

    @property
    def block_grid(self) -> tuple[int, int]:
        """How many rows and columns of blocks."""
        rows, cols = self.block_shape
        return -(-self.height // rows), -(-self.width // cols)

    @property
    def block_bytes(self) -> int:
        """Bytes of one decoded block: GDAL makes whole bytes of bits, and float32 of half floats."""
        rows, cols = self.block_shape
        bits = self.number(BITS, 1)
        if bits == 16 and self.number(FORMAT) == _IS_FLOAT:
            bits = 32
        bits = next((decoded for decoded in _DECODED_BITS if bits <= decoded), bits)
        return rows * cols * self._samples_of_a_block * bits // 8

    @property
    def packed_bytes(self) -> int:
        """Bytes of one block in the file when it is not compressed; each row of pixels begins with a byte of its own."""
        rows, cols = self.block_shape
        return rows * -(-cols * self._samples_of_a_block * self.number(BITS, 1) // 8)

    @property
    def _samples_of_a_block(self) -> int:
        return 1 if self.num_planes > 1 else self.number(SAMPLES, 1)

    @property
    def pixels_alone(self) -> Directory:
        """The directory with what decoding needs and no more: a CRS costs a decoder more than a block does.

        It lies at a place of no meaning, since rasterio warns of an image that lies nowhere.
        """
        entries = {tag: entry for tag, entry in self.entries.items() if tag in _DECODING}
        for tag, values in ((_PIXEL_SCALE, (1, 1, 0)), (_TIE_POINT, (0, 0, 0, 0, 0, 0))):
            entries[tag] = Entry(12, len(values), struct.pack(f"{self.byte_order}{len(values)}d", *values))
        return Directory(entries, self.byte_order)

    @property
    def is_mask(self) -> bool:
        """Whether it is a transparency mask of another image of the file."""
        return bool(self.number(SUBFILE) & 4)

    @property
    def is_overview(self) -> bool:
        """Whether it is a reduced image (or the mask of one)."""
        return bool(self.number(SUBFILE) & 1)


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """Where each block of one image lies: offsets and byte counts (plane, row, col); a count of 0 is no block at all."""

    block_shape: tuple[int, int]
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    def _cut(self, row_off: int, row_end: int, col_off: int, col_end: int) -> tuple[slice, slice, slice]:
        rows, cols = self.block_shape
        return (
            slice(None),
            slice(max(0, row_off) // rows, max(0, -(-row_end // rows))),
            slice(max(0, col_off) // cols, max(0, -(-col_end // cols))),
        )

    def places(self, row_off: int, row_end: int, col_off: int, col_end: int, *, plane: int) -> list[tuple[int, int]]:
        """Row and column of the stored blocks that these pixels touch, row by row."""
        cut = self._cut(row_off, row_end, col_off, col_end)
        found = np.argwhere(self.counts[plane][cut[1:]] > 0)
        return [(cut[1].start + row, cut[2].start + col) for row, col in found.tolist()]

    def ranges(self, plane: int, places: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
        """Where in the file the blocks at some places begin and end."""
        rows, cols = np.asarray(places, np.int64).reshape(-1, 2).T
        starts = self.offsets[plane, rows, cols]
        return list(zip(starts.tolist(), (starts + self.counts[plane, rows, cols]).tolist(), strict=True))

    def portions(
        self, places: Sequence[tuple[int, int]], *, plane: int, block_bytes: int, max_bytes: int
    ) -> Iterator[list[tuple[int, int]]]:
        """The places in portions of at most ``max_bytes`` each, encoded and decoded, or of one block that is larger."""
        portion: list[tuple[int, int]] = []
        held = 0
        for place, (start, end) in zip(places, self.ranges(plane, places), strict=True):
            num_bytes = max(end - start, block_bytes)
            if portion and held + num_bytes > max_bytes:
                yield portion
                portion, held = [], 0
            portion.append(place)
            held += num_bytes
        if portion:
            yield portion

    def stored(self, row_off: int, row_end: int, col_off: int, col_end: int) -> bool:
        """Whether any block that these pixels touch is in the file."""
        return bool((self.counts[self._cut(row_off, row_end, col_off, col_end)] > 0).any())

    def owned_bytes(self, box: tuple[int, int, int, int], full_shape: tuple[int, int]) -> int:
        """Bytes of the blocks whose first pixel lies in a box of the full image of ``full_shape`` (row, col)."""
        num_rows, num_cols = self.counts.shape[1:]
        cuts = []
        for start, end, full, num in ((*box[:2], full_shape[0], num_rows), (*box[2:], full_shape[1], num_cols)):
            cuts.append(slice(-(-start * num // full), -(-end * num // full)))
        return int(self.counts[:, cuts[0], cuts[1]].sum())

    def unstored_pixels(self, row_off: int, row_end: int, col_off: int, col_end: int) -> npt.NDArray[np.bool_] | None:
        """(row, col), True where no block is stored in any plane; None when all blocks are there."""
        cut = self._cut(row_off, row_end, col_off, col_end)
        absent = (self.counts[cut] == 0).all(axis=0)
        if not absent.any():
            return None
        rows, cols = self.block_shape
        row_index = np.arange(row_off, row_end) // rows - cut[1].start
        col_index = np.arange(col_off, col_end) // cols - cut[2].start
        pixels: npt.NDArray[np.bool_] = absent[row_index[:, None], col_index[None, :]]
        return pixels


def block_index(directory: Directory, file_size: int) -> BlockIndex:
    """The block index of a directory. Raises SceneReadError when it does not fit the image or the file."""
    offsets = directory.numbers(TILE_OFFSETS if directory.tiled else STRIP_OFFSETS)
    counts = directory.numbers(TILE_BYTES if directory.tiled else STRIP_BYTES)
    rows, cols = directory.block_grid
    want = directory.num_planes * rows * cols
    if len(counts) == 0 and len(offsets) == want == 1:
        counts = np.array([directory.packed_bytes], np.int64)
    if not want or len(offsets) != want or len(counts) != want:
        raise SceneReadError(
            f"the block index is damaged: {want} blocks wanted, {len(offsets)} offsets and {len(counts)} sizes found"
        )
    shape = (directory.num_planes, rows, cols)
    offsets, counts = offsets.reshape(shape), np.where(offsets == 0, 0, counts).reshape(shape)
    ends = [counts, offsets, offsets + counts]  # each alone too: a sum of 64 bits may wrap
    if any(int(end.min()) < 0 or int(end.max()) > file_size for end in ends):
        raise SceneReadError("the file is cut short or damaged: its block index points past the end of the file")
    if int(counts.max()) > 2 * directory.packed_bytes + _SPARE_BYTES:
        raise SceneReadError(
            f"the block index is damaged: a block of {directory.packed_bytes} bytes is said to take {counts.max()} in the file"
        )
    return BlockIndex(directory.block_shape, offsets, counts)


def read_directories(fetch: Fetch, file_size: int) -> list[Directory]:
    """All directories of a TIFF file, in file order; ``fetch(start, end)`` gives the file's bytes.

    Raises NotGeoTiffError when it is no TIFF, SceneReadError when it is damaged and SceneTooCostlyError when its
    directories alone would be unreasonably large.
    """
    if file_size < 8:
        raise NotGeoTiffError(f"not a GeoTIFF: the file has {file_size} bytes")
    start = fetch(0, min(16, file_size))
    kinds = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
    if start[:4] not in kinds:
        raise NotGeoTiffError(f"{_what_it_is(fetch(0, min(512, file_size)))}, not a GeoTIFF")
    order, big = kinds[start[:4]], b"+" in start[2:4]
    if len(start) < (16 if big else 8):
        raise SceneReadError(f"the file is cut short: it has {file_size} bytes, and its directories lie beyond them")
    offset = struct.unpack(order + ("Q" if big else "I"), start[8:16] if big else start[4:8])[0]
    found: list[Directory] = []
    seen: set[int] = set()
    budget = _Budget(file_size)
    while offset:
        if offset in seen or offset + 8 > file_size:
            raise SceneReadError("the file is cut short or damaged: its directories loop or lie past its end")
        seen.add(offset)
        if len(found) >= MAX_DIRECTORIES:
            raise SceneTooCostlyError(
                f"the file holds more than {MAX_DIRECTORIES} images (pages, overviews, masks); split it"
            )
        directory, offset = _read_directory(fetch, budget, offset, order, big=big)
        found.append(directory)
    return found


@dataclass(slots=True)
class _Budget:
    """What the values of a file's fields may take: no more than the file has, and a bound that no sound file comes near."""

    file_size: int
    spent: int = 0

    def spend(self, num_bytes: int) -> None:
        """Raises SceneTooCostlyError when it is too much."""
        self.spent += num_bytes
        if self.spent > self.file_size + _SHARED_BYTES:
            raise SceneTooCostlyError(_SHARED)
        if self.spent > _MAX_FIELDS_BYTES:
            raise SceneTooCostlyError(_TOO_MUCH)


def _read_directory(fetch: Fetch, budget: _Budget, offset: int, order: str, *, big: bool) -> tuple[Directory, int]:
    head_bytes, entry_bytes, next_bytes = (8, 20, 8) if big else (2, 12, 4)
    num = struct.unpack(order + ("Q" if big else "H"), fetch(offset, offset + head_bytes))[0]
    end = offset + head_bytes + num * entry_bytes + next_bytes
    if num > _MAX_ENTRIES or end > budget.file_size:
        raise SceneReadError(f"the file is cut short or damaged: a directory claims {num} fields")
    body = fetch(offset + head_bytes, end)
    entries: dict[int, Entry] = {}
    inline = 8 if big else 4
    for index in range(num):
        field = body[index * entry_bytes : (index + 1) * entry_bytes]
        tag, kind, count = struct.unpack(order + ("HHQ" if big else "HHI"), field[:-inline])
        size = _SIZE.get(kind, 0) * count
        if size <= inline:
            raw = field[-inline:][:size]
        else:
            at = struct.unpack(order + ("Q" if big else "I"), field[-inline:])[0]
            if size > _MAX_VALUE_BYTES or at + size > budget.file_size:
                raise SceneReadError(f"the file is cut short or damaged: field {tag} claims {size} bytes at {at}")
            budget.spend(size)
            raw = fetch(at, at + size)
        entries[tag] = Entry(kind, count, raw)
    following = struct.unpack(order + ("Q" if big else "I"), body[-next_bytes:])[0]
    return Directory(entries, order), following


def write_directories(
    directories: list[dict[int, Entry]], start: int, *, big: bool, order: str = "<"
) -> tuple[bytes, int]:
    """Directories and their values as they stand in a file from position ``start`` on, and the position after them.

    The values' bytes are taken as they are: they must be in the byte order ``order``.
    """
    out = bytearray()
    inline = 8 if big else 4
    for index, entries in enumerate(directories):
        table_bytes = (8 + 20 * len(entries) + 8) if big else (2 + 12 * len(entries) + 4)
        table = bytearray(struct.pack(order + ("Q" if big else "H"), len(entries)))
        values = bytearray()
        values_at = start + len(out) + table_bytes
        for tag, entry in sorted(entries.items()):
            table += struct.pack(order + ("HHQ" if big else "HHI"), tag, entry.kind, entry.count)
            if len(entry.raw) <= inline:
                table += entry.raw.ljust(inline, b"\0")
            else:
                values += bytes((values_at + len(values)) % 2)
                table += struct.pack(order + ("Q" if big else "I"), values_at + len(values))
                values += entry.raw
        values += bytes((values_at + len(values)) % 2)
        last = index == len(directories) - 1
        table += struct.pack(order + ("Q" if big else "I"), 0 if last else values_at + len(values))
        out += table + values
    return bytes(out), start + len(out)


_POINTS_ELSEWHERE = (330, 34665, 34853, 40965, 288, 289, OLD_SUBFILE)


def excerpt(directory: Directory, bodies: Sequence[bytes | memoryview], height: int, width: int) -> bytes:
    """A small TIFF file of some blocks of an image: the image's own fields, another size, and these blocks in order.

    ``bodies`` are the encoded blocks, plane after plane. A decoder that is given an excerpt needs no other byte of the file.
    """
    order = directory.byte_order
    at = 16
    places = []
    for body in bodies:
        places.append(at if body else 0)
        at += len(body)
    entries = {tag: entry for tag, entry in directory.entries.items() if tag not in _POINTS_ELSEWHERE}
    offsets, counts = (TILE_OFFSETS, TILE_BYTES) if directory.tiled else (STRIP_OFFSETS, STRIP_BYTES)
    for tag, values in ((offsets, places), (counts, [len(body) for body in bodies])):
        entries[tag] = Entry(16, len(values), np.asarray(values, order + "u8").tobytes())
    for tag, value in ((WIDTH, width), (HEIGHT, height), (SUBFILE, 0)):
        entries[tag] = Entry(4, 1, struct.pack(order + "I", value))
    at += at % 2
    table, _ = write_directories([entries], at, big=True, order=order)
    signature = struct.pack(order + "2sHHHQ", b"II" if order == "<" else b"MM", 43, 8, 0, at)
    return b"".join([signature, *bodies]).ljust(at, b"\0") + table


def _what_it_is(start: bytes) -> str:
    signs = {
        b"\xff\xd8\xff": "a JPEG image",
        b"\x89PNG": "a PNG image",
        b"PK\x03\x04": "a ZIP archive",
        b"\x89HDF": "an HDF5 file",
        b"CDF": "a NetCDF file",
        b"\x00\x00\x00\x0cjP": "a JPEG 2000 image",
        b"GIF8": "a GIF image",
        b"%PDF": "a PDF document",
        b"NITF": "a NITF image",
    }
    for sign, name in signs.items():
        if start.startswith(sign):
            return name
    if b"<VRTDataset" in start:
        return "a GDAL VRT, which may read other files and is refused"
    if start.lstrip().startswith((b"<", b"{")):
        return "a text file"
    return "a file of another kind"

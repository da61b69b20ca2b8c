"""Parts of a scene in the store in, one large COG there out, and no process sees more than a piece of it.

The parts lie in a folder, each the packed blocks of a window (``geoseg.raster.cog``). Squares of 8 x 8 windows are gathered
first: a worker reads the heads of their parts (what blocks there are, how large, their SHA-256) and makes their overviews, a
part of its own beside the others. Then header, layout and name of the file are known, and one process makes the few levels
above. The file is cut in pieces of 32 MiB, and any worker assembles one from the parts and writes it. It has the very bytes
that ``CogAssembler`` would give it, whatever the windows, squares, workers and restarts.

Where the steps run is the business of the one who ``deals``: a function and its jobs go in, results come out in order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from geoseg.errors import GeosegError, StoreError
from geoseg.raster import cog, store
from geoseg.raster.cog import (
    Block,
    CogProfile,
    Pyramid,
    blocks_sum,
    cog_header,
    head_size,
    pack_blocks,
    unpack_blocks,
    unpack_head,
    window_level,
)
from geoseg.raster.grid import Grid
from geoseg.raster.upload import MOST_PIECES, Upload, begin, takes_pieces
from geoseg.raster.window import BLOCK, WindowSet

_SQUARE = 8  # windows a side; a power of two
_HEAD_BYTES = 32 << 10  # a head and, of most parts, the blocks of its highest level
_GAP_BYTES = 64 << 10  # fetched along with what lies on both sides rather than asked for twice
_OF_SQUARE, _HELD = np.uint64(1 << 62), np.uint64(1 << 63)
_ENTRY = np.dtype([("source", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("sha256", "u1", (32,))])

Deal = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
_T = TypeVar("_T")
SumUp = Callable[[list[tuple[int, int, dict[str, Any]]]], Any]


def in_turn(step: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """The plain way to deal: one job after another, here."""
    return map(step, jobs)


class SpliceError(StoreError):
    """What a scene is put together from cannot be had: a part is missing or damaged, or a step ended its process."""


@dataclass(frozen=True, slots=True)
class PartNames:
    """How the parts of a layer are named: they lie in ``folder``, of windows of ``window`` pixels, and end in ``suffix``."""

    folder: str
    suffix: str
    window: int

    def of_window(self, row: int, col: int) -> str:
        """The URI of a window's part, by its place among the windows."""
        return store.join(self.folder, f"r{row}c{col}{self.suffix}")

    def of_square(self, row: int, col: int) -> str:
        """The URI of a square's overviews, by its place among the squares."""
        return store.join(self.folder, f"o{row}c{col}{self.suffix}")


def read_part(uri: str) -> tuple[dict[str, Any], list[Block]]:
    """The header and blocks of a part, read whole. Raises SpliceError; a damaged part is removed, so that it is done again."""
    return _checked(uri, lambda: unpack_blocks(store.read(uri)))


def _checked(uri: str, step: Callable[[], _T]) -> _T:
    try:
        return step()
    except store.ObjectMissingError as error:
        store.delete(_first_of_window(uri))
        raise SpliceError(f"a window's part is missing; run again to redo it ({error})") from error
    except (ValueError, KeyError, IndexError) as error:
        store.delete([*_first_of_window(uri), uri])
        raise SpliceError(f"the part {store.redact(uri)} is damaged; run again to redo it") from error


def _first_of_window(uri: str) -> list[str]:
    """Of a layer's part that of the mask, by which a window counts as done."""
    found = re.fullmatch(r"(r\d+c\d+)\.\w+", store.base_name(uri))
    return [store.join(uri.rpartition("/")[0], found[1])] if found else []


@dataclass(frozen=True, slots=True)
class Square:
    """Windows to be gathered: those of ``windows`` (row, col among all), in the square at ``row``, ``col`` among squares.

    ``sum_up`` makes one small value of their places and headers.
    """

    grid: Grid
    profile: CogProfile
    names: PartNames
    row: int
    col: int
    windows: tuple[tuple[int, int], ...]
    sum_up: SumUp


@dataclass(frozen=True, slots=True)
class Gathered:
    """What is known of a square: the sum of its headers, a table of its blocks with their offsets, its topmost block."""

    told: Any
    table: npt.NDArray[Any]
    offsets: npt.NDArray[np.uint64]
    top: tuple[Block, ...]


def gather(square: Square) -> Gathered:
    """Read the heads of a square's parts, make its overviews and store them. Raises SpliceError, StoreError."""
    made = _SquareOverviews(square.grid, square.profile)
    start, top = _levels(made, square.names)
    uris = [square.names.of_window(*place) for place in square.windows]
    headers, tables, offsets = [], [], []
    wanted = start if top > start else None
    for place, (header, table, at, blocks) in zip(
        square.windows, store.in_parallel(partial(_read_head, level=wanted), uris), strict=True
    ):
        headers.append((*place, header))
        tables.append(table)
        offsets.append(at)
        made.bodies |= {(level, row, col): body for level, row, col, body in blocks}
    if wanted is not None:
        side = _SQUARE >> (top - start)  # more than one block where the raster has no level high enough
        for down, across in np.ndindex(side, side):
            made.make_overview(top, square.row * side + down, square.col * side + across, start)
    if made.made:
        data = pack_blocks({}, made.made)
        store.write(square.names.of_square(square.row, square.col), data)
        tables.append(unpack_head(data[: head_size(data)], len(data))[1])
        offsets.append(_offsets(tables[-1], head_size(data)))
    return Gathered(
        square.sum_up(headers),
        np.concatenate(tables),
        np.concatenate(offsets),
        tuple(block for block in made.made if block[0] == top),
    )


def _levels(pyramid: Pyramid, names: PartNames) -> tuple[int, int]:
    """The highest levels that windows bring and that squares make."""
    top = len(pyramid.sizes) - 1
    return min(window_level(names.window), top), min(window_level(names.window * _SQUARE), top)


def _read_head(
    uri: str, level: int | None
) -> tuple[dict[str, Any], npt.NDArray[Any], npt.NDArray[np.uint64], list[Block]]:
    """A part's header, the table of its blocks, where these begin, and the blocks of ``level``."""

    def read() -> tuple[dict[str, Any], npt.NDArray[Any], npt.NDArray[np.uint64], list[Block]]:
        start, size = _start(uri)
        if head_size(start) > size:
            raise ValueError("it ends within its table")
        start += _more(uri, len(start), head_size(start))
        header, table = unpack_head(start[: head_size(start)], size)
        offsets = _offsets(table, head_size(start))
        blocks = []
        for told, at in zip(table[table["level"] == level], offsets[table["level"] == level].tolist(), strict=True):
            end = at + int(told["size"])
            if end > size:
                raise ValueError("it ends within a block")
            start += _more(uri, len(start), end)
            if hashlib.sha256(start[at:end]).digest() != told["sha256"].tobytes():
                raise ValueError("a block has other bytes than the table says")
            blocks.append((int(told["level"]), int(told["row"]), int(told["col"]), start[at:end]))
        return header, table, offsets, blocks

    return _checked(uri, read)


def _start(uri: str) -> tuple[bytes, int]:
    try:
        return store.read_start(uri, _HEAD_BYTES)
    except StoreError:
        if store.head(uri).size:
            raise
        return b"", 0  # nothing has no first bytes


def _more(uri: str, start: int, end: int) -> bytes:
    return store.read_ranges(uri, [(start, end)])[0] if end > start else b""


def _offsets(table: npt.NDArray[Any], start: int) -> npt.NDArray[np.uint64]:
    ends = np.cumsum(table["size"], dtype=np.uint64) + np.uint64(start)
    return ends - table["size"].astype(np.uint64)


class _SquareOverviews(Pyramid):
    """The overviews of a square in the making."""

    def __init__(self, grid: Grid, profile: CogProfile) -> None:
        super().__init__(grid, profile)
        self.bodies: dict[tuple[int, int, int], bytes] = {}
        self.made: list[Block] = []

    def body(self, level: int, row: int, col: int) -> bytes:
        return self.bodies.get((level, row, col), b"")

    def add(self, blocks: list[Block]) -> None:
        self.made += blocks


class SplicedCog(Pyramid):
    """What is known of a large COG whose blocks stay in the store: 44 bytes a block, and the encoded blocks above squares."""

    def __init__(self, grid: Grid, profile: CogProfile, names: PartNames) -> None:
        super().__init__(grid, profile)
        self._names = names
        self._square_level = _levels(self, names)[1]
        shapes = [self.shape(level) for level in range(len(self.sizes))]
        self.counts = [np.zeros(shape, np.uint32) for shape in shapes]
        self._offsets = [np.zeros(shape, np.uint64) for shape in shapes]
        self.sha256 = [np.zeros((*shape, 32), np.uint8) for shape in shapes]
        self._held: dict[tuple[int, int, int], bytes] = {}

    def gather(self, windows: WindowSet, sum_up: SumUp, deal: Deal) -> Iterator[Any]:
        """Take in the parts of ``windows`` and make the levels above squares; of each square the sum of its headers.

        Raises SpliceError, StoreError.
        """
        for gathered in deal(gather, self._squares(windows, sum_up)):
            for level in range(len(self.sizes)):
                here = gathered.table["level"] == level
                rows, cols = gathered.table["row"][here], gathered.table["col"][here]
                self.counts[level][rows, cols] = gathered.table["size"][here]
                self._offsets[level][rows, cols] = gathered.offsets[here]
                self.sha256[level][rows, cols] = gathered.table["sha256"][here]
            self._held |= {(level, row, col): body for level, row, col, body in gathered.top}
            yield gathered.told
        self.make_overviews(self._names.window * _SQUARE)
        self._held = {place: body for place, body in self._held.items() if self._is_held(place[0])}

    def _squares(self, windows: WindowSet, sum_up: SumUp) -> Iterator[Square]:
        size = self._names.window
        rows, cols = -(-self.grid.height // size), -(-self.grid.width // size)
        for row, col in np.ndindex(-(-rows // _SQUARE), -(-cols // _SQUARE)):
            inside = [
                (one, other)
                for one in range(row * _SQUARE, min(rows, (row + 1) * _SQUARE))
                for other in range(col * _SQUARE, min(cols, (col + 1) * _SQUARE))
                if windows.has(one * size, other * size)
            ]
            if inside:
                yield Square(self.grid, self.profile, self._names, row, col, tuple(inside), sum_up)

    def add(self, blocks: list[Block]) -> None:
        """Take encoded blocks, which are held in memory."""
        for level, row, col, body in blocks:
            self.counts[level][row, col] = len(body)
            self.sha256[level][row, col] = np.frombuffer(hashlib.sha256(body).digest(), np.uint8)
            self._held[level, row, col] = body

    def body(self, level: int, row: int, col: int) -> bytes:
        """Return the encoded bytes of a block, none when it is not stored. Raises SpliceError, StoreError."""
        if not self.counts[level][row, col] or (level, row, col) in self._held:
            return self._held.get((level, row, col), b"")
        entries, _ = self.entries(level, np.array([row * self.shape(level)[1] + col]))
        return self.piece_of(entries, ()).assemble()

    def piece_of(
        self,
        entries: npt.NDArray[Any],
        held: tuple[bytes, ...],
        *,
        number: int = 1,
        offset: int = 0,
        start: bytes = b"",
    ) -> Piece:
        """A piece of what ``entries`` gave."""
        in_store = entries["source"] < _HELD
        sources, numbers = np.unique(entries["source"][in_store], return_inverse=True)
        entries["source"][in_store] = numbers
        return Piece(number, offset, start, tuple(self._uri(source) for source in sources.tolist()), entries, held)

    def finish(self) -> SplicedFile:
        """Fix the layout. Raises SpliceError, StoreError."""
        for level in self.levels_to_halve():
            quarters = list(self.quarters(level))
            self.block_sizes[level] //= 2
            self._held = {place: body for place, body in self._held.items() if place[0] != level}
            self.counts[level] = np.zeros(self.shape(level), np.uint32)
            self.sha256[level] = np.zeros((*self.shape(level), 32), np.uint8)
            self.add(quarters)
        return SplicedFile(self)

    def entries(self, level: int, flat: npt.NDArray[np.intp]) -> tuple[npt.NDArray[Any], list[bytes]]:
        """Where blocks of a level lie, by their numbers in row-major order, and the bytes of those that are held.

        The source of a block that is held counts from ``_HELD`` on.
        """
        found = np.zeros(len(flat), _ENTRY)
        found["size"], found["sha256"] = self.counts[level].ravel()[flat], self.sha256[level].reshape(-1, 32)[flat]
        rows, cols = np.divmod(flat.astype(np.uint64), np.uint64(self.shape(level)[1]))
        if self._is_held(level):
            found["source"] = _HELD + np.arange(len(flat), dtype=np.uint64)
            return found, [self._held[level, row, col] for row, col in zip(rows.tolist(), cols.tolist(), strict=True)]
        found["offset"] = self._offsets[level].ravel()[flat]
        by_window = window_level(self._names.window) - level
        by_square = window_level(self._names.window * _SQUARE) - level
        shift = np.uint64(by_window if by_window >= 0 else by_square)
        found["source"] = rows >> shift << np.uint64(31) | cols >> shift
        if by_window < 0:
            found["source"] |= _OF_SQUARE
        return found, []

    def _uri(self, source: int) -> str:
        name = self._names.of_square if source & int(_OF_SQUARE) else self._names.of_window
        return name(source >> 31 & 0x7FFFFFFF, source & 0x7FFFFFFF)

    def _is_held(self, level: int) -> bool:
        return level > self._square_level or self.block_sizes[level] != BLOCK


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a file, from ``offset`` on: ``start``, then the blocks of ``entries``, which lie in ``uris`` or in ``held``."""

    number: int
    offset: int
    start: bytes
    uris: tuple[str, ...]
    entries: npt.NDArray[Any]
    held: tuple[bytes, ...]

    def assemble(self) -> bytes:
        """Its bytes. Raises SpliceError, also for a block of other bytes than its part's head says, and StoreError."""
        sizes = self.entries["size"].astype(np.int64)
        places = len(self.start) + np.cumsum(sizes) - sizes
        out = bytearray(len(self.start) + int(sizes.sum()))
        out[: len(self.start)] = self.start
        spans = self._spans()
        for (source, start, _, which), data in zip(spans, store.in_parallel(self._fetch, spans), strict=True):
            view = memoryview(data)
            for entry in which.tolist():
                at = int(self.entries["offset"][entry]) - start
                body = view[at : at + int(sizes[entry])]
                if hashlib.sha256(body).digest() != self.entries["sha256"][entry].tobytes():
                    _checked(self.uris[source], _is_damaged)
                out[places[entry] : places[entry] + sizes[entry]] = body
        for entry in np.flatnonzero(self.entries["source"] >= _HELD).tolist():
            body = memoryview(self.held[int(self.entries["source"][entry] - _HELD)])
            out[places[entry] : places[entry] + sizes[entry]] = body
        return bytes(out)

    def _spans(self) -> list[tuple[int, int, int, npt.NDArray[np.intp]]]:
        """What to fetch: of a source from where to where, and the entries therein."""
        order = np.lexsort((self.entries["offset"], self.entries["source"]))
        order = order[self.entries["source"][order] < _HELD]
        if not len(order):
            return []
        source, offset = self.entries["source"][order], self.entries["offset"][order]
        ends = offset + self.entries["size"][order]
        is_new = (source[1:] != source[:-1]) | (offset[1:] > ends[:-1] + np.uint64(_GAP_BYTES))
        return [
            (int(source[which[0]]), int(offset[which[0]]), int(ends[which[-1]]), order[which])
            for which in np.split(np.arange(len(order)), np.flatnonzero(is_new) + 1)
        ]

    def _fetch(self, span: tuple[int, int, int, Any]) -> bytes:
        source, start, end, _ = span
        return _checked(self.uris[source], lambda: store.read_ranges(self.uris[source], [(start, end)])[0])


def _is_damaged() -> None:
    raise ValueError("a block has other bytes than the table says")


def write_piece(under_way: Upload, piece: Piece) -> str:
    """Assemble a piece and write it. Raises SpliceError, StoreError, AccessDeniedError."""
    return under_way.write(piece.number, piece.offset, piece.assemble())


class SplicedFile:
    """A finished COG whose blocks lie in the store; ``write`` puts it together there, piece by piece."""

    def __init__(self, spliced: SplicedCog) -> None:
        self._cog = spliced
        self._header = cog_header(spliced, spliced.counts)
        self._levels = list(reversed(range(len(spliced.sizes))))  # in the order of the file
        stored = [counts[counts > 0] for counts in (spliced.counts[level] for level in self._levels)]
        self._firsts = np.cumsum([0, *(len(one) for one in stored)])
        self._ends = np.cumsum(np.concatenate(stored), dtype=np.int64) + len(self._header)
        self.size = int(self._ends[-1]) if len(self._ends) else len(self._header)
        self._bounds = [*self._cuts(), len(self._ends)]

    @property
    def num_pieces(self) -> int:
        """How many pieces it is cut in."""
        return len(self._bounds) - 1

    def _cuts(self) -> Iterator[int]:
        """The first block of each piece; it follows from the file alone, as a piece that is written twice must be the same."""
        least = max(cog.PIECE_BYTES, -(-self.size // MOST_PIECES))
        first = 0
        while first < len(self._ends) or first == 0:
            yield first
            first = int(np.searchsorted(self._ends, self._starts_at(first) + least)) + 1

    def _starts_at(self, block: int) -> int:
        return int(self._ends[block - 1]) if block else 0

    def _piece_size(self, number: int) -> int:
        first, last = self._bounds[number - 1 : number + 1]
        return (self._starts_at(last) or self.size) - self._starts_at(first)

    def sums(self) -> dict[str, str]:
        """What the file is named by, as ``CogFile.sums`` has it."""
        if self.size <= cog.PIECE_BYTES:
            return {"sha256": hashlib.sha256(self._whole).hexdigest()}
        by_level = ((self._cog.sha256[level], self._cog.counts[level] > 0) for level in self._levels)
        return {"blocks_sha256": blocks_sum(self._header, (digests[there].tobytes() for digests, there in by_level))}

    @cached_property
    def _whole(self) -> bytes:
        return self.piece(1).assemble()

    def piece(self, number: int) -> Piece:
        """The piece of a number, from 1 on."""
        first, last = self._bounds[number - 1 : number + 1]
        found: list[npt.NDArray[Any]] = []
        held: list[bytes] = []
        for level, before, end in zip(self._levels, self._firsts[:-1], self._firsts[1:], strict=True):
            if max(first, before) < min(last, end):
                flat = np.flatnonzero(self._cog.counts[level])[max(first - before, 0) : last - before]
                entries, bodies = self._cog.entries(level, flat)
                if bodies:
                    entries["source"] += np.uint64(len(held))
                    held += bodies
                found.append(entries)
        entries = np.concatenate(found) if found else np.zeros(0, _ENTRY)
        start = b"" if first else self._header
        return self._cog.piece_of(entries, tuple(held), number=number, offset=self._starts_at(first), start=start)

    def write(self, uri: str, staging: str, deal: Deal) -> None:
        """Write the file to ``uri``: with one request up to 32 MiB, larger ones piece by piece wherever ``deal`` has it done.

        ``staging`` is a name for what is under way, which must be the same when an attempt is to go on with what an earlier one
        left. What fails leaves nothing; what is killed is gone on with or given up by the next (``geoseg.raster.upload``).
        Where a store takes no pieces the file is streamed from here. Raises SpliceError, StoreError, AccessDeniedError.
        """
        numbers = range(1, self.num_pieces + 1)
        if self.size <= cog.PIECE_BYTES:
            store.write(uri, self._whole)
            return
        if not takes_pieces(uri):
            store.write_stream(uri, lambda: (self.piece(number).assemble() for number in numbers))
            return
        under_way = begin(uri, self.size, staging)
        try:
            there = under_way.written()
            if any(number not in numbers or size != self._piece_size(number) for number, (_, size) in there.items()):
                under_way.give_up()  # another version of geoseg cut it in other pieces
                under_way, there = begin(uri, self.size, staging), {}
            written = {number: told for number, (told, _) in there.items()}
            left = [number for number in numbers if number not in written]
            told = deal(partial(write_piece, under_way), map(self.piece, left))
            under_way.complete(written | dict(zip(left, told, strict=True)))
        except Exception:
            with suppress(GeosegError):
                under_way.give_up()
            raise

"""GeoTIFF in, pixels out: obstore fetches, GDAL decodes, nothing outside the named object is ever touched.

The block index of a scene is read once; the byte ranges of a window's blocks are fetched merged and side by side, and GDAL
is handed them as a small TIFF in memory. Behind this: a failed request inside GDAL's own network layer sticks to the
process, and a Python file under GDAL fetches 2 to 4 times the bytes and, when a block is damaged, corrupts memory.
"""

from __future__ import annotations

import bisect
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from geoseg.errors import (
    GeoreferenceError,
    NotGeoTiffError,
    SceneChangedError,
    SceneDeniedError,
    SceneError,
    SceneReadError,
    SceneTooCostlyError,
    StoreError,
)
from geoseg.raster import store, tiff
from geoseg.raster.grid import Grid
from geoseg.raster.raster import Raster
from geoseg.raster.scene import ALPHA, Scene, SceneRef, mask_uri
from geoseg.raster.window import Window

MAX_BLOCK_BYTES = 64 << 20
MAX_BANDS = 64
_PAGE = 64 << 10
_CACHE_BYTES = 32 << 20
MAX_CACHE_BYTES = 512 << 20
_PORTION_BYTES = 32 << 20
_KNOWN_FILES = 8
_OLD_JPEG = 6
_FIRST_YEAR = 1800
_MEMORY_NAME = r"[\w./-]*[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}[\w./-]*"
_MERGE_GAP = 32 << 10
_MAX_FETCH = 8 << 20
_BESIDE = "the mask beside it"
_GEO_TEXTS = 34737
# Of WKT what has PROJ open a file or URL; "@null" is none.
_OTHER_FILES = re.compile(
    rb"proj4_grids|parameterfile|(?:grids|file|init|model)\s*=(?!@null\b)|=\s*pipeline", re.IGNORECASE
)
_RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What the user adds to what a file says of itself.

    ``assume_crs`` is taken for a scene without a CRS (never instead of one), ``nodata`` for one without a nodata tag that counts:
    beside a mask or an alpha band no tag does, and this value marks further pixels. ``sidecar_mask`` allows the file
    ``<scene>.msk`` to say which pixels are valid; a file with a mask of its own needs none.
    """

    assume_crs: str | None = None
    nodata: float | None = None
    sidecar_mask: bool = False


class RangeFile:
    """The bytes of one object, fetched by range."""

    def __init__(self, uri: str, size: int, etag: str) -> None:
        self.uri, self.size, self.etag = uri, size, etag
        self._pages: dict[int, bytes] = {}
        self._counted = threading.local()

    @property
    def bytes_fetched(self) -> int:
        """Bytes that the calling thread has fetched so far: a difference is exact, whatever other threads do."""
        return int(getattr(self._counted, "num_bytes", 0))

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes of each range, neighbours fetched together and all side by side. Raises what the store raises."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if merged and start <= merged[-1][1] + _MERGE_GAP and end - merged[-1][0] <= _MAX_FETCH:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        bodies = [memoryview(body) for body in store.read_ranges(self.uri, merged, etag=self.etag)] if merged else []
        self._counted.num_bytes = self.bytes_fetched + sum(len(body) for body in bodies)
        starts = [start for start, _ in merged]
        found = []
        for start, end in ranges:
            place = bisect.bisect_right(starts, start) - 1
            found.append(bodies[place][start - starts[place] : end - starts[place]])
        return found

    def take(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``; short ones come by pages, which are kept: headers are read in many steps."""
        if end - start > _PAGE:
            return self.fetch([(start, end)])[0].tobytes()
        found = b""
        for page in range(start // _PAGE, -(-end // _PAGE)):
            if page not in self._pages:
                self._pages[page] = self.fetch([(page * _PAGE, min(self.size, (page + 1) * _PAGE))])[0].tobytes()
            found += self._pages[page]
        first = start // _PAGE * _PAGE
        return found[start - first : end - first]

    def forget_pages(self) -> None:
        """Drop the kept pages; the header has been read."""
        self._pages.clear()


_Key = tuple[Any, ...]
_Block = npt.NDArray[Any]


class _DecodedBlocks:
    """The blocks decoded last, shared by all threads of the process.

    Neighbouring windows decode none twice, nor do two threads at once: one of them decodes it and the other waits.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._coming: dict[_Key, Future[dict[_Key, _Block]]] = {}
        self._lock = threading.Lock()

    def make_room(self, num_bytes: int) -> None:
        """Keep up to ``num_bytes`` from now on, if that is more than before."""
        with self._lock:
            self._max_bytes = max(self._max_bytes, num_bytes)

    def let_go(self, keys: Iterable[_Key]) -> None:
        """Drop these before all others, when there is no room."""
        with self._lock:
            for key in keys:
                if key in self._blocks:
                    self._blocks.move_to_end(key, last=False)

    def get(self, keys: Sequence[_Key], decode: Callable[[list[_Key]], list[_Block]]) -> list[_Block]:
        """The block of each key; those that are neither here nor being decoded elsewhere go to ``decode`` together.

        Other threads' blocks are waited for after one's own are done and with no lock held, so no two threads wait for
        each other. What another thread failed to decode is tried here.
        """
        found: dict[_Key, _Block] = {}
        while len(found) < len(keys):
            mine: list[_Key] = []
            theirs: dict[_Key, Future[dict[_Key, _Block]]] = {}
            coming: Future[dict[_Key, _Block]] = Future()
            with self._lock:
                for key in keys:
                    if key in found:
                        continue
                    if key in self._blocks:
                        found[key] = self._blocks[key]
                        self._blocks.move_to_end(key)
                    elif key in self._coming:
                        theirs[key] = self._coming[key]
                    else:
                        mine.append(key)
                        self._coming[key] = coming
            if mine:
                found.update(self._settle(mine, coming, decode))
            for key, other in theirs.items():
                if other.exception() is None:
                    found[key] = other.result()[key]
        return [found[key] for key in keys]

    def _settle(
        self, keys: list[_Key], coming: Future[dict[_Key, _Block]], decode: Callable[[list[_Key]], list[_Block]]
    ) -> dict[_Key, _Block]:
        try:
            blocks = dict(zip(keys, decode(keys), strict=True))
        except BaseException as error:
            self._keep(keys, {})
            coming.set_exception(error)
            raise
        self._keep(keys, blocks)
        coming.set_result(blocks)
        return blocks

    def _keep(self, keys: list[_Key], blocks: dict[_Key, _Block]) -> None:
        with self._lock:
            for key in keys:
                del self._coming[key]
            self._blocks.update(blocks)
            self._held += sum(block.nbytes for block in blocks.values())
            while self._held > self._max_bytes:
                self._held -= self._blocks.popitem(last=False)[1].nbytes


_DECODED = _DecodedBlocks(_CACHE_BYTES)


def cache_bytes(wanted: int) -> int:
    """What may be kept of ``wanted`` bytes of decoded blocks, which serve again: 32 to 512 MiB for all of a process."""
    return min(max(wanted, _CACHE_BYTES), MAX_CACHE_BYTES)


def keep_decoded(wanted: int) -> None:
    """Let the process keep ``cache_bytes(wanted)`` of decoded blocks, if that is more than it does already."""
    _DECODED.make_room(cache_bytes(wanted))


class GeoTiff:
    """A GeoTIFF's directories, and its pixels by window.

    ``images`` holds the directories of the full image and of its overviews, largest first; ``masks`` those of their
    masks, or nothing. A file with a mask offers the overviews that have theirs: which pixels of another count, nobody
    has said. GDAL decodes, but never sees the file: it is handed excerpts in memory, a directory with just the blocks
    it is to decode. So it opens nothing, waits for nothing, and keeps no handle that a thread could end in another's
    place. Raises NotGeoTiffError, SceneReadError and SceneTooCostlyError for what cannot be read.
    """

    def __init__(self, uri: str, *, size: int, etag: str) -> None:
        self.uri = uri
        self.file = RangeFile(uri, size, etag)
        directories = tiff.read_directories(self.file.take, size)
        self.file.forget_pages()
        images = [d for d in directories if not d.is_mask]
        if not images or images[0].is_overview:
            raise SceneReadError("the file is damaged: it has no full-size image")
        self.full = images[0]
        # Of several masks of one size the first counts, as it does for GDAL.
        masks = {d.shape: d for d in reversed(directories) if d.is_mask}
        if masks and self.full.shape not in masks:
            sizes = ", ".join(f"{width} x {height}" for height, width in masks)
            raise SceneReadError(
                f"its mask is {sizes}, the image {self.full.width} x {self.full.height}, so which pixels are valid is not "
                "known; write the mask again in the image's size"
            )
        self.images = [d for d in (self.full, *_overviews(images)) if not masks or d.shape in masks]
        self.masks = [masks[d.shape] for d in self.images] if masks else []
        for directory in (*self.images, *self.masks):
            _check_costs(directory)
        self._indexes = [tiff.block_index(d, size) for d in self.images]
        self._mask_indexes = [tiff.block_index(d, size) for d in self.masks]

    def levels(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the full image and of each overview, largest first."""
        return tuple(d.shape for d in self.images)

    def index(self, level: int) -> tiff.BlockIndex:
        """Where the blocks of a level lie."""
        return self._indexes[level]

    def mask_index(self, level: int) -> tiff.BlockIndex | None:
        """Where the blocks of a level's mask lie; None when there is no mask."""
        return self._mask_indexes[level] if self.masks else None

    @contextmanager
    def header(self) -> Iterator[Any]:
        """A rasterio dataset with all that the full image says of itself, but one block large and without pixels.

        Raises GeoreferenceError for a CRS that would have another file read.
        """
        _check_crs(self.full)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with _decoding(_hollow(self.full), "its header") as dataset:
                yield dataset

    def read_bands(self, level: int, bands: tuple[int, ...], box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        """Pixels (band, row, col) in the file's dtype, exactly as decoded; ``bands`` count from 0.

        ``box`` is (row_off, row_end, col_off, col_end). Blocks that the file does not hold are 0.
        """
        return self._read(level, bands, box, mask=False)

    def let_go(self, level: int, box: tuple[int, int, int, int]) -> None:
        """Let those decoded blocks of a level and of its mask be dropped first that end within a box and are under it."""
        there = [(self.images[level], False), *([(self.masks[level], True)] if self.masks else [])]
        for directory, mask in there:
            ranges = []
            for axis, (start, end) in enumerate((box[:2], box[2:])):
                size, block = directory.shape[axis], directory.block_shape[axis]
                ranges.append(range(start // block, end // block if end < size else -(-size // block)))
            for plane in range(directory.num_planes):
                prefix = self._prefix(level, mask, plane)
                _DECODED.let_go((*prefix, *place) for place in product(*ranges))

    def _prefix(self, level: int, mask: bool, plane: int) -> _Key:  # noqa: FBT001
        """What the keys of a plane's decoded blocks begin with; row and column follow."""
        return self.uri, self.file.etag, level, mask, plane

    def read_mask(self, level: int, box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        """The internal mask (row, col), 0 where there is no data."""
        pixels: npt.NDArray[Any] = self._read(level, (0,), box, mask=True)[0]
        return pixels

    def _read(
        self, level: int, bands: tuple[int, ...], box: tuple[int, int, int, int], *, mask: bool
    ) -> npt.NDArray[Any]:
        directory = self.masks[level] if mask else self.images[level]
        index = self._mask_indexes[level] if mask else self._indexes[level]
        out: npt.NDArray[Any] | None = None
        # Bands that lie apart in the file are decoded apart; those that lie together come together.
        apart = directory.num_planes > 1
        for first, plane in enumerate(bands if apart else (0,)):
            for (row, col), block in self._blocks(directory, index, plane, (level, mask), box):
                if out is None:
                    out = np.zeros((len(bands), box[1] - box[0], box[3] - box[2]), block.dtype)
                row_off, col_off = row * index.block_shape[0], col * index.block_shape[1]
                top, left = max(row_off, box[0]), max(col_off, box[2])
                bottom, right = min(row_off + block.shape[1], box[1]), min(col_off + block.shape[2], box[3])
                part = block[:, top - row_off : bottom - row_off, left - col_off : right - col_off]
                for at, band in ((first, 0),) if apart else enumerate(bands):
                    out[at, top - box[0] : bottom - box[0], left - box[2] : right - box[2]] = part[band]
        if out is None:
            with _decoding(_hollow(directory.pixels_alone), "its header") as dataset:
                out = np.zeros((len(bands), box[1] - box[0], box[3] - box[2]), dataset.dtypes[0])
        return out

    def _blocks(
        self,
        directory: tiff.Directory,
        index: tiff.BlockIndex,
        plane: int,
        what: tuple[int, bool],
        box: tuple[int, int, int, int],
    ) -> Iterator[tuple[tuple[int, int], _Block]]:
        """Places (row, col of the block grid) and pixels of the stored blocks that a box touches, decoded once.

        They come in portions: neither the encoded nor the decoded bytes in hand pass 32 MiB, or one block.
        """

        def decode(keys: list[_Key]) -> list[_Block]:
            return self._decode(directory, index, plane, [key[-2:] for key in keys])

        touched = index.places(*box, plane=plane)
        prefix, block_bytes = self._prefix(*what, plane), directory.block_bytes
        for places in index.portions(touched, plane=plane, block_bytes=block_bytes, max_bytes=_PORTION_BYTES):
            keys = [(*prefix, *place) for place in places]
            yield from zip(places, _DECODED.get(keys, decode), strict=True)

    def _decode(
        self, directory: tiff.Directory, index: tiff.BlockIndex, plane: int, places: list[tuple[int, ...]]
    ) -> list[_Block]:
        """The pixels (band, row, col) of blocks; GDAL sees them below each other, in an image one block wide."""
        (rows, cols), num_planes = index.block_shape, directory.num_planes
        height = rows * len(places)
        if not directory.tiled:  # the last strip of the image may be shorter, and is the last here
            height -= max(0, (places[-1][0] + 1) * rows - directory.height)
        hollow = [b""] * len(places)
        planes = [self.file.fetch(index.ranges(plane, places)) if at == plane else hollow for at in range(num_planes)]
        data = tiff.excerpt(directory.pixels_alone, [body for one in planes for body in one], height, cols)
        del planes
        named = (
            f"the blocks at row {places[0][0]}, column {places[0][1]} to row {places[-1][0]}, column {places[-1][1]}"
        )
        with _decoding(data, named) as dataset:
            pixels = dataset.read([plane + 1] if num_planes > 1 else None)
        # Copies, since a block that is kept would keep alive all those that it was decoded with.
        return [pixels[:, at * rows : (at + 1) * rows].copy() for at in range(len(places))]


@lru_cache(maxsize=_KNOWN_FILES)
def _known(uri: str, size: int, etag: str) -> GeoTiff:
    return GeoTiff(uri, size=size, etag=etag)


def open_geotiff(uri: str, *, size: int, etag: str) -> GeoTiff:
    """The GeoTIFF of this name and version; the headers of the last few are known, and not read again.

    Raises as ``GeoTiff`` does, and what the store raises.
    """
    return _known(uri, size, etag) if etag else GeoTiff(uri, size=size, etag=etag)


def _overviews(images: list[tiff.Directory]) -> list[tiff.Directory]:
    """The reduced copies of the first image among ``images``, largest first; of two of one size the first.

    A file may hold other pictures too (pages, a thumbnail with a frame): a copy has the same bands and the same extent.
    """
    full = images[0]
    found = {
        d.shape: d
        for d in reversed(images[1:])
        if d.is_overview
        and d.width < full.width
        and all(d.number(tag, 1) == full.number(tag, 1) for tag in (tiff.SAMPLES, tiff.BITS, tiff.FORMAT))
        and abs(d.width * full.height - d.height * full.width) <= full.width + full.height
    }
    return sorted(found.values(), key=lambda d: -d.width)


def _hollow(directory: tiff.Directory) -> bytes:
    """An excerpt of one block that is not there."""
    return tiff.excerpt(directory, [b""] * directory.num_planes, *directory.block_shape)


@contextmanager
def _decoding(data: bytes, named: str) -> Iterator[Any]:
    """A rasterio dataset over bytes in memory; what GDAL cannot make of them is a SceneReadError."""
    try:
        with MemoryFile(data) as memory, memory.open(driver="GTiff") as dataset:
            yield dataset
    except (RasterioError, CPLE_BaseError, SystemError, ValueError) as error:
        detail = re.sub(_MEMORY_NAME, "the file", str(error.__cause__ or error).strip()).splitlines()
        raise SceneReadError(f"{named} cannot be decoded" + (f": {printable(detail[0])}" if detail else "")) from error


def printable(text: str) -> str:
    """What a file says, without what would drive a terminal or begin a line."""
    return "".join(char if char.isprintable() else " " for char in text).strip()


def _check_costs(directory: tiff.Directory) -> None:
    if directory.block_bytes > MAX_BLOCK_BYTES:
        rows, cols = directory.block_shape
        raise SceneTooCostlyError(
            f"its pixels are stored in blocks of {cols} x {rows}, {directory.block_bytes >> 20} MiB each, the limit is "
            f"{MAX_BLOCK_BYTES >> 20} MiB; rewrite it with gdal_translate -of COG"
        )
    if directory.number(tiff.SAMPLES, 1) > MAX_BANDS:
        raise SceneTooCostlyError(
            f"it has {directory.number(tiff.SAMPLES, 1)} bands, the limit is {MAX_BANDS}; select bands with gdal_translate -b"
        )
    if directory.number(tiff.COMPRESSION) == _OLD_JPEG:
        raise SceneReadError(
            "it is compressed with the JPEG of 1992 (code 6); rewrite it with gdal_translate -co COMPRESS=JPEG"
        )


def _check_crs(directory: tiff.Directory) -> None:
    """PROJ reads the files of shifts that WKT names, URLs too if it may; in a GeoTIFF WKT stands as Esri writes it."""
    entry = directory.entries.get(_GEO_TEXTS)
    if entry is not None and b"esri pe string" in entry.raw.lower() and _OTHER_FILES.search(entry.raw):
        raise GeoreferenceError(
            "its CRS names other files, and geoseg reads no other file than the one it is given; name the CRS by its code with "
            "gdal_edit.py -a_srs EPSG:<code>"
        )


def describe(ref: SceneRef, options: ReadOptions) -> Scene:
    """The scene behind a reference, or a SceneError that says why it cannot be used and what to do.

    Only the header is read. The checks of place: there is a CRS (or ``assume_crs``), a geotransform that is finite and
    not singular; control points or RPCs alone are refused, since geoseg does not warp.
    """
    with _speaking_of(ref.id):
        return _describe(ref, store.head(ref.uri), options)


@contextmanager
def _speaking_of(name: str) -> Iterator[None]:
    """Let what goes wrong with a scene begin with its id, or with what of it is meant."""
    try:
        yield
    except (SceneError, StoreError) as error:
        raise type(error)(f"{name}: {error}") from error


def _describe(ref: SceneRef, info: store.ObjectInfo, options: ReadOptions) -> Scene:
    geotiff = open_geotiff(ref.uri, size=info.size, etag=info.etag)
    shape = geotiff.levels()[0]
    with geotiff.header() as dataset:
        dtype = _one_dtype(dataset)
        mask_etag = None if geotiff.masks else _mask_etag(ref.uri, options)
        bands, tags = _band_names(dataset), dataset.nodatavals
        told_otherwise = bool(geotiff.masks) or mask_etag is not None or ALPHA in bands
        return Scene(
            id=ref.id,
            uri=ref.uri,
            etag=info.etag,
            size=info.size,
            grid=_grid(dataset, shape, options),
            bands=bands,
            dtype=dtype,
            levels=geotiff.levels() if mask_etag is None else (shape,),
            nodata=tuple(options.nodata if value is None or told_otherwise else value for value in tags),
            nodata_tags=tags,
            has_mask=bool(geotiff.masks),
            mask_etag=mask_etag,
            block_shape=geotiff.full.block_shape,
            datetime=_datetime(dataset, info),
        )


def _one_dtype(dataset: Any) -> str:
    dtypes = sorted(set(dataset.dtypes))
    if len(dtypes) > 1:
        raise SceneReadError(f"its bands have different dtypes ({', '.join(dtypes)}); write them with one dtype")
    if dtypes[0].startswith("complex"):
        raise SceneReadError(f"its pixels are {dtypes[0]}; geoseg reads real numbers: take the amplitude first")
    return str(dtypes[0])


def _band_names(dataset: Any) -> tuple[str, ...]:
    names = []
    for interp, description in zip(dataset.colorinterp, dataset.descriptions, strict=True):
        told = printable(description or "").lower()
        plain = interp in (ColorInterp.gray, ColorInterp.undefined)
        names.append(told if plain and told else interp.name)
    return tuple(names)


def _grid(dataset: Any, shape: tuple[int, int], options: ReadOptions) -> Grid:
    crs = dataset.crs
    placed = not dataset.transform.is_identity
    if not placed:
        if dataset.gcps[0]:
            raise GeoreferenceError(
                f"it has {len(dataset.gcps[0])} ground control points but no geotransform, and geoseg does not warp; "
                "make one with gdalwarp -order 1 (or -tps)"
            )
        if dataset.rpcs is not None:
            raise GeoreferenceError(
                "it has RPCs but no geotransform, and geoseg does not orthorectify; make one with gdalwarp -rpc"
            )
        raise GeoreferenceError(
            "it has no geotransform, so its mask could not be placed; add one with gdal_edit.py -a_ullr"
        )
    if not crs:
        if options.assume_crs is None:
            raise GeoreferenceError(
                "it has no CRS, so its mask could not be placed; name it with --assume-crs EPSG:<code>"
            )
        try:
            crs = CRS.from_user_input(options.assume_crs)
        except CRSError as error:
            raise GeoreferenceError(f"--assume-crs {options.assume_crs} is not a CRS that PROJ knows") from error
    t = dataset.transform
    return Grid(crs.to_wkt(), (t.a, t.b, t.c, t.d, t.e, t.f), *shape)


def _mask_etag(uri: str, options: ReadOptions) -> str | None:
    """The version of the mask beside a file, if there is one: as for GDAL it counts before an alpha band and a nodata tag."""
    try:
        if not store.exists(mask_uri(uri)):
            return None
    except SceneDeniedError:
        return None  # without the right to list, a bucket denies what it does not hold
    if not options.sidecar_mask:
        raise SceneReadError(
            f"the file {store.base_name(mask_uri(uri))} beside it says which pixels are valid, and geoseg reads no other file "
            "than the one it is given; allow it with --sidecar-mask, or put it inside with gdal_translate "
            "--config GDAL_TIFF_INTERNAL_MASK YES"
        )
    return store.head(mask_uri(uri)).etag


def _datetime(dataset: Any, info: store.ObjectInfo) -> str:
    told = str(dataset.tags().get("TIFFTAG_DATETIME", ""))
    try:
        moment = datetime.strptime(told, "%Y:%m:%d %H:%M:%S").replace(tzinfo=timezone.utc)
    except ValueError:
        moment = info.modified
    if moment.year < _FIRST_YEAR:  # some writers put the year 1 for "not known"
        moment = info.modified
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class SceneReader:
    """Reads windows of one scene at one of its levels, with their valid pixels, in any number of threads.

    Nothing stays open between reads. What is raised, here and by ``read``, begins with the scene's id: SceneReadError,
    SceneTooCostlyError, SceneChangedError, StoreError.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        with _speaking_of(scene.id):
            self._geotiff = open_geotiff(scene.uri, size=scene.size, etag=scene.etag)
            self._sidecar = _open_sidecar(scene) if scene.mask_etag is not None else None

    @property
    def bytes_fetched(self) -> int:
        """Bytes that the calling thread has fetched from the store so far."""
        return self._geotiff.file.bytes_fetched + (self._sidecar.file.bytes_fetched if self._sidecar else 0)

    def is_stored(self, window: Window, *, level: int = 0) -> bool:
        """Whether the file holds any block with data under a window; the block index alone is asked.

        Without a mask the image's own blocks decide, with one the mask's: a block of it that was never written is 0.
        """
        box = self._box(window, level)
        mask = self._geotiff.mask_index(level)
        return self._geotiff.index(level).stored(*box) and (mask is None or mask.stored(*box))

    def stored_bytes(self, window: Window, *, level: int = 0) -> int:
        """Bytes in the file that a window of the full image takes from ``level``.

        A block counts for the window that its first pixel lies in, so windows side by side count it once.
        """
        total = 0
        for index in (self._geotiff.index(level), self._geotiff.mask_index(level)):
            if index is not None:
                total += index.owned_bytes(self._box(window, 0), self.scene.levels[0])
        return total

    def read(self, window: Window, bands: tuple[int, ...], *, level: int = 0) -> Raster:
        """Pixels and validity of a window inside the level.

        A pixel is valid unless the mask, the alpha band where there is no mask, the nodata value (in every band), NaN (in any
        band) or a block that the file does not hold says otherwise. When a mask says that nothing is, no pixel is read: they are 0.
        """
        box = self._box(window, level)
        with _speaking_of(self.scene.id):
            valid = self._valid_by_mask(level, box)
            if valid is not None and not valid.any():
                return Raster(np.zeros((len(bands), window.height, window.width), self.scene.dtype), valid)
            pixels = self._geotiff.read_bands(level, bands, box)
            return Raster(pixels, self._valid_by_pixels(valid, pixels, bands, level, box))

    def read_valid(self, window: Window, bands: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Validity (row, col) at full size, without reading pixels where the file says it by a mask or not at all."""
        box = self._box(window, 0)
        scene = self.scene
        by_value = scene.alpha is not None or any(scene.nodata[band] is not None for band in bands)
        if by_value or np.dtype(scene.dtype).kind == "f":
            return self.read(window, bands).valid
        with _speaking_of(scene.id):
            valid = self._valid_by_mask(0, box)
        if valid is None:
            valid = np.ones((window.height, window.width), np.bool_)
        return self._without_unstored(valid, 0, box)

    def let_go(self, window: Window, *, level: int = 0) -> None:
        """Let the decoded blocks that end within a window of the level be dropped first: nothing will want them again."""
        box = self._box(window, level)
        self._geotiff.let_go(level, box)
        if self._sidecar is not None:
            self._sidecar.let_go(level, box)

    def _valid_by_mask(self, level: int, box: tuple[int, int, int, int]) -> npt.NDArray[np.bool_] | None:
        if self._sidecar is not None:
            with _speaking_of(_BESIDE):
                return np.asarray(self._sidecar.read_bands(0, (0,), box)[0] != 0)
        if self._geotiff.masks:
            return np.asarray(self._geotiff.read_mask(level, box) != 0)
        if self.scene.alpha is not None:
            return np.asarray(self._geotiff.read_bands(level, (self.scene.alpha,), box)[0] != 0)
        return None

    def _valid_by_pixels(
        self,
        valid: npt.NDArray[np.bool_] | None,
        pixels: npt.NDArray[Any],
        bands: tuple[int, ...],
        level: int,
        box: tuple[int, int, int, int],
    ) -> npt.NDArray[np.bool_]:
        if valid is None:
            valid = np.ones(pixels.shape[1:], np.bool_)
        values = [self.scene.nodata[band] for band in bands]
        if any(value is not None for value in values):
            data = [
                ~_is_nodata(band, value) if value is not None else np.ones(band.shape, np.bool_)
                for band, value in zip(pixels, values, strict=True)
            ]
            valid = valid & np.logical_or.reduce(data)
        if pixels.dtype.kind == "f":
            valid = valid & np.isfinite(pixels).all(axis=0)
        return self._without_unstored(valid, level, box)

    def _without_unstored(
        self, valid: npt.NDArray[np.bool_], level: int, box: tuple[int, int, int, int]
    ) -> npt.NDArray[np.bool_]:
        absent = self._geotiff.index(level).unstored_pixels(*box)
        return valid if absent is None else valid & ~absent

    def _box(self, window: Window, level: int) -> tuple[int, int, int, int]:
        height, width = self.scene.levels[level]
        if window.row_off < 0 or window.col_off < 0 or window.row_end > height or window.col_end > width:
            raise ValueError(f"{window} reaches outside level {level} of {self.scene.id} ({width} x {height})")
        return window.row_off, window.row_end, window.col_off, window.col_end


def _is_nodata(band: npt.NDArray[Any], value: float) -> npt.NDArray[np.bool_]:
    if np.isnan(value):
        return np.isnan(band) if band.dtype.kind == "f" else np.zeros(band.shape, np.bool_)
    if band.dtype.kind == "f":
        return np.asarray(band == band.dtype.type(value))
    limits = np.iinfo(band.dtype)
    if not np.isfinite(value) or value != int(value) or not limits.min <= value <= limits.max:
        return np.zeros(band.shape, np.bool_)
    return np.asarray(band == int(value))


def _open_sidecar(scene: Scene) -> GeoTiff:
    with _speaking_of(_BESIDE):
        info = store.head(mask_uri(scene.uri))
        if info.etag != scene.mask_etag:
            raise SceneChangedError("was replaced while the run was reading it; run again to take the new version")
        try:
            sidecar = open_geotiff(info.uri, size=info.size, etag=info.etag)
        except NotGeoTiffError as error:
            raise SceneReadError(str(error)) from error
        if sidecar.levels()[0] != scene.levels[0]:
            (height, width), (rows, cols) = sidecar.levels()[0], scene.levels[0]
            raise SceneReadError(f"it is {width} x {height}, the scene {cols} x {rows}; write it again in that size")
        return sidecar


def write_geotiff(uri: str, pixels: npt.NDArray[Any], grid: Grid, *, nodata: float | None = None) -> None:
    """Write pixels (band, row, col) as a Cloud-Optimized GeoTIFF, made in memory and put whole; for small rasters."""
    profile = {
        "driver": "COG",
        "count": pixels.shape[0],
        "height": grid.height,
        "width": grid.width,
        "dtype": pixels.dtype.name,
        "crs": grid.crs,
        "transform": grid.affine,
        "compress": "deflate",
        "predictor": "standard" if pixels.dtype.kind in "iu" else "no",
        "blocksize": 512,
    }
    with MemoryFile() as memory:
        with memory.open(**profile, nodata=nodata) as dataset:
            if pixels.shape[0] == len(_RGB):
                dataset.colorinterp = _RGB
            dataset.write(pixels)
        store.write(uri, bytes(memory.getbuffer()))

"""GeoTIFF in, pixels out: obstore fetches, GDAL decodes, nothing outside the named object is ever touched.

The block index of a scene is read once; the byte ranges of a window's blocks are fetched ahead, merged and side by side;
GDAL sees them through an opener that answers from memory. Measurements behind this: a plain opener fetches 2 to 4 times
the bytes, and a failed request inside GDAL's own network layer sticks to the process.
"""

from __future__ import annotations

import bisect
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from typing_extensions import Self

from geoseg.errors import (
    GeoreferenceError,
    GeosegError,
    NotGeoTiffError,
    SceneError,
    SceneReadError,
    SceneTooCostlyError,
)
from geoseg.raster import store, tiff
from geoseg.raster.grid import Grid
from geoseg.raster.raster import Raster
from geoseg.raster.scene import Scene, SceneRef
from geoseg.raster.window import Window

MAX_BLOCK_BYTES = 64 << 20
MAX_BANDS = 64
_PAGE = 64 << 10
_CACHE_BYTES = 48 << 20
_MERGE_GAP = 32 << 10
_MAX_FETCH = 8 << 20
_RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What the user adds to what a file says of itself.

    ``assume_crs`` is taken for a scene without a CRS (never instead of one), ``nodata`` for one without a nodata tag;
    ``sidecar_mask`` allows the file ``<scene>.msk`` to say which pixels are valid.
    """

    assume_crs: str | None = None
    nodata: float | None = None
    sidecar_mask: bool = False


class RangeFile:
    """The bytes of one object, fetched by range and kept for a while; not for several threads at once.

    ``fetch_ahead`` brings ranges in, side by side, before GDAL asks for them.
    """

    def __init__(self, uri: str, size: int, etag: str) -> None:
        self.uri, self.size, self.etag = uri, size, etag
        self.error: GeosegError | None = None
        self.bytes_fetched = 0
        self._starts: list[int] = []
        self._spans: OrderedDict[int, bytes] = OrderedDict()
        self._held = 0

    def fetch_ahead(self, ranges: list[tuple[int, int]]) -> None:
        """Fetch what is not at hand of these byte ranges, neighbours merged, all side by side."""
        missing = sorted(span for span in ranges if self._find(*span) is None)
        merged: list[tuple[int, int]] = []
        for start, end in missing:
            if merged and start <= merged[-1][1] + _MERGE_GAP and end - merged[-1][0] <= _MAX_FETCH:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        if not merged:
            return
        for (start, _), body in zip(merged, store.read_ranges(self.uri, merged, etag=self.etag), strict=True):
            self._keep(start, body)

    def take(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``; raises what the store raised."""
        found = self._find(start, end)
        if found is None:
            page = (start // _PAGE * _PAGE, min(self.size, -(-end // _PAGE) * _PAGE))
            self._keep(page[0], store.read_ranges(self.uri, [page], etag=self.etag)[0])
            found = self._find(start, end)
        if found is None:
            raise SceneReadError(f"{self.uri}: cut short, bytes {start} to {end} are missing")
        return found

    def _find(self, start: int, end: int) -> bytes | None:
        index = bisect.bisect_right(self._starts, start) - 1
        if index < 0:
            return None
        first = self._starts[index]
        body = self._spans[first]
        if end > first + len(body):
            return None
        self._spans.move_to_end(first)
        return body[start - first : end - first]

    def _keep(self, start: int, body: bytes) -> None:
        self.bytes_fetched += len(body)
        if start in self._spans:
            self._held -= len(self._spans.pop(start))
        else:
            bisect.insort(self._starts, start)
        self._spans[start] = body
        self._held += len(body)
        while self._held > _CACHE_BYTES and len(self._spans) > 1:
            old, dropped = self._spans.popitem(last=False)
            self._starts.remove(old)
            self._held -= len(dropped)


class _Cursor:
    """One open file handle of GDAL over a ``RangeFile``.

    An exception must not cross GDAL, so ``read`` keeps it in the file's ``error`` and answers with nothing.
    """

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """Bytes from the position on, fewer at the end, none after an error."""
        end = self._file.size if size < 0 else min(self._file.size, self._position + size)
        if end <= self._position:
            return b""
        try:
            body = self._file.take(self._position, end)
        except GeosegError as error:
            self._file.error = self._file.error or error
            return b""
        self._position = end
        return body

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to ``offset`` from the start (0), the position (1) or the end (2)."""
        self._position = offset + (0, self._position, self._file.size)[whence]
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def close(self) -> None:
        """Nothing to do: the ranges belong to the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Opener:
    """What GDAL is told instead of file names: it can open nothing but the files registered here."""

    def __init__(self) -> None:
        self._files: dict[str, RangeFile] = {}
        self._lock = threading.Lock()
        self._next = 0

    def register(self, file: RangeFile) -> str:
        with self._lock:
            self._next += 1
            name = f"/geoseg/{self._next}.tif"
            self._files[name] = file
        return name

    def forget(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)

    def __call__(self, path: str, mode: str = "rb", **_: object) -> _Cursor:
        file = self._files.get("/" + str(path).lstrip("/"))
        if file is None or "w" in mode or "a" in mode or "+" in mode:
            raise FileNotFoundError(path)
        return _Cursor(file)


_OPENER = _Opener()


class GeoTiff:
    """An open GeoTIFF: its directories, and its pixels by window. For one thread; close it when done."""

    def __init__(self, uri: str, *, size: int, etag: str) -> None:
        self.uri = uri
        self.file = RangeFile(uri, size, etag)
        directories = tiff.read_directories(self.file.take, size)
        images = [d for d in directories if not d.is_mask]
        if not images or images[0].is_overview:
            raise SceneReadError("the file is damaged: it has no full-size image")
        self.full = images[0]
        self.images = [self.full, *(d for d in images[1:] if d.is_overview and d.width < self.full.width)]
        self.masks = {(d.height, d.width): d for d in directories if d.is_mask}
        self._check_costs()
        self._indexes: dict[tuple[int, int, bool], tiff.BlockIndex] = {}
        self._datasets: dict[int, Any] = {}
        self._name = _OPENER.register(self.file)

    def _check_costs(self) -> None:
        for directory in (self.full, *self.masks.values()):
            if directory.block_bytes > MAX_BLOCK_BYTES:
                rows, cols = directory.block_shape
                raise SceneTooCostlyError(
                    f"its pixels are stored in blocks of {cols} x {rows}, {directory.block_bytes >> 20} MiB each, the limit is "
                    f"{MAX_BLOCK_BYTES >> 20} MiB; rewrite it with gdal_translate -of COG"
                )
        if self.full.number(tiff.SAMPLES, 1) > MAX_BANDS:
            raise SceneTooCostlyError(
                f"it has {self.full.number(tiff.SAMPLES, 1)} bands, the limit is {MAX_BANDS}; select bands with gdal_translate -b"
            )

    def levels(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the full image and of each overview, largest first."""
        return tuple((d.height, d.width) for d in self.images)

    def index(self, level: int, *, mask: bool = False) -> tiff.BlockIndex | None:
        """Where the blocks of a level (or of its mask) lie; None when there is no such mask."""
        size = self.levels()[level]
        key = (*size, mask)
        if key not in self._indexes:
            directory = self.masks.get(size) if mask else self.images[level]
            if directory is None:
                return None
            self._indexes[key] = tiff.block_index(directory, self.file.size)
        return self._indexes[key]

    def dataset(self, level: int) -> Any:
        """The rasterio dataset of a level (0 = full size), opened once."""
        if level not in self._datasets:
            options = {} if level == 0 else {"overview_level": level - 1}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                try:
                    self._datasets[level] = rasterio.open(
                        self._name, driver="GTiff", opener=_OPENER, sharing=False, **options
                    )
                except (RasterioError, CPLE_BaseError, SystemError, ValueError) as error:
                    raise self._failure(error, "it cannot be opened") from error
        return self._datasets[level]

    def _failure(self, error: BaseException, what: str) -> GeosegError:
        kept, self.file.error = self.file.error, None
        if kept is not None:
            return kept
        detail = str(error.__cause__ or error).strip().splitlines()
        text = f"{what}: {store.redact(detail[0])}" if detail else what
        return SceneReadError(text.replace(self._name.lstrip("/"), "").replace("/vsiriopener_", ""))

    def fetch_ahead(self, level: int, box: tuple[int, int, int, int], *, mask: bool = False) -> None:
        """Bring in the blocks that a box (row_off, row_end, col_off, col_end) of a level touches."""
        index = self.index(level, mask=mask)
        if index is not None:
            self.file.fetch_ahead(index.ranges(*box))

    def read_bands(self, level: int, bands: tuple[int, ...], box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        """Pixels (band, row, col) in the file's dtype, exactly as decoded; ``bands`` count from 0."""
        self.fetch_ahead(level, box)
        return self._read(lambda ds, window: ds.read([band + 1 for band in bands], window=window), level, box)

    def read_mask(self, level: int, box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        """The internal mask (row, col), 0 where there is no data."""
        self.fetch_ahead(level, box, mask=True)
        return self._read(lambda ds, window: ds.read_masks(1, window=window), level, box)

    def _read(self, call: Any, level: int, box: tuple[int, int, int, int]) -> npt.NDArray[Any]:
        window = ((box[0], box[1]), (box[2], box[3]))
        dataset = self.dataset(level)
        try:
            pixels: npt.NDArray[Any] = call(dataset, window)
        except (RasterioError, CPLE_BaseError, SystemError, ValueError) as error:
            where = f"rows {box[0]} to {box[1]}, columns {box[2]} to {box[3]} cannot be decoded"
            raise self._failure(error, where) from error
        if self.file.error is not None:
            raise self._failure(self.file.error, "")
        return pixels

    def close(self) -> None:
        """Close the datasets and forget the ranges."""
        for dataset in self._datasets.values():
            dataset.close()
        self._datasets.clear()
        _OPENER.forget(self._name)


def describe(ref: SceneRef, options: ReadOptions) -> Scene:
    """The scene behind a reference, or a SceneError that says why it cannot be used and what to do.

    Only the header is read. The checks of place: there is a CRS (or ``assume_crs``), a geotransform that is finite and
    not singular; control points or RPCs alone are refused, since geoseg does not warp.
    """
    info = store.head(ref.uri)
    try:
        return _describe(ref, info, options)
    except SceneError as error:
        if str(error).startswith((ref.id, ref.uri)):
            raise
        raise type(error)(f"{ref.id}: {error}") from error


def _describe(ref: SceneRef, info: store.ObjectInfo, options: ReadOptions) -> Scene:
    geotiff = GeoTiff(ref.uri, size=info.size, etag=info.etag)
    try:
        dataset = geotiff.dataset(0)
        dtype = _one_dtype(dataset)
        sidecar = _mask_sidecar(ref.uri, geotiff, dataset, options)
        tagged = dataset.nodatavals
        if options.nodata is not None:
            tagged = tuple(options.nodata if value is None else value for value in tagged)
        geotiff.index(0)
        return Scene(
            id=ref.id,
            uri=ref.uri,
            etag=info.etag,
            size=info.size,
            grid=_grid(dataset, options),
            bands=_band_names(dataset),
            dtype=dtype,
            levels=geotiff.levels(),
            nodata=tagged,
            has_mask=bool(geotiff.masks.get((dataset.height, dataset.width))),
            mask_sidecar=sidecar,
            block_shape=geotiff.full.block_shape,
            datetime=_datetime(dataset, info),
        )
    finally:
        geotiff.close()


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
        told = (description or "").strip().lower()
        plain = interp in (ColorInterp.gray, ColorInterp.undefined)
        names.append(told if plain and told else interp.name)
    return tuple(names)


def _grid(dataset: Any, options: ReadOptions) -> Grid:
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
    return Grid(crs.to_wkt(), (t.a, t.b, t.c, t.d, t.e, t.f), dataset.height, dataset.width)


def _mask_sidecar(uri: str, geotiff: GeoTiff, dataset: Any, options: ReadOptions) -> bool:
    flags = {flag for band in dataset.mask_flag_enums for flag in band}
    if geotiff.masks or flags & {MaskFlags.alpha, MaskFlags.nodata}:
        return False
    if not store.exists(uri + ".msk"):
        return False
    if not options.sidecar_mask:
        raise SceneReadError(
            f"the file {store.base_name(uri)}.msk beside it says which pixels are valid, and geoseg reads no other file than "
            "the one it is given; allow it with --sidecar-mask, or put it inside with gdal_translate "
            "--config GDAL_TIFF_INTERNAL_MASK YES"
        )
    return True


def _datetime(dataset: Any, info: store.ObjectInfo) -> str:
    told = str(dataset.tags().get("TIFFTAG_DATETIME", ""))
    try:
        moment = datetime.strptime(told, "%Y:%m:%d %H:%M:%S").replace(tzinfo=timezone.utc)
    except ValueError:
        moment = info.modified
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class SceneReader:
    """Reads windows of one scene at one of its levels, with their valid pixels. For one thread; close it when done."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        try:
            self._geotiff = GeoTiff(scene.uri, size=scene.size, etag=scene.etag)
            self._sidecar = _open_sidecar(scene) if scene.mask_sidecar else None
        except NotGeoTiffError as error:
            raise SceneReadError(f"{scene.id}: {error}") from error

    @property
    def bytes_fetched(self) -> int:
        """Bytes that came from the store so far."""
        return self._geotiff.file.bytes_fetched + (self._sidecar.file.bytes_fetched if self._sidecar else 0)

    def is_stored(self, window: Window, *, level: int = 0) -> bool:
        """Whether the file holds any block with data under a window; the block index alone is asked.

        Without a mask the image's own blocks decide, with one the mask's: a block of it that was never written is 0.
        """
        box = self._box(window, level)
        index = self._geotiff.index(level)
        mask = self._geotiff.index(level, mask=True)
        return (index is None or index.stored(*box)) and (mask is None or mask.stored(*box))

    def stored_bytes(self, window: Window, *, level: int = 0) -> int:
        """Bytes in the file that a window of the full image takes from ``level``.

        A block counts for the window that its first pixel lies in, so windows side by side count it once.
        """
        total = 0
        for index in (self._geotiff.index(level), self._geotiff.index(level, mask=True)):
            if index is not None:
                total += index.owned_bytes(self._box(window, 0), self.scene.levels[0])
        return total

    def read(self, window: Window, bands: tuple[int, ...], *, level: int = 0) -> Raster:
        """Pixels and validity of a window inside the level. Raises SceneReadError, SceneChangedError, StoreError.

        A pixel is valid unless the mask, the alpha band, the nodata value (in every band), NaN (in any band) or a block
        that the file does not hold says otherwise. When a mask says that nothing is, no pixel is read: they are 0.
        """
        box = self._box(window, level)
        try:
            valid = self._valid_by_mask(level, box)
            if valid is not None and not valid.any():
                return Raster(np.zeros((len(bands), window.height, window.width), self.scene.dtype), valid)
            pixels = self._geotiff.read_bands(level, bands, box)
            return Raster(pixels, self._valid_by_pixels(valid, pixels, bands, level, box))
        except SceneError as error:
            raise type(error)(f"{self.scene.id}: {error}") from error

    def read_valid(self, window: Window, bands: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Validity (row, col) at full size, without reading pixels where the file says it by a mask or not at all."""
        box = self._box(window, 0)
        scene = self.scene
        by_value = scene.alpha is not None or any(scene.nodata[band] is not None for band in bands)
        if by_value or np.dtype(scene.dtype).kind == "f":
            return self.read(window, bands).valid
        try:
            valid = self._valid_by_mask(0, box)
        except SceneError as error:
            raise type(error)(f"{scene.id}: {error}") from error
        if valid is None:
            valid = np.ones((window.height, window.width), np.bool_)
        return self._without_unstored(valid, 0, box)

    def _valid_by_mask(self, level: int, box: tuple[int, int, int, int]) -> npt.NDArray[np.bool_] | None:
        if self._sidecar is not None:
            if level:
                raise SceneReadError("a mask in a file beside the scene has no overviews")
            return np.asarray(self._sidecar.read_bands(0, (0,), box)[0] != 0)
        if self._geotiff.index(level, mask=True) is not None:
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
                valid = np.logical_or.reduce(data)
        if pixels.dtype.kind == "f":
            valid = valid & np.isfinite(pixels).all(axis=0)
        return self._without_unstored(valid, level, box)

    def _without_unstored(
        self, valid: npt.NDArray[np.bool_], level: int, box: tuple[int, int, int, int]
    ) -> npt.NDArray[np.bool_]:
        index = self._geotiff.index(level)
        absent = index.unstored_pixels(*box) if index is not None else None
        return valid if absent is None else valid & ~absent

    def _box(self, window: Window, level: int) -> tuple[int, int, int, int]:
        height, width = self.scene.levels[level]
        if window.row_off < 0 or window.col_off < 0 or window.row_end > height or window.col_end > width:
            raise ValueError(f"{window} reaches outside level {level} of {self.scene.id} ({width} x {height})")
        return window.row_off, window.row_end, window.col_off, window.col_end

    def close(self) -> None:
        """Close the file and its sidecar."""
        self._geotiff.close()
        if self._sidecar is not None:
            self._sidecar.close()


def _is_nodata(band: npt.NDArray[Any], value: float) -> npt.NDArray[np.bool_]:
    if np.isnan(value):
        return np.isnan(band) if band.dtype.kind == "f" else np.zeros(band.shape, np.bool_)
    if band.dtype.kind == "f":
        return np.asarray(band == band.dtype.type(value))
    limits = np.iinfo(band.dtype)
    if value != int(value) or not limits.min <= value <= limits.max:
        return np.zeros(band.shape, np.bool_)
    return np.asarray(band == int(value))


def _open_sidecar(scene: Scene) -> GeoTiff:
    info = store.head(scene.uri + ".msk")
    sidecar = GeoTiff(info.uri, size=info.size, etag=info.etag)
    if sidecar.levels()[0] != scene.levels[0]:
        raise SceneReadError(f"{scene.id}: the mask beside it has another size than the scene")
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

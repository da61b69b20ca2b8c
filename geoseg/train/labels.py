"""Label files in, codes on a scene's pixels out: rasters and vectors, at any resolution, with what is not known kept apart."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, FiniteFloat, StrictInt, StrictStr, field_validator, model_validator

from geoseg.config import Section
from geoseg.errors import ConfigError, LabelError, NotGeoTiffError, SceneError, StoreError
from geoseg.pieces import connected
from geoseg.raster import store
from geoseg.raster.geotiff import GeoTiff, ReadOptions, describe
from geoseg.raster.grid import Grid
from geoseg.raster.resample import Axis
from geoseg.raster.scene import Scene, SceneRef
from geoseg.raster.window import Window
from geoseg.raster.work import Box, WorkGrid
from geoseg.train.codes import UNLABELLED, LabelCodes
from geoseg.train.vectors import LineWidth, PlacedShapes, VectorFile, find_vectors, load_features, place

_SAME_PLACE_PX = 0.01
_STRIP_PX = 4 << 20
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_PLACES = ("folder", "stem", "name")
_BESIDE = 0  # a pixel that a source says is of none of its classes, before all sources are put together

Value = StrictInt | FiniteFloat | StrictStr


class LabelConfig(Section):
    """One source of labels for a group of scenes: a label raster, or a vector file.

    ``uri`` may hold ``{folder}``, ``{name}`` and ``{stem}`` of the scene's own URI (stem: the name without its suffix).
    A raster has ``values``: the pixel values of each class; any other value is background, those ``unlabelled`` apart. A
    vector file has ``class``, or ``class_field`` and ``values``: the class by the value of a field; a feature of another
    value labels nothing. ``layer``: of a GeoPackage with several. ``width_m``: of lines, in metres on the ground;
    ``width_field``: the field that has it, ``width_m`` counting where that is empty. Ground outside all shapes is
    background. ``area``: URI of a vector file of polygons; outside of them nothing is known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    uri: Annotated[str, Field(min_length=1)]
    class_name: Annotated[str | None, Field(alias="class")] = None
    class_field: str | None = None
    values: Annotated[dict[str, tuple[Value, ...]], Field(default_factory=dict)]
    unlabelled: tuple[StrictInt | FiniteFloat, ...] = ()
    layer: str | None = None
    width_m: Annotated[FiniteFloat, Field(gt=0)] | None = None
    width_field: str | None = None
    area: str | None = None

    @field_validator("uri", "area")
    @classmethod
    def _placeholders_are_known(cls, uri: str | None) -> str | None:
        for name in _PLACEHOLDER.findall(uri or ""):
            if name not in _PLACES:
                raise ValueError(f"there is no {{{name}}}, only {', '.join(f'{{{one}}}' for one in _PLACES)}")
        return uri

    @model_validator(mode="after")
    def _is_raster_or_vector(self) -> LabelConfig:
        if self.class_name is not None and (self.values or self.class_field):
            raise ValueError("class is for a file of one class; leave it out, or values and class_field")
        if self.class_name is None and not self.values:
            raise ValueError("say which class it labels: class for a vector file, values for a raster")
        if self.is_raster:
            for name in ("layer", "width_m", "width_field"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect on a raster; a vector file has class or class_field")
            if any(isinstance(value, str) for values in self.values.values() for value in values):
                raise ValueError("the values of a raster are numbers; of a vector file name the class_field")
        elif self.unlabelled:
            raise ValueError(
                "unlabelled has no effect on a vector file; name an area outside of which nothing is known"
            )
        claimed = [value for values in (*self.values.values(), self.unlabelled) for value in values]
        if len(set(claimed)) < len(claimed):
            raise ValueError("a value may stand for one class alone, or for unlabelled")
        return self

    @property
    def is_raster(self) -> bool:
        """Whether it is a label raster."""
        return self.class_name is None and self.class_field is None


def labelled_classes(configs: Sequence[LabelConfig], classes: Sequence[str]) -> tuple[int, ...]:
    """The codes of the classes that sources label, rising, never 0; ``classes`` are the bundle's, background first.

    Raises ConfigError for a class that the bundle does not have, and when nothing but background is labelled.
    """
    known = {code for config in configs for code in _class_codes(config, classes).values() if code}
    if not known:
        raise ConfigError(f"the labels name no class but background; the bundle has {', '.join(classes[1:])}")
    return tuple(sorted(known))


def found_classes(configs: Sequence[LabelConfig], classes: Sequence[str], codes: LabelCodes) -> tuple[int, ...]:
    """The codes of the classes that sources find wherever they are: those they label, and background if they leave none open."""
    labelled = labelled_classes(configs, classes)
    return (0, *labelled) if codes.background_of(labelled) == 0 else labelled


def _class_codes(config: LabelConfig, classes: Sequence[str]) -> dict[str, int]:
    """The code of each class that a source names."""
    names = [config.class_name] if config.class_name is not None else list(config.values)
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"labels {store.redact(config.uri)}: there is no class {name!r}, the bundle has {', '.join(classes)}{hint}"
            )
    return {name: list(classes).index(name) for name in names}


@dataclass(frozen=True, slots=True)
class VectorLabels:
    """A vector file as labels of a scene with this ``grid``.

    ``codes`` is the class of all features, or pairs of a value of ``class_field`` and its class.
    """

    file: VectorFile
    grid: Grid
    width: LineWidth
    class_field: str | None
    codes: int | tuple[tuple[Value, int], ...]
    area: VectorFile | None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read of the file."""
        return tuple(dict.fromkeys(field for field in (self.class_field, self.width.field) if field))

    def read(self, work: WorkGrid, window: Window) -> NDArray[np.uint8]:
        """See ``SceneLabels.read``; 0 for a pixel of none of its classes."""
        shapes, codes = _painted(self)
        found = shapes.burn(work, window, codes, fill=_BESIDE).astype(np.uint8)
        return _within(self.area, self.grid, work, window, found)

    def read_instances(self, work: WorkGrid, window: Window, class_code: int) -> NDArray[np.int32]:
        """The number of the feature of a class at each pixel, from 1; 0 for none."""
        shapes, codes = _painted(self)
        return shapes.burn(work, window, np.where(codes == class_code, shapes.numbers, 0).astype(np.int32), fill=0)


_Painted = tuple[PlacedShapes, NDArray[np.int32]]


class _Kept:
    """The shapes placed last, shared by all threads of a process; so many that their corners take some tens of MB.

    Chips are drawn from many scenes in turn, and to read a vector file again takes a second.
    """

    def __init__(self, max_corners: int) -> None:
        self._max_corners = max_corners
        self._found: OrderedDict[Any, _Painted] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], _Painted]) -> _Painted:
        """What ``make`` made of a key when it was last asked for it."""
        with self._lock:
            if key not in self._found:
                self._found[key] = make()
            self._found.move_to_end(key)
            corners = sum(shapes.num_corners for shapes, _ in self._found.values())
            while corners > self._max_corners and len(self._found) > 1:
                corners -= self._found.popitem(last=False)[1][0].num_corners
            return self._found[key]


_KEPT = _Kept(2_000_000)


def _painted(labels: VectorLabels) -> _Painted:
    """The shapes that label something, and the class of each."""
    return _KEPT.get(labels, lambda: _paint(labels))


def _paint(labels: VectorLabels) -> _Painted:
    shapes = place(load_features(labels.file, labels.fields), labels.grid, width=labels.width)
    codes = _codes_of(labels, shapes.columns, len(shapes.numbers))
    labelling = codes >= 0
    return shapes.only(labelling), codes[labelling]


def _codes_of(labels: VectorLabels, columns: dict[str, list[Any]], num: int) -> NDArray[np.int32]:
    """The class of each of ``num`` features, -1 for one that labels nothing."""
    if isinstance(labels.codes, int):
        return np.full(num, labels.codes, np.int32)
    by_value = dict(labels.codes)
    values = columns[labels.class_field or ""]
    found = [by_value.get(value, -1) if isinstance(value, (str, int, float)) else -1 for value in values]
    return np.array(found, np.int32)


def _placed_area(file: VectorFile, grid: Grid) -> _Painted:
    """The polygons of an area, and 1 for each."""

    def make() -> _Painted:
        shapes = place(load_features(file, ()), grid, width=None)
        return shapes, np.ones(len(shapes.numbers), np.int32)

    return _KEPT.get((file, grid), make)


def _within(
    area: VectorFile | None, grid: Grid, work: WorkGrid, window: Window, codes: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The codes, UNLABELLED where a pixel's centre lies outside the area."""
    if area is None:
        return codes
    shapes, ones = _placed_area(area, grid)
    inside = shapes.burn(work, window, ones, fill=0) != 0
    return np.where(inside, codes, np.uint8(UNLABELLED))


@dataclass(frozen=True, slots=True)
class RasterLabels:
    """A label raster that has the extent of a scene with this ``grid``; ``shape`` is its own (row, col).

    ``values`` are pairs of a class and its pixel values, ``unlabelled`` the values that say nothing; a pixel that the file's
    mask marks is unlabelled too. ``absent`` is the code of pixels that the file does not hold.
    """

    uri: str
    size: int
    etag: str
    shape: tuple[int, int]
    grid: Grid
    values: tuple[tuple[int, tuple[float, ...]], ...]
    unlabelled: tuple[float, ...]
    absent: int
    area: VectorFile | None

    def read(self, work: WorkGrid, window: Window) -> NDArray[np.uint8]:
        """See ``SceneLabels.read``; 0 for a pixel of none of its classes."""
        rows, cols = (Axis(self.shape[axis], work.work_shape[axis]) for axis in (0, 1))
        found = np.empty((window.height, window.width), np.uint8)
        known = {_BESIDE, UNLABELLED, *(code for code, _ in self.values)}
        # A window of a coarse grid lies over many pixels of the file; they are read in strips.
        across = cols.span(window.col_off, window.col_end)
        per_row = (across[1] - across[0]) * max(1.0, rows.scale)
        step = max(1, int(_STRIP_PX / per_row))
        for start in range(window.row_off, window.row_end, step):
            end = min(start + step, window.row_end)
            top, bottom = rows.shares(start, end)[0].min(), rows.shares(start, end)[0].max() + 1
            source = self._codes((int(top), int(bottom), *across))
            box = (start, end, window.col_off, window.col_end)
            found[start - window.row_off : end - window.row_off] = majority(
                source, rows, cols, box, (int(top), across[0]), known=known
            )
        return _within(self.area, self.grid, work, window, found)

    def _codes(self, box: Box) -> NDArray[np.uint8]:
        """The codes of a box of the file's own pixels."""
        geotiff = _open(self.uri, self.size, self.etag)
        pixels = geotiff.read_bands(0, (0,), box)[0]
        codes = np.full(pixels.shape, _BESIDE, np.uint8)
        for code, values in self.values:
            if code:
                codes[np.isin(pixels, values)] = code
        codes[np.isin(pixels, self.unlabelled)] = UNLABELLED
        if pixels.dtype.kind == "f":
            codes[~np.isfinite(pixels)] = UNLABELLED
        absent = geotiff.index(0).unstored_pixels(*box)
        if absent is not None:
            codes[absent] = self.absent
        if geotiff.masks:
            codes[geotiff.read_mask(0, box) == 0] = UNLABELLED
        return codes


@lru_cache(maxsize=64)
def _open(uri: str, size: int, etag: str) -> GeoTiff:
    return GeoTiff(uri, size=size, etag=etag)


def majority(
    codes: NDArray[np.uint8],
    row_axis: Axis,
    col_axis: Axis,
    box: Box,
    source_off: tuple[int, int],
    *,
    known: Iterable[int],
) -> NDArray[np.uint8]:
    """Codes (row, col) of an output box (row_off, row_end, col_off, col_end) of a resampled label array.

    ``codes`` is the source from row and column ``source_off`` on; they are among the ``known`` ones. Going down, a pixel
    more than half of whose area is unlabelled is unlabelled; any other gets the code with the greatest share of its area, of
    equal ones the highest (so a class goes before the background). Going up it gets the code at its centre. Shares are whole
    numbers: nothing is rounded.
    """
    rows, row_shares = row_axis.shares(box[0], box[1])
    cols, col_shares = col_axis.shares(box[2], box[3])
    rows, cols = rows - source_off[0], cols - source_off[1]
    if len(rows) == len(cols) == 1:
        return np.asarray(codes[rows[0][:, None], cols[0]])
    present = [code for code in sorted(known) if (codes == code).any()]
    if len(present) == 1:
        return np.full((rows.shape[1], cols.shape[1]), present[0], np.uint8)
    whole = row_shares.sum(axis=0)[:, None] * col_shares.sum(axis=0)
    shares = {}
    for code in present[1:]:
        inside = (codes == code).astype(np.int32)  # enough for the sum along one axis, of two it is not
        down = sum(
            inside[index] * share.astype(np.int32)[:, None] for index, share in zip(rows, row_shares, strict=True)
        )
        shares[code] = sum(down[:, index] * share for index, share in zip(cols, col_shares, strict=True))
    most = whole - sum(shares.values())
    best = np.full(most.shape, present[0], np.uint8)
    for code, share in shares.items():
        wins = 2 * share > whole if code == UNLABELLED else (share >= most) & (share > 0)
        best[wins], most[wins] = code, share[wins]
    return best


@dataclass(frozen=True)
class SceneLabels:
    """The labels of a scene: its sources, in the order in which they paint, each in one version of its file.

    ``background`` is the code of a pixel that is of none of the classes that they label together. ``remarks`` are sentences
    for the user: features that were left out or repaired.
    """

    scene_id: str
    sources: tuple[RasterLabels | VectorLabels, ...]
    background: int
    remarks: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Changes when a label file, what its values mean, or the grid of the scene changes; 64 hexadecimal digits."""
        return hashlib.sha256(repr((self.sources, self.background)).encode()).hexdigest()

    def read(self, work: WorkGrid, window: Window) -> NDArray[np.uint8]:
        """Codes (row, col) on a window of the work grid, whatever else is read; outside the scene they are UNLABELLED.

        A pixel has the class that the last source gives that knows one; without a class it is UNLABELLED if any source says
        so, and ``background`` if none does. Rasters: see ``majority``; shapes count where they cover a pixel's centre.
        Raises SceneError, StoreError, StopError (a vector file was changed).
        """
        found = np.full((window.height, window.width), UNLABELLED, np.uint8)
        inside, place_in = _clip(work, window)
        if inside is None:
            return found
        found[place_in] = self._combined(self._read_each(work, inside))
        return found

    def read_instances(self, work: WorkGrid, window: Window, class_code: int) -> NDArray[np.int32]:
        """An instance raster (row, col) of a class: 0 where ``read`` has another code, else a number for each object.

        Of vectors an object is a feature, of rasters what hangs together inside the window. A number tells it from the
        others of the window; with a single vector file it is the feature's place in that, elsewhere too. Raises as ``read``.
        """
        found = np.zeros((window.height, window.width), np.int32)
        inside, place_in = _clip(work, window)
        if inside is None:
            return found
        numbered = np.zeros((inside.height, inside.width), np.int32)
        each = self._read_each(work, inside)
        for source, codes in zip(self.sources, each, strict=True):
            if isinstance(source, RasterLabels):
                numbers = connected(codes == class_code)
            else:
                numbers = source.read_instances(work, inside, class_code)
            numbered = np.where(numbers > 0, numbers + numbered.max(), numbered)
        found[place_in] = np.where(self._combined(each) == class_code, numbered, 0)
        return found

    def _read_each(self, work: WorkGrid, inside: Window) -> list[NDArray[np.uint8]]:
        with _speaking_of(self.scene_id):
            return [source.read(work, inside) for source in self.sources]

    def _combined(self, each: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """The codes of all sources together."""
        combined = np.full(each[0].shape, self.background, np.uint8)
        is_known = np.zeros(combined.shape, np.bool_)
        for codes in each:
            is_class = (codes != _BESIDE) & (codes != UNLABELLED)
            is_known |= is_class
            combined = np.where(is_class | ((codes == UNLABELLED) & ~is_known), codes, combined)
        return combined


@contextmanager
def _speaking_of(scene_id: str) -> Iterator[None]:
    """Let what goes wrong with a file begin with the scene that it labels."""
    try:
        yield
    except (SceneError, StoreError) as error:
        raise type(error)(f"{scene_id}: {error}") from error


def _clip(work: WorkGrid, window: Window) -> tuple[Window | None, tuple[slice, slice]]:
    """The part of a window inside the work grid, and its place in the window; None when there is none."""
    top, bottom = max(0, window.row_off), min(work.work_shape[0], window.row_end)
    left, right = max(0, window.col_off), min(work.work_shape[1], window.col_end)
    if top >= bottom or left >= right:
        return None, (slice(0), slice(0))
    rows = slice(top - window.row_off, bottom - window.row_off)
    cols = slice(left - window.col_off, right - window.col_off)
    return Window(left, top, right - left, bottom - top), (rows, cols)


def find_labels(configs: Sequence[LabelConfig], scene: Scene, classes: Sequence[str], codes: LabelCodes) -> SceneLabels:
    """The labels of a scene, with all checked that can be before a pixel is read.

    Vector files are read whole, rasters to their header. Raises LabelError, ConfigError for a class that the bundle does not
    have, other kinds of SceneError for a raster that cannot be read, AccessDeniedError, StoreError.
    """
    background = codes.background_of(labelled_classes(configs, classes))
    sources: list[RasterLabels | VectorLabels] = []
    remarks: list[str] = []
    with _speaking_of(scene.id):
        for config in configs:
            area = find_vectors(_uri(config.area, scene), None) if config.area else None
            if area is not None:
                remarks += _check_area(area, scene)
            if config.is_raster:
                sources.append(_find_raster(config, scene, classes, area))
            else:
                vector = _find_vector(config, scene, classes, area)
                remarks += _check_vector(vector)
                sources.append(vector)
    return SceneLabels(scene.id, tuple(sources), background, tuple(remarks))


def _uri(template: str, scene: Scene) -> str:
    """A URI with its placeholders filled in."""
    name = store.base_name(scene.uri)
    parts = {"folder": scene.uri.removesuffix(name).rstrip("/"), "name": name, "stem": name.rpartition(".")[0] or name}
    return store.normalize_uri(_PLACEHOLDER.sub(lambda found: parts[found[1]], template))


def _check_area(area: VectorFile, scene: Scene) -> tuple[str, ...]:
    features = load_features(area, ())
    if not features.numbers.size:
        raise LabelError(
            f"{area.told}: holds no polygon; an area inside of which a scene is labelled needs at least one"
        )
    _placed_area(area, scene.grid)
    return features.remarks


def _find_vector(config: LabelConfig, scene: Scene, classes: Sequence[str], area: VectorFile | None) -> VectorLabels:
    named = _class_codes(config, classes)
    if config.class_name == classes[0]:
        raise ConfigError(
            f"labels {store.redact(config.uri)}: class names the background; name the class that it labels"
        )
    by_value = tuple((value, named[name]) for name, values in config.values.items() for value in values)
    return VectorLabels(
        file=find_vectors(_uri(config.uri, scene), config.layer),
        grid=scene.grid,
        width=LineWidth(config.width_m, config.width_field),
        class_field=config.class_field,
        codes=named[config.class_name] if config.class_name is not None else by_value,
        area=area,
    )


def _check_vector(labels: VectorLabels) -> tuple[str, ...]:
    """What there is to remark. Without an area a file that has nothing for the scene is taken for the wrong one."""
    told = labels.file.told
    features = load_features(labels.file, labels.fields)
    shapes, _ = _painted(labels)
    if labels.area is None and not features.numbers.size:
        raise LabelError(
            f"{told}: holds no feature; if there is nothing to label, name an area inside of which that is so (area = ...)"
        )
    if labels.area is None and shapes.is_elsewhere:
        raise LabelError(
            f"{told}: lies elsewhere, its extent does not meet the scene's; check its CRS (ogr2ogr -a_srs), or name an area "
            "inside of which the scene is labelled (area = ...)"
        )
    if features.numbers.size and (_codes_of(labels, features.columns, len(features.numbers)) < 0).all():
        seen = sorted({repr(value) for value in features.columns[labels.class_field or ""]})
        raise LabelError(
            f"{told}: no feature has one of the values in {labels.class_field!r}, they have {', '.join(seen[:8])}; mend values"
        )
    return features.remarks


def _find_raster(config: LabelConfig, scene: Scene, classes: Sequence[str], area: VectorFile | None) -> RasterLabels:
    named = _class_codes(config, classes)
    uri = _uri(config.uri, scene)
    told = store.redact(uri)
    try:
        file = describe(SceneRef(told, uri), ReadOptions(assume_crs=scene.grid.crs_wkt))
    except store.ObjectMissingError as error:
        raise LabelError(f"missing labels: there is no {told}; check the uri under labels") from error
    except NotGeoTiffError as error:
        raise LabelError(f"{error}; a vector file has class = ... or class_field = ... under labels") from error
    if len(file.bands) != 1:
        raise LabelError(f"{told}: has {len(file.bands)} bands, labels are one; take it with gdal_translate -b 1")
    _check_place(file.grid, scene.grid, told)
    unlabelled = config.unlabelled
    nodata = file.nodata_tags[0]
    if nodata is not None and not any(nodata in values for values in config.values.values()):
        if nodata == 0 and 0 not in unlabelled:
            raise LabelError(
                f"{told}: its nodata value is 0, which may mean that nothing is known there or that nothing is there; say it "
                f"with unlabelled = [0] or values = {{{classes[0]} = [0], ...}}"
            )
        unlabelled = (*unlabelled, nodata)
    values = tuple((named[name], numbers) for name, numbers in config.values.items())
    # Of a block that is not in the file GDAL says nodata, and 0 where no such value is told.
    left_out = 0 if nodata is None else nodata
    absent = next((code for code, numbers in values if left_out in numbers), _BESIDE)
    return RasterLabels(
        uri=uri,
        size=file.size,
        etag=file.etag,
        shape=(file.grid.height, file.grid.width),
        grid=scene.grid,
        values=values,  # type: ignore[arg-type]
        unlabelled=tuple(value for value in unlabelled if math.isfinite(value)),
        absent=UNLABELLED if left_out in unlabelled else absent,
        area=area,
    )


def _check_place(labels: Grid, scene: Grid, told: str) -> None:
    """Raise LabelError unless a label raster has the scene's CRS and extent."""
    code = scene.crs.to_epsg()
    crs = f"EPSG:{code}" if code else scene.crs.to_string()
    if labels.crs_wkt != scene.crs_wkt and labels.crs != scene.crs:
        raise LabelError(
            f"{told}: its CRS is {labels.crs.to_string()[:80]}, the scene's {crs[:80]}; {_remedy(scene, crs)}"
        )
    for share in ((0, 0), (1, 0), (0, 1)):
        at = labels.affine @ (share[0] * labels.width, share[1] * labels.height)
        col, row = ~scene.affine @ at
        off = col - share[0] * scene.width, row - share[1] * scene.height
        if max(abs(one) for one in off) > _SAME_PLACE_PX:
            corner = {(0, 0): "first", (1, 0): "top right", (0, 1): "bottom left"}[share]
            raise LabelError(
                f"{told}: does not have the scene's extent, its {corner} corner is {off[0]:.2f} columns and {off[1]:.2f} rows "
                f"off; {_remedy(scene, crs)}"
            )


def _remedy(scene: Grid, crs: str) -> str:
    """The command that brings a label raster onto a scene's grid."""
    t = scene.affine
    if t.b or t.d:
        return "the scene's grid is rotated, so rasterize the labels on it again"
    left, right = sorted((t.c, t.c + t.a * scene.width))
    bottom, top = sorted((t.f, t.f + t.e * scene.height))
    return (
        f"bring it there with gdalwarp -r near -t_srs '{crs}' -te {left!r} {bottom!r} {right!r} {top!r} -ts {scene.width} "
        f"{scene.height}"
    )

"""A published item in, its mask made again window by window from what the item says, and what differs out.

Nothing is written into the output and no lease is held. The windows go the way of a run, through the same worker, whose parts
lie in memory here until they are compared.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geoseg import __version__
from geoseg.config import Job, check
from geoseg.errors import (
    BundleError,
    ConfigError,
    NothingReadableError,
    SceneChangedError,
    SceneError,
)
from geoseg.evaluate.difference import ClassMatch
from geoseg.evaluate.picture import ChangedPlace, changes_picture
from geoseg.model.description import ClassName
from geoseg.model.pictures import as_rgb
from geoseg.model.precision import Precision, natural_precision
from geoseg.predict.aoi import find_area
from geoseg.predict.bundles import load_bundle
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.parts import part_uri
from geoseg.predict.plan import RunSpec, ScenePlan, plan_scene
from geoseg.predict.predictor import default_device
from geoseg.predict.publish import ITEM_NAME
from geoseg.predict.rasters import PublishedRaster, further_rasters, mask_raster
from geoseg.predict.reading import Task, WindowDone
from geoseg.predict.verify import file_fault
from geoseg.predict.worker import Worker
from geoseg.progress import StatusLine, duration
from geoseg.raster import store
from geoseg.raster.cog import NODATA, decode_window, unpack_blocks
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import SceneRef, mask_uri
from geoseg.raster.window import BLOCK, Window, WindowSet, plan_windows
from geoseg.run import make_run_spec

_TOLD_PLACES = 10
_TOLD_FAILURES = 5
_MOST_ARRANGEMENTS = 200_000
_LAYERS = ("probabilities", "uncertainty")
_HIDDEN = "***"  # of a name that was redacted


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A pixel of the scene that differs, and its class in the published mask and in the one made again."""

    row: int
    col: int
    published: str
    made: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduced:
    """What came of it.

    ``windows`` of ``windows_in_all`` were compared, with ``pixels`` in sum, of which ``different`` have another class,
    ``probabilities_different`` another probability and ``uncertainty_different`` another uncertainty (None when that is not
    published). ``places`` are the first of those of another class, ``worst`` is the window that has most of them. ``obstacles``
    say what is missing to make the mask again, ``remarks`` what else to know. ``made_on`` is the processor.
    """

    item: str
    windows: int = 0
    windows_in_all: int = 0
    pixels: int = 0
    different: int = 0
    different_windows: int = 0
    probabilities_different: int | None = None
    uncertainty_different: int | None = None
    places: tuple[Place, ...] = ()
    worst: Window | None = None
    picture: str = ""
    made_on: str = ""
    obstacles: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether all that was compared is the same."""
        return not (self.obstacles or self.differs)

    @property
    def differs(self) -> bool:
        """Whether anything that was compared does not agree."""
        return bool(self.different or self.probabilities_different or self.uncertainty_different)

    @property
    def exit_code(self) -> int:
        """0 equal, 1 different, 3 when something is missing and what could be compared does not differ."""
        if self.differs:
            return 1
        return NothingReadableError.exit_code if self.obstacles else 0

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {**asdict(self), "equal": self.is_equal, "exit_code": self.exit_code}

    def lines(self) -> list[str]:
        """The same for a person."""
        told = [f"cannot be made again: {sentence}" for sentence in self.obstacles]
        told += [f"remark: {sentence}" for sentence in self.remarks]
        if self.windows:
            told.append(
                f"{store.redact(self.item)}: {self.windows} of {self.windows_in_all} windows made again on {self.made_on}, "
                f"{self.pixels} pixels compared"
            )
        if self.different:
            told.append(
                f"DIFFERENT: {self.different} pixels in {self.different_windows} windows have another class; first places:"
            )
            told += [f"  row {one.row} col {one.col}: {one.published} -> {one.made}" for one in self.places]
        if self.worst is not None and self.different:
            one = self.worst
            told.append(
                f"most of them in the window at row {one.row_off} col {one.col_off} ({one.width} x {one.height} pixels)"
            )
        if self.probabilities_different:
            told.append(f"DIFFERENT: {self.probabilities_different} pixels have other probabilities")
        if self.uncertainty_different:
            told.append(f"DIFFERENT: {self.uncertainty_different} pixels have another uncertainty")
        if self.is_equal:
            told.append("EQUAL: what was compared is what the item says")
        return told + ([f"picture: {store.redact(self.picture)}"] if self.picture else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """What an item says of how its mask was made.

    ``mask`` is its URI and what the item says of it; ``layers`` are the same of the probabilities and the uncertainty, by key, as
    far as the settings ask for them.
    """

    uri: str
    out: str
    scene_id: str
    fingerprint: str
    sources: tuple[str, ...]
    versions: tuple[tuple[str, str | None], ...]
    is_stack: bool
    bundle: str
    bundle_uri: str
    settings: dict[str, Any]
    aoi: str
    made_by: str
    precisions: tuple[str, ...]
    mask: tuple[str, dict[str, Any]]
    layers: dict[str, tuple[str, dict[str, Any]]]


def reproduce_item(
    item: str,
    *,
    windows: int | None = None,
    aoi: str | None = None,
    picture: str | None = None,
    quiet: bool = False,
) -> Reproduced:
    """Make a published mask again, and compare it pixel by pixel.

    ``item`` is the URI of an ``item.json`` or of its folder, ``windows`` how many windows at most, by the SHA-256 of their places
    and so the same ones each time, ``aoi`` the file of the area that the mask was cut to, ``picture`` where a PNG of the place that
    differs most goes. Raises NothingReadableError when there is no item, ConfigError for one that is not geoseg's and for
    options that do not fit it, AccessDeniedError, StoreError.
    """
    claim = _read_claim(item)
    if picture is not None:
        picture = store.normalize_uri(picture)
        if f"{picture}/".startswith(f"{claim.out}/"):
            raise ConfigError(
                f"{store.redact(picture)}: lies in the output, into which nothing is written; name another place"
            )
    if aoi is not None and not claim.aoi:
        raise ConfigError(f"{store.redact(claim.uri)}: this mask was not cut to an area of interest; leave --aoi out")
    told = Reproduced(item=claim.uri, made_on=_processor(), remarks=tuple(_remarks(claim)))
    obstacles = [*_of_sources(claim), *_of_bundle(claim), *_of_area(claim, aoi)]
    if obstacles:
        return replace(told, obstacles=tuple(obstacles))
    run = _run(claim, aoi)
    ref, remarks = _ref(claim, run)
    told = replace(told, remarks=(*told.remarks, *remarks))
    prepared = attempt(lambda: _Comparison(claim, run, plan_scene(ref, run)), claim.scene_id, "planning")
    if isinstance(prepared, Failure):
        prepared.raise_if_stop()
        return replace(told, obstacles=(prepared.sentence,))
    found = prepared.compare(windows, quiet=quiet)
    told = replace(told, **found, remarks=(*told.remarks, *prepared.remarks))
    if told.differs:
        told = replace(told, remarks=(*told.remarks, _OTHER_PROCESSOR))
    if picture is not None and prepared.place is not None:
        store.write(picture, prepared.picture())
        told = replace(told, picture=picture)
    return told


_OTHER_PROCESSOR = (
    "items do not say on which processor they were made; another one, or another version of torch, may round otherwise, and then "
    "single pixels whose two best classes are almost equal get the other one"
)


def _read_claim(item: str) -> _Claim:
    uri = store.normalize_uri(item).rstrip("/")
    if not uri.endswith(".json"):
        uri = store.join(uri, ITEM_NAME)
    told = store.redact(uri)
    try:
        return _parse(uri, json.loads(store.read(uri)))
    except store.ObjectMissingError as error:
        raise NothingReadableError(
            f"{told}: there is no item; name the item.json of a published scene, or its folder OUT/SCENE"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{told}: not an item of a mask that geoseg published: it lacks {error}") from error


def _parse(uri: str, item: dict[str, Any]) -> _Claim:
    properties, assets = item["properties"], item["assets"]
    folder = uri.rsplit("/", 1)[0]
    out = folder.rsplit("/", 1)[0]
    etags, masks = properties["geoseg:input_etag"], properties.get("geoseg:mask_etag")
    is_stack = isinstance(etags, list)
    sources = tuple(str(link["href"]) for link in item["links"] if link["rel"] == "derived_from")
    etags = etags if is_stack else [etags]
    masks = [""] * len(etags) if masks is None else masks if is_stack else [masks]

    def raster(key: str) -> tuple[str, dict[str, Any]]:
        return store.join(folder, str(assets[key]["href"]).removeprefix("./")), assets[key]

    model = str(assets["model"]["href"]).removeprefix("../")
    settings = dict(properties["geoseg:settings"])
    return _Claim(
        uri=uri,
        out=out,
        scene_id=str(item["id"]),
        fingerprint=str(properties["geoseg:fingerprint"]),
        sources=sources,
        versions=tuple((str(one), str(mask) or None) for _, one, mask in zip(sources, etags, masks, strict=True)),
        is_stack=is_stack,
        bundle=str(properties["geoseg:bundle"]["sha256"]),
        bundle_uri=store.join(out, model.rsplit("/", 1)[0]),
        settings=settings,
        aoi=str(properties.get("geoseg:aoi_sha256", "")),
        made_by=str(properties["processing:software"]["geoseg"]),
        precisions=tuple(map(str, properties.get("geoseg:precision", ["float32"]))),
        mask=raster("mask"),
        layers={key: raster(key) for key in _LAYERS if settings.get(key)},
    )


def _remarks(claim: _Claim) -> Iterator[str]:
    here = __version__
    if claim.made_by != here:
        yield f"the mask was made by geoseg {claim.made_by}, this is {here}"
    if len(claim.precisions) > 1:
        yield (
            f"the mask was made by devices of several kinds, in {' and '.join(claim.precisions)}: single pixels may have another "
            "class than the one made here"
        )
    elif claim.precisions == ("bfloat16",) and _precision(claim) != "bfloat16":
        yield "the mask was made in bfloat16, in which this device does not compute: single pixels may have another class"


def _precision(claim: _Claim) -> Precision:
    """In which numbers to make the mask again: those it was made in, float32 where this device does not compute in them."""
    return natural_precision(torch.device(default_device())) if "bfloat16" in claim.precisions else "float32"


def _processor() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"a CPU ({platform.machine()}), torch {torch.__version__}"


def _of_sources(claim: _Claim) -> Iterator[str]:
    """What is wrong with the images, and with the masks beside them."""
    for uri, (etag, mask_etag) in zip(claim.sources, claim.versions, strict=True):
        if _HIDDEN in uri:
            yield f"the item keeps a part of its source's name to itself, {uri}, so it cannot be found"
            continue
        yield from _of_object(uri, etag, "its source")
        if mask_etag is not None:
            yield from _of_object(mask_uri(uri), mask_etag, "the mask beside its source")


def _of_object(uri: str, wanted: str, what: str) -> Iterator[str]:
    told = store.redact(uri)
    try:
        came = store.head(store.normalize_uri(uri)).etag
    except store.ObjectMissingError:
        yield f"{what} {told} is gone; wanted is the version with the ETag {wanted}"
    except SceneError as error:
        yield str(error)
    else:
        if came != wanted:
            yield f"{what} {told} was replaced: the mask was made from the version with the ETag {wanted}, there is {came} now"


def _of_bundle(claim: _Claim) -> Iterator[str]:
    told = store.redact(claim.bundle_uri)
    try:
        digest = load_bundle(claim.bundle_uri).digest
    except BundleError as error:
        yield f"the bundle that is kept with the results cannot be read: {error}"
    else:
        if digest != claim.bundle:
            yield f"{told}: is another bundle (SHA-256 {digest}) than the one that made the mask ({claim.bundle})"


def _of_area(claim: _Claim, aoi: str | None) -> Iterator[str]:
    if not claim.aoi:
        return
    if aoi is None:
        yield f"the mask was cut to an area of interest, a file with the SHA-256 {claim.aoi}; name it with --aoi"
        return
    came = find_area(aoi).sha256
    if came != claim.aoi:
        yield f"{store.redact(aoi)}: has the SHA-256 {came}, the mask was cut to an area with {claim.aoi}"


def _run(claim: _Claim, aoi: str | None) -> RunSpec:
    """The run that would make the mask, as far as pixels go. Raises ConfigError for settings unknown to this version."""
    settings = {key: value for key, value in claim.settings.items() if value is not None}
    values = {
        "scenes": claim.sources,
        "out": claim.out,
        "bundle": claim.bundle_uri,
        "predict": {**settings, **({"aoi": aoi} if aoi is not None else {})},
    }
    return make_run_spec(check(Job, values, where=f"{store.redact(claim.uri)}, geoseg:settings"))


def _ref(claim: _Claim, run: RunSpec) -> tuple[SceneRef, list[str]]:
    """The scene or the stack, and what there is to remark.

    An item names the images of a stack that are there; which dates are missing follows from the fingerprint.
    """
    uris = [store.normalize_uri(uri) for uri in claim.sources]
    edited = (
        f"the item's fingerprint does not follow from what it says by the rules of geoseg {__version__}: others held when it "
        "was made, or somebody has edited it"
    )
    if not claim.is_stack:
        is_same = run.fingerprint_of(claim.versions, is_stack=False) == claim.fingerprint
        return SceneRef(claim.scene_id, uris[0]), [] if is_same else [edited]
    num = run.description.dates
    for places in islice(combinations(range(num), len(uris)), _MOST_ARRANGEMENTS):
        versions: list[tuple[str, str | None] | None] = [None] * num
        dates = [""] * num
        for place, uri, one in zip(places, uris, claim.versions, strict=True):
            versions[place], dates[place] = one, uri
        if run.fingerprint_of(versions, is_stack=True) == claim.fingerprint:
            return SceneRef(claim.scene_id, uris[0], tuple(dates)), []
    if len(uris) < num:
        edited += f"; which of the stack's {num} dates are missing is not known, the last ones are taken to be"
    return SceneRef(claim.scene_id, uris[0], (*uris, *[""] * (num - len(uris)))), [edited]


@dataclass(slots=True)
class _Counts:
    """What was found so far."""

    windows: int = 0
    pixels: int = 0
    different: int = 0
    different_windows: int = 0
    layers_different: Counter[str] = field(default_factory=Counter)
    places: list[Place] = field(default_factory=list)
    worst: Window | None = None
    most: int = -1


class _Comparison:
    """A published mask, and the same one in the making. Raises SceneError when what is published cannot be read."""

    def __init__(self, claim: _Claim, run: RunSpec, plan: ScenePlan) -> None:
        self.claim, self.plan = claim, plan
        self.classes = run.description.classes
        # Parts go to memory: no part of a run on the output is taken for one of these, and none is left there.
        self.run = replace(run, out=f"memory://reproduce-{uuid.uuid4().hex}")
        for one, (etag, mask_etag) in zip(plan.scenes, claim.versions, strict=True):
            if (one.etag, one.mask_etag) != (etag, mask_etag):
                raise SceneChangedError(
                    f"{claim.scene_id}: {store.redact(one.uri)} or the mask beside it was replaced: wanted were the ETags {etag} "
                    f"and {mask_etag}, there are {one.etag} and {one.mask_etag}"
                )
        self.remarks: list[str] = []
        self.place: tuple[Window, NDArray[np.uint8], NDArray[np.uint8]] | None = None
        self._mask = self._open(claim.mask[0])
        self._layers = [(one, self._open(claim.layers[one.key][0])) for one in further_rasters(run)]

    def _open(self, uri: str) -> SceneReader:
        scene = describe(SceneRef(self.claim.scene_id, uri), ReadOptions())
        if scene.grid != self.plan.scene.grid:
            raise SceneChangedError(
                f"{self.claim.scene_id}: {store.redact(uri)} does not lie where its source lies; geoseg verify tells more"
            )
        return SceneReader(scene)

    def compare(self, most: int | None, *, quiet: bool) -> dict[str, Any]:
        """Compare all windows, or ``most`` of those with something in them. Raises StopError kinds, StoreError."""
        windows = self._windows(most)
        if most is None:
            self._check_files()
        counts, failures = _Counts(), list[str]()
        for done in self._made(windows, quiet=quiet):
            if done.failure is not None:
                done.failure.raise_if_stop()
                failures.append(done.failure.sentence)
            else:
                self._compare(done.task.window, counts)
        if most is None:
            self._compare_outside(windows, counts)
        if len(failures) > _TOLD_FAILURES:
            failures[_TOLD_FAILURES:] = [f"and {len(failures) - _TOLD_FAILURES} more windows"]
        return {
            "windows": counts.windows,
            "windows_in_all": self.plan.num_windows,
            "pixels": counts.pixels,
            "different": counts.different,
            "different_windows": counts.different_windows,
            **{f"{one.key}_different": counts.layers_different[one.key] for one, _ in self._layers},
            "places": tuple(counts.places),
            "worst": counts.worst,
            "obstacles": tuple(failures),
        }

    def _windows(self, most: int | None) -> list[Window]:
        """The windows to make; there is something in each."""
        each = self.plan.windows(self.plan.reader())
        return list(each) if most is None else sorted(heapq.nsmallest(most, each, key=self._rank))

    def _rank(self, window: Window) -> bytes:
        return hashlib.sha256(f"{self.claim.scene_id}:{window.row_off}:{window.col_off}".encode()).digest()

    def _check_files(self) -> None:
        for told, one in {"mask": self.claim.mask, **self.claim.layers}.items():
            sentence, _ = file_fault(*one)
            self.remarks += [f"the published {told}, {store.redact(one[0])}: {sentence}"] if sentence else []

    def _made(self, windows: list[Window], *, quiet: bool) -> Iterator[WindowDone]:
        status, began = StatusLine(quiet=quiet), time.monotonic()

        def line(num: int) -> str:
            rate = num / max(1e-9, time.monotonic() - began)
            left = duration((len(windows) - num) / max(rate, 1e-9))
            return f"windows compared {num}/{len(windows)}, {rate:.2f} a second, {left} left"

        worker = Worker(self.run, precision=_precision(self.claim))
        try:
            for num, done in enumerate(worker.run(Task(self.plan, window) for window in windows), 1):
                yield done
                status.show(partial(line, num), last=num == len(windows))
        finally:
            worker.close()

    def _compare(self, window: Window, counts: _Counts) -> None:
        """Compare a window whose parts lie in memory, and drop them; further layers have none where the mask has no data."""
        made = self._take(mask_raster(self.run), window)
        self._count(window, made[0], counts)
        for one, reader in self._layers:
            again = self._take(one, window) if (made != NODATA).any() else np.uint8(NODATA)
            self._count_layer(one, reader, window, again, counts)

    def _take(self, raster: PublishedRaster, window: Window) -> NDArray[np.uint8]:
        uri = part_uri(self.run, self.plan, window, raster.layer)
        _, blocks = unpack_blocks(store.read(uri))
        store.delete([uri])
        return decode_window(blocks, window, raster.profile.num_bands)

    def _pixels(self, reader: SceneReader, window: Window, bands: tuple[int, ...]) -> NDArray[np.uint8]:
        read = reader.read(window, bands)
        return np.where(read.valid, read.pixels, np.uint8(NODATA))

    def _count(self, window: Window, made: NDArray[np.uint8], counts: _Counts) -> None:
        published = self._pixels(self._mask, window, (0,))[0]
        rows, cols = np.nonzero(published != made)
        counts.windows += 1
        counts.pixels += made.size
        counts.different += len(rows)
        counts.different_windows += bool(len(rows))
        for row, col in islice(zip(rows.tolist(), cols.tolist(), strict=True), _TOLD_PLACES - len(counts.places)):
            codes = int(published[row, col]), int(made[row, col])
            was, now = (_name(code, self.classes) for code in codes)
            counts.places.append(Place(row=window.row_off + row, col=window.col_off + col, published=was, made=now))
        if len(rows) > counts.most:
            counts.most, counts.worst = len(rows), window
            self.place = _worst_block(window, published, made)

    def _count_layer(
        self,
        raster: PublishedRaster,
        reader: SceneReader,
        window: Window,
        made: NDArray[np.uint8] | np.uint8,
        counts: _Counts,
    ) -> None:
        published = self._pixels(reader, window, tuple(range(raster.profile.num_bands)))
        counts.layers_different[raster.key] += int(np.count_nonzero((published != made).any(axis=0)))

    def _compare_outside(self, windows: list[Window], counts: _Counts) -> None:
        """The windows that hold nothing: what is published must have no data there."""
        seen = WindowSet()
        for window in windows:
            seen.add(window.row_off, window.col_off)
        grid = self.plan.scene.grid
        for window in plan_windows(grid.height, grid.width, self.plan.window, across=self.plan.across):
            if not seen.has(window.row_off, window.col_off):
                self._count(window, np.full((window.height, window.width), NODATA, np.uint8), counts)
                for one, layer in self._layers:
                    self._count_layer(one, layer, window, np.uint8(NODATA), counts)

    def picture(self) -> bytes:
        """A PNG of the place that differs most: image, published, made again, and what differs."""
        assert self.place is not None
        window, published, made = self.place
        dates = self.plan.reader().read(window, self.plan.bands).dates()
        read = max(dates, key=lambda one: int(one.valid.sum()))
        num = int(np.count_nonzero(published != made))
        caption = (
            f"{self.claim.scene_id}: row {window.row_off}, col {window.col_off}: {num} of {made.size} pixels differ"
        )
        place = ChangedPlace(caption, as_rgb(read.pixels, read.valid), published, made)
        return changes_picture([place], ClassMatch(self.classes, self.classes))


def _name(code: int, classes: tuple[ClassName, ...]) -> str:
    if code == NODATA:
        return "no data"
    return classes[code].name if code < len(classes) else f"{code}, which is no class"


def _worst_block(
    window: Window, published: NDArray[np.uint8], made: NDArray[np.uint8]
) -> tuple[Window, NDArray[np.uint8], NDArray[np.uint8]]:
    """The block of a window in which most pixels differ: its place, and both masks there."""
    corners = [(row, col) for row in range(0, window.height, BLOCK) for col in range(0, window.width, BLOCK)]

    def block(corner: tuple[int, int]) -> tuple[slice, slice]:
        return slice(corner[0], corner[0] + BLOCK), slice(corner[1], corner[1] + BLOCK)

    worst = max(corners, key=lambda one: int(np.count_nonzero(published[block(one)] != made[block(one)])))
    was, now = published[block(worst)].copy(), made[block(worst)].copy()
    return Window(window.col_off + worst[1], window.row_off + worst[0], now.shape[1], now.shape[0]), was, now

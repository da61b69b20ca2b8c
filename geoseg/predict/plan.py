"""What has to be done for a scene: a pure function of its header, the bundle and the settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from geoseg.config import PredictConfig
from geoseg.errors import BandError, ResolutionError, StackError
from geoseg.model.description import BundleDescription, UNetVariant
from geoseg.model.tiling import Tiling
from geoseg.predict.aoi import AreaFile, PixelArea, load_area
from geoseg.predict.coarse import CoarsePass
from geoseg.predict.guard import Guard, MaskBefore
from geoseg.predict.stitch import Stitching
from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.scene import Scene, SceneRef
from geoseg.raster.stack import StackReader, common_levels, describe_stack
from geoseg.raster.window import ACROSS, Window, num_windows, plan_windows
from geoseg.raster.work import WorkGrid, near_work_grid, work_grid

PIXEL_VERSION = 1
AREA_VERSION = 2
_NODATA_VERSION = 2  # of runs with a nodata value, which counts beside masks since then
RESOLUTION_TOLERANCE = 1.5
MAX_ENLARGEMENT = 4.0
_WINDOWS = (1024, 2048, 4096)
_FEWEST = 4
_WASTE = 0.10
# Features of the first level's width that stand at once; geoseg.model.costs counts them exactly, and takes seconds.
_PLANES = {"unet": 6, "attention-unet": 6, "resunet": 9, "unet++": 12, "unet3d": 12, "vnet": 6}
_FLOAT_BYTES = 4
_KEPT_BYTES = 160 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """The weights of a run's bundle as they are kept with the results: path below the output, bytes, SHA-256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeFrom:
    """The parts of a fingerprint one by one, to tell which of them changed.

    ``etags`` and ``mask_etags`` ("" for none) are those of the scene, or of the scenes of a stack that are there; ``bundle``,
    ``settings`` and ``aoi`` ("" for none) are SHA-256 (hex).
    """

    etags: tuple[str, ...]
    mask_etags: tuple[str, ...]
    bundle: str
    settings: str
    aoi: str

    def changes_to(self, now: MadeFrom) -> tuple[str, ...]:
        """Why a mask that was made from this has to be made anew, in words."""
        found = (
            ("source changed", (self.etags, self.mask_etags) != (now.etags, now.mask_etags)),
            ("bundle changed", self.bundle != now.bundle),
            ("settings changed", (self.settings, self.aoi) != (now.settings, now.aoi)),
        )
        return tuple(reason for reason, holds in found if holds) or ("geoseg changed",)


def settings_digest(settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of the settings that change pixels, without those that are None: items leave them out."""
    told = {key: value for key, value in settings.items() if value is not None}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """A network and its settings as far as they decide how a scene is cut and which pixels come out.

    Cores begin and end on multiples of ``stride`` and have ``margin`` around them: the network's, or those of the tiling.
    Where no size of windows is said, ``fastest_window`` was measured (0 for none), and ``window_bytes`` is what the network may
    hold of one.
    """

    bundle_digest: str
    description: BundleDescription
    stride: int
    margin: int
    config: PredictConfig
    area: AreaFile | None = None
    tiling: Tiling | None = None
    window_bytes: int = 0
    fastest_window: int = 0

    @property
    def is_blended(self) -> bool:
        """Whether tiles that overlap make the mask, so that it has seams."""
        return self.tiling is not None and self.tiling.is_blended

    @property
    def read_options(self) -> ReadOptions:
        """The part that concerns reading headers."""
        config = self.config
        return ReadOptions(assume_crs=config.assume_crs, nodata=config.nodata, sidecar_mask=config.sidecar_mask)

    def fingerprint(self, etag: str, mask_etag: str | None = None) -> str:
        """SHA-256 (hex) over all that decides a scene's pixels: its version, the bundle and the settings that count.

        ``mask_etag`` is the version of the mask beside the scene, where there is one.
        """
        told = {
            "version": PIXEL_VERSION if self.config.nodata is None else _NODATA_VERSION,
            "input": etag,
            "bundle": self.bundle_digest,
            "settings": self.config.pixel_settings(),
            "aoi": self.area.sha256 if self.area else None,
        }
        if self.area is not None:
            told["aoi_version"] = AREA_VERSION
        if mask_etag is not None:
            told["mask"] = mask_etag
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def fingerprint_of(self, versions: Sequence[tuple[str, str | None] | None], *, is_stack: bool) -> str:
        """The fingerprint of a scene, or of a stack, from the ETags of image and mask at each date (None for a missing one)."""
        if is_stack:
            return self.fingerprint(json.dumps(versions))
        (version,) = versions
        assert version is not None
        return self.fingerprint(*version)

    def made_from(self, versions: Sequence[tuple[str, str | None] | None]) -> MadeFrom:
        """The parts of that fingerprint."""
        there = [version for version in versions if version is not None]
        return MadeFrom(
            etags=tuple(etag for etag, _ in there),
            mask_etags=tuple(mask_etag or "" for _, mask_etag in there),
            bundle=self.bundle_digest,
            settings=settings_digest(self.config.pixel_settings()),
            aoi=self.area.sha256 if self.area else "",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec(NetworkSpec):
    """What all scenes of a run share; small, picklable, and without secrets."""

    out: str
    bundle_uri: str
    model: ModelFile
    guard: Guard | None = None

    def is_released(self, plan: ScenePlan) -> bool:
        """Whether somebody has looked at a scene, as it is now, and wants it published."""
        return self.guard is not None and plan.fingerprint in self.guard.released


@dataclass(frozen=True)
class ScenePlan:
    """A scene and how it is cut; travels as JSON in the rows of a pipeline.

    Of a stack ``stack`` has the scene at each date, None where there is none, and ``scene`` is the first of them, with the
    stack's id.

    ``replaces`` is the version of the item that stood when the scene was planned, None when there was none: publishing
    puts its own in this one's place and in no other's. ``revision`` counts the items of a scene from 1; without it an item with
    the bytes of an earlier one would be that very version again, where an ETag is made of the bytes. ``reasons`` say in words why
    there is something to do. ``before`` is the last mask of the same ground. ``coarse`` is the grid of a coarse pass, where there
    is to be one.
    """

    scene: Scene
    bands: tuple[int, ...]
    stitching: Stitching
    window: int
    fingerprint: str
    area_file: AreaFile | None
    stack: tuple[Scene | None, ...] = ()
    replaces: store.Version | None = None
    revision: int = 1
    reasons: tuple[str, ...] = ()
    before: MaskBefore | None = None
    coarse: CoarsePass | None = None

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scene, or those of the stack that are there."""
        return tuple(scene for scene in self.stack if scene is not None) or (self.scene,)

    def reader(self) -> SceneReader | StackReader:
        """A reader of the scene or the stack. Raises SceneError."""
        return StackReader(self.stack) if self.stack else SceneReader(self.scene)

    @property
    def num_windows(self) -> int:
        """How many write windows tile the scene, empty ones included."""
        return num_windows(self.scene.grid.height, self.scene.grid.width, self.window)

    @cached_property
    def across(self) -> int:
        """How many windows side by side come before those below them.

        As many as ``_KEPT_BYTES`` of decoded blocks allow, or as many as a block is wide, and at least 4: where one column of
        windows ends and another begins, blocks are fetched twice.
        """
        least = max(ACROSS, -(-self.scene.block_shape[1] // self.window))
        of_none, of_one = (self._kept_bytes(count, self.stitching) for count in (0, 1))
        most = max(least, (_KEPT_BYTES - of_none) // max(1, of_one - of_none))
        cols = -(-self.scene.grid.width // self.window)
        even = -(-cols // -(-cols // most))
        return max(least, -(-even // ACROSS) * ACROSS)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded blocks that windows yet to come will need, in the plan's order, and of those in work.

        While these are kept, no block is fetched or decoded twice in a column of windows. A coarse pass has its own.
        """
        return sum(self._kept_bytes(self.across, each) for each in (self.stitching, self.coarse) if each is not None)

    def _kept_bytes(self, across: int, stitching: Stitching) -> int:
        """Those under the lower edge of ``across`` windows, the right edge of a square of them, and two windows."""
        size, window, margin, edge = stitching.level_shape, list[int](), list[int](), list[int]()
        for axis, block in enumerate(self.scene.block_shape):
            window.append(-(-self.window * size[axis] // stitching.scene_shape[axis]))
            margin.append(-(-stitching.margin * size[axis] // stitching.work_shape[axis]))
            edge.append(((2 * margin[axis] - 2) // block + 2) * block)

        def touched(axis: int, count: int) -> int:
            around = 2 * (margin[axis] + self.scene.block_shape[axis])
            return min(size[axis], count * window[axis] + around) if count else 0

        num_pixels = min(size[0], edge[0]) * touched(1, across)
        num_pixels += min(size[1], edge[1]) * touched(0, ACROSS) + 2 * touched(0, 1) * touched(1, 1)
        itemsize = np.dtype(self.scene.dtype).itemsize
        return num_pixels * len(self.scenes) * (len(self.scene.bands) * itemsize + self.scene.has_mask)

    @cached_property
    def area(self) -> PixelArea | None:
        """The area of interest on this scene, if there is one."""
        return load_area(self.area_file).on(self.scene.grid, self.scene.id) if self.area_file else None

    def windows(self, reader: SceneReader | StackReader) -> Iterator[Window]:
        """The write windows that may hold something: inside the area of interest, with blocks in the file."""
        grid = self.scene.grid
        for window in plan_windows(grid.height, grid.width, self.window, across=self.across):
            if self.area is not None and not self.area.touches(window):
                continue
            if reader.is_stored(window):
                yield window

    def to_json(self) -> str:
        """The plan as text."""
        return _ADAPTER.dump_json(self).decode()


@lru_cache(maxsize=256)
def plan_from_json(text: str) -> ScenePlan:
    """The plan that ``to_json`` wrote; the last few are kept."""
    return _ADAPTER.validate_json(text)


def plan_scene(ref: SceneRef, run: NetworkSpec) -> ScenePlan:
    """The plan of a scene. Raises a SceneError that says why the scene does not fit the bundle, and what to do."""
    scene, stack = _describe(ref, run)
    description, config = run.description, run.config
    bands = scene.band_indexes(description.bands, config.bands)
    if scene.dtype != description.dtype and config.scale is None:
        low, high = description.value_range
        raise BandError(
            f"{scene.id}: the bundle takes {description.dtype} from {low:g} to {high:g}, the scene has {scene.dtype}; say which "
            "of its values stand for these two, for example --scale 0,2047"
        )
    levels, factor = common_levels(stack or (scene,)), _factor(scene, run)
    work = work_grid(levels, factor)
    stitching = Stitching(
        work.scene_shape, work.work_shape, work.level, work.level_shape, stride=run.stride, margin=run.margin
    )
    window = config.window or _window_size(run, work)
    for one in stack:
        if one is not None and one.band_indexes(description.bands, config.bands) != bands:
            raise StackError(f"{one.id}: its bands stand in another order than those of the stack's first scene")
    versions = [(one.etag, one.mask_etag) if one is not None else None for one in stack or (scene,)]
    fingerprint = run.fingerprint_of(versions, is_stack=bool(stack))
    coarse = _coarse_pass(levels, factor * config.coarse, run) if config.coarse else None
    return ScenePlan(scene, bands, stitching, window, fingerprint, run.area, stack, coarse=coarse)


def _coarse_pass(levels: tuple[tuple[int, int], ...], factor: float, run: NetworkSpec) -> CoarsePass:
    work = near_work_grid(levels, factor)
    return CoarsePass(
        work.scene_shape, work.work_shape, work.level, work.level_shape, stride=run.stride, margin=run.margin
    )


def _describe(ref: SceneRef, run: NetworkSpec) -> tuple[Scene, tuple[Scene | None, ...]]:
    """The scene; or of a stack the first one under the stack's id, and all of them."""
    wanted = run.description.dates
    if not ref.dates:
        if wanted > 1:
            raise StackError(
                f"{ref.id}: the bundle takes stacks of {wanted} dates, this is one scene; group scenes with --stack-by, "
                "[[stacks]] in a job file, or a STAC ItemCollection"
            )
        return describe(ref, run.read_options), ()
    if len(ref.dates) != wanted:
        raise StackError(
            f"{ref.id}: the stack has {len(ref.dates)} dates, the bundle takes {'one scene' if wanted == 1 else wanted}"
        )
    return describe_stack(ref, run.read_options, warp=run.config.warp_stacks)


def _factor(scene: Scene, run: NetworkSpec) -> float:
    """Work-grid pixels in units of the scene's own."""
    wanted, native_m = run.config.resolution, scene.grid.resolution_m
    if wanted == "native" or (wanted == "bundle" and run.description.resolution_m is None):
        return 1.0
    target_m = run.description.resolution_m if wanted == "bundle" else wanted
    assert isinstance(target_m, float)
    factor = target_m / native_m
    if wanted == "bundle" and 1 / RESOLUTION_TOLERANCE <= factor <= RESOLUTION_TOLERANCE:
        return 1.0
    if factor < 1 / MAX_ENLARGEMENT:
        raise ResolutionError(
            f"{scene.id}: its pixels are {native_m:.3g} m on the ground, the network is to run at {target_m:.3g} m, and nothing "
            f"is enlarged more than {MAX_ENLARGEMENT:g} times; use a bundle made for such imagery, or --resolution native to "
            "run this one on the pixels as they are"
        )
    return factor


def peak_of_window(run: NetworkSpec, size: int) -> int:
    """Bytes that a U-Net holds at most of a window of ``size``, in float32; of tiles of a network from outside nothing is said."""
    variant = run.description.variant
    if not isinstance(variant, UNetVariant):
        return 0
    num_features = _PLANES[variant.name] * variant.width * run.description.dates
    return _FLOAT_BYTES * num_features * (size + 2 * run.margin) ** 2


def _window_size(run: NetworkSpec, work: WorkGrid) -> int:
    """The side of a scene's windows: the smallest with hardly any waste that fits memory and gives a scene a few of them.

    By valid convolutions a layer computes on average half of the margin around a core of ``size``, so a pixel costs about
    (1 + margin / size)^2 times its share. Where a device was measured (``geoseg.predict.tuning``) it is the fastest of it, if a
    scene has a few of them. Where several scene pixels make one of the work grid, windows are larger by that.
    """
    height, width = work.work_shape
    size = run.fastest_window or next(
        size
        for size in _WINDOWS
        if size == _WINDOWS[-1]
        or (1 + run.margin / size) ** 2 - 1 <= _WASTE
        or peak_of_window(run, 2 * size) > run.window_bytes
    )
    while size > _WINDOWS[0] and -(-height // size) * -(-width // size) < _FEWEST:
        size //= 2
    factor = work.scene_shape[0] / height
    while factor >= 2 and size < _WINDOWS[-1]:
        size, factor = size * 2, factor / 2
    return size


_ADAPTER = TypeAdapter(ScenePlan)

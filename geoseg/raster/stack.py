"""A stack: scenes of the same ground at several dates, grouped from many, read together."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pystac.utils import make_absolute_href

from geoseg.errors import ConfigError, StackError
from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, SceneReader, describe
from geoseg.raster.raster import Raster
from geoseg.raster.scene import Scene, SceneRef, list_scenes, slug
from geoseg.raster.versions import Versions
from geoseg.raster.warp import WarpedReader
from geoseg.raster.window import Window

_SAME_PLACE_PX = 1e-3
_GEOTIFF = "image/tiff"


class StackReader:
    """Reads windows of the scenes of a stack, date after date; for a missing date (None) nothing is valid.

    Otherwise as ``SceneReader``, with ``bands`` and ``level`` the same in all scenes; those that do not share the grid of the
    first are read on it.
    """

    def __init__(self, scenes: Sequence[Scene | None]) -> None:
        first = next(scene for scene in scenes if scene is not None)
        self._each = [_reader(scene, first) if scene is not None else None for scene in scenes]
        self._present = [reader for reader in self._each if reader is not None]

    @property
    def bytes_fetched(self) -> int:
        """See ``SceneReader``."""
        return sum(reader.bytes_fetched for reader in self._present)

    def is_stored(self, window: Window, *, level: int = 0) -> bool:
        """Whether any scene holds a block with data there."""
        return any(reader.is_stored(window, level=level) for reader in self._present)

    def stored_bytes(self, window: Window, *, level: int = 0) -> int:
        """See ``SceneReader``."""
        return sum(reader.stored_bytes(window, level=level) for reader in self._present)

    def read(self, window: Window, bands: tuple[int, ...], *, level: int = 0) -> Raster:
        """Pixels (date after date, row, col) and validity (date, row, col)."""
        rasters = [reader.read(window, bands, level=level) if reader else None for reader in self._each]
        return Raster.stacked(rasters)

    def let_go(self, window: Window, *, level: int = 0) -> None:
        """See ``SceneReader``."""
        for reader in self._present:
            if isinstance(reader, SceneReader):
                reader.let_go(window, level=level)

    def read_valid(self, window: Window, bands: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Pixels (row, col) that are valid at any date."""
        valid: npt.NDArray[np.bool_] = np.logical_or.reduce([one.read_valid(window, bands) for one in self._present])
        return valid


def _reader(scene: Scene, first: Scene) -> SceneReader | WarpedReader:
    return WarpedReader(scene, first) if _difference(first, scene) else SceneReader(scene)


def common_levels(scenes: Sequence[Scene | None]) -> tuple[tuple[int, int], ...]:
    """The levels that all scenes on the first one's grid have, from the full image on."""
    first, *others = [scene for scene in scenes if scene is not None]
    on_grid = [first, *(scene for scene in others if not _difference(first, scene))]
    common = []
    for levels in zip(*(scene.levels for scene in on_grid), strict=False):
        if len(set(levels)) > 1:
            break
        common.append(levels[0])
    return tuple(common)


def describe_stack(ref: SceneRef, options: ReadOptions, *, warp: bool) -> tuple[Scene, tuple[Scene | None, ...]]:
    """The first scene of a stack, under the stack's id, and the scene of each date, None where there is none.

    Raises SceneError for a scene that cannot be used, or that does not fit the others (see ``check_stack``).
    """
    stack = tuple(
        describe(SceneRef(f"{ref.id} ({store.base_name(uri)})", uri), options) if uri else None for uri in ref.dates
    )
    check_stack(ref.id, stack, warp=warp)
    first = next(scene for scene in stack if scene is not None)
    return replace(first, id=ref.id), stack


def check_stack(stack_id: str, scenes: Sequence[Scene | None], *, warp: bool) -> None:
    """Raise StackError unless all scenes share a dtype and, when they may not be warped, a grid."""
    first, *others = [scene for scene in scenes if scene is not None]
    for scene in others:
        differs = None if warp else _difference(first, scene)
        if differs:
            raise StackError(
                f"{stack_id}: the scenes of a stack must lie on one grid; {scene.id} has {differs[1]}, {first.id} has "
                f"{differs[0]}; --warp-stacks reads it there, bilinear"
            )
        if scene.dtype != first.dtype:
            raise StackError(
                f"{stack_id}: the scenes of a stack must have one dtype; {scene.id} has {scene.dtype}, {first.id} has "
                f"{first.dtype}"
            )


def _difference(first: Scene, second: Scene) -> tuple[object, object] | None:
    one, two = first.grid, second.grid
    if (one.height, one.width) != (two.height, two.width):
        return f"{one.width} x {one.height} pixels", f"{two.width} x {two.height} pixels"
    if one.crs_wkt != two.crs_wkt and one.crs != two.crs:
        return one.crs.to_string(), two.crs.to_string()
    for corner in ((0, 0), (one.width, 0), (0, one.height)):
        col, row = ~one.affine @ (two.affine @ corner)
        if max(abs(col - corner[0]), abs(row - corner[1])) > _SAME_PLACE_PX:
            return f"the geotransform {one.geotransform}", two.geotransform
    return None


def list_sources(
    sources: Sequence[str], stack_by: str | None, *, out: str | None = None, versions: Versions | None = None
) -> list[SceneRef]:
    """The scenes of the sources (see ``list_scenes``), in stacks when ``stack_by`` says how; a STAC document is a stack.

    Raises as ``list_scenes``, ``group_scenes`` and ``stack_from_stac``.
    """
    documents = [source for source in sources if source.lower().endswith(".json")]
    refs = list_scenes([source for source in sources if source not in documents], out=out, versions=versions)
    if stack_by is not None:
        refs = group_scenes(refs, stack_by)
    return refs + [stack_from_stac(store.normalize_uri(source)) for source in documents]


def group_scenes(refs: Sequence[SceneRef], pattern: str) -> list[SceneRef]:
    """Stacks of scenes whose URIs match a regular expression with the groups ``stack`` and ``date``.

    Scenes with the same ``stack`` belong together, in the order of their ``date`` as text; every stack gets a place for
    each date that any has, empty where it has no scene. A scene that does not match, in both groups, stays by itself. Raises
    ConfigError.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--stack-by {pattern}: not a regular expression: {error}") from error
    if not {"stack", "date"} <= compiled.groupindex.keys():
        raise ConfigError(f"--stack-by {pattern}: needs the groups (?P<stack>...) and (?P<date>...)")
    stacks: dict[str, dict[str, SceneRef]] = {}
    alone: list[SceneRef] = []
    for ref in refs:
        found = compiled.search(ref.uri)
        if found is None or found["stack"] is None or found["date"] is None:
            alone.append(ref)
            continue
        scenes = stacks.setdefault(found["stack"], {})
        if found["date"] in scenes:
            raise ConfigError(
                f"--stack-by {pattern}: {store.redact(ref.uri)} and {store.redact(scenes[found['date']].uri)} are both stack "
                f"{found['stack']}, date {found['date']}"
            )
        scenes[found["date"]] = ref
    dates = sorted({date for scenes in stacks.values() for date in scenes})
    made = [
        replace(
            make_stack(name, [scenes[date].uri if date in scenes else "" for date in dates]),
            sums=_sums_of([scenes[date] for date in dates if date in scenes]),
        )
        for name, scenes in stacks.items()
    ]
    return sorted([*alone, *made], key=lambda ref: ref.uri)


def _sums_of(refs: Sequence[SceneRef]) -> tuple[str, ...]:
    return tuple(sum_ for ref in refs for sum_ in ref.sums or ("",)) if any(ref.sums for ref in refs) else ()


def make_stack(name: str, uris: Sequence[str]) -> SceneRef:
    """A stack of the scenes at ``uris``, in order, "" for a missing date. Raises ConfigError when all are missing."""
    dates = tuple(store.normalize_uri(uri) if uri else "" for uri in uris)
    if not any(dates):
        raise ConfigError(f"the stack {name} has no scene at any date")
    return SceneRef(slug(name), next(uri for uri in dates if uri), dates)


def stack_from_stac(uri: str) -> SceneRef:
    """The stack that a STAC document describes: each GeoTIFF asset with the role ``data`` is a date.

    The document is an Item, whose assets have a ``datetime`` each, or an ItemCollection of items of one date each; an item
    without such an asset is a missing date. Raises ConfigError, AccessDeniedError, StoreError.
    """
    told = store.redact(uri)
    try:
        document = json.loads(store.read(uri))
        items = document["features"] if document["type"] == "FeatureCollection" else [document]
        dated = sorted(entry for item in items for entry in _dated(item, uri))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{told}: not a STAC Item or ItemCollection with GeoTIFF assets of the role data and their datetimes: {error!r}"
        ) from error
    return make_stack(
        str(document.get("id") or store.base_name(uri).removesuffix(".json")), [href for _, href in dated]
    )


def _dated(item: dict[str, Any], uri: str) -> list[tuple[str, str]]:
    data = [
        asset
        for asset in item["assets"].values()
        if "data" in asset.get("roles", ()) and str(asset.get("type", _GEOTIFF)).startswith(_GEOTIFF)
    ]
    own = item["properties"].get("datetime") or item["properties"].get("start_datetime")
    return [(str(asset.get("datetime") or own), make_absolute_href(str(asset["href"]), uri)) for asset in data] or [
        (str(own), "")
    ]

"""The scenes of a job, from every kind of source, with what the stores told of their versions on the way."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import shapely
from rasterio.warp import transform_geom
from shapely.geometry import box, mapping, shape

from geoseg.config import Job, SceneSource
from geoseg.errors import ConfigError
from geoseg.interval import Interval, moment, parse_interval
from geoseg.predict.aoi import AreaOfInterest
from geoseg.raster import store
from geoseg.raster.scene import SceneRef, slug
from geoseg.raster.stac_api import search
from geoseg.raster.stac_files import ListedItem, lies_below, read_list, resolve, walk_catalog
from geoseg.raster.stack import group_scenes, list_sources, make_stack
from geoseg.raster.sums import MISSING
from geoseg.raster.versions import Versions

_GEOTIFF = "image/tiff"
_WGS84 = "EPSG:4326"
_NOT_STAC = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    shapely.errors.ShapelyError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Scenes and stacks sorted by URI, each id once; what is known of versions; a sentence for each thing left aside."""

    refs: list[SceneRef]
    versions: Versions
    remarks: tuple[str, ...]


def list_job(job: Job, out: str) -> Listing:
    """List the sources of a job that publishes under ``out``. Raises StopError kinds, NothingReadableError, StoreError.

    Relative times count from now.
    """
    versions, remarks = Versions(), list[str]()
    refs = list_sources(job.scenes, job.stack_by, out=out, versions=versions)
    refs += [make_stack(stack.name, stack.scenes) for stack in job.stacks]
    now = datetime.now(timezone.utc)
    catalogued: dict[SceneRef, SceneRef] = {}
    for ref in (ref for source in job.source for ref in _scenes_of(source, now, remarks)):
        if ref.sums or ref not in catalogued:
            catalogued[ref] = ref
    found = list(catalogued.values())
    refs = list(dict.fromkeys([*(group_scenes(found, job.stack_by) if job.stack_by else found), *refs]))
    twice = [name for name, num in Counter(ref.id.lower() for ref in refs).items() if num > 1]
    if twice:
        raise ConfigError(f"two scenes or stacks would be published as {twice[0]}; give one of them another name")
    return Listing(refs=sorted(refs, key=lambda ref: ref.uri), versions=versions, remarks=tuple(remarks))


@dataclass(slots=True)
class _LeftAside:
    """How many items of a source have no place and no fitting asset, how many assets lie ``off``, and the first such address."""

    nowhere: int = 0
    without: int = 0
    off: int = 0
    first_off: str = ""

    def remarks(self, source: SceneSource, allow: list[str]) -> Iterator[str]:
        """A sentence for each kind that there was."""
        told = store.redact(source.name)
        if self.nowhere:
            yield (
                f"{told}: {self.nowhere} items have no geometry that can be read, so that none can tell whether they touch the "
                f"{'bbox' if source.bbox else 'area'}; left aside"
            )
        if self.without:
            wanted = (
                f"asset {' or '.join(source.assets)}"
                if source.assets
                else f"GeoTIFF asset of the role {' or '.join(source.roles)}"
            )
            yield f"{told}: {self.without} items have no {wanted}; left aside"
        if self.off and not allow:
            yield (
                f"{told}: {self.off} of its addresses are none that geoseg reads, the first {store.redact(self.first_off)!r}; left "
                "aside; say how they become URIs of a bucket, or paths, in the source's rewrite"
            )
        elif self.off:
            yield (
                f"{told}: {self.off} assets lie outside {', '.join(map(store.redact, allow))} and were left aside; name where they "
                "may lie in the source's allow, and how web addresses become URIs of a bucket in its rewrite"
            )


def _scenes_of(source: SceneSource, now: datetime, remarks: list[str]) -> Iterator[SceneRef]:
    """The scenes that a source names, at the times and places that it asks for."""
    interval = parse_interval(source.datetime, now=now) if source.datetime else None
    area = _area(source)
    allow = [store.normalize_uri(prefix) for prefix in source.allow]
    if source.catalog:
        allow.append(store.normalize_uri(source.catalog).rpartition("/")[0])
    left = _LeftAside()
    for listed in _items(source, interval, area, allow, remarks):
        try:
            if not _fits(listed.item, source, interval):
                continue
            touches = area is None or _touches(listed.item, area)
            left.nowhere += touches is None
            if touches:
                yield from _refs(listed, source, allow, left)
        except _NOT_STAC as error:
            remarks.append(
                f"{store.redact(listed.base)}: item {listed.item.get('id')!r} is not valid STAC: {error!r}; left aside"
            )
    remarks.extend(left.remarks(source, allow))


def _refs(listed: ListedItem, source: SceneSource, allow: list[str], left: _LeftAside) -> Iterator[SceneRef]:
    """The scenes of one item; counts in ``left`` what is none."""
    picked = _pick(listed.item, source)
    left.without += not picked
    for key, asset in picked:
        uri = _uri(asset, listed.base, source, allow)
        if uri is None:
            left.off += 1
            left.first_off = left.first_off or str(asset["href"])
        else:
            yield SceneRef(
                slug(f"{listed.item['id']}-{key}" if len(source.assets) > 1 else str(listed.item["id"])),
                uri,
                sums=(str(asset.get("file:checksum") or MISSING),) if source.checksums else (),
            )


def _items(
    source: SceneSource, interval: Interval | None, area: Any, allow: list[str], remarks: list[str]
) -> Iterator[ListedItem]:
    if source.manifest:
        yield from read_list(source.manifest, placed=area is not None)
    elif source.catalog:
        yield from walk_catalog(source.catalog, allow, remarks)
    elif source.api:
        parameters = {"datetime": interval.text()} if interval else {}
        if source.collections:
            parameters["collections"] = ",".join(source.collections)
        if area is not None:
            bounds = source.bbox or shapely.bounds(area)
            parameters["bbox"] = ",".join(f"{value:.9g}" for value in bounds)
        token = os.environ.get(source.token_env, "") if source.token_env else None
        if token == "":
            raise ConfigError(
                f"{store.redact(source.api)}: the environment has no {source.token_env}, which token_env names"
            )
        for item in search(source.api, parameters, token=token):
            if isinstance(item, dict):
                yield ListedItem(item, source.api)
            else:
                remarks.append(f"{store.redact(source.api)}: gave {item!r:.80} for an item; left aside")


def _area(source: SceneSource) -> Any:
    """The area that a source asks for, in longitude and latitude, or None; a bbox may go over the antimeridian."""
    if source.bbox:
        west, south, east, north = source.bbox
        if west > east:
            return shapely.union(box(west, south, 180, north), box(-180, south, east, north))
        return box(west, south, east, north)
    if not source.area:
        return None
    try:
        area = AreaOfInterest(source.area, store.read(store.normalize_uri(source.area)))
    except store.ObjectMissingError as error:
        raise ConfigError(f"the area {error}") from error
    return shape(transform_geom(area.crs, _WGS84, mapping(area.geometry)))


def _fits(item: dict[str, Any], source: SceneSource, interval: Interval | None) -> bool:
    if source.collections and item.get("collection") not in source.collections:
        return False
    if interval is not None:
        properties = item["properties"]
        at = properties.get("datetime")
        start, end = properties.get("start_datetime") or at, properties.get("end_datetime") or at
        if not start or not end or not interval.overlaps(moment(start), moment(end)):
            return False
    return True


def _touches(item: dict[str, Any], area: Any) -> bool | None:
    """Whether an item's geometry, or its bbox where it has none, touches the area; None where it has neither."""
    bounds = item.get("bbox")
    if item.get("geometry"):
        place = shape(item["geometry"])
    elif bounds:
        place = box(*(bounds if len(bounds) == 4 else (*bounds[:2], *bounds[3:5])))
    else:
        return None
    return None if place.is_empty else bool(place.intersects(area))


def _pick(item: dict[str, Any], source: SceneSource) -> list[tuple[str, dict[str, Any]]]:
    """The assets to predict, with their keys: those that the source names, else the one GeoTIFF with one of its roles."""
    assets = item["assets"]
    if source.assets:
        return [(key, assets[key]) for key in source.assets if key in assets]
    found = [
        (key, asset)
        for key, asset in assets.items()
        if set(asset.get("roles") or ()) & set(source.roles) and str(asset.get("type") or _GEOTIFF).startswith(_GEOTIFF)
    ]
    if len(found) > 1:
        raise ConfigError(
            f"{store.redact(source.name)}: the item {item['id']!r} has {len(found)} GeoTIFF assets of the role "
            f"{' or '.join(source.roles)} ({', '.join(repr(key) for key, _ in found)}); say which in the source's assets"
        )
    return found


def _uri(asset: dict[str, Any], base: str, source: SceneSource, allow: list[str]) -> str | None:
    """Where an asset lies: its href or one of its alternates that may be read; None when there is none.

    The entries of a list that the job itself names may lie anywhere, unless its ``allow`` says where.
    """
    for told in (asset, *(asset.get("alternate") or {}).values()):
        href = resolve(str(told["href"]), base)
        for prefix, instead in source.rewrite.items():
            if href.startswith(prefix):
                href = instead + href.removeprefix(prefix)
        try:
            uri = store.normalize_uri(href)
        except ConfigError:
            continue
        if (source.manifest and not allow) or lies_below(uri, allow):
            return uri
    return None

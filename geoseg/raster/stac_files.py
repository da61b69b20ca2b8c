"""STAC items from files: static catalogues that are walked link by link, and lists (GeoJSON, ItemCollection, GeoParquet)."""

from __future__ import annotations

import contextlib
import io
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform_geom
from shapely.geometry import mapping

from geoseg.errors import ConfigError, SceneError
from geoseg.raster import store

_HREFS = ("uri", "href", "location", "url")
_LINKS = ("child", "item")
_DOCUMENT_BYTES = 64 << 20
_LON_LAT_NAME = "OGC:CRS84"
_LON_LAT = CRS.from_epsg(4326)  # rasterio has the longitude first
_ALSO_LON_LAT = (_LON_LAT, CRS.from_user_input(_LON_LAT_NAME))
_CODE = re.compile(r"(?:urn:(?:x-)?ogc:def:crs:)?(?:EPSG|ESRI|IAU_2015|IGNF|OGC):[\w.]*:?\w+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ListedItem:
    """A STAC item, or what was made to look like one, and the URI from which its hrefs lead."""

    item: dict[str, Any]
    base: str


def walk_catalog(uri: str, allow: Sequence[str], remarks: list[str]) -> Iterator[ListedItem]:
    """The items of a static catalogue or collection, in the order of its links, each document read once.

    Links that lead out of the catalogue's folder are followed below the prefixes ``allow`` alone; what is left aside for
    that, or cannot be read, becomes a remark. Raises ConfigError when the catalogue itself cannot be read,
    AccessDeniedError, StoreError.
    """
    root = store.normalize_uri(uri)
    roots = [root.rpartition("/")[0], *allow]
    seen, level, off = {root}, [root], 0
    while level:
        below: list[str] = []
        for where, document in zip(level, store.in_parallel(_try_to_load, level), strict=True):
            if isinstance(document, CatalogError):
                if where == root:
                    raise ConfigError(str(document)) from document
                remarks.append(str(document))
                continue
            if document.get("type") == "Feature":
                yield ListedItem(document, where)
                continue
            for href in _links(document):
                target = resolve(href, where)
                if not lies_below(target, roots):
                    off += 1
                elif target not in seen:
                    seen.add(target)
                    below.append(target)
        level = below
    if off:
        remarks.append(
            f"{store.redact(root)}: {off} of its links lead out of {store.redact(roots[0])} and were not followed; name where "
            "they may lead in the source's allow"
        )


def _links(document: dict[str, Any]) -> list[str]:
    return [str(link["href"]) for link in links_of(document) if link.get("rel") in _LINKS and link.get("href")]


def links_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The links of a STAC document or of an API's page, as objects. Raises ValueError for what is no list of objects."""
    links = document.get("links") or []
    if not isinstance(links, list) or not all(isinstance(link, dict) for link in links):
        raise ValueError(f"its links are no list of objects with rel and href, got {links!r:.80}")
    return links


def _try_to_load(uri: str) -> dict[str, Any] | CatalogError:
    try:
        document = json.loads(store.read_version(uri, max_bytes=_DOCUMENT_BYTES)[0])
    except SceneError as error:
        return CatalogError(f"the STAC document {error}")
    except (ValueError, RecursionError) as error:
        return CatalogError(f"{store.redact(uri)}: not JSON: {error}")
    if not isinstance(document, dict) or document.get("type") not in ("Catalog", "Collection", "Feature"):
        return CatalogError(f"{store.redact(uri)}: not a STAC Catalog, Collection or Item")
    try:
        links_of(document)
    except ValueError as error:
        return CatalogError(f"{store.redact(uri)}: {error}")
    return document


class CatalogError(SceneError):
    """A document of a catalogue that cannot be read; the others go on."""


def read_list(uri: str, *, placed: bool) -> Iterator[ListedItem]:
    """The items of a GeoJSON FeatureCollection, an ItemCollection, or a (STAC) GeoParquet file.

    A feature or row that is no STAC item names its image in ``uri``, ``href``, ``location`` or ``url``, and may have an
    ``id``, a ``datetime`` and a geometry. ``placed``: geometries come in longitude and latitude, and are None where they
    cannot be brought there; else they stay in the CRS of the list, whatever it is. Raises ConfigError, AccessDeniedError,
    StoreError.
    """
    where = store.normalize_uri(uri)
    try:
        body = store.read(where)
        if where.lower().endswith((".parquet", ".geoparquet")):
            table = pq.read_table(io.BytesIO(body))
            geometries, named = _geometries_of(table.schema.metadata or {})
            items = [_from_row(row, geometries) for row in table.to_pylist()]
        else:
            document = json.loads(body)
            named = _named_crs(document)
            items = [_from_feature(feature) for feature in document["features"]]
    except store.ObjectMissingError as error:
        raise ConfigError(f"the list of scenes {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException, shapely.errors.ShapelyError) as error:
        raise ConfigError(
            f"{store.redact(where)}: not a list of scenes: wanted a FeatureCollection or a table whose entries are STAC items or "
            f"have one of {', '.join(_HREFS)}, got {error!r}"
        ) from error
    crs = _crs(where, named) if placed else _LON_LAT
    for item in items:
        moved = {} if crs == _LON_LAT else {"geometry": _in_lon_lat(item.get("geometry"), crs), "bbox": None}
        yield ListedItem(item | moved, where)


def _geometries_of(metadata: dict[bytes, bytes]) -> tuple[str, Any]:
    """The column of a GeoParquet file's geometries, and its CRS: text or PROJJSON, None where the file says that it has none."""
    geo = json.loads(metadata.get(b"geo", b"{}"))
    column = str(geo.get("primary_column", "geometry"))
    return column, geo.get("columns", {}).get(column, {}).get("crs", _LON_LAT_NAME)


def _named_crs(document: dict[str, Any]) -> Any:
    """The CRS of a GeoJSON file, which before RFC 7946 could have one by name; what it says of it in another way as it stands."""
    crs: Any = document.get("crs") or _LON_LAT_NAME
    try:
        return crs["properties"]["name"]
    except (KeyError, TypeError):
        return crs


def _crs(where: str, named: Any) -> CRS:
    """The CRS that a list names, by a code or as PROJJSON; no other text, in which PROJ could be told to read files."""
    by_code = isinstance(named, str) and _CODE.fullmatch(named)
    if by_code or (isinstance(named, dict) and named.get("type") in ("GeographicCRS", "ProjectedCRS")):
        with contextlib.suppress(CRSError):
            crs = CRS.from_user_input(named if by_code else json.dumps(named))
            return _LON_LAT if crs in _ALSO_LON_LAT else crs
    raise ConfigError(
        f"{store.redact(where)}: wanted geometries in a geographic or projected CRS, to tell which touch the source's bbox or "
        f"area, got the CRS {named!r:.80}; write it again in longitude and latitude"
    )


def _in_lon_lat(geometry: Any, crs: CRS) -> Any:
    try:
        return transform_geom(crs, _LON_LAT, geometry) if geometry else None
    except (RasterioError, CPLE_BaseError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _from_feature(feature: dict[str, Any]) -> dict[str, Any]:
    if isinstance(feature.get("assets"), dict):
        return feature
    properties = feature.get("properties") or {}
    return _plain_item({"id": feature.get("id"), **properties}, feature.get("geometry"))


def _from_row(row: dict[str, Any], geometries: str) -> dict[str, Any]:
    wkb = row.get(geometries)
    geometry = shapely.from_wkb(wkb, on_invalid="ignore") if isinstance(wkb, bytes) else None
    shape = mapping(geometry) if geometry is not None else None
    if not isinstance(row.get("assets"), dict):
        return _plain_item(row, shape)
    times = {key: _text(row.get(key)) for key in ("datetime", "start_datetime", "end_datetime")}
    assets = {key: asset for key, asset in row["assets"].items() if asset}
    return {
        "id": row["id"],
        "collection": row.get("collection"),
        "properties": times,
        "geometry": shape,
        "assets": assets,
    }


def _plain_item(told: dict[str, Any], geometry: Any) -> dict[str, Any]:
    href = next((told[key] for key in _HREFS if told.get(key)), None)
    if href is None:
        raise KeyError(f"an entry with {', '.join(told)} alone")
    times = {"datetime": _text(told.get("datetime"))}
    assets = {"data": {"href": str(href), "roles": ["data"]}}
    return {
        "id": told.get("id") or store.base_name(str(href)),
        "properties": times,
        "geometry": geometry,
        "assets": assets,
    }


def _text(time: Any) -> str | None:
    return time if time is None or isinstance(time, str) else str(time.isoformat())


def resolve(href: str, base: str) -> str:
    """Where a link of the document at ``base`` leads."""
    if "://" in href or href.startswith("/"):
        return href if "://" in href else posixpath.normpath(href)
    start = base.index("/", base.index("://") + 3) if "://" in base else 0
    return base[:start] + posixpath.normpath(posixpath.join(posixpath.dirname(base[start:]), href))


def lies_below(uri: str, roots: Sequence[str]) -> bool:
    """Whether a URI lies below one of these prefixes."""
    return any(uri.startswith(root.rstrip("/") + "/") for root in roots)

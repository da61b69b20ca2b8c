"""STAC items from files: static catalogues that are walked link by link, and lists (GeoJSON, ItemCollection, GeoParquet)."""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from shapely.geometry import mapping

from geoseg.errors import ConfigError, SceneError
from geoseg.raster import store

_HREFS = ("uri", "href", "location", "url")
_LINKS = ("child", "item")
_DOCUMENT_BYTES = 64 << 20


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


def read_list(uri: str) -> Iterator[ListedItem]:
    """The items of a GeoJSON FeatureCollection, an ItemCollection, or a (STAC) GeoParquet file.

    A feature or row that is no STAC item names its image in ``uri``, ``href``, ``location`` or ``url``, and may have an
    ``id``, a ``datetime`` and a geometry. Raises ConfigError, AccessDeniedError, StoreError.
    """
    where = store.normalize_uri(uri)
    try:
        body = store.read(where)
        if where.lower().endswith((".parquet", ".geoparquet")):
            items = [_from_row(row) for row in pq.read_table(io.BytesIO(body)).to_pylist()]
        else:
            items = [_from_feature(feature) for feature in json.loads(body)["features"]]
    except store.ObjectMissingError as error:
        raise ConfigError(f"the list of scenes {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException, shapely.errors.ShapelyError) as error:
        raise ConfigError(
            f"{store.redact(where)}: not a list of scenes: wanted a FeatureCollection or a table whose entries are STAC items or "
            f"have one of {', '.join(_HREFS)}, got {error!r}"
        ) from error
    for item in items:
        yield ListedItem(item, where)


def _from_feature(feature: dict[str, Any]) -> dict[str, Any]:
    if isinstance(feature.get("assets"), dict):
        return feature
    properties = feature.get("properties") or {}
    return _plain_item({"id": feature.get("id"), **properties}, feature.get("geometry"))


def _from_row(row: dict[str, Any]) -> dict[str, Any]:
    geometry = row.get("geometry")
    shape = mapping(shapely.from_wkb(geometry)) if isinstance(geometry, bytes) else None
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

"""The items of an output in, one by one, the STAC collection that sums them up out; what is kept of an item is small."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import pystac

from geoseg.errors import ConfigError
from geoseg.interval import moment
from geoseg.predict.publish import ITEM_NAME, VECTORS_NAME
from geoseg.predict.stac import BLOCKS_SUM
from geoseg.raster import store

COLLECTION_NAME, ITEMS_NAME = "collection.json", "items.parquet"
PARQUET = "application/vnd.apache.parquet"
MOST_LINKS = 10_000
_EXTENSIONS = ("classification/v2.0.0", "file/v2.1.0", "projection/v2.0.0", "raster/v1.1.0")
_OF_ONE_FILE = ("href", "file:size", "file:checksum", BLOCKS_SUM)
_MODEL = ("mlm:name", "mlm:architecture", "mlm:framework", "mlm:tasks", "mlm:input", "mlm:output")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionTexts:
    """What a person says of a collection; what is None follows from the items. ``licence`` is an SPDX identifier."""

    id: str
    title: str | None = None
    description: str | None = None
    licence: str | None = None


@dataclass(slots=True)
class _ClassSum:
    color: str
    pixels: int = 0
    area_km2: float = 0.0


@dataclass(slots=True)
class Sums:
    """What a collection tells of its items, counted while they pass. Items must come in the order of their ids."""

    scene_ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    bboxes: list[list[float]] = field(default_factory=list)
    times: tuple[datetime, datetime] | None = None
    gsd: tuple[float, float] | None = None
    codes: set[str] = field(default_factory=set)
    software: set[str] = field(default_factory=set)
    classes: dict[str, _ClassSum] = field(default_factory=dict)
    bundles: dict[str, dict[str, Any]] = field(default_factory=dict)
    assets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, scene_id: str, item: Mapping[str, Any], vectors: Mapping[str, Any] | None = None) -> None:
        """Count a scene's item, and the item of its polygons and lines where there is one.

        Raises KeyError, TypeError, ValueError for an item that lacks something; nothing of it is counted then.
        """
        properties = item["properties"]
        gsd = float(properties["gsd"])
        at = properties.get("datetime")
        start, end = (moment(str(properties.get(key) or at)) for key in ("start_datetime", "end_datetime"))
        counted = [one for one in item["assets"]["mask"]["classification:classes"] if "count" in one]
        found = [(str(one["name"]), str(one["color_hint"]), int(one["count"])) for one in counted]
        bundle, version = properties["geoseg:bundle"], properties["processing:software"]["geoseg"]
        told = {"name": str(bundle["name"]), "sha256": str(bundle["sha256"])}
        model = {key: properties[key] for key in _MODEL if key in properties}
        bbox = [float(value) for value in item.get("bbox") or ()]
        assets = [*item["assets"].items(), *(vectors["assets"].items() if vectors else ())]
        kinds = {str(key): _kind(asset) for key, asset in assets}

        self.scene_ids.append(scene_id)
        self.links.append(f"./{scene_id}/{ITEM_NAME}")
        if vectors and vectors["id"] != item["id"]:
            self.links.append(f"./{scene_id}/{VECTORS_NAME}")
        if bbox:
            self.bboxes.append(bbox)
        self.times = (min(start, self.times[0]), max(end, self.times[1])) if self.times else (start, end)
        self.gsd = (min(gsd, self.gsd[0]), max(gsd, self.gsd[1])) if self.gsd else (gsd, gsd)
        self.codes |= {str(properties["proj:code"])} if properties.get("proj:code") else set()
        self.software.add(str(version))
        for name, color, count in found:
            one = self.classes.setdefault(name, _ClassSum(color))
            one.pixels += count
            one.area_km2 += count * gsd**2 / 1e6
        self.bundles.setdefault(told["sha256"], {**told, "items": 0, "model": model})["items"] += 1
        for key, kind in kinds.items():
            self.assets[key] = _common(self.assets[key], kind) if key in self.assets else kind

    def document(self, texts: CollectionTexts, assets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The collection; ``assets`` are its own, whose hrefs begin with ``./``. One item at least must have been added.

        Of more than 10,000 items it links none: their index is the items in GeoParquet.
        """
        assert self.times is not None
        names = [name for name in self.classes if name != "background"]
        bundles = [self.bundles[digest] for digest in sorted(self.bundles)]
        by = ", ".join(sorted({one["name"] for one in bundles}))
        collection = pystac.Collection(
            id=texts.id,
            title=texts.title or f"Masks of {', '.join(names) or 'no class'}",
            description=texts.description
            or f"Masks of {len(self.scene_ids)} scenes with the classes {', '.join(self.classes)}, predicted by geoseg with {by}.",
            extent=pystac.Extent(
                pystac.SpatialExtent([union_bbox(self.bboxes) or [-180.0, -90.0, 180.0, 90.0]]),
                pystac.TemporalExtent([list(self.times)]),
            ),
            license=texts.licence or "other",
            keywords=["geoseg", "semantic segmentation", *names],
        )
        told = collection.to_dict(include_self_link=False, transform_hrefs=False)
        told["stac_extensions"] = [f"https://stac-extensions.github.io/{name}/schema.json" for name in _EXTENSIONS]
        told["summaries"] = self._summaries(bundles)
        told["item_assets"] = dict(sorted(self.assets.items()))
        told["assets"] = dict(assets)
        links = self.links if len(self.scene_ids) <= MOST_LINKS else []
        told["links"] = [
            {"rel": "root", "href": f"./{COLLECTION_NAME}", "type": "application/json"},
            {"rel": "items", "href": f"./{ITEMS_NAME}", "type": PARQUET, "title": "The items as STAC GeoParquet"},
            *({"rel": "item", "href": href, "type": "application/geo+json"} for href in links),
        ]
        return told

    def _summaries(self, bundles: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields of the model are summed up like all others: MLM has no place for them in a collection of its own."""
        assert self.times is not None and self.gsd is not None  # noqa: PT018 - one item was added
        return {
            "datetime": {"minimum": _iso(self.times[0]), "maximum": _iso(self.times[1])},
            "gsd": {"minimum": self.gsd[0], "maximum": self.gsd[1]},
            **({"proj:code": sorted(self.codes)} if self.codes else {}),
            "processing:software": [{"geoseg": version} for version in sorted(self.software)],
            **{
                key: _distinct(one["model"][key] for one in bundles if key in one["model"])
                for key in _MODEL
                if any(key in one["model"] for one in bundles)
            },
            "geoseg:bundle": [{key: one[key] for key in ("name", "sha256", "items")} for one in bundles],
            "geoseg:classes": [
                {"name": name, "color_hint": one.color, "pixels": one.pixels, "area_km2": round(one.area_km2, 6)}
                for name, one in self.classes.items()
            ],
        }


def read_collection(uri: str) -> dict[str, Any] | None:
    """The collection that an earlier run wrote; None when there is none.

    Raises ConfigError for one that geoseg did not make, AccessDeniedError, StoreError.
    """
    try:
        told = json.loads(store.read(uri))
        is_ours = any(key.startswith("geoseg:") for key in told["summaries"])
    except store.ObjectMissingError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ConfigError(f"{store.redact(uri)}: a collection stands there that geoseg did not make; move it away")
    return dict(told)


def _kind(asset: Mapping[str, Any]) -> dict[str, Any]:
    """What an asset says that is true of others of its kind too."""
    kind = {key: value for key, value in asset.items() if key not in _OF_ONE_FILE}
    if "classification:classes" in kind:
        kind["classification:classes"] = [
            {key: value for key, value in one.items() if key != "count"} for one in kind["classification:classes"]
        ]
    return kind


def _common(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if other.get(key) == value}


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, lists taken apart: a summary lists what the items' fields hold."""
    flat: list[Any] = []
    for value in values:
        flat += [one for one in (value if isinstance(value, list) else [value]) if one not in flat]
    return flat


def _iso(time: datetime) -> str:
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def union_bbox(bboxes: Iterable[list[float]]) -> list[float] | None:
    """The smallest box (west, south, east, north) around boxes; west is larger than east over the antimeridian. None of none.

    The longitudes go the way round that leaves the widest gap out (RFC 7946, section 5.2).
    """
    spans: list[tuple[float, float]] = []
    souths, norths = [], []
    for west, south, east, north in bboxes:
        spans += [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]
        souths.append(south)
        norths.append(north)
    if not spans:
        return None
    spans.sort()
    gaps, reach = [], spans[0][1]
    for west, east in spans[1:]:
        gaps.append((west - reach, reach, west))
        reach = max(reach, east)
    gap, east, west = max([(spans[0][0] + 360 - reach, reach, spans[0][0]), *gaps], key=lambda one: one[0])
    if gap <= 0:
        east, west = 180.0, -180.0
    return [west, min(souths), east, max(norths)]

"""The STAC item of what was traced from a mask, which is its commit as the mask's item is the mask's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pystac
from pystac.extensions.file import FileExtension
from pystac.extensions.table import Column, TableExtension
from shapely.geometry import MultiPolygon, box, mapping

from geoseg import __version__
from geoseg.raster.seal import sealed
from geoseg.redaction import redacted
from geoseg.vector.layers import BBOX, GEOMETRY, LayerKind

VECTORS_VERSION = 1  # of the ways to trace; a new one makes all vectors anew
_PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
_MEDIA = {
    "parquet": "application/vnd.apache.parquet",
    "fgb": "application/vnd.flatgeobuf",
    "gpkg": "application/geopackage+sqlite3",
    "pmtiles": "application/vnd.pmtiles",
}
_PROJECTED = ("proj:code", "proj:wkt2")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFile:
    """A published file of a layer: its name, bytes, SHA-256 (hex), and how many features it holds."""

    kind: LayerKind
    name: str
    size: int
    sha256: str
    num_features: int

    @property
    def suffix(self) -> str:
        """Its format."""
        return self.name.rpartition(".")[2]

    @property
    def key(self) -> str:
        """The key of its asset: the layer's name, and the format where it is not GeoParquet."""
        return self.kind.name if self.suffix == "parquet" else f"{self.kind.name}_{self.suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedFrom:
    """What decides vectors: the SHA-256 (hex) of each mask and of its probabilities ("" for none), and the settings."""

    masks: tuple[tuple[str, str], ...]
    settings: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all of it and the version of the ways to trace."""
        told = {"version": VECTORS_VERSION, "masks": self.masks, "settings": self.settings}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def make_vectors_item(
    name: str,
    of: list[dict[str, Any]],
    made: TracedFrom,
    files: list[LayerFile],
    *,
    hrefs: list[str],
    bbox: list[float] | None,
    figures: dict[str, float],
) -> bytes:
    """The JSON of a scene's vectors, or of those of scenes joined, from the items of their masks.

    ``hrefs`` say where these items are, ``bbox`` is around all of them (west, south, east, north; west may be the larger).
    ``figures``: counts and sums for people, by name. The same masks and settings give the same bytes.
    """
    first, alone = of[0], len(of) == 1
    properties = first["properties"]
    moments = sorted(moment for item in of for moment in _moments(item))
    item = pystac.Item(
        id=name,
        geometry=first["geometry"] if alone else _rectangle(bbox),
        bbox=bbox,
        datetime=_parsed(properties.get("datetime")) if alone else None,
        start_datetime=_parsed(properties.get("start_datetime")) if alone else moments[0],
        end_datetime=_parsed(properties.get("end_datetime")) if alone else moments[-1],
        properties={
            "gsd": min(one["properties"]["gsd"] for one in of),
            "processing:level": "L4",
            "processing:lineage": f"polygons and lines traced from the {'mask' if alone else f'{len(of)} masks'}",
            "processing:software": {"geoseg": __version__},
            "geoseg:fingerprint": made.fingerprint,
            "geoseg:settings": made.settings,
            **({"geoseg:mask_sha256": made.masks[0][0]} if alone else {}),
            **{f"geoseg:{key}": value for key, value in figures.items()},
            **{key: properties[key] for key in _PROJECTED if key in properties},
        },
    )
    item.stac_extensions += [_PROCESSING, *(url for url in first["stac_extensions"] if "/projection/" in url)]
    for href in hrefs:
        item.add_link(pystac.Link("derived_from", href, media_type=pystac.MediaType.GEOJSON))
    for file in files:
        _add_file(item, file)
    document = item.to_dict(include_self_link=False, transform_hrefs=False)
    document["properties"] = {
        "datetime": None,
        **{key: value for key, value in document["properties"].items() if value is not None},
    }
    return sealed(redacted(document))


def _add_file(item: pystac.Item, file: LayerFile) -> None:
    title = f"{file.kind.name.replace('_', ' ').capitalize()} as {file.suffix}"
    asset = pystac.Asset(href=f"./{file.name}", media_type=_MEDIA[file.suffix], roles=["data"], title=title)
    item.add_asset(file.key, asset)
    FileExtension.ext(asset, add_if_missing=True).apply(size=file.size, checksum="1220" + file.sha256)
    table = TableExtension.ext(asset, add_if_missing=True)
    table.columns = [
        Column({"name": field.name, "type": str(field.type)}) for field in file.kind.schema if field.name != BBOX
    ]
    table.row_count = file.num_features
    asset.extra_fields["table:primary_geometry"] = GEOMETRY


def _moments(item: dict[str, Any]) -> list[datetime]:
    told = [item["properties"].get(key) for key in ("datetime", "start_datetime", "end_datetime")]
    return [moment for text in told if (moment := _parsed(text)) is not None]


def _parsed(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None


def _rectangle(bbox: list[float] | None) -> dict[str, Any] | None:
    """The ground of a bbox; one over the antimeridian is two rectangles (RFC 7946)."""
    if bbox is None:
        return None
    west, south, east, north = bbox
    if west <= east:
        return dict(mapping(box(west, south, east, north)))
    return dict(mapping(MultiPolygon([box(west, south, 180, north), box(-180, south, east, north)])))

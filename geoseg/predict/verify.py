"""Reads everything published under an output again and checks it against its items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pystac import STACObjectType
from pystac.errors import STACError, STACValidationError
from pystac.validation import validate_dict

from geoseg.errors import AccessDeniedError, GeosegError, NothingReadableError
from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.publish import ITEM_NAME
from geoseg.raster import store
from geoseg.raster.geotiff import GeoTiff

_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked, and a sentence for each fault; ``orphans`` are objects that no item names."""

    num_items: int
    num_assets: int
    num_bytes: int
    faults: tuple[str, ...]
    orphans: tuple[str, ...]

    def summary(self) -> str:
        """One line for a person."""
        orphans = f"; {len(self.orphans)} objects are named by no item (older versions)" if self.orphans else ""
        return (
            f"{self.num_items} items, {self.num_assets} assets, {self.num_bytes / 1e6:.1f} MB read again: "
            f"{len(self.faults)} faults{orphans}"
        )


def verify_output(out: str) -> Verified:
    """Check every item under ``out``: valid STAC, each asset there, of its size and SHA-256, masks where the item says.

    Raises NothingReadableError when there is no item, AccessDeniedError, StoreError.
    """
    root = store.normalize_uri(out).rstrip("/")
    found = [info.uri for info in store.walk(root + "/") if f"/{WORK_FOLDER}/" not in info.uri[len(root) :]]
    items = [uri for uri in found if store.base_name(uri) == ITEM_NAME]
    if not items:
        raise NothingReadableError(f"{store.redact(root)}: nothing is published there")
    faults: list[str] = []
    named: set[str] = set(items)
    num_bytes = 0
    for uri in items:
        try:
            document = json.loads(store.read(uri))
            faults += [f"{store.redact(uri)}: {sentence}" for sentence in _item_faults(document)]
            for key, asset in document["assets"].items():
                href = _href(uri, asset["href"])
                if href in named:
                    continue  # the model, which many items share
                named.add(href)
                num_bytes += int(asset["file:size"])
                faults += [
                    f"{store.redact(href)}: {sentence}" for sentence in _asset_faults(href, key, asset, document)
                ]
        except AccessDeniedError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(f"{store.redact(uri)}: not an item of geoseg's: {error}")
        except GeosegError as error:
            faults.append(str(error))
    orphans = tuple(uri for uri in found if uri not in named)
    return Verified(len(items), len(named) - len(items), num_bytes, tuple(faults), orphans)


def _href(item_uri: str, href: str) -> str:
    folder = item_uri.rsplit("/", 1)[0]
    return store.join(folder.rsplit("/", 1)[0], href[3:]) if href.startswith("../") else store.join(folder, href[2:])


def _item_faults(document: dict[str, Any]) -> Iterator[str]:
    """The core schema comes with pystac; those of the extensions are URLs, which are not fetched."""
    try:
        validate_dict(document, stac_object_type=STACObjectType.ITEM, extensions=[])
    except (STACError, STACValidationError, ValueError, KeyError) as error:
        yield f"not a valid STAC item: {str(error).strip().splitlines()[0]}"


def _asset_faults(href: str, key: str, asset: dict[str, Any], document: dict[str, Any]) -> Iterator[str]:
    info = store.head(href)
    if info.size != asset["file:size"]:
        yield f"has {info.size} bytes, the item says {asset['file:size']}"
        return
    digest = hashlib.sha256()
    for start in range(0, info.size, _PIECE):
        digest.update(store.read_ranges(href, [(start, min(info.size, start + _PIECE))], etag=info.etag)[0])
    if "1220" + digest.hexdigest() != asset["file:checksum"]:
        yield "its SHA-256 is not the item's: the object was damaged or changed"
        return
    if key in ("mask", "probabilities", "uncertainty"):
        yield from _raster_faults(href, info, document["properties"])


def _raster_faults(href: str, info: store.ObjectInfo, properties: dict[str, Any]) -> Iterator[str]:
    geotiff = GeoTiff(href, size=info.size, etag=info.etag)
    height, width = geotiff.levels()[0]
    if [height, width] != properties["proj:shape"]:
        yield f"is {width} x {height}, the item says {properties['proj:shape']}"
    with geotiff.header() as dataset:
        if list(dataset.transform)[:6] != properties["proj:transform"][:6]:
            yield "lies elsewhere than the item says"
    if not all(image.tiled for image in geotiff.images):
        yield "is not tiled as a Cloud-Optimized GeoTIFF"
    for level in range(len(geotiff.images)):
        geotiff.index(level)

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

from geoseg.errors import AccessDeniedError, GeosegError, NotGeoTiffError, NothingReadableError, SceneReadError
from geoseg.predict.collection import COLLECTION_NAME, read_collection
from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.publish import ITEM_NAME, VECTORS_NAME
from geoseg.predict.stac import BLOCKS_SUM, content_sum
from geoseg.raster import store
from geoseg.raster.cog import read_blocks_sum
from geoseg.raster.geotiff import GeoTiff
from geoseg.raster.seal import SEAL, is_whole
from geoseg.raster.tiff import Fetch

_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked, and a sentence for each fault; ``orphans`` are objects that no item names, nor the collection."""

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
    """Check every item under ``out``: of its own SHA-256, valid STAC, each asset there, of its size and SHA-256.

    Masks must lie where the item says.

    A scene's polygons and lines have an item of their own beside it, which is checked too, and so is a catalogue of the output.
    Raises NothingReadableError when there is no item, AccessDeniedError, StoreError.
    """
    root = store.normalize_uri(out).rstrip("/")
    found = [info.uri for info in store.walk(root + "/") if f"/{WORK_FOLDER}/" not in info.uri[len(root) :]]
    items = [uri for uri in found if store.base_name(uri) == ITEM_NAME]
    if not items:
        raise NothingReadableError(f"{store.redact(root)}: nothing is published there")
    there = set(found)
    beside = [store.join(uri.rsplit("/", 1)[0], VECTORS_NAME) for uri in items]
    documents = dict.fromkeys(sorted({*items, *(uri for uri in beside if uri in there)}), STACObjectType.ITEM)
    catalogue = store.join(root, COLLECTION_NAME)
    if catalogue in there and _is_ours(catalogue):
        documents[catalogue] = STACObjectType.COLLECTION
    checked = _Checked(there, {*documents})
    for uri, kind in documents.items():
        checked.check(uri, kind)
    orphans = tuple(uri for uri in found if uri not in checked.named)
    return Verified(len(items), len(checked.named) - len(documents), checked.num_bytes, tuple(checked.faults), orphans)


class _Checked:
    """The objects that documents name, and what is wrong with them; ``there`` are those that are published."""

    def __init__(self, there: set[str], named: set[str]) -> None:
        self.there, self.named = there, named
        self.faults: list[str] = []
        self.num_bytes = 0
        self._masks: dict[str, str] = {}

    def check(self, uri: str, kind: STACObjectType) -> None:
        """Check a document and its assets. Raises AccessDeniedError alone."""
        try:
            body = store.read(uri)
            document = json.loads(body)
            if kind is STACObjectType.ITEM and not is_whole(body, str(document["properties"].get(SEAL, ""))):
                self.faults.append(
                    f"{store.redact(uri)}: its own SHA-256 is not that of its bytes: it was damaged or changed"
                )
            self.faults += [f"{store.redact(uri)}: {sentence}" for sentence in _document_faults(document, kind)]
            for key, asset in document["assets"].items():
                self._check_asset(_href(uri, asset["href"]), key, asset, document)
            self._check_age(uri, document)
            lost = [_href(uri, link["href"]) for link in document["links"] if link["rel"] == "item"]
            self.faults += [
                f"{store.redact(uri)}: links {store.redact(href)}, which is not there; geoseg catalogue makes it anew"
                for href in lost
                if href not in self.there
            ]
        except AccessDeniedError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.faults.append(f"{store.redact(uri)}: not an item of geoseg's: {error}")
        except GeosegError as error:
            self.faults.append(str(error))

    def _check_age(self, uri: str, document: dict[str, Any]) -> None:
        """Whether vectors are of the mask that stands; a folder's item comes before its vectors."""
        folder = uri.rpartition("/")[0]
        if uri.endswith(f"/{ITEM_NAME}"):
            self._masks[folder] = content_sum(document["assets"]["mask"])
        elif uri.endswith(f"/{VECTORS_NAME}") and self._masks.get(folder) != str(
            document["properties"]["geoseg:mask_sha256"]
        ):
            self.faults.append(
                f"{store.redact(uri)}: was traced from another mask than the one that stands; geoseg vectorize does it anew"
            )

    def _check_asset(self, href: str, key: str, asset: dict[str, Any], document: dict[str, Any]) -> None:
        if href in self.named:
            return  # the model, which many items share
        self.named.add(href)
        self.num_bytes += int(asset["file:size"])
        told = store.redact(href)
        sentence, info = file_fault(href, asset)
        if sentence:
            self.faults.append(f"{told}: {sentence}")
        elif key in ("mask", "probabilities", "uncertainty"):
            self.faults += [f"{told}: {one}" for one in _raster_faults(href, info, document["properties"])]


def _is_ours(catalogue: str) -> bool:
    try:
        return read_collection(catalogue) is not None
    except GeosegError:
        return False


def _href(item_uri: str, href: str) -> str:
    folder = item_uri.rsplit("/", 1)[0]
    return store.join(folder.rsplit("/", 1)[0], href[3:]) if href.startswith("../") else store.join(folder, href[2:])


def _document_faults(document: dict[str, Any], kind: STACObjectType) -> Iterator[str]:
    """The core schema comes with pystac; those of the extensions are URLs, which are not fetched."""
    try:
        validate_dict(document, stac_object_type=kind, extensions=[])
    except (STACError, STACValidationError, ValueError, KeyError) as error:
        yield f"not a valid STAC {kind.name.lower()}: {str(error).strip().splitlines()[0]}"


def file_fault(href: str, asset: dict[str, Any]) -> tuple[str, store.ObjectInfo]:
    """What is wrong with the bytes of an asset, "" when they are those that were published, and what the store says of it.

    Raises ObjectMissingError, SceneDeniedError, AccessDeniedError, StoreError.
    """
    info = store.head(href)
    if info.size != asset["file:size"]:
        return f"has {info.size} bytes, the item says {asset['file:size']}", info

    def fetch(start: int, end: int) -> bytes:
        return store.read_ranges(href, [(start, end)], etag=info.etag)[0]

    try:
        came = read_blocks_sum(fetch, info.size) if BLOCKS_SUM in asset else _sha256(fetch, info.size)
    except (NotGeoTiffError, SceneReadError) as error:
        return f"the object was damaged or changed: {error}", info
    if came != content_sum(asset):
        return "its SHA-256 is not the item's: the object was damaged or changed", info
    return "", info


def _sha256(fetch: Fetch, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, _PIECE):
        digest.update(fetch(start, min(size, start + _PIECE)))
    return digest.hexdigest()


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

"""What was published from what, in one object: a cache of the items, each entry good as long as its item has the same ETag.

The items are the truth. What the index lacks, or tells of an item that has changed since, is read from the item; without an
index, or with one that cannot be read, all of them are.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from geoseg.errors import ConflictError, SceneError
from geoseg.predict.ledger import SceneReport
from geoseg.predict.output import Output
from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.plan import MadeFrom, RunSpec
from geoseg.predict.publish import StandingItem, read_item
from geoseg.raster import store
from geoseg.raster.scene import SceneRef

_NAME = "index.json.gz"
_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of an item: the ETag that it had then, and as ``StandingItem``.

    ``classes`` are the mask's pixels by class, ``footprint`` is WKT, ``moment`` the (last) time.
    """

    item_etag: str
    fingerprint: str
    sources: tuple[str, ...]
    made: MadeFrom
    seam_score: float | None = None
    classes: tuple[tuple[str, int], ...] = ()
    footprint: str = ""
    moment: str = ""


def known_items(output: Output, indexed: Mapping[str, Known]) -> dict[str, Known]:
    """What is known of each item of an output, from the index or the item itself; what is not geoseg's is left out."""
    found: dict[str, Known] = {}
    unread = []
    for scene_id, info in output.items.items():
        entry = indexed.get(scene_id)
        if entry is not None and entry.item_etag == info.etag != "":
            found[scene_id] = entry
        else:
            unread.append((scene_id, info.uri))
    for (scene_id, _), known in zip(unread, store.in_parallel(_read, unread), strict=True):
        if known is not None:
            found[scene_id] = known
    return found


def _read(item: tuple[str, str]) -> Known | None:
    scene_id, uri = item
    try:
        body, version = store.read_version(uri)
        return _known(read_item(scene_id, uri, version, body))
    except (ConflictError, SceneError):
        return None


def _known(item: StandingItem) -> Known:
    return Known(
        item_etag=store.bare(item.published.version),
        fingerprint=item.fingerprint,
        sources=item.sources,
        made=item.made,
        seam_score=item.published.seam_score if not item.published.is_released else None,
        classes=item.classes,
        footprint=item.footprint,
        moment=item.moment,
    )


def known_of(report: SceneReport, ref: SceneRef, run: RunSpec) -> Known:
    """What a run knows of an item that it has just published or found unchanged."""
    versions = [(etag, mask or None) for etag, mask in zip(report.etags, report.mask_etags, strict=True)]
    return Known(
        item_etag=report.item_etag,
        fingerprint=report.fingerprint,
        sources=tuple(store.redact(uri) for uri in ref.uris),
        made=run.made_from(versions),
        seam_score=report.seam_score if not report.is_released else None,
        classes=tuple(zip((one.name for one in run.description.classes), report.classes, strict=False)),
        footprint=report.footprint,
        moment=report.moment,
    )


def read_index(out: str) -> dict[str, Known]:
    """The index of an output; empty when there is none, or none that can be read. Raises AccessDeniedError, StoreError."""
    try:
        told = json.loads(gzip.decompress(store.read(_uri(out))))
        return {scene_id: _entry(*values) for scene_id, values in told["items"].items() if told["version"] == _VERSION}
    except store.ObjectMissingError:
        return {}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_index(out: str, items: Mapping[str, Known]) -> None:
    """Write the index of an output; the run that does so holds the lease."""
    told = {
        scene_id: [
            one.item_etag,
            one.fingerprint,
            one.sources,
            one.made.etags,
            one.made.mask_etags,
            one.made.bundle,
            one.made.settings,
            one.made.aoi,
            one.seam_score,
            dict(one.classes),
            one.footprint,
            one.moment,
        ]
        for scene_id, one in sorted(items.items())
    }
    text = json.dumps({"version": _VERSION, "items": told}, separators=(",", ":"), allow_nan=False)
    store.write(_uri(out), gzip.compress(text.encode(), mtime=0))


def _entry(*values: object) -> Known:
    item_etag, fingerprint, sources, etags, mask_etags, bundle, settings, aoi, seam_score = values[:9]
    classes, footprint, moment = values[9:]
    if not isinstance(classes, dict):
        raise TypeError(f"wanted classes, got {classes!r}")
    return Known(
        item_etag=str(item_etag),
        fingerprint=str(fingerprint),
        sources=_texts(sources),
        made=MadeFrom(
            etags=_texts(etags),
            mask_etags=_texts(mask_etags),
            bundle=str(bundle),
            settings=str(settings),
            aoi=str(aoi),
        ),
        seam_score=float(seam_score) if isinstance(seam_score, (int, float)) else None,
        classes=tuple((str(name), int(count)) for name, count in classes.items()),
        footprint=str(footprint),
        moment=str(moment),
    )


def _texts(told: object) -> tuple[str, ...]:
    if not isinstance(told, list):
        raise TypeError(f"wanted a list, got {told!r}")
    return tuple(map(str, told))


def _uri(out: str) -> str:
    return store.join(out, WORK_FOLDER, _NAME)

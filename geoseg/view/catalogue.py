"""From a published output to what its page shows: its scenes and how they stand, and of one scene its place, files and images."""

from __future__ import annotations

import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from rasterio.crs import CRS

from geoseg.errors import ConfigError, GeosegError, NothingReadableError, SceneReadError
from geoseg.predict.outcomes import Outcome, last_outcomes
from geoseg.predict.output import Output, list_output
from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.publish import VECTORS_NAME
from geoseg.predict.record import read_record
from geoseg.raster import store
from geoseg.raster.geotiff import ReadOptions, describe, keep_decoded
from geoseg.raster.grid import Grid
from geoseg.raster.scene import SceneRef
from geoseg.view.features import FeatureFile
from geoseg.view.tiles import Picture, TileGrid, shown_bands

LAYERS = ("buildings", "roads")
_MEDIA = {"tif": "image/tiff", "png": "image/png", "parquet": "application/vnd.apache.parquet"}
_ASSET_NAME = re.compile(r"(?:\./)?([^/\\.][^/\\]*)")
_NOT_BAD = ("published", "unchanged")
_DECODED_BYTES = 256 << 20
_KEPT = 16  # of the files that were opened last
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that an item names: where it is, and its media type by its suffix, never one that a browser would run."""

    uri: str
    media: str


class _Recent:
    """What was opened last, by a key that names a version; the oldest goes when there are too many."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                kept: _T = self._kept[key]
                return kept
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made


class Catalogue:
    """The scenes of an output (a folder or prefix), read as they are asked for. Nothing but what its items name is found here.

    Raises NothingReadableError when there is neither an item nor a run's record, ConfigError, AccessDeniedError, StoreError.
    """

    def __init__(self, out: str) -> None:
        self.root = store.normalize_uri(out).rstrip("/")
        self._opened, self._infos = _Recent(), _Recent()
        self._items: dict[str, tuple[dict[str, Any], dict[str, Asset]]] = {}
        keep_decoded(_DECODED_BYTES)
        self._list()
        if not self._output.items and not self._outcomes:
            raise NothingReadableError(
                f"{store.redact(self.root)}: has neither a published scene nor the record of a run; give the folder or prefix that "
                "geoseg predict wrote to (--out)"
            )

    def _list(self) -> None:
        output: Output = list_output(self.root)
        self._remark = ""
        try:
            outcomes = last_outcomes(output)
        except (ConfigError, SceneReadError) as error:
            outcomes, self._remark = {}, str(error)
        self._output, self._outcomes = output, outcomes

    def scenes(self) -> dict[str, Any]:
        """The scenes as the output has them now: id, status, the last run's sentence, and what there is to see."""
        self._list()
        output, outcomes = self._output, self._outcomes
        ids = sorted({*output.items, *outcomes, *output.parts})
        return {
            "out": store.redact(self.root),
            "run": output.runs[-1] if output.runs else "",
            "remark": self._remark,
            "scenes": [self._listed(scene_id, outcomes.get(scene_id)) for scene_id in ids],
        }

    def _listed(self, scene_id: str, outcome: Outcome | None) -> dict[str, Any]:
        told = outcome.scene if outcome else {}
        has_item = scene_id in self._output.items
        status = str(told.get("status", ""))
        if status in ("", *_NOT_BAD):
            status = "published" if has_item else "unfinished" if scene_id in self._output.parts else "removed"
        return {
            "id": scene_id,
            "status": status,
            "sentence": str(told.get("sentence", "")),
            "mask": has_item,
            "thumbnail": has_item or bool(self._waiting(scene_id)),
            "vectors": self._has_vectors(scene_id),
        }

    def _has_vectors(self, scene_id: str) -> bool:
        return any(store.base_name(uri) == VECTORS_NAME for uri in self._output.beside.get(scene_id, []))

    def scene(self, scene_id: str) -> dict[str, Any]:
        """One scene: how it stands and, when it has an item, where its mask lies, what its codes mean, and its layers.

        Raises ObjectMissingError for a scene that the output does not have, SceneReadError for an item that is none.
        """
        told = self._listed(self._known(scene_id), self._outcomes.get(scene_id))
        try:
            if scene_id not in self._output.items:
                return {**told, "classes": self._held_classes(scene_id) if self._waiting(scene_id) else []}
            return {**told, **_described(*self._read_items(scene_id))}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SceneReadError(
                f"{scene_id}: its item, or the record of its run, is not one of geoseg's: {error!r}"
            ) from error

    def _known(self, scene_id: str) -> str:
        if scene_id not in self._output.items and scene_id not in self._outcomes and scene_id not in self._output.parts:
            raise store.ObjectMissingError(f"{scene_id}: the output has no such scene")
        return scene_id

    def _read_items(self, scene_id: str) -> tuple[dict[str, Any], dict[str, Asset]]:
        """The item of a scene as it is now, and the files that it and ``vectors.json`` beside it name, by their names."""
        item_uri = self._output.items[scene_id].uri
        folder = item_uri.rsplit("/", 1)[0]
        item = _read_item(item_uri)
        assets = _assets_below(item, folder)
        if self._has_vectors(scene_id):
            assets = _assets_below(_read_item(store.join(folder, VECTORS_NAME)), folder) | assets
        self._items[scene_id] = item, assets
        return item, assets

    def _assets(self, scene_id: str) -> dict[str, Asset]:
        if self._known(scene_id) not in self._output.items:
            return {}
        if scene_id not in self._items:
            self._read_items(scene_id)
        return self._items[scene_id][1]

    def file(self, scene_id: str, name: str) -> tuple[store.ObjectInfo, str]:
        """A file of a scene by its name, and its media type. Raises ObjectMissingError for one that no item names."""
        for asset in self._assets(scene_id).values():
            if store.base_name(asset.uri) == name:
                return self._info(asset.uri), asset.media
        raise store.ObjectMissingError(f"{name}: no item of {scene_id} names such a file")

    def thumbnail(self, scene_id: str) -> tuple[store.ObjectInfo, str]:
        """The small picture of a scene's mask, of one that is held back the one that waits. Raises ObjectMissingError."""
        waiting = self._waiting(self._known(scene_id))
        if waiting:
            return store.head(waiting), "image/png"
        assets = self._assets(scene_id)
        if "thumbnail" not in assets:
            raise store.ObjectMissingError(f"{scene_id}: has no small picture")
        return self._info(assets["thumbnail"].uri), "image/png"

    def _waiting(self, scene_id: str) -> str:
        """Where the small picture of a mask is that is held back, "" when none is, or when the output lies elsewhere now."""
        outcome = self._outcomes.get(scene_id)
        told = str(outcome.scene.get("thumbnail") or "") if outcome is not None else ""
        if not told.startswith(f"{self.root}/{WORK_FOLDER}/") or ".." in told.split("/"):
            return ""
        self._check_is_inside(told)
        return told

    def held_mask(self, scene_id: str, shown: set[int]) -> bytes:
        """A PNG of the mask that is held back, small, with nothing where its class is not among ``shown``."""
        waiting = self._waiting(self._known(scene_id))
        if not waiting:
            raise store.ObjectMissingError(f"{scene_id}: no mask is held back")
        with Image.open(io.BytesIO(store.read(waiting))) as picture:
            pixels = np.array(picture.convert("RGBA"))
        for one in self._held_classes(scene_id):
            if one["value"] not in shown:
                pixels[(pixels == (*one["color"], 255)).all(axis=2)] = 0
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()

    def _held_classes(self, scene_id: str) -> list[dict[str, Any]]:
        """The classes of a mask that is held back, as ``_classes`` has those of an item, from the record of its run."""
        outcome = self._outcomes[scene_id]
        classes = read_record(self.root, outcome.run)["bundle"]["classes"]
        counts = [*outcome.scene["classes"], *[0] * len(classes)]
        return [
            {"value": value, "name": str(one["name"]), "color": list(one["color"]), "count": int(counts[value])}
            for value, one in enumerate(classes)
        ]

    def _info(self, uri: str) -> store.ObjectInfo:
        """What the store says of a file. Names hold their content's hash, so that once is enough."""
        self._check_is_inside(uri)
        return self._infos.get(uri, lambda: store.head(uri))

    def _check_is_inside(self, uri: str) -> None:
        if "://" not in uri and not os.path.realpath(uri).startswith(os.path.realpath(self.root) + os.sep):
            raise store.ObjectMissingError(f"{store.base_name(uri)}: is a link out of the output")

    def image(self, scene_id: str) -> dict[str, Any]:
        """Where the tiles of a scene's image lie, or a sentence that says why there are none. Raises ObjectMissingError."""
        try:
            picture = self.image_picture(scene_id)
        except store.ObjectMissingError as error:
            return {"sentence": f"The image is not where it was when the mask was made: {error}"}
        except (GeosegError, ValueError) as error:
            return {"sentence": f"The image cannot be shown: {error}"}
        scene = picture.scene
        made_from = self._made_from(scene_id)
        changed = bool(made_from) and made_from[0] != scene.etag
        coarsest = picture.coarsest * picture.tile_grid.resolutions[-1]
        return {
            "sentence": "The image was changed after this mask was made from it." if changed else "",
            "tiles": _pyramid(picture.tile_grid),
            "version": scene.etag,
            "grid": _grid(scene.grid),
            "max_resolution": coarsest if coarsest < float("inf") else None,
            "bands": [scene.bands[band] for band in picture.bands],
            "dtype": scene.dtype,
        }

    def image_picture(self, scene_id: str) -> Picture:
        """The image that a scene's mask was made from; of a stack the first. Raises what describing a scene raises."""
        source, options, named, chosen = self._source(scene_id)
        info = store.head(source)
        return self._opened.get(("image", scene_id, info.uri, info.etag), lambda: _open(info, options, named, chosen))

    def mask_picture(self, scene_id: str) -> tuple[Picture, list[dict[str, Any]]]:
        """The mask, to be drawn here instead of by the browser, and its classes. Raises what describing a scene raises."""
        asset = self._assets(scene_id).get("mask")
        if asset is None:
            raise store.ObjectMissingError(f"{scene_id}: no mask stands")
        info = self._info(asset.uri)
        options = ReadOptions(assume_crs=_crs(self._items[scene_id][0]))
        picture = self._opened.get(
            ("mask", info.uri, info.etag),
            lambda: Picture(describe(SceneRef("its mask", info.uri), options), (0,), is_codes=True),
        )
        return picture, _classes(self._items[scene_id][0])

    def features(self, scene_id: str, layer: str) -> FeatureFile:
        """The polygons or lines of a scene. Raises ObjectMissingError when it has none, SceneReadError."""
        asset = self._assets(scene_id).get(layer) if layer in LAYERS else None
        if asset is None:
            raise store.ObjectMissingError(f"{scene_id}: has no {layer} as vectors")
        info = self._info(asset.uri)
        return self._opened.get(("features", info.uri, info.etag), lambda: FeatureFile.open(info))

    def _made_from(self, scene_id: str) -> list[str]:
        if scene_id not in self._items:
            return []
        told = self._items[scene_id][0]["properties"].get("geoseg:input_etag", "")
        return [str(one) for one in told if one] if isinstance(told, list) else [str(told)]

    def _source(self, scene_id: str) -> tuple[str, ReadOptions, tuple[str, ...], tuple[int, ...] | None]:
        """URI of a scene's image, how to read it, the bands that the network saw by name, and by number where that was said."""
        if self._known(scene_id) in self._output.items:
            self._assets(scene_id)
            item = self._items[scene_id][0]
            links = [str(link["href"]) for link in item["links"] if link["rel"] == "derived_from"]
            settings, crs = item["properties"].get("geoseg:settings", {}), _crs(item)
            inputs = item["properties"].get("mlm:input") or [{}]
            named = tuple(map(str, inputs[0].get("bands", ())))
        else:
            outcome = self._outcomes.get(scene_id)
            links = [str(outcome.scene["uri"])] if outcome is not None else []
            settings = outcome.job.get("predict", {}) if outcome is not None else {}
            crs, named = settings.get("assume_crs"), ("red", "green", "blue")
        if not links:
            raise SceneReadError("nothing says where it is")
        if "***" in links[0]:
            raise SceneReadError("its address had a secret in it, which is not kept")
        chosen = settings.get("bands")
        nodata = settings.get("nodata")
        options = ReadOptions(
            assume_crs=crs,
            nodata=None if nodata is None else float(nodata),
            sidecar_mask=bool(settings.get("sidecar_mask")),
        )
        return store.normalize_uri(links[0]), options, named, tuple(map(int, chosen)) if chosen else None


def _open(
    info: store.ObjectInfo, options: ReadOptions, named: tuple[str, ...], chosen: tuple[int, ...] | None
) -> Picture:
    scene = describe(SceneRef(store.base_name(info.uri), info.uri), options)
    return Picture(scene, shown_bands(scene, named, chosen))


def _read_item(uri: str) -> dict[str, Any]:
    try:
        item = json.loads(store.read(uri))
        return {**item, "assets": {**item["assets"]}, "properties": {**item["properties"]}, "links": [*item["links"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise SceneReadError(f"{store.redact(uri)}: is not a STAC item") from error


def _assets_below(item: dict[str, Any], folder: str) -> dict[str, Asset]:
    """The files that an item names beside itself, by key; what it names elsewhere is left out."""
    found = {}
    for key, told in item["assets"].items():
        name = _ASSET_NAME.fullmatch(str(told.get("href", ""))) if isinstance(told, dict) else None
        if name and name[1] != VECTORS_NAME:
            media = _MEDIA.get(name[1].rpartition(".")[2].lower(), "application/octet-stream")
            found[str(key)] = Asset(store.join(folder, name[1]), media)
    return found


def _crs(item: dict[str, Any]) -> str | None:
    told = item["properties"]
    epsg = told.get("proj:epsg")
    return told.get("proj:code") or (f"EPSG:{epsg}" if epsg else None) or told.get("proj:wkt2")


def _described(item: dict[str, Any], assets: dict[str, Asset]) -> dict[str, Any]:
    told = item["properties"]
    rows, cols = told["proj:shape"]
    crs = CRS.from_user_input(_crs(item))
    grid = Grid(crs.to_wkt(), tuple(map(float, told["proj:transform"][:6])), int(rows), int(cols))  # type: ignore[arg-type]
    return {
        "moment": str(told.get("datetime") or told.get("end_datetime") or ""),
        "bundle": str(told.get("geoseg:bundle", {}).get("name", "")),
        "sources": [store.redact(str(link["href"])) for link in item["links"] if link["rel"] == "derived_from"],
        "grid": _grid(grid),
        "mask_tiles": _pyramid(TileGrid(grid)),
        "classes": _classes(item),
        "files": {key: store.base_name(asset.uri) for key, asset in assets.items()},
        "layers": [layer for layer in LAYERS if layer in assets],
    }


def _classes(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Value, name, colour (red, green, blue) and pixel count of each class; nodata is none."""
    return [
        {
            "value": int(one["value"]),
            "name": str(one["name"]),
            "color": list(bytes.fromhex(str(one.get("color_hint", "808080")))),
            "count": int(one.get("count", 0)),
        }
        for one in item["assets"]["mask"].get("classification:classes", [])
        if not one.get("nodata")
    ]


def _grid(grid: Grid) -> dict[str, Any]:
    """Where a raster lies, for a map in its own CRS; ``north_up`` when its rows and columns run along the axes."""
    a, b, _, d, e, _ = grid.geotransform
    across_m, down_m = grid.pixel_size_m
    crs = grid.crs
    epsg = crs.to_epsg()
    name = re.match(r'\w+\["([^"]*)"', grid.crs_wkt)
    return {
        "crs": f"EPSG:{epsg}" if epsg else (name[1] if name else "CRS without a name"),
        "is_geographic": bool(crs.is_geographic),
        "width": grid.width,
        "height": grid.height,
        "extent": TileGrid(grid).extent,
        "corners": TileGrid(grid).corners,
        "north_up": b == d == 0 and a > 0 > e,
        "m_per_unit": (across_m * down_m / abs(a * e - b * d)) ** 0.5,
        "pixel_m": (across_m * down_m) ** 0.5,
    }


def _pyramid(tiles: TileGrid) -> dict[str, Any]:
    return {"extent": tiles.extent, "resolutions": tiles.resolutions}

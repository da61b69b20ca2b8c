"""What is published under an output in, its catalogue out: a STAC collection, the items as GeoParquet, mosaics for a GIS.

The items stay as they are, byte for byte: each is the commit of its scene. So none of them names the collection, which may be
made, made again and thrown away at any time; their copies in ``items.parquet`` do. The same items give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import shapely

from geoseg.apart import run_apart
from geoseg.errors import ConfigError, ConflictError, GeosegError, NothingReadableError
from geoseg.predict.collection import (
    COLLECTION_NAME,
    ITEMS_NAME,
    MOST_LINKS,
    PARQUET,
    CollectionTexts,
    Sums,
    read_collection,
)
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.mosaic import PREFIX, MaskTile, Mosaic, make_mosaics, mask_tile
from geoseg.predict.output import Output, list_output
from geoseg.predict.publish import ITEM_NAME, VECTORS_NAME, read_item
from geoseg.progress import StatusLine, duration
from geoseg.raster import store
from geoseg.raster.scene import slug

_BATCH = 500  # items in memory at a time, and in a row group
_MANY_MASKS = 1000  # a VRT is read whole before a pixel is
_ONE_PUT = 16 << 20
_VRT, _GEOPACKAGE = "application/xml", "application/geopackage+sqlite3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What was catalogued: ``files`` by name with their sizes, and a sentence for each scene or file that was left out."""

    out: str
    num_items: int
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 when every scene is in it, 1 otherwise."""
        return 1 if self.left_out else 0

    def lines(self) -> list[str]:
        """The same for a person."""
        return [
            *(f"left out: {sentence}" for sentence in self.left_out),
            *self.remarks,
            *(f"{store.redact(store.join(self.out, name))}: {size / 1e3:.1f} kB" for name, size in self.files),
            f"{self.num_items} items in the catalogue, {len(self.left_out)} left out",
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """A scene's item and, where there is one, the item of its polygons and lines; ``remark`` when that cannot be read."""

    id: str
    item: dict[str, Any]
    tile: MaskTile
    vectors: dict[str, Any] | None = None
    remark: str = ""


def make_catalogue(
    out: str,
    *,
    name: str | None = None,
    title: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    quiet: bool = False,
) -> Catalogue:
    """Write ``collection.json``, ``items.parquet`` and the mosaics of an output, each whole, the collection last.

    ``name`` is the collection's id, ``licence`` an SPDX identifier. What cannot be catalogued is told with its scene. Raises
    NothingReadableError when no item can be read, ConfigError when a collection stands there that is not geoseg's or a library
    is missing, AccessDeniedError, StoreError.
    """
    root = store.normalize_uri(out).rstrip("/")
    before = read_collection(store.join(root, COLLECTION_NAME)) or {"assets": {}}
    output = list_output(root)
    texts = CollectionTexts(
        id=name or slug(store.base_name(root)), title=title, description=description, licence=licence
    )
    sums, tiles = Sums(), list[MaskTile]()
    left_out, remarks = list[str](), list[str]()
    with tempfile.TemporaryDirectory(prefix="geoseg-catalogue-") as folder:
        rows = _Rows(Path(folder, "items.ndjson"), remarks)
        for scene in _scenes(output, left_out, quiet=quiet):
            try:
                sums.add(scene.id, scene.item, scene.vectors)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                left_out.append(f"{scene.id}: its item lacks something that geoseg's have: {error!r}")
                continue
            remarks += [scene.remark] if scene.remark else []
            tiles.append(scene.tile)
            rows.add(_row(scene, texts.id))
        if not tiles:
            told = f": {left_out[0]}" if left_out else "; geoseg predict or geoseg nightly publishes there"
            raise NothingReadableError(f"{store.redact(root)}: holds no item that can be catalogued{told}")
        parquet = rows.to_parquet(Path(folder, ITEMS_NAME), sums.document(texts, {}))
        written = [_put(root, ITEMS_NAME, parquet)] if parquet else []
        written += _put_mosaics(root, tiles, remarks)
    assets = {told["href"].removeprefix("./"): told for told in written}
    body = json.dumps(sums.document(texts, assets), indent=1, sort_keys=True, allow_nan=False) + "\n"
    store.write(store.join(root, COLLECTION_NAME), body.encode(), content_type="application/json")
    stale = [one for one in before["assets"] if one.startswith(PREFIX) and one not in assets and "/" not in one]
    store.delete([store.join(root, one) for one in stale])
    if len(tiles) > MOST_LINKS:
        remarks.append(
            f"{len(tiles)} items are more than {MOST_LINKS}: the collection links none; {ITEMS_NAME} lists them"
        )
    return Catalogue(
        out=root,
        num_items=len(tiles),
        files=((COLLECTION_NAME, len(body.encode())), *((one, told["file:size"]) for one, told in assets.items())),
        left_out=tuple(left_out),
        remarks=tuple(remarks),
    )


def _scenes(output: Output, left_out: list[str], *, quiet: bool) -> Iterator[_Scene]:
    """The scenes with an item, by id, read side by side; why others are left out goes to ``left_out``."""
    status, began, total = StatusLine(quiet=quiet), time.monotonic(), len(output.items)

    def line(num: int) -> str:
        rate = num / max(1e-9, time.monotonic() - began)
        return f"items read {num}/{total}, {rate:.0f} a second, {duration((total - num) / max(rate, 1e-9))} left"

    asked = [
        (scene_id, output.items[scene_id].uri, _vectors_uri(output, scene_id)) for scene_id in sorted(output.items)
    ]
    for num, ((scene_id, *_), found) in enumerate(zip(asked, store.in_parallel(_try_to_read, asked), strict=True), 1):
        status.show(partial(line, num), last=num == total)
        if isinstance(found, Failure):
            found.raise_if_stop()
            left_out.append(found.sentence if scene_id in found.sentence else f"{scene_id}: {found.sentence}")
        else:
            yield found


def _vectors_uri(output: Output, scene_id: str) -> str | None:
    return next((uri for uri in output.beside.get(scene_id, ()) if store.base_name(uri) == VECTORS_NAME), None)


def _try_to_read(asked: tuple[str, str, str | None]) -> _Scene | Failure:
    return attempt(lambda: _read_scene(*asked), asked[0], "reading its item")


def _read_scene(scene_id: str, uri: str, vectors_uri: str | None) -> _Scene:
    body, version = store.read_version(uri)
    read_item(scene_id, uri, version, body)
    item = json.loads(body)
    try:
        tile = mask_tile(scene_id, item)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConflictError(f"{scene_id}: {store.redact(uri)} does not describe a mask: {error!r}") from error
    if vectors_uri is None:
        return _Scene(id=scene_id, item=item, tile=tile)
    try:
        vectors = json.loads(store.read(vectors_uri))
        names_assets = isinstance(vectors["id"], str) and all(asset["href"] for asset in vectors["assets"].values())
    except store.ObjectMissingError:
        return _Scene(id=scene_id, item=item, tile=tile)
    except (ValueError, KeyError, TypeError, AttributeError):
        names_assets = False
    if names_assets:
        return _Scene(id=scene_id, item=item, tile=tile, vectors=vectors)
    remark = f"{scene_id}: {store.redact(vectors_uri)} is not an item of geoseg's; the scene's mask alone is catalogued"
    return _Scene(id=scene_id, item=item, tile=tile, remark=remark)


def _row(scene: _Scene, collection: str) -> dict[str, Any]:
    """The item as a copy beside the collection, which it names: hrefs from there, its polygons and lines among its assets.

    A column has one type: versions are lists, also of one scene, and the settings are JSON.
    """
    item = json.loads(json.dumps(scene.item))
    properties = item["properties"]
    for key in ("geoseg:input_etag", "geoseg:mask_etag"):
        if isinstance(properties.get(key), str):
            properties[key] = [properties[key]]
    properties["geoseg:settings"] = json.dumps(properties["geoseg:settings"], sort_keys=True)
    item["assets"] |= scene.vectors["assets"] if scene.vectors else {}
    for one in chain(item["assets"].values(), item["links"]):
        one["href"] = _from_the_root(scene.id, str(one["href"]))
    item["collection"] = collection
    item["links"] += [
        {"rel": "collection", "href": f"./{COLLECTION_NAME}", "type": "application/json"},
        {"rel": "canonical", "href": f"./{scene.id}/{ITEM_NAME}", "type": "application/geo+json"},
    ]
    return dict(item)


def _from_the_root(scene_id: str, href: str) -> str:
    """A relative href of an item as seen from the output; others stay."""
    if href.startswith("../"):
        return "./" + href.removeprefix("../")
    return f"./{scene_id}/{href.removeprefix('./')}" if href.startswith("./") else href


class _Rows:
    """Items on their way to GeoParquet: on disk, a batch in memory, and the schema that holds all that came so far."""

    def __init__(self, path: Path, remarks: list[str]) -> None:
        self._library = _stac_geoparquet()
        self._path, self._remarks = path, remarks
        self._schema = pa.schema([])
        self._batch: list[dict[str, Any]] = []
        self._num = 0

    def add(self, row: dict[str, Any]) -> None:
        """Take an item; one that lies nowhere on the Earth is told and left aside."""
        if row.get("geometry") is None:
            self._remarks.append(f"{row['id']}: has no place in longitude and latitude, so {ITEMS_NAME} is without it")
            return
        self._batch.append(row)
        if len(self._batch) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        fitting = self._fitting(batch)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in fitting)
        self._num += len(fitting)

    def _fitting(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those rows that go into one table with all before: a field may not be a number here and a text there."""
        try:
            shapely.from_geojson([json.dumps(row["geometry"]) for row in batch])
            found = pa.array([{**row, "geometry": None} for row in batch]).type
            self._schema = pa.unify_schemas([self._schema, pa.schema(found)], promote_options="permissive")
        except (pa.ArrowException, ValueError, KeyError, TypeError, shapely.errors.ShapelyError) as error:
            if len(batch) > 1:
                half = len(batch) // 2
                return self._fitting(batch[:half]) + self._fitting(batch[half:])
            told = str(error).strip().splitlines()[0]
            self._remarks.append(
                f"{batch[0]['id']}: does not fit the other items, so {ITEMS_NAME} is without it: {told}"
            )
            return []
        return batch

    def to_parquet(self, path: Path, collection: dict[str, Any]) -> Path | None:
        """Write the file, by row groups; None when there is no row."""
        if self._batch:
            self._flush()
        if not self._num:
            return None
        reader = self._library.parse_stac_ndjson_to_arrow(self._path, chunk_size=_BATCH)
        told = {key: value for key, value in collection.items() if key != "assets"} | {"links": []}
        self._library.to_parquet(reader, path, collections={collection["id"]: told}, compression="zstd")
        return path


def _stac_geoparquet() -> Any:
    """The library. Raises ConfigError when it is not installed."""
    try:
        import stac_geoparquet.arrow  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            f"geoseg catalogue writes {ITEMS_NAME} with stac-geoparquet, which cannot be imported ({error}); "
            "install it with: pip install 'geoseg[vector]'"
        ) from error
    return stac_geoparquet.arrow


def _put_mosaics(root: str, tiles: Iterable[MaskTile], remarks: list[str]) -> Iterator[dict[str, Any]]:
    """Write the mosaics and give each as an asset; of many masks a tile index too."""
    straight = []
    for tile in tiles:
        if tile.lies_straight:
            straight.append(tile)
        else:
            remarks.append(
                f"{tile.scene_id}: its rows do not run from west to east, so no mosaic holds it; open its mask alone"
            )
    for mosaic in make_mosaics(straight):
        if mosaic.is_too_large:
            remarks.append(
                f"{mosaic.name}: its masks lie {mosaic.width} x {mosaic.height} pixels apart, more than GDAL counts; there is none"
            )
            continue
        crs = mosaic.name.removeprefix(PREFIX)
        title = f"{len(mosaic.tiles)} masks as one layer, {crs}"
        yield _put(root, f"{mosaic.name}.vrt", mosaic.vrt(), type=_VRT, roles=["overview"], title=title)
        if len(mosaic.tiles) > _MANY_MASKS:
            name, title = f"{mosaic.name}.gti.gpkg", f"{title}: a tile index for GDAL 3.9 and later"
            yield _put(root, name, _tile_index(mosaic), type=_GEOPACKAGE, roles=["overview"], title=title)


def _tile_index(mosaic: Mosaic) -> bytes:
    """The GeoPackage that GDAL's GTI driver opens. Raises GeosegError when it cannot be made."""
    table = pa.table(
        {
            "geometry": shapely.to_wkb([shapely.box(*tile.bounds) for tile in mosaic.tiles]),
            "location": [tile.href for tile in mosaic.tiles],
            "place": pa.array(range(len(mosaic.tiles)), pa.int32()),
        }
    ).replace_schema_metadata({"crs": mosaic.tiles[0].crs, "settings": json.dumps(mosaic.index_settings())})
    with tempfile.TemporaryDirectory(prefix="geoseg-index-") as folder:
        source, out = Path(folder, "tiles.arrow"), Path(folder, "index.gti.gpkg")
        with pa.OSFile(str(source), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        done = run_apart("geoseg.tile_index", str(source), str(out), folder=Path(folder))
        if done.complaint:
            raise GeosegError(f"{mosaic.name}: its tile index cannot be written: {done.complaint}")
        return out.read_bytes()


def _put(root: str, name: str, file: bytes | Path, **told: Any) -> dict[str, Any]:
    """Put a file of the catalogue, whole, and describe it as an asset of the collection."""
    pieces = _pieces_of(file)
    digest, size = hashlib.sha256(), 0
    for piece in pieces():
        digest.update(piece)
        size += len(piece)
    uri = store.join(root, name)
    if size <= _ONE_PUT:
        store.write(uri, b"".join(pieces()))
    else:
        store.write_stream(uri, pieces)
    asset = told or {"type": PARQUET, "roles": ["collection-mirror"], "title": "The items as STAC GeoParquet"}
    return {"href": f"./{name}", **asset, "file:size": size, "file:checksum": "1220" + digest.hexdigest()}


def _pieces_of(file: bytes | Path) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        if isinstance(file, bytes):
            yield file
            return
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                yield piece

    return pieces

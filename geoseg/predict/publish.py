"""Publishing a scene: the files first, under names that follow from their content, then the item, which is the commit."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from geoseg.errors import ConflictError, GeosegError, SceneChangedError, SceneReadError, StoreError
from geoseg.predict.parts import delete_parts, finished_parts, part_uri
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.stac import make_item
from geoseg.raster import store
from geoseg.raster.cog import NODATA, CogAssembler, CogFile, CogProfile, unpack_blocks
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.scene import scene_is_unchanged

ITEM_NAME = "item.json"
_ONE_PUT = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A scene whose item stands: its URI, the mask's URI, and pixel counts by class."""

    scene_id: str
    item_uri: str
    mask_uri: str
    classes: list[int]
    num_bytes: int


def item_uri(run: RunSpec, scene_id: str) -> str:
    """Where a scene's item stands."""
    return store.join(run.out, scene_id, ITEM_NAME)


def published_item(run: RunSpec, scene_id: str) -> tuple[dict[str, Any], store.Version] | None:
    """The standing item of a scene and its version, or None."""
    uri = item_uri(run, scene_id)
    try:
        body, version = store.read_version(uri)
        document = json.loads(body)
    except store.ObjectMissingError:
        return None
    except ValueError as error:
        raise ConflictError(f"{scene_id}: {store.redact(uri)} is not an item of geoseg's; move it away") from error
    return document, version


def standing_mask(run: RunSpec, scene_id: str, fingerprint: str) -> str | None:
    """URI of the mask that stands for a scene, if it was made from this very input, bundle and settings."""
    standing = published_item(run, scene_id)
    if standing is None or standing[0].get("properties", {}).get("geoseg:fingerprint") != fingerprint:
        return None
    return store.join(run.out, scene_id, str(standing[0]["assets"]["mask"]["href"]).removeprefix("./"))


def publish_scene(run: RunSpec, plan: ScenePlan) -> Published:
    """Put a scene's masks together from its parts and publish them.

    Doing it twice, late, or in two places at once leaves the same objects. Raises SceneReadError when a window's part is
    missing, SceneChangedError when the scene was replaced meanwhile, ConflictError when other work holds its id.
    """
    scene = plan.scene
    if not scene_is_unchanged(scene):
        delete_parts(run, plan)
        raise SceneChangedError(
            f"{scene.id}: was replaced while the run was reading it; run again to take the new version"
        )
    standing = published_item(run, scene.id)
    _refuse_foreign(standing, plan)
    if standing is not None and standing[0].get("properties", {}).get("geoseg:fingerprint") == plan.fingerprint:
        _tidy(run, plan)
        return _published_before(run, plan, standing[0])
    uris = [part_uri(run, plan, window) for window in plan.windows(SceneReader(scene))]
    classes = np.zeros(len(run.description.classes), np.int64)
    assets: dict[str, dict[str, Any]] = {}
    with CogAssembler(scene.grid, _mask_profile(run)) as assembler:
        for header, blocks in _parts(plan, uris):
            classes += np.asarray(header["classes"])
            assembler.add(blocks)
        assembler.make_overviews(plan.window)
        thumbnail = _png(assembler.top_pixels()[0], run)
        assets["mask"] = _put(run, plan, "mask", "tif", assembler.finish(), "Class of each pixel")
    if run.config.probabilities:
        with CogAssembler(scene.grid, _probability_profile(run)) as assembler:
            nonempty = set(finished_parts(run, plan))
            for _, blocks in _parts(
                plan, [f"{uri}.probabilities" for uri in uris if f"{uri}.probabilities" in nonempty]
            ):
                assembler.add(blocks)
            assembler.make_overviews(plan.window)
            title = "Probability of each class in steps of 1/254"
            assets["probabilities"] = _put(run, plan, "probabilities", "tif", assembler.finish(), title)
    assets["thumbnail"] = _put(run, plan, "thumbnail", "png", thumbnail, "The mask in its colours, small")
    body = make_item(run, plan, classes=classes.tolist(), assets=assets)
    _commit(run, plan, body, standing[1] if standing else None)
    _tidy(run, plan)
    return Published(
        scene_id=scene.id,
        item_uri=item_uri(run, scene.id),
        mask_uri=store.join(run.out, scene.id, assets["mask"]["name"]),
        classes=classes.tolist(),
        num_bytes=sum(told["size"] for told in assets.values()),
    )


def _published_before(run: RunSpec, plan: ScenePlan, item: dict[str, Any]) -> Published:
    """What an earlier attempt published, whose answer was lost or which came first."""
    mask = item["assets"]["mask"]
    return Published(
        scene_id=plan.scene.id,
        item_uri=item_uri(run, plan.scene.id),
        mask_uri=store.join(run.out, plan.scene.id, str(mask["href"]).removeprefix("./")),
        classes=[int(one["count"]) for one in mask["classification:classes"] if "count" in one],
        num_bytes=sum(int(asset["file:size"]) for asset in item["assets"].values()),
    )


def _tidy(run: RunSpec, plan: ScenePlan) -> None:
    """Remove the parts; a worker that may not delete has published all the same."""
    with suppress(GeosegError):
        delete_parts(run, plan)


def _refuse_foreign(standing: tuple[dict[str, Any], store.Version] | None, plan: ScenePlan) -> None:
    if standing is None:
        return
    sources = [link.get("href") for link in standing[0].get("links", []) if link.get("rel") == "derived_from"]
    if sources and sources != [store.redact(plan.scene.uri)]:
        raise ConflictError(
            f"{plan.scene.id}: this id is taken by {sources[0]} in this output; write to another output, or rename the scene"
        )


def _parts(plan: ScenePlan, uris: list[str]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    try:
        for uri, data in zip(uris, store.in_parallel(store.read, uris), strict=True):
            try:
                yield unpack_blocks(data)
            except (ValueError, KeyError, IndexError) as error:
                store.delete([uri])
                raise StoreError(
                    f"{plan.scene.id}: the part {store.redact(uri)} is damaged; run again to redo it"
                ) from error
    except store.ObjectMissingError as error:
        raise SceneReadError(f"{plan.scene.id}: a window's part is missing; run again to redo it ({error})") from error


def _put(run: RunSpec, plan: ScenePlan, kind: str, suffix: str, file: CogFile | bytes, title: str) -> dict[str, Any]:
    """Put a file under a name made from its content, unless it is there, and check that the store holds all of it."""
    if isinstance(file, CogFile):
        size, sha256 = file.size, file.sha256
    else:
        size, sha256 = len(file), hashlib.sha256(file).hexdigest()
    name = f"{kind}-{sha256[:16]}.{suffix}"
    uri = store.join(run.out, plan.scene.id, name)
    if not (store.exists(uri) and store.head(uri).size == size):
        if isinstance(file, bytes):
            store.write(uri, file)
        elif size <= _ONE_PUT:
            store.write(uri, b"".join(file.chunks()))
        else:
            store.write_stream(uri, file.chunks())
    stored = store.head(uri).size
    if stored != size:
        raise StoreError(f"{plan.scene.id}: {store.redact(uri)} should have {size} bytes, the store holds {stored}")
    return {"name": name, "size": size, "sha256": sha256, "title": title}


def _commit(run: RunSpec, plan: ScenePlan, body: bytes, replaces: store.Version | None) -> None:
    """Put the item: created if there was none, else in place of the very one that was seen."""
    uri = item_uri(run, plan.scene.id)
    try:
        store.write(uri, body, create=replaces is None, replaces=replaces)
    except store.ObjectExistsError as error:
        if store.read(uri) == body:
            return  # an earlier attempt of our own, whose answer was lost
        raise ConflictError(
            f"{plan.scene.id}: another run has published this scene in the meantime; its mask stays, this one is not published"
        ) from error


def _mask_profile(run: RunSpec) -> CogProfile:
    named = run.description.classes
    tags = [(f"CLASS_{value}", one.name) for value, one in enumerate(named)] + [(f"CLASS_{NODATA}", "nodata")]
    return CogProfile(
        num_bands=1, colors=tuple(one.color for one in named), tags=tuple(tags), band_names=("class",), scale=None
    )


def _probability_profile(run: RunSpec) -> CogProfile:
    names = tuple(one.name for one in run.description.classes)
    return CogProfile(num_bands=len(names), colors=None, tags=(), band_names=names, scale=1 / 254)


def _png(codes: npt.NDArray[np.uint8], run: RunSpec) -> bytes:
    table = np.zeros((256, 4), np.uint8)
    for value, one in enumerate(run.description.classes):
        table[value] = (*one.color, 255)
    out = io.BytesIO()
    Image.fromarray(table[codes], "RGBA").save(out, "PNG")
    return out.getvalue()

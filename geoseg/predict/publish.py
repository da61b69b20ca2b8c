"""Publishing a scene: the files first, under names that follow from their content, then the item, which is the commit.

A file is named by the SHA-256 of its bytes, and its item has it as ``file:checksum``. Of a file above 32 MiB nobody reads all
bytes: it is put together in the store, piece by piece, by whoever is there (``geoseg.raster.splice``), and a SHA-256 goes from
the first byte to the last. It is named by the sum over its blocks' SHA-256 instead (``geoseg.raster.cog.blocks_sum``), which is
known before there is a file, as a bucket wants the name when an upload begins; its item has it as ``geoseg:blocks_sha256``.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from PIL import Image

from geoseg.errors import ConflictError, GeosegError, OvertakenError, SceneChangedError, StoreError
from geoseg.model.light import novelty
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.parts import bytes_in_parts, delete_parts, part_folder, staging_uri
from geoseg.predict.plan import MadeFrom, RunSpec, ScenePlan, settings_digest
from geoseg.predict.rasters import SceneSums, collect, further_rasters, mask_raster, raster_in_the_making
from geoseg.predict.seams import Seams, held_back
from geoseg.predict.stac import footprint_text, make_item
from geoseg.raster import store
from geoseg.raster.cog import CogFile
from geoseg.raster.scene import scene_is_unchanged
from geoseg.raster.splice import Deal, SplicedFile, SpliceError, in_turn
from geoseg.raster.window import WindowSet

ITEM_NAME, VECTORS_NAME = "item.json", "vectors.json"
_ONE_PUT = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A scene whose item stands: its URI and version, the mask's URI, and pixel counts by class.

    ``seam_score`` and ``blend_error`` (see ``geoseg.predict.seams``) are those of a network that is blended, ``novelty`` (see
    ``geoseg.model.light``) is that of a bundle which knows the light of its training, ``fine_share`` that of the pixels which
    were seen at full resolution after a coarse pass. ``is_released``: it was held
    back until somebody had looked at it. ``remark`` says what looked implausible.
    """

    scene_id: str
    item_uri: str
    version: store.Version
    mask_uri: str
    classes: list[int]
    seam_score: float | None = None
    blend_error: float | None = None
    novelty: float | None = None
    fine_share: float | None = None
    is_released: bool = False
    remark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBack:
    """A scene whose mask is made and not published, and why; a run that allows more publishes it, and so does a release.

    ``thumbnail`` is the URI of its mask in colours, small, which goes when the scene is published.
    """

    sentence: str
    thumbnail: str
    classes: list[int]
    seam_score: float | None = None
    blend_error: float | None = None
    novelty: float | None = None
    fine_share: float | None = None


def item_uri(run: RunSpec, scene_id: str) -> str:
    """Where a scene's item stands."""
    return store.join(run.out, scene_id, ITEM_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingItem:
    """A scene's item as it stands: what it was made from (``sources``: redacted URIs), and what was published with it.

    ``revision``: as in ``ScenePlan``. ``classes`` are the mask's pixels by class, ``footprint`` is WKT, "" when the item has no
    geometry, ``moment`` the (last) time.
    """

    fingerprint: str
    revision: int
    sources: tuple[str, ...]
    made: MadeFrom
    published: Published
    classes: tuple[tuple[str, int], ...]
    footprint: str
    moment: str


def standing_item(run: RunSpec, plan: ScenePlan) -> StandingItem | None:
    """The item that stands where a scene's is to be published, or None.

    Raises ConflictError when it is not geoseg's, or another scene's (one with no source in common) unless it was made from the
    same bytes.
    """
    scene_id, uri = plan.scene.id, item_uri(run, plan.scene.id)
    try:
        body, version = store.read_version(uri)
        standing = read_item(scene_id, uri, version, body)
    except store.ObjectMissingError:
        return None
    ours = {store.redact(scene.uri) for scene in plan.scenes}  # dates come to a stack and go from it
    if standing.fingerprint != plan.fingerprint and ours.isdisjoint(standing.sources):
        raise ConflictError(
            f"{scene_id}: this id is taken by {standing.sources[0]} in this output; write to another output or rename the scene, "
            f"or, if it is that very scene in a new place, delete {store.redact(uri)} and run again"
        )
    return standing


def read_item(scene_id: str, uri: str, version: store.Version, body: bytes) -> StandingItem:
    """The item of a scene from its bytes. Raises ConflictError when it is not geoseg's."""
    try:
        return _parse_item(scene_id, uri, version, json.loads(body))
    except (ValueError, KeyError, TypeError, AttributeError, shapely.errors.ShapelyError) as error:
        raise ConflictError(f"{scene_id}: {store.redact(uri)} is not an item of geoseg's; move it away") from error


def _parse_item(scene_id: str, uri: str, version: store.Version, item: dict[str, Any]) -> StandingItem:
    properties, mask = item["properties"], item["assets"]["mask"]
    sources = tuple(str(link["href"]) for link in item["links"] if link["rel"] == "derived_from")
    if not sources:
        raise ValueError("it names no source")
    masks = properties.get("geoseg:mask_etag", [""] * len(sources))
    classes = [(str(one["name"]), int(one["count"])) for one in mask["classification:classes"] if "count" in one]
    return StandingItem(
        fingerprint=str(properties["geoseg:fingerprint"]),
        revision=int(properties.get("geoseg:revision", 1)),
        sources=sources,
        made=MadeFrom(
            etags=_as_texts(properties["geoseg:input_etag"]),
            mask_etags=_as_texts(masks),
            bundle=str(properties["geoseg:bundle"]["sha256"]),
            settings=settings_digest(properties["geoseg:settings"]),
            aoi=str(properties.get("geoseg:aoi_sha256", "")),
        ),
        published=Published(
            scene_id=scene_id,
            item_uri=uri,
            version=version,
            mask_uri=store.join(uri.rsplit("/", 1)[0], str(mask["href"]).removeprefix("./")),
            classes=[count for _, count in classes],
            seam_score=properties.get("geoseg:seam_score"),
            blend_error=properties.get("geoseg:blend_error"),
            novelty=properties.get("geoseg:novelty"),
            fine_share=properties.get("geoseg:fine_share"),
            is_released=bool(properties.get("geoseg:released")),
        ),
        classes=tuple(classes),
        footprint=footprint_text(item["geometry"]),
        moment=str(properties.get("datetime") or properties.get("end_datetime") or ""),
    )


def _as_texts(told: Any) -> tuple[str, ...]:
    return tuple(map(str, told)) if isinstance(told, list) else (str(told),)


def try_to_publish(run: RunSpec, plan: ScenePlan, deal: Deal = in_turn) -> Published | HeldBack | Failure:
    """What ``publish_scene`` published, or why it did not."""
    return attempt(lambda: publish_scene(run, plan, deal), plan.scene.id, "publishing")


def publish_scene(run: RunSpec, plan: ScenePlan, deal: Deal = in_turn) -> Published | HeldBack:
    """Put a scene's masks together from its parts and publish them; ``deal`` says where the work on large ones is done.

    Doing it twice, late, or in two places at once leaves the same objects. Raises StoreError when a window's part is
    missing or damaged, SceneChangedError when the scene was replaced meanwhile, ConflictError when other work holds its id,
    OvertakenError when it has published since it was planned. A scene that is held back keeps its parts.
    """
    scene = plan.scene
    if not all(scene_is_unchanged(one) for one in plan.scenes):
        delete_parts(run, scene.id)
        raise SceneChangedError(
            f"{scene.id}: was replaced while the run was reading it; run again to take the new version"
        )
    standing = standing_item(run, plan)
    if standing is not None and standing.fingerprint == plan.fingerprint:
        _tidy(run, scene.id)
        return standing.published
    if (standing.published.version if standing else None) != plan.replaces:
        raise _conflict(plan)
    try:
        return _put_together(run, plan, deal)
    except SpliceError as error:
        raise StoreError(f"{scene.id}: {error}") from error


def _put_together(run: RunSpec, plan: ScenePlan, deal: Deal) -> Published | HeldBack:
    scene, mask, sums = plan.scene, mask_raster(run), SceneSums(run, plan)
    windows = WindowSet()
    for window in plan.windows(plan.reader()):
        windows.add(window.row_off, window.col_off)
    num_bytes = bytes_in_parts(run, plan)
    assets: dict[str, dict[str, Any]] = {}
    with raster_in_the_making(run, plan, mask, num_bytes[mask.layer]) as made:
        for part_sums in collect(run, plan, mask, windows, into=made, deal=deal):
            sums.add(part_sums)
        thumbnail = _png(made.top_pixels()[0], run)
        looked = _look(run, plan, sums)
        if looked.is_held:
            return _hold(run, plan, looked, thumbnail)
        assets[mask.key] = _put(run, plan, mask.key, made.finish(), mask.title, deal=deal)
    for raster in further_rasters(run):
        with raster_in_the_making(run, plan, raster, num_bytes[raster.layer]) as made:
            for _ in collect(run, plan, raster, sums.with_data, into=made, deal=deal):
                pass
            assets[raster.key] = _put(run, plan, raster.key, made.finish(), raster.title, deal=deal)
    assets["thumbnail"] = _put(run, plan, "thumbnail", thumbnail, "The mask in its colours, small", deal=deal)
    body = make_item(
        run,
        plan,
        classes=looked.classes,
        unsure=sums.unsure.tolist(),
        seams=looked.seams,
        looked_at={
            "novelty": looked.novelty,
            "precision": sorted(sums.precisions),
            "fine_share": looked.fine_share,
        },
        assets=assets,
    )
    version = _commit(run, plan, body)
    _tidy(run, scene.id)
    return Published(
        scene_id=scene.id,
        item_uri=item_uri(run, scene.id),
        version=version,
        mask_uri=store.join(run.out, scene.id, assets["mask"]["name"]),
        is_released=run.is_released(plan),
        remark=looked.sentence,
        **looked.facts(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looked:
    """What a mask is judged by, and what there is to say against it."""

    classes: list[int]
    seams: Seams | None
    novelty: float | None
    fine_share: float | None
    sentence: str
    is_held: bool

    def facts(self) -> dict[str, Any]:
        """What is told of it, published or not."""
        return {
            "classes": self.classes,
            "seam_score": self.seams.score if self.seams else None,
            "blend_error": self.seams.at_rim if self.seams else None,
            "novelty": self.novelty,
            "fine_share": self.fine_share,
        }


def _look(run: RunSpec, plan: ScenePlan, sums: SceneSums) -> _Looked:
    scene_id, guard, classes = plan.scene.id, run.guard, sums.classes.tolist()
    seams = sums.seams if run.is_blended else None
    judged = not run.is_released(plan)
    seam_sentence = held_back(scene_id, seams.score, run.config.max_seam_score) if seams and judged else ""
    newness = novelty(sums.light, run.description.light)
    named = {one.name: count for one, count in zip(run.description.classes, classes, strict=True)}
    objections = guard.objections(scene_id, named, newness, plan.before) if guard and judged else []
    objection = f"{scene_id}: {'; '.join(objections)}" if objections else ""
    return _Looked(
        classes=classes,
        seams=seams,
        novelty=newness,
        fine_share=float(f"{sums.num_fine / max(1, sum(classes)):.6g}") if run.config.coarse else None,
        sentence=seam_sentence or objection,
        is_held=bool(seam_sentence or (objection and guard and guard.limits.hold)),
    )


def _hold(run: RunSpec, plan: ScenePlan, looked: _Looked, thumbnail: bytes) -> HeldBack:
    """Leave the mask's small picture beside the scene's parts, to be looked at."""
    uri = store.join(part_folder(run, plan), "thumbnail.png")
    store.write(uri, thumbnail)
    return HeldBack(sentence=looked.sentence, thumbnail=uri, **looked.facts())


def _tidy(run: RunSpec, scene_id: str) -> None:
    """Remove the parts; a worker that may not delete has published all the same."""
    with suppress(GeosegError):
        delete_parts(run, scene_id)


def _put(
    run: RunSpec, plan: ScenePlan, kind: str, file: CogFile | SplicedFile | bytes, title: str, *, deal: Deal
) -> dict[str, Any]:
    """Put a file under a name made from its content, unless it is there, and check that the store holds all of it."""
    if isinstance(file, bytes):
        size, sums, suffix = len(file), {"sha256": hashlib.sha256(file).hexdigest()}, "png"
    else:
        size, sums, suffix = file.size, file.sums(), "tif"
    (named_by,) = sums.values()
    name = f"{kind}-{named_by[:16]}.{suffix}"
    uri = store.join(run.out, plan.scene.id, name)
    if not (store.exists(uri) and store.head(uri).size == size):
        if isinstance(file, bytes):
            store.write(uri, file)
        elif isinstance(file, SplicedFile):
            file.write(uri, staging_uri(run, plan, name), deal)
        elif size <= _ONE_PUT:
            store.write(uri, b"".join(file.chunks()))
        else:
            store.write_stream(uri, file.chunks)
    stored = store.head(uri).size
    if stored != size:
        raise StoreError(f"{plan.scene.id}: {store.redact(uri)} should have {size} bytes, the store holds {stored}")
    return {"name": name, "size": size, **sums, "title": title}


def _commit(run: RunSpec, plan: ScenePlan, body: bytes) -> store.Version:
    """Put the item: created if there was none when the scene was planned, else in place of the very one that stood then."""
    uri = item_uri(run, plan.scene.id)
    try:
        return store.write(uri, body, create=plan.replaces is None, replaces=plan.replaces)
    except (store.ObjectExistsError, store.ObjectMissingError) as error:
        standing = standing_item(run, plan)
        if standing is not None and standing.fingerprint == plan.fingerprint:
            return standing.published.version  # an earlier attempt of our own, whose answer was lost
        raise _conflict(plan) from error


def _conflict(plan: ScenePlan) -> OvertakenError:
    return OvertakenError(
        f"{plan.scene.id}: another run has published or removed this scene in the meantime; what it left stays, this mask is "
        "not published"
    )


def _png(codes: npt.NDArray[np.uint8], run: RunSpec) -> bytes:
    table = np.zeros((256, 4), np.uint8)
    for value, one in enumerate(run.description.classes):
        table[value] = (*one.color, 255)
    picture = Image.fromarray(codes, "P")
    picture.putpalette(table.tobytes(), "RGBA")
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()

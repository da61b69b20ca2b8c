"""Which scenes have work to do, from listings alone: no scene's header is read, no item that the index knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from geoseg.predict.index import Known
from geoseg.predict.plan import RunSpec
from geoseg.predict.seams import held_back
from geoseg.raster.scene import SceneRef, mask_uri
from geoseg.raster.versions import Versions

_HIDDEN = "***"  # of a name that was redacted nobody can say whether it is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """A scene whose item stands and whose sources are there no more."""

    id: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """``todo``: scenes that are new, changed, or of which listings do not tell enough; ``reasons`` of each as far as known.

    ``num_unchanged`` scenes have an item with the fingerprint of this run; those of ``held`` are held back as they were before.
    """

    todo: tuple[SceneRef, ...]
    reasons: dict[str, tuple[str, ...]]
    num_unchanged: int
    held: tuple[str, ...]
    gone: tuple[Gone, ...]


def select(
    refs: Sequence[SceneRef],
    versions: Versions,
    run: RunSpec,
    known: Mapping[str, Known],
    *,
    held: Mapping[str, str] | None = None,
) -> Selection:
    """Subtract from the scenes what is published or held back, and find what is published of scenes that are gone.

    ``held``: the fingerprints of scenes that the last run held back, by the limits of this one.

    A scene is gone when all of its images are known to be absent: because they were named and are not there, or because
    the folder or prefix that held them was listed without them. What a job does not ask for, it does not judge.
    """
    versions.look_up(uri for ref in refs for image in ref.uris for uri in (image, mask_uri(image)))
    todo: list[SceneRef] = []
    reasons: dict[str, tuple[str, ...]] = {}
    gone, still_held = [], []
    num_unchanged = 0
    for ref in refs:
        standing = known.get(ref.id)
        if standing is not None and all(versions.is_absent(uri) for uri in ref.uris):
            gone.append(Gone(id=ref.id, sources=standing.sources))
            continue
        told = [_version(uri, versions) if uri else None for uri in ref.dates or (ref.uri,)]
        fingerprint = run.fingerprint_of(told, is_stack=bool(ref.dates))
        stands = standing is not None and standing.fingerprint == fingerprint
        if held and held.get(ref.id) == fingerprint:
            still_held.append(ref.id)
            continue
        if standing is None:
            reasons[ref.id] = ("new",)
        elif not stands:
            reasons[ref.id] = standing.made.changes_to(run.made_from(told))
        elif not held_back(ref.id, standing.seam_score, run.config.max_seam_score):
            num_unchanged += 1
            continue
        todo.append(ref)
    asked = {ref.id for ref in refs}
    for scene_id, standing in known.items():
        if scene_id not in asked and all(_was_listed_away(uri, versions) for uri in standing.sources):
            gone.append(Gone(id=scene_id, sources=standing.sources))
    return Selection(
        todo=tuple(todo), reasons=reasons, num_unchanged=num_unchanged, held=tuple(still_held), gone=tuple(gone)
    )


def _version(uri: str, versions: Versions) -> tuple[str, str | None]:
    return versions.etag(uri), versions.etag(mask_uri(uri)) or None


def _was_listed_away(uri: str, versions: Versions) -> bool:
    return _HIDDEN not in uri and versions.is_absent(uri)

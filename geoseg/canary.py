"""A canary: published scenes predicted with a new bundle beside the results, and what differs, before the bundle takes over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from geoseg.config import Job
from geoseg.errors import ConfigError, NothingReadableError, SceneChangedError
from geoseg.evaluate.canary import (
    PICTURE_NAME,
    REPORT_NAME,
    WORST,
    Canary,
    CanaryScene,
    Redo,
    Speed,
    read_speed,
)
from geoseg.evaluate.difference import ClassMatch, MaskPair, compare_masks
from geoseg.evaluate.picture import ChangedPlace, changes_picture
from geoseg.model.pictures import as_rgb
from geoseg.predict.bundles import load_bundle
from geoseg.predict.failure import Failure, attempt
from geoseg.predict.index import Known, known_items, read_index
from geoseg.predict.lease import Lease
from geoseg.predict.ledger import BAD, SceneReport
from geoseg.predict.output import Output, list_output
from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.plan import RunSpec, plan_scene
from geoseg.predict.publish import item_uri, read_item
from geoseg.predict.record import RunReport, find_record
from geoseg.predict.selection import select
from geoseg.predict.sources import Listing, list_job
from geoseg.progress import StatusLine
from geoseg.raster import store
from geoseg.raster.scene import SceneRef
from geoseg.run import make_run_spec, predict_refs

FOLDER = "canary"
_ITEMS_FOR_GROUND = 2000
_RUNS_TO_SEARCH = 30


def run_canary(job: Job, *, bundle: str, scenes: int = 20, to: str | None = None, quiet: bool = False) -> Canary:
    """Predict a sample of what a job has published with another bundle, and tell what differs.

    ``scenes``: how many at most; which is decided by their ids. The new masks, the report (``canary.json``) and the picture
    (``canary.png``) go to ``to``, by default a folder of the output that no listing of results looks into; the results, their
    index and their records stay as they are. Run again it goes on.

    Raises ConfigError for the job's own bundle and for a place that is somebody else's, NothingReadableError when there is
    nothing to compare, other StopError kinds. What cannot be predicted or compared is told with its scene.
    """
    before = make_run_spec(job)
    new_job = _job_of_canary(job, before, bundle, to)
    after = make_run_spec(new_job)
    match = ClassMatch(before.description.classes, after.description.classes)
    output, listing = list_output(before.out), list_job(job, before.out)
    known = known_items(output, read_index(before.out))
    standing, stale = _standing(listing, before, known)
    if not standing:
        raise _nothing_stands(before, output)
    _check_place(after.out, before.out, listing)
    refs = sample(standing, scenes)
    redo, published_speed = _redo([*standing, *stale], output), _published_speed(output, before.bundle_digest)
    with Lease(after.out) as lease:
        report = predict_refs(new_job, after, refs, lease, versions=listing.versions, kind="canary", quiet=quiet)
        if report.num_left:
            raise KeyboardInterrupt  # a signal ended it; a part of the sample is no canary
        speed = _speed(report, read_speed(after.out, after.bundle_digest))
        canary = Canary(
            job=job,
            before=before,
            after=after,
            scenes=tuple(_compared(report, before, known, match, quiet=quiet)),
            published=len(standing),
            redo=redo,
            speeds=(published_speed, speed),
            remarks=listing.remarks,
        )
        lease.check()
        _write(canary, {ref.id: ref for ref in refs})
    return canary


def sample(refs: Sequence[SceneRef], most: int) -> list[SceneRef]:
    """Up to ``most`` of the scenes, spread evenly: those whose ids have the lowest SHA-256, whatever order they come in."""
    return sorted(refs, key=lambda ref: _rank(ref.id))[:most]


def _rank(scene_id: str) -> bytes:
    return hashlib.sha256(scene_id.encode()).digest()


def _job_of_canary(job: Job, before: RunSpec, bundle: str, to: str | None) -> Job:
    digest = load_bundle(bundle).digest
    if digest == before.bundle_digest:
        raise ConfigError(
            f"{store.redact(bundle)}: this is the bundle that the job runs already (SHA-256 {digest[:16]}...); name a new one"
        )
    out = to or store.join(before.out, WORK_FOLDER, FOLDER, digest[:16])
    return job.model_copy(
        update={"bundle": bundle, "out": out, "guard": None}
    )  # what looks odd is told as a difference


def _check_place(place: str, out: str, listing: Listing) -> None:
    """Raises ConfigError for a folder where a canary's masks would be taken for results or scenes, or lie among others."""
    told = store.redact(place)
    if f"{place}/".startswith(f"{out}/{WORK_FOLDER}/{FOLDER}/"):
        return
    if f"{place}/".startswith(f"{out}/") or f"{out}/".startswith(f"{place}/"):
        raise ConfigError(
            f"{told}: this is where the job's results lie; leave --to out, or name a folder apart from them"
        )
    if listing.versions.covers(store.join(place, REPORT_NAME)):
        raise ConfigError(
            f"{told}: this lies inside the job's sources, so the next night would take the canary's masks for scenes; leave --to "
            "out, or name a folder apart from them"
        )
    if list_output(place).runs:
        raise ConfigError(f"{told}: there are results of other runs, which stay as they are; name a folder of its own")


def _standing(listing: Listing, run: RunSpec, known: Mapping[str, Known]) -> tuple[list[SceneRef], list[SceneRef]]:
    """The scenes whose items are what the job would make of them now, and those that have an item and will be done anyway."""
    selection = select(listing.refs, listing.versions, run, known)
    todo = {ref.id for ref in selection.todo}
    gone = {one.id for one in selection.gone}
    there = [ref for ref in listing.refs if ref.id in known and ref.id not in gone]
    return [ref for ref in there if ref.id not in todo], [ref for ref in there if ref.id in todo]


def _nothing_stands(run: RunSpec, output: Output) -> NothingReadableError:
    return NothingReadableError(
        f"{store.redact(run.out)}: of {len(output.items)} published scenes none was made from what the job's sources hold now, "
        "with its present bundle and settings, so there is nothing to compare with; run geoseg nightly first"
    )


def _compared(
    report: RunReport, before: RunSpec, known: Mapping[str, Known], match: ClassMatch, *, quiet: bool
) -> Iterator[CanaryScene]:
    """What came of each scene of the canary's run."""
    status = StatusLine(quiet=quiet)
    for num, scene in enumerate(report.scenes, 1):
        yield _compare(scene, before, known[scene.id], match)
        status.show(partial("scenes compared {}/{}".format, num, len(report.scenes)), last=num == len(report.scenes))


def _compare(scene: SceneReport, before: RunSpec, known: Known, match: ClassMatch) -> CanaryScene:
    if scene.status in BAD:
        return CanaryScene(
            id=scene.id, uri=scene.uri, status=scene.status, sentence=scene.sentence, denied=scene.denied
        )

    def compared() -> CanaryScene:
        masks = _published_mask(scene, before, known), scene.mask
        difference = compare_masks(MaskPair(scene.id, masks, match), match)
        return CanaryScene(id=scene.id, uri=scene.uri, status="compared", masks=masks, difference=difference)

    done = attempt(compared, scene.id, "comparing its masks")
    if isinstance(done, Failure):
        done.raise_if_stop()
        return CanaryScene(id=scene.id, uri=scene.uri, status="failed", sentence=done.sentence, denied=done.denied)
    return done


def _published_mask(scene: SceneReport, before: RunSpec, known: Known) -> str:
    """The URI of the published mask. Raises SceneChangedError when it and the canary's are not of the same pixels."""
    uri = item_uri(before, scene.id)
    body, version = store.read_version(uri)
    item = read_item(scene.id, uri, version, body)
    told = (scene.etags, scene.mask_etags)
    if item.fingerprint != known.fingerprint or (known.made.etags, known.made.mask_etags) != told:
        raise SceneChangedError(f"{scene.id}: its source or its mask was replaced while the canary ran; run it again")
    return item.published.mask_uri


def _redo(refs: Sequence[SceneRef], output: Output) -> Redo:
    """The scenes that another bundle would do again, and their ground, as far as some of their items tell of all."""
    asked = [output.items[ref.id].uri for ref in sample(refs, _ITEMS_FOR_GROUND)]
    each = [km2 for km2 in store.in_parallel(_item_km2, asked) if km2 is not None]
    return Redo(scenes=len(refs), area_km2=sum(each) / max(1, len(each)) * len(refs), items_read=len(each))


def _item_km2(uri: str) -> float | None:
    """The ground with data of a published scene in km2, as its item tells it; None when it is gone meanwhile."""
    try:
        item = json.loads(store.read(uri))
    except store.ObjectMissingError:
        return None
    counted = sum(one.get("count", 0) for one in item["assets"]["mask"]["classification:classes"])
    return float(counted * item["properties"]["gsd"] ** 2 / 1e6)


def _speed(report: RunReport, earlier: Speed | None) -> Speed | None:
    """The canary's speed: of this run, or of an earlier one that had more to do."""
    if not report.area_km2 or (earlier is not None and earlier.area_km2 > report.area_km2):
        return earlier
    return Speed(
        run=report.run_id,
        engine=report.engine,
        area_km2=report.area_km2,
        working_s=report.working_s,
        gpu_hours=report.gpu_hours,
        cpu_hours=report.cpu_hours,
    )


def _published_speed(output: Output, bundle_digest: str) -> Speed | None:
    """The speed of the last run that published with a bundle, from the records of the last runs."""
    for run_id in output.runs[-_RUNS_TO_SEARCH:][::-1]:
        record = find_record(output.root, run_id)
        if record is None:
            continue
        figures = record["figures"]
        if record["bundle"]["sha256"] == bundle_digest and figures["area_km2"]:
            keys = ("engine", "area_km2", "working_s", "gpu_hours", "cpu_hours")
            return Speed(run=run_id, **{key: figures[key] for key in keys})
    return None


def _write(canary: Canary, refs: Mapping[str, SceneRef]) -> None:
    """The picture, then the report."""
    shown = [_place(canary, one, refs[one.id]) for one in canary.worst[:WORST]]
    places = [one for one in shown if not isinstance(one, Failure)]
    if places:
        store.write(store.join(canary.after.out, PICTURE_NAME), changes_picture(places, canary.match))
    store.write(store.join(canary.after.out, REPORT_NAME), canary.to_json().encode())


def _place(canary: Canary, scene: CanaryScene, ref: SceneRef) -> ChangedPlace | Failure:
    """The block of a scene in which most changed, or why it cannot be shown."""
    assert scene.difference is not None
    window = scene.difference.place

    def shown() -> ChangedPlace:
        plan = plan_scene(ref, canary.after)
        dates = plan.reader().read(window, plan.bands).dates()
        read = max(dates, key=lambda one: int(one.valid.sum()))
        masks = MaskPair(scene.id, scene.masks, canary.match).read(window)
        return ChangedPlace(canary.caption(scene), as_rgb(read.pixels, read.valid), *masks)

    return attempt(shown, scene.id, "drawing it")

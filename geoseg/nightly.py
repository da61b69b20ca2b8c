"""The nightly run: list the sources, subtract what is published, predict the rest, tell what was done; its retry, its release."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from geoseg.config import GuardConfig, Job, check
from geoseg.errors import ConfigError, NothingReadableError
from geoseg.predict.guard import Guard
from geoseg.predict.held import held_scenes
from geoseg.predict.index import known_items, known_of, read_index, write_index
from geoseg.predict.lease import Lease
from geoseg.predict.ledger import BAD, SceneReport
from geoseg.predict.output import Output, last_record, list_output
from geoseg.predict.page import write_page
from geoseg.predict.record import GoneScene, RunReport, record_uri, write_record
from geoseg.predict.remove import half_removed, remove_scene
from geoseg.predict.selection import Selection, select
from geoseg.predict.sources import list_job
from geoseg.raster import store
from geoseg.raster.scene import SceneRef
from geoseg.raster.versions import Versions
from geoseg.run import make_run_spec, on_guard, predict_refs

RETRIED, RELEASED = "retried", "released"
_TO_RETRY = ("refused", "failed")


def run_nightly(job: Job, *, remove_gone: bool = False, quiet: bool = False) -> RunReport:
    """Bring an output up to date with its sources. Raises StopError kinds alone; finished work stays.

    The items of the output are all that it goes by: run twice, late, or after a night without a run, it leaves the same.
    ``remove_gone`` removes what was published of scenes whose sources are there no more.
    """
    job = job.model_copy(update={"guard": job.guard or GuardConfig()})
    run = make_run_spec(job)
    with Lease(run.out) as lease:
        began = time.monotonic()
        listing = list_job(job, run.out)
        output = list_output(run.out)
        indexed = read_index(run.out)
        known = known_items(output, indexed)
        held = _held_before(output, job)
        fingerprints = {scene_id: report.fingerprint for scene_id, report in held.items()}
        selection = select(listing.refs, listing.versions, run, known, held=fingerprints)
        reasons = _with_retries(selection, output)
        listing_s = time.monotonic() - began
        lease.check()
        refs = {ref.id: ref for ref in listing.refs if ref.id in reasons or ref.id in selection.held}
        run, before = on_guard(run, known if selection.todo else {})
        report = predict_refs(
            job, run, selection.todo, lease, versions=listing.versions, kind="nightly", quiet=quiet, before=before
        )
        remove_gone = remove_gone and not report.num_left  # a signal asked it to end
        looked_at = [_with_reasons(scene, reasons) for scene in report.scenes]
        report = replace(
            report,
            scenes=tuple(sorted([*looked_at, *(held[one] for one in selection.held)], key=lambda scene: scene.uri)),
            num_skipped=selection.num_unchanged,
            gone=tuple(
                GoneScene(id=one.id, sources=one.sources, removed=remove_gone, footprint=known[one.id].footprint)
                for one in selection.gone
            ),
            remarks=listing.remarks,
            listing_s=listing_s,
        )
        settled = {*refs, *(one.id for one in selection.gone)}
        standing = {ref.id: known[ref.id].footprint for ref in listing.refs if ref.id not in settled}
        if remove_gone:
            wanted = {ref.id for ref in listing.refs}
            for scene_id in [*(one.id for one in selection.gone), *half_removed(output, wanted)]:
                remove_scene(output, scene_id, lease.check)
                known.pop(scene_id, None)
        for scene in report.scenes:
            if scene.item_etag:
                known[scene.id] = known_of(scene, refs[scene.id], run)
        lease.check()
        if known != indexed:
            write_index(run.out, known)
        return write_page(report, write_record(report, job, run, refs), run, standing)


def run_retry(out: str, *, quiet: bool = False) -> RunReport | None:
    """Try again the scenes that failed or were refused in an output's last run, and no other, with that run's job.

    None when there are none. Raises NothingReadableError when no run has left a record, and StopError kinds.
    """
    root = store.normalize_uri(out).rstrip("/")
    record = last_record(list_output(root))
    where = store.redact(record_uri(root, record["run"]))
    job = check(Job, {**record["job"], "out": root}, where=where)
    refs = {
        scene["id"]: SceneRef(scene["id"], scene["uri"], tuple(scene["dates"]))
        for scene in record["scenes"]
        if scene["status"] in _TO_RETRY
    }
    if not refs:
        return None
    return _run_alone(job, refs, kind="retry", reason=RETRIED, quiet=quiet)


def run_release(out: str, scenes: Sequence[str] = (), *, quiet: bool = False) -> RunReport | None:
    """Publish scenes (ids or URIs; all when none is named) that an output's last runs held back, as they were looked at.

    None when none is held. One whose source, bundle or settings changed since is judged anew. Raises NothingReadableError for
    a scene that is not held back, ConfigError when those named were held back with different jobs, and StopError kinds.
    """
    root = store.normalize_uri(out).rstrip("/")
    held = held_scenes(list_output(root))
    if not held and not scenes:
        return None
    by_name = {name: one for one in held.values() for name in (one.scene["id"], one.scene["uri"])}
    missing = [scene for scene in scenes if scene not in by_name]
    if missing:
        raise NothingReadableError(
            f"{store.redact(root)}: {missing[0]} is not held back; geoseg release {store.redact(root)} lists those that are"
        )
    chosen = {one.scene["id"]: one for one in (map(by_name.__getitem__, scenes) if scenes else held.values())}
    first = next(iter(chosen.values()))
    other = next((one for one in chosen.values() if one.job != first.job), None)
    if other is not None:
        raise ConfigError(
            f"{first.scene['id']} was held back by run {first.run} and {other.scene['id']} by run {other.run}, with another job; "
            "name those of one job at a time"
        )
    job = check(Job, {**first.job, "out": root}, where=store.redact(record_uri(root, first.run)))
    refs = {
        scene_id: SceneRef(scene_id, one.scene["uri"], tuple(one.scene["dates"])) for scene_id, one in chosen.items()
    }
    released = frozenset(one.scene["fingerprint"] for one in chosen.values())
    return _run_alone(job, refs, kind="release", reason=RELEASED, quiet=quiet, released=released)


def _run_alone(
    job: Job,
    refs: Mapping[str, SceneRef],
    *,
    kind: str,
    reason: str,
    quiet: bool,
    released: frozenset[str] = frozenset(),
) -> RunReport:
    """Do these scenes and no other, for one reason."""
    run = make_run_spec(job)
    if released:
        run = replace(run, guard=replace(run.guard or Guard(limits=GuardConfig()), released=released))
    with Lease(run.out) as lease:
        indexed = read_index(run.out)
        run, before = on_guard(run, indexed)
        report = predict_refs(
            job, run, list(refs.values()), lease, versions=Versions(), kind=kind, quiet=quiet, before=before
        )
        report = replace(report, scenes=tuple(_with_reasons(scene, {scene.id: (reason,)}) for scene in report.scenes))
        lease.check()
        published = {scene.id: known_of(scene, refs[scene.id], run) for scene in report.scenes if scene.item_etag}
        if published:
            write_index(run.out, indexed | published)
        return write_page(report, write_record(report, job, run, refs), run, {})


def _held_before(output: Output, job: Job) -> dict[str, SceneReport]:
    """What the last run held back by the limits of this one, as it told of it; the others are looked at anew."""
    if not output.runs:
        return {}
    record = last_record(output)
    before, now = record["job"], job.model_dump(mode="json")
    if before["guard"] != now["guard"] or before["predict"] != now["predict"]:
        return {}
    told = {scene["id"]: scene for scene in record["scenes"] if scene["status"] == "held"}
    return {scene_id: _report_of(scene) for scene_id, scene in told.items() if scene_id in output.parts}


def _report_of(scene: dict[str, Any]) -> SceneReport:
    """A scene's report from a record, where tuples are lists."""
    told: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value := scene[field.name], list) else value
        for field in fields(SceneReport)
        if field.name in scene
    }
    return SceneReport(**told)


def _with_retries(selection: Selection, output: Output) -> dict[str, tuple[str, ...]]:
    """Why each scene is to be done; one that the last run did not bring to its end is tried again."""
    if not selection.todo or not output.runs:
        return selection.reasons
    ended_badly = {scene["id"] for scene in last_record(output)["scenes"] if scene["status"] in BAD}
    return {
        scene_id: (*(reason for reason in reasons if reason != "new"), RETRIED) if scene_id in ended_badly else reasons
        for scene_id, reasons in selection.reasons.items()
    }


def _with_reasons(scene: SceneReport, reasons: dict[str, tuple[str, ...]]) -> SceneReport:
    if scene.status == "unchanged":
        return scene
    return replace(scene, reasons=reasons.get(scene.id, tuple(scene.reasons)))

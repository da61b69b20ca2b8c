"""The nightly run: list the sources, subtract what is published, predict the rest, tell what was done; and its retry."""

from __future__ import annotations

import time
from dataclasses import replace

from geoseg.config import Job, check
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
from geoseg.run import make_run_spec, predict_refs

RETRIED = "retried"
_TO_RETRY = ("refused", "failed")


def run_nightly(job: Job, *, remove_gone: bool = False, quiet: bool = False) -> RunReport:
    """Bring an output up to date with its sources. Raises StopError kinds alone; finished work stays.

    The items of the output are all that it goes by: run twice, late, or after a night without a run, it leaves the same.
    ``remove_gone`` removes what was published of scenes whose sources are there no more.
    """
    run = make_run_spec(job)
    with Lease(run.out) as lease:
        began = time.monotonic()
        listing = list_job(job, run.out)
        output = list_output(run.out)
        indexed = read_index(run.out)
        known = known_items(output, indexed)
        selection = select(listing.refs, listing.versions, run, known)
        reasons = _with_retries(selection, output)
        listing_s = time.monotonic() - began
        lease.check()
        refs = {ref.id: ref for ref in selection.todo}
        report = predict_refs(job, run, selection.todo, lease, kind="nightly", quiet=quiet)
        report = replace(
            report,
            scenes=tuple(_with_reasons(scene, reasons) for scene in report.scenes),
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
    run = make_run_spec(job)
    with Lease(run.out) as lease:
        report = predict_refs(job, run, list(refs.values()), lease, kind="retry", quiet=quiet)
        report = replace(report, scenes=tuple(_with_reasons(scene, {scene.id: (RETRIED,)}) for scene in report.scenes))
        lease.check()
        published = {scene.id: known_of(scene, refs[scene.id], run) for scene in report.scenes if scene.item_etag}
        if published:
            write_index(run.out, read_index(run.out) | published)
        return write_page(report, write_record(report, job, run, refs), run, {})


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

"""The nightly run: list the sources, subtract what is published, predict the rest, tell what was done; its retry, its release."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from geoseg.config import GuardConfig, Job, check
from geoseg.errors import ConfigError, NothingReadableError
from geoseg.predict.guard import Guard
from geoseg.predict.index import known_items, known_of, read_index, write_index
from geoseg.predict.lease import Lease
from geoseg.predict.ledger import BAD, SceneReport
from geoseg.predict.outcomes import Outcome, check_has_runs, held_back, last_outcomes, with_status
from geoseg.predict.output import Output, list_output
from geoseg.predict.page import write_page
from geoseg.predict.parts import sweep
from geoseg.predict.record import GoneScene, RunReport, record_uri, write_record
from geoseg.predict.remove import half_removed, remove_scene
from geoseg.predict.selection import Selection, select
from geoseg.predict.sources import list_job
from geoseg.raster import store
from geoseg.raster.scene import SceneRef
from geoseg.raster.versions import Versions
from geoseg.run import make_run_spec, on_guard, predict_refs, with_vectors

RETRIED, RELEASED = "retried", "released"
_NO_LIMITS = GuardConfig(max_novelty=0, max_change=0, max_deviation=0)


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
        outcomes = last_outcomes(output, of=job)
        held = _held_before(outcomes, output, job)
        fingerprints = {scene_id: report.fingerprint for scene_id, report in held.items()}
        selection = select(listing.refs, listing.versions, run, known, held=fingerprints)
        reasons = _with_retries(selection, outcomes)
        listing_s = time.monotonic() - began
        lease.check()
        looked_at = {*(ref.id for ref in selection.todo), *selection.held}
        refs = {ref.id: ref for ref in listing.refs if ref.id in looked_at}
        run, before = on_guard(run, known if selection.todo else {})
        report = predict_refs(
            job, run, selection.todo, lease, versions=listing.versions, kind="nightly", quiet=quiet, before=before
        )
        remove_gone = remove_gone and not report.num_left  # a signal asked it to end
        done = [_with_reasons(scene, reasons) for scene in report.scenes]
        report = replace(
            report,
            scenes=tuple(sorted([*done, *(held[one] for one in selection.held)], key=lambda scene: scene.uri)),
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
        sweep(output.parts, {scene_id: known[scene_id].fingerprint for scene_id in standing})
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
        report = with_vectors(report, job, lease, quiet=quiet)
        return write_page(report, write_record(report, job, run, refs), run, standing)


def run_retry(out: str, *, quiet: bool = False) -> RunReport | None:
    """Try again the scenes whose last run failed on them or refused them, and no other, with that run's job.

    None when there are none. Of runs with several jobs those of the last are tried. Raises NothingReadableError when no run has
    left a record, and StopError kinds.
    """
    root = store.normalize_uri(out).rstrip("/")
    output = list_output(root)
    check_has_runs(output)
    wanted = with_status(last_outcomes(output), ("refused", "failed"))
    if not wanted:
        return None
    last = max(wanted.values(), key=lambda one: one.run)
    chosen = {scene_id: one for scene_id, one in wanted.items() if one.settings == last.settings}
    return _run_alone(root, chosen, kind="retry", reason=RETRIED, quiet=quiet)


def run_release(out: str, scenes: Sequence[str] = (), *, quiet: bool = False) -> RunReport | None:
    """Publish scenes (ids or URIs; all when none is named) that an output's last runs held back, as they were looked at.

    None when none is held. One whose source, bundle or settings changed since is judged anew. Raises NothingReadableError for
    a scene that is not held back, ConfigError when those named were held back with different jobs, and StopError kinds.
    """
    root = store.normalize_uri(out).rstrip("/")
    held = held_back(last_outcomes(list_output(root)))
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
    other = next((one for one in chosen.values() if one.settings != first.settings), None)
    if other is not None:
        raise ConfigError(
            f"{first.scene['id']} was held back by run {first.run} and {other.scene['id']} by run {other.run}, with another job; "
            "name those of one job at a time"
        )
    released = frozenset(one.scene["fingerprint"] for one in chosen.values())
    return _run_alone(root, chosen, kind="release", reason=RELEASED, quiet=quiet, released=released)


def _run_alone(
    root: str,
    chosen: Mapping[str, Outcome],
    *,
    kind: str,
    reason: str,
    quiet: bool,
    released: frozenset[str] = frozenset(),
) -> RunReport:
    """Do these scenes of an output and no other, with the job of the last run that looked at one, for one reason."""
    last = max(chosen.values(), key=lambda one: one.run)
    job = check(Job, {**last.job, "out": root}, where=store.redact(record_uri(root, last.run)))
    refs = {
        scene_id: SceneRef(scene_id, one.scene["uri"], tuple(one.scene["dates"]), tuple(one.scene.get("sums") or ()))
        for scene_id, one in chosen.items()
    }
    run = make_run_spec(job)
    if released:
        run = replace(run, guard=replace(run.guard or Guard(limits=_NO_LIMITS), released=released))
    with Lease(run.out) as lease:
        indexed = read_index(run.out)
        run, before = on_guard(run, known_items(list_output(run.out), indexed))
        report = predict_refs(
            job, run, list(refs.values()), lease, versions=Versions(), kind=kind, quiet=quiet, before=before
        )
        report = replace(report, scenes=tuple(_with_reasons(scene, {scene.id: (reason,)}) for scene in report.scenes))
        lease.check()
        published = {scene.id: known_of(scene, refs[scene.id], run) for scene in report.scenes if scene.item_etag}
        if published:
            write_index(run.out, indexed | published)
        report = with_vectors(report, job, lease, quiet=quiet)
        return write_page(report, write_record(report, job, run, refs), run, {})


def _held_before(outcomes: Mapping[str, Outcome], output: Output, job: Job) -> dict[str, SceneReport]:
    """What is held back by the limits of this job, as the last run told of it; the others are looked at anew."""
    now = store.redacted(job.model_dump(mode="json"))
    return {
        scene_id: replace(_report_of(one.scene), reasons=(), seconds=0.0)
        for scene_id, one in held_back(outcomes).items()
        if all(one.job.get(name) == now[name] for name in ("guard", "predict")) and scene_id in output.parts
    }


def _report_of(scene: dict[str, Any]) -> SceneReport:
    """A scene's report from a record, where tuples are lists."""
    told: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value := scene[field.name], list) else value
        for field in fields(SceneReport)
        if field.name in scene
    }
    return SceneReport(**told)


def _with_retries(selection: Selection, outcomes: Mapping[str, Outcome]) -> dict[str, tuple[str, ...]]:
    """Why each scene is to be done; one that the last run did not bring to its end is tried again."""
    ended_badly = with_status(outcomes, BAD)
    return {
        scene_id: (*(reason for reason in reasons if reason != "new"), RETRIED) if scene_id in ended_badly else reasons
        for scene_id, reasons in selection.reasons.items()
    }


def _with_reasons(scene: SceneReport, reasons: dict[str, tuple[str, ...]]) -> SceneReport:
    if scene.status == "unchanged":
        return scene
    return replace(scene, reasons=reasons.get(scene.id, tuple(scene.reasons)))

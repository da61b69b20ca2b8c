"""What the engineer on call asks: how does an output stand, and why was a scene done, skipped or refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from geoseg.config import Job, check
from geoseg.errors import GeosegError, NothingReadableError
from geoseg.predict.lease import read_holder
from geoseg.predict.ledger import BAD
from geoseg.predict.outcomes import Outcome, held_back, last_outcomes, with_status
from geoseg.predict.output import Output, list_output
from geoseg.predict.plan import RunSpec
from geoseg.predict.publish import StandingItem, read_item
from geoseg.predict.record import find_record
from geoseg.raster import store
from geoseg.raster.scene import mask_uri
from geoseg.raster.versions import Versions
from geoseg.run import make_run_spec

_RUNS_TO_SEARCH = 30
_OUTCOMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How an output stands.

    Scenes with an item; those whose last run held them back, refused them or saw them fail; scenes begun and not ended; the
    last run in its own words; who holds the lease, if anybody does.
    """

    out: str
    published: int
    held: int
    refused: int
    failed: int
    unfinished: int
    num_runs: int
    last_run: dict[str, Any] | None
    lease: dict[str, Any] | None

    def lines(self) -> list[str]:
        """A table for a person."""
        rows = [("published", f"{self.published} scenes"), ("held", f"{self.held}"), ("refused", f"{self.refused}")]
        rows += [("failed", f"{self.failed}"), ("unfinished", f"{self.unfinished}")]
        if self.last_run is None:
            rows.append(("last run", "none has left a record"))
        else:
            run = self.last_run
            counts = ", ".join(f"{num} {name}" for name, num in run["counts"].items() if num) or "nothing to do"
            rows.append(
                ("last run", f"{run['run']} ({run['kind']}) ended {run['ended']}, exit code {run['exit_code']}")
            )
            rows.append(("", counts))
            rows += [("next", sentence) for sentence in run["next"]]
        holder = self.lease
        told = f"run {holder.get('run')} on {holder.get('host')} (process {holder.get('pid')})" if holder else "free"
        rows.append(("lease", told))
        return [store.redact(self.out), *(f"{name:<11}{text}" for name, text in rows)]


def output_status(out: str) -> Status:
    """How an output stands, from a listing and the last run's record. Raises AccessDeniedError, ConfigError, StoreError."""
    root = store.normalize_uri(out).rstrip("/")
    output = list_output(root)
    record = find_record(root, output.runs[-1]) if output.runs else None
    outcomes = last_outcomes(output)
    by_status = Counter(one.scene["status"] for one in outcomes.values())
    ended = with_status(outcomes, BAD)
    told = ("run", "kind", "started", "ended", "exit_code", "counts", "reasons", "figures", "next", "remarks")
    return Status(
        out=root,
        published=len(output.items),
        held=by_status["held"],
        refused=by_status["refused"],
        failed=by_status["failed"],
        unfinished=len(output.parts.keys() - ended.keys()),
        num_runs=len(output.runs),
        last_run={key: record[key] for key in told} if record else None,
        lease=read_holder(root),
    )


def list_held(out: str) -> dict[str, Outcome]:
    """The scenes that are held back in an output, by id. Raises AccessDeniedError, ConfigError, StoreError."""
    return held_back(last_outcomes(list_output(store.normalize_uri(out).rstrip("/"))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a scene's fingerprint: as the item has it, and as the last run's job would have it now."""

    name: str
    published: str
    now: str

    @property
    def is_same(self) -> bool:
        """Whether it is no reason to make the mask anew."""
        return self.published == self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """What is known of a scene: its ``item``, the last outcomes (newest first), the parts of its fingerprint, a verdict."""

    id: str
    item: str
    sources: tuple[str, ...]
    outcomes: tuple[dict[str, Any], ...]
    runs_searched: int
    parts: tuple[Part, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        parts = [{**asdict(part), "same": part.is_same} for part in self.parts]
        return {**asdict(self), "parts": parts}

    def lines(self) -> list[str]:
        """The same for a person."""
        lines = [f"{self.id}: {self.verdict}"]
        lines += [f"source     {store.redact(uri)}" for uri in self.sources]
        lines += [f"item       {store.redact(self.item)}"] if self.item else ["item       none"]
        for one in self.outcomes:
            why = f" ({', '.join(one['reasons'])})" if one["reasons"] else ""
            lines.append(f"{one['ended']}  {one['run']}: {one['status']}{why}" + f" {one['sentence']}".rstrip())
        if not self.outcomes:
            lines.append(
                f"no outcome of its own in the last {self.runs_searched} runs: they found it unchanged, or not at all"
            )
        for part in self.parts:
            mark = "same   " if part.is_same else "CHANGED"
            lines.append(f"{part.name:<11}{mark} {part.published}" + ("" if part.is_same else f" -> {part.now}"))
        return lines


def explain_scene(out: str, scene: str) -> Why:
    """Why a scene (its id, or its URI) was done, skipped or refused in the last runs, and what the next one would do.

    Raises NothingReadableError when the output knows no such scene, AccessDeniedError, ConfigError, StoreError.
    """
    root = store.normalize_uri(out).rstrip("/")
    output = list_output(root)
    searched = output.runs[-_RUNS_TO_SEARCH:][::-1]
    records = [one for one in store.in_parallel(lambda run_id: find_record(root, run_id), searched) if one is not None]
    outcomes = [
        {**one, "run": record["run"], "ended": record["ended"]}
        for record in records
        for one in record["scenes"]
        if scene in (one["id"], one["uri"])
    ]
    scene_id = outcomes[0]["id"] if outcomes else scene
    item = _item(output, scene_id)
    lost = [  # since its last outcome
        {**one, "run": record["run"]}
        for record in records
        for one in record["gone"]
        if scene in (one["id"], *one["sources"]) and not (outcomes and record["run"] <= outcomes[0]["run"])
    ]
    if item is None and not outcomes and not lost:
        raise NothingReadableError(
            f"{store.redact(root)}: has no item {scene_id}, and its last {len(searched)} runs tell of none; give the id as it "
            "stands in the output, or the scene's URI"
        )
    if item is not None:
        sources = item.sources
        parts, verdict = _compare(item, records)
        if outcomes and outcomes[0]["status"] == "held" and not outcomes[0]["item"]:
            verdict = f"held back by run {outcomes[0]['run']}; the mask before it stands until geoseg release publishes this one"
    elif not lost:
        sources, parts = tuple(outcomes[0]["dates"] or [outcomes[0]["uri"]]), ()
        verdict = f"{outcomes[0]['status']} by the last run that met it; no item stands"
    else:
        sources, parts = tuple(lost[0]["sources"]), ()
        removal = next((one for one in lost if one["removed"]), None)
        verdict = (
            f"removed by run {removal['run']}, as its source was gone"
            if removal
            else f"its source was gone in run {lost[0]['run']}, and no item stands; no run tells that it removed it"
        )
    return Why(
        id=scene_id,
        item=item.published.item_uri if item else "",
        sources=sources,
        outcomes=tuple(outcomes[:_OUTCOMES]),
        runs_searched=len(searched),
        parts=parts,
        verdict=verdict,
    )


def _item(output: Output, scene_id: str) -> StandingItem | None:
    info = output.items.get(scene_id)
    if info is None:
        return None
    body, version = store.read_version(info.uri)
    return read_item(scene_id, info.uri, version, body)


def _compare(item: StandingItem, records: list[dict[str, Any]]) -> tuple[tuple[Part, ...], str]:
    """The parts of the item's fingerprint beside those of the last run's job, and what a run with that job would do."""
    if not records:
        return (), "published; no run has left a record to compare it with"
    try:
        run = make_run_spec(check(Job, records[0]["job"], where=f"the job of run {records[0]['run']}"))
    except GeosegError as error:
        return (), f"published; the job of the last run cannot be set up any more: {error}"
    versions = Versions()
    versions.look_up(uri for image in item.sources for uri in (image, mask_uri(image)))
    if all(versions.is_absent(uri) for uri in item.sources):
        return (), "published, and its source is gone: geoseg nightly JOB.toml --remove-gone would remove it"
    told = [(versions.etag(uri), versions.etag(mask_uri(uri)) or None) for uri in item.sources]
    before, now = item.made, run.made_from(told)
    parts = (
        Part(name="input", published=" ".join(before.etags), now=" ".join(now.etags)),
        Part(name="mask", published=" ".join(before.mask_etags), now=" ".join(now.mask_etags)),
        Part(name="bundle", published=before.bundle, now=now.bundle),
        Part(name="settings", published=before.settings, now=now.settings),
        Part(name="area", published=before.aoi, now=now.aoi),
    )
    if all(part.is_same for part in parts) and _by_these_rules(item, run, told):
        return parts, "published, and a run with the last job would leave it as it is"
    return parts, f"published, and a run with the last job would do it again: {', '.join(before.changes_to(now))}"


def _by_these_rules(item: StandingItem, run: RunSpec, versions: list[tuple[str, str | None]]) -> bool:
    """Whether an item's fingerprint follows from its parts; of a stack that lacks dates it does not say which, and it counts."""
    if len(versions) != run.description.dates:
        return True
    kinds = (False, True) if len(versions) == 1 else (True,)
    return any(run.fingerprint_of(versions, is_stack=is_stack) == item.fingerprint for is_stack in kinds)

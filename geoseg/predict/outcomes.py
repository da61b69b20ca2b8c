"""What became of each scene last, from the records of an output's last runs: which are held back, which wait to be tried again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from geoseg.config import Job
from geoseg.errors import NothingReadableError
from geoseg.predict.ledger import Status
from geoseg.predict.output import Output
from geoseg.predict.record import find_record
from geoseg.raster import store

_RUNS_TO_SEARCH = 30
_ALL_SCENES = "nightly"  # a run whose record has every scene of its job that is not unchanged
_ONLY_TRIES = "release"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A scene as the last run told of it that looked at it; ``run`` and ``job`` are that run's id and settings."""

    scene: dict[str, Any]
    run: str
    job: dict[str, Any]

    @property
    def is_held_back(self) -> bool:
        """Whether a mask waits to be released; one that stands already and lies above a limit by now does not."""
        return self.scene["status"] == "held" and not self.scene["item"]

    @property
    def settings(self) -> dict[str, Any]:
        """The job without what changes no outcome."""
        return {name: value for name, value in self.job.items() if name not in ("out", "cluster")}

    def lines(self) -> list[str]:
        """What a person wants to know before a scene is released."""
        picture = self.scene.get("thumbnail")
        return [str(self.scene["sentence"]), f"    {self.scene['uri']}", *([f"    {picture}"] if picture else [])]


def last_outcomes(output: Output, *, of: Job | None = None) -> dict[str, Outcome]:
    """The last outcome of each scene by its id, from the last runs.

    A night that came to its end tells of all scenes of its sources that are not unchanged, so what earlier runs say of these
    sources is past; with ``of`` no more than the sources of that job are asked for. A release that failed leaves a scene as it
    was. Records that cannot be read are left out. Raises AccessDeniedError, StoreError.
    """
    found: dict[str, Outcome] = {}
    removed: set[str] = set()
    past: list[dict[str, Any]] = []
    wanted = _sources(store.redacted(of.model_dump(mode="json"))) if of is not None else None
    last = output.runs[-_RUNS_TO_SEARCH:][::-1]
    find = partial(find_record, output.root)
    for record in map(find, last) if wanted else store.in_parallel(find, last):  # of one job the first mostly tells all
        if record is None or _sources(record["job"]) in past:
            continue
        for scene in record["scenes"]:
            if scene["id"] not in removed and not (record["kind"] == _ONLY_TRIES and scene["status"] == "failed"):
                found.setdefault(scene["id"], Outcome(scene=scene, run=record["run"], job=record["job"]))
        removed |= {gone["id"] for gone in record["gone"] if gone["removed"]}
        if record["kind"] == _ALL_SCENES and not record["left"]:
            past.append(_sources(record["job"]))
            if past[-1] == wanted:
                break
    return dict(sorted(found.items()))


def _sources(job: Mapping[str, Any]) -> dict[str, Any]:
    """Where a job has its scenes from."""
    return {name: job.get(name) for name in ("scenes", "source", "stacks", "stack_by")}


def held_back(outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Those whose masks wait to be released."""
    return {scene_id: one for scene_id, one in outcomes.items() if one.is_held_back}


def with_status(outcomes: Mapping[str, Outcome], wanted: Iterable[Status]) -> dict[str, Outcome]:
    """Those that ended in one of these ways."""
    return {scene_id: one for scene_id, one in outcomes.items() if one.scene["status"] in wanted}


def check_has_runs(output: Output) -> None:
    """Raises NothingReadableError when no run has left a record."""
    if not output.runs:
        raise NothingReadableError(
            f"{store.redact(output.root)}: no run has left a record there; check the output's name"
        )

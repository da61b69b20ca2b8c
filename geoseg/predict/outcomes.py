"""What became of each scene last, from the records of an output's last runs: which are held back, which wait to be tried again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from geoseg.errors import NothingReadableError
from geoseg.predict.ledger import Status
from geoseg.predict.output import Output
from geoseg.predict.record import read_record
from geoseg.raster import store

_RUNS_TO_SEARCH = 30
_ALL_SCENES = "nightly"  # a run whose record has every scene that is not unchanged
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


def last_outcomes(output: Output) -> dict[str, Outcome]:
    """The last outcome of each scene by its id, back to the last nightly run, which tells of all that is not unchanged.

    A release that failed leaves a scene as it was. Raises AccessDeniedError, ConfigError, StoreError.
    """
    found: dict[str, Outcome] = {}
    removed: set[str] = set()
    for run_id in output.runs[-_RUNS_TO_SEARCH:][::-1]:
        record = read_record(output.root, run_id)
        for scene in record["scenes"]:
            if scene["id"] not in removed and not (record["kind"] == _ONLY_TRIES and scene["status"] == "failed"):
                found.setdefault(scene["id"], Outcome(scene=scene, run=record["run"], job=record["job"]))
        removed |= {gone["id"] for gone in record["gone"] if gone["removed"]}
        if record["kind"] == _ALL_SCENES:
            break
    return dict(sorted(found.items()))


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

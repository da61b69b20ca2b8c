"""Scenes that are held back: those whose last outcome was that, in the records of an output's last runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from geoseg.predict.output import Output
from geoseg.predict.record import read_record
from geoseg.raster import store

_RUNS_TO_SEARCH = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A scene as the run told of it that held it back last; ``run`` and ``job`` are that run's id and settings."""

    scene: dict[str, Any]
    run: str
    job: dict[str, Any]

    def lines(self) -> list[str]:
        """What a person wants to know before it is released."""
        return [str(self.scene["sentence"]), f"    {store.redact(self.scene['uri'])}", f"    {self.scene['thumbnail']}"]


def held_scenes(output: Output) -> dict[str, Held]:
    """The scenes of an output that are held back, by id. Raises AccessDeniedError, ConfigError, StoreError."""
    searched = output.runs[-_RUNS_TO_SEARCH:][::-1]
    settled: set[str] = set()
    found: dict[str, Held] = {}
    for record in store.in_parallel(lambda run_id: read_record(output.root, run_id), searched):
        for scene in record["scenes"]:
            if scene["status"] == "held" and scene["id"] not in settled:
                found[scene["id"]] = Held(scene=scene, run=record["run"], job=record["job"])
        settled |= {scene["id"] for scene in record["scenes"]}
        settled |= {gone["id"] for gone in record["gone"] if gone["removed"]}
    return dict(sorted(found.items()))

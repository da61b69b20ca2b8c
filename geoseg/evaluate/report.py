"""What came of an evaluation: a table for a person, a JSON with every count, and the exit code."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from geoseg.config import PredictConfig
from geoseg.errors import AccessDeniedError, NothingReadableError
from geoseg.model.bundle import Bundle
from geoseg.raster import store
from geoseg.train.metrics import BOUNDARY_PX, RELAXED_PX, Counts, class_scores
from geoseg.train.sources import SourceConfig

_TABLE = (
    ("IoU", "iou"), ("precision", "precision"), ("recall", "recall"), ("F1", "f1"), ("boundary IoU", "boundary_iou"),
    (f"F1 at {RELAXED_PX} px", "relaxed_f1"), ("object F1", "object_f1"), ("ECE", "ece"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneResult:
    """What came of a scene: its counts and files (by kind, below the output), or the ``sentence`` that says why not."""

    source: str
    id: str
    uri: str
    resolution_m: float = math.nan
    counts: Counts | None = None
    files: tuple[tuple[str, str], ...] = ()
    sentence: str = ""
    denied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A bundle's scores. ``exit_code``: 0 all scenes were judged, 1 some were not, 3 none could be, 4 all were denied."""

    bundle: Bundle
    config: PredictConfig
    sources: tuple[SourceConfig, ...]
    scenes: tuple[SceneResult, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The bundle's classes, background first."""
        return tuple(one.name for one in self.bundle.description.classes)

    @property
    def exit_code(self) -> int:
        """The process's exit code."""
        left = [scene for scene in self.scenes if scene.counts is None]
        if not left:
            return 0
        if len(left) < len(self.scenes):
            return 1
        return AccessDeniedError.exit_code if all(scene.denied for scene in left) else NothingReadableError.exit_code

    def counts_of(self, source: str | None) -> Counts:
        """The counts of all judged scenes of a source, or of all sources."""
        each = [one.counts for one in self.scenes if one.counts is not None and source in (None, one.source)]
        return sum(each, Counts.zero(len(self.class_names)))

    def lines(self) -> list[str]:
        """The table: a row for each source and class that its labels tell of, and the scenes that could not be judged."""
        names = [source.name for source in self.sources]
        rows = [(name, self.counts_of(name)) for name in names]
        if len(names) > 1:
            rows.append(("all", self.counts_of(None)))
        wide = max(len("source"), *(len(name) for name, _ in rows))
        deep = max(len("class"), *(len(name) for name in self.class_names))
        lines = [f"{'source':{wide}} {'class':{deep}} {'Mpx':>8} " + " ".join(f"{title:>5}" for title, _ in _TABLE)]
        for name, counts in rows:
            for place, score in enumerate(class_scores(counts)):
                known = int(counts.of("known")[place])
                if known:
                    told = asdict(score)
                    numbers = " ".join(f"{_told(told[key]):>{max(5, len(title))}}" for title, key in _TABLE)
                    lines.append(f"{name:{wide}} {self.class_names[place]:{deep}} {known / 1e6:8.2f} {numbers}")
        return lines + [f"not judged: {one.source}/{one.id}: {one.sentence}" for one in self.scenes if one.sentence]

    def to_json(self) -> str:
        """All counts and scores, per scene, per source and in all; the same for any window, batch and number of workers."""
        description = self.bundle.description
        told = {
            "bundle": {"name": description.name, "sha256": self.bundle.digest},
            "classes": self.class_names,
            "settings": self.config.pixel_settings(),
            "aoi": self.config.aoi,
            "distances": {
                "boundary_px": BOUNDARY_PX,
                "relaxed_px": RELAXED_PX,
                "object_iou": 0.5,
                "of": "the scene's own pixels",
            },
            "job": [source.model_dump(mode="json", by_alias=True) for source in self.sources],
            "in_all": self._of(self.counts_of(None)),
            "sources": {source.name: self._of(self.counts_of(source.name)) for source in self.sources},
            "scenes": [self._of_scene(one) for one in self.scenes],
        }
        return json.dumps(store.redacted(_plain(told)), indent=1, allow_nan=False)

    def _of(self, counts: Counts) -> dict[str, Any]:
        scores = [asdict(one) for one in class_scores(counts)]
        return {"scores": dict(zip(self.class_names, scores, strict=True)), "counts": counts.to_dict()}

    def _of_scene(self, one: SceneResult) -> dict[str, Any]:
        told = {"source": one.source, "id": one.id, "uri": one.uri}
        if one.counts is None:
            return {**told, "not_judged": one.sentence}
        return {**told, "resolution_m": one.resolution_m, "files": dict(one.files), **self._of(one.counts)}


def _told(score: float) -> str:
    return "-" if math.isnan(score) else f"{score:.3f}"


def _plain(told: Any) -> Any:
    """The same as JSON can hold it: no NaN."""
    if isinstance(told, dict):
        return {key: _plain(value) for key, value in told.items()}
    if isinstance(told, Sequence) and not isinstance(told, str):
        return [_plain(value) for value in told]
    return None if isinstance(told, float) and math.isnan(told) else told

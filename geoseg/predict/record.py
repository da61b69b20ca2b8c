"""What a run did, and its record beside the results: one JSON that says which scenes came out how, why, and what to do next."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from geoseg import __version__
from geoseg.config import Job
from geoseg.errors import AccessDeniedError, ConfigError, NothingReadableError
from geoseg.predict.ledger import BAD, SceneReport
from geoseg.predict.parts import WORK_FOLDER
from geoseg.predict.plan import RunSpec
from geoseg.raster import store
from geoseg.raster.scene import SceneRef

RUNS_FOLDER, RECORD_NAME = "runs", "summary.json"
_SCHEMA = 1
INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class GoneScene:
    """A scene whose sources are there no more, and whether what was published of it was removed.

    ``footprint`` is where it lies, as in ``SceneReport``.
    """

    id: str
    sources: tuple[str, ...]
    removed: bool = False
    footprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run did. ``exit_code``: 0 all scenes stand, 1 some failed, 3 not one could be read, 4 all were denied.

    It is 130 when a signal ended the run with ``num_left`` scenes still to do. ``kind``: the command that ran it. ``scenes``
    are those that came to an end; ``num_skipped`` more stand unchanged, as listings told. ``num_untraced`` scenes got no vectors
    although the job asks for them. ``gpu_hours`` and ``cpu_hours`` are those of the GPUs and CPU cores that its workers held.
    ``page`` is where its page is, "" when it has none.
    """

    kind: str
    run_id: str
    out: str
    engine: str
    scenes: tuple[SceneReport, ...]
    num_skipped: int = 0
    num_left: int = 0
    num_untraced: int = 0
    gone: tuple[GoneScene, ...] = ()
    remarks: tuple[str, ...] = ()
    windows: int = 0
    pixels: int = 0
    area_km2: float = 0.0
    bytes_read: int = 0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    listing_s: float = 0.0
    startup_s: float = 0.0
    working_s: float = 1e-9
    page: str = ""

    @property
    def counts(self) -> Counter[str]:
        """Scenes by status."""
        return Counter(scene.status for scene in self.scenes) + Counter({"unchanged": self.num_skipped})

    @property
    def reasons(self) -> Counter[str]:
        """Scenes by why there was something to do; one with two reasons counts twice."""
        return Counter(reason for scene in self.scenes for reason in scene.reasons)

    @property
    def exit_code(self) -> int:
        """The process's exit code."""
        counts = self.counts
        if self.num_left:
            return INTERRUPTED
        if not any(counts[status] for status in BAD):
            return int(self.num_untraced > 0)
        if not self.num_skipped and all(scene.denied for scene in self.scenes):
            return AccessDeniedError.exit_code
        was_read = any(counts[status] for status in ("published", "unchanged", "held"))
        return 1 if was_read else NothingReadableError.exit_code

    @property
    def km2_per_h(self) -> float:
        """Ground predicted in an hour of work."""
        return self.area_km2 / self.working_s * 3600

    def summary(self) -> str:
        """Two lines for a person."""
        counts = self.counts
        told = [f"{counts[status]} {status}" for status in ("published", "unchanged", *BAD) if counts[status]]
        told += [f"{self.num_left} left"] if self.num_left else []
        mpx = self.pixels / 1e6
        return (
            f"{counts.total() + self.num_left} scenes: {', '.join(told) or 'nothing to do'}\n"
            f"{mpx:.1f} Mpx, {self.area_km2:.3g} km2 in {self.working_s:.1f} s: {mpx / self.working_s:.2f} Mpx/s, "
            f"{self.km2_per_h:.3g} km2/h ({self.bytes_read / 1e6:.1f} MB read, "
            f"start-up {self.startup_s:.1f} s, engine {self.engine})"
        )

    def next_steps(self) -> list[str]:
        """What a person may do now, a sentence each."""
        counts, out = self.counts, store.redact(self.out)
        held = sum(scene.status == "held" and not scene.item for scene in self.scenes)
        remaining = sum(not scene.removed for scene in self.gone)
        steps = (
            (self.num_left, "left when a signal ended the run: the same command goes on from there"),
            (counts["failed"], f"failed: geoseg retry {out} tries them again, alone"),
            (counts["refused"], f"refused: mend what their causes say, then geoseg retry {out}"),
            (held, f"held back: geoseg release {out} lists them, and publishes those that it is given"),
            (counts["held"] - held, "whose masks stand lie above --max-seam-score: allow more, or change the settings"),
            (self.num_untraced, f"without vectors: geoseg vectorize {out} traces them, alone"),
            (remaining, "lost their source: geoseg nightly JOB.toml --remove-gone removes what was published of them"),
        )
        return [f"{num} {'scene' if num == 1 else 'scenes'} {sentence}" for num, sentence in steps if num]


def write_record(report: RunReport, job: Job, run: RunSpec, refs: Mapping[str, SceneRef]) -> dict[str, Any]:
    """Write the record: the whole config and what came of each scene, without secrets. ``refs`` are those scenes by id.

    What was written comes back.
    """
    now = time.time()
    took_s = report.listing_s + report.startup_s + report.working_s
    counts = report.counts
    told: dict[str, Any] = {
        "schema": _SCHEMA,
        "geoseg": __version__,
        "run": report.run_id,
        "kind": report.kind,
        "started": _iso(now - took_s),
        "ended": _iso(now),
        "exit_code": report.exit_code,
        "counts": dict.fromkeys(("published", "unchanged", *BAD), 0)
        | counts
        | {"gone": len(report.gone), "removed": sum(scene.removed for scene in report.gone)},
        "left": report.num_left,
        "untraced": report.num_untraced,
        "reasons": dict(report.reasons),
        "figures": {
            "engine": report.engine,
            "windows": report.windows,
            "pixels": report.pixels,
            "area_km2": report.area_km2,
            "km2_per_h": report.km2_per_h,
            "bytes_read": report.bytes_read,
            "gpu_hours": report.gpu_hours,
            "cpu_hours": report.cpu_hours,
            "listing_s": report.listing_s,
            "startup_s": report.startup_s,
            "working_s": report.working_s,
        },
        "next": report.next_steps(),
        "remarks": report.remarks,
        "bundle": {
            "name": run.description.name,
            "uri": run.bundle_uri,
            "sha256": run.bundle_digest,
            "classes": [one.model_dump(mode="json") for one in run.description.classes],
        },
        "job": job.model_dump(mode="json"),
        "gone": [asdict(scene) for scene in report.gone],
        "scenes": [
            {
                **asdict(scene),
                "dates": refs[scene.id].dates if scene.id in refs else (),
                "sums": refs[scene.id].sums if scene.id in refs else (),
            }
            for scene in report.scenes
        ],
    }
    record: dict[str, Any] = store.redacted(told)
    store.write(record_uri(report.out, report.run_id), json.dumps(record, indent=1, allow_nan=False).encode())
    return record


def record_uri(out: str, run_id: str) -> str:
    """Where the record of a run is."""
    return store.join(out, WORK_FOLDER, RUNS_FOLDER, run_id, RECORD_NAME)


def find_record(out: str, run_id: str) -> dict[str, Any] | None:
    """The record of a run, None for one that is damaged, gone, or of another version. Raises AccessDeniedError, StoreError."""
    try:
        return read_record(out, run_id)
    except (ConfigError, store.ObjectMissingError):
        return None


def read_record(out: str, run_id: str) -> dict[str, Any]:
    """The record of a run. Raises ConfigError when it is none, ObjectMissingError, AccessDeniedError, StoreError."""
    uri = record_uri(out, run_id)
    try:
        told = json.loads(store.read(uri))
        known = told["schema"] == _SCHEMA
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.redact(uri)}: not the record of a run: {error!r}") from error
    if not known:
        raise ConfigError(
            f"{store.redact(uri)}: its schema is {told['schema']}, this version of geoseg reads {_SCHEMA}"
        )
    assert isinstance(told, dict)
    return told


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

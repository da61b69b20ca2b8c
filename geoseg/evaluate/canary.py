"""What came of a canary: what differs between published masks and those of a new bundle, for a person and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoseg import __version__
from geoseg.config import Job
from geoseg.errors import AccessDeniedError, NothingReadableError
from geoseg.evaluate.difference import ClassDifference, ClassMatch, GroundDifference, MaskDifference, ground_difference
from geoseg.predict.plan import RunSpec
from geoseg.progress import duration
from geoseg.raster import store

REPORT_NAME, PICTURE_NAME = "canary.json", "canary.png"
WORST = 8
_SCHEMA = 1
_TOLD_SCENES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryScene:
    """A scene of the sample: what differs between its two masks (``masks``: published and new), or the ``sentence`` why not.

    ``status``: ``compared``, or as in a run ``refused``, ``held`` or ``failed``.
    """

    id: str
    uri: str
    status: str
    sentence: str = ""
    denied: bool = False
    masks: tuple[str, str] = ("", "")
    difference: MaskDifference | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast a run was: ground in km2, seconds of work, hours of the GPUs and CPU cores that it held."""

    run: str
    engine: str
    area_km2: float
    working_s: float
    gpu_hours: float
    cpu_hours: float

    @property
    def km2_per_h(self) -> float:
        """Ground in an hour of work."""
        return self.area_km2 / self.working_s * 3600

    def told(self) -> str:
        """The rate and what it was measured on."""
        return f"{_short(self.km2_per_h)} km2/h ({_short(self.area_km2)} km2, engine {self.engine})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Redo:
    """What a change of the bundle would do again: scenes, their ground in km2, from how many items that was estimated."""

    scenes: int
    area_km2: float
    items_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A canary's outcome. ``exit_code``: 0 all of the sample was compared, 1 some was not, 3 none could be, 4 all was denied.

    ``published`` scenes stood for the sample. ``speeds``: of the last run that published with the present bundle, and of the
    canary; None where nothing is known.
    """

    job: Job
    before: RunSpec
    after: RunSpec
    scenes: tuple[CanaryScene, ...]
    published: int
    redo: Redo
    speeds: tuple[Speed | None, Speed | None]
    remarks: tuple[str, ...] = ()

    @property
    def match(self) -> ClassMatch:
        """The classes of both bundles."""
        return ClassMatch(self.before.description.classes, self.after.description.classes)

    @property
    def exit_code(self) -> int:
        """The process's exit code."""
        left = [scene for scene in self.scenes if scene.difference is None]
        if not left:
            return 0
        if len(left) < len(self.scenes):
            return 1
        return AccessDeniedError.exit_code if all(scene.denied for scene in left) else NothingReadableError.exit_code

    @property
    def km2_ba(self) -> NDArray[np.float64]:
        """Ground of the whole sample in km2 by class before and after (b, a), the last of either without data."""
        size = len(self.match.all) + 1
        each = [scene.difference.km2_ba for scene in self.scenes if scene.difference is not None]
        return sum(each, np.zeros((size, size)))

    @property
    def in_all(self) -> GroundDifference:
        """What differs in the whole sample."""
        return ground_difference(self.km2_ba, self.match)

    def of(self, scene: CanaryScene) -> GroundDifference:
        """What differs in a scene that was compared."""
        assert scene.difference is not None
        return ground_difference(scene.difference.km2_ba, self.match)

    @property
    def worst(self) -> list[CanaryScene]:
        """The scenes that were compared, those of whose ground the greatest share changed first."""
        compared = [scene for scene in self.scenes if scene.difference is not None]
        return sorted(compared, key=lambda scene: (-self.of(scene).changed, scene.id))

    def lines(self) -> list[str]:
        """The report for a person."""
        compared, in_all = self.worst, self.in_all
        head = (
            f"{len(compared)} of {self.published} published scenes compared, {_short(in_all.both_km2)} km2: "
            f"{_named(self.before)} as published, {_named(self.after)} as canary"
        )
        left = [f"{one.status}: {one.id}: {one.sentence}" for one in self.scenes if one.sentence]
        lines = [head, *([told] if (told := self.match.sentence()) else [])]
        if compared:
            lines += [*_table(in_all), *self._scene_lines(compared)]
        *others, take_over = self.next_steps()
        time = f", about {duration(self.redo_s)} at the canary's speed" if self.redo_s is not None else ""
        return [*lines, *left, *self._speed_lines(), *others, take_over + time]

    def _scene_lines(self, compared: Sequence[CanaryScene]) -> list[str]:
        """The worst scenes, one below the other."""
        wide = max(len(one.id) for one in compared[:_TOLD_SCENES])
        lines = [f"most changed of {len(compared)}:" if len(compared) > _TOLD_SCENES else "changed:"]
        for scene in compared[:_TOLD_SCENES]:
            ground = self.of(scene)
            each = "   ".join(
                f"{one.name} +{_short(one.gained_km2)} -{_short(one.lost_km2)} km2 (IoU {_share(one.iou)})"
                for one in self._shown(ground)
            )
            lines.append(f"  {scene.id:{wide}}  {ground.changed:7.2%}   {each}")
        return lines

    def _shown(self, ground: GroundDifference) -> list[ClassDifference]:
        """The classes but background."""
        return [one for one in ground.classes if one.name != self.before.description.classes[0].name]

    def _speed_lines(self) -> list[str]:
        told = [
            f"{name} {speed.told()}"
            for name, speed in zip(("as published", "canary"), self.speeds, strict=True)
            if speed
        ]
        return [f"speed: {', '.join(told)}"] if told else []

    def next_steps(self) -> list[str]:
        """What a person may do now, a sentence each."""
        picture = store.redact(store.join(self.after.out, PICTURE_NAME))
        look = (
            f"look at {picture}: this says what changes, not which mask is right; where there are labels, geoseg evaluate tells "
            "that of both bundles"
        )
        redo = self.redo
        take_over = (
            f'to take it over, set bundle = "{store.redact(self.after.bundle_uri)}" in JOB.toml; {redo.scenes} '
            f"{'scene' if redo.scenes == 1 else 'scenes'} will be done again, "
            f"{'about ' if redo.items_read < redo.scenes else ''}{_short(redo.area_km2)} km2"
        )
        return [look, take_over] if self.worst else [take_over]

    @property
    def redo_s(self) -> float | None:
        """Seconds of work that a change of the bundle would cost at the canary's speed."""
        speed = self.speeds[1]
        return self.redo.area_km2 / speed.km2_per_h * 3600 if speed is not None else None

    def caption(self, scene: CanaryScene) -> str:
        """A scene's changes in a line below which its picture stands."""
        ground = self.of(scene)
        each = ", ".join(
            f"{one.name} +{_short(one.gained_km2)} -{_short(one.lost_km2)} km2" for one in self._shown(ground)
        )
        return f"{scene.id}: {ground.changed:.2%} of its ground changed; {each}"

    def to_json(self) -> str:
        """All of it; ``timings`` alone differs between two canaries that compare the same masks.

        ``pixels`` and ``km2`` are tables of the classes ``all`` before (rows) and after (columns), the last of either without data.
        """
        names = [one.name for one in self.match.all]
        told: dict[str, Any] = {
            "schema": _SCHEMA,
            "geoseg": __version__,
            "out": self.before.out,
            "to": self.after.out,
            "before": _bundle(self.before),
            "after": _bundle(self.after),
            "classes": {"compared": self.match.common, "all": names, "remark": self.match.sentence()},
            "sample": {"scenes": len(self.scenes), "published": self.published, "compared": len(self.worst)},
            "in_all": {"km2": self.km2_ba.tolist(), **_ground(self.in_all)},
            "scenes": [self._of_scene(one) for one in self.scenes],
            "redo": asdict(self.redo),
            "next": self.next_steps(),
            "remarks": self.remarks,
            "picture": store.join(self.after.out, PICTURE_NAME) if self.worst else "",
            "exit_code": self.exit_code,
            "job": self.job.model_dump(mode="json"),
            "timings": {
                **dict(zip(("published", "canary"), map(_timing, self.speeds), strict=True)),
                "redo_s": self.redo_s,
            },
        }
        return json.dumps(store.redacted(told), indent=1, allow_nan=False)

    def _of_scene(self, one: CanaryScene) -> dict[str, Any]:
        told = {"id": one.id, "uri": one.uri, "status": one.status}
        if one.difference is None:
            return {**told, "sentence": one.sentence}
        place = one.difference.place
        return {
            **told,
            "published_mask": one.masks[0],
            "canary_mask": one.masks[1],
            "pixel_m2": one.difference.pixel_m2,
            "pixels": one.difference.pixels_ba.tolist(),
            "most_changed": [place.col_off, place.row_off, place.width, place.height],
            **_ground(self.of(one)),
        }


def read_speed(out: str, bundle_digest: str) -> Speed | None:
    """The speed of an earlier canary of a bundle, from its report; None without one that can be read."""
    try:
        told = json.loads(store.read(store.join(out, REPORT_NAME)))
        if told["schema"] != _SCHEMA or told["after"]["sha256"] != bundle_digest or told["timings"]["canary"] is None:
            return None
        return Speed(**{key: value for key, value in told["timings"]["canary"].items() if key != "km2_per_h"})
    except (store.ObjectMissingError, ValueError, KeyError, TypeError):
        return None


def _table(ground: GroundDifference) -> list[str]:
    """A row for each class that both bundles have, and what of the ground could not be compared."""
    wide = max(len("class"), *(len(one.name) for one in ground.classes)) if ground.classes else len("class")
    lines = [f"{'class':{wide}} {'before':>9} {'after':>9} {'IoU':>6} {'gained km2':>11} {'lost km2':>9}"]
    for one in ground.classes:
        before, after = (
            f"{km2 / ground.both_km2:.2%}" if ground.both_km2 else "-" for km2 in (one.before_km2, one.after_km2)
        )
        lines.append(
            f"{one.name:{wide}} {before:>9} {after:>9} {_share(one.iou):>6} {_short(one.gained_km2):>11} "
            f"{_short(one.lost_km2):>9}"
        )
    lines.append(f"{ground.changed:.2%} of the ground has another class")
    if ground.one_km2:
        lines.append(f"{_short(ground.one_km2)} km2 have data in one of the two masks alone and do not count")
    return lines


def _ground(ground: GroundDifference) -> dict[str, Any]:
    classes = [
        {**asdict(one), "before_km2": one.before_km2, "after_km2": one.after_km2, "iou": one.iou}
        for one in ground.classes
    ]
    return {**asdict(ground), "changed": ground.changed, "classes": classes}


def _timing(speed: Speed | None) -> dict[str, Any] | None:
    return {**asdict(speed), "km2_per_h": speed.km2_per_h} if speed is not None else None


def _bundle(run: RunSpec) -> dict[str, str]:
    return {"name": run.description.name, "uri": run.bundle_uri, "sha256": run.bundle_digest}


def _named(run: RunSpec) -> str:
    return f"{run.description.name} ({run.bundle_digest[:8]})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

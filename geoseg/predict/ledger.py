"""What is to be done, what is done, and what came of each scene; the same bookkeeping in every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from geoseg.predict.failure import Failure, attempt
from geoseg.predict.guard import MaskBefore
from geoseg.predict.parts import finished_parts
from geoseg.predict.plan import RunSpec, ScenePlan, plan_scene
from geoseg.predict.progress import Progress
from geoseg.predict.publish import HeldBack, Published, standing_item
from geoseg.predict.seams import held_back
from geoseg.predict.stac import footprint, footprint_text
from geoseg.predict.turns import Turn
from geoseg.raster import store
from geoseg.raster.scene import SceneRef
from geoseg.raster.sums import check_sums
from geoseg.raster.window import Window, WindowSet

Status = Literal["published", "unchanged", "held", "refused", "failed"]
BAD: tuple[Status, ...] = ("held", "refused", "failed")
MaskFinder = Callable[[str, str], MaskBefore | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneReport:
    """What came of a scene; ``sentence`` says why when it was held back, refused or failed, or what looked implausible.

    ``reasons`` say why there was something to do, ``seconds`` is the time from its plan until it was settled. ``fingerprint``,
    ``etags`` and ``mask_etags`` (see ``MadeFrom``) are what it was made from, ``item_etag`` the version of its item. ``thumbnail``:
    of a scene that is held back its mask in colours, small. ``footprint`` is where it lies (WKT in longitude and latitude), ""
    when that is not known; ``moment``: the (last) time of its pixels.
    """

    id: str
    uri: str
    status: Status
    sentence: str = ""
    denied: bool = False
    item: str = ""
    mask: str = ""
    classes: tuple[int, ...] = ()
    seam_score: float | None = None
    blend_error: float | None = None
    area_km2: float = 0.0
    novelty: float | None = None
    fine_share: float | None = None
    is_released: bool = False
    thumbnail: str = ""
    moment: str = ""
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0
    fingerprint: str = ""
    etags: tuple[str, ...] = ()
    mask_etags: tuple[str, ...] = ()
    item_etag: str = ""
    footprint: str = ""


def prepare_scene(ref: SceneRef, run: RunSpec) -> ScenePlan | SceneReport | Failure:
    """The plan of a scene, or a report when its masks stand already, or why it is refused; no pixel is read.

    The files are compared with their sums where the scene comes with some.
    """
    return attempt(lambda: _prepare(ref, run), ref.id, "planning")


def _prepare(ref: SceneRef, run: RunSpec) -> ScenePlan | SceneReport:
    plan = plan_scene(ref, run)
    standing = standing_item(run, plan)
    if standing is None:
        return _compared(replace(plan, reasons=("new",)), ref)
    done = standing.published
    plan = replace(plan, before=MaskBefore(id=ref.id, classes=standing.classes))
    if standing.fingerprint != plan.fingerprint:
        reasons = standing.made.changes_to(run.made_from(_versions(plan)))
        return _compared(replace(plan, replaces=done.version, revision=standing.revision + 1, reasons=reasons), ref)
    why = held_back(ref.id, done.seam_score, run.config.max_seam_score) if not done.is_released else ""
    return SceneReport(
        **_facts(plan),
        status="held" if why else "unchanged",
        sentence=why,
        item=done.item_uri,
        mask=done.mask_uri,
        classes=tuple(done.classes),
        seam_score=done.seam_score,
        blend_error=done.blend_error,
        novelty=done.novelty,
        fine_share=done.fine_share,
        is_released=done.is_released,
        item_etag=store.bare(done.version),
    )


def _compared(plan: ScenePlan, ref: SceneRef) -> ScenePlan:
    """The plan, if the files are what their sums say. Raises ChecksumError."""
    check_sums(ref, {scene.uri: (scene.etag, scene.size) for scene in plan.scenes})
    return plan


def _versions(plan: ScenePlan) -> list[tuple[str, str | None]]:
    return [(scene.etag, scene.mask_etag) for scene in plan.scenes]


def _facts(plan: ScenePlan) -> dict[str, Any]:
    """What a report takes over from the plan."""
    return {
        "id": plan.scene.id,
        "uri": plan.scene.uri,
        "reasons": plan.reasons,
        "fingerprint": plan.fingerprint,
        "etags": tuple(scene.etag for scene in plan.scenes),
        "mask_etags": tuple(scene.mask_etag or "" for scene in plan.scenes),
        "footprint": _footprint(plan),
        "moment": max(scene.datetime for scene in plan.scenes),
    }


def _footprint(plan: ScenePlan) -> str:
    """Where a scene lies; "" too when finding out fails, for no run is to end by it."""
    found = attempt(lambda: footprint_text(footprint(plan.scene.grid)[0]), plan.scene.id, "placing it")
    return "" if isinstance(found, Failure) else found


@dataclass(frozen=True, slots=True)
class PlannedWindows:
    """A scene's plan, how many windows there are, and each of them, once."""

    plan: ScenePlan
    num: int
    each: Iterator[Window]


def list_windows(run: RunSpec, plan: ScenePlan, *, only_todo: bool) -> PlannedWindows | Failure:
    """The windows of a scene, or why they cannot be told.

    They are the same whenever it is asked, whatever was done meanwhile; ``only_todo`` leaves out those with a part.
    """

    def listed() -> PlannedWindows:
        reader = plan.reader()
        done = finished_parts(run, plan) if only_todo else WindowSet()

        def windows() -> Iterator[Window]:
            return (window for window in plan.windows(reader) if not done.has(window.row_off, window.col_off))

        return PlannedWindows(plan, sum(1 for _ in windows()), windows())

    return attempt(listed, plan.scene.id, "listing its windows")


def prepare_windows(ref: SceneRef, run: RunSpec, *, only_todo: bool) -> PlannedWindows | SceneReport | Failure:
    """``prepare_scene`` and ``list_windows`` together."""
    found = prepare_scene(ref, run)
    return list_windows(run, found, only_todo=only_todo) if isinstance(found, ScenePlan) else found


@dataclass(slots=True)
class _Open:
    """A scene at work: how many windows are still to be told (below 0 before the plan is), and which were."""

    plan: ScenePlan | None = None
    left: int = 0
    seen: WindowSet = field(default_factory=WindowSet)
    num_failed: int = 0
    sentence: str = ""


class Ledger:
    """Counts the windows of each scene down, says when a scene is complete, and keeps the progress.

    It does not matter in which order scenes and windows are told, nor whether they are told twice. ``before`` finds the last
    mask of a scene's ground by its id and footprint.
    """

    def __init__(self, progress: Progress, *, before: MaskFinder | None = None) -> None:
        self.reports: list[SceneReport] = []
        self.is_last_round = False
        self.progress, self._before = progress, before
        self._open: dict[str, _Open] = {}
        self._closed: set[str] = set()
        self._began: dict[str, float] = {}

    def rounds(self, turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
        """The scenes to do: all of them, then once more those that came to no end; what is still open then is lost.

        A scene comes to no end when some of it was lost on the way, or when a second try may do what the first did not.
        """
        yield turns
        refs = list(dict.fromkeys(turn.ref for turn in turns))
        self._closed = {report.id for report in self.reports}
        left = [ref for ref in refs if ref.id not in self._closed]
        if left:
            self._open.clear()
            self.progress.plan_anew()
            self.is_last_round = True
            yield [Turn(ref) for ref in left]
        self.abandon(refs)

    def planned(self, plan: ScenePlan, num_windows: int) -> ScenePlan | None:
        """A scene begins; returned when nothing of it is left to do but to publish it. Told again with each of its turns."""
        if plan.scene.id in self._closed:
            return None
        scene = self._open.setdefault(plan.scene.id, _Open())
        self._began.setdefault(plan.scene.id, time.monotonic())
        if scene.plan is None:
            scene.plan = plan
            scene.left += num_windows
            self.progress.scene_planned(plan, num_windows)
        elif scene.plan.fingerprint != plan.fingerprint:
            scene.num_failed += 1
            scene.sentence = scene.sentence or (
                f"{plan.scene.id}: the scene was replaced in its store while it was at work; run again to take the new one"
            )
        return self._close_if_complete(plan.scene.id)

    def window_done(
        self,
        scene_id: str,
        window: Window,
        failure: Failure | None = None,
        *,
        skipped: bool = False,
        area_km2: float = 0.0,
        bytes_fetched: int = 0,
    ) -> ScenePlan | None:
        """A window ended; its scene's plan when that was the last one and none failed.

        ``skipped``: its part stood already. ``area_km2`` and ``bytes_fetched`` go to the progress.
        """
        if scene_id in self._closed or self._may_go_better(failure):
            return None
        scene = self._open.setdefault(scene_id, _Open())
        if scene.seen.has(window.row_off, window.col_off):
            return None
        scene.seen.add(window.row_off, window.col_off)
        scene.left -= 1
        if failure is not None:
            scene.num_failed += 1
            scene.sentence = scene.sentence or failure.sentence
        pixels = window.width * window.height
        if skipped:
            self.progress.window_skipped(pixels)
        else:
            self.progress.window_done(
                pixels=pixels, area_km2=area_km2, bytes_fetched=bytes_fetched, failed=failure is not None
            )
        return self._close_if_complete(scene_id)

    def _may_go_better(self, failure: Failure | None) -> bool:
        return failure is not None and failure.again and not self.is_last_round

    def _close_if_complete(self, scene_id: str) -> ScenePlan | None:
        scene = self._open[scene_id]
        if scene.plan is None or scene.left:
            return None
        del self._open[scene_id]
        self._closed.add(scene_id)
        if not scene.num_failed:
            return self._with_before(scene.plan)
        more = f" (and {scene.num_failed - 1} more windows)" if scene.num_failed > 1 else ""
        self._failed(scene.plan, scene.sentence + more)
        return None

    def _with_before(self, plan: ScenePlan) -> ScenePlan:
        """The plan with the last mask of its ground, the scene's own before all others."""
        if plan.before is not None or self._before is None:
            return plan
        found = attempt(partial(self._before, plan.scene.id, _footprint(plan)), plan.scene.id, "finding its ground")
        return plan if isinstance(found, Failure) else replace(plan, before=found)

    def settled(self, report: SceneReport) -> None:
        """A scene needs no windows."""
        if report.id not in self._closed:
            self._open.pop(report.id, None)
            self._closed.add(report.id)
            self._report(report)

    def refused(self, ref: SceneRef, failure: Failure) -> None:
        """A scene cannot be planned, or its windows cannot be listed."""
        if not self._may_go_better(failure):
            sentence, denied = failure.sentence, failure.denied
            self.settled(SceneReport(id=ref.id, uri=ref.uri, status="refused", sentence=sentence, denied=denied))

    def published(self, plan: ScenePlan, published: Published | HeldBack | Failure) -> None:
        """A complete scene's item stands, or why it does not."""
        if isinstance(published, Failure):
            if not self._may_go_better(published):
                self._failed(plan, published.sentence)
            return
        if isinstance(published, HeldBack):
            self._report(
                SceneReport(
                    **_facts(plan),
                    status="held",
                    sentence=published.sentence,
                    classes=tuple(published.classes),
                    seam_score=published.seam_score,
                    blend_error=published.blend_error,
                    novelty=published.novelty,
                    fine_share=published.fine_share,
                    thumbnail=published.thumbnail,
                )
            )
            return
        self._report(
            SceneReport(
                **_facts(plan),
                status="published",
                sentence=published.remark,
                item=published.item_uri,
                mask=published.mask_uri,
                classes=tuple(published.classes),
                seam_score=published.seam_score,
                blend_error=published.blend_error,
                novelty=published.novelty,
                fine_share=published.fine_share,
                is_released=published.is_released,
                area_km2=sum(published.classes) * plan.scene.grid.resolution_m**2 / 1e6,
                item_etag=store.bare(published.version),
            )
        )

    def abandon(self, refs: Iterable[SceneRef]) -> None:
        """The work has ended: what is still open has lost windows, and what was never told of was lost whole."""
        told = {report.id for report in self.reports}
        for ref in refs:
            if ref.id not in told:
                scene = self._open.pop(ref.id, None)
                lost = f"{scene.left} of its windows were" if scene and scene.plan else "its plan was"
                sentence = (
                    f"{ref.id}: {lost} lost, as when they end the process that works on them; run again to try them"
                )
                if scene and scene.plan:
                    self._failed(scene.plan, sentence)
                else:
                    self._report(SceneReport(id=ref.id, uri=ref.uri, status="failed", sentence=sentence))

    def _failed(self, plan: ScenePlan, sentence: str) -> None:
        self._report(SceneReport(**_facts(plan), status="failed", sentence=sentence))

    def _report(self, report: SceneReport) -> None:
        began = self._began.pop(report.id, None)
        if began is not None:
            report = replace(report, seconds=round(time.monotonic() - began, 3))
        self.reports.append(report)
        self.progress.scene_settled(report.status)

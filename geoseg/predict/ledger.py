"""What is to be done, what is done, and what came of each scene; the same bookkeeping in every engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from geoseg.errors import GeosegError, StopError
from geoseg.predict.parts import finished_parts, part_uri
from geoseg.predict.plan import RunSpec, ScenePlan, plan_scene
from geoseg.predict.publish import Published, item_uri, standing_mask
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.scene import SceneRef
from geoseg.raster.window import Window

Status = Literal["planned", "published", "unchanged", "refused", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneReport:
    """What came of a scene; ``sentence`` says why when it was refused or failed, ``kind`` names the error of a refusal."""

    id: str
    uri: str
    status: Status
    sentence: str = ""
    kind: str = ""
    item: str = ""
    mask: str = ""
    classes: tuple[int, ...] = ()
    area_km2: float = 0.0


@dataclass(slots=True)
class Prepared:
    """A scene before its windows: already settled (``report``), or a plan and how many of its windows are to do."""

    ref: SceneRef
    report: SceneReport | None = None
    plan: ScenePlan | None = None
    num_todo: int = 0
    finished: set[str] = field(default_factory=set)

    def windows(self, run: RunSpec) -> Iterator[Window]:
        """The windows to do: planned, and without a part from an earlier run."""
        if self.plan is None:
            return
        for window in self.plan.windows(SceneReader(self.plan.scene)):
            if part_uri(run, self.plan, window) not in self.finished:
                yield window


def prepare_scene(ref: SceneRef, run: RunSpec) -> Prepared:
    """Plan a scene, or say why not; no pixel is read. Raises StopError kinds alone."""
    try:
        plan = plan_scene(ref, run)
        mask = standing_mask(run, ref.id, plan.fingerprint)
        if mask is not None:
            item = item_uri(run, ref.id)
            return Prepared(ref, SceneReport(id=ref.id, uri=ref.uri, status="unchanged", item=item, mask=mask))
        prepared = Prepared(ref, None, plan, 0, finished_parts(run, plan))
        prepared.num_todo = sum(1 for _ in prepared.windows(run))
        return prepared
    except StopError:
        raise
    except GeosegError as error:
        kind = type(error).__name__
        return Prepared(ref, SceneReport(id=ref.id, uri=ref.uri, status="refused", sentence=str(error), kind=kind))


@dataclass(slots=True)
class _Open:
    plan: ScenePlan | None
    left: int
    seen: set[tuple[int, int]] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)


class Ledger:
    """Counts the windows of each scene down and says when a scene is complete.

    It does not matter in which order scenes and windows are told, nor whether a window is told twice.
    """

    def __init__(self) -> None:
        self.reports: list[SceneReport] = []
        self._open: dict[str, _Open] = {}
        self._closed: set[str] = set()

    def planned(self, plan: ScenePlan, num_todo: int) -> ScenePlan | None:
        """A scene begins; returned when nothing of it is left to do but to publish it."""
        if self.is_closed(plan.scene.id):
            return None
        scene = self._open.setdefault(plan.scene.id, _Open(None, 0))
        if scene.plan is None:
            scene.plan = plan
            scene.left += num_todo
        return self._close_if_complete(plan.scene.id)

    def window_done(self, scene_id: str, row_off: int, col_off: int, error: str) -> ScenePlan | None:
        """A window ended; its scene's plan when that was the last one and none failed."""
        if self.is_known(scene_id, row_off, col_off):
            return None
        scene = self._open.setdefault(scene_id, _Open(None, 0))
        scene.seen.add((row_off, col_off))
        scene.left -= 1
        if error:
            scene.errors.append(error)
        return self._close_if_complete(scene_id)

    def is_closed(self, scene_id: str) -> bool:
        """Whether all of a scene's windows have ended."""
        return scene_id in self._closed

    def is_known(self, scene_id: str, row_off: int, col_off: int) -> bool:
        """Whether this window was told already."""
        return self.is_closed(scene_id) or (scene_id in self._open and (row_off, col_off) in self._open[scene_id].seen)

    def _close_if_complete(self, scene_id: str) -> ScenePlan | None:
        scene = self._open[scene_id]
        if scene.plan is None or scene.left:
            return None
        del self._open[scene_id]
        self._closed.add(scene_id)
        if not scene.errors:
            return scene.plan
        more = f" (and {len(scene.errors) - 1} more windows)" if len(scene.errors) > 1 else ""
        self.failed(scene.plan, scene.errors[0] + more)
        return None

    def failed(self, plan: ScenePlan, sentence: str) -> None:
        """A scene cannot be published."""
        self.reports.append(SceneReport(id=plan.scene.id, uri=plan.scene.uri, status="failed", sentence=sentence))

    def published(self, plan: ScenePlan, published: Published) -> None:
        """A scene's item stands."""
        area_km2 = sum(published.classes) * plan.scene.grid.resolution_m**2 / 1e6
        self.reports.append(
            SceneReport(
                id=plan.scene.id,
                uri=plan.scene.uri,
                status="published",
                item=published.item_uri,
                mask=published.mask_uri,
                classes=tuple(published.classes),
                area_km2=area_km2,
            )
        )

    def abandon(self, refs: Iterable[SceneRef]) -> None:
        """The work has ended: what is still open has lost windows, and what was never told of was lost whole."""
        for scene in self._open.values():
            if scene.plan is None:
                continue
            sentence = f"{scene.plan.scene.id}: {scene.left} windows were lost; run again to do them"
            self.failed(scene.plan, sentence)
        self._open.clear()
        told = {report.uri for report in self.reports}
        for ref in refs:
            if ref.uri not in told:
                sentence = f"{ref.id}: was lost before its windows were planned; run again to do it"
                self.reports.append(SceneReport(id=ref.id, uri=ref.uri, status="failed", sentence=sentence))

"""The driver's part: follow the outcomes, count, publish what is complete, show progress. It sees no pixel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import Dataset

from geoseg.cluster.operators import Publisher
from geoseg.cluster.rows import report_of
from geoseg.errors import GeosegError, StopError, stop_error
from geoseg.predict.ledger import Ledger
from geoseg.predict.plan import RunSpec, ScenePlan, plan_from_json
from geoseg.predict.progress import Progress
from geoseg.raster.scene import SceneRef

_WAITING_TO_PUBLISH = 64
_AT_ONCE = 4  # scenes that one publisher puts together side by side


class Driver:
    """Follows a chain's outcomes and keeps the ledger."""

    def __init__(self, run: RunSpec, progress: Progress, check: Callable[[], None], *, publishers: int) -> None:
        self._progress, self._check = progress, check
        actor = ray.remote(Publisher).options(
            num_cpus=0, max_restarts=4, max_task_retries=2, max_concurrency=_AT_ONCE, scheduling_strategy="SPREAD"
        )
        self._publishers: Iterator[Any] = itertools.cycle([actor.remote(run) for _ in range(publishers)])
        self._ledger = Ledger()
        self._publishing: dict[Any, ScenePlan] = {}

    def follow(self, outcomes: Dataset, refs: list[SceneRef]) -> Ledger:
        """The ledger once every scene is settled. Raises StopError when the job cannot go on."""
        try:
            for row in outcomes.iter_rows():
                self._progress.ready(row["ready_at"])
                self._take(row)
                self._collect(wait_for=_WAITING_TO_PUBLISH)
                self._progress.show()
                self._check()
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise _as_ours(error) from error
        self._collect(wait_for=0)
        self._ledger.abandon(refs)
        return self._ledger

    def _take(self, row: dict[str, Any]) -> None:
        if row["stop"]:
            raise stop_error(row["stop"], row["error"])
        if row["kind"] == "window":
            if self._ledger.is_known(row["scene_id"], row["row_off"], row["col_off"]):
                return  # a task that was retried tells its windows again
            self._progress.window_done(
                pixels=row["width"] * row["height"],
                area_km2=row["area_km2"],
                bytes_fetched=row["bytes_fetched"],
                failed=bool(row["error"]),
            )
            complete = self._ledger.window_done(row["scene_id"], row["row_off"], row["col_off"], row["error"])
        else:
            complete = self._take_scene(row)
        if complete is not None:
            self._publishing[next(self._publishers).publish.remote(complete.to_json())] = complete

    def _take_scene(self, row: dict[str, Any]) -> ScenePlan | None:
        report = report_of(row)
        if report is not None:
            self._ledger.reports.append(report)
            self._progress.scene_settled(report.status)
            return None
        plan = plan_from_json(row["plan"])
        self._progress.scene_planned(plan, row["num_todo"])
        return self._ledger.planned(plan, row["num_todo"])

    def _collect(self, *, wait_for: int) -> None:
        """Note what was published; wait until at most ``wait_for`` scenes are still on their way."""
        while self._publishing:
            over = len(self._publishing) > wait_for
            done, _ = ray.wait(list(self._publishing), timeout=None if over else 0)
            for reference in done:
                plan = self._publishing.pop(reference)
                self._note(plan, reference)
            if not done or (not over and len(self._publishing) <= wait_for):
                return

    def _note(self, plan: ScenePlan, reference: Any) -> None:
        try:
            published, sentence, stops = ray.get(reference)
        except ray.exceptions.RayError as error:
            published, sentence, stops = None, f"{plan.scene.id}: publishing failed: {_first_line(error)}", ""
        if stops:
            raise stop_error(stops, sentence)
        if published is None:
            self._ledger.failed(plan, sentence)
        else:
            self._ledger.published(plan, published)
        self._progress.scene_settled(self._ledger.reports[-1].status)


def _as_ours(error: BaseException) -> GeosegError:
    """The error of ours that travelled inside one of Ray's, or Ray's own in a sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GeosegError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return StopError(f"the Ray job failed: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

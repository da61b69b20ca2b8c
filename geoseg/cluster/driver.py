"""The driver's part: follow the outcomes, count, publish what is complete, show progress. It sees no pixel."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import Dataset
from ray.data.exceptions import ExecutionTimeoutError

from geoseg.cluster.metrics import SceneMeter
from geoseg.cluster.operators import Publisher
from geoseg.cluster.resting import let_workers_rest
from geoseg.cluster.rows import Outcome, unpack
from geoseg.errors import GeosegError, StopError
from geoseg.predict.drain import DRAIN_S, Drain
from geoseg.predict.failure import Failure
from geoseg.predict.ledger import Ledger, SceneReport
from geoseg.predict.plan import RunSpec, ScenePlan, plan_from_json

_WAITING_TO_PUBLISH = 64
_PATIENCE_S = DRAIN_S / 2  # with workers that are to rest; what is left of the time is for publishing
_AT_ONCE = 4  # scenes that one publisher puts together side by side


class Driver:
    """Follows a chain's outcomes, round after round, and keeps the ledger."""

    def __init__(
        self,
        run: RunSpec,
        ledger: Ledger,
        check: Callable[[], None],
        *,
        drain: Drain,
        publishers: int,
        meter: SceneMeter,
        run_id: str,
    ) -> None:
        self.ledger, self._progress = ledger, ledger.progress
        self._check, self._drain, self._run_id = check, drain, run_id
        self._meter = meter
        self._workers: set[float] = set()  # each by the time at which it was ready
        self._resting: set[float] = set()
        self._patient_until = 0.0
        actor = ray.remote(Publisher).options(
            num_cpus=0, max_restarts=-1, max_task_retries=1, max_concurrency=_AT_ONCE, scheduling_strategy="SPREAD"
        )
        self._publishers: Iterator[Any] = itertools.cycle([actor.remote(run) for _ in range(publishers)])
        self._publishing: dict[Any, ScenePlan] = {}

    def follow(self, outcomes: Dataset) -> None:
        """Follow a round to its end, or after a signal until no window is at work. Raises StopError when the job cannot go on.

        In the last round scenes are published one by one, so that one that ends its publisher ends no other's work.
        """
        may_wait = 0 if self.ledger.is_last_round else _WAITING_TO_PUBLISH
        try:
            for row in outcomes.iter_rows():
                outcome: Outcome = unpack(row["packed"])
                self._progress.ready(outcome.ready_at)
                self._workers.add(outcome.ready_at)
                for complete in self._take(outcome):
                    self._check()  # after the plan saw which item is to be replaced
                    self._publishing[next(self._publishers).publish.remote(complete.to_json())] = complete
                    self._collect(wait_for=may_wait)
                self._collect(wait_for=may_wait)
                self._meter.settled(self.ledger.reports)
                self._progress.show()
                self._check()
                if self._drain.asked and self._all_rest(outcome):
                    break
        except (ray.exceptions.RayError, RuntimeError, ExecutionTimeoutError) as error:
            raise _as_ours(error) from error
        self._collect(wait_for=0)
        self._meter.settled(self.ledger.reports)

    def _all_rest(self, outcome: Outcome) -> bool:
        """Whether each worker has told of a window that it did not begin, or had time to. When first asked, tell them to."""
        if not self._patient_until:
            let_workers_rest(self._run_id)
            self._patient_until = time.monotonic() + _PATIENCE_S
        if any(one.left for one in outcome.windows):
            self._resting.add(outcome.ready_at)
        return self._workers <= self._resting or time.monotonic() > self._patient_until

    def _take(self, outcome: Outcome) -> Iterator[ScenePlan]:
        """Note an outcome; the plans of the scenes that are complete with it."""
        ledger = self.ledger
        for one in outcome.opened:
            complete = None
            if isinstance(one.found, Failure):
                one.found.raise_if_stop()
                ledger.refused(one.turn.ref, one.found)
            elif isinstance(one.found, SceneReport):
                ledger.settled(one.found)
            else:
                complete = ledger.planned(plan_from_json(one.found), one.num_windows)
            if complete is not None:
                yield complete
        for done in outcome.windows:
            if done.left:
                continue
            if done.failure is not None:
                done.failure.raise_if_stop()
            complete = ledger.window_done(
                done.scene_id,
                done.window,
                done.failure,
                skipped=done.skipped,
                area_km2=done.area_km2,
                bytes_fetched=done.bytes_fetched,
            )
            if complete is not None:
                yield complete

    def _collect(self, *, wait_for: int) -> None:
        """Note what was published; wait until at most ``wait_for`` scenes are still on their way."""
        while self._publishing:
            over = len(self._publishing) > wait_for
            done, _ = ray.wait(list(self._publishing), timeout=None if over else 0)
            for reference in done:
                self._note(self._publishing.pop(reference), reference)
            if not done or (not over and len(self._publishing) <= wait_for):
                return

    def _note(self, plan: ScenePlan, reference: Any) -> None:
        try:
            published = ray.get(reference)
        except ray.exceptions.RayError as error:
            sentence = (
                f"{plan.scene.id}: publishing ended the process it ran in: {last_line(error)}; run again to try it"
            )
            published = Failure(sentence=sentence, again=True)
        if isinstance(published, Failure):
            published.raise_if_stop()
        self.ledger.published(plan, published)


def _as_ours(error: BaseException) -> GeosegError:
    """The error of ours that travelled inside one of Ray's, or Ray's own in a sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GeosegError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return StopError(f"the Ray job failed: {last_line(error)}")


def last_line(error: BaseException) -> str:
    """What an error of Ray's says in the end: the cause, below the stack of the process it came from."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

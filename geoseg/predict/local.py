"""The plain loop: the same steps as the cluster's, in one process; the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from geoseg.errors import GeosegError, StopError, stop_error
from geoseg.predict.ledger import Ledger, prepare_scene
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.progress import Progress
from geoseg.predict.publish import publish_scene
from geoseg.predict.worker import Task, WindowDone, Worker
from geoseg.raster.scene import SceneRef


def predict_locally(
    refs: Iterable[SceneRef], run: RunSpec, progress: Progress, *, read_threads: int, check: Callable[[], None]
) -> Ledger:
    """Predict and publish scenes one after the other; ``check`` is called now and then and may end the run.

    Raises StopError kinds alone.
    """
    ledger = Ledger()
    worker = Worker(run, read_threads=read_threads)
    progress.ready()

    def tasks() -> Iterator[Task]:
        for ref in refs:
            prepared = prepare_scene(ref, run)
            if prepared.report is not None:
                ledger.reports.append(prepared.report)
                progress.scene_settled(prepared.report.status)
                continue
            plan = prepared.plan
            assert plan is not None
            progress.scene_planned(plan, prepared.num_todo)
            if ledger.planned(plan, prepared.num_todo):
                _publish(plan)
            for window in prepared.windows(run):
                yield Task(plan, window)

    def _publish(plan: ScenePlan) -> None:
        publish(plan, run, ledger, progress)

    try:
        for done in worker.run(tasks()):
            settle(done, progress)
            window = done.task.window
            complete = ledger.window_done(done.task.plan.scene.id, window.row_off, window.col_off, done.error)
            if complete is not None:
                _publish(complete)
            progress.show()
            check()
        ledger.abandon([])
    finally:
        worker.close()
    return ledger


def settle(done: WindowDone, progress: Progress) -> None:
    """Count a window; raise what ends the job."""
    if done.stop:
        raise stop_error(done.stop, done.error)
    progress.window_done(
        pixels=done.task.window.width * done.task.window.height,
        area_km2=done.area_km2,
        bytes_fetched=done.bytes_fetched,
        failed=bool(done.error),
    )


def publish(plan: ScenePlan, run: RunSpec, ledger: Ledger, progress: Progress) -> None:
    """Publish a complete scene and note it, or note why not."""
    try:
        ledger.published(plan, publish_scene(run, plan))
    except StopError:
        raise
    except GeosegError as error:
        ledger.failed(plan, str(error))
    progress.scene_settled(ledger.reports[-1].status)

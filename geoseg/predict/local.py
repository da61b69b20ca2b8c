"""The plain loop: the same steps as the cluster's, in one process; the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from geoseg.predict.failure import Failure
from geoseg.predict.ledger import Ledger, MaskFinder, SceneReport, prepare_windows
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.progress import Progress
from geoseg.predict.publish import try_to_publish
from geoseg.predict.reading import Task
from geoseg.predict.worker import Worker
from geoseg.raster.scene import SceneRef


def predict_locally(
    refs: Sequence[SceneRef],
    run: RunSpec,
    progress: Progress,
    *,
    read_threads: int,
    check: Callable[[], None],
    before: MaskFinder | None,
) -> Ledger:
    """Predict and publish scenes one after the other; ``check`` is called now and then and may end the run.

    Raises StopError kinds alone.
    """
    ledger = Ledger(progress, before=before)
    for left in ledger.rounds(refs):
        worker = Worker(run, read_threads=read_threads)
        progress.ready()
        progress.held_by_workers(gpus=worker.num_gpus, cpus=torch.get_num_threads())
        try:
            for done in worker.run(_tasks(left, run, ledger)):
                if done.failure is not None:
                    done.failure.raise_if_stop()
                complete = ledger.window_done(
                    done.task.plan.scene.id,
                    done.task.window,
                    done.failure,
                    skipped=done.skipped,
                    area_km2=done.area_km2,
                    bytes_fetched=done.bytes_fetched,
                )
                _publish(complete, run, ledger)
                progress.show()
                check()
        finally:
            worker.close()
    return ledger


def _tasks(refs: Sequence[SceneRef], run: RunSpec, ledger: Ledger) -> Iterator[Task]:
    for ref in refs:
        found = prepare_windows(ref, run, only_todo=False)
        if isinstance(found, Failure):
            found.raise_if_stop()
            ledger.refused(ref, found)
        elif isinstance(found, SceneReport):
            ledger.settled(found)
        else:
            _publish(ledger.planned(found.plan, found.num), run, ledger)
            for window in found.each:
                yield Task(found.plan, window)


def _publish(complete: ScenePlan | None, run: RunSpec, ledger: Ledger) -> None:
    if complete is not None:
        published = try_to_publish(run, complete)
        if isinstance(published, Failure):
            published.raise_if_stop()
        ledger.published(complete, published)

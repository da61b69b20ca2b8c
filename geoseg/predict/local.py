"""The plain loop: the same steps as the cluster's, in one process; the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch

from geoseg.predict.drain import Drain
from geoseg.predict.failure import Failure
from geoseg.predict.ledger import Ledger, SceneReport, prepare_windows
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.publish import try_to_publish
from geoseg.predict.reading import Task
from geoseg.predict.turns import Turn
from geoseg.predict.worker import Worker


def predict_locally(
    turns: Sequence[Turn],
    run: RunSpec,
    ledger: Ledger,
    *,
    read_threads: int,
    check: Callable[[], None],
    drain: Drain,
) -> None:
    """Predict and publish scenes turn after turn; ``check`` is called now and then, before each publication too, and may end it.

    No window is begun after ``drain`` asks. What came of the scenes is in the ledger. Raises StopError kinds alone.
    """
    progress = ledger.progress
    for left in ledger.rounds(turns):
        worker = Worker(run, read_threads=read_threads)
        progress.ready()
        progress.held_by_workers(gpus=worker.num_gpus, cpus=torch.get_num_threads())
        try:
            for done in worker.run(_tasks(left, run, ledger, check, drain)):
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
                _publish(complete, run, ledger, check)
                progress.show()
                check()
        finally:
            worker.close()
        if drain.asked:
            return


def _tasks(
    turns: Sequence[Turn], run: RunSpec, ledger: Ledger, check: Callable[[], None], drain: Drain
) -> Iterator[Task]:
    for turn in turns:
        if drain.asked:
            return
        found = prepare_windows(turn.ref, run, only_todo=False)
        if isinstance(found, Failure):
            found.raise_if_stop()
            ledger.refused(turn.ref, found)
        elif isinstance(found, SceneReport):
            ledger.settled(found)
        else:
            _publish(ledger.planned(found.plan, found.num), run, ledger, check)
            for window in takewhile(lambda _: not drain.asked, turn.share(found.each, found.num)):
                yield Task(found.plan, window)


def _publish(complete: ScenePlan | None, run: RunSpec, ledger: Ledger, check: Callable[[], None]) -> None:
    if complete is not None:
        check()  # after the plan saw which item is to be replaced
        published = try_to_publish(run, complete)
        if isinstance(published, Failure):
            published.raise_if_stop()
        ledger.published(complete, published)

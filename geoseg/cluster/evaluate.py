"""Evaluate on Ray: windows of labelled scenes are dealt to device actors, and what they counted comes back in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch

from geoseg.cluster.resources import plan_workers
from geoseg.cluster.session import session
from geoseg.config import ClusterConfig, PredictConfig
from geoseg.evaluate.job import JudgedPart, judge_part, list_parts
from geoseg.evaluate.judge import EvaluationScene, Judge
from geoseg.model.bundle import Bundle
from geoseg.predict.failure import Failure
from geoseg.predict.memory import set_memory_up
from geoseg.predict.predictor import Predictor, default_device
from geoseg.raster.window import Window

_IN_FLIGHT = 2  # parts for each worker


class JudgeActor:
    """A worker with the network on its device."""

    def __init__(self, bundle: Bundle, config: PredictConfig, threads: int) -> None:
        set_memory_up()
        torch.set_num_threads(threads)
        self._judge = Judge(Predictor(bundle, config, device=default_device()))
        self._value_range = config.scale or bundle.description.value_range

    def judge(self, scene: EvaluationScene, windows: list[Window]) -> JudgedPart | Failure:
        """Windows judged, or why they are not."""
        return judge_part(self._judge, scene, windows, self._value_range)


def judge_on_cluster(
    bundle: Bundle, config: PredictConfig, scenes: Sequence[EvaluationScene], *, cluster: ClusterConfig
) -> Iterator[tuple[int, JudgedPart | Failure]]:
    """Parts of scene after scene, with the scene's place, as ``judge_locally`` has them.

    A worker that ends is started again; the part it worked on is tried once more, then its scene is given up.
    """
    with session(cluster.address, workers=cluster.workers or 1):
        workers = plan_workers(cluster)
        actor = ray.remote(JudgeActor).options(
            num_cpus=workers.cpus, num_gpus=workers.gpus, max_restarts=-1, max_task_retries=1
        )
        weights = ray.put(bundle)
        actors: list[Any] = [actor.remote(weights, config, workers.threads) for _ in range(workers.num)]
        waiting: deque[tuple[int, Any]] = deque()
        given_up: set[int] = set()
        free = itertools.cycle(actors)
        for place, scene in enumerate(scenes):
            shared = ray.put(scene)
            for windows in list_parts(scene, workers.rows_per_block):
                if place in given_up:
                    break
                waiting.append(
                    (place, windows if isinstance(windows, Failure) else next(free).judge.remote(shared, windows))
                )
                while len(waiting) > _IN_FLIGHT * len(actors):
                    yield _next(waiting, scenes, given_up)
        while waiting:
            yield _next(waiting, scenes, given_up)


def _next(
    waiting: deque[tuple[int, Any]], scenes: Sequence[EvaluationScene], given_up: set[int]
) -> tuple[int, JudgedPart | Failure]:
    place, reference = waiting.popleft()
    try:
        part = reference if isinstance(reference, Failure) else ray.get(reference)
    except ray.exceptions.RayError as error:
        sentence = (
            f"{scenes[place].plan.scene.id}: evaluating it ended the process it ran in: {str(error).splitlines()[0]}"
        )
        part = Failure(sentence=sentence)
    if isinstance(part, Failure):
        given_up.add(place)
    return place, part

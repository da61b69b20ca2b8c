"""What a run asks of a cluster, whatever is there when it begins."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import ray

from geoseg.cluster.resources import plan_workers
from geoseg.cluster.train import find_room, train_on_cluster
from geoseg.config import ClusterConfig, check
from geoseg.errors import ConfigError, StopError
from geoseg.train.job import TrainClusterConfig

HEAD_ALONE = {"node:10.0.0.1": 1.0, "memory": 4e9}


@pytest.fixture
def cluster_has(monkeypatch: pytest.MonkeyPatch) -> Any:
    def has(resources: dict[str, float], nodes: int = 1) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * nodes)

    return has


def test_a_cluster_that_has_no_worker_yet_is_asked_for_gpus(cluster_has: Any) -> None:
    """Its autoscaler adds a node for each worker that waits for a GPU; without them it would add CPUs."""
    cluster_has(HEAD_ALONE)
    workers = plan_workers(ClusterConfig(workers=16, gpus=1))
    assert (workers.num, workers.gpus, workers.cpus) == (16, 1.0, 0.0)
    assert workers.read_tasks >= 16, "scenes of 16 workers are listed side by side, once there are nodes for that"


def test_gpus_that_are_there_are_shared_unless_told_otherwise(cluster_has: Any) -> None:
    cluster_has({"CPU": 8.0, "GPU": 2.0}, nodes=2)
    assert plan_workers(ClusterConfig(workers=4)).gpus == 0.5
    assert plan_workers(ClusterConfig(workers=4, gpus=1)).gpus == 1.0
    assert plan_workers(ClusterConfig()).num == 2


def test_gpus_without_a_number_of_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="say how many workers"):
        check(ClusterConfig, {"gpus": 1}, where="job.toml")


@pytest.mark.parametrize("cpus_left", [1, 2, 3, 4, 8, 16, 30])
@pytest.mark.parametrize("workers", [None, 4, 10, 60])
def test_workers_that_start_again_on_the_nodes_that_are_left_fill_none(
    cpus_left: int, workers: int | None, cluster_has: Any
) -> None:
    """Else scenes would wait for ever to be planned."""
    cluster_has({"CPU": 2.0 * cpus_left}, nodes=2)
    each = plan_workers(ClusterConfig(workers=workers)).cpus
    fit = int(cpus_left / each + 1e-9)
    assert cpus_left - fit * each >= 0.02, "what listing takes"


@pytest.mark.parametrize(
    ("workers", "gpus", "sentence"),
    [
        (2, 2, ""),
        ((2, 8), 2, ""),
        (4, 2, "4 workers want a GPU each, and Ray has 2"),
        ((3, 8), 2, "3 workers want a GPU each, and Ray has 2"),
        (3, 0, ""),
    ],
)
def test_a_training_without_room_waits_with_a_word_or_is_refused(workers: Any, gpus: int, sentence: str) -> None:
    """A cluster adds nodes for GPUs that are waited for; the Ray of one machine does not."""
    cluster = TrainClusterConfig(workers=workers)

    def room(*, can_grow: bool) -> str:
        return find_room(cluster, cpus=4, gpus=gpus, read_themselves=False, can_grow=can_grow)

    assert room(can_grow=True).startswith(sentence)
    assert bool(room(can_grow=True)) == bool(sentence)
    with pytest.raises(ConfigError, match=f"{sentence} on this machine") if sentence else nullcontext():
        assert not room(can_grow=False)


def test_what_a_training_waits_for_is_told_before_it_begins(cluster_has: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_has({"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr(ray, "remote", lambda _: pytest.fail("it must be told first"))

    def tell(kind: str, what: Any) -> None:
        raise StopError(f"{kind}: {what}")

    with pytest.raises(StopError, match="warned: 4 workers want a GPU each"):
        train_on_cluster(None, TrainClusterConfig(workers=4), tell)  # type: ignore[arg-type]

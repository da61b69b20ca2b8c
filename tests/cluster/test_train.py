"""Training on Ray: as one process does it, and on through the loss of a worker or of the driver."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from kit.chaos import named
from kit.object_store import deny
from kit.own_ray import no_ray, own_ray, share_ray
from kit.training import scenes, values
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from geoseg.cluster.chips import Passes
from geoseg.cluster.session import session
from geoseg.cluster.train import train_on_cluster
from geoseg.config import check
from geoseg.errors import AccessDeniedError, StopError
from geoseg.run_training import run_training
from geoseg.train.job import TrainJob
from geoseg.train.log import MetricsLog
from geoseg.training import keep_tables_in_threads, prepare

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAIN = """
import json, sys
from geoseg.config import check
from geoseg.run_training import run_training
from geoseg.train.job import TrainJob
run_training(check(TrainJob, json.loads(sys.argv[1]), where="the test"), warn=print, quiet=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def ray_values(folder: Path, out: Path, *, workers: int) -> dict[str, Any]:
    told = values(folder, out, cluster={"engine": "ray", "workers": workers}, checkpoint_every=2)
    told["stage"][1]["steps"] = 8
    return told


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in MetricsLog.load(str(out), up_to=(9, 99)).records if record["kind"] == "train"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "bundle" / "model.safetensors")


@pytest.fixture(scope="module")
def by_two(folder: Path) -> Path:
    """A training by two Ray workers that nothing disturbs."""
    share_ray()
    out = folder / "by-two"
    run_training(check(TrainJob, ray_values(folder, out, workers=2), where="the test"), warn=lambda _: None, quiet=True)
    return out


def test_two_ray_workers_take_the_steps_of_one_process(folder: Path, by_two: Path) -> None:
    alone = folder / "alone"
    told = ray_values(folder, alone, workers=1) | {"cluster": {"engine": "local"}}
    run_training(check(TrainJob, told, where="the test"), warn=lambda _: None, quiet=True)
    assert len(losses(by_two)) == 13
    assert np.allclose(losses(by_two)[:5], losses(alone)[:5], rtol=1e-5)
    assert np.allclose(losses(by_two), losses(alone), rtol=5e-3), "rounding grows from step to step"


def count_nodes() -> None:
    """Have Ray count its nodes now, as it does every 20 seconds."""
    actor = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    ray.get(actor.get_reserved_resources.remote("nobody", recompute=True))


@pytest.mark.chaos
def test_an_elastic_group_grows_and_shrinks_and_takes_the_steps_of_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of one CPU comes when one worker has begun, and goes when two have."""
    monkeypatch.setattr("geoseg.cluster.train._RESIZE_S", 0.0)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "4")
    told = values(folder, tmp_path / "alone", checkpoint_every=2, optimizer={"precision": "float32"})
    told["model"]["variant"]["width"] = 8
    told["stage"] = [{"chip": 96, "steps": 60, "batch": 8, "chips_per_pass": 4, "learning_rate": 3e-5}]
    run_training(check(TrainJob, told, where="the test"), warn=lambda _: None, quiet=True)
    told |= {"out": str(tmp_path / "elastic"), "cluster": {"workers": [1, 2]}}
    job = check(TrainJob, told, where="the test")
    taken: queue.SimpleQueue[int] = queue.SimpleQueue()

    def tell(kind: str, what: Any) -> None:
        if kind == "stepped":
            taken.put(what["workers"])

    def wait_for_steps_of(workers: int) -> None:
        """Wait for four, so that there is a checkpoint after one of them."""
        for _ in range(4):
            while taken.get(timeout=300) != workers:
                pass

    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        with no_ray(), session(cluster.address, workers=2), ThreadPoolExecutor(1) as thread:
            prepared = prepare(job, keep_tables=keep_tables_in_threads)
            trained = thread.submit(train_on_cluster, prepared, job.cluster, tell)
            wait_for_steps_of(1)
            node = cluster.add_node(num_cpus=1)
            count_nodes()
            wait_for_steps_of(2)
            cluster.remove_node(node)
            count_nodes()
            trained.result()
    finally:
        cluster.shutdown()
    log = MetricsLog.load(str(tmp_path / "elastic"), up_to=(9, 99)).records
    assert [num for num, _ in groupby(one["workers"] for one in log if one["kind"] == "train")] == [1, 2, 1]
    assert np.allclose(losses(tmp_path / "elastic"), losses(tmp_path / "alone"), rtol=3e-5)
    ours, theirs = (load_file(tmp_path / out / "stage-1/last/model.safetensors") for out in ("elastic", "alone"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)


def test_the_rows_of_a_stage_travel_without_its_scenes(folder: Path, tmp_path: Path) -> None:
    plan = prepare(check(TrainJob, values(folder, tmp_path), where="the test"), keep_tables=keep_tables_in_threads).plan
    (task,) = Passes(plan.stages[1], 1, step=0, rank=0, world=1).get_read_tasks(1)
    told = ray.cloudpickle.dumps(task)
    assert b"bands" in ray.cloudpickle.dumps(plan.scenes)
    assert b"bands" not in told
    assert sum(len(table) for table in ray.cloudpickle.loads(told)()) == 4 * 8


def started(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    """A training by two Ray workers in a process of its own, with a session of its own so that all of it can be ended."""
    told = json.dumps(ray_values(folder, out, workers=2))
    return subprocess.Popen([sys.executable, "-c", TRAIN, told], start_new_session=True, stderr=subprocess.PIPE)


def wait_for(checkpoint: str, out: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until this checkpoint or a later one is there."""
    for _ in range(3000):
        if any(path.stem >= checkpoint for path in (out / "checkpoints").glob("*.safetensors")):
            return
        if process.poll() is not None:
            raise AssertionError(process.stderr.read().decode())
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint {checkpoint}")


KILLS = (
    ("000-000000002", "worker"),
    ("001-000000004", "driver"),
)


@pytest.mark.chaos
def test_killed_in_each_stage_the_weights_are_those_of_an_undisturbed_run(
    folder: Path, tmp_path: Path, by_two: Path
) -> None:
    """Kill a worker, and the driver with all that it started, each time a checkpoint more is there.

    A process without Ray is killed at more places in test_loop.py.
    """
    out = tmp_path / "out"
    process = started(folder, out)
    try:
        for checkpoint, victim in KILLS:
            wait_for(checkpoint, out, process)
            if victim == "worker":
                workers = named(process.pid, "RayTrainWorker")
                assert len(workers) == 2
                os.kill(workers[-1], signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process = started(folder, out)
        assert process.wait(timeout=400) == 0, process.stderr.read().decode()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert losses(out) == losses(by_two)
    ours, theirs = weights(out), weights(by_two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.thorough
@pytest.mark.usefixtures("shared_ray")
def test_what_is_wrong_ends_all_workers_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    told = ray_values(folder, tmp_path, workers=2)
    told["stage"] = [
        {"chip": 32, "steps": 4, "batch": 4, "chips_per_pass": 2, "learning_rate": 1e30, "schedule": "constant"}
    ]
    with pytest.raises(StopError, match=r"stage 1, step \d: the loss is .* learning_rate"):
        run_training(check(TrainJob, told, where="the test"), warn=lambda _: None, quiet=True)


@pytest.mark.bucket
@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_what_one_worker_alone_meets_ends_the_others_too(folder: Path, bucket: str) -> None:
    """The first worker may not write its checkpoints; the second waits for its gradients."""
    deny(bucket, "s3:PutObject", "out/checkpoints/*")
    told = ray_values(folder, folder, workers=2) | {"out": f"s3://{bucket}/out"}
    with own_ray(), pytest.raises(AccessDeniedError, match=r"checkpoints/.* access denied"):
        run_training(check(TrainJob, told, where="the test"), warn=lambda _: None, quiet=True)

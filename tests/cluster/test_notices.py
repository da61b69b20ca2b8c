"""A spot notice drains its node: told by the metadata service, heeded by Ray, and no window is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import ray
from kit.metadata import MetadataService, metadata_service
from kit.object_store import free_ports
from kit.oracle import digests
from kit.own_ray import no_ray
from kit.scenes import noise, tiny_bundle, write_scene
from ray.cluster_utils import Cluster

import geoseg
from geoseg.cluster import notices
from geoseg.cluster.notices import Metadata, Notice, drain_node, watch_notices
from geoseg.errors import StopError

NUM_SCENES = 40  # enough that the run is at work when the notice is heard


def notice_in(seconds: float) -> str:
    at = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})


@pytest.fixture
def service() -> Iterator[MetadataService]:
    with metadata_service() as service:
        yield service


def test_a_notice_is_read_with_a_token(service: MetadataService) -> None:
    metadata = Metadata(service.url)
    assert metadata.notice() is None
    assert metadata.notice() is None
    assert service.asked == [("PUT", "token", 200), ("GET", "instance-action", 404), ("GET", "instance-action", 404)]
    service.forget_tokens()
    assert [metadata.notice(), metadata.notice()] == [None, None], "a token that ran out is asked for anew"
    assert service.asked[3:] == [
        ("GET", "instance-action", 401), ("PUT", "token", 200), ("GET", "instance-action", 404)
    ]  # fmt: skip
    service.notice = notice_in(100)
    notice = metadata.notice()
    assert notice is not None
    assert notice.action == "terminate"
    assert 90 < notice.seconds_left <= 100


@pytest.mark.parametrize("told", ["", "soon", "[]", '{"action": "stop", "time": "tomorrow"}'])
def test_a_notice_that_cannot_be_read_is_a_notice(told: str, service: MetadataService) -> None:
    service.notice = told
    assert Metadata(service.url).notice() == Notice("terminate", 120)


def test_a_notice_of_the_past_leaves_no_time(service: MetadataService) -> None:
    service.notice = notice_in(-100)
    assert Metadata(service.url).notice() == Notice("terminate", 0)


def test_a_service_that_is_away_gives_no_notice() -> None:
    (port,) = free_ports(1)
    assert Metadata(f"http://127.0.0.1:{port}").notice() is None


def test_the_watch_ends_with_one_drain(service: MetadataService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for this service
    drained: list[Notice] = []
    timer = threading.Timer(0.3, lambda: setattr(service, "notice", notice_in(120)))
    timer.start()
    notice = watch_notices(Metadata(service.url), drained.append, poll_s=0.05)
    assert drained == [notice]
    assert service.asked.count(("PUT", "token", 200)) == 1
    assert len(service.asked) > 4


def test_a_cluster_that_does_not_drain_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_TRIES", 2)
    monkeypatch.setattr(notices, "_PAUSE_S", 0.0)
    answer = subprocess.CompletedProcess([], 1, "", "trace\nError: no such node\n")
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command) or answer)
    with pytest.raises(StopError, match="did not drain this node: Error: no such node"):
        drain_node(Notice("stop", 61.5), address="head:6379")
    assert len(asked) == 2
    told = asked[0]
    assert told[told.index("--deadline-remaining-seconds") + 1] == "61"
    assert told[told.index("--address") + 1] == "head:6379"
    assert "--node-id" not in told


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes on this machine; the head has room for the workers of both."""
    for name, value in (("memory_monitor_refresh_ms", "0"), ("agent_register_timeout_ms", "120000")):
        monkeypatch.setenv(f"RAY_{name}", value)
    node = {"object_store_memory": 128 << 20, "include_dashboard": False}
    folder = tmp_path_factory.mktemp("ray")
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 6, "temp_dir": str(folder)})
    try:
        cluster.add_node(**{**node, "num_cpus": 3})
        with no_ray():
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
    finally:
        cluster.shutdown()


@ray.remote(num_cpus=0.01, scheduling_strategy="SPREAD")
def where() -> str:
    return str(ray.get_runtime_context().get_node_id())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_a_node_that_gets_a_notice_takes_no_new_task_and_nothing_is_lost_with_it(
    cluster: Cluster, service: MetadataService, tmp_path: Path
) -> None:
    bundle, out = tiny_bundle(tmp_path / "bundle"), tmp_path / "out"
    for index in range(NUM_SCENES):
        write_scene(tmp_path / "in" / f"s{index:02}.tif", noise(3, 1500, 600, seed=index))
    settings = {"bundle": bundle, "window": 512}
    geoseg.predict(str(tmp_path / "in"), str(tmp_path / "calm"), engine="local", **settings)
    (leaving,) = [node for node in cluster.list_all_nodes() if not node.head]
    deadline = time.monotonic() + 120  # until its raylet has workers
    while leaving.node_id not in ray.get([where.remote() for _ in range(20)]):
        assert time.monotonic() < deadline
    command = [sys.executable, "-m", "geoseg", "watch-notices", "--metadata", service.url]
    command += ["--address", cluster.address, "--node-id", leaving.node_id]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    watch = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    told: dict[str, object] = {}

    def take_the_node_back() -> None:
        while len(list(out.glob("*/item.json"))) < 1:
            time.sleep(0.05)
        service.notice = notice_in(120)
        told["watch"] = watch.communicate(timeout=120)[0]
        told["before"] = len(list(out.glob("*/item.json")))
        told["nodes"] = set(ray.get([where.remote() for _ in range(20)]))
        cluster.remove_node(leaving, allow_graceful=False)

    end = threading.Thread(target=take_the_node_back)
    end.start()
    try:
        report = geoseg.predict(str(tmp_path / "in"), str(out), engine="ray", workers=4, **settings)
    finally:
        end.join()
        watch.kill()
    assert "this node is drained" in str(told["watch"])
    assert watch.returncode == 0
    assert told["before"] < NUM_SCENES, "the node must go while the run is at work"
    assert leaving.node_id not in told["nodes"], "no new task comes to a node that is drained"
    assert report.exit_code == 0, report.scenes
    assert digests(out) == digests(tmp_path / "calm")

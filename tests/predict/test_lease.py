"""An output has one run at a time, whatever dies, waits or gets lost on the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import boto3
import pytest
from kit.faultproxy import Cut, Rule, Without, fault_proxy
from kit.object_store import moto_server

from geoseg.errors import ConfigError, OutputHeldError, StoreError
from geoseg.predict import lease as lease_module
from geoseg.predict.lease import Lease, _here, read_holder
from geoseg.raster import store

ELSEWHERE = {"run": "x", "beat": 3, "host": "elsewhere", "pid": 1, "in": "elsewhere"}


@pytest.fixture
def out(root: str) -> str:
    return root


def lease_uri(out: str) -> str:
    return f"{out}/_geoseg/lease.json"


def put(out: str, **holder: object) -> None:
    store.write(lease_uri(out), json.dumps(holder).encode())


def held(out: str) -> dict[str, object]:
    told: dict[str, object] = json.loads(store.read(lease_uri(out)))
    return told


def wait_until(true: Callable[[], bool], *, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def test_of_many_that_wait_for_a_dead_run_one_goes_on(out: str) -> None:
    num_runs = 6
    for _ in range(3):
        put(out, **ELSEWHERE)
        together = threading.Barrier(num_runs)
        with ExitStack() as holding, ThreadPoolExecutor(num_runs) as pool:

            def begin(_: int, holding: ExitStack = holding, together: threading.Barrier = together) -> str:
                together.wait(20)
                with suppress(OutputHeldError):
                    return holding.enter_context(Lease(out, beat_s=0.2)).run_id
                return ""

            (winner,) = [run_id for run_id in pool.map(begin, range(num_runs)) if run_id]
            assert held(out)["run"] == winner
        assert read_holder(out) is None


def test_a_lease_of_this_run_is_its_own_whatever_its_version(out: str) -> None:
    with Lease(out, beat_s=0.1) as lease:
        put(out, run=lease.run_id, beat=1000)
        wait_until(lambda: 1000 > int(str(held(out)["beat"])) > 0)
        lease.check()
    assert read_holder(out) is None


@pytest.mark.bucket
def test_an_answer_lost_is_not_a_lease_lost(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Rule(method="PUT", fault=Cut(0), times=None, chance=0.5)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], lost, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with Lease(f"s3://{bucket}", beat_s=0.05) as lease:
            wait_until(lambda: len(proxy.hit) >= 8, timeout_s=60)
            lease.check()
            assert held(f"s3://{bucket}")["run"] == lease.run_id


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_store_without_conditional_writes_is_named(header: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        moto_server() as environment,
        fault_proxy(environment["AWS_ENDPOINT_URL"], Rule(fault=Without(header.lower()), times=None)) as proxy,
    ):
        for name, value in (environment | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            monkeypatch.setenv(name, value)
        boto3.Session().client("s3").create_bucket(Bucket="geoseg")
        with (
            pytest.raises(ConfigError, match=rf"lease.json: this store ignores {header} on writes"),
            Lease("s3://geoseg"),
        ):
            pass


def test_a_lease_that_was_removed_is_lost(out: str) -> None:
    with Lease(out, beat_s=0.1) as lease:
        store.delete([lease.uri])
        wait_until(lambda: bool(lease._lost))
        with pytest.raises(OutputHeldError, match="taken this output over"):
            lease.check()
    assert not store.exists(lease_uri(out))


def test_a_run_that_slept_does_not_remove_the_lease_of_its_successor(out: str) -> None:
    with Lease(out, beat_s=60):
        put(out, **ELSEWHERE)
    assert held(out) == ELSEWHERE


def test_a_run_that_waits_goes_on_when_the_holder_ends(out: str) -> None:
    put(out, **ELSEWHERE)
    threading.Timer(0.5, store.delete, [[lease_uri(out)]]).start()
    began = time.monotonic()
    with Lease(out, beat_s=2):
        assert time.monotonic() - began < 3, "it did not wait for the three beats"


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_dead_process_beside_this_one_is_taken_over_at_once(out: str) -> None:
    put(out, run="x", beat=1, host=socket.gethostname(), pid=dead_pid(), **{"in": _here()})
    began = time.monotonic()
    with Lease(out, beat_s=30) as lease:
        assert time.monotonic() - began < 5
        assert held(out)["run"] == lease.run_id


@pytest.mark.parametrize("pid", ["dead here", "alive here"])
def test_a_run_in_another_container_of_this_name_is_not_dead(pid: str, tmp_path: Path) -> None:
    out, beat = str(tmp_path), 0
    number = dead_pid() if pid == "dead here" else os.getppid()
    stop = threading.Event()

    def live() -> None:
        nonlocal beat
        while not stop.wait(0.05):
            beat += 1
            put(out, run="x", beat=beat, host=socket.gethostname(), pid=number, **{"in": "another container"})

    holder = threading.Thread(target=live)
    holder.start()
    try:
        wait_until(lambda: store.exists(lease_uri(out)))
        with pytest.raises(OutputHeldError, match=f"process {number}"), Lease(out, beat_s=0.2):
            pass
    finally:
        stop.set()
        holder.join()


def test_a_process_id_that_was_given_away_is_waited_out(tmp_path: Path) -> None:
    put(str(tmp_path), run="x", beat=1, host=socket.gethostname(), pid=os.getppid(), **{"in": _here()})
    began = time.monotonic()
    with Lease(str(tmp_path), beat_s=0.2):
        assert 0.6 <= time.monotonic() - began < 5


@pytest.mark.parametrize("body", [b"", b"not json", b"[1]", b'"x"', b"\xff"])
def test_a_lease_that_nobody_wrote_is_taken(body: bytes, tmp_path: Path) -> None:
    store.write(lease_uri(str(tmp_path)), body)
    with Lease(str(tmp_path), beat_s=60) as lease:
        assert held(str(tmp_path))["run"] == lease.run_id


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    out = str(tmp_path)
    with (
        Lease(out, beat_s=0.1),
        pytest.raises(OutputHeldError, match="is writing to this output"),
        Lease(out, beat_s=1),
    ):
        pass
    with Lease(out, beat_s=0.1):
        assert read_holder(out) is not None
    assert read_holder(out) is None


def test_a_lease_lost_ends_the_run(tmp_path: Path) -> None:
    with Lease(str(tmp_path), beat_s=0.05) as lease:
        store.write(lease.uri, b'{"run": "other", "beat": 1}')
        deadline = time.monotonic() + 10
        while not lease._lost and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(OutputHeldError, match="taken this output over"):
            lease.check()
    assert json.loads(store.read(lease.uri))["run"] == "other", "another run's lease is not ours to remove"


@pytest.mark.parametrize("taken", [False, True], ids=["still its own", "taken over"])
def test_a_run_that_stood_still_asks_the_store_before_it_goes_on(
    taken: bool, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(root, beat_s=60) as lease:
        lease.check()
        beat = held(root)["beat"]
        now = lease_module._now
        monkeypatch.setattr(lease_module, "_now", lambda: now() + 121)
        if taken:
            put(root, **ELSEWHERE)
            with pytest.raises(OutputHeldError, match="taken this output over"):
                lease.check()
            assert held(root) == ELSEWHERE
        else:
            lease.check()
            assert int(str(held(root)["beat"])) == int(str(beat)) + 1


def test_a_run_ends_when_the_store_lets_no_renewal_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed_s = 0.0
    now = lease_module._now

    def away(*_: object, **__: object) -> None:
        nonlocal passed_s
        passed_s += 200
        raise StoreError("away")

    with Lease(str(tmp_path), beat_s=60) as lease:
        monkeypatch.setattr(lease_module, "_now", lambda: now() + passed_s)
        passed_s = 121
        with monkeypatch.context() as patch:
            patch.setattr(store, "write", away)
            patch.setattr(time, "sleep", lambda _: None)
            with pytest.raises(OutputHeldError, match="no renewal through for 600 s"):
                lease.check()
    assert read_holder(str(tmp_path)) is not None, "others take it for dead, as it may be held again"


def test_a_lease_let_go_is_had_at_once_and_nobody_deletes_it(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []
    monkeypatch.setattr(store, "delete", deleted.extend)
    for _ in range(2):
        with Lease(out, beat_s=60) as lease:
            assert held(out)["run"] == lease.run_id
        assert read_holder(out) is None
    assert not deleted

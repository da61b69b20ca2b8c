"""A Ray head as an operator starts one: a process of its own, with token authentication, a dashboard and metrics; and nodes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kit.machines import Machine
from kit.object_store import ServerError, free_ports

_REPOSITORY = Path(__file__).resolve().parents[2]
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


@dataclass(frozen=True, slots=True)
class RayHead:
    """Where a head is found, the token that it asks for, and the process below which all of it runs."""

    folder: Path
    port: int
    dashboard_port: int
    metrics_port: int
    token: str = field(repr=False)
    host: str = "127.0.0.1"
    pid: int = 0

    @property
    def address(self) -> str:
        """The URL of the dashboard, which takes jobs."""
        return f"http://{self.host}:{self.dashboard_port}"

    def client_environment(self) -> dict[str, str]:
        """What a client needs besides the address."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def metrics(self) -> str:
        """What the node exports to Prometheus now."""
        with urllib.request.urlopen(f"http://{self.host}:{self.metrics_port}/metrics", timeout=10) as answer:
            return answer.read().decode()


@contextlib.contextmanager
def ray_head(*, num_cpus: int = 2, host: str = "127.0.0.1", timeout_s: float = 300) -> Iterator[RayHead]:
    """Run a head for the length of the block, at an address of this machine, in a process group that ends with it.

    Raises ServerError when it does not answer within ``timeout_s``.
    """
    folder = Path(tempfile.mkdtemp(prefix="geoseg-head-", dir="/tmp"))  # short: Ray's sockets lie below it
    port, dashboard, metrics, agent, agent_grpc, client = free_ports(6)
    head = RayHead(folder, port, dashboard, metrics, secrets.token_hex(), host)
    options = {
        "port": port,
        "node-ip-address": host,
        "dashboard-host": host,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "ray-client-server-port": client,
        "metrics-export-port": metrics,
        "num-cpus": num_cpus,
        "object-store-memory": 128 << 20,
        "temp-dir": folder,
    }
    log = folder / "head.log"
    process = _start([*_RAY, "start", "--head", *_as_options(options)], head, log)
    try:
        _wait_for(head, process, log, time.monotonic() + timeout_s)
        yield replace(head, pid=process.pid)
        if process.poll() is not None:
            raise ServerError(f"Ray's head ended by itself: {_last_words(head, log)}")
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_node(head: RayHead, machine: Machine, *, num_cpus: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """Run a node of the head's cluster on another machine for the length of the block; its process leads a group of its own."""
    options = {
        "address": f"{head.host}:{head.port}",
        "node-ip-address": machine.address,
        "num-cpus": num_cpus,
        "object-store-memory": 128 << 20,
    }
    process = _start(machine.command(*_RAY, "start", *_as_options(options)), head, head.folder / f"{machine.name}.log")
    try:
        yield process
    finally:
        _end(process)


def wait_for_nodes(head: RayHead, num: int, *, timeout_s: float = 300) -> None:
    """Wait until so many nodes, the head among them, are alive. Raises ServerError."""
    request = urllib.request.Request(
        f"{head.address}/nodes?view=summary", headers={"Authorization": f"Bearer {head.token}"}
    )
    give_up = time.monotonic() + timeout_s
    while True:
        with urllib.request.urlopen(request, timeout=30) as answer:
            nodes = json.load(answer)["data"]["summary"]
        alive = sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
        if alive == num:
            return
        if time.monotonic() > give_up:
            raise ServerError(f"{alive} nodes of Ray's are alive after {timeout_s:g} s, not {num}")
        time.sleep(0.5)


def _as_options(options: dict[str, Any]) -> list[str]:
    return ["--block", "--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())]


def _start(command: list[str], head: RayHead, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        **head.client_environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(_REPOSITORY),
        "RAY_memory_monitor_refresh_ms": "0",  # else it ends ours for what others on this machine take
        "RAY_agent_register_timeout_ms": "120000",  # else a node ends when a busy machine takes long to start its agent
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as told:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True
        )


def _wait_for(head: RayHead, process: subprocess.Popen[bytes], log: Path, give_up: float) -> None:
    request = urllib.request.Request(f"{head.address}/api/version", headers={"Authorization": f"Bearer {head.token}"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                head.metrics()  # by the agent, which comes up last and starts the jobs
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > give_up:
                raise ServerError(f"Ray's head did not answer: {_last_words(head, log)}") from None
            time.sleep(0.2)


def _last_words(head: RayHead, log: Path) -> str:
    logs = [
        log,
        *(head.folder / "session_latest" / "logs").glob("raylet.*"),
        *head.folder.glob("session_latest/logs/gcs_server.out"),
    ]
    return "\n".join(f"--- {each.name}\n{each.read_text(errors='replace')[-1500:]}" for each in logs if each.is_file())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the head in good order, then whatever is left of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

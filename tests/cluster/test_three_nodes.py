"""Nights handed to a real Ray head with three nodes at addresses of their own, and what may happen to these half-way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit.chaos import descendants, named
from kit.counting import counting_relay
from kit.machines import Machine, machines
from kit.object_store import ObjectStore, ServerError
from kit.oracle import seeded_bundle
from kit.ray_head import RayHead, ray_head, ray_node, wait_for_nodes
from kit.scenes import noise, write_scene

from geoseg.config import load_job
from geoseg.nightly import run_nightly
from geoseg.predict.output import list_output
from geoseg.predict.record import read_record
from geoseg.predict.verify import verify_output
from geoseg.raster import store

pytest.importorskip("aiohttp", reason="Ray's job API needs ray[default]; get it with: pip install 'geoseg[cluster]'")
pytestmark = [pytest.mark.ray, pytest.mark.bucket, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1200)]

NODES, SCENES = 3, 24
GONE_S = 180  # within which a head must have seen that a node does not answer


def results(root: str) -> dict[str, str]:
    """SHA-256 of each published object, without records, leases and parts."""
    found = [info.uri for info in store.walk(f"{root}/") if "/_geoseg/" not in info.uri]
    return {uri.removeprefix(root): hashlib.sha256(store.read(uri)).hexdigest() for uri in found}


@dataclass
class Cluster:
    """A head on this machine without CPUs, and a node on each of three machines."""

    head: RayHead
    nodes: list[Machine]
    raylets: list[subprocess.Popen[bytes]]

    def signal_node(self, what: int) -> None:
        """Send the second node's processes a signal, its workers too."""
        for pid in (*descendants(self.raylets[1].pid), self.raylets[1].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def wait_until_gone(self) -> None:
        """Wait until the head has given the second node up."""
        wait_for_nodes(self.head, NODES, timeout_s=GONE_S)

    def kill_head(self) -> None:
        """End the head as a crash would, and the jobs' drivers with it, which are its processes."""
        for pid in (*descendants(self.head.pid), self.head.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def started(host: str, nodes: list[Machine]) -> Iterator[Cluster]:
    """The cluster, up and whole."""
    with ExitStack() as stack:
        head = stack.enter_context(ray_head(num_cpus=0, host=host))
        raylets = []
        for num, node in enumerate(nodes, 2):  # one after the other, or they name their sockets alike
            raylets.append(stack.enter_context(ray_node(head, node)))
            wait_for_nodes(head, num)
        yield Cluster(head, nodes, raylets)


def kill_worker(cluster: Cluster) -> None:
    """The process that predicts on the second node."""
    (victim,) = named(cluster.raylets[1].pid, "PredictWindows")
    os.kill(victim, signal.SIGKILL)


def kill_node(cluster: Cluster) -> None:
    """All at once, as when power fails."""
    cluster.signal_node(signal.SIGKILL)
    cluster.wait_until_gone()


def kill_raylet(cluster: Cluster) -> None:
    """Ray's own process of a node; its workers have to see that themselves."""
    (victim,) = named(cluster.raylets[1].pid, "raylet/raylet")
    os.kill(victim, signal.SIGKILL)
    cluster.wait_until_gone()


def cut_briefly(cluster: Cluster) -> None:
    """A few seconds without network, which nobody has to notice."""
    with cluster.nodes[1].cut_off():
        time.sleep(6)


def cut_until_gone(cluster: Cluster) -> None:
    """Cut until the head has given the node up, which meanwhile works on what it has; then healed."""
    with cluster.nodes[1].cut_off():
        cluster.wait_until_gone()


def pause_until_gone(cluster: Cluster) -> None:
    """Stopped until the head has given the node up; then it goes on where it was, and writes what nobody waits for."""
    cluster.signal_node(signal.SIGSTOP)
    cluster.wait_until_gone()
    cluster.signal_node(signal.SIGCONT)


def kill_head(cluster: Cluster) -> None:
    """With it go the driver and the cluster; the night is handed in again to another."""
    cluster.kill_head()


MISHAPS = (kill_worker, kill_node, kill_raylet, cut_briefly, cut_until_gone, pause_until_gone, kill_head)


def submitted(folder: Path, cluster: Cluster) -> subprocess.Popen[str]:
    """A client that hands the night in and follows it to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "geoseg", "submit", "job.toml", "--address", cluster.head.address],
        cwd=folder,
        env={
            **clean,
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "RAY_AUTH_TOKEN": cluster.head.token,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def night(object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A bucket with scenes, and a bundle."""
    name, folder = "nights-on-three-nodes", tmp_path_factory.mktemp("night")
    object_store.make_bucket(name)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in object_store.environment().items():
            patch.setenv(variable, value)
        for number in range(SCENES):
            path = write_scene(folder / "scene.tif", noise(3, 1024, 1024, seed=number), tiled=True)
            store.write(f"s3://{name}/in/{number:02}.tif", path.read_bytes())
        yield f"s3://{name}", seeded_bundle(folder / "bundle", depth=3, width=16)


@pytest.fixture(scope="module")
def calm(night: tuple[str, Path]) -> dict[str, str]:
    """What an undisturbed night leaves."""
    root, bundle = night
    told = {"scenes": [f"{root}/in/"], "out": f"{root}/calm", "bundle": str(bundle), "cluster": {"engine": "local"}}
    run_nightly(load_job(None, told), quiet=True)
    return results(f"{root}/calm")


@pytest.mark.parametrize("mishap", MISHAPS, ids=lambda one: one.__name__)
def test_a_night_goes_on(
    mishap: Callable[[Cluster], None],
    night: tuple[str, Path],
    calm: dict[str, str],
    object_store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
) -> None:
    root, bundle = night
    out = f"{root}/{mishap.__name__}"
    (tmp_path / "job.toml").write_text(
        f'scenes = ["{root}/in/"]\nout = "{out}"\nbundle = "{bundle}"\n[cluster]\nengine = "ray"\nworkers = {NODES}\n'
    )
    with ExitStack() as stack:
        host, nodes = stack.enter_context(machines(NODES))
        relay = stack.enter_context(counting_relay(object_store.endpoint, host=host))
        patch = stack.enter_context(monkeypatch.context())
        patch.setenv("AWS_ENDPOINT_URL", relay.endpoint)  # where the machines find it
        first = stack.enter_context(ExitStack())
        cluster = first.enter_context(started(host, nodes))
        submit = submitted(tmp_path, cluster)
        give_up = time.monotonic() + 300
        while (done := len(list_output(out).items)) < SCENES // 3:
            assert submit.poll() is None, submit.communicate()[0]
            assert time.monotonic() < give_up, f"{done} of {SCENES} scenes after 300 s"
            time.sleep(0.2)
        mishap(cluster)
        happened = time.monotonic()
        told = submit.communicate(timeout=600)[0]
        if mishap is kill_head:
            took_s = time.monotonic() - happened
            figure("R3", "kill head: seconds until the client said so and ended", f"{took_s:.0f}", goal="≤ 60")
            assert submit.returncode not in (0, None), told
            assert "Traceback" not in told, told
            assert len(list_output(out).items) < SCENES
            with contextlib.suppress(ServerError):  # that it ended
                first.close()
            cluster = stack.enter_context(started(host, nodes))
            submit = submitted(tmp_path, cluster)
            told = submit.communicate(timeout=600)[0]
        assert submit.returncode == 0, told
    assert done < SCENES, "it happened before the end"
    record = read_record(out, list_output(out).runs[-1])
    assert record["figures"]["engine"] == "ray"
    verified = verify_output(out)
    assert (verified.num_items, verified.faults) == (SCENES, ())
    left = results(out)
    differing = sum(left.get(name) != digest for name, digest in calm.items()) + len(left.keys() - calm.keys())
    what = mishap.__name__.replace("_", " ")
    figure("R3", f"{what} after {done} of {SCENES} scenes: objects that differ", differing, goal="0")
    assert left == calm, "byte for byte what an undisturbed night leaves"

"""A night handed to a real Ray head with three nodes at addresses of their own, one of which is killed half-way."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from kit.counting import counting_relay
from kit.machines import machines
from kit.object_store import ObjectStore
from kit.oracle import seeded_bundle
from kit.ray_head import ray_head, ray_node, wait_for_nodes
from kit.scenes import noise, write_scene

from geoseg.config import load_job
from geoseg.nightly import run_nightly
from geoseg.predict.output import list_output
from geoseg.predict.record import read_record
from geoseg.predict.verify import verify_output
from geoseg.raster import store

pytest.importorskip("aiohttp", reason="Ray's job API needs ray[default]; get it with: pip install 'geoseg[cluster]'")
pytestmark = [pytest.mark.ray, pytest.mark.bucket, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1200)]

NODES, SCENES = 3, 36


def results(root: str) -> dict[str, str]:
    """SHA-256 of each published object, without records, leases and parts."""
    found = [info.uri for info in store.walk(f"{root}/") if "/_geoseg/" not in info.uri]
    return {uri.removeprefix(root): hashlib.sha256(store.read(uri)).hexdigest() for uri in found}


def test_a_night_goes_on_when_a_node_dies(
    bucket: str, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = seeded_bundle(tmp_path / "bundle", depth=3, width=16)
    for number in range(SCENES):
        path = write_scene(tmp_path / "scene.tif", noise(3, 1024, 1024, seed=number), tiled=True)
        store.write(f"s3://{bucket}/in/{number:02}.tif", path.read_bytes())
    out = f"s3://{bucket}/masks"
    (tmp_path / "job.toml").write_text(
        f'scenes = ["s3://{bucket}/in/"]\nout = "{out}"\nbundle = "{bundle}"\n'
        f'[cluster]\nengine = "ray"\nworkers = {NODES}\n'
    )
    with ExitStack() as stack:
        host, nodes = stack.enter_context(machines(NODES))
        relay = stack.enter_context(counting_relay(object_store.endpoint, host=host))
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", relay.endpoint)  # where the machines find it
            head = stack.enter_context(ray_head(num_cpus=0, host=host))
            raylets = []
            for num, node in enumerate(nodes, 2):  # one after the other, or they name their sockets alike
                raylets.append(stack.enter_context(ray_node(head, node)))
                wait_for_nodes(head, num)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        submit = subprocess.Popen(
            [sys.executable, "-m", "geoseg", "submit", "job.toml", "--address", head.address],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "RAY_AUTH_TOKEN": head.token},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        give_up = time.monotonic() + 300
        while (done := len(list_output(out).items)) < SCENES // 2:
            assert submit.poll() is None, submit.communicate()[0]
            assert time.monotonic() < give_up, f"{done} of {SCENES} scenes after 300 s"
            time.sleep(0.2)
        os.killpg(raylets[1].pid, signal.SIGKILL)
        told = submit.communicate(timeout=600)[0]
        assert submit.returncode == 0, told
        wait_for_nodes(head, NODES)
    assert done < SCENES, "it was killed before the end"
    (run,) = list_output(out).runs
    record = read_record(out, run)
    assert record["counts"]["published"] == SCENES
    assert record["figures"]["engine"] == "ray"
    verified = verify_output(out)
    assert (verified.num_items, verified.faults) == (SCENES, ())

    calm = f"s3://{bucket}/calm"
    run_nightly(
        load_job(
            None, {"scenes": [f"s3://{bucket}/in/"], "out": calm, "bundle": str(bundle), "cluster": {"engine": "local"}}
        ),
        quiet=True,
    )
    assert results(out) == results(calm), "byte for byte what an undisturbed night leaves"

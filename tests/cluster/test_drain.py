"""A signal ends a run on Ray in good order, whenever it comes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit.oracle import digests
from kit.scenes import noise, tiny_bundle, write_scene

import geoseg
from geoseg.predict.lease import read_holder
from geoseg.predict.verify import verify_output

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]

NUM = 16


@pytest.mark.parametrize(("number", "read"), [(signal.SIGTERM, "actor"), (signal.SIGINT, "tasks")])
def test_what_is_complete_is_published_and_the_next_run_does_the_rest(number: int, read: str, tmp_path: Path) -> None:
    bundle, out = tiny_bundle(tmp_path / "bundle"), tmp_path / "out"
    write_scene(tmp_path / "in" / "huge.tif", noise(3, 2600, 2600))
    for index in range(NUM):
        write_scene(tmp_path / "in" / f"s{index:02}.tif", noise(3, 600, 600, seed=index))
    calm = {"bundle": bundle, "window": 512, "engine": "local"}
    geoseg.predict(str(tmp_path / "in"), str(tmp_path / "calm"), **calm)
    seed = time.time_ns()
    print(f"seed {seed}")
    wanted = random.Random(seed).randrange(1, NUM // 2)
    command = [sys.executable, "-m", "geoseg", "predict", str(tmp_path / "in"), "--out", str(out), "--bundle", bundle]
    command += ["--engine", "ray", "--workers", "2", "--window", "512", "--read", read]
    handler = signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a child ignores what its parent does, as a shell's jobs may
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, handler)
    try:
        while len(list(out.glob("*/item.json"))) < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        start = time.monotonic()
        told, complaint = process.communicate(timeout=120)
        took_s = time.monotonic() - start
    finally:
        process.kill()
    print(f"signal after {wanted} scenes; {told.count('published: ')} published; ended after {took_s:.1f} s")
    assert process.returncode == 130, complaint
    assert "the same command goes on from there" in complaint
    assert took_s < 60, "30 s, and what Ray takes to end on a busy machine"
    assert told.count("published: ") == len(list(out.glob("*/item.json"))) >= wanted
    (record,) = (json.loads(path.read_text()) for path in (out / "_geoseg" / "runs").rglob("summary.json"))
    assert record["exit_code"] == 130
    assert record["left"] == NUM + 1 - record["counts"]["published"]
    assert read_holder(str(out)) is None
    assert verify_output(str(out)).faults == ()
    complete = [folder for folder in (out / "_geoseg" / "parts").iterdir() if len(list(folder.rglob("r*c*"))) == 4]
    assert [folder.name for folder in complete if folder.name.startswith("s")] == [], "no complete scene was left"
    assert geoseg.predict(str(tmp_path / "in"), str(out), **calm).exit_code == 0
    assert digests(out) == digests(tmp_path / "calm")

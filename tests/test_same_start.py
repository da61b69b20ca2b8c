"""Sixteen processes start the same job at once, twenty times: one works, the rest leave with a sentence and exit code 5."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene

from geoseg.cli import main
from geoseg.raster import store

pytestmark = [pytest.mark.bucket, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1800)]

PROCESSES, ROUNDS, SCENES = 16, 20, 16  # enough that one is at work until the slowest has asked


def start(job: Path, log: Path, barrier: Any) -> None:
    """Be one of those processes: its output goes to a file, its exit code is geoseg's."""
    with log.open("w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    barrier.wait(60)
    main(["nightly", str(job), "--quiet"])


def test_one_of_sixteen_works(bucket: str, tmp_path: Path) -> None:
    bundle = seeded_bundle(tmp_path / "bundle", depth=3, width=16)
    source = write_scene(tmp_path / "scene.tif", noise(3, 1024, 1024), tiled=True)
    server = multiprocessing.get_context("forkserver")  # a clean process that has imported what all need, once
    server.set_forkserver_preload([__name__, "geoseg.nightly", "geoseg.predict.local"])
    codes, left = [], []
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        job = folder / "job.toml"
        scenes = [f"{tmp_path}/in/{number}/{scene}.tif" for scene in range(SCENES)]
        for uri in scenes:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            Path(uri).hardlink_to(source)
        job.write_text(
            f'scenes = {scenes}\nout = "s3://{bucket}/{number}"\nbundle = "{bundle}"\n[cluster]\nengine = "local"\n'
        )
        barrier = server.Barrier(PROCESSES)
        started = [
            server.Process(target=start, args=(job, folder / f"{one}.log", barrier), daemon=True)
            for one in range(PROCESSES)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
        codes.append(sorted(process.exitcode for process in started))
        logs = [(folder / f"{one}.log").read_text() for one in range(PROCESSES)]
        for process, log in zip(started, logs, strict=True):
            if process.exitcode == 5:
                left.append(log)
            else:
                assert log.count("published: ") == SCENES, log
        items = [info for info in store.walk(f"s3://{bucket}/{number}/") if info.uri.endswith("/item.json")]
        assert len(items) == SCENES
    assert codes == [[0] + [5] * (PROCESSES - 1)] * ROUNDS
    assert len(left) == (PROCESSES - 1) * ROUNDS
    assert all("is writing to this output" in log and "Traceback" not in log for log in left)

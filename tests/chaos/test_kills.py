"""What kill -9 does to a run: nothing to its results, and little to its work."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kit import crash
from kit.chaos import kill_group, killing
from kit.data import cut_scenes
from kit.oracle import seeded_bundle
from kit.scenes import noise, write_scene
from kit.watcher import Watcher, results, watching

import geoseg

SEEDS = (17, 18, 19, 20, 21, 22, 23, 24)
KILLS, SCENES, WINDOWS = 30, 24, 96
TRIES = 6


@dataclass(slots=True)
class Seen:
    """What watchers saw, all together."""

    listings: int = 0
    partial: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, watcher: Watcher) -> None:
        self.listings += watcher.num_listings
        self.partial += watcher.num_partial
        self.faults += watcher.faults


@pytest.mark.ray
@pytest.mark.bucket
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_killed_workers_change_nothing(
    bucket: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, figure: Callable[..., None]
) -> None:
    """Each seed kills workers of one run over real scenes; what a scene's second try could not save the next run does."""
    import ray

    (tmp_path / "in").mkdir()
    (tmp_path / "notes").mkdir()
    cut_scenes(tmp_path / "in", SCENES, side=600)
    settings: dict[str, Any] = {"window": 512, "bundle": str(seeded_bundle(tmp_path / "bundle"))}
    calm = f"s3://{bucket}/calm"
    assert geoseg.predict(str(tmp_path / "in"), calm, engine="local", **settings).windows == WINDOWS
    wanted = results(calm)
    assert sum(name.endswith("/item.json") for name in wanted) == SCENES

    def computed() -> int:
        return len(crash.noted(tmp_path / "notes", crash.MADE))

    seen, killed, differing, runs, more_runs = Seen(), Counter[str](), 0, 0, 0
    ray.init(
        address="local", num_cpus=5, object_store_memory=256 << 20, include_dashboard=False, log_to_driver=False,
        _temp_dir=str(tmp_path_factory.mktemp("ray")), runtime_env=crash.ray_runtime_env(tmp_path / "notes"),
    )  # fmt: skip
    try:
        for seed in SEEDS:
            out = f"s3://{bucket}/seed-{seed}"
            with watching(out) as watcher, killing(os.getpid(), seed=seed, progress=computed, steps=(2, 12)) as killer:
                report = geoseg.predict(str(tmp_path / "in"), out, engine="ray", workers=3, **settings)
            runs += 1
            tries = 0
            while report.exit_code and tries < TRIES:
                report = geoseg.predict(str(tmp_path / "in"), out, engine="ray", workers=3, **settings)
                tries += 1
            more_runs += tries
            watcher.look()
            seen.add(watcher)
            killed.update(killer.killed)
            found = results(out)
            print(
                f"seed {seed}: {len(killer.killed)} kills, {tries} more runs, {watcher.num_listings} listings",
                flush=True,
            )
            assert report.exit_code == 0, [scene for scene in report.scenes if scene.status == "failed"]
            others = {name for name, _ in found.items() ^ wanted.items()}
            print(sorted(others), flush=True)
            differing += len(others)
            if killed.total() >= KILLS and runs >= 3:
                break
    finally:
        ray.shutdown()
        print(dict(killed))
    figure("R1", f"kills of workers in {runs} runs over {SCENES} real scenes", killed.total(), goal=f">= {KILLS}")
    figure("R1", "objects that differ from those of a calm run", differing, goal="0")
    figure("R1", f"windows computed more than once, of {runs * WINDOWS}", computed() - runs * WINDOWS)
    figure("R1", "runs after those, as a scene had lost a window twice", more_runs)
    figure("R5", "listings of a bucket while workers were killed", seen.listings)
    figure("R5", "partial scenes seen in them", seen.partial, goal="0")
    assert seen.faults == []
    assert differing == 0
    assert killed.total() >= KILLS


@dataclass(frozen=True, slots=True)
class Night:
    """Small scenes, and runs over them in processes of their own."""

    folder: Path

    def arguments(self, out: Path) -> list[str]:
        told = ["predict", str(self.folder / "in"), "--out", str(out), "--bundle", str(self.folder / "bundle")]
        return [*told, "--window", "512", "--quiet"]

    def notes(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def run(self, out: Path, notes: Path, *, kill_after: int = 0) -> int | None:
        """Run to the end, or until so many steps were passed, when its process group is killed; its exit code."""
        local = [*self.arguments(out), "--engine", "local"]
        process = crash.start(local, self.folder / "log", **{crash.NOTES: str(notes)})
        while kill_after and process.is_alive() and len(crash.noted(notes, crash.STEP)) < kill_after:
            time.sleep(0.002)
        if kill_after and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
        process.join()
        return process.exitcode


@pytest.fixture
def night(tmp_path: Path) -> Night:
    for number in range(12):
        write_scene(tmp_path / "in" / f"s{number:02}.tif", noise(3, 540, 60, seed=number))
    seeded_bundle(tmp_path / "bundle")
    return Night(tmp_path)


def items(out: Path) -> set[str]:
    return {path.parent.name for path in out.glob("*/item.json")}


@dataclass(slots=True)
class Resumed:
    """What came of killing and going on: of how many trials the objects were the same, and what was done twice."""

    trials: int = 0
    identical: int = 0
    scenes_again: int = 0
    windows_again: int = 0
    seen: Seen = field(default_factory=Seen)


def kill_and_resume(night: Night, trials: int, seed: int) -> Resumed:
    """Kill the driver at a random point of its progress and run it again, so often."""
    notes = night.notes("calm-notes")
    assert night.run(night.folder / "calm", notes) == 0, (night.folder / "log").read_text()
    wanted, steps = results(str(night.folder / "calm")), len(crash.noted(notes, crash.STEP))
    print(f"seed {seed}, {steps} steps")
    chance, came = random.Random(seed), Resumed()
    attempt = 0
    while came.trials < trials:
        attempt += 1
        assert attempt < 10 * trials, "runs end before they can be killed"
        out, first, second = (
            night.folder / f"out-{attempt}",
            night.notes(f"first-{attempt}"),
            night.notes(f"second-{attempt}"),
        )
        with watching(str(out), pause_s=0.004) as watcher:
            ended = night.run(out, first, kill_after=chance.randrange(1, steps))
            stood = items(out)
            if ended != -9:
                continue  # it was done before the kill came
            assert night.run(out, second) == 0, (night.folder / "log").read_text()
        before, after = crash.noted(first, crash.WINDOW), crash.noted(second, crash.WINDOW)
        came.trials += 1
        came.identical += results(str(out)) == wanted
        came.scenes_again += len({window.split()[0] for window in after} & stood)
        came.windows_again += len(set(before) & set(after))
        came.seen.add(watcher)
    return came


def test_a_run_whose_driver_is_killed_goes_on(night: Night) -> None:
    came = kill_and_resume(night, 2, seed=time.time_ns())
    assert (came.identical, came.scenes_again, came.windows_again) == (2, 0, 0)
    assert came.seen.faults == []


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_driver_killed_at_any_point_is_gone_on_with(night: Night, figure: Callable[..., None]) -> None:
    came = kill_and_resume(night, 20, seed=2)
    figure(
        "R2",
        "objects identical after the driver was killed and the run gone on with",
        f"{came.identical} of 20",
        goal="20 of 20",
    )
    figure("R2", "scenes done again beyond those in flight", came.scenes_again, goal="0")
    figure("R2", "windows computed again whose parts stood", came.windows_again, goal="0")
    figure("R5", "listings of folders while drivers were killed", came.seen.listings)
    figure("R5", "partial scenes seen in them", came.seen.partial, goal="0")
    assert came.seen.faults == []
    assert (came.identical, came.scenes_again, came.windows_again) == (20, 0, 0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_driver_on_ray_that_is_killed_takes_its_processes_along(night: Night, figure: Callable[..., None]) -> None:
    assert night.run(night.folder / "calm", night.notes("calm-notes")) == 0, (night.folder / "log").read_text()
    wanted, chance, seen, again = results(str(night.folder / "calm")), random.Random(3), Seen(), 0
    for trial in range(2):
        out, least = night.folder / f"out-{trial}", chance.randrange(1, 9)
        with watching(str(out)) as watcher, (night.folder / "ray-log").open("w") as log:
            command = [sys.executable, "-m", "geoseg", *night.arguments(out), "--engine", "ray", "--workers", "2"]
            driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                while len(items(out)) < least:
                    assert driver.poll() is None, (night.folder / "ray-log").read_text()
                    time.sleep(0.02)
            finally:
                kill_group(driver.pid)
                driver.wait()
            stood = {name: (out / name / "item.json").stat().st_mtime_ns for name in items(out)}
            assert night.run(out, night.notes(f"notes-{trial}")) == 0, (night.folder / "log").read_text()
        assert results(str(out)) == wanted
        again += sum((out / name / "item.json").stat().st_mtime_ns != before for name, before in stood.items())
        again += len(
            {window.split()[0] for window in crash.noted(night.folder / f"notes-{trial}", crash.WINDOW)} & {*stood}
        )
        seen.add(watcher)
    figure("R2", "scenes done again beyond those in flight, after a driver on Ray was killed twice", again, goal="0")
    assert again == 0
    assert seen.faults == []

"""Jobs handed to a real Ray head that asks for a token: run once a night, followed, asked after, stopped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.oracle import seeded_bundle, write_scene
from kit.ray_head import RayHead, ray_head

from geoseg.raster.synthetic import synthetic_image

pytest.importorskip("aiohttp", reason="Ray's job API needs ray[default]; get it with: pip install 'geoseg[cluster]'")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command is run: a bundle that travels with the job, scenes on a disk that the cluster shares."""
    here = tmp_path_factory.mktemp("submitted")
    seeded_bundle(here / "bundles")
    for seed in range(2):
        write_scene(here / "shared" / f"scene{seed}.tif", synthetic_image(300, 200, seed=seed).pixels_bhw)
    (here / "scenes.txt").write_text("".join(f"{here}/shared/scene{seed}.tif\n" for seed in range(2)))
    (here / "job.toml").write_text(
        f'scenes = ["scenes.txt"]\nout = "{here}/masks"\nbundle = "bundles"\n[cluster]\nworkers = 1\n'
    )
    return here


def geoseg(folder: Path, head: RayHead, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "geoseg", "submit", *arguments, "--address", head.address],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_night_runs_once_and_is_counted(head: RayHead, folder: Path, figure: Callable[..., None]) -> None:
    refused = geoseg(folder, head, "job.toml", "--run", "predict")
    figure("S10", "jobs that a cluster took without its token", int(refused.returncode != 4), goal="0")
    assert refused.returncode == 4, refused.stderr
    assert "RAY_AUTH_TOKEN" in refused.stderr

    token = {"RAY_AUTH_TOKEN": head.token}  # the mode follows from it
    done = geoseg(folder, head, "job.toml", "--run", "predict", **token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "published: scene0" in done.stdout, "the job's own log is followed"
    assert sorted(path.parent.name for path in (folder / "masks").glob("*/item.json")) == ["scene0", "scene1"]
    assert re.search(r"^geoseg-predict-\d{4}-\d\d-\d\d-[0-9a-f]{8} submitted", done.stdout, re.MULTILINE)

    again = geoseg(folder, head, "job.toml", "--run", "predict", **token)
    assert again.returncode == 5, again.stdout + again.stderr
    assert "was submitted already and is succeeded" in again.stderr

    series = metrics_of_the_run(head)
    assert series["ray_geoseg_scenes_total", "published"] == 2
    assert series["ray_geoseg_windows_total", "done"] == 2
    assert series["ray_geoseg_pixels_total", ""] == 2 * 300 * 200
    assert series["ray_geoseg_km2_total", ""] == pytest.approx(2 * 300 * 200 * 0.36e-6, rel=1e-3)
    assert series["ray_geoseg_bytes_read_total", ""] > 0
    assert {step for name, step in series if name == "ray_geoseg_seconds_total"} == {"read", "predict", "write", "wait"}


def metrics_of_the_run(head: RayHead) -> dict[tuple[str, str], float]:
    """The value of each of our series by its name and its own label; all are of the one run."""
    series: dict[tuple[str, str], float] = {}
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        lines = [line for line in head.metrics().splitlines() if line.startswith("ray_geoseg_")]
        runs = {run for line in lines for run in re.findall(r'[{,]run="([^"]*)"', line)}
        assert len(runs) <= 1
        for line in lines:
            own = re.search(r'[{,](?:status|outcome|step)="([^"]*)"', line)
            series[line.partition("{")[0], own[1] if own else ""] = float(line.rpartition(" ")[2])
        if len({name for name, _ in series}) == 6 and runs not in (set(), {""}):
            return series
        time.sleep(0.5)
    pytest.fail(f"not all series were exported: {sorted(series)}")


def test_a_job_that_fails_or_is_stopped_says_so(head: RayHead, folder: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    (folder / "token").write_text(head.token)
    (folder / "bad.toml").write_text(f'scenes = ["/nowhere/none.tif"]\nout = "{folder}/none"\n')
    failed = geoseg(folder, head, "bad.toml", "--run", "predict", **token)
    assert failed.returncode == 3, "the job's own exit code: nothing readable"
    assert "failed" in failed.stderr

    (folder / "long.toml").write_text(f'scenes = ["scenes.txt"]\nout = "{folder}/long"\n[cluster]\nworkers = 1\n')
    started = geoseg(folder, head, "long.toml", "--run", "predict", "--name", "mine", "--no-wait", **token)
    assert started.returncode == 0, started.stderr
    assert geoseg(folder, head, "--stop", "mine", **token).returncode == 0
    give_up = time.monotonic() + 30
    while "mine: stopped" not in (told := geoseg(folder, head, "--status", "mine", **token)).stdout:
        assert time.monotonic() < give_up, told.stdout
    assert told.returncode == 130

"""A process that dies takes nothing along but what killed it, and nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit import faults
from kit.oracle import digests, seeded_bundle, write_scene
from kit.own_ray import own_ray

import geoseg
from geoseg.cluster.predict import window_outcomes
from geoseg.cluster.resources import plan_workers
from geoseg.config import ClusterConfig, load_job
from geoseg.predict.turns import Turn
from geoseg.raster.scene import list_scenes
from geoseg.raster.synthetic import synthetic_image
from geoseg.run import RunReport, make_run_spec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module", autouse=True)
def asked(tmp_path_factory: pytest.TempPathFactory):
    """A Ray of our own whose workers die where this file says."""
    folder = tmp_path_factory.mktemp("faults")
    asked = folder / "asked.json"
    asked.write_text("{}")
    with own_ray(runtime_env=faults.runtime_env(asked)):
        yield asked


@pytest.mark.parametrize(("cores", "workers"), [(2, 2), (64, 6)])
def test_there_are_never_more_workers_on_cpus_than_ray_has_cpus(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    planned = plan_workers(ClusterConfig())
    assert planned.num == workers
    assert planned.num * planned.cpus < 6, "no CPU is left for planning and reading"
    assert planned.threads * planned.num <= cores


def predict(scenes: Path, out: Path, bundle: Path, **settings: Any) -> RunReport:
    return geoseg.predict(str(scenes), str(out), bundle=str(bundle), engine="ray", workers=2, window=512, **settings)


def test_planning_and_listing_stay_tasks_of_their_own(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Were they one task, its rows would depend on what was published before it is tried again."""
    write_scene(tmp_path / "a.tif", synthetic_image(60, 60, seed=1).pixels_bhw)
    job = load_job(None, {"scenes": [str(tmp_path)], "out": str(tmp_path / "out"), "bundle": str(bundle)})
    cluster = ClusterConfig(read="tasks")
    chain = window_outcomes(
        [Turn(ref) for ref in list_scenes(job.scenes)],
        make_run_spec(job),
        cluster,
        plan_workers(cluster),
        run_id="",
        alone=False,
    )
    chain.explain()
    plan = capsys.readouterr().out
    for step in ("ReadPlannedScenes", "MapBatches(list_scene_windows)", "MapBatches(read_windows)"):
        assert step in plan
    assert "->" not in plan


def test_no_window_is_lost_when_the_listing_of_windows_dies(asked: Path, bundle: Path, tmp_path: Path) -> None:
    """Its second try meets parts that were finished after the first; it must tell the same windows all the same."""
    for name, side in (("a", 3072), ("b", 900)):
        write_scene(tmp_path / "in" / f"{name}.tif", synthetic_image(side, side, seed=9).pixels_bhw, nodata=0)
    asked.write_text("{}")
    predict(tmp_path / "in", tmp_path / "calm", bundle)
    asked.write_text(json.dumps({"list once, with parts in": str(tmp_path / "out" / "_geoseg")}))
    (tmp_path / "out" / "_geoseg").mkdir(parents=True)
    report = predict(tmp_path / "in", tmp_path / "out", bundle)
    assert (tmp_path / "out" / "_geoseg" / "died").exists(), "the test must have ended a listing"
    assert report.exit_code == 0, report.scenes
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")


@pytest.mark.parametrize("read", ["actor", "tasks"])
def test_what_ends_its_process_every_time_fails_alone(read: str, asked: Path, bundle: Path, tmp_path: Path) -> None:
    for index, name in enumerate(["good0", "good1", "plan", "publish", "read"]):
        write_scene(tmp_path / "in" / f"{name}.tif", synthetic_image(1100, 1100, seed=index).pixels_bhw, nodata=0)
    by_loop = {"bundle": str(bundle), "engine": "local", "window": 512}
    geoseg.predict(str(tmp_path / "in"), str(tmp_path / "calm"), **by_loop)
    asked.write_text(json.dumps({"plan": ["plan"], "publish": ["publish"], "read": ["read/512/0", "read/1024/512"]}))
    report = predict(tmp_path / "in", tmp_path / "out", bundle, read=read)
    told = {scene.id: (scene.status, scene.sentence) for scene in report.scenes}
    assert told["plan"] == ("failed", told["plan"][1])
    assert "its plan was lost" in told["plan"][1]
    assert told["publish"][0] == "failed"
    assert "publishing ended the process" in told["publish"][1]
    assert told["read"][0] == "failed"
    assert "2 of its windows were lost" in told["read"][1]
    calm = digests(tmp_path / "calm")
    assert digests(tmp_path / "out") == {
        name: digest for name, digest in calm.items() if name.startswith(("good", "publish/mask", "publish/thumb"))
    }
    assert geoseg.predict(str(tmp_path / "in"), str(tmp_path / "out"), **by_loop).exit_code == 0
    assert digests(tmp_path / "out") == calm

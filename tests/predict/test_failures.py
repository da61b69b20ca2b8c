"""A bad scene never stops a run: whatever goes wrong with it is its own sentence, and the others are published."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.oracle import digests, seeded_bundle, write_scene

import geoseg
from geoseg.config import load_job
from geoseg.errors import AccessDeniedError, ConflictError, StopError, StoreError
from geoseg.predict import publish
from geoseg.predict.aoi import AreaFile, load_area
from geoseg.predict.bundles import load_bundle
from geoseg.predict.ledger import Ledger, list_windows, prepare_scene
from geoseg.predict.parts import part_uri
from geoseg.predict.plan import RunSpec, ScenePlan
from geoseg.predict.predictor import Predictor
from geoseg.predict.progress import Progress
from geoseg.predict.publish import publish_scene
from geoseg.predict.reading import Task, WindowReader
from geoseg.predict.turns import Turn
from geoseg.predict.verify import verify_output
from geoseg.predict.worker import Worker
from geoseg.raster import store
from geoseg.raster.scene import SceneRef, list_scenes
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.window import WindowSet
from geoseg.run import RunReport, make_run_spec

ODD = (MemoryError(), OSError(errno.ENOSPC, "No space left on device"), KeyError("zoom"))
BAD_SHAPE = (600, 520)
STEPS = {
    "plan": "geoseg.predict.ledger.plan_scene",
    "list": "geoseg.predict.plan.ScenePlan.windows",
    "read": "geoseg.predict.reading.WindowReader._read",
    "predict": "geoseg.predict.worker.to_scene_pixels",
    "store": "geoseg.predict.worker.part_uri",
    "publish": "geoseg.predict.publish.make_item",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded_bundle(tmp_path_factory.mktemp("bundle"))


def write_two(folder: Path) -> Path:
    """A scene with a name that tests let fail, and one that must come out whole."""
    for name, shape, seed in (("bad", BAD_SHAPE, 1), ("good", (530, 300), 2)):
        write_scene(folder / f"{name}.tif", synthetic_image(*shape, seed=seed).pixels_bhw, nodata=0)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def own_scenes(tmp_path: Path) -> Path:
    return write_two(tmp_path / "own")


@pytest.fixture(scope="module")
def calm(scenes: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The objects of a run without trouble."""
    out = tmp_path_factory.mktemp("calm")
    predict(scenes, out, bundle)
    return digests(out)


def predict(scenes: Path, out: Path, bundle: Path, **settings: Any) -> RunReport:
    return geoseg.predict(str(scenes), str(out), **{"bundle": str(bundle), "engine": "local", "window": 512} | settings)


def spec(scenes: Path, out: Path, bundle: Path, **settings: Any) -> RunSpec:
    values = {"scenes": [str(scenes)], "out": str(out), "bundle": str(bundle), "predict": {"window": 512, **settings}}
    return make_run_spec(load_job(None, values))


def planned(scenes: Path, run: RunSpec) -> ScenePlan:
    plan = prepare_scene(list_scenes([str(scenes / "bad.tif")])[0], run)
    assert isinstance(plan, ScenePlan)
    return plan


def make_parts(run: RunSpec, plan: ScenePlan) -> list[Any]:
    listed = list_windows(run, plan, only_todo=False)
    worker = Worker(run)
    done = list(worker.run(Task(plan, window) for window in listed.each))
    worker.close()
    return done


def fail(monkeypatch: pytest.MonkeyPatch, step: str, error: Exception, *, times: int = 10**6) -> None:
    """Let a step raise for the scene called bad, the first few times."""
    owner, name = STEPS[step].rsplit(".", 1)
    target = _import(owner)
    original = getattr(target, name)
    left = [times]

    def failing(*args: Any, **settings: Any) -> Any:
        about = repr([arg for arg in args if not isinstance(arg, torch.Tensor)])
        if (re.search(r"\bbad\b", about) or str(BAD_SHAPE) in about) and left[0]:
            left[0] -= 1
            raise error
        return original(*args, **settings)

    monkeypatch.setattr(target, name, failing)


def _import(path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(path)
    except ImportError:
        module, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("error", ODD, ids=["memory", "disk", "surprise"])
@pytest.mark.parametrize("step", STEPS)
def test_a_surprise_in_one_scene_is_its_own(
    step: str,
    error: Exception,
    scenes: Path,
    bundle: Path,
    calm: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail(monkeypatch, step, error)
    report = predict(scenes, tmp_path / "out", bundle)
    bad, good = report.scenes
    assert report.exit_code == 1
    assert (bad.id, good.id, good.status) == ("bad", "good", "published")
    assert bad.status == ("refused" if step in ("plan", "list") else "failed")
    assert bad.sentence.startswith("bad: ")
    assert type(error).__name__ in bad.sentence
    remedy = {MemoryError: "smaller --window", OSError: "make room", KeyError: "please report it"}[type(error)]
    assert remedy in bad.sentence
    published = {name: digest for name, digest in digests(tmp_path / "out").items() if not name.startswith("bad")}
    assert published == {name: digest for name, digest in calm.items() if name.startswith("good")}
    assert len(published) == 3


@pytest.mark.parametrize("step", STEPS)
def test_what_concerns_the_job_stops_it_from_every_step(
    step: str, scenes: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, step, AccessDeniedError("no access"))
    with pytest.raises(AccessDeniedError, match="no access"):
        predict(scenes, tmp_path / "out", bundle)


@pytest.mark.parametrize("step", STEPS)
def test_what_a_second_try_may_do_is_tried_again(
    step: str, scenes: Path, bundle: Path, calm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, step, StoreError("the store is away"), times=1)
    report = predict(scenes, tmp_path / "out", bundle)
    assert report.exit_code == 0, report.scenes
    assert digests(tmp_path / "out") == calm
    assert len(report.scenes) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_batch_too_large_for_the_memory_is_halved(
    error: Exception, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scene(tmp_path / "in" / "a.tif", synthetic_image(1030, 1500, seed=3).pixels_bhw, nodata=0)
    predict(tmp_path / "in", tmp_path / "calm", bundle, batch=1)
    original, sizes = Predictor.core_logits, []

    def core_logits(self: Predictor, around: list[Any]) -> Any:
        sizes.append(len(around))
        if len(around) > 1:
            raise error
        return original(self, around)

    monkeypatch.setattr(Predictor, "core_logits", core_logits)
    report = predict(tmp_path / "in", tmp_path / "out", bundle, batch=8)
    assert report.exit_code == 0, report.scenes
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")
    assert [size for size in sizes if size > 1] == [2], "what did not fit once is not tried again"


@pytest.mark.parametrize("body", ["[]", "{}", "no json", '{"assets": {}, "properties": {"geoseg:fingerprint": "x"}}'])
def test_what_is_no_item_of_ours_is_left_alone(body: str, scenes: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "bad").mkdir(parents=True)
    (tmp_path / "out" / "bad" / "item.json").write_text(body)
    bad, good = predict(scenes, tmp_path / "out", bundle).scenes
    assert (bad.status, good.status) == ("refused", "published")
    assert "is not an item of geoseg's; move it away" in bad.sentence
    assert (tmp_path / "out" / "bad" / "item.json").read_text() == body


def test_a_run_that_comes_late_does_not_replace_newer_work(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    late = spec(scenes, tmp_path / "out", bundle, probabilities=True)
    plan = planned(scenes, late)
    make_parts(late, plan)
    predict(scenes, tmp_path / "out", bundle)
    before = digests(tmp_path / "out")
    make_parts(late, plan)
    with pytest.raises(ConflictError, match="has published or removed this scene in the meantime"):
        publish_scene(late, plan)
    assert digests(tmp_path / "out") == before
    assert predict(scenes, tmp_path / "out", bundle, probabilities=True).exit_code == 0, "planned anew it may"


def test_a_scene_that_another_run_published_meanwhile_is_planned_anew(
    scenes: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(scenes, tmp_path / "other", bundle, probabilities=True)
    late, make_item = [(tmp_path / "other" / "bad" / "item.json").read_bytes()], publish.make_item

    def overtaken(run: RunSpec, plan: ScenePlan, **told: Any) -> bytes:
        if plan.scene.id == "bad" and late:
            store.write(f"{run.out}/bad/item.json", late.pop())
        return make_item(run, plan, **told)

    monkeypatch.setattr(publish, "make_item", overtaken)
    report = predict(scenes, tmp_path / "out", bundle)
    assert [scene.status for scene in report.scenes] == ["published", "published"]
    items = [json.loads((tmp_path / "out" / name / "item.json").read_bytes()) for name in ("bad", "good")]
    assert [item["properties"]["geoseg:revision"] for item in items] == [2, 1]
    assert not verify_output(str(tmp_path / "out")).faults


def test_the_version_an_item_replaces_is_no_part_of_the_fingerprint(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    run = spec(scenes, tmp_path / "out", bundle, probabilities=True)
    first = planned(scenes, run)
    predict(scenes, tmp_path / "out", bundle)
    second = planned(scenes, run)
    assert (first.replaces, first.fingerprint) == (None, second.fingerprint)
    assert second.replaces == store.head(f"{tmp_path}/out/bad/item.json").version


def test_an_id_that_is_taken_is_told_before_the_work(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    predict(scenes, tmp_path / "out", bundle)
    write_scene(tmp_path / "moved" / "bad.tif", synthetic_image(600, 520, seed=1).pixels_bhw, nodata=0)
    report = predict(tmp_path / "moved", tmp_path / "out", bundle)
    assert report.scenes[0].status == "refused"
    assert report.pixels == 0
    assert f"if it is that very scene in a new place, delete {tmp_path}/out/bad/item.json" in report.scenes[0].sentence


def square(path: Path, lon: float) -> Path:
    ring = [[lon, 50], [lon + 2, 50], [lon + 2, 51], [lon, 51], [lon, 50]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return path


def test_a_changed_area_of_interest_is_seen(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    area = square(tmp_path / "area.json", 6)
    first = predict(scenes, tmp_path / "out", bundle, aoi=str(area))
    square(area, 100)
    second = predict(scenes, tmp_path / "out", bundle, aoi=str(area))
    assert [scene.status for scene in second.scenes] == ["published", "published"]
    assert sum(first.scenes[0].classes) > sum(second.scenes[0].classes) == 0


def test_a_worker_that_sees_another_area_says_so(tmp_path: Path) -> None:
    area = square(tmp_path / "area.json", 6)
    with pytest.raises(StopError, match="area of interest was changed while the run was going on"):
        load_area(AreaFile(str(area), "0" * 64))


def test_a_changed_bundle_is_seen(tmp_path: Path) -> None:
    first = load_bundle(str(seeded_bundle(tmp_path / "bundle", seed=0)))
    second = load_bundle(str(seeded_bundle(tmp_path / "bundle", seed=1)))
    assert (first.description.name, second.description.name) == ("seed-0", "seed-1")
    assert load_bundle(str(tmp_path / "bundle")) is second, "what did not change is not read again"


def strictly(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("nodata", ["nan", "inf", "-inf"])
def test_items_are_json_whatever_the_nodata_value(nodata: str, scenes: Path, bundle: Path, tmp_path: Path) -> None:
    report = predict(scenes, tmp_path / "out", bundle, nodata=float(nodata))
    item = strictly(Path(report.scenes[0].item).read_text())
    assert item["properties"]["geoseg:settings"]["nodata"] == nodata
    (record,) = (tmp_path / "out" / "_geoseg" / "runs").glob("*/summary.json")
    told = strictly(record.read_text())["job"]
    assert str(load_job(None, told).predict.nodata) == nodata
    again = predict(scenes, tmp_path / "out", bundle, nodata=float(nodata))
    assert {scene.status for scene in again.scenes} == {"unchanged"}


def test_fingerprints_stay_what_they_were(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    settings = spec(scenes, tmp_path, bundle, nodata=0, scale=(0, 10)).config.pixel_settings()
    assert json.dumps(settings) == (
        '{"resolution": "bundle", "bands": null, "scale": [0.0, 10.0], "nodata": 0.0, "assume_crs": null, '
        '"sidecar_mask": false, "probabilities": false}'
    )


def test_a_published_scene_leaves_no_parts_of_any_kind(own_scenes: Path, bundle: Path, tmp_path: Path) -> None:
    for settings in ({"probabilities": True}, {"window": 1024}):
        run = spec(own_scenes, tmp_path / "out", bundle, **settings)
        make_parts(run, planned(own_scenes, run))
    write_scene(own_scenes / "bad.tif", synthetic_image(600, 520, seed=7).pixels_bhw, nodata=0)
    predict(own_scenes, tmp_path / "out", bundle)
    assert not [file for file in (tmp_path / "out" / "_geoseg" / "parts").rglob("*") if file.is_file()]


def test_parts_that_outlived_their_item_go_with_the_next_run(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    """A run may end between the item and the removal of the parts; those of other settings are another's."""
    out = tmp_path / "out"
    run, other = spec(scenes, out, bundle), spec(scenes, out, bundle, probabilities=True)
    for each in (run, other):
        make_parts(each, planned(scenes, each))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geoseg.predict.publish.delete_parts", lambda *_: None)
        publish_scene(run, planned(scenes, run))
    assert predict(scenes, out, bundle).counts == {"unchanged": 1, "published": 1}
    left = {file.parent.name for file in (out / "_geoseg" / "parts").rglob("r*c*")}
    assert left == {f"{planned(scenes, other).fingerprint[:32]}-512"}


def test_parts_that_come_after_their_item_go_with_the_run(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    """As when a worker is lost with windows that were told, and another one makes them again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geoseg.predict.publish.delete_parts", lambda *_: None)
        assert predict(scenes, tmp_path / "out", bundle).exit_code == 0
    assert not list((tmp_path / "out" / "_geoseg" / "parts").rglob("r*c*"))


def test_windows_with_a_part_cost_one_listing(
    scenes: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = spec(scenes, tmp_path / "out", bundle)
    plan = planned(scenes, run)
    assert not [done for done in make_parts(run, plan) if done.failure or done.skipped]
    walk, walked = store.walk, []
    monkeypatch.setattr(store, "walk", lambda uri: walked.append(uri) or walk(uri))
    done = make_parts(run, plan)
    assert [one.skipped for one in done] == [True] * plan.num_windows
    assert len(walked) == 1
    store.delete([part_uri(run, plan, done[0].task.window)])
    assert sorted(one.skipped for one in make_parts(run, plan)) == [False] + [True] * (plan.num_windows - 1)


def test_skipped_windows_are_no_work_done(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    run = spec(scenes, tmp_path / "out", bundle)
    plan = planned(scenes, run)
    windows = list(list_windows(run, plan, only_todo=False).each)
    progress = Progress(1, quiet=True)
    ledger = Ledger(progress)
    ledger.planned(plan, len(windows))
    for window in windows[:-1]:
        ledger.window_done("bad", window, skipped=True)
    last = windows[-1].width * windows[-1].height
    assert (progress.windows_done, progress.windows_planned) == (0, 1)
    assert (progress.pixels_done, progress.pixels_planned) == (0, last)
    assert ledger.window_done("bad", windows[-1]) == plan
    assert (progress.pixels_done, progress.pixels_planned) == (last, last)


def test_listed_windows_do_not_depend_on_what_was_done(scenes: Path, bundle: Path, tmp_path: Path) -> None:
    from geoseg.cluster.rows import Opened, Share, Sizes, list_scene_windows, pack, unpack

    run = spec(scenes, tmp_path / "out", bundle)
    plan = planned(scenes, run)
    table = pack(Opened(Turn(SceneRef("bad", plan.scene.uri)), plan.to_json()))
    sizes = Sizes(least=2, most=2, workers=1)

    def listed() -> list[Share]:
        tables = list_scene_windows(table, run, sizes=sizes, only_todo=False)
        return [unpack(packed) for told in tables for packed in told["packed"].to_pylist()]

    first = listed()
    make_parts(run, plan)
    second = listed()
    publish_scene(run, plan)
    third = listed()
    assert first == second == third
    assert [(len(share.opened), len(share.windows)) for share in first] == [(1, 2), (0, 2)]


def test_a_million_windows_fit_a_small_set() -> None:
    windows = WindowSet()
    places = [(row * 512, col * 512) for row in range(0, 782, 2) for col in range(782)]
    for place in places:
        windows.add(*place)
    assert len(windows) == len(places)
    assert windows.has(1024, 781 * 512)
    assert not windows.has(512, 0)
    assert sum(value.__sizeof__() for value in windows._rows.values()) < 60_000


def test_reading_knows_a_few_scenes_at_a_time(bundle: Path, own_scenes: Path, tmp_path: Path) -> None:
    run = spec(own_scenes, tmp_path / "out", bundle)
    reader = WindowReader(run)
    rng = np.random.default_rng(0)
    for index in range(10):
        write_scene(own_scenes / "bad.tif", rng.integers(1, 255, (3, 60 + index, 60), dtype=np.uint8))
        plan = planned(own_scenes, run)
        reader.read(Task(plan, next(list_windows(run, plan, only_todo=False).each)))
    assert len(reader._scenes) == 8

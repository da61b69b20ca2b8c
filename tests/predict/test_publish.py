"""A scene stands whole or not at all, once, whoever publishes it and how often."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kit.oracle import published_mask, seeded_bundle, write_scene

import geoseg
from geoseg.config import load_job
from geoseg.errors import ConflictError, SceneChangedError, StoreError
from geoseg.predict.bundles import keep_bundle
from geoseg.predict.ledger import Ledger, prepare_scene
from geoseg.predict.parts import finished_parts, part_uri
from geoseg.predict.plan import RunSpec, ScenePlan, plan_from_json
from geoseg.predict.progress import Progress
from geoseg.predict.publish import publish_scene
from geoseg.predict.reading import Task
from geoseg.predict.verify import verify_output
from geoseg.predict.worker import Worker
from geoseg.raster import store
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.scene import SceneRef
from geoseg.raster.synthetic import synthetic_image
from geoseg.raster.window import Window
from geoseg.run import make_run_spec


@dataclass
class Work:
    """A scene whose parts are all made, ready to be published."""

    ref: SceneRef
    run: RunSpec
    plan: ScenePlan
    path: Path

    def make_parts(self) -> None:
        """Make the parts that are not there."""
        worker = Worker(self.run)
        done = list(worker.run(Task(self.plan, window) for window in self.windows()))
        worker.close()
        assert not [one.failure for one in done if one.failure]

    def windows(self) -> list[Window]:
        return list(self.plan.windows(SceneReader(self.plan.scene)))

    def parts(self) -> list[str]:
        return [part_uri(self.run, self.plan, window) for window in self.windows()]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    made = synthetic_image(1100, 700, seed=1)
    path = write_scene(tmp_path / "scene.tif", made.pixels_bhw, nodata=0)
    bundle = seeded_bundle(tmp_path / "bundle")
    values = {"scenes": [str(path)], "out": str(tmp_path / "out"), "bundle": str(bundle), "predict": {"window": 512}}
    run = make_run_spec(load_job(None, values))
    keep_bundle(run)
    ref = SceneRef("scene", str(path))
    plan = prepare_scene(ref, run)
    assert isinstance(plan, ScenePlan)
    made_work = Work(ref, run, plan, path)
    made_work.make_parts()
    return made_work


def objects(work: Work) -> dict[str, bytes]:
    folder = Path(work.run.out) / "scene"
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_publishing_twice_leaves_the_same_objects(work: Work) -> None:
    first = publish_scene(work.run, work.plan)
    before = objects(work)
    work.make_parts()
    assert publish_scene(work.run, work.plan) == first
    assert objects(work) == before
    assert set(before) == {"item.json", *(name for name in before if name.startswith(("mask-", "thumbnail-")))}


def test_eight_publishers_at_once_leave_one_scene(work: Work) -> None:
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(publish_scene, work.run, work.plan) for _ in range(8)]
    outcomes = [future.exception() for future in futures]
    assert None in outcomes
    assert all(error is None or isinstance(error, StoreError) for error in outcomes), outcomes
    assert len(objects(work)) == 3
    assert verify_output(work.run.out).faults == ()


def test_a_missing_part_publishes_nothing(work: Work) -> None:
    store.delete(work.parts()[:1])
    with pytest.raises(StoreError, match="part is missing; run again"):
        publish_scene(work.run, work.plan)
    assert not store.exists(f"{work.run.out}/scene/item.json")


def test_a_damaged_part_is_removed_and_redone(work: Work) -> None:
    uri = work.parts()[0]
    store.write(uri, store.read(uri)[:-3])
    with pytest.raises(StoreError, match="damaged; run again"):
        publish_scene(work.run, work.plan)
    assert not store.exists(uri)
    work.make_parts()
    publish_scene(work.run, work.plan)
    assert verify_output(work.run.out).faults == ()


def test_a_scene_replaced_meanwhile_is_not_published(work: Work) -> None:
    write_scene(work.path, synthetic_image(1100, 700, seed=2).pixels_bhw, nodata=0)
    with pytest.raises(SceneChangedError, match="run again to take the new version"):
        publish_scene(work.run, work.plan)
    assert not store.exists(f"{work.run.out}/scene/item.json")
    assert not finished_parts(work.run, work.plan), "parts of the old version must not meet those of another"


def test_an_id_taken_by_another_scene_is_a_conflict(work: Work, tmp_path: Path) -> None:
    publish_scene(work.run, work.plan)
    other = write_scene(tmp_path / "elsewhere" / "scene.tif", synthetic_image(600, 600, seed=3).pixels_bhw, nodata=0)
    report = geoseg.predict(str(other), work.run.out, bundle=work.run.bundle_uri, engine="local", window=512)
    assert report.scenes[0].status == "refused"
    assert "this id is taken by" in report.scenes[0].sentence


def test_an_item_that_appears_meanwhile_is_not_overwritten(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{work.run.out}/scene/item.json"
    monkeypatch.setattr("geoseg.predict.publish.make_item", lambda *_, **__: (store.write(uri, b"[]"), b"{}")[1])
    with pytest.raises(ConflictError, match="not an item of geoseg's; move it away"):
        publish_scene(work.run, work.plan)
    assert store.read(uri) == b"[]"


def test_an_interrupted_run_goes_on_from_its_parts(work: Work) -> None:
    store.delete(work.parts()[:2])
    report = geoseg.predict(str(work.path), work.run.out, bundle=work.run.bundle_uri, engine="local", window=512)
    assert report.exit_code == 0
    assert report.pixels < work.plan.scene.grid.width * work.plan.scene.grid.height * 0.6
    mask = published_mask(report.scenes[0].mask)
    whole = geoseg.predict(str(work.path), work.run.out + "2", bundle=work.run.bundle_uri, engine="local", window=1024)
    np.testing.assert_array_equal(mask, published_mask(whole.scenes[0].mask))


def test_verify_finds_damage(work: Work) -> None:
    published = publish_scene(work.run, work.plan)
    mask = Path(published.mask_uri)
    data = bytearray(mask.read_bytes())
    data[len(data) // 2] ^= 1
    mask.write_bytes(bytes(data))
    assert "SHA-256" in verify_output(work.run.out).faults[0]
    mask.write_bytes(bytes(data[:-10]))
    assert "bytes, the item says" in verify_output(work.run.out).faults[0]
    mask.unlink()
    assert "no such file" in verify_output(work.run.out).faults[0]
    item = Path(published.item_uri)
    told = json.loads(item.read_text())
    del told["properties"]["datetime"]
    item.write_text(json.dumps(told))
    assert any("not a valid STAC item" in fault for fault in verify_output(work.run.out).faults)


def test_a_plan_travels_as_text(work: Work) -> None:
    assert plan_from_json(work.plan.to_json()) == work.plan


@pytest.mark.parametrize("order", ["scene first", "windows first", "twice"])
def test_the_ledger_does_not_mind_the_order(order: str, work: Work) -> None:
    ledger = Ledger(Progress(1, quiet=True))
    complete = []
    windows = work.windows()[:3]
    if order != "windows first":
        complete.append(ledger.planned(work.plan, 3))
    told = windows * (2 if order == "twice" else 1)
    complete += [ledger.window_done("scene", window) for window in told]
    if order == "windows first":
        complete.append(ledger.planned(work.plan, 3))
    assert [plan for plan in complete if plan is not None] == [work.plan]
    ledger.abandon([])
    assert ledger.reports == []


def test_the_ledger_tells_of_what_was_lost(work: Work) -> None:
    ledger = Ledger(Progress(2, quiet=True))
    ledger.planned(work.plan, 3)
    ledger.window_done("scene", work.windows()[0])
    ledger.abandon([work.ref, SceneRef("never", "/never.tif")])
    assert [(report.id, report.status) for report in ledger.reports] == [("scene", "failed"), ("never", "failed")]
    assert "2 of its windows were lost" in ledger.reports[0].sentence

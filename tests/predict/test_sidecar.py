"""The mask beside a scene is an input like the scene: its version decides what is done again, and is watched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.oracle import published_mask
from kit.scenes import noise, tiny_bundle, write_scene

import geoseg
from geoseg.config import load_job
from geoseg.errors import SceneChangedError
from geoseg.predict.check import check_scene
from geoseg.predict.plan import RunSpec, plan_scene
from geoseg.predict.publish import publish_scene
from geoseg.predict.reading import Task
from geoseg.predict.worker import Worker
from geoseg.raster.geotiff import SceneReader
from geoseg.raster.scene import SceneRef
from geoseg.run import make_run_spec

SIDE = 300


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = write_scene(tmp_path / "scene.tif", noise(3, SIDE, SIDE))
    put_mask(path, 100)
    return path


def put_mask(scene: Path, num_rows: int) -> None:
    """Write a mask beside a scene that lets its first rows count."""
    valid = np.zeros((1, SIDE, SIDE), np.uint8)
    valid[:, :num_rows] = 255
    write_scene(scene.with_name(scene.name + ".msk"), valid)


def run_for(scene: Path, **predict: Any) -> RunSpec:
    values = {
        "scenes": [str(scene)],
        "out": str(scene.parent / "out"),
        "bundle": tiny_bundle(scene.parent / "bundle"),
        "predict": {"sidecar_mask": True, **predict},
    }
    return make_run_spec(load_job(None, values))


def test_a_new_mask_beside_a_scene_is_a_new_scene(scene: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    told = []
    for num_rows in (100, None, 200):
        if num_rows:
            put_mask(scene, num_rows)
        report = geoseg.predict(
            str(scene), str(tmp_path / "out"), bundle=bundle, engine="local", sidecar_mask=True
        ).scenes[0]
        told.append((report.status, int((published_mask(report.mask) != 255).sum()) // SIDE))
    assert told == [("published", 100), ("unchanged", 100), ("published", 200)]


def test_a_mask_that_is_replaced_during_a_run_is_noticed_at_the_end(scene: Path) -> None:
    run = run_for(scene)
    plan = plan_scene(SceneRef("a", str(scene)), run)
    worker = Worker(run)
    done = list(worker.run([Task(plan, window) for window in plan.windows(SceneReader(plan.scene))]))
    worker.close()
    assert not [one.failure for one in done if one.failure]
    put_mask(scene, 50)
    with pytest.raises(SceneChangedError, match=r"^a: was replaced"):
        publish_scene(run, plan)
    scene.with_name(scene.name + ".msk").unlink()
    with pytest.raises(SceneChangedError, match=r"^a: was replaced"):
        publish_scene(run, plan)


@pytest.mark.parametrize(("nodata", "version"), [(None, 1), (0.0, 2)])
def test_a_scene_without_a_mask_beside_it_keeps_its_fingerprint(
    nodata: float | None, version: int, scene: Path
) -> None:
    """What was published before masks beside scenes had a say must not be done again; with a nodata value it must.

    Such a value did not count beside a mask then.
    """
    run = run_for(scene, nodata=nodata)
    told = {
        "version": version,
        "input": "etag",
        "bundle": run.bundle_digest,
        "settings": run.config.pixel_settings(),
        "aoi": None,
    }
    assert run.fingerprint("etag") == hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    assert len({run.fingerprint("etag"), run.fingerprint("etag", "1"), run.fingerprint("etag", "2")}) == 3


@pytest.mark.parametrize("nodata", [None, 7])
@pytest.mark.parametrize("kind", ["an internal mask", "a mask beside it", "an alpha band", ""])
def test_of_what_says_which_pixels_are_valid_check_names_what_counts(
    kind: str, nodata: int | None, tmp_path: Path
) -> None:
    """All of them have a nodata tag and an alpha band, but for the last, which has a tag alone."""
    profile: dict[str, Any] = {"nodata": 5, **({"photometric": "rgb", "ALPHA": "YES"} if kind else {})}
    valid = np.ones((40, 50), np.bool_) if kind == "an internal mask" else None
    path = write_scene(tmp_path / "scene.tif", noise(4 if kind else 3, 40, 50), valid=valid, **profile)
    if kind == "a mask beside it":
        put_mask(path, 10)
    told = check_scene(SceneRef("scene", str(path)), run_for(path, nodata=nodata)).text
    wanted = ", ".join([*([kind] if kind else []), *(["nodata 5"] if not kind else ["nodata 7"] if nodata else [])])
    assert f"valid by {wanted}\n" in told
